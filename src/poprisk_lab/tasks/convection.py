r"""Linear convection from noisy initial values, for a physics-informed network.

.. math:: u_t + c\,u_x = 0,\quad x \in [0, 2\pi) \text{ periodic},\ t \in [0, 1],\quad
          u(x, 0) = \sin x,\quad\text{so } u(x, t) = \sin(x - c t)

The equation, c = 5 and the noise on the initial values are those of [LG]; interval, initial values
and the periodic inputs are ours (the equation is that of Krishnapriyan et al. 2021,
arXiv:2109.01050).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast, final

import torch
from torch import Tensor, nn

SPEED = 5.0
DOMAIN = (2 * math.pi, 1.0)
POINTS = 100
GRID = 32
BATCH = 32


class Convection(NamedTuple):
    """Noisy initial values, and the solution on a grid.

    Attributes:
        x: (n,) places of the measurements at t = 0, uniform in [0, 2π).
        y: (n,) what was measured there.
        grid: (m, 2) points (x, t), a square grid over the domain.
        solution: (m,) the true u there.
    """

    x: Tensor
    y: Tensor
    grid: Tensor
    solution: Tensor


def convection(seed: int, *, noise: float, points: int = POINTS) -> Convection:
    """Measure sin x at random places with normal noise of standard deviation ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * math.pi * torch.rand(points, generator=generator)
    y = x.sin() + noise * torch.randn(points, generator=generator)
    places = 2 * math.pi * torch.arange(GRID) / GRID
    times = torch.linspace(0, 1, GRID)
    grid = torch.cartesian_prod(places, times)
    return Convection(x, y, grid, exact(grid))


def exact(points: Tensor) -> Tensor:
    """The solution sin(x - ct) at ``points`` (m, 2) of (x, t)."""
    return (points[:, 0] - SPEED * points[:, 1]).sin()


@final
class PeriodicMLP(nn.Module):
    """An MLP with tanh on the inputs (cos x, sin x, 2t - 1): periodic in x by construction.

    Args:
        width: units of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, *, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        sizes = [3, *[width] * depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        for layer in self.linear:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def linear(self) -> list[nn.Linear]:
        """The layers."""
        return cast("list[nn.Linear]", list(self.layers))

    def forward(self, points: Tensor) -> Tensor:
        """The values u (m,) at ``points`` (m, 2) of (x, t)."""
        *hidden, last = self.linear
        h = periodic(points)
        for layer in hidden:
            h = layer(h).tanh()
        return last(h).squeeze(1)


def network(seed: int) -> PeriodicMLP:
    """A network at the start that the seed decides."""
    torch.manual_seed(seed)
    return PeriodicMLP()


def values_and_residuals(
    models: Sequence[PeriodicMLP], initial: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Values at some points, and residuals :math:`u_t + c\,u_x` at others, of k networks at once.

    The residual is the derivative along the one direction (c, 1): a single tangent is carried
    forward, stacked on the values, so that a layer of all networks is one batched product.

    Args:
        models: k networks of one shape.
        initial: (k, n, 2) points (x, t) whose values are wanted, for each network its own.
        inside: (k, b, 2) points whose residuals are.

    Returns:
        (k, n) values and (k, b) residuals.
    """
    layers = list(zip(*(m.linear for m in models), strict=True))
    n, both = initial.shape[1], initial.shape[1] + inside.shape[1]
    h, dh = periodic(torch.cat([initial, inside], 1)), periodic_tangent(inside)
    for i, same in enumerate(layers, start=1):
        weight = torch.stack([layer.weight for layer in same])
        bias = torch.stack([layer.bias for layer in same]).unsqueeze(1)
        z = torch.cat([h, dh], 1) @ weight.mT
        h, dh = z[:, :both] + bias, z[:, both:]
        if i < len(layers):
            h = h.tanh()
            dh = (1 - h[:, n:].square()) * dh
    return h[:, :n, 0], dh[:, :, 0]


def batches(seeds: Sequence[int], n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of measurements and fresh points of the domain, each seed with its own.

    Yields:
        Indices (k, 32) of measurements, every one once an epoch but for a rest of n mod 32, and
        points (k, 32, 2) inside the domain.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = torch.tensor(DOMAIN)
    while True:
        orders = torch.stack([torch.randperm(n, generator=g) for g in generators])
        for i in range(n // BATCH):
            points = torch.stack([torch.rand(BATCH, 2, generator=g) for g in generators])
            yield orders[:, i * BATCH : (i + 1) * BATCH], points * size


def physics_loss(models: Sequence[PeriodicMLP], x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    """Mean squared misfit at t = 0 plus mean squared residual inside, as of :func:`two_losses`."""
    misfit, residual = two_losses(models, x, y, inside)
    return misfit + residual


def two_losses(
    models: Sequence[PeriodicMLP], x: Tensor, y: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared misfit at t = 0, and mean squared residual inside, each summed over networks.

    Args:
        models: k of them.
        x: (k, b) places of measurements.
        y: (k, b) what was measured.
        inside: (k, b, 2) points of the domain.
    """
    initial = torch.stack([x, torch.zeros_like(x)], 2)
    values, residuals = values_and_residuals(models, initial, inside)
    return (values - y).square().mean(1).sum(), residuals.square().mean(1).sum()


def periodic(points: Tensor) -> Tensor:
    """The inputs (cos x, sin x, 2t - 1) of ``points`` (..., 2)."""
    x, t = points.unbind(-1)
    return torch.stack([x.cos(), x.sin(), 2 * t - 1], -1)


def periodic_tangent(points: Tensor) -> Tensor:
    """Their derivative (..., 3) along (c, 1)."""
    x = points[..., 0]
    return torch.stack([-SPEED * x.sin(), SPEED * x.cos(), torch.full_like(x, 2.0)], -1)


def relative_error(values: Tensor, solution: Tensor) -> float:
    """Relative ℓ₂ error of ``values`` (m,)."""
    return float((values - solution).norm() / solution.norm())


def relative_errors(models: Sequence[PeriodicMLP], data: Convection) -> list[float]:
    """Relative ℓ₂ error of each network on the grid."""
    grid = data.grid.expand(len(models), -1, -1)
    with torch.no_grad():
        values, _ = values_and_residuals(models, grid, grid[:, :0])
    return [relative_error(v, data.solution) for v in values]
