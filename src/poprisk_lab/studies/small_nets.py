"""Small nets recorded on minibatches, and what their kernel predicts: what several claims share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.path import Run, record
from poprisk_lab.tasks.nets import mlp

Examples = tuple[Tensor, Tensor]
"""Inputs and targets."""


class NetRecipe(NamedTuple):
    """A tanh net with one hidden layer, and how it is trained.

    Attributes:
        label: in tables and plots.
        units: of the hidden layer.
        optimizer: ``"sgd"``, ``"adamw"`` with decay 0.01, or ``"poprisk"``.
        lr: learning rate.
        batch: examples of a batch, drawn without replacement and independently of other batches.
        outputs: more than one for classes, which are trained by cross-entropy.
        scale: of PyTorch's initial weights.
        gate: settings of PopRiskAdamW beside its defaults.
    """

    label: str
    units: int
    optimizer: str
    lr: float
    batch: int
    outputs: int = 1
    scale: float = 1.0
    gate: Mapping[str, Any] = {}

    def record(
        self, train: Examples, query: Tensor | Examples, *, seed: int, steps: int, stride: int = 1
    ) -> Run:
        """Train and keep what happened; the seed decides initial weights and batches."""
        (x, _), n = train, len(train[0])
        torch.manual_seed(seed)
        net = mlp(x.shape[1], self.units, self.outputs, activation=nn.Tanh).double()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(self.scale)
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randperm(n, generator=generator)[: self.batch] for _ in range(steps)]
        loss = "cross_entropy" if self.outputs > 1 else "squared_error"
        optimizer = self._optimizer(net, n)
        return record(net, loss, optimizer, batches, query, train=train, stride=stride)

    def _optimizer(self, net: nn.Module, n: int) -> Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(net.parameters(), lr=self.lr)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=0.01)
        return PopRiskAdamW(net, lr=self.lr, batch_size=self.batch, dataset_size=n, **self.gate)


def movement(run: Run) -> tuple[Tensor, Tensor]:
    """How far the training outputs (n·c,) and the query outputs (m·c,) went, float64."""
    problem = run.problem.to(torch.float64)
    first, last = (run.weights[k].double() for k in (0, len(run)))
    with torch.no_grad():
        train_moved, query_moved = (
            (problem.outputs(last, x) - problem.outputs(first, x)).flatten()
            for x in (problem.train[0], problem.query[0])
        )
    return train_moved, query_moved


class Tangents(NamedTuple):
    """A net as a linear model at one moment of a run.

    Attributes:
        train: its outputs on the training set, (n, c).
        query: those on the queries, (m, c).
        kernel: :math:`K_{SS}`, (n·c, n·c).
        across: :math:`K_{QS}`, (m·c, n·c).
    """

    train: Tensor
    query: Tensor
    kernel: Tensor
    across: Tensor


def tangents(run: Run, step: int) -> Tangents:
    """The tangents after so many steps, float64."""
    problem, w = run.problem.to(torch.float64), run.weights[step].double()
    x, queries = problem.train[0], problem.query[0]
    J, J_query = problem.jacobian(w, x), problem.jacobian(w, queries)
    with torch.no_grad():
        outputs = problem.outputs(w, x), problem.outputs(w, queries)
    return Tangents(*outputs, J @ J.T, J_query @ J.T)


def ridge_fits(tangent: Tangents, target: Tensor, ridges: Tensor) -> Iterator[Tensor]:
    r"""Kernel ridge regression, :math:`K_{QS}(K_{SS} + \lambda I)^{-1} y`, for each λ.

    Args:
        tangent: the kernels.
        target: y, (n·c,) or (n·c, k).
        ridges: λ over the largest eigenvalue of :math:`K_{SS}`.
    """
    values, basis = torch.linalg.eigh(tangent.kernel)
    across, along = tangent.across @ basis, basis.T @ target
    values = values.view(-1, *[1] * (target.dim() - 1))
    for ridge in ridges * values.max():
        yield across @ (along / (values.clamp_min(0) + ridge))


def relative_drift(kernel: Tensor, start: Tensor) -> float:
    r"""How far a kernel is from where it started, :math:`\|K - K_0\|_2/\|K_0\|_2`."""
    norm = torch.linalg.matrix_norm(start, 2)
    return float(torch.linalg.matrix_norm(kernel - start, 2) / norm)


def alignment(kernel: Tensor, y: Tensor) -> float:
    r""":math:`y^T K y/(\|K\|_F\|y\|^2)` of the centred kernel and target; 1 is K ∝ y yᵀ."""
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    t = y - y.mean()
    return float((t.T @ centred @ t).squeeze() / (centred.norm() * t.square().sum()))
