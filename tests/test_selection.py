"""A comparison with twins: the same training, estimates beside it, and what they would choose."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tiny
from asserts import assert_bitwise
from poprisk_lab.arms import Arm
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.comparison import Comparison, run_directory, train
from poprisk_lab.fit import ArmRun, Row
from poprisk_lab.page import render
from poprisk_lab.results import RunData, read_run
from poprisk_lab.selection import NOTHING, twin_report
from poprisk_lab.verdict import judge

OURS = Arm("poprisk", "PopRiskAdamW", "poprisk", "poprisk")
ADAMW = Arm("adamw", "AdamW", "adamw", "adamw", {"lr": 1e-2, "weight_decay": 0.01})
STOPPED = Arm(
    "stopped", "stopped", "early-stopping", "adamw", {"lr": 1e-2, "weight_decay": 0.01}, True
)


def rows_of(run: ArmRun) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.rows()]


@pytest.mark.parametrize("arm", [OURS, ADAMW, STOPPED], ids=lambda arm: arm.name)
def test_a_twin_changes_nothing_about_the_training(arm: Arm) -> None:
    plain = ArmRun(task=tiny.tiny(), arm=arm, seed=0)
    watched = ArmRun(task=tiny.tiny(), arm=arm, seed=0, with_twin=True)
    expected, found = rows_of(plain), rows_of(watched)
    assert_bitwise(watched.model.state_dict(), plain.model.state_dict())
    for row, other in zip(expected, found, strict=True):
        assert {k: other[k] for k in row} == row
        if row["event"] == "epoch":
            assert set(other) - set(row) == {"estimate", "held_out_loss"}
            assert math.isfinite(other["estimate"]["value"])
            assert (other["held_out_loss"] is not None) == arm.held_out


@pytest.mark.parametrize("arm", [OURS, ADAMW], ids=lambda arm: arm.name)
def test_resumed_estimates_are_the_same(arm: Arm, tmp_path: Path) -> None:
    through = rows_of(ArmRun(task=tiny.tiny(epochs=6), arm=arm, seed=0, with_twin=True))
    path = tmp_path / "run.safetensors"
    run = partial(ArmRun, tiny.tiny(epochs=6), arm, 0, with_twin=True)
    first = run(workspace=Workspace(path))
    first.workspace._saved_at = -math.inf
    stopped = first.rows()
    for _ in range(3):
        next(stopped)
        first.workspace._saved_at = -math.inf
    second = run(workspace=Workspace(path))
    assert second.resume()
    done = second.progress.epoch
    assert rows_of(second) == through[done:]


def test_a_comparison_ends_with_a_report(tmp_path: Path) -> None:
    comparison = Comparison(
        task=tiny.source("tiny"), arms=[OURS, ADAMW, STOPPED], seeds=[0], twin=True
    )
    directory = run_directory(tmp_path / "run")
    directory.create(comparison.config(), {})
    train(comparison, directory, lambda row: None)
    data = read_run(directory)
    report = twin_report(data)
    assert report is not None
    assert {row[0] for row in report.table.rows} <= {"PopRiskAdamW", "AdamW", "stopped"}
    page = render(data, judge(data))
    assert "Without validation data" in page
    assert "arm chosen by the twins" in page


def record(twin: bool = True) -> RunData:
    """Two arms and a held-out one on two seeds, three epochs each."""

    def epoch(arm: str, seed: int, epoch: int, estimate: float, metric: float) -> dict[str, Any]:
        return {
            "event": "epoch",
            "arm": arm,
            "seed": seed,
            "epoch": epoch,
            "test_metric": metric,
            "held_out_loss": 1.6 if arm == "stopped" else None,
            "estimate": {
                "value": estimate,
                "standard_error": 0.1,
                "valid": True,
                "comparable": estimate > 0.5,
            },
        }

    curves = {
        "poprisk": [(2.0, 0.7), (1.8, 0.8), (1.9, 0.9)],
        "adamw": [(2.1, 0.7), (1.5, 0.85), (0.2, 0.6)],
        "stopped": [(2.2, 0.6), (2.0, 0.7), (2.1, 0.65)],
    }
    epochs = [
        epoch(arm, seed, i + 1, value, metric)
        for seed in (0, 1)
        for arm, curve in curves.items()
        for i, (value, metric) in enumerate(curve)
    ]
    ends = {
        ("stopped", seed): {"held_out_best": 0.7, "stopped_metric": 0.8 - 0.02 * seed}
        for seed in (0, 1)
    }
    metric = {"name": "accuracy", "higher_is_better": True, "percent": True}
    config = {
        "task": {"metric": metric},
        "arms": [arm.as_json() for arm in (OURS, ADAMW, STOPPED)],
        "seeds": [0, 1],
        **({"twin": True} if twin else {}),
    }
    return RunData(config, {}, epochs, ends)


def test_the_report_says_what_would_have_been_chosen() -> None:
    report = twin_report(record())
    assert report is not None
    assert [*map(tuple, report.summary.rows)] == [
        ("arm chosen by the twins", "AdamW"),
        ("epoch, mean", "2"),
        ("test accuracy there", "85.0%"),
        ("test accuracy of the best arm at its best epoch in hindsight", "90.0%"),
        ("test accuracy where a held-out fifth chooses arm and epoch", "79.0%"),
        ("gain of the twins over it", "+6.0 (+5.0 and +7.0)"),
        ("difference of estimate and held-out loss, mean", "25%"),
    ]
    assert report.table.rows == [
        ["AdamW", "1.5 ± 0.1", "n/a", "85.0%", "2", "2"],
        ["PopRiskAdamW", "1.8 ± 0.1", "n/a", "80.0%", "2", "2"],
        ["stopped", "2 ± 0.1", "1.6", "70.0%", "2", "2"],
    ]


def test_without_twins_there_is_no_report() -> None:
    assert twin_report(record(twin=False)) is None


def test_no_estimate_that_compares_is_said() -> None:
    data = record()
    for row in data.epochs:
        row["estimate"]["comparable"] = False
    report = twin_report(data)
    assert report is not None
    assert report.table.rows == []
    assert report.summary == (report.summary.head, [], NOTHING)


def test_arms_that_follow_or_shuffle_have_no_twin() -> None:
    assert OURS.can_have_twin
    assert STOPPED.can_have_twin
    assert not Arm("a", "a", "shuffled", "shuffled").can_have_twin
    assert not Arm("a", "a", "rms-matched", "adamw", follows="poprisk").can_have_twin
