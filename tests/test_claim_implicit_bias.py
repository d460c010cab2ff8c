"""The claim of implicit bias: its verdict on results of both kinds, its figures, its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import claimed
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies import implicit_bias as judging
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.descent import interpolant_distances
from poprisk_lab.studies.directions import half_times, strong_directions
from poprisk_lab.studies.implicit_bias import make, run

CLAIM = CLAIMS["implicit-bias"]

SETS = ("W", "early W", "first kernel", "random")


def made_up(settings: dict[str, Any], *, order: float, distance: float) -> Metrics:
    """A rank correlation, and a distance to the interpolant."""
    shift = 0.001 * settings["seed"]
    if settings["part"] == "order":
        found: Metrics = {"correlation": dict.fromkeys(SETS, order + shift)}
        found |= {"directions": dict.fromkeys(SETS, 20), "half_times": [1, 2], "never": 0}
        found |= {"moments": [0, 1], "decay": [[1.0, 0.5]] * 5, "eigenvalues": [1.0], "drift": 1.0}
        return {**found, "residual": 0.1, "closure": 1e-9}
    elsewhere = settings["method"] in (judging.ELSEWHERE, judging.ADAM)
    found = {"least": 0.5 + shift if elsewhere else distance, "nearest": distance}
    found |= {"outside": 1e-16, "norm": 1.0 + shift, "residual": 1e-14}
    if settings["method"] in (judging.DESCENT, judging.ADAM):
        found |= {"closure": 1e-9, "frozen": distance, "coupling": distance}
    return found


@pytest.mark.parametrize(
    ("order", "distance", "expected"),
    [
        (0.95, 1e-12, "reproduced"),
        (0.8, 1e-12, "partly reproduced"),  # the linear model's order is not W's
        (0.95, 0.1, "partly reproduced"),  # another interpolant
        (0.2, 0.1, "not reproduced"),
    ],
)
def test_verdicts(order: float, distance: float, expected: str) -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, order=order, distance=distance)

    assert claimed.verdict_of(CLAIM, found) == expected


def test_half_times_by_hand() -> None:
    gradients = torch.tensor([[4.0, -8.0, 1.0], [3.0, 5.0, 1.0], [1.0, 2.0, 0.6]])
    assert half_times(gradients, torch.eye(3)).tolist() == [2, 2, 3]  # 3: never
    turned = torch.tensor([[0.0], [1.0], [0.0]])
    assert half_times(gradients.abs()[[0, 2]], turned).tolist() == [1]


def test_weak_directions_are_left_out() -> None:
    g = torch.tensor([1.0, 0.05, 0.2])
    assert strong_directions(g, torch.eye(3)).tolist() == [True, False, True]


def test_half_times_of_a_linear_model_follow_its_kernel() -> None:
    found = run({"part": "order", "model": judging.LINEAR, "steps": 40, "seed": 0}, Workspace())
    assert found["correlation"]["W"] > 0.95
    assert abs(found["correlation"]["random"]) < 0.9
    assert found["closure"] < 1e-9
    data, y, _ = make(judging.LINEAR, 0)
    rates = torch.linalg.eigvalsh(data.x @ data.x.T).flip(0)
    # (1 - λ/λ_max)^t falls below a half at this step
    steps = torch.log(torch.tensor(0.5)) / torch.log1p(-(rates / rates[0]).clamp_max(1 - 1e-12))
    expected = steps.ceil().clamp(1, 41).int().tolist()
    kept = torch.linalg.eigh(data.x @ data.x.T).eigenvectors.flip(1)
    strong = strong_directions(y.flatten(), kept).tolist()
    wanted = [t for t, s in zip(expected, strong, strict=True) if s]
    assert found["half_times"] == wanted


def test_the_order_of_a_network_is_measured_and_repeats() -> None:
    given = {"part": "order", "model": judging.NETWORK, "steps": 30, "seed": 0}
    found = run(given, Workspace())
    assert -1 <= found["correlation"]["W"] <= 1
    assert found["closure"] < 1e-3
    assert found == run(given, Workspace())


def norm(method: str) -> Metrics:
    return run({"part": "norm", "method": method, "adam": 60, "seed": 0}, Workspace())


@pytest.mark.parametrize("method", [judging.MOMENTUM, judging.MINIBATCH])
def test_from_zero_the_interpolant_has_least_norm(method: str) -> None:
    found = norm(method)
    assert max(found["least"], found["nearest"], found["outside"]) < 1e-10


def test_from_another_start_it_is_the_nearest() -> None:
    found = norm(judging.ELSEWHERE)
    assert found["nearest"] < 1e-10
    assert found["least"] > 0.1


def test_adam_leaves_the_span_of_the_inputs() -> None:
    found = norm(judging.ADAM)
    assert found["outside"] > 0.05
    assert found["closure"] < 1e-9


def test_distances_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    x, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[3.0]]).double()
    found = interpolant_distances(model, x, y, torch.tensor([[0.0], [4.0]]).double())
    assert found["residual"] == 0.0
    assert found["least"] == pytest.approx(4 / 3)
    assert (found["nearest"], found["outside"]) == (0.0, 0.0)
    assert found["norm"] == pytest.approx(5 / 3)


@pytest.mark.claims
def test_the_quick_form_gives_a_page(tmp_path: Path) -> None:
    text = claimed.quick_form(CLAIM, tmp_path)
    assert "When half of a direction&#39;s residual is gone" in text
    assert "Where a linear model ends" in text
