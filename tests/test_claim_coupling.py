"""The claim of the coupling: its verdict on results of both kinds, its predictors, its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import claimed
from poprisk.path import record
from poprisk.path.operators import path_operators
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.coupling import (
    FLIPPED,
    KINDS,
    NOISE,
    SCALE,
    TARGET,
    UNITS,
    data,
    forecast,
    frozen_ridge,
    judge,
    movement,
    train,
)

CLAIM = CLAIMS["coupling"]


def made_up(settings: dict[str, Any], *, peak: float, error: float, frozen: float) -> Metrics:
    if settings.get("kind") == "parts":
        parts = {"unseen": 1e-9, "mismatch": error, "gap": 1e-12, "share": 1.0}
        return {key: {**parts} for key in ("own", "other", "frozen")}
    shift = 1 + 0.01 * settings["seed"]
    found: Metrics = {"steps": [0, 300], "drift": [0.0, peak], "peak": peak * shift, "end": peak}
    found |= {"closure": 1e-9, "strided_closure": 0.1}
    for key in ("path", "strided", "other", "other_best"):
        found[key] = {"error": error * shift, "correlation": 1 - error**2 / 2}
    for key in ("frozen", "pseudo_inverse", "other_frozen"):
        found[key] = {"error": frozen * shift, "correlation": 0.5}
    if settings["drawn"]:
        found |= {k: [1.0, 2.0] for k in ("realized", "predicted", "frozen_predicted")}
    return found


@pytest.mark.parametrize(
    ("peak", "error", "frozen", "expected"),
    [
        (4.8, 0.1, 0.6, "reproduced"),
        (4.8, 0.3, 0.6, "partly reproduced"),  # an error that is larger than the paper's
        (1.0, 0.1, 0.6, "partly reproduced"),  # the kernel hardly moves
        (1.0, 0.9, 0.6, "not reproduced"),
    ],
)
def test_verdicts(peak: float, error: float, frozen: float, expected: str) -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, peak=peak, error=error, frozen=frozen)

    assert claimed.verdict_of(CLAIM, found) == expected


def test_the_worst_setting_counts() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        bad = settings["case"] == "classes-sgd"
        return made_up(settings, peak=1.0 if bad else 9.0, error=0.7 if bad else 0.001, frozen=0.8)

    drift, _, error, gain, *_ = judge(claimed.made_up(CLAIM, found)).criteria
    assert [c.outcome for c in (drift, error, gain)] == [
        "does not hold",
        "does not hold",
        "as claimed",
    ]


def test_forecasts_do_not_decide() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        row = made_up(settings, peak=4.8, error=0.1, frozen=0.6)
        return (
            row if "kind" in settings else row | {"other_best": {"error": 0.9, "correlation": 0.0}}
        )

    report = judge(claimed.made_up(CLAIM, found))
    other = [c for c in report.criteria if c.name.startswith("another run with other labels")]
    assert [c.primary for c in other] == [False] * 4
    gaps = [c for c in other if "minus that of the path" in c.name]
    assert [c.outcome for c in gaps] == ["does not hold"] * 2
    assert all(c.estimate.mean == pytest.approx(0.615 - 0.9) for c in gaps)


def test_other_labels_leave_inputs_alone() -> None:
    case = KINDS["classes-sgd"]
    (x, labels), query = data(case, 3, None)
    (other_x, other_labels), other_query = data(case, 3, 77)
    assert torch.equal(x, other_x)
    assert torch.equal(query, other_query)
    assert int((labels != other_labels).sum()) == FLIPPED
    (_, y), _ = data(KINDS["regression-sgd"], 3, None)
    added = [data(KINDS["regression-sgd"], 3, seed)[0][1] - y for seed in range(200)]
    assert float(torch.stack(added).std()) == pytest.approx(TARGET * NOISE, rel=0.05)


def test_a_run_starts_from_pytorch_s_weights_made_small() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, UNITS), nn.Tanh(), nn.Linear(UNITS, 2)).double()
    expected = torch.cat([SCALE * p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(train(KINDS["classes-sgd"], 5, 1).weights[0], expected)


def test_movement_is_that_of_the_operators() -> None:
    run = train(KINDS["classes-adamw"], 0, 12)
    first, last = (path_operators(run).integrals.snapshots[i] for i in (0, -1))
    train_moved, query_moved = movement(run)
    torch.testing.assert_close(train_moved, last.train_outputs - first.train_outputs)
    torch.testing.assert_close(query_moved, last.query_outputs - first.query_outputs)


def test_a_linear_model_has_a_frozen_kernel_that_predicts_exactly() -> None:
    torch.manual_seed(0)
    x, query = torch.randn(6, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    net = nn.Linear(9, 1, bias=False).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    y = torch.randn(6, 1, dtype=torch.float64)
    run = record(net, "squared_error", sgd, [torch.arange(6)] * 20, query, train=(x, y))
    train_moved, query_moved = movement(run)
    found = frozen_ridge(run, train_moved, query_moved)
    assert found.error < 1e-6
    expected = query @ x.T @ torch.linalg.solve(x @ x.T, train_moved)
    torch.testing.assert_close(found.movement, expected, rtol=1e-6, atol=1e-8)


def test_the_ridge_is_the_best_in_hindsight() -> None:
    run = train(KINDS["regression-full"], 1, 60)
    train_moved, query_moved = movement(run)
    problem, w = run.problem, run.weights[0]
    J, J_query = (problem.J.dense(w, x) for x in (problem.train[0], problem.query[0]))
    best = frozen_ridge(run, train_moved, query_moved).error
    K = J @ J.T
    for ridge in (1e-6, 1e-3, 1e-1):
        damped = K + ridge * torch.linalg.matrix_norm(K, 2) * torch.eye(len(K))
        moved = J_query @ J.T @ torch.linalg.solve(damped, train_moved)
        assert best <= float((moved - query_moved).norm() / query_moved.norm()) * 1.2


def test_a_forecast_of_the_run_itself_is_its_coupling() -> None:
    run = train(KINDS["regression-gated"], 0, 30)
    ops = path_operators(run)
    found = forecast(ops, *movement(run))[-1]
    torch.testing.assert_close(found.movement, ops.coupling().prediction.movement)
    assert found.error < 1e-6


def test_the_error_of_any_predictor_is_taken_apart() -> None:
    found = CLAIM.run({"case": "regression-adamw", "seed": 0, "steps": 20, "drawn": False,
                       "kind": "parts"}, Workspace())  # fmt: skip
    run, other = (train(KINDS["regression-adamw"], 0, 20, noise_seed=s) for s in (None, 10_000))
    ops = path_operators(other)
    train_moved, query_moved = movement(other)
    predictors = {
        "own": ops.coupling().matrix,
        "other": path_operators(run).coupling().matrix,
        "frozen": ops.integrals.frozen,
    }
    for name, A in predictors.items():
        error = query_moved + ops.affine.query - A @ (train_moved + ops.affine.train)
        parts = found[name]
        total = float(error.norm() / query_moved.norm())
        assert parts["total"] == pytest.approx(total, rel=1e-6, abs=1e-10)
        assert parts["gap"] < 1e-10
    assert found["own"]["mismatch"] < 1e-9
    for name in ("other", "frozen"):
        assert found[name]["mismatch"] == pytest.approx(found[name]["total"], rel=1e-5)
        assert found[name]["share"] == pytest.approx(1.0)


def test_parts_of_the_transfer_error_do_not_decide() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, peak=4.8, error=0.9, frozen=0.6)

    report = judge(claimed.made_up(CLAIM, found))
    parts = [c for c in report.criteria if "E.3" in c.name or "over the movement" in c.name]
    assert len(parts) == 6
    assert not any(c.primary for c in parts)
    mismatch = [c for c in parts if c.name.startswith("mismatch")]
    assert [c.outcome for c in mismatch] == ["does not hold"] * 2


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("Kernel drift", "Movement of the test outputs", "it is an identity"):
        assert wanted in page
