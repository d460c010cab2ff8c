"""The claim of double descent: its verdict on results of both kinds, its figures, its runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import claimed
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.criteria import rank_correlation
from poprisk_lab.studies.descent import descent, follow
from poprisk_lab.studies.double_descent import (
    EXAMPLES,
    FEATURES,
    NETWORK,
    NOISE_STD,
    THRESHOLD,
    between_peaks,
    gain_at,
    make,
    over_curves,
    run,
)

CLAIM = CLAIMS["double-descent"]


def made_up(settings: dict[str, Any], *, peak: bool, gain_at: float, share: float = 0.8) -> Metrics:
    """A bump of the test error at the threshold or none, and one of the noise gain anywhere."""
    weights = settings["size"] * (1 if settings["model"] == FEATURES else 6)
    shift = 1 + 0.01 * settings["seed"]

    def bump(at: float) -> float:
        return 0.2 + 2.0 * math.exp(-((math.log(weights / at)) ** 2))

    test = shift * (bump(30) if peak else 0.5 + 1 / weights)
    terms = {"bias": 0.1, "harmful noise": share * test, "bias × harmful noise": 0.0}
    found: Metrics = {"weights": weights, "test": test, "gain": bump(gain_at), "terms": terms}
    found |= {"frozen": 3.0, "clean_test": 0.1, "early_test": 0.2, "early_gain": 0.1}
    return {**found, "training": 0.01, "drift": 0.3, "closure": 1e-9, "gradient_closure": 1e-9}


@pytest.mark.parametrize(
    ("peak", "gain_at", "share", "expected"),
    [
        (True, 30.0, 0.8, "reproduced"),
        (True, 300.0, 0.8, "partly reproduced"),  # the noise gain peaks elsewhere
        (True, 30.0, 0.2, "partly reproduced"),  # the error is not noise
        (False, 300.0, 0.2, "not reproduced"),
    ],
)
def test_verdicts(peak: bool, gain_at: float, share: float, expected: str) -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, peak=peak, gain_at=gain_at, share=share)

    assert claimed.verdict_of(CLAIM, found) == expected


def test_peaks_are_apart_by_weights() -> None:
    done = claimed.made_up(CLAIM, lambda s: made_up(s, peak=True, gain_at=120.0))
    assert between_peaks(done, FEATURES)[:3] == pytest.approx((4.0, 4.0, 4.0))
    assert over_curves(done, FEATURES, rank_correlation).mean < 0.6


def test_a_flat_curve_correlates_with_nothing() -> None:
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0
    assert rank_correlation([1.0, 2.0, 9.0], [0.1, 2.0, 3.0]) == pytest.approx(1.0)


def test_the_threshold_has_as_many_weights_as_examples() -> None:
    for model, size in THRESHOLD.items():
        weights = sum(p.numel() for p in make(model, size, 0)[1].parameters())
        assert EXAMPLES <= weights <= EXAMPLES + 1


def test_a_seed_has_the_same_data_at_every_capacity() -> None:
    small, large = (make(NETWORK, size, 1)[0] for size in (1, 48))
    assert torch.equal(small.x, large.x)
    assert torch.equal(make(FEATURES, 5, 1)[0].clean, make(FEATURES, 60, 1)[0].clean)


def test_an_early_gain_is_that_of_a_run_that_stopped_there() -> None:
    data, model = make(FEATURES, 20, 0)
    sgd = descent(model, data.x, 1.0)
    ops = follow(model, sgd, data, data.clean, limit=20, snapshots=3)
    again = make(FEATURES, 20, 0)[1]
    half = follow(again, descent(again, data.x, 1.0), data, data.clean, limit=10)
    early = ops.integrals.snapshots[1]
    assert gain_at(ops, early.G[:, :-1]) == pytest.approx(half.noise_gain().path, rel=1e-12)


def test_a_trial_closes_and_repeats() -> None:
    given = {"model": NETWORK, "size": 2, "steps": 30, "seed": 0}
    found = run(given, Workspace())
    assert found["closure"] < 1e-6
    assert sum(found["terms"].values()) == pytest.approx(found["test"], rel=1e-3)
    assert found == run(given, Workspace())


def test_noise_gets_through_as_the_gain_says() -> None:
    given = {"model": FEATURES, "size": 60, "steps": 40}
    found = [run({**given, "seed": seed}, Workspace()) for seed in range(4)]
    harmful = sum(f["terms"]["harmful noise"] for f in found)
    predicted = sum(NOISE_STD**2 * f["gain"] for f in found)
    assert 0.5 < harmful / predicted < 2


@pytest.mark.claims
def test_the_quick_form_gives_a_page(tmp_path: Path) -> None:
    text = claimed.quick_form(CLAIM, tmp_path)
    assert "Test error and noise gain: random features" in text
    assert "What the test error is made of: network" in text
