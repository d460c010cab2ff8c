r"""The exact path operators P, Q, W, G, D of a recorded run, as dense matrices.

Everything is affine in the starting output gradient :math:`g_0`. The matrices act on it; one more
column carries what does not depend on it (weight decay, momentum brought in). Discrete time,
THEORY §3 (ours).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk._renamed import renamed_arguments
from poprisk.optim.step import StepRule
from poprisk.path.checks import check_memory
from poprisk.path.closure import REMEDY, Closure, relative
from poprisk.path.quadrature import PathJacobian, average_gradient, average_hessian, composite
from poprisk.path.recursion import Recursion
from poprisk.path.run import Run
from poprisk.printing import short_repr
from poprisk.protocols import ProgressCallback

MAX_MEMORY = 3 * 2**30
BLOCK = 2**21
"""Entries of a piece of the matrices of P rows: temporaries of this size stay near the processor,
and their memory is used again, where a fresh matrix of P rows would cost as much as a product."""


class Affine(NamedTuple):
    """What does not depend on the starting output gradient.

    Attributes:
        gradient: h, its part of the final output gradient, (N,).
        momentum: of the final momentum, (P,).
        train: of the training displacement, (N,), to be subtracted like D g₀.
        query: of the query displacement, (Nq,), to be subtracted like G g₀.
    """

    gradient: Tensor
    momentum: Tensor
    train: Tensor
    query: Tensor

    __repr__ = short_repr


class Snapshot(NamedTuple):
    r"""The state of affairs after some steps.

    Attributes:
        step: optimizer steps done.
        G: query transfer so far, (Nq, N+1), the affine part last.
        train_outputs: realized, (N,).
        query_outputs: realized, (Nq,).
        gradient: realized output gradient, (N,).
        kernel: :math:`K_{SS}` at the present weights, (N, N); where gradients are cut inside the
            model, what outputs move by times what they are trained by, which is not symmetric.
    """

    step: int
    G: Tensor
    train_outputs: Tensor
    query_outputs: Tensor
    gradient: Tensor
    kernel: Tensor

    __repr__ = short_repr


class Accounting(NamedTuple):
    r"""Where the drop of the training loss went.

    Attributes:
        measured: :math:`\Phi_0 - \Phi_K`.
        accounted: :math:`\sum_k \bar g_k^T \bar J_k (-\Delta w_k)`, with the predicted steps.
        quadratic: :math:`g_0^T W g_0`, equal to the drop only as the step goes to 0.
    """

    measured: float
    accounted: float
    quadratic: float

    __repr__ = short_repr


@dataclass
class Integrals:
    r"""The operators of a run; N = n·c training outputs, Nq = m·c query outputs.

    Attributes:
        P: propagator of the output gradient, :math:`g_K = P g_0 + h`, (N, N).
        Q: momentum map, (P, N).
        W: cumulative dissipation, positive semi-definite, (N, N).
        G: query transfer, :math:`U_Q(K) - U_Q(0) = -G g_0 - G_{aff}`, (Nq, N).
        D: training transfer, likewise, (N, N).
        affine: what does not depend on :math:`g_0`.
        g0: starting output gradient, (N,).
        closure: how far the identities are off.
        accounting: of the training loss.
        frozen: the predictor of the kernel at the start,
            :math:`K_{QS}(0) K_{SS}(0)^\dagger`, (Nq, N).
        snapshots: over the run, the first before it and the last at its end.
    """

    P: Tensor
    Q: Tensor
    W: Tensor
    G: Tensor
    D: Tensor
    affine: Affine
    g0: Tensor
    closure: Closure
    accounting: Accounting
    frozen: Tensor
    snapshots: list[Snapshot] = field(default_factory=list)

    __repr__ = short_repr


def dense_bytes(run: Run) -> float:
    """Memory that :func:`integrate` takes at its peak, roughly."""
    p, size, queries = run.problem, run.problem.size, run.problem.m * run.problem.c
    outputs, batch = run.problem.n * p.c, max(len(i.examples) for i in run.intervals) * p.c
    strided = 3 * outputs if run.stride > 1 else 0
    return 8.0 * (
        size * (2 * outputs + queries + batch + strided)
        + 6 * outputs * (outputs + queries)
        + 4 * BLOCK
    )


@renamed_arguments(budget="max_memory")
def integrate(
    run: Run,
    *,
    quadrature: str = "gauss3",
    segments: int = 1,
    refine: float | None = None,
    snapshots: int = 12,
    max_memory: float = MAX_MEMORY,
    progress: ProgressCallback | None = None,
) -> Integrals:
    """Compute the operators of a run in float64.

    Args:
        run: a recorded run.
        quadrature: a name of :data:`poprisk.path.quadrature.QUADRATURES`.
        segments: equal pieces of each step that the quadrature is applied to.
        refine: halve the step of single examples until the relative error of their displacement
            is below this (kinks of ReLU); None: do not.
        snapshots: how many to keep.
        max_memory: bytes that the matrices may take.
        progress: told of each interval.

    Raises:
        NotAnalysable: if the matrices need more memory.
    """
    check_memory(
        dense_bytes(run),
        max_memory,
        f"dense operators for {run.problem.n * run.problem.c} training outputs and "
        f"{run.problem.size} weights",
        "follow single vectors with apply() or trace_cells(), take fewer examples or a smaller "
        "model, or raise max_memory=.",
    )
    nodes = composite(quadrature, segments)
    count = min(max(snapshots, 2), len(run) + 1)
    kept = {round(i * len(run) / (count - 1)) for i in range(count)}
    with torch.inference_mode(False):
        walk = _Walk(run, PathJacobian(run.problem.to(torch.float64), nodes, refine=refine))
        for k in range(len(run)):
            if k in kept:
                walk.snapshot(run.steps * k // len(run))
            walk.advance(k)
            if progress is not None:
                progress(k + 1, len(run))
        walk.snapshot(run.steps)
        result = walk.result()
    result.closure.warn(REMEDY, stacklevel=3)
    return result


class _Walk:
    """The recursion along a run."""

    def __init__(self, run: Run, jacobian: PathJacobian) -> None:
        self.run, self.average, self.problem = run, jacobian, jacobian.problem
        p = self.problem
        self.x, self.points = p.train[0], p.query[0]
        self.w = run.weights[0].double()
        self.u, self.v = self._outputs(self.w)
        self.u0, self.v0 = self.u, self.v
        self.g0 = p.output_gradient(self.u).flatten()
        N, Nq = self.u.numel(), self.v.numel()
        zeros = {"dtype": torch.float64}
        outputs = (p.n + p.m) * p.c
        self.J = torch.empty(outputs, p.size, **zeros)  # path-averaged: training, then query rows
        self.J_batch = torch.empty(0, p.size, **zeros)
        self.J_train = torch.empty(N if p.is_cut else 0, p.size, **zeros)
        self.inputs = torch.cat([self.x, self.points])
        self.X = torch.cat([torch.eye(N, **zeros), torch.zeros(N, 1, **zeros)], 1)
        self.recursion = Recursion.of_run(run, N + 1, torch.float64)
        self.W, self.D = torch.zeros(N, N, **zeros), torch.zeros(N, N + 1, **zeros)
        self.G = torch.zeros(Nq, N + 1, **zeros)
        self.accounted = 0.0
        self.kept: list[Snapshot] = []
        self.start = torch.ones(N + 1, **zeros)  # (g_0, 1), on which the columns act
        self.start[:-1] = self.g0
        self.frozen = self._frozen()

    def _outputs(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.problem.J.values(w, self.x), self.problem.J.values(w, self.points)

    def _frozen(self) -> Tensor:
        J, J_Q = self._moving(self.w, self.inputs, self.J).tensor_split((len(self.X),))
        J_T = self._training(J).T
        return J_Q @ J_T @ torch.linalg.pinv(J @ J_T, hermitian=not self.problem.is_cut)

    def snapshot(self, step: int) -> None:
        """Keep the present state."""
        J = self._moving(self.w, self.x, self.J[: len(self.X)])
        g = self.problem.output_gradient(self.u).flatten()
        self.kept.append(
            Snapshot(
                step, self.G.clone(), self.u.flatten(), self.v.flatten(), g, J @ self._training(J).T
            )
        )

    def advance(self, k: int) -> None:
        r"""Follow interval k.

        :math:`Q \leftarrow aQ + c J^T S P,\ P \leftarrow P - \bar B \bar J_S\, \eta M Q`.
        """
        run, problem = self.run, self.problem
        rule, end = run.rule(k, torch.float64), run.weights[k + 1].double()
        u, v = self._outputs(end)
        B = average_hessian(problem, self.u, u - self.u)
        self.average(self.w, end, self.inputs, out=self.J)
        w = self.w if rule.steps == 1 else (self.w + end) / 2
        moved, seen = self._step(rule, *self._pulled(k, rule, w, B), w).tensor_split((len(self.X),))
        self.D += moved
        self.G += seen
        self.X -= _blocks(B, moved)
        mean = average_gradient(problem, self.u, u - self.u).flatten()
        self.accounted += float(mean @ (moved @ self.start))
        self.w, self.u, self.v = end, u, v

    def _moving(self, w: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Rows at ``w`` of the Jacobian that outputs move by, written to ``out``."""
        return self.problem.J_whole.write(out, [(w, 1.0)], x)

    def _training(self, J: Tensor) -> Tensor:
        """Rows of the training outputs' own gradients now: ``J`` if nothing is cut."""
        if not self.problem.is_cut:
            return J
        return self.problem.J.write(self.J_train, [(self.w, 1.0)], self.x)

    def _step(self, rule: StepRule, J: Tensor, pulled: Tensor, w: Tensor) -> Tensor:
        r"""Take a step and return what it moves, (N+Nq, N+1).

        Weights are gone through piece by piece: gradient :math:`J^T S P`, momentum, step
        :math:`V = \eta M R/(1-\beta_1^{k+1})`, and :math:`\bar J V`.
        """
        columns = pulled.shape[1]
        moved = torch.zeros(len(self.J), columns, dtype=torch.float64)
        size = max(1, BLOCK // columns)
        for start in range(0, len(w), size):
            part = slice(start, start + size)
            some = rule.part(part)
            factors = J[:, part].T, pulled
            R, V = self.recursion.step(some, *factors, weights=w[part], rows=part)
            self._dissipate(R[:, :-1], some)
            moved.addmm_(self.J[:, part], V)
        return moved

    def _pulled(self, k: int, rule: StepRule, w: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        r"""Jacobian of the batch, (b·c, P), and :math:`S P` on its rows, (b·c, N+1)."""
        interval, c = self.run.intervals[k], self.problem.c
        rows = (interval.examples[:, None] * c + torch.arange(c)).flatten()
        sampling = interval.sampling.repeat_interleave(c)[:, None]
        J_S = self.J[: len(self.X)]
        J, X = J_S[rows] if rule.steps > 1 else None, self.X
        if J is None or self.problem.is_cut:
            if len(self.J_batch) < len(rows):
                self.J_batch = torch.empty(len(rows), len(w), dtype=torch.float64)
            J = self.J_batch[: len(rows)]
            self.problem.J.write(J, [(w, 1.0)], self.x[interval.examples])
        if rule.steps > 1:
            X = self._interval_mean(rule, w, (J_S, J, rows, sampling), B)
        return J, sampling * X[rows]

    def _interval_mean(
        self, rule: StepRule, w: Tensor, sampled: tuple[Tensor, Tensor, Tensor, Tensor], B: Tensor
    ) -> Tensor:
        r"""Mean of the columns over an interval of several steps (exponential midpoint).

        :math:`\dot X = -A X - f` with constant A and f has the mean
        :math:`\varphi_1(-A) X - \varphi_2(-A) f`.
        """
        J_S, J, rows, sampling = sampled
        carried, entered = rule.weights()
        scale = rule.correction * rule.precondition
        A = torch.zeros(len(J_S), len(J_S), dtype=torch.float64)
        JT = rule.sign * J.T
        A[:, rows] = _blocks(B, J_S @ (scale * entered * JT)) * sampling.T
        forcing = scale * carried * self.recursion.momentum
        coupled = scale * entered * rule.coupled + rule.decay * rule.steps
        forcing[:, -1:] += coupled * w[:, None]
        f = _blocks(B, J_S @ forcing)
        phi1, phi2 = phi_functions(-A)
        return phi1 @ self.X - phi2 @ f

    def _dissipate(self, R: Tensor, rule: StepRule) -> None:
        r""":math:`W \mathrel{+}= V^T V` with :math:`V = (\eta M)^{1/2} R`, of some weights."""
        scale = rule.precondition
        if isinstance(scale, Tensor):
            self.W.addmm_(R.T, scale.abs() * R, alpha=1 / rule.steps)
        else:
            self.W.addmm_(R.T, R, alpha=abs(scale) / rule.steps)

    def result(self) -> Integrals:
        """The operators with their closure."""
        g = self.problem.output_gradient(self.u).flatten()
        closure = Closure(
            relative(-self.D @ self.start, (self.u - self.u0).flatten()),
            relative(-self.G @ self.start, (self.v - self.v0).flatten()),
            relative(self.X @ self.start, g),
        )
        drop = self.problem.training_loss(self.u0) - self.problem.training_loss(self.u)
        accounting = Accounting(drop, self.accounted, float(self.g0 @ self.W @ self.g0))
        Q = self.recursion.momentum
        affine = Affine(self.X[:, -1], Q[:, -1], self.D[:, -1], self.G[:, -1])
        P, Q, G, D = (t[:, :-1] for t in (self.X, Q, self.G, self.D))
        W = (self.W + self.W.T) / 2
        return Integrals(
            P, Q, W, G, D, affine, self.g0, closure, accounting, self.frozen, self.kept
        )


def phi_functions(Z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Two integrals of the matrix exponential of a square matrix.

    .. math:: \varphi_1(Z) = \int_0^1 e^{\tau Z} d\tau, \qquad
              \varphi_2(Z) = \int_0^1 \varphi_1(\tau Z)\,\tau\, d\tau

    Example:
        >>> [round(float(phi), 6) for phi in phi_functions(torch.zeros(1, 1))]
        [1.0, 0.5]
    """
    n = len(Z)
    big = torch.zeros(3 * n, 3 * n, dtype=Z.dtype)
    big[:n, :n] = Z
    big[:n, n : 2 * n] = torch.eye(n, dtype=Z.dtype)
    big[n : 2 * n, 2 * n :] = torch.eye(n, dtype=Z.dtype)
    exp = torch.linalg.matrix_exp(big)
    return exp[:n, n : 2 * n], exp[:n, 2 * n :]


def _blocks(B: Tensor, X: Tensor) -> Tensor:
    """The block-diagonal (n, c, c) times a matrix (n·c, r)."""
    n, c, _ = B.shape
    return (B @ X.view(n, c, -1)).view(n * c, -1)
