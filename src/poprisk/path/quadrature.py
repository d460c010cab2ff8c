r"""Averages over the straight line from one recorded point to the next.

.. math:: \bar J = \int_0^1 J(w + \theta \Delta w)\, d\theta, \qquad
          \bar B = \int_0^1 \nabla^2\Phi(u + \theta \Delta u)\, d\theta

With them :math:`\bar J \Delta w = \Delta u` and :math:`\bar B \Delta u = \Delta g` hold exactly; a
rule of few nodes leaves the error that the closure reports.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk.path.problem import Problem

OUTPUT_NODES = 10
"""Gauss nodes for the output Hessian, which costs next to nothing."""

Nodes = list[tuple[float, float]]
"""Positions in [0, 1] and weights that add up to 1."""


def gauss(nodes: int) -> Nodes:
    """Gauss-Legendre on [0, 1], exact for polynomials of degree 2·nodes - 1.

    Example:
        >>> gauss(1)
        [(0.5, 1.0)]
    """
    x, weight = np.polynomial.legendre.leggauss(nodes)
    return [((1 + float(a)) / 2, float(b) / 2) for a, b in zip(x, weight, strict=True)]


def averaged(function: Callable[[float], Tensor], nodes: Nodes) -> Tensor:
    """The weighted sum of a function over the nodes."""
    first, *others = (weight * function(x) for x, weight in nodes)
    return sum(others, first)


QUADRATURES: dict[str, Nodes] = {
    "left": [(0.0, 1.0)],
    "midpoint": gauss(1),
    "gauss2": gauss(2),
    "gauss3": gauss(3),
    "gauss5": gauss(5),
}


def composite(quadrature: str, segments: int) -> Nodes:
    """The named rule on each of ``segments`` equal pieces.

    Raises:
        ValueError: for an unknown name or less than one segment.
    """
    checks.check_choice("quadrature", quadrature, QUADRATURES)
    checks.check_positive("segments", segments)
    return [
        ((i + x) / segments, weight / segments)
        for i in range(segments)
        for x, weight in QUADRATURES[quadrature]
    ]


def average_hessian(problem: Problem, u: Tensor, du: Tensor) -> Tensor:
    r""":math:`\bar B`, its diagonal blocks (n, c, c), for training outputs (n, c)."""
    return averaged(lambda x: problem.output_hessian(u + x * du), gauss(OUTPUT_NODES))


def average_gradient(problem: Problem, u: Tensor, du: Tensor) -> Tensor:
    r""":math:`\bar g` (n, c), the output gradient on the way, for training outputs (n, c)."""
    return averaged(lambda x: problem.output_gradient(u + x * du), gauss(OUTPUT_NODES))


class PathJacobian:
    r""":math:`\bar J` of some inputs between two points, refined where a kink needs it.

    Args:
        problem: the model.
        nodes: quadrature on a whole segment.
        refine: relative error of :math:`\bar J\Delta w = \Delta u` of one example above which its
            segment is halved; None: never.
        depth: how often at most.
    """

    def __init__(
        self, problem: Problem, nodes: Nodes, *, refine: float | None = None, depth: int = 12
    ) -> None:
        self.problem, self.nodes, self.refine, self.depth = problem, nodes, refine, depth

    def __call__(self, w: Tensor, end: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The average Jacobian (b·c, P) of inputs (b, ...) from ``w`` to ``end`` (P,)."""
        total = w.new_empty(len(x) * self.problem.c, len(w)) if out is None else out
        at = [(torch.lerp(w, end, position), weight) for position, weight in self.nodes]
        self.problem.J_whole.write(total, at, x)
        if self.refine is not None:
            self._mend(total.view(len(x), -1, len(w)), w, end, x)
        return total

    def _mend(self, rows: Tensor, w: Tensor, end: Tensor, x: Tensor) -> None:
        """Replace the rows (b, c, P) of examples that are off by means over ever smaller pieces."""
        step = end - w
        moved = self.problem.J_whole.values(end, x) - self.problem.J_whole.values(w, x)
        size = moved.norm(dim=1)
        allowed = (self.refine or 0.0) * size.clamp_min(1e-3 * float(size.norm()) + 1e-300)
        index = ((rows @ step - moved).norm(dim=1) > allowed).nonzero().squeeze(1)
        rows[index] = 0.0
        left, length = torch.zeros(len(index), dtype=w.dtype), 1.0
        for depth in range(self.depth):
            if not len(index):
                return
            length /= 2
            index = index.repeat(2)
            left = torch.cat([left, left + length])
            pieces, change = self._pieces(w, step, x[index], left, length)
            error = (length * (pieces @ step) - change).norm(dim=1)
            bad = (error > allowed[index]) & (depth + 1 < self.depth)
            rows.index_add_(0, index[~bad], pieces[~bad], alpha=length)
            index, left = index[bad], left[bad]

    def _pieces(
        self, w: Tensor, step: Tensor, x: Tensor, left: Tensor, length: float
    ) -> tuple[Tensor, Tensor]:
        """Average Jacobians (b, c, P) on ``[left, left + length]`` and the change of outputs."""

        def at(position: Tensor) -> Tensor:
            return w + position[:, None] * step

        total = averaged(
            lambda p: self.problem.J_whole.rows_of_each(at(left + p * length), x), self.nodes
        )
        change = self.problem.J_whole.each(at(left + length), x) - self.problem.J_whole.each(
            at(left), x
        )
        return total, change
