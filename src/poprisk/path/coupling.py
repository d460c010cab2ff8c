r"""The coupling of training and query outputs, and what label noise does to a query.

:math:`A_\circ = G W^\dagger D^T (D W^\dagger D^T)^\dagger` predicts the movement of the query
outputs from that of the training outputs [LG, Thm 5.1, E.2, E.3], while the kernel changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.path.channel import Channel
from poprisk.path.closure import relative
from poprisk.path.integrals import Integrals
from poprisk.path.problem import Problem
from poprisk.printing import short_repr

RTOL = 1e-12


class Prediction(NamedTuple):
    """How well a predictor of the query movement did.

    Attributes:
        movement: predicted, (Nq,).
        correlation: with the realized movement.
        error: norm of the difference over the norm of the realized movement.
    """

    movement: Tensor
    correlation: float
    error: float

    __repr__ = short_repr


class Coupling(NamedTuple):
    r"""What :meth:`poprisk.path.operators.PathOperators.coupling` returns.

    Attributes:
        matrix: :math:`A_\circ`, (Nq, N).
        prediction: with it.
        frozen: with the kernel at the start, :math:`K_{QS}(0) K_{SS}(0)^\dagger`.
    """

    matrix: Tensor
    prediction: Prediction
    frozen: Prediction

    __repr__ = short_repr


def coupling_matrix(integrals: Integrals, channel: Channel) -> Tensor:
    r""":math:`A_\circ` (Nq, N).

    With :math:`F = V\Lambda^{-1/2}` of the channel, :math:`F F^T = W^\dagger` and
    :math:`A_\circ = (GF)(DF)^\dagger`, which squares no condition number.
    """
    F = channel.basis / channel.eigenvalues.sqrt()
    return integrals.G @ F @ torch.linalg.pinv(integrals.D @ F, rtol=RTOL)


def couple(integrals: Integrals, channel: Channel) -> Coupling:
    r"""Predict the query movement; the affine parts are known and moved across."""
    train, query = _movement(integrals)
    A, affine = coupling_matrix(integrals, channel), integrals.affine
    predicted = A @ (train + affine.train) - affine.query
    return Coupling(A, score(predicted, query), score(integrals.frozen @ train, query))


def _movement(integrals: Integrals) -> tuple[Tensor, Tensor]:
    """How far the training (N,) and the query outputs (Nq,) moved in the run."""
    first, last = integrals.snapshots[0], integrals.snapshots[-1]
    return last.train_outputs - first.train_outputs, last.query_outputs - first.query_outputs


def score(movement: Tensor, realized: Tensor) -> Prediction:
    """Correlation and relative error of a predicted movement (Nq,)."""
    correlation = float(torch.corrcoef(torch.stack([movement, realized]))[0, 1])
    return Prediction(movement, correlation, relative(movement, realized))


class TransferError(NamedTuple):
    r"""What a linear predictor A of the query movement leaves of it, in parts [LG, Thm E.3].

    With :math:`C_Q = GF`, :math:`C_S = DF` and :math:`F F^T = W^\dagger` of the channel

    .. math:: (G-AD)W^\dagger(G-AD)^T = R_\perp R_\perp^T
              + (A-A_\circ)\,DW^\dagger D^T (A-A_\circ)^T, \qquad
              R_\perp = C_Q(I - C_S^\dagger C_S).

    No predictor does without the first, and :math:`A_\circ` has no more. Of the run itself, with
    the starting output gradient :math:`g_0 = Fc + r` in channel and reservoir, the error
    :math:`U_Q(K)-U_Q(0) - A(U_S(K)-U_S(0))`, affine parts moved across, is the sum of four vectors
    (Nq,), ours: beside the two the reservoir at the tolerance, and the closure errors of the two
    movements.

    Attributes:
        unseen: :math:`-R_\perp c`: moves queries and leaves the training outputs where they are.
        mismatch: :math:`(A-A_\circ)C_S c`.
        reservoir: :math:`-(G-AD)r`; round-off where the tolerance is, as
            ker W lies in ker G and in ker D.
        closure: :math:`e_Q - A e_S`, what the operators miss of the realized movements.
        unseen_norm: :math:`\|R_\perp\|_F`.
        mismatch_norm: :math:`\|(A-A_\circ)C_S\|_F`; the squares of both add up to that of
            :math:`(G-AD)F`.
    """

    unseen: Tensor
    mismatch: Tensor
    reservoir: Tensor
    closure: Tensor
    unseen_norm: float
    mismatch_norm: float

    __repr__ = short_repr

    def total(self) -> Tensor:
        """The error of the prediction, (Nq,)."""
        return self.unseen + self.mismatch + self.reservoir + self.closure


def transfer_error(integrals: Integrals, channel: Channel, A: Tensor) -> TransferError:
    """The parts of what ``A`` (Nq, N) leaves of this run's query movement; see the class."""
    G, D, g, affine = integrals.G, integrals.D, integrals.g0, integrals.affine
    F = channel.basis / channel.eigenvalues.sqrt()
    c = channel.eigenvalues.sqrt() * (channel.basis.T @ g)
    rest = channel.reservoir @ (channel.reservoir.T @ g)
    C_S = D @ F
    unseen = G @ F - coupling_matrix(integrals, channel) @ C_S
    mismatch = A @ C_S - (G @ F - unseen)
    train, query = _movement(integrals)
    closure = (query + affine.query + G @ g) - A @ (train + affine.train + D @ g)
    return TransferError(
        -unseen @ c,
        mismatch @ c,
        -(G @ rest - A @ (D @ rest)),
        closure,
        float(unseen.norm()),
        float(mismatch.norm()),
    )


class NoiseGain(NamedTuple):
    r"""Variance that label noise of unit variance adds, per query output, mean over them.

    Attributes:
        path: along the run, :math:`\|G\,\partial g/\partial y\|_F^2/N_q`; for half the squared
            error :math:`\|G\|_F^2/(n^2 N_q)`.
        frozen: at interpolation with the kernel at the start,
            :math:`\|K_{QS}K_{SS}^\dagger\|_F^2/N_q`.
    """

    path: float
    frozen: float

    __repr__ = short_repr


def noise_gain(problem: Problem, integrals: Integrals, u: Tensor) -> NoiseGain:
    """See :class:`NoiseGain`; ``u`` are the training outputs (n, c) at the start."""
    n, c = u.shape
    response = label_response(problem, u)
    by_label = integrals.G.view(-1, n, c).permute(1, 0, 2) @ response
    queries = len(integrals.G)
    return NoiseGain(
        float(by_label.square().sum()) / queries,
        float(integrals.frozen.square().sum()) / queries,
    )


def label_response(problem: Problem, u: Tensor) -> Tensor:
    r""":math:`\partial g/\partial y` as blocks (n, c, c); class targets count as one-hot rows."""
    n, c = u.shape
    y = problem.train[1]
    if not y.is_floating_point():
        return -torch.eye(c, dtype=u.dtype).expand(n, c, c) / n
    with torch.enable_grad():
        at, labels = u.detach().requires_grad_(), y.detach().requires_grad_()
        loss = problem.loss(problem.shaped(at), labels).sum() / n
        (g,) = torch.autograd.grad(loss, at, create_graph=True)
        rows = [
            torch.autograd.grad(g[:, j].sum(), labels, retain_graph=True)[0].reshape(n, -1)
            for j in range(c)
        ]
    return torch.stack(rows, dim=1)
