"""A monitor measures what it says, and leaves no trace in the training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import poprisk
from asserts import assert_bitwise, complete_state
from gloo import joined
from poprisk import Canaries, PopRiskAdamW, RiskMonitor
from poprisk.monitor import CanaryMemorization, Loss, Measured, Risk, Signal, TangentKernel
from poprisk.monitor.signal import SHARE
from poprisk.monitor.statistics import Statistics
from poprisk.randomness import RandomState
from processes import Call, at_once
from reference import monitor as reference
from samplers import randn

B = 12
Make = Callable[[nn.Module], Optimizer]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def network(*, dropout: float = 0.3, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(6) if norm else nn.Dropout(dropout)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), middle, nn.Linear(6, 2)).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(B, 3, seed=seed), 1 + randn(B, 2, seed=100 + seed)


MAKERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=1e-2),
    "gated": lambda m: poprisk.gated(torch.optim.SGD(m.parameters(), lr=0.1)),
}


def train(
    make: Make, *, monitored: bool, steps: int = 7, parts: int = 1, norm: bool = False
) -> tuple[nn.Module, Optimizer, RiskMonitor | None]:
    torch.manual_seed(5)
    model = network(norm=norm)
    optimizer = make(model)
    monitor = None
    if monitored:
        probe = [Loss(), Signal(), TangentKernel(randn(4, 3))] if not norm else [Loss(), Signal()]
        monitor = RiskMonitor(
            model, squared, optimizer, every=3, quantities=probe, accumulate=parts
        )
    for seed in range(steps):
        x, y = batch(seed)
        optimizer.zero_grad()
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (squared(model(xs), ys).mean() / parts).backward()
            if monitor is not None:
                monitor.step(xs, ys)
        optimizer.step()
    return model, optimizer, monitor


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_training_is_bitwise_the_same_with_and_without(name: str, parts: int, norm: bool) -> None:
    alone, plain, _ = train(MAKERS[name], monitored=False, parts=parts, norm=norm)
    random = RandomState.now()
    watched, optimizer, monitor = train(MAKERS[name], monitored=True, parts=parts, norm=norm)
    assert random.same(RandomState.now())
    assert_bitwise(watched.state_dict(), alone.state_dict())
    assert all(m.training for m in watched.modules())
    if name != "gated":
        assert_bitwise(complete_state(optimizer), complete_state(plain))
    assert monitor is not None
    assert [step for step, _ in monitor.rows] == [0, 3, 6]
    assert all(math.isfinite(row["signal/noise_scale_low"]) for _, row in monitor.rows)


def one_row(model: nn.Module, parts: int = 1, **settings: Any) -> dict[str, float]:
    x, y = batch()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, accumulate=parts, **settings)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        monitor.step(xs, ys)
    return monitor.rows[0][1]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_numbers_are_those_of_all_parts_of_the_step(parts: int) -> None:
    model = network()
    x, y = batch()
    row = one_row(model, parts, quantities=[Loss(), Signal(window=1)])
    model.eval()
    expected = reference.signal(reference.example_gradients(model, squared, x, y))
    whole = ("snr", "noise_scale")  # errors, of which the share is corrected, are those of a part
    for name in expected if parts == 1 else whole:
        assert row[f"signal/{name}"] == pytest.approx(
            expected[name], rel=1e-3 if name in SHARE else 1e-6
        )
    assert row["loss"] == pytest.approx(float(squared(model(x), y).detach().mean()))


def test_numbers_of_a_module_are_those_of_its_parameters() -> None:
    model = network().eval()
    rows = reference.example_gradients(model, squared, *batch())
    row = one_row(model, quantities=[Signal(window=1)])
    for name, part in (("0", rows[:, :24]), ("3", rows[:, 24:])):
        expected = reference.signal(part)["share"]
        assert row[f"signal/share/{name}"] == pytest.approx(expected, rel=1e-3)
    assert "signal/share/0" not in one_row(model, quantities=[Signal(modules=False)])


def test_the_noise_is_that_of_grad_mean_var() -> None:
    model = network().eval()
    found = poprisk.grad_mean_var(model, squared, batch())
    statistics = Statistics(dict(model.named_parameters()))
    statistics.add(model, squared, lambda m, x: m(x), *batch())
    for module, row in statistics.signals().items():
        expected = sum(float(v.sum()) for k, v in found.items() if k.startswith(module))
        assert row.noise == pytest.approx(expected)


def test_a_gradient_without_noise_is_all_signal() -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.ones(B, 3).double(), torch.ones(B, 2).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, quantities=[Signal(window=1)])
    monitor.step(x, y)
    assert monitor.rows[0][1]["signal/share"] == pytest.approx(1)
    assert monitor.rows[0][1]["signal/noise_scale"] == pytest.approx(0, abs=1e-9)


def test_the_gate_is_reported_where_there_is_one() -> None:
    model = network(dropout=0.0)
    optimizer = PopRiskAdamW(model, lr=1e-2)
    monitor = RiskMonitor(model, squared, optimizer, every=1)
    for seed in range(5):
        x, y = batch(seed)
        optimizer.zero_grad()
        squared(model(x), y).mean().backward()
        monitor.step(x, y)
        optimizer.step()
    row, stats = monitor.rows[-1][1], optimizer.gate_stats()
    assert {k for k in row if k.startswith("gate/pass_rate")} == {
        "gate/pass_rate/0",
        "gate/pass_rate/3",
    }
    assert 0 <= row["gate/update_ratio/0"] <= 1
    assert set(stats) == {"0", "3"}


def test_every_other_quantity() -> None:
    model = network(dropout=0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    y = batch()[1]
    canaries = Canaries(y, fraction=0.25)
    estimate = SimpleNamespace(value=1.5, valid=True, standard_error=0.1, dof=0.2, train_loss=1.0)
    quantities = [
        TangentKernel(randn(4, 3), count=2),
        CanaryMemorization(canaries, batch()[0][canaries.index]),
        Risk(lambda: estimate),  # pyrefly: ignore[bad-argument-type]
        Measured("lr", lambda: 0.5),
        Measured("pair", lambda: {"a": 1.0, "b": 2.0}),
    ]
    monitor = RiskMonitor(model, squared, sgd, every=1, quantities=quantities)
    for _ in range(2):
        sgd.zero_grad()
        squared(model(batch()[0]), y).mean().backward()
        monitor.step(*batch())
        sgd.step()
    first, second = (row for _, row in monitor.rows)
    k = poprisk_kernel(network(dropout=0.0), randn(4, 3))
    assert first["kernel/top1"] == pytest.approx(float(torch.linalg.eigvalsh(k)[-1]))
    assert first["kernel/drift"] == 0 < second["kernel/drift"]
    assert "kernel/top2" in first
    assert "kernel/top3" not in first
    assert (first["risk"], first["risk/dof"], first["risk/valid"]) == (1.5, 0.2, 1.0)
    assert (first["lr"], first["pair/a"], first["pair/b"]) == (0.5, 1.0, 2.0)
    assert math.isfinite(first["canaries"])
    estimate.valid = False
    monitor.step(*batch())
    assert math.isnan(monitor.rows[-1][1]["risk"])


def poprisk_kernel(model: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        u = model(x[i : i + 1])[0]
        grads = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in u]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]))
    j = torch.stack(rows)
    return torch.einsum("icp,jcp->ij", j, j)


def test_rows_go_to_every_sink(tmp_path: Path) -> None:
    seen: list[Any] = []
    scalars: list[Any] = []

    def add_scalar(*row: Any) -> None:
        scalars.append(row)

    def log(row: dict[str, float], step: int) -> None:
        seen.append((step, row))

    def sink(step: int, row: dict[str, float]) -> None:
        seen.append((step, row))

    writer, run = SimpleNamespace(add_scalar=add_scalar), SimpleNamespace(log=log)
    path = tmp_path / "deep" / "run.jsonl"
    sinks = [str(path), writer, run, sink]
    quantities = [Measured("a", lambda: 2.0), Measured("b", lambda: math.inf)]
    one_row(network(), quantities=quantities, sinks=sinks)
    assert json.loads(path.read_text()) == {"step": 0, "a": 2.0, "b": None}
    assert scalars == [("a", 2.0, 0), ("b", math.inf, 0)]
    assert seen == [(0, {"a": 2.0, "b": math.inf})] * 2


def test_a_sink_whose_folder_was_deleted_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    model, (x, y) = network(), batch()
    path = tmp_path / "deep" / "run.jsonl"
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, every=1, accumulate=1, sinks=[path])
    path.parent.rmdir()
    with pytest.warns(RuntimeWarning, match=r"cannot write to .*run\.jsonl: .* rows are in \.rows"):
        monitor.step(x, y)
    monitor.step(x, y)  # a second warning would be an error
    assert len(monitor.rows) == 2


def test_a_loss_alone_takes_no_gradients() -> None:
    model, (x, y) = network(dropout=0.0), batch()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, quantities=[Loss()])
    monitor.step(x, y)
    expected = float(squared(model(x), y).detach().mean())
    assert monitor.rows[0][1] == {"loss": pytest.approx(expected)}
    assert monitor._statistics.sums == {}


def test_a_mean_that_is_spread_over_the_examples_is_said() -> None:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        return squared(u, y).mean().expand(len(u))

    model, (x, y) = network(), batch()
    monitor = RiskMonitor(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(RuntimeWarning, match=r"loss and signal: loss .* reduction='none'"):
        monitor.step(x, y)
    assert math.isnan(monitor.rows[0][1]["loss"])


def test_wandb_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def log(row: dict[str, float], step: int) -> None:
        seen.append((step, row))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=log))
    one_row(network(), quantities=[Measured("a", lambda: 2.0)], sinks=["wandb"])
    assert seen == [(0, {"a": 2.0})]


@pytest.mark.parametrize("bad", ["weights", "inputs"])
def test_what_is_not_a_number_is_survived(bad: str) -> None:
    model = network()
    x, y = batch()
    if bad == "weights":
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
    else:
        x = x * math.nan
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd)
    monitor.step(x, y)
    assert math.isnan(monitor.rows[0][1]["loss"])


def test_a_quantity_that_fails_is_said_once() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail() -> float:
        raise RuntimeError("no luck.")

    quantities = [Measured("luck", fail), Measured("fine", lambda: 1.0)]
    monitor = RiskMonitor(model, squared, sgd, every=1, quantities=quantities)
    with pytest.warns(RuntimeWarning, match="cannot measure luck: no luck. Training goes on"):
        monitor.step(*batch())
    monitor.step(*batch())
    assert all(math.isnan(r["luck"]) and r["fine"] == 1 for _, r in monitor.rows)


def test_a_loss_that_is_a_mean_is_said() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, nn.MSELoss(), sgd)
    with pytest.warns(RuntimeWarning, match="measure loss and signal: loss must give one value"):
        monitor.step(*batch())
    assert math.isnan(monitor.rows[0][1]["loss"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, but got int"),
        ({"loss": None}, TypeError, "loss must be callable"),
        ({"every": 0}, ValueError, "every must be positive"),
        ({"accumulate": 0}, ValueError, "accumulate must be positive"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch optimizer, .* got NoneType"),
        ({"quantities": ["loss"]}, TypeError, "quantities must hold objects of poprisk.monitor"),
        ({"quantities": [Loss(), Loss()]}, ValueError, "two are called 'loss'"),
        ({"sinks": [3]}, TypeError, "sinks must hold paths of JSONL files"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"model": model, "loss": squared, "optimizer": sgd, **change}
    with pytest.raises(error, match=message):
        RiskMonitor(**settings)


def test_gates_of_an_optimizer_without_one_are_said() -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, quantities=[poprisk.monitor.Gates()])
    with pytest.warns(RuntimeWarning, match=r"Gates\(\) needs PopRiskAdamW"):
        monitor.step(*batch())


def _rank(rank: int, folder: str) -> None:
    with joined(rank, folder):
        model = network(dropout=0.0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        sgd = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        monitor = RiskMonitor(wrapped, squared, sgd, every=2, sinks=[f"{folder}/{rank}.jsonl"])
        for seed in range(3):
            x, y = (t.chunk(2)[rank] for t in batch(seed))
            sgd.zero_grad()
            squared(wrapped(x), y).mean().backward()
            monitor.step(x, y)
            sgd.step()


@pytest.mark.slow
def test_ranks_are_pooled_and_one_writes(tmp_path: Path) -> None:
    for process in at_once(*(Call(_rank, (rank, str(tmp_path))) for rank in range(2))):
        assert process.code == 0, process.stderr
    assert not (tmp_path / "1.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    expected = one_row(network(dropout=0.0))
    for name in ("loss", "signal/noise_scale", "signal/snr/0"):
        assert rows[0][name] == pytest.approx(expected[name], rel=1e-5)
