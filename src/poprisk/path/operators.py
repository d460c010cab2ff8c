r"""The operators of a run, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk._renamed import renamed_arguments, renamed_attributes
from poprisk.path import four_cells as parts
from poprisk.path.channel import TOLERANCES, Channel, Spectrum
from poprisk.path.closure import REMEDY, Closure, relative
from poprisk.path.coupling import Coupling, NoiseGain, couple, noise_gain
from poprisk.path.follow import Applied, follow_all
from poprisk.path.integrals import (
    MAX_MEMORY,
    Accounting,
    Affine,
    Integrals,
    integrate,
)
from poprisk.path.quadrature import composite
from poprisk.path.run import Run
from poprisk.path.trace import split_gradient
from poprisk.printing import described, short_repr
from poprisk.protocols import ProgressCallback


class CellsAtStep(NamedTuple):
    """The cells at one moment of a run.

    Attributes:
        step: optimizer steps done.
        cells: parts of the movement so far.
        outputs: realized query outputs, (Nq,).
    """

    step: int
    cells: parts.Cells
    outputs: Tensor

    __repr__ = short_repr


@renamed_attributes(budget="max_memory")
@final
@dataclass(frozen=True)
class PathOperators:
    r"""The operators of a run; dense ones are computed when first asked for, and kept.

    N = n·c training outputs, Nq = m·c query outputs, P weights; float64.

    Attributes:
        run: what was recorded.
        quadrature: of the path-averaged Jacobians.
        segments: pieces of each step.
        refine: relative error above which a step is halved for single examples.
        snapshots: moments to keep.
        max_memory: bytes the dense operators may take.
        progress: told of each interval.
    """

    run: Run
    quadrature: str = "gauss3"
    segments: int = 1
    refine: float | None = None
    snapshots: int = 12
    max_memory: float = MAX_MEMORY
    progress: ProgressCallback | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        p = self.run.problem
        N, Nq = p.n * p.c, p.m * p.c
        done = "computed" if "integrals" in vars(self) else "not computed yet"
        shapes = f"N = {N:,} training outputs, Nq = {Nq:,} query outputs, P = {p.size:,} weights"
        return described(
            "PathOperators", shapes, f"quadrature={self.quadrature!r}", f"dense ones {done}"
        )

    @cached_property
    def integrals(self) -> Integrals:
        """All dense operators at once."""
        return integrate(
            self.run,
            quadrature=self.quadrature,
            segments=self.segments,
            refine=self.refine,
            snapshots=self.snapshots,
            max_memory=self.max_memory,
            progress=self.progress,
        )

    @property
    def P(self) -> Tensor:
        r"""Propagator of the output gradient, (N, N): :math:`g_K = P g_0 + h`."""
        return self.integrals.P

    @property
    def Q(self) -> Tensor:
        """Momentum map at the end, (P, N)."""
        return self.integrals.Q

    @property
    def W(self) -> Tensor:
        """Cumulative dissipation, (N, N), positive semi-definite."""
        return self.integrals.W

    @property
    def G(self) -> Tensor:
        r"""Query transfer, (Nq, N): :math:`U_Q(K) - U_Q(0) = -G g_0 - G_{aff}`."""
        return self.integrals.G

    @property
    def D(self) -> Tensor:
        """Training transfer, (N, N)."""
        return self.integrals.D

    @property
    def affine(self) -> Affine:
        """What does not depend on the starting output gradient."""
        return self.integrals.affine

    @property
    def g0(self) -> Tensor:
        """Starting output gradient, (N,)."""
        return self.integrals.g0

    @property
    def closure(self) -> Closure:
        """How far the identities are off."""
        return self.integrals.closure

    @property
    def accounting(self) -> Accounting:
        """Where the drop of the training loss went."""
        return self.integrals.accounting

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigenvectors of W."""
        return Spectrum.of(self.W)

    def channel(self, tol: float = 1e-6) -> Channel:
        """The signal channel and the soft reservoir at a tolerance."""
        return self.spectrum.channel(tol)

    def apply(self, probes: Tensor) -> Applied:
        r"""P, Q, G and D times starting output gradients (n, c, r), matrix-free.

        Warns where the run does not close, as the dense operators do.
        """
        applied, closure = follow_all(
            self.run,
            probes,
            quadrature=self.quadrature,
            segments=self.segments,
            progress=self.progress,
        )
        closure.warn(REMEDY, stacklevel=2)
        return applied

    def four_cells(self, clean_targets: Tensor, *, tol: float = 1e-6) -> parts.FourCells:
        """Split movement of the query outputs, and test error, into the four cells.

        Args:
            clean_targets: training targets without label noise, in the form of the targets.
            tol: of the channel.
        """
        signal, noise = self._split(clean_targets)
        channel, last = self.channel(tol), self.integrals.snapshots[-1]
        start = self.integrals.snapshots[0].query_outputs
        cells = parts.split_cells(last.G, channel, signal, noise)
        closure = relative(cells.total(), last.query_outputs - start)
        others = {t: self.channel(t) for t in TOLERANCES}
        return parts.FourCells(
            tol,
            cells,
            channel.share(signal),
            channel.share(noise),
            {t: (c.share(signal), c.share(noise)) for t, c in others.items()},
            closure,
            self._error(start, cells, last.query_outputs),
        )

    def cells_over_time(self, clean_targets: Tensor, *, tol: float = 1e-6) -> list[CellsAtStep]:
        """The cells at each snapshot, with the channel of the whole run."""
        signal, noise = self._split(clean_targets)
        channel = self.channel(tol)
        return [
            CellsAtStep(s.step, parts.split_cells(s.G, channel, signal, noise), s.query_outputs)
            for s in self.integrals.snapshots
        ]

    def coupling(self, *, tol: float = 1e-12) -> Coupling:
        r""":math:`A_\circ`, how well it predicts, and the frozen kernel beside it."""
        return couple(self.integrals, self.channel(tol))

    def noise_gain(self) -> NoiseGain:
        """Variance that unit label noise adds to a query output."""
        problem = self.run.problem.to(torch.float64)
        u = self.integrals.snapshots[0].train_outputs.view(problem.n, problem.c)
        return noise_gain(problem, self.integrals, u)

    def kernel_drift(self) -> list[tuple[int, float]]:
        r""":math:`\|K_t - K_0\|_2/\|K_0\|_2` at each snapshot, with its step."""
        first = self.integrals.snapshots[0].kernel
        scale = torch.linalg.matrix_norm(first, 2)
        return [
            (s.step, float(torch.linalg.matrix_norm(s.kernel - first, 2) / scale))
            for s in self.integrals.snapshots
        ]

    def residual_shares(self, *, tol: float = 1e-6) -> list[tuple[int, float, float]]:
        """Step, and squared norm of the output gradient in channel and soft reservoir."""
        channel = self.channel(tol)
        rows = []
        for s in self.integrals.snapshots:
            inside = float((channel.basis.T @ s.gradient).square().sum())
            rows.append((s.step, inside, float((channel.reservoir.T @ s.gradient).square().sum())))
        return rows

    def _split(self, clean_targets: Tensor) -> tuple[Tensor, Tensor]:
        w = self.run.weights[0].double()
        signal, noise = split_gradient(self.run, clean_targets, w)
        return signal.flatten(), noise.flatten()

    def _error(self, start: Tensor, cells: parts.Cells, end: Tensor) -> parts.TestError | None:
        problem = self.run.problem.to(torch.float64)
        y = problem.query[1]
        if y is None:
            return None
        if y.is_floating_point() and parts.is_square(problem):
            return parts.squared_terms(start, cells, end, y.reshape(-1))
        return parts.work_terms(problem, start, cells, end)


@renamed_arguments(budget="max_memory")
def path_operators(
    run: Run,
    quadrature: str = "gauss3",
    *,
    segments: int = 1,
    refine: float | None = None,
    snapshots: int = 12,
    max_memory: float = MAX_MEMORY,
    progress: ProgressCallback | None = None,
) -> PathOperators:
    r"""The path operators of a recorded run.

    Nothing is computed yet; the dense operators are when one of them is asked for.

    Args:
        run: from :func:`poprisk.record` or a :class:`poprisk.Recorder`.
        quadrature: ``"gauss3"``, or ``"left"``, ``"midpoint"``, ``"gauss2"``, ``"gauss5"``.
        segments: equal pieces of each step that the quadrature is applied to.
        refine: halve the step of single examples until their relative error is below this, for
            kinks (ReLU); None: do not.
        snapshots: moments to keep for what is shown over time.
        max_memory: bytes that the dense operators may take.
        progress: told of each interval.

    Raises:
        ValueError: for a bad setting.
    """
    composite(quadrature, segments)
    checks.check_number("max_memory", max_memory, low=0.0, include_low=False)
    return PathOperators(run, quadrature, segments, refine, snapshots, max_memory, progress)
