"""The arms of a comparison, and the optimizers they build."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from poprisk import PopRiskAdamW
from poprisk_lab.arms import (
    FAMILIES,
    FULL_LEARNING_RATES,
    FULL_WEIGHT_DECAYS,
    LEARNING_RATES,
    OURS,
    WEIGHT_DECAYS,
    Arm,
    backward_mean,
    build_optimizer,
    default_arms,
)
from poprisk_lab.controls import UpdateTrace

ALL = default_arms(full=True)
SIZES = {"batch_size": 8, "dataset_size": 40}


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = tiny.tiny(seed).train
    optimizer.zero_grad()
    losses = tiny.cross_entropy(model(x[:8]), y[:8])
    backward_mean(optimizer, losses)
    optimizer.step()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


# --- the list -------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_names_are_unique_and_fit_for_file_names(full: bool) -> None:
    arms = default_arms(full=full)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    assert len({arm.label for arm in arms}) == len(arms)
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in names)
    assert {arm.family for arm in arms} <= set(FAMILIES)


@pytest.mark.parametrize("full", [False, True])
def test_an_arm_comes_after_the_one_it_follows(full: bool) -> None:
    seen: set[str] = set()
    for arm in default_arms(full=full):
        assert arm.follows is None or arm.follows in seen
        seen.add(arm.name)


@pytest.mark.parametrize(
    ("full", "rates", "decays"),
    [
        (False, LEARNING_RATES, WEIGHT_DECAYS),
        (True, FULL_LEARNING_RATES, FULL_WEIGHT_DECAYS),
    ],
)
def test_adamw_is_tried_over_the_whole_grid(
    full: bool, rates: tuple[float, ...], decays: tuple[float, ...]
) -> None:
    arms = default_arms(full=full)
    grid = [(a.settings["lr"], a.settings["weight_decay"]) for a in arms if a.family == "adamw"]
    assert sorted(grid) == sorted((lr, wd) for lr in rates for wd in decays)
    stopped = [a for a in arms if a.family == "early-stopping"]
    assert {a.settings["lr"] for a in stopped} == set(rates)
    assert {a.held_out for a in stopped} == {True}
    assert {a.held_out for a in arms if a.family != "early-stopping"} == {False}


def test_ours_runs_with_its_defaults() -> None:
    for full in (False, True):
        ours = next(arm for arm in default_arms(full=full) if arm.name == OURS)
        assert (ours.family, ours.settings) == ("poprisk", {})


def test_all_arms_hold_the_telling_ones_the_paper_and_the_peers() -> None:
    assert {a.name for a in default_arms(full=False)} <= {a.name for a in ALL}
    masks = {a.settings["mask"] for a in ALL if a.family == "paper"}
    assert masks == {"soft", "hard", "snr"}
    assert {a.settings["mode"] for a in ALL if a.family == "paper"} == {"paper"}
    assert {a.optimizer for a in ALL if a.family == "peer"} == {"m-svag", "adabelief", "grokfast"}


@pytest.mark.parametrize("arm", ALL, ids=lambda arm: arm.name)
def test_an_arm_survives_json(arm: Arm) -> None:
    assert Arm(**json.loads(json.dumps(arm.as_json()))) == arm


# --- the optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ALL, ids=lambda arm: arm.name)
def test_every_arm_takes_a_step_with_its_settings(arm: Arm) -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    trace = UpdateTrace([[1e-3] * len(before)]) if arm.follows else None
    optimizer = build_optimizer(arm, model, **SIZES, trace=trace)
    for key, value in arm.settings.items():
        if key in optimizer.param_groups[0]:
            assert optimizer.param_groups[0][key] in (value, tuple_of(value))
    take_step(model, optimizer, seed=1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert bool(new.isfinite().all())


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["poprisk", "shuffled", "paper-soft"])
def test_the_gate_knows_batch_and_data_set(name: str) -> None:
    arm = next(a for a in ALL if a.name == name)
    optimizer = build_optimizer(arm, small_model(), **SIZES)
    assert isinstance(optimizer, PopRiskAdamW)
    group = optimizer.param_groups[0]
    assert (group["batch_size"], group["dataset_size"]) == (8, 40)


def test_modules_are_named_in_the_gate_s_statistics() -> None:
    model = small_model()
    optimizer = build_optimizer(next(a for a in ALL if a.name == OURS), model, **SIZES)
    assert isinstance(optimizer, PopRiskAdamW)
    take_step(model, optimizer, seed=1)
    assert set(optimizer.gate_stats()) == {"0", "2"}


def test_grokfast_is_adamw_on_amplified_slow_gradients() -> None:
    """First step: the slow gradient is the gradient itself, so the direction is AdamW's."""
    arm = next(a for a in ALL if a.name == "grokfast")
    model, plain = small_model(), small_model()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    optimizer = build_optimizer(arm, model, **SIZES)
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.999)
    take_step(model, optimizer, seed=1)
    take_step(plain, adamw, seed=1)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_following_arm_without_its_trace_is_refused() -> None:
    arm = next(a for a in ALL if a.follows)
    with pytest.raises(ValueError, match=f"arm {arm.name} needs the trace of arm {OURS}"):
        build_optimizer(arm, small_model(), **SIZES)
