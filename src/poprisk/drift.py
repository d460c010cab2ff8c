r"""Drift and diffusion of minibatch gradients along channel directions.

A minibatch gradient is the full-batch mean plus centred noise, :math:`\hat g_k = \mu_k + \xi_k`. With
i.i.d. minibatches the drift :math:`\|\sum_k \eta\, V^T J \mu_k\|` grows like T, the diffusion
:math:`\|\sum_k \eta\, V^T J \xi_k\|` like :math:`\sqrt{T/b}`, and the label noise that is fitted shrinks
like :math:`1/\sqrt n` [LG, §4, Thm 4.1]. Here the exponents are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from poprisk import checks
from poprisk.path import Run, follow, record, split_gradient
from poprisk.path.checks import check_minibatches, check_probes
from poprisk.path.losses import Loss, gradient

CONFIDENCE = 0.95


class Exponent(NamedTuple):
    """A fitted power with its 95% interval (Student's t over replicates).

    Attributes:
        value: of the power.
        low: end of the interval; NaN with one replicate.
        high: the other.
    """

    value: float
    low: float
    high: float

    def agrees(self, expected: float) -> bool:
        """Whether the interval holds ``expected``."""
        return self.low <= expected <= self.high


class Movement(NamedTuple):
    """What minibatches did along some directions, by steps taken.

    Attributes:
        times: steps, ascending, geometrically spaced.
        drift: norm of the summed full-batch part at each.
        diffusion: norm of the summed noise.
    """

    times: list[int]
    drift: list[float]
    diffusion: list[float]


class DriftLaws(NamedTuple):
    """What :func:`sweep` measured; None where it was not asked for.

    Attributes:
        drift: power of T in the drift; 1 in theory.
        diffusion: power of T in the diffusion; 0.5 in theory.
        batch: power of the batch size in the diffusion; -0.5 in theory.
        noise: power of n in the label noise fitted at the query points; -0.5 in theory.
        replicates: seeds behind each interval.
    """

    drift: Exponent
    diffusion: Exponent
    batch: Exponent | None
    noise: Exponent | None
    replicates: int


def student_quantile(p: float, df: int) -> float:
    r"""Quantile of Student's t, by integrating its density in :math:`\theta = \arctan(t/\sqrt{df})`.

    Example:
        >>> round(student_quantile(0.975, 10), 3)
        2.228
    """
    theta = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(theta) ** (df - 1)
    mass = np.cumsum((density[1:] + density[:-1]) / 2)
    at = float(np.interp(p, mass / mass[-1], theta[1:]))
    return math.sqrt(df) * math.tan(at)


def interval(values: Sequence[float]) -> Exponent:
    """Mean and 95% interval of replicates."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Exponent(mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    quantile = student_quantile(0.5 + CONFIDENCE / 2, len(values) - 1)
    half = quantile * deviation / math.sqrt(len(values))
    return Exponent(mean, mean - half, mean + half)


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
    seen = max(len(i.examples) for i in run.intervals)
    check_minibatches(seen, problem.n, run.stride)
    if directions is not None:
        check_probes(directions, (problem.n, problem.c))
    marks = np.unique(np.geomspace(min(first, len(run)), len(run), points).round().astype(int))
    times = [int(t) for t in marks]
    x, y = problem.train
    total = torch.zeros(problem.n, problem.c, 2, dtype=torch.float64)
    norms = []
    for k in range(len(run)):
        w, rule, step = run.weights[k].double(), run.rule(k, torch.float64), run.intervals[k]
        u, pull = problem.pullback(w, x)
        g = gradient(problem.loss, problem.shaped(u), y).reshape_as(u) / problem.n
        sampled = torch.zeros(problem.n, 1, dtype=torch.float64)
        sampled[step.examples] = step.sampling[:, None]
        both = pull(torch.stack([g, (sampled - 1) * g], dim=-1))
        carried = rule.from_momentum * rule.gain / (1 - rule.carry) + rule.from_gradient
        scale = rule.correction * rule.precondition * carried
        total += problem.jvp(w, x, scale * both)
        if k + 1 in times:
            norms.append(_norms(total, directions))
    return Movement(times, [a for a, _ in norms], [b for _, b in norms])


def _norms(total: Tensor, directions: Tensor | None) -> tuple[float, float]:
    seen = total.flatten(0, 1)
    if directions is not None:
        seen = directions.to(total).flatten(0, 1).T @ seen
    return float(seen[:, 0].norm()), float(seen[:, 1].norm())


def exponents(movements: Sequence[Movement]) -> tuple[Exponent, Exponent]:
    """Powers of T in drift and diffusion, from replicates that differ in their batches."""
    return (
        interval([slope(m.times, m.drift) for m in movements]),
        interval([slope(m.times, m.diffusion) for m in movements]),
    )


def fitted_noise(run: Run, clean_targets: Tensor) -> float:
    """Root mean square over the query outputs of what label noise moved them by."""
    noise = split_gradient(run, clean_targets, run.weights[0].double())[1]
    return float(
        follow(run, noise[..., None], dtype=torch.float64).applied.query[..., 0].square().mean().sqrt()
    )


class Recipe(NamedTuple):
    """How :func:`sweep` makes a run: plain SGD on the first n examples.

    Attributes:
        model: makes a model, the same each time for one random seed.
        loss: per example, or a name.
        train: inputs and targets.
        query: inputs of the query points.
        clean: targets without label noise; None if they are unknown.
        lr: learning rate.
        steps: of each run.
        replace: draw batches with replacement (i.i.d.), or pass over shuffled data.
    """

    model: Callable[[], nn.Module]
    loss: str | Loss
    train: tuple[Tensor, Tensor]
    query: Tensor
    clean: Tensor | None = None
    lr: float = 0.01
    steps: int = 64
    replace: bool = True

    def run(self, batch_size: int, n: int, seed: int) -> Run:
        """Record one run."""
        torch.manual_seed(0)
        model = self.model().double()
        x, y = (t[:n].double() if t.is_floating_point() else t[:n] for t in self.train)
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr)
        generator = torch.Generator().manual_seed(seed)
        batches = draw_batches(n, batch_size, self.steps, generator, replace=self.replace)
        return record(model, self.loss, sgd, batches, self.query.double(), train=(x, y))


