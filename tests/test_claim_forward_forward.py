"""The claim of learning without backpropagation: its verdicts, its parts, its quick form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import claimed
from poprisk import losses
from poprisk_lab.studies import CLAIMS, local_paths, local_runs
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.forward_forward import BACK, GRID, OURS, PATHS, RULES, SAME, Found, judge
from samplers import randn

CLAIM = CLAIMS["forward-forward"]
TINY = {"seed": 0, "hidden": 8, "epochs": 2}
GOOD = {"behind": 0.005, "closure": 1e-12, "leak": 1e-6, "gained": 0.05, "off": 1.03}


def made_up(settings: dict[str, Any], **changes: float) -> Metrics:
    """One trial in which local rules are so far behind, so exact, and so much better gated."""
    it, shift = {**GOOD, **changes}, 1e-3 * (settings["seed"] % 3)
    local = settings["rule"] != BACK
    end = {"accuracy": 0.97 + shift - it["behind"] * local, "memorized": None, "best": 0.98}
    if settings["case"] == "accuracy":
        return end
    if settings["case"] == "noise":
        gated = {"accuracy": 0.8 + shift + it["gained"], "memorized": 0.5 - it["gained"] + shift}
        plain = {"accuracy": 0.8, "memorized": 0.5}
        return gated if settings["arm"] == OURS else plain
    if settings["case"] == "twin":
        found = {"estimate": 2.0 * it["off"] + shift, "risk": 2.0, "valid": it["off"] < 1.2}
        return {"pushed": found, "left_out": found}
    return {
        "closure": it["closure"] if local else 1e-13,
        "one_jacobian": 0.2 if local else 1e-12,
        "quadratic": 1.04 if local else 1.001,
        "lowest": -1e-3 if local else -1e-17,
        "coupling": 1e-9,
        "leaks": {f"{t:g}": it["leak"] for t in local_paths.TOLERANCES},
        "cells": {"signal_share": 0.9, "noise_share": 0.5, "harmful_noise": 0.2},
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "reproduced"),
        ({"behind": 0.03}, "partly reproduced"),
        ({"closure": 1e-6}, "partly reproduced"),
        ({"leak": 0.1}, "partly reproduced"),
        ({"off": 1.4}, "partly reproduced"),
        ({"gained": -0.05}, "partly reproduced"),
        ({"behind": 0.03, "closure": 1e-6, "leak": 0.1, "off": 1.4, "gained": -0.05},
         "not reproduced"),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, float], expected: str) -> None:
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, **changes)) == expected


def test_the_worst_run_counts() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        bad = settings["case"] == "path" and settings["seed"] == 3
        return made_up(settings, **({"closure": 1e-3} if bad else {}))

    (closure,) = [c for c in judge(claimed.made_up(CLAIM, found)).criteria if "closure" in c.name]
    assert (closure.outcome, closure.estimate.mean) == ("does not hold", 1e-3)


def test_what_fails_for_local_rules_is_told_and_does_not_decide() -> None:
    criteria = judge(claimed.made_up(CLAIM, made_up)).criteria
    told = {c.name: c.outcome for c in criteria if not c.primary}
    for name, holds in {
        "Forward-Forward": "does not hold",
        "backpropagation": "as claimed",
    }.items():
        assert told[f"{name}: least eigenvalue of the kernel over the largest"] == holds
        assert told[f"{name}: error of the movement by the gradients' own Jacobian"] == holds


def test_the_gate_is_compared_with_the_best_rate_too() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        row = made_up(settings)
        if settings["case"] == "noise" and settings["arm"] == GRID[0]:
            return {"accuracy": 0.9, "memorized": 0.1}
        return row

    done = claimed.made_up(CLAIM, found)
    assert Found(done).best("mono-forward", 0.4) == GRID[0] != SAME
    (best,) = [c for c in judge(done).criteria if c.name.startswith("Mono-Forward, 40%")]
    assert best.estimate.mean == pytest.approx(0.8508 - 0.9, abs=1e-3)


def test_twins_that_doubt_themselves_are_told() -> None:
    assert judge(claimed.made_up(CLAIM, made_up)).notes == []
    (note,) = judge(claimed.made_up(CLAIM, lambda s: made_up(s, off=1.4))).notes
    assert note.endswith("Forward-Forward, Mono-Forward, backpropagation.")


@pytest.mark.parametrize("rule", RULES)
def test_paths_of_each_rule_close(rule: str) -> None:
    optimizer, noise = PATHS[1]
    data = local_paths.small_digits(0, noise)
    run = local_paths.follow_rule(rule, data, seed=0, optimizer=optimizer, steps=6)
    found = local_paths.measure(run, data.clean)
    assert found["closure"] < 1e-9
    assert found["cells"]["closure"] < 1e-9
    assert (found["one_jacobian"] > 1e-2) == (rule != BACK)
    assert found["accounted"] < 1e-8


def test_the_gradient_of_both_losses_is_affine_in_one_hot_labels() -> None:
    """So that label noise is a part of the starting gradient; curvature may know the label."""
    u = randn(1, 4, 2, seed=1)
    for rule, knows in {"forward-forward": True, "mono-forward": False}.items():
        loss = local_paths.LOSSES[rule]
        g = [losses.gradient(loss, u, torch.tensor([a]))[0] for a in range(4)]
        B = [losses.hessian(loss, u, torch.tensor([a]))[0] for a in range(4)]
        assert (float((B[0] - B[1]).norm()) > 1e-6) == knows
        for a in range(1, 4):  # a label is seen at its own place, and nowhere else
            rest = [b for b in range(4) if b not in (0, a)]
            torch.testing.assert_close(g[a][rest], g[0][rest])


def test_risk_is_in_expectation_over_wrong_labels() -> None:
    u, y = randn(2, 10, seed=2), torch.tensor([3, 7])
    found = local_runs.noisy_losses(local_paths.LOSSES[BACK], u, y, 0.2)
    p = u.log_softmax(1)
    for i in range(2):
        others = [float(-p[i, a]) for a in range(10) if a != int(y[i])]
        expected = 0.8 * float(-p[i, y[i]]) + 0.2 * sum(others) / 9
        assert float(found[i]) == pytest.approx(expected)


def test_a_trial_under_noise_knows_what_was_memorized() -> None:
    settings = {"case": "noise", "rule": "mono-forward", "noise": 0.4, **TINY}
    gated, plain = (local_runs.CASES["noise"]({**settings, "arm": a}) for a in (OURS, SAME))
    assert 0 <= gated["memorized"] <= 1
    assert gated != plain


def test_a_twin_trial_repeats_bit_for_bit() -> None:
    settings = {"case": "twin", "rule": "forward-forward", **TINY}
    first, again = (local_runs.CASES["twin"](settings) for _ in range(2))
    assert first == again
    assert first["pushed"]["risk"] == first["left_out"]["risk"]


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("Accuracy under wrong labels", "What queries see", "Mono-Forward"):
        assert wanted in page
