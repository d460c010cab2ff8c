r"""What moves the weights of a network that groks: the optimizer's update, or weight decay.

Between two measurements every step is split into the decay :math:`-\eta\lambda w` and the update
:math:`u`, the rest of it. Along the weights the two oppose each other: *growth*
:math:`\langle u, w\rangle / \lVert w\rVert` against *shrinkage* :math:`\eta\lambda\lVert w\rVert`.
What the updates add up to is their *straightness*, :math:`\lVert\sum_k u_k\rVert / \sum_k\lVert
u_k\rVert`: 1 for n updates in one direction. Momentum alone gives unrelated gradients about
:math:`\sqrt{(1+\beta_1)/((1-\beta_1)n)}`, 0.28 in 250 steps and 0.62 in 50.

Beside them stands how near the run is to the edge of stability. With H the Hessian of the training
loss and :math:`\eta M` learning rate times preconditioner, mask included, a quadratic of that
curvature would be left oscillating where

.. math:: \lambda_{\max}\bigl((\eta M)^{1/2} H (\eta M)^{1/2}\bigr) \ge 2\frac{1+\beta_1}{1-\beta_1}

(J. Cohen et al., *Adaptive gradient methods at the edge of stability*, arXiv:2207.14484; the mask
in M is ours). The *edge* is the left side over the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poprisk.linalg import top_eigenpairs
from poprisk.optim.step import StepContext, describe
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.grokking import runs

COLUMNS = (
    "step", "loss", "accuracy", "norm", "growth", "shrinkage", "length", "straightness", "edge",
)  # fmt: skip
"""Of a curve: training loss, test accuracy, norm of the weights; since the row before mean growth,
shrinkage and length of an update, and the straightness; the edge."""


TOLERANCE, PRODUCTS = 1e-2, 80
"""Residual of the largest curvature, relative to it, and Hessian products to spend on it."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


class Window:
    """The steps since it was last read."""

    def __init__(self) -> None:
        self._sums, self._total, self._count = [0.0, 0.0, 0.0], torch.zeros(()), 0

    def add(self, before: Tensor, after: Tensor, shrink: float) -> None:
        """Add a step from ``before`` to ``after``; ``shrink`` is learning rate × decay."""
        update, norm = after - (1 - shrink) * before, before.norm()
        step = torch.stack([update @ before / norm, shrink * norm, update.norm()]).tolist()
        self._sums = [old + new for old, new in zip(self._sums, step, strict=True)]
        self._total = self._total + update
        self._count += 1

    def read(self) -> list[float]:
        """Growth, shrinkage and length of a mean step, and the straightness; then start again."""
        means = [value / max(self._count, 1) for value in self._sums]
        straightness = float(self._total.norm()) / self._sums[2] if self._sums[2] else 0.0
        self._sums, self._total, self._count = [0.0, 0.0, 0.0], torch.zeros(()), 0
        return [*means, straightness]


def edge(model: nn.Module, optimizer: Optimizer, data: runs.SplitTable, update: Tensor) -> float:
    """How near the last step was to the edge of stability: 1 is at the edge.

    Args:
        model: after the step; its gradients are those of the step.
        optimizer: that took it.
        data: whose training part the loss is over.
        update: weights after the step minus weights before it, flat.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    scale = flat(_preconditioners(optimizer, weights, update)).sqrt()
    loss = F.cross_entropy(model(data.x), data.y)
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    slope = torch.cat([g.flatten() for g in grads])

    def product(columns: Tensor) -> Tensor:
        directions = (scale.unsqueeze(1) * columns).unbind(1)
        curved = [torch.autograd.grad(slope, weights, d, retain_graph=True) for d in directions]
        return scale.unsqueeze(1) * torch.stack([flat(c) for c in curved], 1)

    start = torch.randn(len(scale), 1, generator=torch.Generator().manual_seed(0)).to(scale)
    top = top_eigenpairs(product, start, 1, tolerance=TOLERANCE, max_products=PRODUCTS).values[0]
    beta = optimizer.param_groups[0]["betas"][0]
    return float(top) * (1 - beta) / (2 * (1 + beta))


def _preconditioners(optimizer: Optimizer, weights: list[Tensor], update: Tensor) -> list[Tensor]:
    """Learning rate times preconditioner of the last step, as each weight was shaped."""
    updates = update.split([p.numel() for p in weights])
    rules, found = describe(optimizer), list[Tensor]()
    for p, moved in zip(weights, updates, strict=True):
        rule = rules.rule(p, _last_context(optimizer, p, moved.view_as(p)))
        found.append(torch.as_tensor(rule.precondition).expand_as(p))
    return found


def _last_context(optimizer: Optimizer, p: Tensor, update: Tensor) -> StepContext:
    """What a step rule of Adam's kind looks at, after a step of an optimizer with one group.

    The momentum is the one after the step, which these rules do not read.

    Args:
        optimizer: Adam or one of its kind, after the step.
        p: the parameter, its gradient still that of the step.
        update: weights after the step minus weights before it.
    """
    (group,) = optimizer.param_groups
    state = optimizer.state[p]
    assert p.grad is not None
    weight = p.detach() - update
    return StepContext(group, state, False, update, p.grad, weight, state["exp_avg"])


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train as :func:`runs.run` does, and split each step.

    Returns a ``curve`` of :data:`COLUMNS`; the edge is None at the first row, and where
    ``settings["edge"]`` is False.
    """
    data, model = runs.load(settings), runs.build_model(settings)
    optimizer = runs.build(settings, model, len(data.y))
    weights = [*model.parameters()]
    source, window, rows = (
        runs.batches(settings, len(data.y), 0),
        Window(),
        list[list[float | None]](),
    )
    shrink = settings["lr"] * settings["weight_decay"]
    update = torch.zeros(())
    for step in itertools.count():
        if step % settings["every"] == 0:
            loss, _, _, accuracy = runs.measure(model, data)
            has_edge = step > 0 and settings.get("edge", True)
            near = edge(model, optimizer, data, update) if has_edge else None
            rows.append([step, loss, accuracy, float(flat(weights).norm()), *window.read(), near])
            if step >= settings["limit"] or accuracy >= runs.GOAL:
                break
        before = flat(weights)
        runs.gradient(model, optimizer, data, next(source))
        optimizer.step()
        window.add(before, flat(weights), shrink)
        update = flat(weights) - before
    return {"curve": [[row[0], *(v and float(f"{v:.4g}") for v in row[1:])] for row in rows]}