def draw_batches(
    n: int, batch_size: int, steps: int, generator: torch.Generator, *, replace: bool
) -> list[Tensor]:
    """Index batches (b,): i.i.d. with replacement, or shuffled passes over n examples."""
    if replace:
        return [torch.randint(n, (batch_size,), generator=generator) for _ in range(steps)]
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=generator).split(batch_size)
    return found[:steps]


def sweep(
    recipe: Recipe,
    *,
    batch_sizes: Sequence[int] = (8,),
    sizes: Sequence[int] | None = None,
    seeds: Sequence[int] = range(8),
) -> DriftLaws:
    """Measure the powers of T, of the batch size and of n.

    Args:
        recipe: how a run is made.
        batch_sizes: the first is the one whose powers of T are fitted; several give the power of
            the batch size.
        sizes: training examples of the sweep over n, which needs ``recipe.clean``.
        seeds: replicates, which differ in their batches only.

    Raises:
        ValueError: for an empty list, or sizes without clean targets.
    """
    for b in batch_sizes:
        checks.check_positive("batch_sizes", b)
    if sizes is not None and recipe.clean is None:
        raise ValueError("a sweep over sizes needs clean targets: pass Recipe(clean=...).")
    n = len(recipe.train[0])
    by_batch = {b: [movement(recipe.run(b, n, s)) for s in seeds] for b in batch_sizes}
    drift, diffusion = exponents(by_batch[batch_sizes[0]])
    batch = noise = None
    if len(batch_sizes) > 1:
        columns = zip(*by_batch.values(), strict=True)
        batch = interval([slope(batch_sizes, [m.diffusion[-1] for m in c]) for c in columns])
    if sizes is not None and recipe.clean is not None:
        noise = interval([slope(sizes, _noise_by_size(recipe, sizes, s)) for s in seeds])
    return DriftLaws(drift, diffusion, batch, noise, len(seeds))


def _noise_by_size(recipe: Recipe, sizes: Sequence[int], seed: int) -> list[float]:
    """Label noise fitted with each number of examples, full batch, on a draw of the data."""
    assert recipe.clean is not None  # the caller has it
    order = torch.randperm(
        len(recipe.train[0]), generator=torch.Generator().manual_seed(seed)
    )
    x, y = (t[order] for t in recipe.train)
    shuffled = recipe._replace(train=(x, y))
    clean = recipe.clean[order]
    clean = clean.double() if clean.is_floating_point() else clean
    return [fitted_noise(shuffled.run(n, n, seed), clean[:n]) for n in sizes]
