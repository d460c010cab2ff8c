"""What estimates cost, in trainings, by a clock that only the test moves."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk import Recorder, Run, TwinRisk, adaptation_gap, entk, loo_risk
from poprisk.path.drift import fitted_noise
from poprisk.protocols import Estimated
from poprisk_lab.studies.drift_laws import Recipe, sweep
from runs import batches, data, network, recorded
from samplers import randn

N = 40


class Clock:
    """Stands for a module's ``time``."""

    def __init__(self, *modules: str, monkeypatch: pytest.MonkeyPatch, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick
        for name in modules:
            monkeypatch.setattr(importlib.import_module(f"poprisk.{name}"), "time", self)

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def test_a_run_knows_the_time_of_its_own_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward, backward and step; not what comes between the step and the recorder's."""
    clock = Clock("path.watch", monkeypatch=monkeypatch)
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    recorder = Recorder(net, "squared_error", sgd, train=train, query=query)
    with recorder:
        sgd.register_step_pre_hook(lambda *_: setattr(clock, "now", clock.now + 1))
        for batch in batches(3):
            clock.now += 2
            sgd.zero_grad()
            (net(train[0][batch]) - train[1][batch]).square().sum(1).mean().div(2).backward()
            sgd.step()
            clock.now += 100  # a twin's turn
            recorder.step(batch)
    assert recorder.run.seconds == 3 * (2 + 1)
    assert recorder.run.trainings(4.5) == 0.5


def test_recording_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a second, of which only three a step lie in the training."""
    clock = Clock("path.watch", monkeypatch=monkeypatch, tick=1.0)
    run = recorded(steps=5)
    assert run.seconds == 5 * 2
    assert clock.now > run.seconds


def estimates(run: Run) -> dict[str, Callable[[], Estimated]]:
    return {
        "risk.loo": lambda: loo_risk(run),
        "path.drift": lambda: fitted_noise(run, draws=2),
    }


@pytest.mark.parametrize("module", ["risk.loo", "path.drift"])
def test_what_follows_a_run_costs_its_time_over_that_of_the_run(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(steps=4)
    Clock(module, monkeypatch=monkeypatch, tick=3.0)
    for seconds, expected in ((2.0, 1.5), (6.0, 0.5)):
        found = estimates(dataclasses.replace(run, seconds=seconds))[module]()
        assert found.cost == expected
    unknown = estimates(dataclasses.replace(run, seconds=math.nan))[module]()
    assert math.isnan(unknown.cost)


def test_a_gap_costs_its_twins_and_what_follows_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(u: Tensor, y: Tensor) -> Tensor:
        return (u - y).square().sum(1) / 2

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    ticks = itertools.count()
    monkeypatch.setattr("poprisk.risk.twin.time", SimpleNamespace(perf_counter=ticks.__next__))
    x, y = randn(N, 3), randn(N, 1, seed=1)
    twin = TwinRisk(lambda: nn.Linear(3, 1).double(), sgd, squared, dataset_size=N, probes=3)
    assert math.isnan(twin.cost)
    with Recorder(twin.model, squared, twin.optimizer, train=(x, y)) as recorder:
        for index in torch.arange(N).split(10):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
            recorder.step(index)
    assert twin.cost == twin.estimate(x, y).cost == 3
    Clock("risk.gap", monkeypatch=monkeypatch, tick=1.0)
    run = dataclasses.replace(recorder.run, seconds=4.0)
    assert adaptation_gap(run, twin).cost == 3 + 0.25


def test_a_fitted_power_costs_the_runs_behind_it() -> None:
    x = randn(48, 4, seed=1)
    make = Recipe(lambda: nn.Linear(4, 1), "squared_error", (x, x[:, :1]), randn(5, 4), steps=6)
    laws = sweep(make, batch_sizes=(4, 8), sizes=(12, 24, 48), seeds=range(3))
    found: Any = laws
    assert [found.drift.cost, found.batch.cost, found.noise.cost] == [3.0, 6.0, 9.0]


def test_a_kernel_is_of_no_training() -> None:
    trace = entk(nn.Linear(2, 1), torch.eye(2)).trace()
    assert (trace.valid, trace.reason) == (True, "")
    assert math.isnan(trace.cost)


def test_an_estimate_from_one_draw_has_no_error_to_believe() -> None:
    found = fitted_noise(recorded(steps=2), draws=1)
    assert (found.valid, found.reason) == (False, "nothing tells the standard error")
