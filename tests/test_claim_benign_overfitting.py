"""The claim of benign overfitting: its verdict on results of both kinds, its figures, its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import claimed
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.benign_overfitting import NOISE, SETTINGS, judge, make, run
from poprisk_lab.studies.claim import Metrics, Results, TrialResult, Workspace
from poprisk_lab.studies.criteria import worst_factor, worst_ratio
from poprisk_lab.studies.descent import descent, follow, predicted, train
from poprisk_lab.studies.label_noise import TOLERANCES

CLAIM = CLAIMS["benign-overfitting"]


def made_up(
    settings: dict[str, Any], *, miss: float, reservoir: float, harm: float = 20.0
) -> Metrics:
    """Excess error and harmful noise off their predictions by a factor."""
    shift = 1 + 0.01 * settings["seed"]
    scale = harm if settings["setting"].endswith("isotropic") else 0.1
    excess = NOISE**2 * scale * shift
    shares = {f"{t:g}": reservoir for t in TOLERANCES}
    found: Metrics = {"steps": 100, "residual": 1e-5, "closure": 1e-9, "drift": 1.0}
    found |= {"reservoir": shares, "unseen": shares, "harmful": excess, "terms": {}}
    found |= {"dissipation": [1.0, 0.9], "gains": [1.0, 0.01]}
    if settings["setting"].startswith("logistic"):
        return {**found, "fitted": 1.0, "accuracy": 0.9 * shift}
    found |= {"noise": NOISE**2, "excess": excess, "predicted": excess / miss}
    return {**found, "frozen": excess / miss, "draw": excess * miss, "clean_error": 0.1}


@pytest.mark.parametrize(
    ("miss", "reservoir", "harm", "expected"),
    [
        (1.02, 0.9, 20.0, "reproduced"),
        (1.02, 0.0, 20.0, "partly reproduced"),  # no noise in the reservoir
        (1.6, 0.9, 20.0, "partly reproduced"),  # less exact than claimed
        (9.0, 0.0, 0.1, "partly reproduced"),  # benign everywhere, and explained by nothing
    ],
)
def test_verdicts(miss: float, reservoir: float, harm: float, expected: str) -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, miss=miss, reservoir=reservoir, harm=harm)

    assert claimed.verdict_of(CLAIM, found) == expected


def test_nothing_holds() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        bad = made_up(settings, miss=9.0, reservoir=0.0, harm=0.1)
        if "noise" in bad:
            tail = settings["setting"].endswith("tail")
            bad |= {"excess": 5.0 if tail else 0.001, "frozen": 1.0, "predicted": 0.1}
        return bad

    assert claimed.verdict_of(CLAIM, found) == "not reproduced"


@pytest.mark.parametrize(("reservoir", "cell"), [(0.0, "0%"), (0.9, "90%")])
def test_the_table_holds_shares_and_excess_errors(reservoir: float, cell: str) -> None:
    made = claimed.made_up(CLAIM, lambda s: made_up(s, miss=2.0, reservoir=reservoir))
    table = judge(made).table
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["in reservoir at 0.01"].startswith(cell)
    assert (row["excess / σ²"][:5], row["predicted / σ²"][:5]) == ("0.102", "0.051")
    logistic = dict(zip(table.head, table.rows[-1], strict=True))
    assert (logistic["excess / σ²"], logistic["labels fitted"]) == ("", "100%")


def test_a_factor_counts_both_ways_and_the_worst_setting() -> None:
    x, y = (
        Results(TrialResult({"seed": seed}, {"a": a, "b": 1.0}) for seed, a in enumerate(values))
        for values in ((2.0, 0.5, 2.0, 0.5), (1.1, 1.1, 1.1, 1.1))
    )
    assert worst_factor([x, y], "a", "b")[:3] == pytest.approx((2.0, 2.0, 2.0))
    assert worst_factor([y], "a", "b").mean == pytest.approx(1.1)
    found = worst_ratio([x], "a", "b")  # 2 and 1/2: no factor on average, but uncertain
    assert (found.mean, found.low) == (pytest.approx(1.0), 1.0)
    assert found.high > 2


def test_a_measured_excess_below_zero_is_far_from_any_prediction() -> None:
    done = Results(TrialResult({"seed": s}, {"a": -1.0, "b": 1.0}) for s in (0, 1, 2))
    assert worst_ratio([done], "a", "b").low > 1e6


MOMENTUM, FRACTION = 0.7, 1.5
"""With which a linear model on inputs of a long tail is fitted soonest."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear, long tail"
    fit = SETTINGS[name].fit._replace(momentum=MOMENTUM, fraction=FRACTION)
    monkeypatch.setitem(SETTINGS, name, SETTINGS[name]._replace(fit=fit))


def test_the_gain_is_the_formula_of_the_singular_values() -> None:
    data, model = make(SETTINGS["linear, long tail"], 0, classes=False)
    net = model()
    sgd = descent(net, data.x, FRACTION, MOMENTUM)
    ops = follow(net, sgd, data, data.clean, limit=60)
    U, s, Vh = torch.linalg.svd(data.x, full_matrices=False)
    by_hand = float(((data.query @ Vh.T).square().sum(0) / s**2).sum()) / len(data.query)
    assert ops.noise_gain().path == pytest.approx(by_hand, rel=1e-4)
    noise = torch.randn(data.clean.shape, dtype=torch.float64)
    other = model()
    sgd = descent(other, data.x, FRACTION, MOMENTUM)
    train(other, sgd, (data.x, data.clean + noise), limit=60)
    moved = predicted(other, data.query) - predicted(net, data.query)
    expected = data.query @ (Vh.T / s) @ (U.T @ noise)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("soon")
def test_redrawn_noise_is_what_training_on_it_anew_does() -> None:
    name = "linear, long tail"
    found = run({"setting": name, "pairs": 400, "below": 1e-3, "seed": 3}, Workspace())
    assert found["excess"] == pytest.approx(found["predicted"], rel=0.1)
    assert found["draw"] == pytest.approx(found["harmful"], rel=1e-2)


@pytest.mark.usefixtures("soon")
def test_noise_in_pairs_cancels_what_is_odd_in_it() -> None:
    """The excess of a linear model is then the mean square of what one draw moves, exactly."""
    given = {"setting": "linear, long tail", "pairs": 1, "below": 1e-5, "seed": 1}
    found = run(given, Workspace())
    assert found["excess"] == pytest.approx(found["draw"], rel=1e-3)


def test_the_noise_of_a_network_comes_in_pairs_and_has_its_own_run() -> None:
    given = {"setting": "network, long tail", "pairs": 1, "below": 0.3, "seed": 0}
    found = run(given, Workspace())
    assert 0.25 < found["draw"] / found["harmful"] < 4
    assert found["closure"] < 1e-4
    assert found == run(given, Workspace())


@pytest.mark.claims
def test_the_quick_form_gives_a_page(tmp_path: Path) -> None:
    text = claimed.quick_form(CLAIM, tmp_path)
    assert "Excess test error, predicted and measured" in text
    assert "where G is soft" in text
