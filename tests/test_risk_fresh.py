"""The U-statistic of a step: exact against brute force, unbiased on streams, flagged elsewhere."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import poprisk
from asserts import assert_bitwise, nothing_changes
from poprisk import PopRiskAdamW, fresh_batch_risk
from poprisk.randomness import RandomState
from reference import risk as reference
from samplers import randn

B = 8
Make = Callable[[nn.Module], Optimizer]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def network(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, outputs))
        return nn.Sequential(*layers).double()


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=1e-2),
    "gated": lambda m: poprisk.gated(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)),
}


def batch(seed: int, b: int = B) -> tuple[Tensor, Tensor]:
    x = randn(b, 3, seed=seed)
    return x, x[:, :1].sin() + randn(b, 1, seed=1000 + seed)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(squared(model(x), y).mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Take a step and return the update."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.zero_grad()
    squared(model(x), y).mean().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def warmed_up(make: Make) -> tuple[nn.Module, Optimizer]:
    model = network().eval()
    optimizer = make(model)
    for seed in range(5):
        step(model, optimizer, *batch(seed))
    return model, optimizer


@pytest.mark.parametrize("name", ["SGD", "momentum"])
def test_equals_the_sum_over_pairs(name: str) -> None:
    model, optimizer = warmed_up(OPTIMIZERS[name])
    x, y = batch(50)
    found = fresh_batch_risk(model, squared, x, y, optimizer, fresh=True, splits=B)
    rows = torch.stack([gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(B)])
    decayed = 0.05 * torch.ones(rows.shape[1], dtype=torch.float64)
    level = float(squared(model(x), y).detach().mean())
    update = step(model, optimizer, x, y)
    idle = update + decayed * rows.mean(0)
    expected = reference.fresh_change(rows, decayed, idle)
    assert found.value == pytest.approx(expected)
    assert found.empirical == pytest.approx(float(update @ rows.mean(0)))
    assert found.noise == pytest.approx(found.value - found.empirical)
    assert found.level == pytest.approx(level)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_modules_add_up(name: str) -> None:
    model, optimizer = warmed_up(OPTIMIZERS[name])
    found = fresh_batch_risk(model, squared, *batch(50), optimizer, fresh=True)
    assert set(found.modules) == {"0", "3"}
    for field, whole in (("risk", "value"), ("empirical", "empirical"), ("noise", "noise")):
        total = sum(getattr(m, field) for m in found.modules.values())
        assert getattr(found, whole) == pytest.approx(total)
    assert found.noise > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_changed(name: str) -> None:
    model, optimizer = warmed_up(OPTIMIZERS[name])
    model.train()
    kept = [p.grad for p in model.parameters()]
    random = RandomState.now()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if name == "gated":
        fresh_batch_risk(model, squared, *batch(50), optimizer, fresh=True)
    else:
        with nothing_changes(optimizer):
            fresh_batch_risk(model, squared, *batch(50), optimizer, fresh=True)
    assert_bitwise(model.state_dict(), weights)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert random.same(RandomState.now())


@pytest.mark.parametrize("name", ["momentum", "AdamW", "PopRiskAdamW"])
def test_unbiased_over_batches(name: str) -> None:
    """At one point of training, over many fresh batches: the mean is the true change."""
    model, optimizer = warmed_up(OPTIMIZERS[name])
    population = gradient(model, *batch(99, 20_000))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    changes = []
    for seed in range(100, 140):
        x, y = batch(seed)
        found = fresh_batch_risk(model, squared, x, y, optimizer, fresh=True, splits=B)
        less = slice(0, B - 1)
        truth = float(population @ step(model, optimizer, x[less], y[less]))
        changes.append((found.value, truth, found.standard_error))
        model.load_state_dict(start)
        optimizer.load_state_dict(copy.deepcopy(state))
    value, truth, error = torch.tensor(changes, dtype=torch.float64).T
    difference = value - truth
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / math.sqrt(40)
    assert float(error.square().mean().sqrt()) == pytest.approx(float(value.std()), rel=0.35)


def test_the_batch_itself_would_be_biased() -> None:
    """What the correction is for: the fall of the batch loss overstates that of the risk."""
    model, optimizer = warmed_up(OPTIMIZERS["SGD"])
    population = gradient(model, *batch(99, 20_000))
    changes = []
    for seed in range(100, 180):
        found = fresh_batch_risk(model, squared, *batch(seed), optimizer, fresh=True)
        changes.append((found.value, found.empirical))
    value, empirical = torch.tensor(changes).mean(0).tolist()
    truth = -0.05 * float(population.square().sum())
    assert empirical < 2 * truth < 0
    assert value == pytest.approx(truth, abs=0.5 * abs(empirical - truth))


def test_classes_and_single_precision() -> None:
    model = network(4).float().eval()
    optimizer = OPTIMIZERS["AdamW"](model)
    x, y = randn(20, 3, dtype=torch.float32), torch.arange(20) % 4
    found = fresh_batch_risk(model, cross_entropy, x, y, optimizer, fresh=True)
    assert found.valid
    assert found.empirical < found.value


def test_examples_seen_before_are_flagged() -> None:
    model, optimizer = warmed_up(OPTIMIZERS["SGD"])
    found = fresh_batch_risk(model, squared, *batch(0), optimizer, fresh=False)
    assert (found.valid, found.reason[:30]) == (False, "examples were seen before: a r")


def mean_loss(u: Tensor, y: Tensor) -> Tensor:
    return squared(u, y).mean()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fresh": None}, TypeError, "fresh must be True or False, but got None"),
        (
            {"x": randn(7, 3), "y": randn(7, 1)},
            ValueError,
            "2 to the batch's 7 examples, but got 8",
        ),
        ({"loss": mean_loss}, ValueError, "loss must give one value per example"),
        ({"model": "norm"}, ValueError, r"1 \(BatchNorm1d\) normalizes by the statistics"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, optimizer = warmed_up(OPTIMIZERS["SGD"])
    x, y = batch(0)
    good: dict[str, Any] = {"model": model, "loss": squared, "x": x, "y": y, "fresh": True}
    good |= change
    if good["model"] == "norm":
        good["model"] = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)).double()
    with pytest.raises(error, match=message):
        fresh_batch_risk(optimizer=optimizer, **good)


def test_the_reference_is_the_mean_over_pairs() -> None:
    rows, m = randn(4, 3), randn(3, seed=1).abs()
    pairs = [rows[i] @ (m * rows[j]) for i, j in itertools.permutations(range(4), 2)]
    found = reference.fresh_change(rows, m, torch.zeros(3, dtype=torch.float64))
    assert found == pytest.approx(-float(sum(pairs)) / 12)
