"""Drawn data sets of the claim about stopping: the expected loss of fresh inputs is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poprisk.randomness import RandomState, generator_of
from poprisk_lab.studies.risk.problems import (
    FRESH,
    NoisyData,
    binary_costs,
    class_costs,
    number_costs,
)

TAIL, TAILED_FRESH = 2.5, 20_000
"""Degrees of freedom of Student's t, and the fresh inputs that its mean losses take."""


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\sum |u - y|` per example.

    Example:
        >>> absolute_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        tensor([2.])
    """
    return (outputs - targets).abs().flatten(1).sum(1)


def absolute_costs(clean: Tensor, noise: float) -> Callable[[Tensor], Tensor]:
    r"""Expected absolute errors (m,) at normal noise: means of a folded normal number.

    .. math:: E|r + \sigma\epsilon| = \sigma\sqrt{2/\pi}\,e^{-r^2/2\sigma^2}
              + r\,\mathrm{erf}\frac{r}{\sigma\sqrt2}

    Args:
        clean: targets without noise (m, 1).
        noise: its standard deviation σ.
    """

    def costs(u: Tensor) -> Tensor:
        r = (u - clean).squeeze(1) / (noise * math.sqrt(2))
        return noise * math.sqrt(2) * ((-r.square()).exp() / math.sqrt(math.pi) + r * r.erf())

    return costs


def waves(x: Tensor, seed: int, directions: int = 3) -> Tensor:
    """A sum of sines (n, 1) along a few drawn directions of the inputs (n, d)."""
    w = torch.randn(x.shape[1], directions, generator=generator_of(seed, "directions"))
    return 0.8 * torch.sin(2 * x @ w / math.sqrt(x.shape[1])).sum(1, keepdim=True)


def other_classes(clean: Tensor, noise: float, classes: int, seed: int) -> Tensor:
    """Classes (n,) of which each becomes another, all alike, with this probability."""
    g = generator_of(seed, "flips")
    other = (clean + torch.randint(1, classes, clean.shape, generator=g)) % classes
    return torch.where(torch.rand(clean.shape, generator=g) < noise, other, clean)


def unequal(seed: int, *, n: int, noise: float, dimensions: int = 12) -> NoisyData:
    """Three classes of 90, 7 and 3%, each of three clusters; symmetric label noise."""
    g = generator_of(seed, "inputs")
    centres = 1.2 * torch.randn(3, 3, dimensions, generator=g)
    shares = torch.tensor([0.90, 0.07, 0.03])
    clean = torch.multinomial(shares, n + FRESH, replacement=True, generator=g)
    cluster = torch.randint(3, clean.shape, generator=g)
    x = centres[clean, cluster] + torch.randn(n + FRESH, dimensions, generator=g)
    y = other_classes(clean, noise, 3, seed)
    return NoisyData(x[:n], y[:n], x[n:], class_costs(clean[n:], noise, 3))


def offsets(seed: int, *, n: int, size: int, shared: float, own: float) -> NoisyData:
    """Groups of neighbours that share an offset of their targets; fresh ones are of new groups.

    Args:
        seed: of all draws.
        n: training examples.
        size: of a group. Of a fresh one a single example is seen: fresh inputs are independent.
        shared: standard deviation of the offsets.
        own: of the noise that each example has beside.
    """
    g = generator_of(seed, "inputs")
    groups = torch.arange(n) // size
    centres = torch.randn(int(groups.max()) + 1 + FRESH, 10, generator=g)
    group = torch.cat([groups, torch.arange(len(centres) - FRESH, len(centres))])
    x = 0.8 * centres[group] + 0.6 * torch.randn(len(group), 10, generator=g)
    clean = waves(x, seed)
    g = generator_of(seed, "noise")
    offset = shared * torch.randn(len(centres), 1, generator=g)
    y = clean + offset[group] + own * torch.randn(len(x), 1, generator=g)
    costs = number_costs(clean[n:], math.hypot(shared, own))
    return NoisyData(x[:n], y[:n], x[n:], costs, groups)


def heavy_tails(seed: int, *, n: int, noise: float) -> NoisyData:
    """Inputs of Student's t at 2.5 degrees of freedom, whose fourth moments are infinite."""
    from scipy.special import stdtrit

    places = torch.rand(
        n + TAILED_FRESH, 8, generator=generator_of(seed, "inputs"), dtype=torch.float64
    )
    x = torch.from_numpy(stdtrit(TAIL, places.numpy())).float()
    clean = waves(x / 2, seed, 2)
    y = clean + noise * torch.randn(clean.shape, generator=generator_of(seed, "noise"))
    return NoisyData(x[:n], y[:n], x[n:], absolute_costs(clean[n:], noise))


def uneven_noise(seed: int, *, n: int) -> NoisyData:
    """Numbers with noise of a standard deviation from 0.1 to 1.5, a function of the input."""
    x = torch.randn(n + FRESH, 8, generator=generator_of(seed, "inputs"))
    clean = waves(x, seed)
    noise = 0.1 + 1.4 * _place(x, seed)
    y = clean + noise * torch.randn(clean.shape, generator=generator_of(seed, "noise"))
    return NoisyData(x[:n], y[:n], x[n:], number_costs(clean[n:], noise[n:, 0]))


def uneven_flips(seed: int, *, n: int) -> NoisyData:
    """Two classes whose labels are flipped with a probability of up to 0.45, by the input."""
    x = torch.randn(n + FRESH, 20, generator=generator_of(seed, "inputs"))
    clean = (waves(x, seed) > 0).float()
    flipped = 0.45 * _place(x, seed)
    turn = torch.rand(clean.shape, generator=generator_of(seed, "flips")) < flipped
    y = torch.where(turn, 1 - clean, clean)
    return NoisyData(x[:n], y[:n], x[n:], binary_costs(clean[n:], flipped[n:, 0]))


def _place(x: Tensor, seed: int) -> Tensor:
    """Where inputs lie along a drawn direction, from 0 to 1, (n, 1)."""
    v = torch.randn(x.shape[1], 1, generator=generator_of(seed, "noise's direction"))
    return (2 * x @ v / v.norm()).sigmoid()


def signals(seed: int, *, n: int, noise: float) -> NoisyData:
    """Signals of ``mnist1d``, drawn anew for each seed; symmetric label noise."""
    from mnist1d.data import get_dataset_args, make_dataset

    args: Any = get_dataset_args()
    args.num_samples = n + FRESH
    args.seed = int(torch.randint(2**32, (), generator=generator_of(seed, "signals")))
    with RandomState.kept():  # the package seeds the global generators
        data = make_dataset(args)
    x, clean = (
        torch.cat([torch.from_numpy(data[key]), torch.from_numpy(data[f"{key}_test"])])
        for key in ("x", "y")
    )
    x, y = x.float(), other_classes(clean, noise, 10, seed)
    return NoisyData(x[:n], y[:n], x[n:], class_costs(clean[n:], noise, 10))
