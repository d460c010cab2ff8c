r"""Drift and diffusion of minibatch gradients along channel directions.

A minibatch gradient is the full-batch mean plus centred noise,
:math:`\hat g_k = \mu_k + \xi_k`. With i.i.d. minibatches the drift
:math:`\|\sum_k \eta\, V^T J \mu_k\|` grows like T, the diffusion
:math:`\|\sum_k \eta\, V^T J \xi_k\|` like :math:`\sqrt{T/b}`, and the label noise that is fitted
shrinks like :math:`1/\sqrt n` [LG, §4, Thm 4.1]. Here the exponents are measured.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk._renamed import renamed_arguments, renamed_names
from poprisk.intervals import t_interval
from poprisk.linalg import Estimate
from poprisk.losses import gradient
from poprisk.path import NotAnalysable, Run
from poprisk.path.checks import check_probes
from poprisk.path.closure import REMEDY, WARN_ABOVE
from poprisk.path.coupling import label_response
from poprisk.path.follow import follow_all
from poprisk.path.recursion import Recursion
from poprisk.printing import short_html, short_repr
from poprisk.randomness import generator_of

DRAWS = 16
"""Noise vectors by which fitted label noise is measured."""


class Exponent(NamedTuple):
    """A fitted power with its 95% interval (Student's t over replicates).

    Attributes:
        value: of the power.
        low: end of the interval; NaN with fewer than three replicates.
        high: the other.
        standard_error: of the value; NaN like the interval.
        valid: whether there is an interval.
        reason: why not.
        cost: trainings that were recorded for it.
    """

    value: float
    low: float
    high: float
    standard_error: float
    valid: bool
    reason: str
    cost: float

    __repr__ = short_repr
    _repr_html_ = short_html

    def agrees(self, expected: float) -> bool:
        """Whether the interval holds ``expected``."""
        return self.low <= expected <= self.high


class Movement(NamedTuple):
    """What minibatches did along r directions, by steps taken.

    Attributes:
        times: steps, ascending, geometrically spaced.
        drift: summed full-batch part at each, (times, r).
        diffusion: summed noise, (times, r).
        walk: summed noise after every step, (steps, r).
    """

    times: list[int]
    drift: Tensor
    diffusion: Tensor
    walk: Tensor

    __repr__ = short_repr


def interval(values: Sequence[float]) -> Exponent:
    """Mean and 95% interval of replicates."""
    found, n = t_interval(values), len(values)
    few = "" if found.known else f"{n} replicates leave no interval"
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if found.known else math.nan
    return Exponent(*found[:3], error, not few, few, float(n))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares power a in y ∝ xᵃ.

    Example:
        >>> round(slope([1, 2, 4], [3, 12, 48]), 12)
        2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def movement(
    run: Run, *, directions: Tensor | None = None, first: int = 4, points: int = 12
) -> Movement:
    r"""Sum drift and diffusion of a recorded run.

    Both act on the training outputs, through :math:`J_k \eta M_k` at the weights of step k;
    momentum is counted at its sum, :math:`1/(1-\beta_1)` of a gradient.

    Args:
        run: recorded at every step.
        directions: (n, c, r), orthonormal in the space of training outputs, such as a channel's
            basis; None: all directions.
        first: steps of the first point.
        points: how many points.

    Raises:
        NotAnalysable: if the run is full-batch or strided: it shows no minibatch noise.
    """
    problem = run.problem.to(torch.float64)
    if run.stride > 1:
        raise NotAnalysable(
            f"drift and diffusion need every step, but the run was recorded every {run.stride}; "
            "record with stride=1."
        )
    if max(len(i.examples) for i in run.intervals) >= problem.n:
        raise NotAnalysable(
            "a full-batch run has no minibatch noise, so no diffusion; record minibatches."
        )
    if directions is not None:
        check_probes(directions, (problem.n, problem.c))
    marks = np.unique(np.geomspace(min(first, len(run)), len(run), points).round().astype(int))
    times = [int(t) for t in marks]
    x, y = problem.train
    total = torch.zeros(problem.n, problem.c, 2, dtype=torch.float64)
    sums, walked = list[Tensor](), _Steps(run)
    for k in range(len(run)):
        w, rule, step = run.weights[k].double(), run.rule(k, torch.float64), run.intervals[k]
        u, pull = problem.J.pullback(w, x)
        g = gradient(problem.loss, problem.shaped(u), y).reshape_as(u) / problem.n
        sampled = torch.zeros(problem.n, 1, dtype=torch.float64)
        sampled[step.examples] = step.sampling[:, None]
        both = pull(torch.stack([g, (sampled - 1) * g], dim=-1))
        walked.take(k, both.sum(1, keepdim=True))
        carried = rule.from_momentum * rule.gain / (1 - rule.carry) + rule.from_gradient
        scale = rule.correction * rule.precondition * carried
        total += problem.J_whole.jvp(w, x, scale * both)
        sums.append(_along(total, directions))
    walked.warn()
    drift, walk = torch.stack(sums).unbind(-1)
    marked = torch.tensor(times) - 1
    return Movement(times, drift[marked], walk[marked], walk)


class _Steps:
    """Sees whether the steps of a run are those of the gradients of its batches."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recursion = Recursion.of_run(run, 1, torch.float64)
        self.error = self.size = 0.0

    def take(self, k: int, gradient: Tensor) -> None:
        """Predict the step of interval ``k`` from the gradient (P, 1) of its batch."""
        w, end = (self.run.weights[i].to(gradient) for i in (k, k + 1))
        rule, realized = self.run.rule(k, torch.float64), (end - w).unsqueeze(1)
        step = -self.recursion.step(rule, gradient, weights=w)[1]
        self.error += float((step - realized).square().sum())
        self.size += float(realized.square().sum())

    def warn(self) -> None:
        """Warn where they are not."""
        relative = math.sqrt(self.error / self.size) if self.size > 0 else 0.0
        if not relative <= WARN_ABOVE:
            warnings.warn(
                f"the recorded steps are off by {relative:.2g} from those of the recorded "
                "gradients (clipped or masked gradients?): drift and diffusion are not those of "
                "the run.",
                RuntimeWarning,
                stacklevel=3,
            )


def _along(total: Tensor, directions: Tensor | None) -> Tensor:
    """Coordinates (r, 2) of summed parts (n, c, 2)."""
    seen = total.flatten(0, 1)
    return seen.clone() if directions is None else directions.to(seen).flatten(0, 1).T @ seen


def exponents(movements: Sequence[Movement]) -> tuple[Exponent, Exponent]:
    r"""Powers of T in drift and diffusion, from replicates that differ in their batches.

    The drift is what the movements of the replicates, drift and diffusion together, have in
    common: :math:`\|\bar p\|^2 - s^2/R` for R replicates of variance s². The diffusion is the root
    of the mean squared displacement over all windows of T steps of all replicates, T up to a
    quarter of the run. Both with an interval from the jackknife over replicates (three or more).
    """
    times = movements[0].times
    totals = torch.stack([m.drift + m.diffusion for m in movements])
    squares, lags = displacements(movements)
    if len(movements) < 3:
        drift = [slope(times, m.drift.norm(dim=1).tolist()) for m in movements]
        return interval(drift), interval([slope(lags, row.sqrt().tolist()) for row in squares])
    return (
        jackknife(lambda kept: slope(times, _common(totals[kept])), len(movements)),
        jackknife(lambda kept: slope(lags, root_mean(squares[kept])), len(movements)),
    )


def jackknife(statistic: Callable[[Tensor], float], count: int) -> Exponent:
    """A statistic of replicates, given by their indices, with the interval of the jackknife."""
    every = torch.arange(count)
    whole = statistic(every)
    parts = [statistic(every[every != i]) for i in range(count)]
    return interval([count * whole - (count - 1) * part for part in parts])


def displacements(movements: Sequence[Movement]) -> tuple[Tensor, list[int]]:
    """Mean squared displacement of the noise over windows of each length, (R, lags)."""
    steps = len(movements[0].walk)
    longest = max(steps // 4, min(2, steps))
    lags = [int(t) for t in np.unique(np.geomspace(1, longest, 8).round().astype(int))]
    walks = torch.stack([m.walk for m in movements])
    walks = torch.cat([torch.zeros_like(walks[:, :1]), walks], dim=1)
    columns = [walks[:, ::lag].diff(dim=1).square().sum(2).mean(1) for lag in lags]
    return torch.stack(columns, dim=1), lags


def root_mean(squares: Tensor) -> list[float]:
    """Roots of squares (R, k), averaged over replicates."""
    return squares.mean(0).sqrt().tolist()


def _common(totals: Tensor) -> list[float]:
    """Norm at each time of the mean over replicates, its own noise taken out."""
    mean = totals.mean(0)
    noise = (totals - mean).square().sum((0, 2)) / (len(totals) - 1) / len(totals)
    floor = 1e-12 * mean.square().sum(1)
    return (mean.square().sum(1) - noise).clamp_min(floor).sqrt().tolist()


@renamed_arguments(generator="seed")
def fitted_noise(run: Run, *, draws: int = DRAWS, seed: int | torch.Generator = 0) -> Estimate:
    r"""Root mean square movement of a query output per unit of label noise, :math:`\sqrt{gain}`.

    The noise is isotropic and follows the recorded run; see
    :class:`poprisk.path.coupling.NoiseGain` for what is estimated.

    Args:
        run: a recorded run.
        draws: noise vectors to follow.
        seed: of the noise; or a generator, which goes on from where it is.
    """
    checks.check_positive("draws", draws)
    generator = generator_of(seed, "noise")
    began = time.perf_counter()
    problem = run.problem.to(torch.float64)
    u = problem.J.values(run.weights[0].double(), problem.train[0])
    noise = torch.randn(*u.shape, draws, generator=generator, dtype=torch.float64)
    probes = label_response(problem, u) @ noise
    applied, closure = follow_all(run, probes, dtype=torch.float64)
    closure.warn(REMEDY, stacklevel=3)
    squares = applied.query.square().mean((0, 1))
    value = float(squares.mean().sqrt())
    spread = float(squares.std()) / math.sqrt(draws) if draws > 1 else math.nan
    error = spread / (2 * value) if value > 0 else math.nan
    return Estimate.of(value, error, run.trainings(time.perf_counter() - began))


@renamed_arguments(generator="seed")
def draw_batches(n: int, batch_size: int, steps: int, seed: int, *, replace: bool) -> list[Tensor]:
    """Index batches (b,): i.i.d. with replacement, or shuffled passes over n examples."""
    generator = generator_of(seed, "batches")
    if replace:
        return [torch.randint(n, (batch_size,), generator=generator) for _ in range(steps)]
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=generator).split(batch_size)
    return found[:steps]


LAWS = "poprisk_lab.studies.drift_laws"
__getattr__ = renamed_names(
    __name__, sweep=f"{LAWS}.sweep", Recipe=f"{LAWS}.Recipe", DriftLaws=f"{LAWS}.DriftLaws"
)
