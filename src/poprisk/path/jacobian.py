r"""Rows of the Jacobian, written into memory that is there already.

Matrices of this size are large: to allocate one costs about as much as to multiply with it. So rows
go straight to their place, and a quadrature over weights is one product per layer,
:math:`\sum_j b_j\, \delta_j a_j^T`, of the factors at all of its nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk.path.problem import JACOBIAN_BYTES, Problem
from poprisk.per_sample import Factors, capture
from poprisk.per_sample.plan import Plan, learn_plan
from poprisk.per_sample.terms import OneHot, Outer, Term

TRIED = 4
"""Examples on which factors must give the rows that ``torch.func`` gives."""

Weighted = Sequence[tuple[Tensor, float]]
"""Flat weights (P,) and what the Jacobian at them counts."""


class JacobianRows:
    """Weighted sums over weights of the Jacobian of some inputs.

    Per-example gradients in factors are an order of magnitude faster than ``torch.func``. They are
    tried on a few examples first; a model for which they differ, or are not to be had without a
    warning, is left to ``torch.func``.

    Args:
        problem: the model.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sizes = [p.numel() for p in problem.parameters]
        self.plan: Plan | None = None
        self.factored = True
        self.factored = self._agree(problem.elsewhere(), problem.train[0][:TRIED])

    def _agree(self, w: Tensor, x: Tensor) -> bool:
        """Whether factors can be had, and give the same."""
        if len(x) < 2:
            return False
        expected, found = self.problem.jacobian(w, x), torch.empty(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                self.plan = self._learn(w, x)
                found = torch.empty_like(expected)
                self._write(found, [(w, 1.0)], x)
            except (Warning, RuntimeError, ValueError, TypeError, NotImplementedError):
                return False
        scale = float(expected.abs().max())
        tolerance = 1e-10 if w.dtype == torch.float64 else 1e-4
        return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)

    def _learn(self, w: Tensor, x: Tensor) -> Plan | None:
        """Where the examples lie, from orders of a few of them."""
        leaves = self._leaves(w)

        def values_of(some: list[int]) -> Tensor:
            return 1.0 * self.problem.call(leaves, x[some])

        return learn_plan(values_of, leaves, examples=len(x), size=len(x))

    def _leaves(self, w: Tensor) -> dict[str, Tensor]:
        problem = self.problem
        pieces = zip(problem.names, w.detach().split(self.sizes), problem.parameters, strict=True)
        return {name: piece.view(p.shape).requires_grad_() for name, piece, p in pieces}

    def write(self, out: Tensor, at: Weighted, x: Tensor) -> Tensor:
        """Fill ``out`` (b·c, P) for inputs (b, ...), and return it."""
        c = self.problem.c
        chunk = max(2, JACOBIAN_BYTES // (c * self.problem.size * out.element_size()))
        start = 0
        for part in x.split(chunk):
            self._write(out[start : start + len(part) * c], at, part)
            start += len(part) * c
        return out

    def _write(self, out: Tensor, at: Weighted, x: Tensor) -> None:
        if not self.factored or len(x) < 2:
            for i, (w, weight) in enumerate(at):
                rows = self.problem.jacobian(w, x)
                out.copy_(rows.mul_(weight)) if i == 0 else out.add_(rows, alpha=weight)
            return
        terms: dict[str, list[Term]] = {}
        for w, weight in at:
            for name, found in self._factors(w, weight, x).terms.items():
                terms.setdefault(name, []).extend(found)
        leaves = dict(zip(self.problem.names, self.problem.parameters, strict=True))
        whole = Factors(terms, leaves, examples=len(x), values=self.problem.c)
        rows = out.view(len(x), self.problem.c, -1).split(self.sizes, dim=2)
        for name, place in zip(self.problem.names, rows, strict=True):
            _fill(place, whole.terms.get(name, []))

    def _factors(self, w: Tensor, weight: float, x: Tensor) -> Factors:
        leaves = self._leaves(w)
        with torch.enable_grad():
            return self.problem.holding(
                leaves,
                lambda: capture(weight * self.problem.call(leaves, x), leaves, plan=self.plan),
            )


def _fill(place: Tensor, terms: list[Term]) -> None:
    """Write the sum of terms to (b, k, entries of a parameter)."""
    if not terms:
        place.zero_()
    for i, term in enumerate(terms):
        if isinstance(term, Outer) and not isinstance(term.act, OneHot):
            for k in range(place.shape[1]):
                factors = (term.cot[:, k].mT, term.act)
                left, right = (term.act.mT, term.cot[:, k]) if term.flipped else factors
                shape = (left.shape[1], right.shape[2])
                place[:, k].unflatten(1, shape).baddbmm_(left, right, beta=int(i > 0))
        elif i == 0:
            place.copy_(term.dense())
        else:
            place.add_(term.dense())
