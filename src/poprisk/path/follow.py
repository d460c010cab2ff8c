r"""The path operators applied to a few vectors, for models of any size.

To follow :math:`P_k \xi` takes one transposed-Jacobian product on the batch and a few Jacobian
products a step and vector; no matrix of size N is formed. THEORY §3 (ours).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk import losses
from poprisk.path.checks import check_probes
from poprisk.path.closure import Closure, relative
from poprisk.path.problem import Problem
from poprisk.path.quadrature import Nodes, averaged, composite, gauss
from poprisk.path.recursion import Recursion
from poprisk.path.run import Run
from poprisk.printing import short_repr
from poprisk.protocols import ProgressCallback

HESSIAN_NODES = 3


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
    """The result of :func:`follow`; the last column is the affine part.

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


def follow(
    run: Run,
    probes: Tensor,
    *,
    every: int = 1,
    quadrature: str = "gauss3",
    segments: int = 1,
    points: int = 2,
    decaying: bool = False,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> Followed:
    r"""Follow output gradients along a run, and what is affine beside them.

    With ``every=1`` this is the exact recursion of :func:`poprisk.path.integrate`. A larger one
    moves all n + m outputs only every so many intervals, along the chord, and in between only
    those of the present batch, which costs less and is second-order accurate.

    Args:
        run: a recorded run.
        probes: starting output gradients, (n, c, r).
        every: intervals between updates of all outputs.
        quadrature: of the chord.
        segments: pieces of the chord.
        points: moments to keep, the last among them.
        decaying: let weight decay act on what each probe moved, and on the weights of the start in
            the affine part: how the run would have answered to other labels. Otherwise all of
            decay is affine, as in :math:`D` and :math:`G`. Either way all columns add up.
        dtype: to compute in; None: that of the weights.
        progress: told of each interval.

    Raises:
        ValueError: for probes of another shape, or bad settings.
    """
    checks.check_positive("every", every)
    check_probes(probes, (run.problem.n, run.problem.c))
    nodes = composite(quadrature, segments)
    kept = {len(run), *(round(i * len(run) / max(points - 1, 1)) for i in range(points))}
    with torch.inference_mode(False):
        march = _March(run, probes.clone(), dtype or run.weights.dtype, nodes, decaying=decaying)
        for k in range(len(run)):
            march.advance(k)
            if (k + 1) % every == 0 or k + 1 == len(run) or (every == 1 and k + 1 in kept):
                march.refresh()
                if any(k + 1 - every < i <= k + 1 for i in kept):
                    march.keep()
            if progress is not None:
                progress(k + 1, len(run))
        return march.result()


def follow_all(run: Run, probes: Tensor, **settings: Any) -> tuple[Applied, Closure]:
    r"""Follow any probes, and beside them what they leave of :math:`g_0`, to know the closure.

    Args:
        run: a recorded run.
        probes: starting output gradients, (n, c, r).
        settings: of :func:`follow`.
    """
    check_probes(probes, (run.problem.n, run.problem.c))
    w = run.weights[0].to(settings.get("dtype") or run.weights.dtype)
    problem, probes, r = run.problem.to(w.dtype), probes.to(w), probes.shape[-1]
    g = problem.output_gradient(problem.J.values(w, problem.train[0]))
    rest = (g - probes.sum(-1)).unsqueeze(-1)
    followed = follow(run, torch.cat([probes, rest], -1), **settings)
    return Applied(*(t[..., :r] for t in followed.applied)), followed.closure()


class _March:
    """The recursion on a few columns; the affine one comes last."""

    def __init__(
        self, run: Run, probes: Tensor, dtype: torch.dtype, nodes: Nodes, *, decaying: bool
    ) -> None:
        self.run, self.nodes, self.dtype = run, nodes, dtype
        self.problem = run.problem.to(dtype)
        self.affine = has_affine_part(run)
        X = probes.to(dtype)
        self.X = torch.cat([X, torch.zeros_like(X[..., :1])], -1) if self.affine else X
        r = self.X.shape[-1]
        self.w = self.origin = run.weights[0].to(dtype)
        self.recursion = Recursion.of_run(run, r, dtype)
        self.decaying = self.affine and decaying
        if self.decaying:  # the weights as the sum of what each column made of them
            self.recursion.moved = torch.zeros_like(self.recursion.momentum)
            self.recursion.moved[:, -1] = self.w
        self.u, self.v = self._outputs()
        self.u0 = self.u
        self.D, self.G = torch.zeros_like(self.X), torch.zeros(*self.v.shape, r, dtype=dtype)
        self.moved = torch.zeros_like(self.recursion.momentum)
        self.fresh, self.steps = True, 0
        self.moments: list[QueryTransfer] = []
        self.keep()

    def _outputs(self) -> tuple[Tensor, Tensor]:
        parts = [
            torch.cat([self.problem.J.values(self.w, part) for part in x.split(1024)])
            for x in (self.problem.train[0], self.problem.query[0])
        ]
        return parts[0], parts[1]

    def keep(self) -> None:
        """Remember the query set as it is now."""
        self.moments.append(QueryTransfer(self.steps, self._with_affine(self.G.clone()), self.v))

    def advance(self, k: int) -> None:
        """Take the step of interval k with every column."""
        run, interval, rule = self.run, self.run.intervals[k], self.run.rule(k, self.dtype)
        rows, end = interval.examples, run.weights[k + 1].to(self.dtype)
        w = self.w if rule.steps == 1 else (self.w + end) / 2
        u, pull = self.problem.J.pullback(w, self.problem.train[0][rows])
        X = self.X[rows] if self.fresh else self._at(rows, w, u)
        gradient = pull(interval.sampling.to(self.dtype)[:, None, None] * X)
        weights = w if self.affine and not self.decaying else None
        self.moved += self.recursion.step(rule, gradient, weights=weights)[1]
        self.w, self.fresh, self.steps = end, False, self.steps + rule.steps

    def _at(self, rows: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Columns of the batch at ``w``: what they were at the last refresh, moved since."""
        moved = self.problem.J.jvp((self.origin + w) / 2, self.problem.train[0][rows], self.moved)
        return self.X[rows] - _curved(self.problem, self.u[rows], u, moved, rows)

    def refresh(self) -> None:
        """Move all outputs along the chord since the last time."""
        before, chord, problem = self.u, (self.origin, self.w), self.problem
        moved, seen = (
            averaged(lambda a, x=x: problem.J.jvp(torch.lerp(*chord, a), x, self.moved), self.nodes)
            for x in (problem.train[0], problem.query[0])
        )
        self.u, self.v = self._outputs()
        self.X = self.X - _curved(problem, before, self.u, moved, torch.arange(problem.n))
        self.D, self.G = self.D + moved, self.G + seen
        self.origin, self.fresh = self.w, True
        self.moved.zero_()

    def _with_affine(self, columns: Tensor) -> Tensor:
        return columns if self.affine else torch.cat([columns, 0 * columns[..., :1]], -1)

    def result(self) -> Followed:
        """Everything followed; the affine column is there even where it is zero."""
        columns = (self._with_affine(t) for t in (self.X, self.recursion.momentum, self.D, self.G))
        g = self.problem.output_gradient(self.u)
        return Followed(Applied(*columns), self.moments, (self.u0, self.u), g)


def has_affine_part(run: Run) -> bool:
    """Whether anything but the starting output gradient moved the weights."""
    decays = (decay for i in run.intervals for decay in (i.rule.coupled, i.rule.decay))
    return bool(run.momentum_in.any()) or any(bool(torch.as_tensor(d).any()) for d in decays)


def _curved(problem: Problem, u: Tensor, end: Tensor, moved: Tensor, rows: Tensor) -> Tensor:
    r""":math:`\bar B` of some training examples times (b, c, r)."""
    y = problem.train[1][rows]

    def product(a: float) -> Tensor:
        between = problem.shaped(torch.lerp(u, end, a))
        return losses.hessian_product(problem.loss, between, y, moved)

    return averaged(product, gauss(HESSIAN_NODES)) / problem.n
