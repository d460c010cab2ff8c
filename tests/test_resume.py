"""A run killed at a random moment goes on from its last checkpoint to bitwise the same end."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asserts import assert_bitwise
from poprisk import PopRiskAdamW
from poprisk_lab import checkpoint
from poprisk_lab.checkpoint import load_checkpoint, save_checkpoint

STEPS, EVERY = 20, 6
SETTINGS: dict[str, Any] = {"lr": 0.01, "batch_size": 8, "dataset_size": 100, "z": 1.0}


def train(path: Path, *, killed_at: float = float("inf"), **settings: Any) -> dict[str, Any]:
    """Train to the end from the last checkpoint, or until SIGKILL at a step, or while saving.

    An integer kills before the step, a half between its parts, anything else inside the write.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    opt = PopRiskAdamW(model, **SETTINGS, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    records: list[Any] = []
    if path.exists():
        saved = load_checkpoint(path)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        records = saved["records"]
    for step in range(len(records), STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator)
        die(killed_at == step)
        opt.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()
        die(killed_at == step + 0.5)
        schedule.step()
        records.append({name: list(row) for name, row in opt.gate_stats().items()})
        if (step + 1) % EVERY == 0:
            if killed_at == step + 0.75:
                setattr(checkpoint.os, "replace", no_replace)  # noqa: B010 (in the child alone)
            state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
            save_checkpoint(path, {**state, "schedule": schedule.state_dict(), "records": records})
    return {"model": model.state_dict(), "optimizer": opt.state_dict(), "records": records}


def die(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def no_replace(*_: object) -> None:
    die(True)


def in_child(path: Path, killed_at: float, **settings: Any) -> int:
    """The signal that ended a forked run."""
    pid = os.fork()
    if pid == 0:
        try:
            train(path, killed_at=killed_at, **settings)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_points() -> list[float]:
    """Twenty moments: before a step, inside one, inside a write."""
    random_ = random.Random(0)
    steps = [random_.randrange(STEPS) for _ in range(20)]
    points = [step + random_.choice([0.0, 0.5]) for step in steps[:14]]
    return points + [step // EVERY * EVERY + EVERY - 0.25 for step in steps[14:]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the interpreter")
@pytest.mark.parametrize(
    "settings",
    [{"fused": True}, pytest.param({"foreach": True}, marks=pytest.mark.long)],
    ids=str,
)
def test_twenty_kills_and_twenty_identical_ends(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = train(tmp_path / "whole", **settings)
    for i, point in enumerate(kill_points()):
        path = tmp_path / f"run{i}" / "state"
        path.parent.mkdir()
        if point < STEPS:
            assert in_child(path, point, **settings) == -signal.SIGKILL, point
        assert_bitwise(train(path, **settings), expected)
        assert [p.name for p in path.parent.iterdir()] == ["state"], "a temporary file was left"


@pytest.mark.parametrize("drop", ["skipped_steps", "z", "softness", "mode"])
def test_a_state_from_before_a_setting_existed_is_accepted(tmp_path: Path, drop: str) -> None:
    expected = train(tmp_path / "state")
    old = load_checkpoint(tmp_path / "state")["optimizer"]
    for group in old["param_groups"]:
        del group[drop]
    params = [nn.Parameter(torch.zeros_like(p)) for p in expected["model"].values()]
    opt = PopRiskAdamW(params, **SETTINGS)
    opt.load_state_dict(old)
    saved = load_checkpoint(tmp_path / "state")["optimizer"]["state"]
    assert_bitwise(opt.state_dict()["state"], saved)
