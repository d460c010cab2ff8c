"""Full-batch descent to interpolation, recorded or not: what several claims have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from poprisk.losses import resolve_loss
from poprisk.ntk import entk
from poprisk.path import record
from poprisk.path.operators import PathOperators, path_operators
from poprisk.protocols import PerExampleLoss
from poprisk_lab.tasks.nets import mlp


class CleanSplit(NamedTuple):
    """A training set and a query set with clean targets; float64.

    Attributes:
        x: training inputs, (n, ...).
        clean: training targets without noise, (n, 1).
        query: query inputs, (m, ...).
        target: query targets without noise, (m, 1).
    """

    x: Tensor
    clean: Tensor
    query: Tensor
    target: Tensor

    @classmethod
    def split(cls, x: Tensor, clean: Tensor, examples: int) -> CleanSplit:
        """The first examples for training, the others as queries."""
        return cls(x[:examples], clean[:examples], x[examples:], clean[examples:])

    def noisy(self, std: float, generator: torch.Generator) -> Tensor:
        """Training targets with normal noise of this standard deviation, (n, 1)."""
        noise = torch.randn(self.clean.shape, generator=generator, dtype=torch.float64)
        return self.clean + std * noise


def linear(inputs: int, outputs: int = 1) -> nn.Module:
    """A linear model without bias that starts at 0, float64."""
    model = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def two_layer(inputs: int, width: int, scales: tuple[float, float], seed: int) -> nn.Module:
    """A tanh network whose two weight matrices are normal with these scales, float64."""
    generator = torch.Generator().manual_seed(seed)
    model = mlp(inputs, width, 1, activation=nn.Tanh).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for layer, scale in zip((model[0], model[2]), scales, strict=True):
            weight = layer.get_parameter("weight")
            weight.copy_(scale * torch.randn(weight.shape, generator=generator).double())
    return model


def stable_rate(model: nn.Module, x: Tensor, fraction: float) -> float:
    r"""Learning rate :math:`fraction \cdot n / \lambda_{max}(K_{SS})` at the start.

    Full-batch gradient descent on half the squared error of a linear model is stable below 2.
    """
    kernel = entk(model, x).dense()
    return fraction * len(x) / float(torch.linalg.eigvalsh(kernel)[-1])


def descent(
    model: nn.Module,
    x: Tensor,
    fraction: float,
    momentum: float = 0.0,
    *,
    of: nn.Module | None = None,
) -> SGD:
    """Gradient descent at a :func:`stable_rate` of the model, for it or for another one."""
    rate, trained = stable_rate(model, x, fraction), model if of is None else of
    return SGD(trained.parameters(), lr=rate, momentum=momentum)


def residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Norm of outputs minus targets."""
    with torch.no_grad():
        return float((model(x) - y).norm())


def until_fitted(
    model: nn.Module, x: Tensor, y: Tensor, *, below: float, limit: int
) -> Iterator[Tensor]:
    """All examples as a batch, until the residual is ``below`` times that at the start."""
    index, goal = torch.arange(len(x)), below * residual(model, x, y)
    for _ in range(limit):
        if residual(model, x, y) <= goal:
            return
        yield index


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    below: float = 0.0,
    limit: int,
    loss: str | PerExampleLoss = "squared_error",
    minibatch: int = 0,
    generator: torch.Generator | None = None,
) -> None:
    """Train as :func:`follow` does, without a record.

    With ``minibatch`` a step takes so many examples, drawn anew by the generator.
    """
    (x, y), per_example = data, resolve_loss(loss)
    for batch in until_fitted(model, x, y, below=below, limit=limit):
        if minibatch:
            batch = torch.randperm(len(x), generator=generator)[:minibatch]
        optimizer.zero_grad()
        per_example(model(x[batch]), y[batch]).mean().backward()
        optimizer.step()


def follow(
    model: nn.Module,
    optimizer: Optimizer,
    data: CleanSplit,
    y: Tensor,
    *,
    below: float = 0.0,
    limit: int,
    loss: str | PerExampleLoss = "squared_error",
    snapshots: int = 2,
) -> PathOperators:
    """Train on targets ``y`` with the full batch; the operators of the path.

    One node a step is exact for the constant Jacobian of a linear model.
    """
    batches = until_fitted(model, data.x, y, below=below, limit=limit)
    queries = (data.query, data.target)
    run = record(model, loss, optimizer, batches, queries, train=(data.x, y))
    nodes = "left" if isinstance(model, nn.Linear) else "gauss3"
    return path_operators(run, nodes, snapshots=snapshots)


class Fit(NamedTuple):
    """How a model is fitted by full-batch gradient descent.

    Attributes:
        below: relative residual at which training ends: interpolation.
        momentum: of the descent.
        fraction: of the :func:`stable_rate`.
        limit: of steps.
    """

    below: float
    momentum: float
    fraction: float
    limit: int = 4_000

    def follow(
        self, model: nn.Module, data: CleanSplit, y: Tensor, *, loss: str = "squared_error"
    ) -> PathOperators:
        """The operators of the path."""
        optimizer = descent(model, data.x, self.fraction, self.momentum)
        size: dict[str, Any] = {"below": self.below, "limit": self.limit}
        return follow(model, optimizer, data, y, **size, loss=loss)

    def train(self, model: nn.Module, data: tuple[Tensor, Tensor], *, like: nn.Module) -> None:
        """Train at the rate that is stable for another model of the same kernel."""
        optimizer = descent(like, data[0], self.fraction, self.momentum, of=model)
        train(model, optimizer, data, below=self.below, limit=self.limit)


def interpolant_distances(model: nn.Linear, x: Tensor, y: Tensor, w0: Tensor) -> dict[str, float]:
    r"""How far weights are from the interpolant of least norm, and from the nearest to their start.

    The first is :math:`X^\dagger y`, the second :math:`w_0 + X^\dagger(y - X w_0)`; ``outside`` is
    the share of the displacement that lies outside the span of the inputs.
    """
    w, least = model.weight.detach().T, torch.linalg.pinv(x) @ y
    nearest = w0 + torch.linalg.pinv(x) @ (y - x @ w0)
    moved, rows = w - w0, torch.linalg.svd(x, full_matrices=False).Vh
    outside = moved - rows.T @ (rows @ moved)
    return {
        "least": float((w - least).norm() / least.norm()),
        "nearest": float((w - nearest).norm() / nearest.norm()),
        "outside": float(outside.norm() / moved.norm()),
        "norm": float(w.norm() / least.norm()),
        "residual": residual(model, x, y) / float(y.norm()),
    }


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs without their graph."""
    with torch.no_grad():
        return model(x)


def mean_square(values: Tensor) -> float:
    """Mean of the squares."""
    return float(values.square().mean())
