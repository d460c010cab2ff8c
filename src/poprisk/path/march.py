r"""The path recursion on a few output gradients, step by step, for whoever knows the steps.

.. math::
    \partial_k = \bar J_{B_k}^T S_k X_k,\quad
    V_k = \text{the step's answer to } \partial_k,\quad
    X_{k+1} = X_k - \bar B_k \bar J_k V_k,\quad
    D_{k+1} = D_k + \bar J_k V_k,\quad G_{k+1} = G_k + \bar J^Q_k V_k

Each needs the weights before and after a step and those of the last refresh, and nothing of what
came before: a record of the run can be read so, and a training followed. THEORY §3 (ours).
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from poprisk import losses
from poprisk.jacobian import chunks
from poprisk.optim.step import StepRule
from poprisk.path.closure import Closure, relative
from poprisk.path.problem import Problem
from poprisk.path.quadrature import Nodes, averaged, gauss
from poprisk.path.recursion import Recursion
from poprisk.printing import short_repr

HESSIAN_NODES = 3
AT_ONCE = (64, 1024)
"""Examples that are moved at once, at least and at most; in between, two batches of them."""
PART = 2**17
"""Weights that take a step at once."""


def is_early(done: int, every: int) -> bool:
    """Whether to move all outputs after 1, 2, 4, ... steps, before the first ``every`` are done.

    Training moves most at its start: a chord over the first pass would be off by more than all
    that come after.

    Example:
        >>> [done for done in range(1, 30) if is_early(done, 12)]
        [1, 2, 4, 8]
    """
    return done < every and not done & (done - 1)


class Applied(NamedTuple):
    r"""What became of r vectors :math:`\xi`, given as starting output gradients.

    Attributes:
        gradient: :math:`P\xi`, (n, c, r).
        momentum: :math:`Q\xi`, (P, r).
        train: :math:`D\xi`, (n, c, r).
        query: :math:`G\xi`, (m, c, r).
    """

    gradient: Tensor
    momentum: Tensor
    train: Tensor
    query: Tensor

    __repr__ = short_repr


class QueryTransfer(NamedTuple):
    """The query set at one point of a followed run.

    Attributes:
        step: optimizer steps done.
        query: followed part of the transfer so far, (m, c, columns).
        outputs: realized query outputs, (m, c).
    """

    step: int
    query: Tensor
    outputs: Tensor

    __repr__ = short_repr


class Followed(NamedTuple):
    """The result of :func:`poprisk.path.follow`; the last column is the affine part.

    Attributes:
        applied: to each probe, and the affine part as one more column.
        moments: along the run, the first at its start and the last at its end.
        train_outputs: realized training outputs at the start and at the end, (n, c).
        final_gradient: realized output gradient at the end, (n, c).
    """

    applied: Applied
    moments: list[QueryTransfer]
    train_outputs: tuple[Tensor, Tensor]
    final_gradient: Tensor

    __repr__ = short_repr

    def closure(self) -> Closure:
        """Relative mismatch, for probes that add up to the starting output gradient."""
        a, (u0, u1) = self.applied, self.train_outputs
        v0, v1 = self.moments[0].outputs, self.moments[-1].outputs
        return Closure(
            relative(-a.train.sum(-1), u1 - u0),
            relative(-a.query.sum(-1), v1 - v0),
            relative(a.gradient.sum(-1), self.final_gradient),
        )


@final
class March:
    r"""Output gradients on their way along a run; the affine column, if there is one, comes last.

    Args:
        problem: model and data, on the device and in the precision of the weights.
        weights: flat, at the start, (P,).
        probes: starting output gradients, (n, c, r).
        nodes: quadrature of the chords between refreshes.
        momentum: that the optimizer brings in, (P,), if there is an affine column.
        decaying: let weight decay act on what each column moved, see :func:`poprisk.path.follow`.

    Attributes:
        fresh: whether all outputs are those of the present weights.
        moments: of the query set, as they were kept.
    """

    def __init__(
        self,
        problem: Problem,
        weights: Tensor,
        probes: Tensor,
        nodes: Nodes,
        *,
        momentum: Tensor | None = None,
        decaying: bool = False,
    ) -> None:
        self.problem, self.nodes, self.w, self.origin = problem, nodes, weights, weights
        self.affine, self.decaying = momentum is not None, decaying
        X = probes.to(weights)
        self.X = X if momentum is None else torch.cat([X, torch.zeros_like(X[..., :1])], -1)
        r = self.X.shape[-1]
        self.recursion = Recursion(weights.new_zeros(len(weights), r))
        if momentum is not None:
            self.recursion.momentum[:, -1] = momentum
        if decaying:  # the weights as the sum of what each column made of them
            self.recursion.moved = torch.zeros_like(self.recursion.momentum)
            self.recursion.moved[:, -1] = weights
        self.fresh, self.steps, self._at_once = True, 0, AT_ONCE[0]
        self.u, self.v = self._outputs()
        self.u0 = self.u
        self.D, self.G = torch.zeros_like(self.X), weights.new_zeros(*self.v.shape, r)
        self.moved = torch.zeros_like(self.recursion.momentum)
        self.moments: list[QueryTransfer] = []
        self.keep()

    def open_affine(self) -> None:
        """Add an affine column, of nothing so far: from here on weight decay acts."""

        def wider(columns: Tensor) -> Tensor:
            return torch.cat([columns, torch.zeros_like(columns[..., :1])], -1)

        self.affine, self.moved = True, wider(self.moved)
        self.X, self.D, self.G = wider(self.X), wider(self.D), wider(self.G)
        self.recursion.momentum = wider(self.recursion.momentum)

    def _outputs(self) -> tuple[Tensor, Tensor]:
        parts = [
            torch.cat([self.problem.J.values(self.w, part) for part in x.split(self._at_once)])
            for x in (self.problem.train[0], self.problem.query[0])
        ]
        return parts[0], parts[1]

    def keep(self) -> None:
        """Remember the query set as it is now."""
        self.moments.append(QueryTransfer(self.steps, self._with_affine(self.G.clone()), self.v))

    def advance(self, rule: StepRule, rows: Tensor, sampling: Tensor, end: Tensor) -> None:
        """Take a step with every column.

        Args:
            rule: of all weights.
            rows: the training examples behind it, (b,).
            sampling: the diagonal of :math:`S` at them, (b,).
            end: weights after it, (P,).
        """
        w = self.w if rule.steps == 1 else (self.w + end) / 2
        u, pull = self.problem.J.pullback(w, self.problem.train[0][rows])
        X = self.X[rows] if self.fresh else self._at(rows, w, u)
        gradient = pull(sampling.to(w)[:, None, None] * X)
        weights = w if self.affine and not self.decaying else None
        for part in chunks(len(w), PART):  # what is made on the way is as long as V
            some = None if weights is None else weights[part]
            step = self.recursion.step
            self.moved[part] += step(rule.part(part), gradient[part], weights=some, rows=part)[1]
        self.w, self.fresh, self.steps = end, False, self.steps + rule.steps
        self._at_once = min(max(self._at_once, 2 * len(rows)), AT_ONCE[1])

    def _at(self, rows: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Columns of the batch at ``w``: what they were at the last refresh, moved since."""
        moved = self.problem.J_whole.jvp(
            (self.origin + w) / 2, self.problem.train[0][rows], self.moved
        )
        return self.X[rows] - _curved(self.problem, self.u[rows], u, moved, rows)

    def refresh(self) -> None:
        """Move all outputs along the chord since the last time."""
        before, problem = self.u, self.problem
        moved, seen = (
            torch.cat([self._along_chord(part) for part in x.split(self._at_once)])
            for x in (problem.train[0], problem.query[0])
        )
        self.u, self.v = self._outputs()
        self.X = self.X - _curved(problem, before, self.u, moved, torch.arange(problem.n))
        self.D, self.G = self.D + moved, self.G + seen
        self.origin, self.fresh = self.w, True
        self.moved.zero_()

    def _along_chord(self, x: Tensor) -> Tensor:
        """What the columns moved the outputs of some inputs since the last refresh, (b, c, r)."""

        def product(a: float) -> Tensor:
            return self.problem.J_whole.jvp(torch.lerp(self.origin, self.w, a), x, self.moved)

        return averaged(product, self.nodes)

    def _with_affine(self, columns: Tensor) -> Tensor:
        return columns if self.affine else torch.cat([columns, 0 * columns[..., :1]], -1)

    def result(self) -> Followed:
        """Everything followed; the affine column is there even where it is zero."""
        columns = (self._with_affine(t) for t in (self.X, self.recursion.momentum, self.D, self.G))
        g = self.problem.output_gradient(self.u)
        return Followed(Applied(*columns), self.moments, (self.u0, self.u), g)


def _curved(problem: Problem, u: Tensor, end: Tensor, moved: Tensor, rows: Tensor) -> Tensor:
    r""":math:`\bar B` of some training examples times (b, c, r)."""
    y = problem.train[1][rows]

    def product(a: float) -> Tensor:
        between = problem.shaped(torch.lerp(u, end, a))
        return losses.hessian_product(problem.loss, between, y, moved)

    return averaged(product, gauss(HESSIAN_NODES)) / problem.n
