"""The optimizers of claims about training: what each arm is, and how trials become contestants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.gate import MASKS_
from poprisk_lab.controls import RmsMatched, ShuffledMask, UpdateTrace
from poprisk_lab.studies.claim import Metrics, TrialResult
from poprisk_lab.studies.optimizers import (
    ARMS,
    contestants,
    make_optimizer,
    of_arm,
    train_with_control,
)


def made(arm: str, trace: UpdateTrace | None = None) -> torch.optim.Optimizer:
    return make_optimizer(
        arm,
        nn.Linear(2, 1),
        {"lr": 0.02, "weight_decay": 0.5},
        batch_size=4,
        dataset_size=10,
        trace=trace,
    )


@pytest.mark.parametrize("arm", ["soft", "snr"])
def test_algorithm_1_is_to_the_letter(arm: str) -> None:
    (group,) = made(arm).param_groups
    found = {key: group[key] for key in ("mode", "mask", "softness", "lr", "weight_decay")}
    expected = {"mode": "paper", "mask": arm, "softness": 1.0, "lr": 0.02, "weight_decay": 0.5}
    assert found == expected
    assert (group["batch_size"], group["dataset_size"]) == (4, 10)


@pytest.mark.parametrize("arm", ["auto", "stream"])
def test_the_defaults_are_the_defaults(arm: str) -> None:
    own, default = made(arm), PopRiskAdamW([nn.Parameter(torch.ones(1))])
    for key in ("mode", "mask", "softness", "z", "alpha", "rho"):
        assert own.param_groups[0][key] == default.param_groups[0][key]


@pytest.mark.parametrize("mask", ["soft", "snr"])
def test_a_shuffled_arm_shuffles_its_own_mask(mask: str) -> None:
    (group,) = made(f"shuffled-{mask}").param_groups
    assert isinstance(group["mask"], ShuffledMask)
    assert group["mask"].mask is MASKS_[mask]
    assert (group["mode"], group["softness"]) == ("paper", 1.0)


def test_adamw_is_adamw_and_matched_follows_a_trace() -> None:
    adamw = made("adamw")
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.02, 0.5)
    trace = UpdateTrace([[0.1, 0.2]])
    matched = made("matched", trace)
    assert isinstance(matched, RmsMatched)
    assert matched.trace is trace


def test_the_control_moves_as_far_as_the_arm_at_each_step() -> None:
    models: dict[str, nn.Module] = {}
    moved: dict[str, list[float]] = {}

    def train(arm: str, trace: UpdateTrace | None, step: object) -> list[Metrics]:
        torch.manual_seed(0)
        model, distances = nn.Linear(3, 1, bias=False), list[float]()
        settings = {"lr": 0.1, "weight_decay": 0.0}
        optimizer = make_optimizer(arm, model, settings, batch_size=2, dataset_size=9, trace=trace)
        for _ in range(5):
            before = model.weight.detach().clone()
            model.weight.grad = torch.randn(1, 3)
            assert callable(step)
            step(optimizer)
            distances.append(float((model.weight.detach() - before).norm()))
        models[arm], moved[arm] = model, distances
        return [{"arm": arm}]

    found = train_with_control(train, "snr", matched=True)
    assert found == {"runs": [{"arm": "snr"}], "matched": [{"arm": "matched"}]}
    assert moved["matched"] == pytest.approx(moved["snr"], rel=1e-4)
    own, control = models["snr"].weight, models["matched"].weight
    assert isinstance(own, torch.Tensor)
    assert isinstance(control, torch.Tensor)
    assert not torch.allclose(own, control)
    assert train_with_control(train, "adamw", matched=False) == {"runs": [{"arm": "adamw"}]}


def test_trials_are_grouped_by_optimizer_and_controls_stand_apart() -> None:
    shared = {"lr": 0.1, "weight_decay": 0.01}
    done = [
        TrialResult(
            {"arm": "snr", "seeds": [0, 1], **shared},
            {"runs": [{"x": 1}, {"x": 3}], "matched": [{"x": 7}, {"x": 8}]},
        ),
        TrialResult({"arm": "snr", "seeds": [2], **shared}, {"runs": [{"x": 5}]}),
        TrialResult({"arm": "adamw", "seeds": [0], **shared}, {"runs": [{"x": 9}]}),
    ]
    found = contestants(done)
    (snr,), (matched,), (adamw,) = (of_arm(found, a) for a in ("snr", "matched", "adamw"))
    assert snr.values("x") == {0: 1, 1: 3, 2: 5}
    assert snr.mean("x") == 3.0
    assert (matched.follows, matched.values("x")) == ("snr", {0: 7, 1: 8})
    assert adamw.label == "AdamW, lr 0.1, decay 0.01"
    assert matched.label == "AdamW, RMS-matched to Algorithm 1, snr mask, lr 0.1"
    assert of_arm(found, "snr", lr=0.2) == []
    assert of_arm(found, "snr", "adamw", lr=0.1) == [snr, adamw]
    assert {c.colour for c in found} == {"paper", "rms-matched", "adamw"}


def test_every_arm_can_be_made() -> None:
    for arm in ARMS:
        assert made(arm, UpdateTrace()).param_groups[0]["lr"] == 0.02
