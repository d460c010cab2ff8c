"""Outputs (n, 1) and targets (n,): one sentence, wherever a loss of the library is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poprisk
from poprisk.losses import squared_error
from poprisk.monitor import Loss
from poprisk.optim.variance import grad_mean_var

N = 40
HINT = r"Outputs are \(\d+, 1\) and targets \(\d+,\): torch compares all with all"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def broadcast(u: Tensor, y: Tensor) -> Tensor:
    """A loss of one's own, all of (n, n)."""
    return (u - y) ** 2


def summed(u: Tensor, y: Tensor) -> Tensor:
    """The same over all targets: one value an example, of all."""
    return broadcast(u, y).flatten(1).sum(1)


X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FLAT = X.sum(1)
RIGHT = FLAT.unsqueeze(1)
STEPS = [torch.arange(N)] * 3


def path(loss: Any, y: Tensor, query: Any, *, run: Callable[..., Any] = poprisk.record) -> Any:
    model = net()
    return run(model, loss, sgd(model), STEPS, query, train=(X, y))


def recorder(loss: Any) -> None:
    model = net()
    poprisk.Recorder(model, loss, sgd(model), train=(X, FLAT))


def twin(loss: Any, y: Tensor = FLAT, **more: Any) -> None:
    made = poprisk.TwinRisk(net, sgd, loss, dataset_size=N, **more)
    for index in STEPS:
        for run in made.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(X[index]), y[index]).mean().backward()
            run.optimizer.step()
    made.estimate(X, FLAT)


def monitor(loss: Any) -> None:
    model = net()
    poprisk.RiskMonitor(model, loss, sgd(model), every=1, quantities=[Loss()]).step(X, FLAT)


def fresh(loss: Any) -> None:
    model = net()
    poprisk.fresh_batch_risk(model, loss, X, FLAT, sgd(model), fresh=True)


PLACES: dict[str, Callable[[Any], Any]] = {
    "record": lambda loss: path(loss, FLAT, None),
    "record, query": lambda loss: path(summed, RIGHT, (X[:5], FLAT[:5])),
    "replay": lambda loss: path(loss, FLAT, None, run=poprisk.replay),
    "attribute": lambda loss: poprisk.attribute(
        path(summed, RIGHT, None, run=poprisk.replay), (X[:5], FLAT[:5])
    ),
    "Recorder": recorder,
    "TwinRisk": twin,
    "TwinRisk, estimate": lambda loss: twin(summed, RIGHT),
    "TwinRisk, left out": lambda loss: twin(loss, leave_out=0.5),
    "monitor": monitor,
    "fresh_batch_risk": fresh,
    "grad_mean_var": lambda loss: grad_mean_var(net(), loss, (X, FLAT)),
    "Task": lambda loss: poprisk.Task("t", net, loss, (X, FLAT), (X, FLAT), batch_size=4),
}
CASES = [(place, loss) for place in PLACES for loss in (squared_error, broadcast, summed)]
CASES += [(place, "squared_error") for place in ("record", "replay", "Recorder")]


@pytest.mark.parametrize(("place", "loss"), CASES)
def test_targets_of_another_shape_than_outputs_are_named(place: str, loss: Any) -> None:
    with pytest.raises((ValueError, RuntimeWarning), match=HINT):  # the monitor warns
        PLACES[place](loss)


def test_one_shape_is_taken() -> None:
    run = path(squared_error, RIGHT, (X[:5], RIGHT[:5]), run=poprisk.replay)
    assert poprisk.attribute(run).influence.isfinite().all()
    assert poprisk.attribute(run, (X[:1], RIGHT[:1])).influence.isfinite().all()


def test_what_is_compared_with_all_by_intent_is_left_alone() -> None:
    """Other numbers of entries are no mistake of this kind: one target for all outputs, say."""
    assert squared_error(torch.ones(2, 3), torch.zeros(3)).tolist() == [1.5, 1.5]
