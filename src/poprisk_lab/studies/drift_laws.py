"""The powers of time, batch size and data size in drift and diffusion, over runs of one recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poprisk import _validate as checks
from poprisk.path import Run, record
from poprisk.path.drift import (
    Exponent,
    displacements,
    draw_batches,
    exponents,
    fitted_noise,
    interval,
    jackknife,
    movement,
    root_mean,
    slope,
)
from poprisk.printing import short_repr
from poprisk.protocols import PerExampleLoss
from poprisk.randomness import generator_of


class DriftLaws(NamedTuple):
    """What :func:`sweep` measured; None where it was not asked for.

    Attributes:
        drift: power of T in the drift; 1 in theory.
        diffusion: power of T in the diffusion; 0.5 in theory.
        batch: power of the batch size in the diffusion; -0.5 in theory.
        noise: power of n in the label noise that reaches a query point; -0.5 in theory.
        replicates: seeds behind each interval.
    """

    drift: Exponent
    diffusion: Exponent
    batch: Exponent | None
    noise: Exponent | None
    replicates: int

    __repr__ = short_repr


class Recipe(NamedTuple):
    """How :func:`sweep` makes a run: plain SGD on the first n examples.

    Attributes:
        model: makes a model, the same each time for one random seed.
        loss: per example, or a name.
        train: inputs and targets.
        query: inputs of the query points.
        lr: learning rate.
        steps: of each run.
        replace: draw batches with replacement (i.i.d.), or pass over shuffled data.
    """

    model: Callable[[], nn.Module]
    loss: str | PerExampleLoss
    train: tuple[Tensor, Tensor]
    query: Tensor
    lr: float = 0.01
    steps: int = 64
    replace: bool = True

    __repr__ = short_repr

    def run(self, batch_size: int, n: int, seed: int) -> Run:
        """Record one run."""
        torch.manual_seed(0)
        model = self.model().double()
        x, y = (t[:n].double() if t.is_floating_point() else t[:n] for t in self.train)
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr)
        batches = draw_batches(n, batch_size, self.steps, seed, replace=self.replace)
        return record(model, self.loss, sgd, batches, self.query.double(), train=(x, y))


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
        sizes: training examples of the sweep over n; None: no such sweep.
        seeds: replicates, which differ in their batches only.

    Raises:
        TypeError, ValueError: for a batch size or a size that is no positive integer.
    """
    for name, given in (("batch_sizes", batch_sizes), ("sizes", sizes or ())):
        for value in given:
            checks.check_positive(name, value)
    n = len(recipe.train[0])
    by_batch = {b: [movement(recipe.run(b, n, s)) for s in seeds] for b in batch_sizes}
    drift, diffusion = exponents(by_batch[batch_sizes[0]])
    batch = noise = None
    if len(batch_sizes) > 1:
        squares = torch.stack([displacements(m)[0].mean(1) for m in by_batch.values()], dim=1)
        batch = jackknife(lambda kept: slope(batch_sizes, root_mean(squares[kept])), len(seeds))
        batch = batch._replace(cost=float(len(seeds) * len(batch_sizes)))
    if sizes is not None:
        noise = interval([slope(sizes, _noise_by_size(recipe, sizes, s)) for s in seeds])
        noise = noise._replace(cost=float(len(seeds) * len(sizes)))
    return DriftLaws(drift, diffusion, batch, noise, len(seeds))


def _noise_by_size(recipe: Recipe, sizes: Sequence[int], seed: int) -> list[float]:
    """Label noise fitted with each number of examples, a draw of the data."""
    generator = generator_of(seed, "order and noise")
    order = torch.randperm(len(recipe.train[0]), generator=generator)
    x, y = (t[order] for t in recipe.train)
    runs = (recipe._replace(train=(x, y)).run(n, n, seed) for n in sizes)
    return [fitted_noise(run, seed=generator).value for run in runs]
