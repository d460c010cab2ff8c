"""The claim of memorization: its verdict on results of both kinds, its arms, its quick form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import claimed
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.memorization import (
    GRID,
    LABELS,
    MATCHED,
    OURS,
    PAPER,
    SAME,
    Levels,
    judge,
    run,
)

CLAIM = CLAIMS["memorization"]

TINY = {"seed": 0, "noise": 0.4, "hidden": 8, "epochs": 3}


def result(arm: str, settings: dict[str, Any], accuracy: float, share: float) -> Metrics:
    shift = 0.001 * (settings["seed"] % 3)
    noisy = settings["noise"] > 0
    found: Metrics = {"accuracy": accuracy + shift, "memorized": share + shift if noisy else None}
    found |= {"best": 0.95, "best_epoch": 3}
    if arm in LABELS:
        curves = {"epochs": [1, 2], "accuracies": [0.5, accuracy]}
        found["curves"] = curves | ({"shares": [0.1, share]} if noisy else {})
    return found


def made_up(settings: dict[str, Any], good: dict[str, tuple[float, float]]) -> Metrics:
    """Arms named in ``good`` are as accurate and memorize as it says; the others 70% and 60%."""
    arm = settings["arm"]
    arms = [arm, MATCHED] if arm == OURS else [arm]
    told = {a: good.get(a, (0.7, 0.6)) for a in arms}
    if settings["noise"] == 0:
        told = {a: (0.98 if a in good and a in GRID else 0.97, 0.0) for a in arms}
    return {"arms": {a: result(a, settings, *told[a]) for a in arms}}


def test_a_gate_that_keeps_labels_out_reproduces_the_claim() -> None:
    good = {OURS: (0.93, 0.02), PAPER: (0.92, 0.02)}
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, good)) == "reproduced"


def test_a_gate_that_memorizes_more_does_not() -> None:
    bad = {OURS: (0.5, 0.9), PAPER: (0.5, 0.9)}

    def found(settings: dict[str, Any]) -> Metrics:
        if settings["arm"] == OURS and settings["noise"] == 0:
            return {"arms": {a: result(a, settings, 0.9, 0.0) for a in (OURS, MATCHED)}}
        return made_up(settings, bad)

    assert claimed.verdict_of(CLAIM, found) == "not reproduced"


def test_a_gate_that_loses_to_the_letter_is_partly_reproduced() -> None:
    found = claimed.verdict_of(CLAIM, lambda s: made_up(s, {OURS: (0.6, 0.7), PAPER: (0.92, 0.02)}))
    assert found == "partly reproduced"


def test_controls_compare_with_the_best_of_the_grid_and_do_not_decide() -> None:
    good = {OURS: (0.93, 0.02), PAPER: (0.92, 0.02), GRID[2]: (0.99, 0.0)}
    done = claimed.made_up(CLAIM, lambda s: made_up(s, good))
    levels, report = Levels(done), judge(done)
    assert levels.best(0.4) == GRID[2]
    against = [c for c in report.criteria if "best AdamW of the grid" in c.name]
    assert [c.outcome for c in against if "40%" in c.name] == ["does not hold"]
    assert not any(c.primary for c in against)
    (worse,) = [c for c in against if "40%" in c.name]
    assert worse.estimate.mean == pytest.approx(-0.06)
    assert not any("wrong labels" in note and "0%" not in note for note in report.notes)
    assert levels.averaged(SAME, "memorized")[100] == pytest.approx(0.601)


def test_the_edge_of_the_grid_is_told() -> None:
    done = claimed.made_up(CLAIM, lambda s: made_up(s, {GRID[0]: (0.8, 0.1)}))
    assert any("edge of the grid" in note for note in judge(done).notes)


def test_a_trial_of_ours_trains_what_follows_it_and_keeps_the_ends_of_its_curves() -> None:
    arms = run({"arm": OURS, **TINY}, Workspace())["arms"]
    assert set(arms) == {OURS, MATCHED}
    for found in arms.values():
        curves = found["curves"]
        assert curves["epochs"] == [1, 2, 3]
        assert curves["accuracies"][-1] == pytest.approx(found["accuracy"], rel=1e-4)
        assert curves["shares"][-1] == pytest.approx(found["memorized"], rel=1e-4)
    assert arms[OURS]["curves"] != arms[MATCHED]["curves"]


def test_the_rest_of_the_grid_keeps_no_curve_and_right_labels_no_memorization() -> None:
    assert "curves" not in run({"arm": GRID[0], **TINY}, Workspace())["arms"][GRID[0]]
    clean = run({"arm": SAME, **TINY, "noise": 0.0}, Workspace())["arms"][SAME]
    assert clean["memorized"] is None
    assert "shares" not in clean["curves"]


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("shuffled mask", "Memorization along the runs, 40% wrong labels", "AdamW"):
        assert wanted in page
