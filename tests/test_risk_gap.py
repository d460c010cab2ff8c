"""The adaptation gap is zero where nothing adapts, and positive where features do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import NotAnalysable, Recorder, Run, TwinRisk, adaptation_gap, path_operators
from poprisk.path import realized_update
from samplers import randn

N = 60
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def linear(outputs: int) -> nn.Module:
    return nn.Linear(4, outputs).double()


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, outputs)).double()


def trained(
    make: Callable[[int], nn.Module],
    loss: Loss,
    y: Tensor,
    *,
    lr: float = 0.1,
    momentum: float = 0.5,
    steps: int = 40,
    size: int = 20,
    record: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Run, TwinRisk]:
    x, outputs = randn(N, 4), 1 if y.is_floating_point() else 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = TwinRisk(
            lambda: make(outputs),
            lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum, weight_decay=0.01),
            loss,
            dataset_size=N,
            **settings,
        )
    order = torch.Generator().manual_seed(1)
    recorder = Recorder(twin.model, loss, twin.optimizer, train=(x, y), **(record or {}))
    with recorder:
        for _ in range(steps):
            index = torch.randperm(N, generator=order)[:size]
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
            recorder.step(index)
    return recorder.run, twin


@pytest.mark.parametrize("probes", [1, 3])
def test_nothing_adapts_in_a_linear_model(probes: int) -> None:
    run, twin = trained(linear, squared, randn(N, 1, seed=1), steps=16, probes=probes)
    gap = adaptation_gap(run, twin)
    assert abs(gap.value) <= 3 * gap.standard_error < 1e-9
    assert gap.twin.dof == twin.estimate(*run.problem.train).dof > 0.01
    assert gap.path.dof == pytest.approx(gap.twin.dof, rel=1e-9)
    assert gap.closure.worst < 1e-9


def test_the_path_share_is_the_trace_of_its_operator() -> None:
    run, twin = trained(network, squared, randn(N, 1, seed=1), steps=6, probes=40, delta=1e-3)
    gap = adaptation_gap(run, twin)
    exact = float(path_operators(run).D.trace()) / N**2
    assert abs(gap.path.dof - exact) < 3 * gap.path.dof_error < 0.5 * exact


def test_classes_in_a_linear_model_adapt_only_by_their_curvature() -> None:
    run, twin = trained(linear, cross_entropy, torch.arange(N) % 3, steps=20, delta=1e-5)
    gap = adaptation_gap(run, twin)
    assert abs(gap.value) < 2 * gap.standard_error < 0.05 * gap.twin.dof


def signal_and_noise() -> Tensor:
    clean = 0.8 * torch.sin(2 * randn(N, 4) @ randn(4, 2, seed=5) / 2).sum(1, keepdim=True)
    return clean + 0.5 * randn(N, 1, seed=6)


@pytest.mark.parametrize(
    ("loss", "y"),
    [(squared, signal_and_noise()), (cross_entropy, (signal_and_noise() > 0).long().squeeze(1))],
)
def test_features_that_learn_labels_adapt_to_them(loss: Loss, y: Tensor) -> None:
    run, twin = trained(
        network, loss, y, lr=0.6, momentum=0.0, steps=60, size=N, probes=16, delta=0.3
    )
    gap = adaptation_gap(run, twin)
    assert gap.value > 2 * gap.standard_error > 0
    assert gap.value == pytest.approx(gap.twin.dof - gap.path.dof)
    assert gap.closure.worst < 1e-5


def test_dependent_examples_raise_the_error() -> None:
    run, twin = trained(network, squared, randn(N, 1, seed=1), steps=8)
    alone, grouped = (adaptation_gap(run, twin, groups=g) for g in (None, torch.arange(N) // 20))
    assert alone.value == grouped.value
    assert alone.standard_error != grouped.standard_error


def test_a_record_of_something_else_is_refused() -> None:
    y = randn(N, 1, seed=1)
    run, twin = trained(linear, squared, y, steps=3)
    _, other = trained(linear, squared, y, steps=4)
    with pytest.raises(
        ValueError, match=r"the run \(3 steps\) does not end .* \(after 4 batches\)"
    ):
        adaptation_gap(run, other)
    _, another = trained(network, squared, y, steps=3)
    with pytest.raises(ValueError, match="does not end with the weights"):
        adaptation_gap(run, another)
    with pytest.raises(TypeError, match=r"run must be what poprisk\.record"):
        adaptation_gap(twin, twin)  # pyrefly: ignore[bad-argument-type]
    record = {"rule": realized_update(momentum=0.5)}
    with pytest.raises(NotAnalysable, match="read off its steps"):
        adaptation_gap(*trained(linear, squared, y, steps=3, record=record))
