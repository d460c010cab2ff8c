"""A loop that pushes the twin wrongly, or not at all: no estimate that says it is valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from poprisk import Canaries, TwinRisk
from samplers import randn

N = 48
X, CLASSES = randn(N, 4).float(), torch.arange(N) % 3 + 5 * (torch.arange(N) % 2)
NUMBERS = randn(N, 1, seed=1).float()
ce = nn.CrossEntropyLoss(reduction="none")


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def twin_of(targets: Tensor = NUMBERS, make: Callable[..., Any] = sgd) -> TwinRisk:
    torch.manual_seed(0)
    outputs, loss = (1, squares) if targets.is_floating_point() else (8, ce)
    return TwinRisk(lambda: nn.Linear(4, outputs), make, loss, dataset_size=N)


def trained(
    twin: TwinRisk,
    targets: Tensor = NUMBERS,
    *,
    shift: int = 0,
    after: Callable[[Any], None] = lambda run: None,
) -> TwinRisk:
    """Some epochs of a loop that feeds the examples ``shift`` further on than it says."""
    for _ in range(4):
        for index in torch.randperm(N).split(12):
            fed = (index + shift) % N
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(X[fed]), targets[fed]).mean().backward()
                run.optimizer.step()
                after(run)
    return twin


@pytest.mark.parametrize("targets", [NUMBERS, CLASSES], ids=["numbers", "classes"])
@pytest.mark.parametrize("kind", ["another index", "another order", "other labels"])
def test_targets_that_are_not_those_of_training_are_flagged(kind: str, targets: Tensor) -> None:
    twin = trained(twin_of(targets), targets, shift=int(kind == "another index"))
    order = torch.arange(N).roll(1) if kind == "another order" else torch.arange(N)
    y = targets.flip(0) if kind == "other labels" else targets[order]
    found = twin.estimate(X[order], y)
    assert not found.valid
    assert "other targets here than training had" in found.reason
    assert not found.comparable


@pytest.mark.parametrize("targets", [NUMBERS, CLASSES], ids=["numbers", "classes"])
def test_the_same_targets_in_another_order_or_precision_are_not(targets: Tensor) -> None:
    twin, order = trained(twin_of(targets), targets), torch.randperm(N)
    y = targets.bfloat16().float() if targets.is_floating_point() else targets
    assert "targets" not in twin.estimate(X[order], y[order], index=order).reason
    half = order[: N // 2]
    assert "targets" not in twin.estimate(X[half], y[half], index=half).reason


def test_a_twin_that_was_never_pushed_is_flagged() -> None:
    found = twin_of().estimate(X, NUMBERS)
    assert not found.valid
    assert "no twin was pushed" in found.reason


def test_the_loss_itself_in_place_of_the_runs_is_refused() -> None:
    def step(twin: TwinRisk) -> None:
        for run in twin.runs(torch.arange(12)):
            squares(run.model(X[:12]), NUMBERS[:12]).mean().backward()

    with pytest.raises(ValueError, match=r"run\.loss was not called for a twin"):
        step(twin_of())


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = sgd(nn.Linear(4, 1))

    def first_only(model: nn.Module, kept: list[Optimizer] = []) -> Optimizer:  # noqa: B006
        kept.append(sgd(model))
        return kept[0]

    def elsewhere(model: nn.Module) -> Optimizer:
        return other

    with pytest.raises(ValueError, match="for the model is of other parameters"):
        twin_of(make=elsewhere)
    with pytest.raises(ValueError, match="for twin 1 is the same as another"):
        twin_of(make=first_only)


@pytest.mark.parametrize("alone", [True, False])
def test_a_schedule_for_the_model_alone_is_flagged(alone: bool) -> None:
    def schedule(run: Any) -> None:
        if run.position == 0 or not alone:
            run.optimizer.param_groups[0]["lr"] *= 0.9

    found = trained(twin_of(), after=schedule).estimate(X, NUMBERS)
    assert ("give each run a scheduler of its own" in found.reason) == alone


def test_batches_without_an_example_are_refused() -> None:
    twin = trained(twin_of())
    with pytest.raises(ValueError, match="index must hold at least one example"):
        next(twin.runs(torch.arange(0)))
    with pytest.raises(ValueError, match="index must hold at least one example"):
        twin.estimate(X[:0], NUMBERS[:0])
    for y in (NUMBERS[:0], torch.zeros(0, 3), torch.zeros(0)):
        with pytest.raises(ValueError, match="of 0 labels makes 0 canaries"):
            Canaries(y)
