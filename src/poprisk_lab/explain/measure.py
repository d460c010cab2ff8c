"""Record the runs of an explanation and measure what the theory says about them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk.path import CellTrace, Closure, NotAnalysable, Run, record, trace_cells
from poprisk.path.drift import Movement, draw_batches, exponents, movement
from poprisk.path.operators import PathOperators, path_operators
from poprisk.task import Task
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.explain.plan import ExplainPlan, Size, choose_size, full_steps, make_optimizer
from poprisk_lab.fit import score, seed_all
from poprisk_lab.results import Metrics, Settings

TOL = 1e-3
DIRECTIONS = 40
REPLICATES = 6
REPLICATE_STEPS = 32
TELL_SECONDS = 0.5
"""Time between two rows of progress."""

Say = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and of how much."""


def measure(plan: ExplainPlan, settings: Settings, workspace: Workspace) -> Metrics:
    """Do one trial: the whole task by one optimizer, or the operators of a small run.

    Raises:
        NotAnalysable: if that cannot be analysed, and there is no other trial.
    """
    say = _teller(workspace)
    if settings["part"] == "cells":
        return measure_cells(plan, plan.task(), gated=settings["gated"], say=say)
    task, smaller = plan.small_task()
    try:
        return {**measure_operators(plan, task, say=say), "smaller": smaller}
    except NotAnalysable as error:
        if settings["alone"]:
            raise
        return {"refused": str(error)}


