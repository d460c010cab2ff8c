r"""The four cells: signal and noise, in the channel and in the reservoir.

With :math:`g_0 = g_{signal} + g_{noise}` and the projection Π on the channel, training moves the
query outputs by :math:`-G\Pi g_{signal}` (learned), :math:`-G(I-\Pi)g_{signal}` (still trapped,
practically 0), :math:`-G\Pi g_{noise}` (harmful) and :math:`-G(I-\Pi)g_{noise}` (benign,
practically 0). [LG, Fig. 1]; the working form is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.losses import gradient, values
from poprisk.path.channel import Channel
from poprisk.path.problem import Problem
from poprisk.path.quadrature import averaged, gauss
from poprisk.printing import short_html, short_repr

NODES = 24
"""Gauss nodes on the line from the first outputs to the last, for losses that are not squares."""


class Cells(NamedTuple):
    """The parts of the movement of the query outputs, each (Nq,).

    Attributes:
        learned_signal: clean labels, through the channel.
        trapped_signal: clean labels, through the soft reservoir.
        harmful_noise: label noise, through the channel.
        benign_noise: label noise, through the soft reservoir.
        affine: weight decay, and momentum brought in.
    """

    learned_signal: Tensor
    trapped_signal: Tensor
    harmful_noise: Tensor
    benign_noise: Tensor
    affine: Tensor

    __repr__ = short_repr

    def total(self) -> Tensor:
        """Their sum: the predicted movement."""
        return torch.stack(list(self)).sum(0)


class TestError(NamedTuple):
    """The test error as a sum.

    Attributes:
        name: of the error.
        terms: what adds up to it.
        measured: the error of the realized outputs.
    """

    name: str
    terms: dict[str, float]
    measured: float

    __repr__ = short_repr

    @property
    def closure(self) -> float:
        """Relative difference of the sum and what was measured."""
        return abs(sum(self.terms.values()) - self.measured) / max(abs(self.measured), 1e-300)


class FourCells(NamedTuple):
    """What :meth:`poprisk.path.operators.PathOperators.four_cells` returns.

    Attributes:
        tol: of the channel.
        cells: parts of the movement of the query outputs.
        signal_share: share of the signal's squared output gradient that lies in the channel.
        noise_share: the same of the noise: 1 minus it is benign.
        shares: both, for other tolerances.
        closure: relative mismatch of the sum and the measured movement.
        error: the test error as a sum; None without query targets.
    """

    tol: float
    cells: Cells
    signal_share: float
    noise_share: float
    shares: dict[float, tuple[float, float]]
    closure: float
    error: TestError | None

    __repr__ = short_repr
    _repr_html_ = short_html


def split_cells(G: Tensor, channel: Channel, signal: Tensor, noise: Tensor) -> Cells:
    """The cells of a transfer ``G`` (Nq, N+1), affine part last, and of g's parts (N,)."""
    transfer, affine = G[:, :-1], G[:, -1]
    kept, let = channel.project(signal), channel.project(noise)
    parts = (kept, signal - kept, let, noise - let)
    learned, trapped, harmful, benign = (-transfer @ part for part in parts)
    return Cells(learned, trapped, harmful, benign, -affine)


def is_square(problem: Problem) -> bool:
    """Whether the loss is a multiple of the squared error: its gradient is linear, 0 at targets."""
    y = problem.train[1]
    if not y.is_floating_point() or y.numel() != problem.n * problem.c:
        return False
    u = problem.shaped(y.reshape(problem.n, -1))
    shift = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype).view_as(u)
    at, one, two = (gradient(problem.loss, u + k * shift, y) for k in (0, 1, 2))
    unit = (one / shift).flatten()
    return bool(
        at.abs().max() <= 1e-9 * one.abs().max()
        and torch.allclose(two, 2 * one)
        and torch.allclose(unit, unit[:1])
    )


def squared_terms(start: Tensor, cells: Cells, outputs: Tensor, targets: Tensor) -> TestError:
    r"""The mean squared error of the outputs, split into bias, harmful noise and cross terms.

    The error vector is bias + harmful + leak: bias is what the run would miss on clean labels,
    leak what came through the soft reservoir. All tensors (Nq,).
    """
    bias = start + cells.learned_signal + cells.affine - targets
    harmful, leak = cells.harmful_noise, cells.trapped_signal + cells.benign_noise

    def mean(a: Tensor, b: Tensor) -> float:
        return float((a * b).mean())

    terms = {
        "bias": mean(bias, bias),
        "harmful noise": mean(harmful, harmful),
        "bias × harmful noise": 2 * mean(bias, harmful),
        "trapped signal and benign noise": mean(leak, leak) + 2 * mean(leak, bias + harmful),
    }
    return TestError("mean squared error", terms, mean(outputs - targets, outputs - targets))


def work_terms(problem: Problem, start: Tensor, cells: Cells, outputs: Tensor) -> TestError:
    r"""Any test loss L, split by the work each part does on it from the first to the last outputs.

    .. math:: L(u_K) = L(u_0) + \int_0^1 \nabla L(u_0 + \theta \Delta u)\, d\theta
              \cdot \textstyle\sum_{parts} \Delta u_{part}

    Tensors (Nq,).
    """
    y = problem.query[1]
    assert y is not None  # the caller has targets
    m = problem.m

    def shaped(u: Tensor) -> Tensor:
        return problem.shaped(u.view(m, -1))

    def loss(u: Tensor) -> float:
        return values(problem.loss, shaped(u), y).mean().item()

    moved = outputs - start
    slope = averaged(lambda a: gradient(problem.loss, shaped(start + a * moved), y), gauss(NODES))
    mean = slope.reshape(-1) / m
    terms = {"before training": loss(start)}
    terms |= {name.replace("_", " "): float(mean @ part) for name, part in cells._asdict().items()}
    return TestError("test loss", terms, loss(outputs))
