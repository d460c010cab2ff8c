"""Arms × seeds of a task as a study: every arm is trained on every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from poprisk_lab.checkpoint import Workspace, load_checkpoint
from poprisk_lab.comparison import COMPARISON, Comparison
from poprisk_lab.fit import ArmRun, Row
from poprisk_lab.runner import run_trials
from poprisk_lab.store import Store
from poprisk_lab.study import Settings, Trial


def run_directory(path: Path) -> Store:
    """The run directory of a comparison."""
    return Store(path, COMPARISON)


def compare(comparison: Comparison, directory: Store, on_row: Callable[[Row], None]) -> None:
    """Train every arm on every seed that the run directory does not hold yet.

    Raises:
        TrainingError: if a run fails; the others up to then are kept.
        TaskError: if the task fails for a seed.
        RunDirectoryError: if a checkpoint is damaged or a record cannot be written.
    """
    run_trials(
        trials_of(comparison),
        partial(_train, comparison),
        directory,
        workers=comparison.workers,
        on_row=lambda _, row: on_row(row),
    )


def trials_of(comparison: Comparison) -> list[Trial]:
    """One an arm and seed; an arm that follows another comes after it."""
    return [
        Trial(
            f"{arm.name}-{seed}",
            {"arm": arm.name, "seed": seed},
            after=(f"{arm.follows}-{seed}",) if arm.follows is not None else (),
            keeps=comparison.is_followed(arm),
            label=f"arm {arm.name}, seed {seed}",
        )
        for seed in comparison.seeds
        for arm in comparison.arms
    ]


def _train(comparison: Comparison, settings: Settings, workspace: Workspace) -> Iterator[Row]:
    arm = next(arm for arm in comparison.arms if arm.name == settings["arm"])
    seed, followed = settings["seed"], comparison.is_followed(arm)
    traces = [load_checkpoint(path)["rms"].tolist() for path in workspace.given.values()]
    run = ArmRun(
        task=comparison.make_task(seed),
        arm=arm,
        seed=seed,
        trace=traces[0] if traces else None,
        record=followed,
        workspace=workspace,
        device=comparison.device,
        with_twin=comparison.twin and arm.can_have_twin,
    )
    run.resume()
    yield {"event": "start", "arm": arm.name, "seed": seed, "epoch": run.progress.epoch}
    for row in run.rows():
        if row["event"] == "end" and followed:
            workspace.keep({"rms": torch.tensor(run.progress.trace, dtype=torch.float64)})
        yield row
