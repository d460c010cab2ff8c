"""Recording: what is kept, in whose loop, and what is refused."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW, loo_risk
from poprisk.losses import gradient, hessian, hessian_product, squared_error
from poprisk.path import (
    Closure,
    NotAnalysable,
    Recorder,
    Run,
    StepContext,
    StepRule,
    integrate,
    record,
    trace_cells,
)
from poprisk.path.drift import fitted_noise, movement
from poprisk.path.operators import path_operators
from runs import LOSSES, batches, data, network, recorded
from samplers import randn


def half_mse(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1).mean() / 2


def test_a_loop_of_your_own_gives_the_same_run() -> None:
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    with Recorder(net, "squared_error", sgd, train=train, query=query) as recorder:
        for batch in batches(12):
            sgd.zero_grad()
            half_mse(net(train[0][batch]), train[1][batch]).backward()
            sgd.step()
            schedule.step()
            recorder.step(batch)
    run = recorder.run
    rates = [float(run.rule(k, torch.float64).precondition) for k in range(12)]
    assert rates == pytest.approx([0.1 * 0.9**k for k in range(12)])
    assert integrate(run).closure.worst < 1e-9


def test_accumulated_gradients_are_one_batch() -> None:
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, "squared_error", sgd, train=train, query=query) as recorder:
        for batch in batches(8, b=6):
            sgd.zero_grad()
            for half in batch.split(3):
                (half_mse(net(train[0][half]), train[1][half]) / 2).backward()
            sgd.step()
            recorder.step(batch)
    assert integrate(recorder.run).closure.worst < 1e-9


def test_gradients_may_be_gone_when_the_batch_is_told() -> None:
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, "squared_error", sgd, train=train, query=query) as recorder:
        for batch in batches(4):
            half_mse(net(train[0][batch]), train[1][batch]).backward()
            sgd.step()
            sgd.zero_grad()
            recorder.step(batch)
    assert integrate(recorder.run).closure.worst < 1e-9


def test_a_skipped_step_is_left_out() -> None:
    train, _, _ = data()
    net = network()
    optimizer = PopRiskAdamW(net.parameters(), lr=0.01)
    with Recorder(net, "squared_error", optimizer, train=train) as recorder:
        for k, batch in enumerate(batches(4)):
            optimizer.zero_grad()
            loss = half_mse(net(train[0][batch]), train[1][batch])
            (loss * (float("nan") if k == 2 else 1.0)).backward()
            if k == 2:
                with pytest.warns(RuntimeWarning, match="skipped a step"):
                    optimizer.step()
            else:
                optimizer.step()
            recorder.step(batch)
    assert recorder.run.steps == 3
    assert integrate(recorder.run).closure.worst < 1e-9


def test_a_frozen_layer_is_a_constant() -> None:
    train, query, _ = data()
    net = network()
    net[0].requires_grad_(False)  # type: ignore[index]
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = record(net, "squared_error", sgd, batches(10), query, train=train)
    assert run.problem.names == ("2.weight", "2.bias")
    assert integrate(run).closure.worst < 1e-12


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    memory, disk = recorded("AdamW"), recorded("AdamW", directory=tmp_path / "run")
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [
        "gains.bin",
        "preconditions.bin",
        "weights.bin",
    ]
    for k in range(len(memory)):
        assert torch.equal(memory.weights[k], disk.weights[k])
        assert torch.equal(memory.preconditions[k], disk.preconditions[k])
    assert torch.equal(memory.weights[-1], disk.weights[-1])
    assert torch.equal(integrate(memory).G, integrate(disk).G)


def to_files(directory: Path, lr: float = 0.1) -> Run:
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    return record(net, "squared_error", sgd, batches(4), query, train=train, directory=directory)


def test_deleted_files_are_named(tmp_path: Path) -> None:
    run = to_files(tmp_path)
    (tmp_path / "weights.bin").unlink()
    for use in (integrate, loo_risk):
        with pytest.raises(NotAnalysable, match=r"weights\.bin, .* is gone; record again"):
            use(run)


def test_a_later_record_in_the_same_place_does_not_pass_for_the_first(tmp_path: Path) -> None:
    first = to_files(tmp_path)
    second = to_files(tmp_path, lr=0.2)
    assert integrate(second).closure.worst < 1e-9
    for use in (integrate, loo_risk):
        with pytest.raises(NotAnalysable, match=r"weights\.bin, .* was changed since; .* its own"):
            use(first)


def test_files_cut_short_are_named(tmp_path: Path) -> None:
    run = to_files(tmp_path)
    os.truncate(tmp_path / "weights.bin", 100)
    with pytest.raises(NotAnalysable, match="was changed since"):
        integrate(run)


@pytest.mark.parametrize("whole", [True, False])
def test_files_deleted_while_recording_are_not_begun_anew(tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "run"

    def delete(step: int, steps: int | None) -> None:
        if step == 2:
            shutil.rmtree(folder) if whole else (folder / "weights.bin").unlink()

    assert "weights.bin, which holds a part of the recorded run, is gone" in refused(
        directory=folder, progress=delete
    )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_directory_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    message = refused(directory=tmp_path / place)
    assert "cannot be written" in message
    assert "choose another directory=" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full disk to write to")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").symlink_to("/dev/full")
    assert "No space left on device" in refused(directory=tmp_path)


def test_pairs_are_found_in_the_training_set() -> None:
    train, query, _ = data()
    indices = batches(12)
    runs = []
    for given, known in (
        (indices, train),
        ([(train[0][i], train[1][i]) for i in indices], train),
        ([(train[0][i], train[1][i]) for i in indices], None),
    ):
        net = network()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        runs.append(record(net, "squared_error", sgd, given, query, train=known))
    assert torch.equal(runs[0].weights[-1], runs[1].weights[-1])
    assert [r.intervals[5].examples.tolist() for r in runs[:2]] == [sorted(indices[5].tolist())] * 2
    assert runs[2].problem.n == len(set(torch.cat(indices).tolist()))
    assert integrate(runs[2]).closure.worst < 1e-9


def test_progress_is_told() -> None:
    seen: list[tuple[int, int | None]] = []

    def tell(done: int, total: int | None) -> None:
        seen.append((done, total))

    integrate(recorded(steps=3, progress=tell), progress=tell)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_the_derivatives_of_finite_differences(loss: str) -> None:
    from poprisk.losses import resolve_loss

    function = resolve_loss(LOSSES[loss])
    u = randn(4, 2)
    y = torch.tensor([0, 1, 1, 0]) if loss == "cross_entropy" else randn(4, 2, seed=5).sigmoid()
    h = 1e-6
    for j in range(2):
        step = torch.zeros_like(u)
        step[:, j] = h
        slope = (function(u + step, y) - function(u - step, y)) / (2 * h)
        torch.testing.assert_close(gradient(function, u, y)[:, j], slope, rtol=1e-6, atol=1e-8)
        bend = (gradient(function, u + step, y) - gradient(function, u - step, y)) / (2 * h)
        torch.testing.assert_close(hessian(function, u, y)[:, j], bend, rtol=1e-6, atol=1e-8)
    for columns in (1, 3):  # fewer than outputs, and more
        v = randn(4, 2, columns, seed=6)
        torch.testing.assert_close(hessian_product(function, u, y, v), hessian(function, u, y) @ v)


# --- refusals -------------------------------------------------------------------------------------


def refused(**changes: Any) -> str:
    """The message of a recording that is refused."""
    train, query, _ = data()
    net = changes.pop("net", None) or network()
    settings = {"train": train, "query": query, **changes}
    optimizer = settings.pop("optimizer", torch.optim.SGD)(net.parameters(), lr=0.1)
    given = settings.pop("batches", batches(4))
    loss = settings.pop("loss", "squared_error")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        record(net, loss, optimizer, given, settings.pop("query"), **settings)
    return str(caught.value)


def test_an_optimizer_without_a_rule() -> None:
    message = refused(optimizer=torch.optim.NAdam)
    assert "NAdam has no rule" in message
    assert "realized_update" in message


def test_a_step_that_is_not_its_rule() -> None:
    class Halved(torch.optim.SGD):
        def step_rule(self, param: Tensor, context: StepContext) -> StepRule:
            return StepRule(precondition=0.05)

    message = refused(optimizer=Halved)
    assert message.startswith("the step of Halved is not the one its rule describes (relative")


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), "other outputs when"),
        (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), "depend on the other"),
    ],
)
def test_a_model_that_cannot_be_followed(net: nn.Module, expected: str) -> None:
    assert expected in refused(net=net.double())


def test_low_precision_weights() -> None:
    assert "train in float32 or float64" in refused(net=nn.Linear(3, 2).bfloat16())


def test_a_loss_that_is_reduced() -> None:
    message = refused(loss=nn.MSELoss())
    assert "pass reduction='none'" in message


def test_a_mean_that_is_spread_over_the_examples() -> None:
    def spread(u: Tensor, y: Tensor) -> Tensor:
        return squared_error(u, y).mean().expand(len(u))

    message = refused(loss=spread)
    assert "changes with the others of its batch" in message


def test_an_unknown_loss() -> None:
    assert refused(loss="hinge").startswith("loss must be one of 'squared_error'")


def test_more_than_the_budget() -> None:
    message = refused(max_memory=1000)
    assert "over max_memory" in message
    assert "stride=8" in message


def test_dense_operators_over_the_budget() -> None:
    with pytest.raises(NotAnalysable, match="follow single vectors with apply"):
        integrate(recorded(steps=1), max_memory=1000)


def test_data_that_does_not_repeat() -> None:
    stream = [(randn(5, 3, seed=s), randn(5, 2, seed=s)) for s in range(6)]
    assert "the data does not repeat" in refused(batches=stream, train=None)
    assert "is not in the training set" in refused(batches=stream)


def test_indices_without_a_training_set() -> None:
    assert "pass train=(inputs, targets)" in refused(train=None)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.tensor([0, 14]), "names example 14, but the training set has 14"),
        (torch.tensor([-1]), "names example -1"),
        (torch.tensor([0.5]), "1-d tensor of example indices"),
        (torch.zeros(2, 2, dtype=torch.long), "1-d tensor of example indices"),
    ],
)
def test_a_batch_that_is_none(batch: Tensor, expected: str) -> None:
    assert expected in refused(batches=[batch])


def test_a_gradient_that_is_not_the_batch_s() -> None:
    train, _, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, "squared_error", sgd, train=train) as recorder:
        (3 * half_mse(net(train[0]), train[1])).backward()
        sgd.step()
        with pytest.raises(NotAnalysable, match="the gradient of step 1 is not that of the rec"):
            recorder.step(torch.arange(14))


def test_weights_that_change_in_between() -> None:
    train, _, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, "squared_error", sgd, train=train):
        with torch.no_grad():
            next(net.parameters()).mul_(2)
        half_mse(net(train[0]), train[1]).backward()
        with pytest.raises(NotAnalysable, match=r"outside of the optimizer's steps: '0\.weight'"):
            sgd.step()


def test_steps_and_batches_alternate() -> None:
    train, _, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with Recorder(net, "squared_error", sgd, train=train) as recorder:
        with pytest.raises(ValueError, match="once after each"):
            recorder.step(torch.arange(14))
        half_mse(net(train[0]), train[1]).backward()
        sgd.step()
        with pytest.raises(ValueError, match="once after each"):
            sgd.step()
        recorder.step(torch.arange(14))
    assert recorder.run.steps == 1


def test_the_last_step_is_not_forgotten() -> None:
    train, _, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder(net, "squared_error", sgd, train=train).__enter__()
    half_mse(net(train[0]), train[1]).backward()
    sgd.step()
    with pytest.raises(ValueError, match="once after each"):
        recorder.__exit__(None, None, None)


def test_an_optimizer_of_another_model() -> None:
    train, _, _ = data()
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(NotAnalysable, match="trains 4 tensors that are no parameters"):
        Recorder(network(), "squared_error", other, train=train)


def test_squared_error_is_half_the_square() -> None:
    assert squared_error(torch.tensor([[3.0]]), torch.tensor([[1.0]])).tolist() == [2.0]


# --- loops ----------------------------------------------------------------------------------------

STEPS = 8


class Scaled(nn.Module):
    """The small network times a buffer and an attribute."""

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.alpha = network(), 1.0
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.alpha * self.temperature


def looped(
    build: Callable[[nn.Module], Any] | None = None,
    net: nn.Module | None = None,
    **events: Callable[[Any, Any], Any],
) -> Run:
    """A run in a loop of one's own; at step 6 (``last``: 8) an event happens.

    Args:
        build: an optimizer from a model.
        net: the model.
        events: by place, "start", "grads", "stepped", "recorded" or "last", from model and
            optimizer.
    """
    train, query, _ = data()
    net = network() if net is None else net
    opt = build(net) if build else torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def at(place: str, k: int, due: int = 5) -> None:
        if k == due and place in events:
            events[place](net, opt)

    with Recorder(net, "squared_error", opt, train=train, query=query) as recorder:
        for k, batch in enumerate(batches(STEPS)):
            at("start", k)
            opt.zero_grad()
            half_mse(net(train[0][batch]), train[1][batch]).backward()
            at("grads", k)
            opt.step()
            at("stepped", k)
            recorder.step(batch)
            at("recorded", k)
            at("last", k, STEPS - 1)
    return recorder.run


def clamp(net: nn.Module, _: Any) -> None:
    for p in net.parameters():
        p.data.clamp_(-0.1, 0.1)


def freeze(net: Any, _: Any) -> None:
    net[0].requires_grad_(False)


def unfreeze(net: Any, _: Any) -> None:
    net[0].requires_grad_(True)


def spoil(net: Any, _: Any) -> None:
    net[0].weight.grad[0] = torch.nan


def load_other(_: Any, opt: Any) -> None:
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry["momentum_buffer"].mul_(3)
    opt.load_state_dict(state)


def head(net: Any) -> Any:
    return torch.optim.SGD(net[2].parameters(), lr=0.05)


def frozen() -> nn.Module:
    net: Any = network()
    net[0].requires_grad_(False)
    return net


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "clamped before": ({"start": clamp}, r"weights changed outside .*'0\.weight'"),
    "clamped after the step": ({"stepped": clamp}, r"weights changed outside .*'0\.weight'"),
    "clamped after the record": ({"recorded": clamp}, r"weights changed outside .*'0\.weight'"),
    "clamped at the end": ({"last": clamp}, r"weights changed outside .*'0\.weight'"),
    "NaN gradient": ({"grads": spoil}, "the gradient of step 6 is NaN or infinite"),
    "another state": ({"start": load_other}, "or was another state loaded"),
    "a hook": (
        {"start": lambda net, _: net[0].weight.register_hook(torch.neg)},
        r"hooks are registered on gradients of '0\.weight'",
    ),
    "unfrozen": (
        {"net": frozen(), "start": unfreeze},
        "trains other parameters .*2 more, 0 fewer",
    ),
    "a group more": (
        {
            "build": head,
            "start": lambda net, opt: opt.add_param_group({"params": list(net[0].parameters())}),
        },
        "trains other parameters .*2 more, 0 fewer",
    ),
    "a second optimizer": (
        {
            "build": head,
            "grads": lambda net, _: torch.optim.SGD(net[0].parameters(), lr=0.1).step(),
        },
        r"'0\.weight', '0\.bias' changed since",
    ),
    "other weights unnoticed by torch": (
        {"build": head, "start": lambda net, _: net[0].weight.data.add_(1)},
        r"'0\.weight' changed since",
    ),
    "a buffer": (
        {"net": Scaled(), "recorded": lambda net, _: net.temperature.mul_(2)},
        "'temperature' changed since",
    ),
    "an attribute": (
        {"net": Scaled(), "start": lambda net, _: setattr(net, "alpha", 2.0)},
        "the gradient of step 8 is not that of the recorded loss",
    ),
    "an attribute at the end": (
        {"net": Scaled(), "last": lambda net, _: setattr(net, "alpha", 2.0)},
        "outputs at the end are not those of the recorded weights",
    ),
    "a step that is not told": ({"recorded": lambda _, opt: opt.step()}, "once after each"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_path_that_is_broken_is_noticed_by_name(kind: str) -> None:
    events, message = BROKEN[kind]
    with pytest.raises(ValueError, match=message):
        looped(**copy.deepcopy(events))


def test_a_gradient_that_is_clipped_unseen_shows_in_the_closure() -> None:
    """Between the steps whose gradients are compared."""
    train, _, clean = data()
    run = looped(grads=lambda net, _: nn.utils.clip_grad_norm_(net.parameters(), 1e-3))
    uses: dict[str, Callable[[], Any]] = {
        "integrate": lambda: integrate(run),
        "trace_cells": lambda: trace_cells(run, clean),
        "apply": lambda: path_operators(run).apply(torch.ones(len(train[0]), 2, 1)),
        "fitted_noise": lambda: fitted_noise(run, draws=2, seed=0),
        "movement": lambda: movement(run),
    }
    for use in uses.values():
        with pytest.warns(RuntimeWarning, match=r"off by 0\.\d+"):
            use()


def test_a_closure_that_is_no_number_is_told() -> None:
    closure = Closure(0.0, float("nan"), 0.0)
    assert closure.worst != closure.worst
    with pytest.warns(RuntimeWarning, match="off by nan"):
        closure.warn("Record again.", stacklevel=1)


def test_a_layer_frozen_on_the_way_stays_where_it_is() -> None:
    def adamw(net: nn.Module) -> Any:
        return torch.optim.AdamW(net.parameters(), lr=0.01)

    for build in (None, adamw):
        run = looped(build, start=freeze)
        assert integrate(run).closure.worst < 1e-9
        assert torch.equal(run.weights[5][:18], run.weights[8][:18])


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_out_or_refused(fused: bool) -> None:
    train, query, _ = data()
    net = network()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]

    def train_on() -> Run:
        with Recorder(net, "squared_error", opt, train=train, query=query) as recorder:
            for batch in batches(5):
                opt.zero_grad()
                scaler.scale(half_mse(net(train[0][batch]), train[1][batch])).backward()
                scaler.step(opt)
                scaler.update()
                recorder.step(batch)
        return recorder.run

    if fused:
        with pytest.raises(NotAnalysable, match=r"call scaler\.unscale_\(optimizer\) before"):
            train_on()
        assert all(map(torch.equal, net.parameters(), before))
    else:
        assert integrate(train_on()).closure.worst < 1e-9


@pytest.mark.parametrize("kind", [torch.optim.SGD, PopRiskAdamW])
def test_a_step_with_a_closure(kind: Any) -> None:
    train, query, _ = data()
    net = network()
    opt = kind(net.parameters(), lr=0.01)
    with Recorder(net, "squared_error", opt, train=train, query=query) as recorder:
        for batch in batches(6):

            def again(batch: Tensor = batch) -> Tensor:
                opt.zero_grad()
                loss = half_mse(net(train[0][batch]), train[1][batch])
                loss.backward()
                return loss

            opt.step(again)
            recorder.step(batch)
    assert integrate(recorder.run).closure.worst < 1e-9


def test_a_recorder_records_one_run() -> None:
    train, _, _ = data()
    net = network()
    recorder = Recorder(net, "squared_error", torch.optim.SGD(net.parameters()), train=train)
    with recorder:
        pass
    with pytest.raises(ValueError, match="a Recorder records one run"), recorder:
        pass
