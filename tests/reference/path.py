r"""The path operators, naively: float64, explicit sums over all earlier steps. For tests only.

Nothing here is a recursion where the definition is a sum: the momentum map of step k is
:math:`Q_k = \sum_{j \le k} (\prod a)\, c_j J_j^T S_j P_j`, the operators are sums over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Outputs = Callable[[Tensor, Tensor], Tensor]
"""From flat weights (P,) and inputs (b, ...) to outputs (b, c)."""


class Step(NamedTuple):
    """One step of an optimizer; vectors (P,) or numbers.

    Attributes:
        batch: indices of its examples.
        precondition: η M.
        correction: of the momentum's bias.
        carry: share of the momentum kept.
        gain: how the gradient enters it.
        nesterov: None, or μ: the step is along gradient + μ momentum.
        coupled: weight decay in the gradient.
        decay: decoupled weight decay times learning rate.
    """

    batch: list[int]
    precondition: Tensor | float
    correction: float = 1.0
    carry: float = 0.0
    gain: Tensor | float = 1.0
    nesterov: float | None = None
    coupled: float = 0.0
    decay: float = 0.0


class Operators(NamedTuple):
    """P (N, N), Q (P, N), W (N, N), G (Nq, N), D (N, N) and the affine parts h, of G and of D."""

    P: Tensor
    Q: Tensor
    W: Tensor
    G: Tensor
    D: Tensor
    h: Tensor
    affine_G: Tensor
    affine_D: Tensor


def jacobian(outputs: Outputs, w: Tensor, x: Tensor) -> Tensor:
    """Row by row, (b·c, P)."""
    w = w.detach().requires_grad_()
    rows = [torch.autograd.grad(u, w, retain_graph=True)[0] for u in outputs(w, x).flatten()]
    return torch.stack(rows)


def average(function: Callable[[float], Tensor], nodes: int) -> Tensor:
    """Mean of a function over [0, 1] with Gauss-Legendre nodes."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    pairs = zip(points, weights, strict=True)
    return torch.stack([float(b) / 2 * function((1 + float(a)) / 2) for a, b in pairs]).sum(0)


def output_hessian(loss: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Of the total loss, all of it, (N, N), for outputs (N,)."""
    return torch.autograd.functional.hessian(loss, u)


def sampling(batch: Sequence[int], n: int, c: int) -> Tensor:
    """S (N, N): n/b on the diagonal for each time an example is in the batch."""
    S = torch.zeros(n * c, n * c, dtype=torch.float64)
    for i in batch:
        for j in range(c):
            S[i * c + j, i * c + j] += n / len(batch)
    return S


def path_operators(
    outputs: Outputs,
    total_loss: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    steps: Sequence[Step],
    x: Tensor,
    x_query: Tensor,
    momentum_in: Tensor,
    trained: Outputs | None = None,
) -> Operators:
    """The operators of THEORY §3; ``total_loss`` maps outputs (N,) to the training loss.

    Gradients come from the Jacobian of ``trained``: the outputs themselves if left out.
    """
    K, n, size = len(steps), len(x), len(weights[0])
    c = outputs(weights[0], x[:1]).numel()
    N = n * c
    P, h = [torch.eye(N, dtype=torch.float64)], [torch.zeros(N, dtype=torch.float64)]
    gradients: list[tuple[Tensor, Tensor]] = []
    W = torch.zeros(N, N, dtype=torch.float64)
    G, D, affine_G, affine_D = (list[Tensor]() for _ in range(4))
    for k in range(K):
        step, w, end = steps[k], weights[k], weights[k + 1]
        JTS = jacobian(trained or outputs, w, x).T @ sampling(step.batch, n, c)
        gradients.append((JTS @ P[k], JTS @ h[k] + step.coupled * w))
        Q, q = _momentum(steps[: k + 1], gradients, momentum_in)
        R, r = Q, q
        if step.nesterov is not None:
            R = gradients[k][0] + step.nesterov * Q
            r = gradients[k][1] + step.nesterov * q
        M = torch.diag(step.precondition * torch.ones(size, dtype=torch.float64))
        V, v = step.correction * M @ R, step.correction * M @ r + step.decay * w
        J, J_Q = (
            average(lambda t: jacobian(outputs, w + t * (end - w), z), 3)  # noqa: B023
            for z in (x, x_query)
        )
        u, u_end = (outputs(z, x).detach().flatten() for z in (w, end))
        B = average(lambda t: output_hessian(total_loss, u + t * (u_end - u)), 8)  # noqa: B023
        W = W + R.T @ M @ R
        D.append(J @ V)
        G.append(J_Q @ V)
        affine_D.append(J @ v)
        affine_G.append(J_Q @ v)
        P.append(P[k] - B @ J @ V)
        h.append(h[k] - B @ J @ v)
    sums = [torch.stack(parts).sum(0) for parts in (G, D, affine_G, affine_D)]
    return Operators(P[K], Q, W, sums[0], sums[1], h[K], sums[2], sums[3])


def _momentum(
    steps: Sequence[Step], gradients: Sequence[tuple[Tensor, Tensor]], momentum_in: Tensor
) -> tuple[Tensor, Tensor]:
    """The momentum after the last of ``steps`` as a sum: its map of g₀ and its affine part."""
    Q, q = torch.zeros_like(gradients[0][0]), torch.zeros_like(momentum_in)
    for j, (matrix, vector) in enumerate(gradients):
        kept = 1.0
        for later in steps[j + 1 :]:
            kept *= later.carry
        gain = steps[j].gain * torch.ones_like(momentum_in)
        Q = Q + kept * gain[:, None] * matrix
        q = q + kept * gain * vector
    kept = 1.0
    for step in steps:
        kept *= step.carry
    return Q, q + kept * momentum_in


def channel_projection(W: Tensor, tol: float) -> Tensor:
    """Π on the eigenvectors of W above ``tol`` times the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(W)
    total = torch.zeros_like(W)
    for value, vector in zip(values, vectors.T, strict=True):
        if value > tol * values[-1]:
            total = total + torch.outer(vector, vector)
    return total


def coupling(G: Tensor, W: Tensor, D: Tensor) -> Tensor:
    """A∘ = G W† Dᵀ (D W† Dᵀ)†, as written."""
    pinv = torch.linalg.pinv
    return G @ pinv(W) @ D.T @ pinv(D @ pinv(W) @ D.T)


def whitened_inverse(W: Tensor, tol: float) -> Tensor:
    """W† of the eigenvalues above ``tol`` times the largest, one outer product at a time."""
    values, vectors = torch.linalg.eigh(W)
    total = torch.zeros_like(W)
    for value, vector in zip(values, vectors.T, strict=True):
        if value > tol * values[-1]:
            total = total + torch.outer(vector, vector) / value
    return total


def transfer_errors(
    G: Tensor, W: Tensor, D: Tensor, A: Tensor, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(G - AD) W† (G - AD)ᵀ for A; for A∘; and (A - A∘) D W† Dᵀ (A - A∘)ᵀ."""
    inverse = whitened_inverse(W, tol)
    best = G @ inverse @ D.T @ torch.linalg.pinv(D @ inverse @ D.T)

    def left(B: Tensor) -> Tensor:
        return (G - B @ D) @ inverse @ (G - B @ D).T

    return left(A), left(best), (A - best) @ D @ inverse @ D.T @ (A - best).T
