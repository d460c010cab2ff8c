"""A sample of the fuzzed calls, and that the fuzz sees what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fuzz_surface
import poprisk
from poprisk.ntk import Kernel
from surface import pieces
from surface.outcomes import KINDS, judge
from surface.situations import Situation

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz-surface.json"


@pytest.mark.parametrize("first", range(10_000, 10_030, 6))
def test_six_calls(first: int) -> None:
    for seed in range(first, first + 6):
        situation, outcome = fuzz_surface.check(seed)
        assert outcome.fine, f"{outcome} {situation}"


def test_the_committed_run_found_nothing_wrong() -> None:
    found = json.loads(RESULTS.read_text())
    assert (found["cases"] >= 2000, found["failures"]) == (True, [])
    outcomes = found["outcomes"].values()
    assert sum(sum(kinds.values()) for kinds in outcomes) == found["cases"]
    assert all(kinds["right"] > 0 and kinds.keys() <= set(KINDS) for kinds in outcomes)


# --- what the fuzz sees ---------------------------------------------------------------------------


def situation(piece: str, **changes: Any) -> Situation:
    """An ordinary one."""
    seed = next(i for i in range(1000) if Situation.of(i).piece == piece)
    found = Situation.of(seed)
    usual = {"kind": "MLP, tanh", "sort": "squared error", "n": 7, "c": 3, "dtype": "float64"}
    usual |= {"labels": "int64", "wrapper": "", "mode": "", "training": False}
    for name, value in {**usual, **changes}.items():
        setattr(found, name, value)
    return found


def scaled(dense: Callable[[Kernel], torch.Tensor]) -> Callable[[Kernel], torch.Tensor]:
    return lambda kernel: 1.001 * dense(kernel)


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(situation("entk"), pieces.entk).kind == "right"
    monkeypatch.setattr(Kernel, "dense", scaled(Kernel.dense))
    outcome = judge(situation("entk"), pieces.entk)
    assert (outcome.kind, "the kernel is 1.0e-03" in outcome.what) == ("wrong", True)


@pytest.mark.parametrize("what", ["weight", "gradient", "mode", "random numbers"])
def test_a_change_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddling(model: nn.Module, *_: Any, **__: Any) -> None:
        weight = next(model.parameters())
        if what == "weight":
            with torch.no_grad():
                weight.view(-1)[0] += 1e-9
        elif what == "gradient":
            weight.grad = torch.zeros_like(weight)
        elif what == "mode":
            model.train(not model.training)
        else:
            torch.rand(1)
        return None

    monkeypatch.setattr(poprisk, "grad_mean_var", meddling)
    assert judge(situation("grad_mean_var"), pieces.grad_mean_var).kind == "moved"


def test_an_error_from_inside_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is one that torch raises in a line of ours."""

    def broken(kernel: Kernel) -> torch.Tensor:
        return kernel._zeros(2, 3) @ kernel._zeros(2, 3)

    refused = judge(situation("entk", kind="two outputs"), pieces.entk)
    assert (refused.kind, "must return a tensor" in refused.what) == ("refused", True)
    monkeypatch.setattr(Kernel, "dense", broken)
    outcome = judge(situation("entk"), pieces.entk)
    assert (outcome.kind, "shapes cannot be multiplied" in outcome.what) == ("from inside", True)


def test_a_loss_that_fails_by_itself_is_the_users() -> None:
    outcome = judge(situation("RiskMonitor", sort="cross-entropy", c=1, n=2), pieces.risk_monitor)
    assert outcome.fine
    mistaken = situation("grad_mean_var", sort="cross-entropy", labels="int32")
    assert judge(mistaken, pieces.grad_mean_var).kind == "the user's own error"