def _teller(workspace: Workspace) -> Say:
    """Adds how far a phase is to the record, where it begins and then every now and then."""
    told: dict[str, float] = {}

    def say(phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done == total or now - told.get(phase, -math.inf) > TELL_SECONDS:
            told[phase] = now
            workspace.tell({"event": "progress", "phase": phase, "done": done, "total": total})

    return say


def measure_cells(plan: ExplainPlan, task: Task, *, gated: bool, say: Say) -> dict[str, Any]:
    """Train on the whole task and split what it did to the test outputs into signal and noise.

    Raises:
        NotAnalysable: if the run cannot be recorded or followed.
    """
    assert task.clean is not None  # the caller has it
    seed_all(plan.seed)
    model = task.new_model()
    n = len(task.train[1])
    optimizer = make_optimizer(
        plan, model, gated=gated, batch_size=min(task.batch_size, n - 1), dataset_size=n
    )
    name = type(optimizer).__name__
    epochs, steps = full_steps(plan, task)
    run = record(
        model,
        task.loss,
        optimizer,
        draw_batches(n, task.batch_size, steps, plan.seed, replace=False),
        task.test,
        train=task.train,
        progress=lambda done, total: say(f"training with {name}", done, total),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the page says the closure itself
        trace = trace_cells(
            run,
            task.clean,
            every=1,  # kinks of ReLU need short chords
            quadrature="gauss2",
            progress=lambda done, total: say(f"splitting what {name} did", done, total),
        )
    rows = [_cell_row(task, trace, i, steps / epochs) for i in range(len(trace.parts))]
    return {"optimizer": name, "steps": steps, "closure": _closure(trace.closure), "rows": rows}


def _cell_row(task: Task, trace: CellTrace, i: int, per_epoch: float) -> dict[str, float]:
    part, targets = trace.parts[i], task.test[1]
    return {
        "step": part.step,
        "epoch": part.step / per_epoch,
        "metric": score(task, trace.outputs(i), targets),
        "without_noise": score(task, trace.without_noise(i), targets),
        "signal": _rms(part.signal),
        "noise": _rms(part.noise),
        "affine": _rms(part.affine),
    }


def measure_operators(plan: ExplainPlan, task: Task, *, say: Say) -> dict[str, Any]:
    """Record a small run in float64 and compute its operators.

    Raises:
        NotAnalysable: if the run cannot be recorded or its operators are too large.
    """
    seed_all(plan.seed)
    size = choose_size(task, task.new_model(), plan.seconds)
    batches = draw_batches(size.n, size.batch, size.steps, plan.seed, replace=False)
    run = _small_run(plan, task, size, batches)
    ops = path_operators(
        run,
        snapshots=17,
        progress=lambda done, total: say("computing the operators", done, total),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the page says the closure itself
        closure = _closure(ops.closure)
    return {
        "n": size.n,
        "m": size.m,
        "batch": size.batch,
        "steps": size.steps,
        "parameters": run.problem.size,
        "outputs": run.problem.c,
        "closure": closure,
        "notes": run.describe(),
        "accounting": ops.accounting._asdict(),
        "spectrum": _spectrum(ops),
        "residual": [list(row) for row in ops.residual_shares(tol=TOL)],
        "kernel_drift": [list(row) for row in ops.kernel_drift()],
        "coupling": _coupling(ops),
        "noise_gain": ops.noise_gain()._asdict(),
        "cells": None if task.clean is None else _cells(ops, task.clean[: size.n]),
        "drift": _drift(plan, task, size, ops, say),
    }


def _small_run(plan: ExplainPlan, task: Task, size: Size, batches: Sequence[Tensor]) -> Run:
    seed_all(plan.seed)
    model = task.new_model().double()
    optimizer = make_optimizer(plan, model, gated=False, batch_size=size.batch, dataset_size=size.n)
    (x, y), (xq, yq) = task.train, task.test
    return record(
        model,
        task.loss,
        optimizer,
        batches,
        (_double(xq[: size.m]), _double(yq[: size.m])),
        train=(_double(x[: size.n]), _double(y[: size.n])),
    )


def _spectrum(ops: PathOperators) -> dict[str, Any]:
    spectrum, largest = ops.spectrum, float(ops.spectrum.eigenvalues[0])
    return {
        "relative": [max(float(v) / largest, 0.0) for v in spectrum.eigenvalues],
        "tol": TOL,
        "dimensions": {f"{tol:g}": d for tol, d in spectrum.dimensions().items()},
        "channel": ops.channel(TOL).dimension,
        "participation": spectrum.participation(),
        "dissipation_dimension": spectrum.dissipation_dimension(ops.g0),
    }


def _coupling(ops: PathOperators) -> dict[str, Any]:
    coupling, snapshots = ops.coupling(), ops.integrals.snapshots
    realized = snapshots[-1].query_outputs - snapshots[0].query_outputs
    shown = slice(None, None, max(1, len(realized) // 300))
    return {
        "realized": realized[shown].tolist(),
        "predicted": coupling.prediction.movement[shown].tolist(),
        "frozen": coupling.frozen.movement[shown].tolist(),
        "correlation": coupling.prediction.correlation,
        "error": coupling.prediction.error,
        "frozen_correlation": coupling.frozen.correlation,
        "frozen_error": coupling.frozen.error,
    }


def _cells(ops: PathOperators, clean: Tensor) -> dict[str, Any]:
    clean = _double(clean)
    whole = ops.four_cells(clean, tol=TOL)
    moments = ops.cells_over_time(clean, tol=TOL)
    error = whole.error
    return {
        "closure": whole.closure,
        "signal_share": whole.signal_share,
        "noise_share": whole.noise_share,
        "error": None
        if error is None
        else {"name": error.name, "terms": error.terms, "measured": error.measured},
        "rows": [
            {"step": m.step, **{name: _rms(part) for name, part in m.cells._asdict().items()}}
            for m in moments
        ],
    }


def _drift(
    plan: ExplainPlan, task: Task, size: Size, ops: PathOperators, say: Say
) -> dict[str, Any]:
    """Replicates of plain SGD's first steps that differ in their batches, drawn independently."""
    problem = ops.run.problem
    basis = ops.channel(TOL).basis[:, :DIRECTIONS].reshape(problem.n, problem.c, -1)
    steps, found = min(REPLICATE_STEPS, size.steps), list[Movement]()
    for r in range(REPLICATES):
        batches = draw_batches(size.n, size.batch, steps, 1_000 + r, replace=True)
        run = _small_run(plan._replace(optimizer="SGD"), task, size, batches)
        found.append(movement(run, directions=basis))
        say("measuring drift and diffusion", r + 1, REPLICATES)
    drift, diffusion = exponents(found)
    return {
        "times": found[0].times,
        "drift": torch.stack([m.drift.norm(dim=1) for m in found]).mean(0).tolist(),
        "diffusion": torch.stack([m.diffusion.norm(dim=1) for m in found]).mean(0).tolist(),
        "drift_exponent": list(drift[:3]),
        "diffusion_exponent": list(diffusion[:3]),
        "replicates": REPLICATES,
    }


def _closure(closure: Closure) -> dict[str, float]:
    return {k: v if math.isfinite(v) else math.inf for k, v in closure._asdict().items()}


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
