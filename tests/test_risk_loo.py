"""Leave-one-out by path response equals retraining where outputs are linear in the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from poprisk import RecordedRun, loo_risk
from poprisk.reference import risk as reference
from samplers import randn

N = 60


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


class Features(nn.Module):
    """A network whose kernel is frozen: random features, trained read-out."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.register_buffer("directions", randn(4, 30, seed=7))
        self.readout = nn.Linear(30, outputs).double()
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(x @ self.directions))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def train(
    model: nn.Module,
    loss: Any,
    y: Tensor,
    *,
    without: Tensor | None = None,
    steps: int = 40,
    momentum: float = 0.9,
    decay: float = 0.01,
    batch: int = 15,
) -> RecordedRun:
    """Train and record; ``without`` some examples, whose terms are zero."""
    x = randn(len(y), 4)
    weights: list[Tensor] = []
    batches: list[Tensor] = []
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum, weight_decay=decay)
    order = torch.Generator().manual_seed(3)
    kept = torch.ones(len(y), dtype=torch.float64)
    if without is not None:
        kept[without] = 0
    for _ in range(steps):
        index = torch.randperm(len(y), generator=order)[:batch]
        weights.append(parameters_to_vector(model.parameters()).detach().clone())
        batches.append(index)
        sgd.zero_grad()
        ((kept[index] * loss(model(x[index]), y[index])).sum() / batch).backward()
        sgd.step()
    weights.append(parameters_to_vector(model.parameters()).detach().clone())
    return RecordedRun(model, loss, x, y, weights, batches, [0.02] * steps, momentum, decay)


def retrained(without: Tensor, y: Tensor) -> Tensor:
    model = Features()
    run = train(model, squared, y, without=without)
    return model(run.x[without]).detach()


@pytest.mark.parametrize("form", ["gauss-newton", "hessian"])
def test_a_frozen_kernel_equals_retraining_without_each_example(form: str) -> None:
    y = randn(N, 1, seed=1)
    found = loo_risk(train(Features(), squared, y), form=form)
    expected = torch.cat([retrained(torch.tensor([i]), y) for i in range(N)])
    torch.testing.assert_close(found.outputs, expected, rtol=1e-9, atol=1e-9)
    assert found.value == pytest.approx(float(squared(expected, y).mean()), rel=1e-9)
    assert found.valid
    assert torch.equal(found.index, torch.arange(N))


def test_groups_equal_retraining_without_each_group() -> None:
    y, ids = randn(N, 1, seed=1), torch.arange(N) % 7 * 10
    found = loo_risk(train(Features(), squared, y), group_ids=ids)
    for g in ids.unique():
        members = (ids == g).nonzero().squeeze(1)
        torch.testing.assert_close(found.outputs[members], retrained(members, y))


def test_a_subset_is_part_of_the_whole() -> None:
    y = randn(N, 1, seed=1)
    run = train(Features(), squared, y)
    whole, part = loo_risk(run), loo_risk(run, subset=20, seed=4)
    assert len(part.index.unique()) == 20
    torch.testing.assert_close(part.outputs, whole.outputs[part.index])
    assert part.standard_error > whole.standard_error


def test_the_probe_measures_the_trace() -> None:
    x, y = randn(N, 4), randn(N, 1, seed=1)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def half(u: Tensor, y: Tensor) -> Tensor:
        return 0.5 * squared(u, y)

    run = train(model, half, y, momentum=0.0, decay=0.05, batch=N)
    h = reference.descent_smoother(x, lr=0.02, decay=0.05, steps=40)
    found = loo_risk(run)
    exact = float(h.trace()) / N
    assert found.freedom == pytest.approx(exact, abs=3 * reference.response_error(h))


def test_forms_differ_where_features_move_and_both_are_close() -> None:
    y = randn(N, 1, seed=1)
    run = train(network(), squared, y)
    first, second = loo_risk(run), loo_risk(run, form="hessian")
    assert not torch.allclose(first.outputs, second.outputs)
    left = []
    for i in range(0, N, 10):
        model = network()
        train(model, squared, y, without=torch.tensor([i]))
        left.append(model(run.x[i : i + 1]).detach())
    exact, at = torch.cat(left), torch.arange(0, N, 10)
    fitted = network()
    train(fitted, squared, y)
    naive = (fitted(run.x[at]).detach() - exact).abs().mean()
    for found in (first, second):
        assert float((found.outputs[at] - exact).abs().mean()) < 0.35 * float(naive)


def test_classes() -> None:
    y = torch.arange(N) % 3
    found = loo_risk(train(Features(3), cross_entropy, y))
    assert found.outputs.shape == (N, 3)
    assert 0 < found.freedom < 1


def test_an_estimate_that_blew_up_is_flagged() -> None:
    y = randn(N, 1, seed=1)
    run = train(Features(), squared, y, steps=5)
    wild = loo_risk(replace(run, lr=[50.0] * 5))
    assert not wild.valid
    assert "times the training loss" in wild.reason
    assert loo_risk(replace(run, lr=[1e300] * 5)).reason == "the response blew up"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"batches": []}, {}, "the record is incomplete: 0 batches"),
        ({"weights": []}, {}, "0 weights; K steps need K, K and K"),
        ({"weights": [torch.zeros(3)] * 6}, {}, r"step 0 have shape \(3,\), but the model has 31"),
        ({"batches": [torch.tensor([N])] * 5}, {}, "index must lie in 0..59"),
        ({}, {"form": "newton"}, "form must be one of"),
        ({}, {"subset": 1}, "subset must be an integer from 2 to 60"),
        ({}, {"subset": 5, "group_ids": torch.arange(N)}, "cannot be combined"),
        ({}, {"group_ids": torch.zeros(3)}, "groups must be a tensor of one id an example"),
    ],
)
def test_bad_input_is_refused(
    change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    run = train(Features(), squared, randn(N, 1, seed=1), steps=5)
    with pytest.raises(ValueError, match=message):
        loo_risk(replace(run, **change), **settings)
