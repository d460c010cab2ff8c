"""The claim of drift and diffusion: its verdict on results of both kinds, its recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import claimed
from poprisk.intervals import Interval
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.drift_diffusion import (
    BATCH,
    LAWS,
    PARTS,
    distance,
    judge,
    power,
    recipe,
)

CLAIM = CLAIMS["drift-diffusion"]

SETTINGS = {"seed": 3, "n": 24, "steps": 6, "replicates": 3}


def made_up(settings: dict[str, Any], **powers: float) -> Metrics:
    shift = 0.01 * (settings["seed"] % 3)
    told = {"drift": 1.0, "diffusion": 0.5, "batch": -0.5, "noise": -0.5} | powers
    if settings["part"] == "noise":
        return {"noise": told["noise"] + shift}
    if settings["part"] != "independent":
        told |= {"drift": 0.2, "diffusion": 0.1}
    found: Metrics = {key: told[key] + shift for key in ("drift", "diffusion", "batch")}
    lines = {"times": [4, 8], "drifts": [1.0, 2.0], "walks": [1.0, 1.4]}
    return found | {"alone": 0.99, **lines}


@pytest.mark.parametrize(
    ("powers", "expected"),
    [
        ({}, "reproduced"),
        ({"drift": 0.7}, "partly reproduced"),
        ({"noise": -0.3}, "partly reproduced"),
        ({"drift": 0.5, "diffusion": 0.3, "batch": -1.0, "noise": 0.0}, "not reproduced"),
        ({"drift": 1.5, "diffusion": 0.7, "batch": 0.0, "noise": -1.0}, "not reproduced"),
    ],
)
def test_verdicts(powers: dict[str, float], expected: str) -> None:
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, **powers)) == expected


def test_what_lies_beyond_the_limits_does_not_decide() -> None:
    criteria = judge(claimed.made_up(CLAIM, made_up)).criteria
    assert [c.primary for c in criteria] == [True] * 4 + [False] * 3
    assert {c.outcome for c in criteria[4:]} == {"does not hold"}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.9, 1.25, (0.0, 0.25)), (1.1, 1.5, (0.1, 0.5)), (0.5, 0.75, (0.25, 0.5))],
)
def test_a_distance_spans_the_interval(
    low: float, high: float, expected: tuple[float, float]
) -> None:
    found = distance(Interval((low + high) / 2, low, high), 1.0)
    assert found[1:3] == pytest.approx(expected)
    assert found.mean == pytest.approx(abs((low + high) / 2 - 1))


def test_powers_are_means_over_draws() -> None:
    done = claimed.made_up(CLAIM, lambda s: made_up(s, batch=-0.4))
    assert power(done, LAWS[2]).mean == pytest.approx(-0.4 + 0.01 * 7 / 8)


def test_a_draw_has_its_own_data_and_weights_and_repeats() -> None:
    first, again = (recipe(PARTS["independent"], SETTINGS) for _ in range(2))
    other = recipe(PARTS["independent"], {**SETTINGS, "seed": 4})
    runs = [r.run(BATCH, 24, 0).weights[6] for r in (first, again, other)]
    assert torch.equal(runs[0], runs[1])
    starts = [r.run(BATCH, 24, 0).weights[0] for r in (first, other)]
    assert not torch.allclose(starts[0], starts[1])
    assert not torch.allclose(first.train[0], other.train[0])
    assert recipe(PARTS["shuffled"], SETTINGS).replace is False


@pytest.mark.slow
@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("Drift", "shuffled passes", "power of n in the label noise fitted"):
        assert wanted in page
