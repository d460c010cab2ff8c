"""The claim of feature learning: its verdict on results of both kinds, its kernels, its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import claimed
from poprisk.path import record
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.feature_learning import (
    DIGITS,
    NOISE,
    PROBLEMS,
    RIDGES,
    M,
    N,
    alignment,
    data,
    frozen_error,
    judge,
    run,
    tangents,
)

CLAIM = CLAIMS["feature-learning"]


def made_up(settings: dict[str, Any], *, error: float, drift: float, closure: float) -> Metrics:
    shift = 1 + 0.01 * settings["seed"]
    digits = settings["problem"] == DIGITS
    return {
        "steps": [0, 1000],
        "drift": [0.0, drift],
        "alignment": [0.01, 0.05],
        "error_steps": [0, 1000],
        "errors": [1.0, error],
        "end": drift * shift,
        "error": 0.25 if digits else error * shift,
        "without_noise": error,
        "nothing": 1.0,
        "frozen": 0.2 if digits else 0.9,
        "end_kernel": 0.9 * error,
        "closure": closure,
    }


@pytest.mark.parametrize(
    ("error", "drift", "closure", "expected"),
    [
        (0.3, 2.0, 1e-3, "reproduced"),
        (0.3, 0.5, 1e-3, "partly reproduced"),  # better, but the kernel stood still
        (0.88, 2.0, 1e-3, "partly reproduced"),  # better, but not clearly
        (0.95, 0.5, 0.1, "not reproduced"),
    ],
)
def test_verdicts(error: float, drift: float, closure: float, expected: str) -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, error=error, drift=drift, closure=closure)

    assert claimed.verdict_of(CLAIM, found) == expected


def test_the_digits_are_a_control() -> None:
    report = judge(claimed.made_up(CLAIM, lambda s: made_up(s, error=0.3, drift=2.0, closure=1e-3)))
    last = report.criteria[-1]
    assert (last.primary, last.outcome) == (False, "does not hold")
    assert last.estimate.mean == pytest.approx(0.25 / 0.2)
    row = dict(zip(report.table.head, report.table.rows[-1], strict=True))
    assert (row["test error"], row["kernel at the start"]) == ("0.25", "0.2")


def test_data_are_clean_but_for_the_training_noise() -> None:
    (x, y), (queries, clean), truth = data(PROBLEMS["product"], 5)
    assert (len(x), len(queries)) == (N, M)
    torch.testing.assert_close(clean[:, 0], queries[:, 0] * queries[:, 1])
    assert float((y - truth).std()) == pytest.approx(NOISE, rel=0.15)
    (_, _), (_, signs), _ = data(PROBLEMS[DIGITS], 5)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}


def test_the_tangents_of_a_linear_model() -> None:
    torch.manual_seed(0)
    x, query = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    net = nn.Linear(3, 1).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recorded = record(net, "squared_error", sgd, [torch.arange(5)], query, train=(x, x[:, :1]))
    found = tangents(recorded, 1)
    torch.testing.assert_close(found.kernel, x @ x.T + 1)
    torch.testing.assert_close(found.across, query @ x.T + 1)
    torch.testing.assert_close(found.train, net(x).detach())


@pytest.mark.parametrize("outputs", [1.0, 9.0])
def test_kernel_regression_is_that_of_the_definition(outputs: float) -> None:
    torch.manual_seed(1)
    (x, y), query, _ = data(PROBLEMS["wave"], 1)
    x, y, query = x[:40], y[:40], (query[0][:30], query[1][:30])
    net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    t = tangents(record(net, "squared_error", sgd, [torch.arange(40)], query, train=(x, y)), 0)
    t = t._replace(train=outputs * t.train, query=outputs * torch.randn(30, 1).double())
    errors = []
    for ridge in (RIDGES * torch.linalg.matrix_norm(t.kernel, 2)).tolist():
        for start in (0.0, 1.0):
            damped = t.kernel + ridge * torch.eye(40, dtype=torch.float64)
            fitted = t.across @ torch.linalg.solve(damped, y - start * t.train)
            errors.append(float((start * t.query + fitted - query[1]).square().mean()))
    assert frozen_error(t, y, query[1]) == pytest.approx(min(errors), rel=1e-6)


def test_alignment_is_one_for_the_kernel_of_the_target() -> None:
    y = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert alignment(3 * y @ y.T + 5, y) == pytest.approx(1.0)
    assert alignment(torch.eye(12, dtype=torch.float64), y) == pytest.approx(11**-0.5)


def test_a_short_run_is_accounted_for() -> None:
    found = run({"problem": "product", "seed": 0, "steps": 24}, Workspace())
    assert found["closure"] < 0.02
    assert found["errors"][-1] == pytest.approx(found["error"], rel=1e-4)
    assert found["drift"][0] == 0.0
    assert found["drift"][-1] == pytest.approx(found["end"], rel=1e-4)
    examples, query, _ = data(PROBLEMS["product"], 0)
    recorded = PROBLEMS["product"].recipe.record(examples, query, seed=0, steps=24)
    outputs = recorded.problem.outputs(recorded.weights[24], query[0])
    assert found["error"] == pytest.approx(float((outputs - query[1]).square().mean()))


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("Kernel drift", "Alignment of kernel and target", "digits, odd against even"):
        assert wanted in page
