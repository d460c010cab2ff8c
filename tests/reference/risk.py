r"""Population risk, naively: matrices written out, one example at a time, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def hessian(loss: Loss, u: Tensor, y: Tensor) -> Tensor:
    """Second derivative (c, c) of the loss of one example, outputs (c,), target ()."""

    def one(v: Tensor) -> Tensor:
        return loss(v.unsqueeze(0), y.unsqueeze(0)).sum()

    return torch.autograd.functional.hessian(one, u)


def gradient(loss: Loss, u: Tensor, y: Tensor) -> Tensor:
    """First derivative (c,) of the loss of one example."""
    v = u.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(v.unsqueeze(0), y.unsqueeze(0)).sum(), v)
    return g


def dof(loss: Loss, u: Tensor, y: Tensor, gain: float, dimensions: int) -> float:
    r""":math:`\tfrac1N\sum_i\mathrm{tr}\,B_i(A^{-1}+B_i)^{-1}` by inverting each matrix."""
    total = 0.0
    for row, target in zip(u, y, strict=True):
        b = hessian(loss, row, target)
        inverse = torch.linalg.inv(torch.eye(len(row), dtype=u.dtype) / gain + b)
        total += float((b @ inverse).trace())
    return total / (len(u) * dimensions)


def leave_one_out(loss: Loss, u: Tensor, y: Tensor, gain: float) -> Tensor:
    r""":math:`u_i + A\nabla\ell_i(u_i)`, row by row."""
    rows = [v + gain * gradient(loss, v, t) for v, t in zip(u, y, strict=True)]
    return torch.stack(rows)


def descent_smoother(x: Tensor, *, lr: float, decay: float, steps: int) -> Tensor:
    r"""The matrix H with :math:`u = Hy` after full-batch gradient descent from zero weights.

    Loss :math:`\tfrac1n\sum\tfrac12(x_i w-y_i)^2`, step :math:`w - \eta(\nabla + \lambda w)`; after
    many steps, ridge regression.
    """
    n, d = x.shape
    to_weights = torch.zeros(d, n, dtype=x.dtype)
    for _ in range(steps):
        residual = x @ to_weights - torch.eye(n, dtype=x.dtype)
        to_weights = to_weights - lr * (x.T @ residual / n + decay * to_weights)
    return x @ to_weights


def ridge_smoother(x: Tensor, decay: float) -> Tensor:
    r"""The matrix :math:`X(X^\top X + n\lambda)^{-1}X^\top`."""
    n, d = x.shape
    return x @ torch.linalg.solve(x.T @ x + n * decay * torch.eye(d, dtype=x.dtype), x.T)


def generalized_cross_validation(h: Tensor, y: Tensor) -> float:
    r""":math:`\tfrac1n\sum_i\big((y-Hy)_i/(1-\mathrm{tr}H/n)\big)^2` for targets (n, 1)."""
    n = len(y)
    residual = y - h @ y
    return float((residual / (1 - float(h.trace()) / n)).square().sum()) / n


def exact_leave_one_out(h: Tensor, y: Tensor) -> Tensor:
    r"""Left-out predictions of a ridge smoother: :math:`(u_i - h_{ii}y_i)/(1-h_{ii})`."""
    d = h.diagonal().unsqueeze(1)
    return (h @ y - d * y) / (1 - d)


def response_error(h: Tensor) -> float:
    r"""Standard deviation of :math:`z^\top Hz/n` over random signs z."""
    n = len(h)
    both = (h + h.T).tril(-1)
    return math.sqrt(float(both.square().sum())) / n


class Step(NamedTuple):
    """One step of a recorded optimizer: its examples, and numbers or vectors (P,).

    Attributes:
        examples: their indices.
        share: weight of each in the gradient.
        scale: correction times learning rate times preconditioner.
        carry: share of the momentum kept.
        gain: how the gradient enters it.
        from_momentum: share of the momentum in the step.
        from_gradient: share of the present gradient in the step.
        coupled: weight decay in the gradient.
        decay: decoupled weight decay times learning rate.
    """

    examples: list[int]
    share: list[float]
    scale: Tensor | float
    carry: float
    gain: Tensor | float
    from_momentum: float
    from_gradient: float
    coupled: float
    decay: float


def train_without(
    losses: Callable[[Tensor, int], Tensor], w: Tensor, steps: Sequence[Step], without: set[int]
) -> Tensor:
    """Weights (P,) after the same steps on all but some examples; ``losses(w, i)`` is of one."""
    m = torch.zeros_like(w)
    for step in steps:
        g = step.coupled * w
        for i, share in zip(step.examples, step.share, strict=True):
            if i not in without:
                v = w.clone().requires_grad_()
                g = g + share * torch.autograd.grad(losses(v, i), v)[0]
        m = step.carry * m + step.gain * g
        w = w - step.scale * (step.from_momentum * m + step.from_gradient * g) - step.decay * w
    return w


def tangent(
    outputs: Callable[[Tensor], Tensor],
    loss: Loss,
    w: Tensor,
    y: Tensor,
    z: Tensor,
    lrs: list[float],
) -> Tensor:
    r"""Forward-mode derivative of what gradient descent ends with by a perturbation of its losses.

    The outputs (n, c) after steps of size ``lrs`` from weights w (P,) on
    :math:`\tfrac1n\sum_i\ell_i(u)-\delta z_i\cdot u`, differentiated by δ at 0 through every step.
    """

    def trained(delta: Tensor) -> Tensor:
        def risk(v: Tensor) -> Tensor:
            u = outputs(v)
            return (loss(u, y) - delta * (z * u).sum(1)).mean()

        v = w
        for lr in lrs:
            v = v - lr * torch.func.grad(risk)(v)
        return outputs(v)

    at = torch.zeros((), dtype=w.dtype)
    return torch.func.jvp(trained, (at,), (torch.ones_like(at),))[1]


def fresh_change(rows: Tensor, m: Tensor, idle: Tensor) -> float:
    r""":math:`-\tfrac1{b(b-1)}\sum_{i\ne j} g_i\cdot Mg_j + \Delta_0\cdot\mu`, gradients (b, P)."""
    b = len(rows)
    pairs = sum(float(rows[i] @ (m * rows[j])) for i in range(b) for j in range(b) if i != j)
    return -pairs / (b * (b - 1)) + float(idle @ rows.mean(0))
