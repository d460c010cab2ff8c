r"""How much of the movement of the query outputs is signal, and how much label noise.

Labels are clean ones plus noise, so the starting output gradient splits into
:math:`g_0 = g_{signal} + g_{noise}`, and with it, exactly, all that training did. THEORY §4; the
working form is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.path.closure import Closure
from poprisk.path.follow import follow
from poprisk.path.march import Followed
from poprisk.path.problem import Problem
from poprisk.path.run import Run
from poprisk.printing import short_html, short_repr
from poprisk.protocols import ProgressCallback


class QueryParts(NamedTuple):
    """Parts of the movement of the query outputs since the start, each (m, c).

    Attributes:
        step: optimizer steps done.
        signal: what the clean labels moved.
        noise: what the label noise moved.
        affine: what weight decay, and momentum brought in, moved.
        outputs: realized outputs.
    """

    step: int
    signal: Tensor
    noise: Tensor
    affine: Tensor
    outputs: Tensor

    __repr__ = short_repr


class CellTrace(NamedTuple):
    r"""The result of :func:`trace_cells`.

    Attributes:
        start: query outputs before the run, (m, c).
        parts: along the run; start + signal + noise + affine = outputs, up to the closure.
        closure: how far that is off.
        output_shape: of the outputs of one example.
        energy_left: :math:`\|P g\|^2 / \|g\|^2` of the signal's and of the noise's starting output
            gradient: the share of its energy that is left in the training set at the end, all of
            what lies in the reservoir; above 1 where the two hold each other in check. NaN for
            what was not followed, or is 0.
    """

    start: Tensor
    parts: list[QueryParts]
    closure: Closure
    output_shape: tuple[int, ...]
    energy_left: tuple[float, float]

    __repr__ = short_repr
    _repr_html_ = short_html

    def without_noise(self, i: int = -1) -> Tensor:
        """Query outputs (m, ...) as they would be without the label noise that got through."""
        u = self.parts[i].outputs - self.parts[i].noise
        return u.reshape(len(u), *self.output_shape)

    def outputs(self, i: int = -1) -> Tensor:
        """Realized query outputs (m, ...)."""
        u = self.parts[i].outputs
        return u.reshape(len(u), *self.output_shape)


def check_clean(clean: Any, targets: Tensor) -> None:
    """Raise ValueError unless clean targets are like the training targets."""
    fits = isinstance(clean, Tensor) and clean.shape == targets.shape
    if not fits or clean.is_floating_point() != targets.is_floating_point():
        form = f"{tuple(clean.shape)} of {clean.dtype}" if isinstance(clean, Tensor) else clean
        raise ValueError(
            f"clean targets must be like the training targets, {tuple(targets.shape)} of "
            f"{targets.dtype}, but got {form}."
        )


def split_gradient(run: Run, clean: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`g_{signal}` and :math:`g_{noise}` at weights ``w``, each (n, c).

    The first is the output gradient with the clean targets, the second the rest of it.

    Raises:
        ValueError: unless ``clean`` has the shape of the training targets.
    """
    with torch.inference_mode(False):
        problem = run.problem.to(w.dtype)
        check_clean(clean, problem.train[1])
        return split_at(problem, clean, w)


def split_at(problem: Problem, clean: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a problem, on the device and in the precision of its weights."""
    targets = problem.train[1]
    y = clean.to(targets.device, w.dtype if clean.is_floating_point() else clean.dtype)
    u = problem.J.values(w, problem.train[0])
    signal = problem.output_gradient(u, y.clone())
    return signal, problem.output_gradient(u) - signal


@torch.inference_mode(False)  # what it makes on the way is differentiated
def trace_cells(
    run: Run,
    clean_targets: Tensor,
    *,
    every: int | None = None,
    quadrature: str = "midpoint",
    points: int = 30,
    dtype: torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> CellTrace:
    r"""Split the movement of the query outputs into signal and label noise, matrix-free.

    Follows two vectors (and the affine part, where there is decay) through the recorded run. The
    defaults are made to be cheap: all outputs are moved once per pass over the data, with one
    Jacobian product each, and those of a batch when it is due. ``every=1, quadrature="gauss3"``
    is exact.

    Args:
        run: a recorded run.
        clean_targets: training targets without the label noise, in the form of the targets.
        every: intervals between updates of all outputs; None: one pass over the data. Before the
            first of them there are some after 1, 2, 4, ... intervals.
        quadrature: of the chords in between.
        points: how many moments to keep.
        dtype: to compute in; None: that of the weights.
        progress: told of each interval.

    Raises:
        ValueError: if ``clean_targets`` does not fit.
    """
    w = run.weights[0].to(dtype or run.weights.dtype)
    probes = torch.stack(split_gradient(run, clean_targets, w), dim=-1)
    seen = sum(len(i.examples) for i in run.intervals) / len(run)
    stride = max(1, round(run.problem.n / seen)) if every is None else every
    followed = follow(
        run,
        probes,
        every=stride,
        quadrature=quadrature,
        points=points,
        dtype=dtype,
        progress=progress,
    )
    trace = trace_of(followed, run.problem.output_shape, energies(probes))
    trace.closure.warn(
        'Pass every=1, quadrature="gauss3" to be exact, and record every step (stride=1); '
        "gradients that were clipped or masked do that too.",
        stacklevel=2,
    )
    return trace


def trace_of(followed: Followed, output_shape: tuple[int, ...], energy: Tensor) -> CellTrace:
    """The cells of what was followed: signal, noise and the affine part, in three columns.

    Args:
        followed: the columns, at their end.
        output_shape: of the outputs of one example.
        energy: of signal and noise at the start, (2,).
    """
    parts: list[QueryParts] = []
    for moment in followed.moments:
        signal, noise, affine = (-moment.query).unbind(-1)
        parts.append(QueryParts(moment.step, signal, noise, affine, moment.outputs))
    signal, noise = (energies(followed.applied.gradient)[:2] / energy).tolist()
    return CellTrace(parts[0].outputs, parts, followed.closure(), output_shape, (signal, noise))


def energies(columns: Tensor) -> Tensor:
    """Squared norms (r,) of output gradients (n, c, r)."""
    return columns.double().square().sum((0, 1))
