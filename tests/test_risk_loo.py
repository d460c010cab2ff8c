"""Leave-one-out by path response equals retraining where outputs are linear in the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import poprisk
from poprisk import NotAnalysable, PopRiskAdamW, Recorder, Run, loo_risk, record
from poprisk.path import realized_update
from reference import risk as reference
from samplers import randn

N = 60
Make = Callable[[nn.Module], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


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


def sgd(**settings: Any) -> Make:
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, **settings}
    return lambda model: torch.optim.SGD(model.parameters(), **settings)


def batches(steps: int = 14, size: int = 15) -> list[Tensor]:
    order = torch.Generator().manual_seed(3)
    return [torch.randperm(N, generator=order)[:size] for _ in range(steps)]


def train(
    model: nn.Module,
    loss: str | Loss,
    y: Tensor,
    make: Make | None = None,
    *,
    drawn: list[Tensor] | None = None,
    **settings: Any,
) -> Run:
    """Train on the batches, and record it."""
    optimizer = (make or sgd())(model)
    drawn = batches() if drawn is None else drawn
    return record(model, loss, optimizer, drawn, train=(randn(N, 4), y), **settings)


def retrained(
    without: Tensor,
    y: Tensor,
    *,
    make: Make | None = None,
    schedule: bool = False,
    network: Callable[[], nn.Module] = Features,
) -> Tensor:
    """Outputs of the examples that the terms of the loss were zero of."""
    model, x = network(), randn(N, 4)
    optimizer = (make or sgd())(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5 if schedule else 1.0)
    kept = torch.ones(N, dtype=torch.float64)
    kept[without] = 0
    for index in batches():
        optimizer.zero_grad()
        (kept[index] * squared(model(x[index]), y[index])).mean().backward()
        optimizer.step()
        scheduler.step()
    return model(x[without]).detach()


def every_example(y: Tensor, **settings: Any) -> Tensor:
    return torch.cat([retrained(torch.tensor([i]), y, **settings) for i in range(N)])


@pytest.mark.parametrize(
    ("forms", "settings"),
    [
        (["gauss-newton", "hessian"], {}),
        (["gauss-newton"], {"nesterov": True}),
        (["hessian"], {"dampening": 0.5}),
    ],
)
def test_a_frozen_kernel_equals_retraining_without_each_example(
    forms: list[str], settings: dict[str, Any]
) -> None:
    y, make = randn(N, 1, seed=1), sgd(**settings)
    run, expected = train(Features(), squared, y, make), every_example(y, make=make)
    for form in forms:
        found = loo_risk(run, form=form)
        torch.testing.assert_close(found.outputs, expected, rtol=1e-9, atol=1e-9)
        assert found.value == pytest.approx(float(squared(expected, y).mean()), rel=1e-9)
        assert found.valid
        assert torch.equal(found.index, torch.arange(N))


def test_a_loop_of_ones_own_with_a_schedule_and_files(tmp_path: Path) -> None:
    x, y, model = randn(N, 4), randn(N, 1, seed=1), Features()
    optimizer = sgd()(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    with Recorder(model, squared, optimizer, train=(x, y), directory=tmp_path) as recorder:
        for index in batches():
            optimizer.zero_grad()
            squared(model(x[index]), y[index]).mean().backward()
            optimizer.step()
            recorder.step(index)
            scheduler.step()
    found = loo_risk(recorder.run)
    expected = every_example(y, schedule=True)
    torch.testing.assert_close(found.outputs, expected, rtol=1e-9, atol=1e-9)


def test_groups_equal_retraining_without_each_group() -> None:
    y, ids = randn(N, 1, seed=1), torch.arange(N) % 7 * 10
    found = loo_risk(train(Features(), squared, y), groups=ids)
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


PRECONDITIONED: dict[str, Make] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.003, momentum=0.9),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=0.01, batch_size=15, dataset_size=N),
    "GatedOptimizer": lambda m: poprisk.gated(torch.optim.SGD(m.parameters(), lr=0.05)),
}


def steps_of(run: Run) -> list[reference.Step]:
    def plain(value: Any) -> Any:
        return value.squeeze(1) if isinstance(value, Tensor) else value

    found = []
    for k, interval in enumerate(run.intervals):
        r = run.rule(k, torch.float64)
        found.append(
            reference.Step(
                interval.examples.tolist(),
                (interval.sampling / N).tolist(),
                plain(r.correction) * plain(r.precondition),
                *map(plain, (r.carry, r.gain, r.from_momentum, r.from_gradient)),
                *map(plain, (r.coupled, r.decay)),
            )
        )
    return found


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_other_optimizers_take_their_own_steps_without_an_example(name: str) -> None:
    """Naively retrained with the preconditioners of the run, and flagged for holding them."""
    y, drawn = randn(N, 1, seed=1), batches(20)
    run = train(Features(), squared, y, PRECONDITIONED[name], drawn=drawn)
    found = loo_risk(run)
    problem, x = run.problem, randn(N, 4)

    def loss_of(w: Tensor, i: int) -> Tensor:
        return squared(problem.J.outputs(w, x[i : i + 1]), y[i : i + 1]).sum()

    for i in (0, 17, 59):
        w = reference.train_without(loss_of, run.weights[0], steps_of(run), {i})
        expected = problem.J.outputs(w, x[i : i + 1]).detach()[0]
        torch.testing.assert_close(found.outputs[i], expected, rtol=1e-8, atol=1e-9)
    assert (found.valid, found.reason) == (
        False,
        f"the preconditioner of {name} is held as it was with all examples",
    )


def test_the_probe_measures_the_trace() -> None:
    x, y = randn(N, 4), randn(N, 1, seed=1)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    make = sgd(momentum=0.0, weight_decay=0.05)
    run = train(model, "squared_error", y, make, drawn=[torch.arange(N)] * 6)
    h = reference.descent_smoother(x, lr=0.02, decay=0.05, steps=6)
    found, error = [loo_risk(run, subset=2, seed=s) for s in range(20)], reference.response_error(h)
    mean = sum(f.dof for f in found) / len(found)
    assert mean == pytest.approx(float(h.trace()) / N, abs=3 * error / len(found) ** 0.5)
    assert sum(f.dof_error for f in found) / len(found) == pytest.approx(error, rel=0.2)


def test_forms_differ_where_features_move_and_both_are_close() -> None:
    y = randn(N, 1, seed=1)
    model = network()
    run = train(model, squared, y)
    first, second = loo_risk(run), loo_risk(run, form="hessian")
    assert not torch.allclose(first.outputs, second.outputs)
    at = torch.arange(0, N, 10)
    exact = torch.cat([retrained(at[i : i + 1], y, network=network) for i in range(len(at))])
    naive = (model(randn(N, 4)[at]).detach() - exact).abs().mean()
    for found in (first, second):
        assert float((found.outputs[at] - exact).abs().mean()) < 0.35 * float(naive)


def test_classes_and_a_model_with_a_weight_that_is_never_used() -> None:
    model = Features(3)
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = loo_risk(train(model, cross_entropy, torch.arange(N) % 3))
    assert found.outputs.shape == (N, 3)
    assert 0 < found.dof < 1


def test_outputs_keep_the_shape_of_the_models() -> None:
    class Folded(Features):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(len(x), 2, 3)

    y = randn(N, 2, 3, seed=1)
    found = loo_risk(train(Folded(6), "squared_error", y), subset=5)
    flat = loo_risk(train(Features(6), "squared_error", y.reshape(N, 6)), subset=5)
    assert found.outputs.shape == (5, 2, 3)
    assert found.value == pytest.approx(flat.value)
    assert found.dof == pytest.approx(flat.dof)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = x.unsqueeze(2) * torch.ones(4)
        return self.out(self.read(z, z, z, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("form", ["gauss-newton", "hessian"])
def test_attention_has_its_derivatives(form: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention()
    x, y = randn(N, 4).float(), randn(N, 1, seed=1).float()
    run = record(model, squared, sgd()(model), batches(5), train=(x, y))
    found = loo_risk(run, form=form, subset=5)
    assert found.valid
    assert found.outputs.dtype == torch.float32
    assert not torch.equal(found.outputs, model(x[found.index]))


def test_an_estimate_that_blew_up_is_flagged() -> None:
    run = train(Features(), squared, randn(N, 1, seed=1), drawn=batches(5))

    def at(lr: float) -> Run:
        rules = (i.rule._replace(precondition=lr) for i in run.intervals)
        pairs = zip(run.intervals, rules, strict=True)
        return replace(run, intervals=[i._replace(rule=rule) for i, rule in pairs])

    wild = loo_risk(at(50.0))
    assert not wild.valid
    assert "times the training loss" in wild.reason
    assert loo_risk(at(1e300)).reason == "the response blew up"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "newton"}, "form must be one of"),
        ({"subset": 1}, "subset must be an integer from 2 to 60"),
        ({"subset": 5, "groups": torch.arange(N)}, "cannot be combined"),
        ({"groups": torch.zeros(3)}, "groups must be a tensor of one id an example"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    run = train(Features(), squared, randn(N, 1, seed=1), drawn=batches(5))
    with pytest.raises(ValueError, match=message):
        loo_risk(run, **settings)


def test_runs_that_cannot_be_followed_are_refused() -> None:
    y = randn(N, 1, seed=1)
    with pytest.raises(
        TypeError, match=r"run must be what poprisk.record\(...\) returns, .* Tensor"
    ):
        loo_risk(y)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(NotAnalysable, match="the run holds no step"):
        loo_risk(train(Features(), squared, y, drawn=[]))
    with pytest.raises(NotAnalysable, match=r"recorded every 4 steps, .* stride=1"):
        loo_risk(train(Features(), squared, y, stride=4))
    read_off = train(Features(), squared, y, rule=realized_update(momentum=0.9))
    with pytest.raises(NotAnalysable, match=r"SGD was read off its steps .* poprisk.TwinRisk"):
        loo_risk(read_off)


# --- losses and models that cannot be vectorized --------------------------------------------------


class Checkpointed(nn.Module):
    """A network whose hidden layer is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def left_out(model: nn.Module, loss: str | Loss, y: Tensor) -> Tensor:
    x = randn(20, 4, seed=1)
    picks = [torch.arange(20)[k % 2 :: 2] for k in range(10)]
    return loo_risk(record(model, loss, sgd()(model), picks, train=(x, y))).outputs


def test_a_checkpointed_model_is_the_model() -> None:
    y = randn(20, 1, seed=2)
    expected = left_out(network(), "squared_error", y)
    torch.testing.assert_close(left_out(Checkpointed(), "squared_error", y), expected)


def test_a_wide_huber_loss_is_the_squared_error() -> None:
    """It has no forward mode."""
    y = randn(20, 1, seed=2)

    def huber(u: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(u, y, reduction="none", delta=1e6).sum(1)

    found = left_out(network(), huber, y)
    torch.testing.assert_close(found, left_out(network(), "squared_error", y))


def test_classes_in_bytes_are_classes() -> None:
    model, y = nn.Linear(4, 3).double(), torch.arange(20) % 3
    start = copy.deepcopy(model)
    found = left_out(model, cross_entropy, y.to(torch.uint8))
    torch.testing.assert_close(found, left_out(start, cross_entropy, y))
