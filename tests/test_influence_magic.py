"""Influence by bergson's MAGIC: what it is given to train, and that it comes to what ours does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from poprisk import attribute, replay
from poprisk.attribution import Replay
from poprisk.attribution.training import take_step
from poprisk.jacobian import flat
from poprisk.losses import squared_error
from poprisk_lab.studies import attribution, influence_magic
from poprisk_lab.studies.attribution import SETTINGS
from poprisk_lab.studies.influence_magic import (
    Batches,
    BatchLoss,
    functional_optimizer,
    magic,
    model_at,
)

Make = Callable[[nn.Module], Optimizer]
N = 12


def run(make: Make, schedule: Any = None) -> Replay:
    """Two epochs of a small net in batches of four, with queries."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    x, y = torch.randn(N + 4, 3), torch.randn(N + 4, 1)
    batches = [b for _ in range(2) for b in torch.randperm(N).split(4)]
    optimizer = make(net)
    return replay(
        net, squared_error, optimizer, batches, (x[N:], y[N:]), train=(x[:N], y[:N]),
        scheduler=schedule and schedule(optimizer),
    )  # fmt: skip


def own(done: Replay, loss: Any = squared_error) -> Tensor:
    """Our influence of each query."""
    measure = partial(attribution._losses, loss)
    return attribute(done, measure=measure, check=0).influence


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("k", [0, 3])
def test_a_batch_is_that_of_a_step_and_its_loss_has_the_same_gradient(k: int) -> None:
    done = run(lambda m: SGD(m.parameters(), lr=0.1))
    data, weights = Batches(done), torch.rand(N)
    assert len(data) == len(done.batches)
    data.weights = nn.Parameter(weights)
    model = BatchLoss(model_at(done, done.final), squared_error)
    model(**data[k]).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    done._load(done.saved[-1])
    take_step(done.problem, done.model, done.optimizer, done.batches[k], weights)
    same = [p.grad for p in done.model.parameters() if p.grad is not None]
    assert torch.equal(flat(found), flat(same))
    assert data.weights.grad is not None  # of each loss, over how many there are
    x, y = (t[done.batches[k]] for t in done.problem.train)
    expected = torch.zeros(N)
    expected[done.batches[k]] = squared_error(model.model(x), y).detach() / len(x)
    torch.testing.assert_close(data.weights.grad, expected)


def test_a_model_at_other_weights_is_another_copy() -> None:
    done = run(lambda m: SGD(m.parameters(), lr=0.1))
    before = [p.detach().clone() for p in done.problem.model.parameters()]
    model = model_at(done, done.final + 1)
    assert torch.equal(flat([p.detach() for p in model.parameters()]), done.final + 1)
    assert all(map(torch.equal, before, done.problem.model.parameters()))


def groups(m: nn.Module) -> SGD:
    first, *rest = m.parameters()
    return SGD([{"params": [first], "lr": 0.2}, {"params": rest}], lr=0.1)


def halved(optimizer: Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.5)


REFUSED: Mapping[str, tuple[Make, Any]] = {
    "several groups": (groups, None),
    "a schedule": (lambda m: SGD(m.parameters(), lr=0.1), halved),
    "optimizer is Adam;": (lambda m: Adam(m.parameters()), None),
    "maximize=True": (lambda m: SGD(m.parameters(), lr=1e-3, maximize=True), None),
    "amsgrad=True": (lambda m: AdamW(m.parameters(), amsgrad=True), None),
    "dampening=0.3": (lambda m: SGD(m.parameters(), momentum=0.9, dampening=0.3), None),
}
TAKEN_UP: Mapping[str, Make] = {
    "plain": lambda m: SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.8, weight_decay=0.1),
    "nesterov": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.8, nesterov=True),
    "AdamW": lambda m: AdamW(
        m.parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_training_that_bergson_cannot_take_up_is_refused(words: str) -> None:
    make, schedule = REFUSED[words]
    with pytest.raises(ValueError, match=words):
        functional_optimizer(run(make, schedule))


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", TAKEN_UP)
def test_two_ways_back_through_one_training_agree(name: str) -> None:
    pytest.importorskip("bergson")
    done = run(TAKEN_UP[name])
    assert apart(magic(done, squared_error), own(done)) < 1e-4


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["digits 20%, MLP, AdamW", "repeats 25%, transformer, AdamW"])
def test_two_ways_back_agree_where_inputs_are_always_zero_and_through_attention(name: str) -> None:
    pytest.importorskip("bergson")
    setting = SETTINGS[name]._replace(epochs=2)
    done = attribution.trained(setting, 0)
    assert apart(magic(done, setting.loss), own(done, setting.loss)) < 1e-3


@pytest.mark.filterwarnings("ignore")  # theirs
def test_another_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bergson")
    done = run(lambda m: SGD(m.parameters(), lr=0.1))
    other = run(lambda m: SGD(m.parameters(), lr=0.11))
    faster = functional_optimizer(other)

    def another(done: Replay) -> Any:
        return faster

    monkeypatch.setattr(influence_magic, "functional_optimizer", another)
    with pytest.raises(RuntimeError, match="does not end where the run did"):
        magic(done, squared_error)
