r"""Signal and noise in the gradient of a batch, without bias and with standard errors.

For per-example gradients :math:`g_i` with mean :math:`\mu=\nabla R` and covariance :math:`\Sigma`,
two averages over b examples say all,

.. math::
    S = \frac1{b(b-1)}\sum_{i\ne j} g_i\cdot g_j, \qquad N = \frac1b\sum_i |g_i|^2,

with expectations :math:`|\nabla R|^2` and :math:`|\nabla R|^2+\operatorname{tr}\Sigma`. In the
letters of the theory :math:`S=\sum(\mu^2-\Sigma_B/(b-1))` and :math:`(N-S)/b=\sum\Sigma_B/(b-1)`.
The variance of S is that of a U-statistic,

.. math::
    \operatorname{Var} S = \frac4b\,\mu^\top\Sigma\mu + \frac2{b(b-1)}\operatorname{tr}\Sigma^2,

and both terms follow from the inner products :math:`g_i\cdot g_j` of single examples.

One batch says little: its S may be off by as much as the noise. Numbers are of several steps, with
:math:`\bar S, \bar V, \bar T` the means of S, of the noise :math:`V=(N-S)/B` of a batch of B and
of :math:`T=N-S` over them (:func:`parts_of`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

INTERVAL = 2.0
"""Standard errors on either side of an interval, if they are of the examples' drawing."""

SHARE = ("share", "share_error")
"""Numbers of :func:`parts_of` that are biased towards zero where few steps are behind them."""

INTERVALS = ("share_low", "share_high", "noise_scale_low", "noise_scale_high")

NAMES = (*SHARE, *INTERVALS, "snr", "noise_scale")
"""What :func:`parts_of` gives."""

SUMS = 5
"""Numbers that :func:`sums_of` gives for a set of examples."""


class Counts(NamedTuple):
    """Examples, and ordered pairs and triples of different ones among which sums were taken."""

    examples: int = 0
    pairs: int = 0
    triples: int = 0

    @classmethod
    def of(cls, examples: int) -> Counts:
        """All pairs and triples of so many examples."""
        b = examples
        return cls(b, b * (b - 1), b * (b - 1) * (b - 2))

    def plus(self, other: Counts) -> Counts:
        """Those of both sets, without pairs between them."""
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def sums_of(gram: Tensor) -> Tensor:
    r"""What errors need of the inner products of a set of examples; float64, (5,).

    With K the matrix, n its diagonal and r its row sums without the diagonal: the sums of
    :math:`n_i`, :math:`n_i^2`, :math:`n_i r_i`, :math:`K_{ij}^2` over pairs, and
    :math:`K_{ij}K_{ik}` over triples.

    Args:
        gram: (b, b).
    """
    rest = gram.to(torch.float64, copy=True)
    n = rest.diagonal().clone()
    rest.diagonal().zero_()
    r, squares = rest.sum(1), torch.linalg.vector_norm(rest).square()
    return torch.stack([n.sum(), n.dot(n), n.dot(r), squares, r.dot(r) - squares])


class GradientSignal(NamedTuple):
    r"""Signal and noise of the gradient of one step, measured on b of its examples.

    Attributes:
        examples: b.
        batch: B, the examples behind the step; b, or more where only some were looked at.
        norm: S, unbiased for :math:`|\nabla R|^2`; may be negative.
        square: N, the mean of :math:`|g_i|^2`.
        along: :math:`\tfrac4b\mu^\top\Sigma\mu`, the part of the variance of S that every example
            has alone; NaN, as all of these, where no part of the batch has three examples.
        across: :math:`\tfrac2{b(b-1)}\operatorname{tr}\Sigma^2`, the part that only pairs have,
            which is uncorrelated with N.
        square_variance: of N.
        covariance: of S and N.
    """

    examples: int
    batch: int
    norm: float
    square: float
    along: float
    across: float
    square_variance: float
    covariance: float

    @classmethod
    def of(
        cls, total: float, sums: list[float], counts: Counts, batch: int | None = None
    ) -> GradientSignal:
        r"""From sums over examples.

        Args:
            total: :math:`|\sum_i g_i|^2`.
            sums: as :func:`sums_of` gives them, added up over parts of the batch.
            counts: of these parts.
            batch: B; b if left out.
        """
        b, pairs, triples = counts
        batch = b if batch is None else batch
        own, own_squared, with_row, pair, triple = sums
        s, n = (total - own) / (b * (b - 1)), own / b
        if triples == 0 or b < 4:
            return cls(b, batch, s, n, math.nan, math.nan, math.nan, math.nan)
        pair, triple = pair / pairs, triple / triples
        variance = (4 * (b - 2) * triple + 2 * pair - (4 * b - 6) * s * s) / ((b - 2) * (b - 3))
        fourth = s * s - variance  # unbiased for |∇R|⁴, as the variance is for that of S
        whole = max(pair - fourth, 0.0)  # of g_i · g_j: twice μᵀΣμ, and tr Σ²
        single = min(max(triple - fourth, 0.0), whole / 2)
        spread = max(own_squared / b - n * n, 0.0) / (b - 1)
        covariance = 2 * (with_row / pairs - s * n) / b
        across = 2 * (whole - 2 * single) / (b * (b - 1))
        return cls(b, batch, s, n, 4 * single / b, across, spread, covariance)

    @property
    def trace(self) -> float:
        r"""T, an estimate of :math:`\operatorname{tr}\Sigma`."""
        return max(self.square - self.norm, 0.0)

    @property
    def noise(self) -> float:
        r"""V, or :math:`\sum\Sigma_B/(b-1)`: what the squared batch gradient has of noise."""
        return self.trace / self.batch

    def variance(self, by_norm: float, by_square: float) -> float:
        """That of ``by_norm * S - by_square * N``."""
        alone = by_norm**2 * self.along + by_square**2 * self.square_variance
        alone -= 2 * by_norm * by_square * self.covariance
        return max(alone, 0.0) + by_norm**2 * self.across


