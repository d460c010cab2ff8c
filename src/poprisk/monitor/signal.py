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
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INTERVAL = 2.0
"""Standard errors on either side of an interval."""

NAMES = ("share", "share_error", "snr", "noise_scale", "noise_scale_low", "noise_scale_high")
"""What :meth:`GradientSignal.parts` gives."""

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
    r"""Signal and noise of the gradient of b examples.

    Attributes:
        examples: b.
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
    norm: float
    square: float
    along: float
    across: float
    square_variance: float
    covariance: float

    @classmethod
    def of(cls, total: float, sums: list[float], counts: Counts) -> GradientSignal:
        r"""From sums over examples.

        Args:
            total: :math:`|\sum_i g_i|^2`.
            sums: as :func:`sums_of` gives them, added up over parts of the batch.
            counts: of these parts.
        """
        b, pairs, triples = counts
        own, own_squared, with_row, pair, triple = sums
        s, n = (total - own) / (b * (b - 1)), own / b
        if triples == 0 or b < 4:
            return cls(b, s, n, math.nan, math.nan, math.nan, math.nan)
        pair, triple = pair / pairs, triple / triples
        variance = (4 * (b - 2) * triple + 2 * pair - (4 * b - 6) * s * s) / ((b - 2) * (b - 3))
        fourth = s * s - variance  # unbiased for |∇R|⁴, as the variance is for that of S
        whole = max(pair - fourth, 0.0)  # of g_i · g_j: twice μᵀΣμ, and tr Σ²
        single = min(max(triple - fourth, 0.0), whole / 2)
        spread = max(own_squared / b - n * n, 0.0) / (b - 1)
        covariance = 2 * (with_row / pairs - s * n) / b
        across = 2 * (whole - 2 * single) / (b * (b - 1))
        return cls(b, s, n, 4 * single / b, across, spread, covariance)

    @property
    def noise(self) -> float:
        r""":math:`\sum\Sigma_B/(b-1)`, what the squared batch gradient has of noise."""
        return max(self.square - self.norm, 0.0) / self.examples

    def parts(self) -> dict[str, float]:
        r"""The numbers that are reported, by name; see :class:`poprisk.monitor.Signal`."""
        b, s, noise = self.examples, self.norm, self.noise
        size = noise + abs(s)
        spread = self._spread()
        found = {
            "share": s / size if size != 0 else 0.0,
            "share_error": spread / (b * size**2) if size != 0 else 0.0,
            "snr": 1 + s / noise if noise != 0 else math.inf,
        }
        if noise == 0:
            scale = 0.0 if s > 0 else math.inf
            return found | {f"noise_scale{end}": scale for end in ("", "_low", "_high")}
        inverse, error = s / (b * noise), spread / (b * noise) ** 2
        ends = {
            "": inverse,
            "_low": inverse + INTERVAL * error,
            "_high": inverse - INTERVAL * error,
        }
        return found | {f"noise_scale{end}": _reciprocal(value) for end, value in ends.items()}

    def _spread(self) -> float:
        """Of N dS - S dN, in which both ratios change: they are functions of S/N."""
        s, n = self.norm, self.square
        alone = n * n * self.along + s * s * self.square_variance - 2 * n * s * self.covariance
        return math.sqrt(max(alone, 0.0) + n * n * self.across)


def _reciprocal(value: float) -> float:
    """1/x of something whose true value is positive; infinite where it is not seen to be."""
    return value if math.isnan(value) else (1 / value if value > 0 else math.inf)
