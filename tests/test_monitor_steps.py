"""Rows belong to steps of the optimizer, however these are taken; and nothing ends a run."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import poprisk
from asserts import assert_bitwise
from poprisk import PopRiskAdamW, RiskMonitor
from poprisk.monitor import Jsonl, Loss, Measured, Signal, TangentKernel


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


class Loop:
    """Training on parts of batches, with the loss of each step's examples before it."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = settings.pop("make", make_sgd)(self.model)
        self.seen: list[float] = []
        self.monitor = RiskMonitor(
            self.model, squared, settings.pop("watch", self.optimizer), every=1, **settings
        )
        self.parts: list[tuple[Tensor, Tensor]] = []

    def part(self, *, before: bool = False) -> None:
        x, y = torch.randn(8, 3), torch.randn(8, 1)
        self.parts.append((x, y))
        if before:
            self.monitor.step(x, y)
        (squared(self.model(x), y).mean() / 2).backward()
        if not before:
            self.monitor.step(x, y)

    def note(self) -> None:
        x, y = (torch.cat(ts) for ts in zip(*self.parts, strict=True))
        self.seen.append(float(squared(self.model(x), y).detach().mean()))
        self.parts.clear()

    def step(self, *, clear: bool = True) -> None:
        self.note()
        self.optimizer.step()
        if clear:
            self.optimizer.zero_grad()

    def rows(self) -> list[float]:
        return [row["loss"] for _, row in self.monitor.rows]

    def check(self) -> None:
        assert self.rows() == pytest.approx(self.seen, rel=1e-5)
        assert [step for step, _ in self.monitor.rows] == list(range(len(self.seen)))


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Wrapped:
    """Hands on a step, as libraries' wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


MAKERS: dict[str, Any] = {
    "SGD": make_sgd,
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=0.1),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
    "gated": lambda m: poprisk.gated(make_sgd(m)),
    "wrapped": lambda m: Wrapped(make_sgd(m)),
}
PARTS = {"one": [1, 1, 1], "a remainder": [2, 2, 1, 2, 2, 1], "any number": [1, 3, 2, 4, 1]}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("accumulate", [None, 1, 2, 3])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_row_is_that_of_all_parts_of_a_step(
    name: str, parts: str, accumulate: int | None, before: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(make=MAKERS[name], accumulate=accumulate, sinks=path, quantities=[Loss()])
    for count in PARTS[parts]:
        for _ in range(count):
            loop.part(before=before)
        loop.step()
    if accumulate is not None and accumulate < PARTS[parts][0]:
        return  # told wrongly before the first step
    loop.check()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = {row["step"]: row["loss"] for row in rows}
    assert list(last.values()) == pytest.approx(loop.seen, rel=1e-5)
    if accumulate is None:
        assert len(rows) == len(loop.seen)


@pytest.mark.parametrize("every", [2, 3])
def test_every_counts_steps_of_the_optimizer(every: int) -> None:
    loop = Loop(quantities=[Loss()])
    loop.monitor.every = every
    for count in (2, 1, 2, 2, 1, 2):
        for _ in range(count):
            loop.part()
        loop.step()
    assert [step for step, _ in loop.monitor.rows] == list(range(0, 6, every))
    assert loop.rows() == pytest.approx(loop.seen[::every], rel=1e-5)


def test_steps_without_a_call_are_counted() -> None:
    loop = Loop(quantities=[Loss()])
    for watched in (True, False, False, True):
        if watched:
            loop.part()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert [step for step, _ in loop.monitor.rows] == [0, 3]


def test_a_step_that_a_scaler_leaves_out_is_not_mixed_with_the_next() -> None:
    loop = Loop(quantities=[Loss()])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False, True, True, False):
        for _ in range(2):
            x, y = torch.randn(8, 3), torch.randn(8, 1)
            loop.parts.append((x, y))
            scaler.scale(squared(loop.model(x), y).mean()).backward()
            loop.monitor.step(x, y)
        if bad:
            assert loop.model.weight.grad is not None
            loop.model.weight.grad[0] = math.inf
        loop.note()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
    loop.check()


def test_a_closure_that_is_evaluated_several_times_gives_one_row_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=4)
    monitor = RiskMonitor(model, squared, lbfgs, every=1, quantities=[Loss()])
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    first: list[float] = []

    def closure() -> float:
        lbfgs.zero_grad()
        loss = squared(model(x), y).mean()
        loss.backward()
        monitor.step(x, y)
        return float(loss.detach())

    for _ in range(3):
        first.append(float(squared(model(x), y).detach().mean()))
        lbfgs.step(closure)
    assert [step for step, _ in monitor.rows] == [0, 1, 2]
    assert [row["loss"] for _, row in monitor.rows] == pytest.approx(first, rel=1e-5)


def captured(model: nn.Module) -> PopRiskAdamW:
    return PopRiskAdamW(model, lr=torch.tensor(0.1), capturable=True)


def test_a_compiled_step_goes_unseen_and_rows_are_right() -> None:
    loop = Loop(quantities=[Loss()], make=captured)
    step = torch.compile(loop.optimizer.step, backend="eager", fullgraph=True)
    for _ in range(3):
        loop.part()
        loop.part()
        loop.note()
        step()
        loop.optimizer.zero_grad()
    loop.check()
    assert not loop.monitor._heard


def test_two_optimizers_of_one_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    pair = [torch.optim.SGD(m.parameters(), lr=0.1) for m in model]
    monitor = RiskMonitor(model, squared, pair[1], every=1, quantities=[Loss()])
    for _ in range(3):
        x, y = torch.randn(8, 3), torch.randn(8, 1)
        squared(model(x), y).mean().backward()
        monitor.step(x, y)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in monitor.rows] == [0, 1, 2]


def test_a_loop_without_steps_gives_a_row_a_call() -> None:
    model = nn.Linear(3, 1)
    monitor = RiskMonitor(model, squared, make_sgd(model), every=1, quantities=[Loss()])
    for _ in range(3):
        monitor.step(torch.randn(8, 3), torch.randn(8, 1))
    assert [step for step, _ in monitor.rows] == [0, 1, 2]


def test_an_optimizer_that_cannot_be_watched_is_said_once_and_counted() -> None:
    model = nn.Linear(3, 1)
    inner = make_sgd(model)
    foreign = SimpleNamespace(param_groups=inner.param_groups)
    with pytest.warns(RuntimeWarning, match=r"cannot see when SimpleNamespace steps .* every 2"):
        monitor = RiskMonitor(model, squared, foreign, every=1, accumulate=2, quantities=[Loss()])
    for _ in range(2):
        for _ in range(2):
            x, y = torch.randn(8, 3), torch.randn(8, 1)
            squared(model(x), y).mean().backward()
            monitor.step(x, y)
        inner.zero_grad(set_to_none=False)
    assert [step for step, _ in monitor.rows] == [0, 1]


def test_a_resumed_run_goes_on_counting_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    state: dict[str, Any] = {"steps": 0}
    for _ in range(2):
        loop = Loop(quantities=[Loss()], sinks=[path])
        loop.monitor.load_state_dict(state)
        for _ in range(2):
            loop.part()
            loop.step()
        state = loop.monitor.state_dict()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="state_dict must be what"):
        loop.monitor.load_state_dict({"steps": -1})


def test_a_monitor_that_is_gone_is_not_told() -> None:
    model = nn.Linear(3, 1)
    sgd = make_sgd(model)
    monitor = RiskMonitor(model, squared, sgd)
    assert len(sgd._optimizer_step_pre_hooks) == 1
    del monitor
    assert len(sgd._optimizer_step_pre_hooks) == len(sgd._optimizer_step_post_hooks) == 0


ERRORS = [
    AssertionError("no"),
    NotImplementedError("no"),
    torch.OutOfMemoryError("no"),
    KeyError("no"),
    ImportError("no"),
    AttributeError("no"),
    StopIteration("no"),
    Exception("no"),
    AssertionError(),
]


class Breaks:
    """A quantity that fails, or returns what are no numbers."""

    gradients = False

    def __init__(self, found: Any) -> None:
        self.name, self.found = "breaks", found

    def measure(self, moment: Any) -> Any:
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


def one(sinks: Any = (), loss: Any = squared, **settings: Any) -> tuple[RiskMonitor, list[str]]:
    model = nn.Linear(3, 1)
    sgd = make_sgd(model)
    monitor = RiskMonitor(model, loss, sgd, every=1, sinks=sinks, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            x, y = torch.randn(8, 3), torch.randn(8, 1)
            squared(model(x), y).mean().backward()
            monitor.step(x, y)
            sgd.step()
            sgd.zero_grad()
    return monitor, [str(warning.message) for warning in said]


@pytest.mark.parametrize("found", [*ERRORS, None, 3.0, {"a": "text"}, {"a": torch.ones(2)}])
def test_whatever_a_quantity_does_the_others_are_measured(found: Any) -> None:
    monitor, said = one(quantities=[Breaks(found), Loss()])
    assert len(said) == 1
    assert "cannot measure breaks: " in said[0]
    assert [math.isnan(row["breaks"]) for _, row in monitor.rows] == [True, True]
    assert all(row["loss"] > 0 for _, row in monitor.rows)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_loss_raises_rows_are_written(error: Exception) -> None:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        raise error

    rows: list[Any] = []

    def keep(*row: Any) -> None:
        rows.append(row)

    monitor, said = one([keep], loss)
    assert len(said) == 1
    assert "cannot measure loss and signal: " in said[0]
    assert len(rows) == len(monitor.rows) == 2
    assert all(math.isnan(row["loss"]) and math.isnan(row["signal/share"]) for _, row in rows)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_sink_raises_the_others_are_written(error: Exception) -> None:
    def fails(step: int, row: Any) -> None:
        raise error

    rows: list[Any] = []

    def keep(*row: Any) -> None:
        rows.append(row)

    _, said = one([fails, keep])
    assert len(said) == 1
    assert "cannot write to" in said[0]
    assert len(rows) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_can(error: type[BaseException]) -> None:
    def stop() -> float:
        raise error

    model = nn.Linear(3, 1)
    monitor = RiskMonitor(model, squared, make_sgd(model), quantities=[Measured("stop", stop)])
    with pytest.raises(error):
        monitor.step(torch.randn(8, 3), torch.randn(8, 1))


def test_a_model_that_cannot_be_looked_at_gives_a_row_of_nan() -> None:
    class Stubborn(nn.Linear):
        def eval(self) -> Any:
            raise RuntimeError("I stay in train mode")

    model = Stubborn(3, 1)
    monitor = RiskMonitor(
        model, squared, make_sgd(model), quantities=[Loss(), TangentKernel(torch.ones(2, 3))]
    )
    with pytest.warns(RuntimeWarning, match="I stay in train mode"):
        monitor.step(torch.randn(8, 3), torch.randn(8, 1))
    assert set(monitor.rows[0][1]) == {"loss", "kernel"}
    assert all(math.isnan(value) for value in monitor.rows[0][1].values())


class Stateful(nn.Module):
    """Counts, averages and remembers, in training and evaluation alike."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.ones(()))
        self.running = SimpleNamespace(mean=torch.zeros(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.calls += 1
        self.scale.mul_(0.9).add_(0.1 * h.detach().abs().mean())
        self.running.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.b((h - self.running.mean) / self.scale / (1 + 0.01 * self.calls))


class Scaled(nn.Module):
    """A loss in units of its running size."""

    size: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones(()))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(u, y, reduction="none") / self.size.clone()
        self.size.mul_(0.9).add_(0.1 * losses.detach().mean())
        return losses


def trained(*, monitored: bool) -> tuple[Any, list[Any], RiskMonitor | None]:
    torch.manual_seed(0)
    model, loss = Stateful(), Scaled()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls: list[int] = []

    def clip(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad.clamp(-0.01, 0.01) * (1 + 0.01 * len(calls))

    model.a.weight.register_hook(clip)
    model.b.register_full_backward_hook(lambda *_: calls.append(2))
    canaries = poprisk.Canaries(torch.arange(20) % 2, fraction=0.25)
    quantities = [
        Loss(),
        Signal(window=1),
        TangentKernel(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))),
        poprisk.monitor.CanaryMemorization(canaries, torch.ones(len(canaries.index), 3)),
        Measured("norm", lambda: model(torch.ones(2, 3)).detach().norm()),
    ]
    monitor = None
    if monitored:
        monitor = RiskMonitor(model, loss, adam, every=2, quantities=quantities)
    data = torch.Generator().manual_seed(2)
    for _ in range(8):
        x = torch.randn(8, 3, generator=data)
        y = torch.randint(2, (8,), generator=data)
        adam.zero_grad()
        loss(model(x), y).mean().backward()
        if monitor is not None:
            monitor.step(x, y)
        adam.step()
    state = (model.state_dict(), loss.state_dict(), adam.state_dict(), vars(model.running))
    return (*state, model.calls), calls, monitor