def parts_of(steps: Sequence[GradientSignal]) -> dict[str, float]:
    r"""The numbers that are reported of one or more steps together.

    The share is :math:`f(\bar S)` with :math:`f(s)=s/(\bar V+|s|)`, a ratio of sums over the steps.
    f bends where S varies, so :math:`\operatorname{E}f(\bar S)` is nearer to 0 than f of the truth;
    what a normal error of the estimated variance of :math:`\bar S` would shift it by is taken back.
    The reciprocal of the noise scale is :math:`\bar S/\bar T`, whose denominator hardly varies, and
    the share's interval follows from that of this ratio, in which errors are nearly normal.

    Variances are those of the examples' drawing, step by step; where a step has none, those of the
    steps from each other (the infinitesimal jackknife), with the wider intervals of Student's t.

    Args:
        steps: one or more; each of independent examples.

    Returns:
        By name; see :class:`poprisk.monitor.Signal`.
    """
    k = len(steps)
    rows = [(g.norm, g.noise, g.trace) for g in steps]
    s, v, t = (sum(values) / k for values in zip(*rows, strict=True))
    size = v + abs(s)
    if t == 0:
        share, scale = (s / size if size != 0 else 0.0), (0.0 if s > 0 else math.inf)
        return _without_noise(share, scale)

    share, more = _corrected(s, v, _error(steps, [(1.0, 0.0)] * k))
    ratio = s / t
    apart = _deviates(steps) * _error(steps, [(t + s, s)] * k) / t**2
    ends = (ratio - apart, ratio + apart)
    return {
        "share": share,
        "share_error": more
        * _error(steps, [(v + s / g.batch, s / g.batch) for g in steps])
        / size**2,
        "share_low": _share(ends[0] * t, v),
        "share_high": _share(ends[1] * t, v),
        "snr": 1 + s / v,
        "noise_scale": _reciprocal(ratio),
        "noise_scale_low": _reciprocal(ends[1]),
        "noise_scale_high": _reciprocal(ends[0]),
    }


def _without_noise(share: float, scale: float) -> dict[str, float]:
    shares = dict.fromkeys(("share", "share_low", "share_high"), share)
    scales = dict.fromkeys(("noise_scale", "noise_scale_low", "noise_scale_high"), scale)
    return {**shares, "share_error": 0.0, "snr": math.inf, **scales}


def _error(steps: Sequence[GradientSignal], weights: Sequence[tuple[float, float]]) -> float:
    """Standard error of the mean over steps of ``a * S - c * N``, with weights (a, c) of each."""
    k = len(steps)
    own = sum(g.variance(a, c) for g, (a, c) in zip(steps, weights, strict=True))
    if math.isfinite(own):
        return math.sqrt(own) / k
    if k < 2:
        return math.nan
    values = [a * g.norm - c * g.square for g, (a, c) in zip(steps, weights, strict=True)]
    mean = sum(values) / k
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (k * (k - 1)))


def _deviates(steps: Sequence[GradientSignal]) -> float:
    """Errors on either side that hold what :data:`INTERVAL` normal ones do, of few steps more."""
    drawn = all(math.isfinite(g.along) for g in steps)
    return INTERVAL if drawn or len(steps) < 2 else _student(len(steps) - 1)


@cache
def _student(degrees: int) -> float:
    from scipy.special import stdtrit  # takes a while, and is needed here alone

    return float(stdtrit(degrees, NormalDist().cdf(INTERVAL)))


def _share(norm: Any, noise: float) -> Any:
    """f, of a number or an array of them."""
    return norm / (noise + abs(norm))


# Even steps, which the kink of the share at zero does not spoil as it would a Gaussian rule.
_NODES = np.linspace(-6.0, 6.0, 241)
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


def _corrected(norm: float, noise: float, error: float) -> tuple[float, float]:
    """The share without what a normal error of S shifts it by, and how much more it varies so.

    The second number is the larger of 1 and of the ratio of the derivatives by S.
    """
    norms = norm + (0.0 if math.isnan(error) else error) * _NODES
    shifted = float(np.dot(_WEIGHTS, _share(norms, noise)))
    size = noise + abs(norm)
    slope = float(np.dot(_WEIGHTS, (size / (noise + np.abs(norms))) ** 2))
    return 2 * norm / size - shifted, max(1.0, 2 - slope)


def _reciprocal(value: float) -> float:
    """1/x of something whose true value is positive; infinite where it is not seen to be."""
    return value if math.isnan(value) else (1 / value if value > 0 else math.inf)