@pytest.mark.filterwarnings("ignore:the monitor cannot measure kernel:RuntimeWarning")
def test_state_of_models_and_losses_and_hooks_change_nothing() -> None:
    (alone, calls, _), (watched, heard, monitor) = trained(monitored=False), trained(monitored=True)
    assert_bitwise(watched, alone)
    assert heard == calls
    assert monitor is not None
    assert len(monitor.rows) == 4
    for _, row in monitor.rows:
        unknown = {k for k, v in row.items() if not math.isfinite(v) and "noise_scale" not in k}
        assert unknown == {"kernel"}


def listed(path: str) -> list[str]:
    return [path]


@pytest.mark.parametrize("make", [str, Path, Jsonl, listed])
def test_one_sink_needs_no_list(make: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = nn.Linear(3, 1)
    monitor = RiskMonitor(
        model, squared, make_sgd(model), accumulate=1, quantities=[Loss()], sinks=make(str(path))
    )
    monitor.step(torch.randn(8, 3), torch.randn(8, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]
    assert len(path.read_text().splitlines()) == 1


def test_files_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    (tmp_path / "file").touch()
    for bad, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "a", "cannot write to"),
    ):
        with pytest.raises(OSError, match=message):
            RiskMonitor(model, squared, make_sgd(model), sinks=[bad])


def test_optimizers_of_other_models_and_frozen_models_are_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        RiskMonitor(model, squared, make_sgd(nn.Linear(3, 1)))
    sgd = make_sgd(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        RiskMonitor(model, squared, sgd)


@pytest.mark.parametrize("index", [-100, 7])
def test_ignored_labels_do_not_count(index: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    loss = nn.CrossEntropyLoss(reduction="none", ignore_index=index)
    x, y = torch.randn(12, 3), torch.randint(4, (12,))
    rows = []
    for keep in (torch.ones(12, dtype=torch.bool), torch.arange(12) % 3 > 0):
        labels = torch.where(keep, y, index)
        for xs, ys in ((x, labels), (x[keep], y[keep])):
            monitor = RiskMonitor(model, loss, make_sgd(model))
            monitor.step(xs, ys)
            rows.append(monitor.rows[0][1])
    for with_ignored, without in (rows[:2], rows[2:]):
        assert with_ignored == pytest.approx(without, rel=1e-4, nan_ok=True)
    assert rows[0]["loss"] != pytest.approx(rows[2]["loss"])
