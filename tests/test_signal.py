"""The signal's share is unbiased over windows of steps, and its errors are those of the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk import RiskMonitor
from poprisk.monitor import Loss, NormSignal, Signal
from poprisk.monitor.signal import SHARE, Counts, GradientSignal, parts_of, sums_of
from poprisk.monitor.statistics import Statistics
from reference import monitor as reference

B, WINDOW, WINDOWS = 32, 8, 100
Draw = Callable[[], tuple[Tensor, Tensor]]


def monitor_of(model: nn.Module, loss: Any, **settings: Any) -> RiskMonitor:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return RiskMonitor(model, loss, sgd, every=1, **settings)


def row_of(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    monitor = monitor_of(model, loss, quantities=[Loss(), Signal(window=1)])
    monitor.step(x, y)
    return monitor.rows[0][1]


def windows(model: nn.Module, loss: Any, draw: Draw, name: str = "signal") -> dict[str, Tensor]:
    """Numbers of windows that share no step, each of batches drawn at the same weights."""
    chosen = {"signal": Signal(modules=False), "norm_signal": NormSignal(examples=None)}[name]
    monitor = monitor_of(model, loss, quantities=[chosen])
    for _ in range(WINDOW * WINDOWS):
        monitor.step(*draw())
    rows = [row for _, row in monitor.rows[WINDOW - 1 :: WINDOW]]
    found = {key: [row[key] for row in rows] for key in rows[0]}
    return {k.partition("/")[2]: torch.tensor(v, dtype=torch.float64) for k, v in found.items()}


def check(
    found: dict[str, Tensor], share: float, *, often: float = 0.86, intervals: float = 0.9
) -> None:
    """The mean share is the true one within its error, and intervals hold it as often as said."""
    shares, errors = found["share"], found["share_error"]
    of_mean = float(shares.std()) / math.sqrt(len(shares))
    assert abs(float(shares.mean()) - share) < 3 * of_mean
    assert 0.8 < float(errors.square().mean().sqrt() / shares.std()) < 1.6
    assert float(((shares - share).abs() < 2 * errors).double().mean()) > often
    inside = (found["share_low"] < share) & (share < found["share_high"])
    assert float(inside.double().mean()) > intervals
    scale = B * (1 - share) / share if share else math.inf
    inside = (found["noise_scale_low"] < scale) & (scale <= found["noise_scale_high"])
    assert float(inside.double().mean()) > intervals


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().flatten(1).mean(1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "classes": (lambda: nn.Linear(20, 2), (20,), nn.CrossEntropyLoss(reduction="none")),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), (6,), squared),
    "cnn": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)),
        (2, 6),
        squared,
    ),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), (6,), squared),
}


def draw(model: nn.Module, shape: tuple[int, ...], loss: Any, g: torch.Generator) -> Any:
    """A batch of which no label depends on its input, at weights where the mean loss is least."""
    x = torch.randn(B, *shape, generator=g)
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.randint(2, (B,), generator=g)
    u = model(x).detach()
    return x, u + torch.randn(u.shape, generator=g)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_pure_noise_has_no_share_on_average(name: str) -> None:
    make, shape, loss = CASES[name]
    torch.manual_seed(0)
    model = make()
    if name == "classes":
        nn.init.zeros_(model.weight)  # pyrefly: ignore
        nn.init.zeros_(model.bias)  # pyrefly: ignore
    g = torch.Generator().manual_seed(1)
    kind = "norm_signal" if name == "norm" else "signal"
    found = windows(model, loss, lambda: draw(model, shape, loss, g), kind)
    check(found, 0.0, often=0.8)  # the noise of a small net has few directions
    assert float((found["noise_scale_high"] == math.inf).double().mean()) > 0.9


def itself(u: Tensor, y: Tensor) -> Tensor:
    return u.flatten()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_streams_of_a_known_share_are_on_target(
    share: float, dtype: torch.dtype, parts: int
) -> None:
    dims, g = 40, torch.Generator().manual_seed(2)
    shift = math.sqrt(share / (1 - share) / B)
    model = nn.Linear(dims, 1, bias=False).to(dtype)  # an example's gradient is the example
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    signal = Signal(modules=False)
    monitor = RiskMonitor(model, itself, sgd, every=1, quantities=[signal])
    for _ in range(WINDOW * WINDOWS):
        x = (shift + torch.randn(B, dims, generator=g)).to(dtype)
        for xs in x.chunk(parts):
            itself(model(xs), xs).sum().backward()
            monitor.step(xs, torch.zeros(len(xs)))
        sgd.step()
        sgd.zero_grad()
    rows = [row for _, row in monitor.rows[WINDOW - 1 :: WINDOW]]
    assert all(row["signal/steps"] == WINDOW for row in rows)
    found = {k[7:]: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in rows[0]}
    check(found, share)
    if share > 0.1:  # else some windows see no signal, and the scale is infinite
        scale = B * (1 - share) / share
        assert float(found["noise_scale"].median()) == pytest.approx(scale, rel=0.1)


def gradients(share: float, dims: int, g: torch.Generator) -> Tensor:
    """Per-example gradients whose batch mean has that share of signal; unequal noise."""
    scale = torch.linspace(0.2, 2.0, dims, dtype=torch.float64)
    noise = scale * torch.randn(B, dims, generator=g, dtype=torch.float64)
    size = float(scale.square().sum()) / B * share / (1 - share)
    mean = torch.ones(dims, dtype=torch.float64) * math.sqrt(size / dims)
    return mean + noise * (0.5 + torch.rand(B, 1, generator=g, dtype=torch.float64))


def signal_of(rows: Tensor, parts: int = 1) -> GradientSignal:
    sums, counts = torch.zeros(5, dtype=torch.float64), Counts()
    for part in rows.chunk(parts):
        sums += sums_of(part @ part.T)
        counts = counts.plus(Counts.of(len(part)))
    total = rows.sum(0)
    return GradientSignal.of(float(total.dot(total)), sums.tolist(), counts)


def tabulated(steps: int, count: int, make: Callable[[], GradientSignal]) -> dict[str, Tensor]:
    rows = [parts_of([make() for _ in range(steps)]) for _ in range(count)]
    return {k: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in rows[0]}


@pytest.mark.parametrize("parts", [1, 4, 16])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_known_share_is_found_within_its_errors(share: float, parts: int) -> None:
    g, dims = torch.Generator().manual_seed(3), 60
    spread = 13 / 12  # the mean square of 1/2 + a uniform number
    truth = share / (share + (1 - share) * spread)
    found = tabulated(8, 300, lambda: signal_of(gradients(share, dims, g), parts))
    # Of parts of two, errors are those of eight steps from each other.
    check(found, truth, **({} if parts < 16 else {"often": 0.8}))


@pytest.mark.parametrize("dims", [3, 10])
def test_one_batch_is_biased_towards_zero_and_eight_are_not(dims: int) -> None:
    g, shift = torch.Generator().manual_seed(4), math.sqrt(1 / B)

    def step() -> GradientSignal:
        return signal_of(shift + torch.randn(B, dims, generator=g, dtype=torch.float64))

    raw = torch.tensor([(s := step()).norm / (s.noise + abs(s.norm)) for _ in range(500)])
    assert float(raw.mean()) < 0.45
    shares = tabulated(8, 500, step)["share"]
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("steps", [1, 3])
def test_numbers_of_several_steps_are_those_of_the_definition(steps: int) -> None:
    g = torch.Generator().manual_seed(5)
    rows = [0.3 + torch.randn(b, 4, generator=g, dtype=torch.float64) for b in (6, 7, 5)[:steps]]
    expected = reference.signal(*rows)
    found = parts_of([signal_of(r) for r in rows])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3 if name in SHARE else 1e-9)


def test_a_share_is_not_moved_by_a_step_whose_gradient_is_large() -> None:
    # As at the start of a training; leaving out steps one by one would correct 0.9 to 1.6.
    g = torch.Generator().manual_seed(6)
    steps = [signal_of(gradients(0.2, 60, g)) for _ in range(7)]
    large = signal_of(20 * gradients(0.9, 60, g))
    assert parts_of([large, *steps])["share"] == pytest.approx(parts_of([large])["share"], abs=0.02)


def test_few_examples_have_a_share_and_no_error() -> None:
    g = torch.Generator().manual_seed(0)
    parts = parts_of([signal_of(gradients(0.5, 10, g), parts=16)])
    assert math.isfinite(parts["share"])
    assert math.isnan(parts["share_error"])
    assert math.isnan(parts["share_low"])
    assert math.isnan(parts["noise_scale_low"])


def linear() -> tuple[nn.Linear, Draw]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), lambda: (torch.randn(8, 3), torch.randn(8, 1))


def test_a_share_needs_four_steps_and_forgets_those_before_its_window() -> None:
    model, draw_batch = linear()
    found: list[GradientSignal] = []
    monitor = monitor_of(model, squared, quantities=[Signal(window=5)])
    for _ in range(7):
        batch = draw_batch()
        monitor.step(*batch)
        found.append(monitor._statistics.signals()[""])
    rows = [row for _, row in monitor.rows]
    assert [row["signal/steps"] for row in rows] == [1, 2, 3, 4, 5, 5, 5]
    for name in ("share", "share_error"):
        assert [math.isnan(row[f"signal/{name}"]) for row in rows] == [True] * 3 + [False] * 4
    assert all(math.isfinite(row["signal/share_low"] + row["signal/snr"]) for row in rows)
    for name, value in parts_of(found[2:]).items():
        assert rows[-1][f"signal/{name}"] == pytest.approx(value)


def test_a_step_of_which_more_is_seen_later_counts_once() -> None:
    model, draw_batch = linear()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, every=1, quantities=[Signal()])
    for _ in range(3):
        for _ in range(3):
            x, y = draw_batch()
            squared(model(x), y).mean().backward()
            monitor.step(x, y)
        sgd.step()
        sgd.zero_grad()
    assert [row["signal/steps"] for _, row in monitor.rows] == [1, 2, 3]


def test_a_step_that_is_no_number_does_not_go_into_the_window() -> None:
    model, draw_batch = linear()
    monitor = monitor_of(model, squared, quantities=[Signal()])
    for bad in (False, True, False):
        x, y = draw_batch()
        monitor.step(x * math.nan if bad else x, y)
    rows = [row for _, row in monitor.rows]
    assert [row["signal/steps"] for row in rows] == [1, 1, 2]
    assert [math.isnan(row["signal/snr"]) for row in rows] == [False, True, False]


def test_another_run_begins_with_an_empty_window() -> None:
    signal = Signal()
    for steps, expected in ((3, 3), (2, 2)):
        model, draw_batch = linear()
        monitor = monitor_of(model, squared, quantities=[signal])
        for _ in range(steps):
            monitor.step(*draw_batch())
        assert monitor.rows[-1][1]["signal/steps"] == expected
    monitor.measure([draw_batch()], step=0)
    assert monitor.rows[-1][1]["signal/steps"] == 1


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).double()


@pytest.mark.parametrize("examples", [None, 6])
def test_gains_and_biases_have_a_signal_of_their_own(examples: int | None) -> None:
    model, x, y = normed(), torch.randn(10, 3).double(), torch.randn(10, 2).double()
    monitor = monitor_of(model, squared, quantities=[NormSignal(examples=examples, window=1)])
    monitor.step(x, y)
    small = [p for p in model.parameters() if p.ndim == 1]
    taken = reference.example_gradients(model, squared, x[:examples], y[:examples], small)
    expected = reference.signal(taken, batch=10)
    row = monitor.rows[0][1]
    assert set(row) == {f"norm_signal/{name}" for name in ("steps", *expected)}
    for name, value in expected.items():
        assert row[f"norm_signal/{name}"] == pytest.approx(
            value, rel=1e-3 if name in SHARE else 1e-6
        )


def test_a_signal_without_modules_is_that_of_all() -> None:
    model, x, y = normed(), torch.randn(10, 3).double(), torch.randn(10, 2).double()
    monitor = monitor_of(model, squared, quantities=[Signal(modules=False, window=1)])
    monitor.step(x, y)
    expected = reference.signal(reference.example_gradients(model, squared, x, y))
    row = monitor.rows[0][1]
    assert set(row) == {f"signal/{name}" for name in ("steps", *expected)}
    for name, value in expected.items():
        tol = 1e-3 if name in SHARE else 1e-6
        assert row[f"signal/{name}"] == pytest.approx(value, rel=tol)


def test_beside_a_loss_all_examples_are_looked_at() -> None:
    model, x, y = normed(), torch.randn(20, 3).double(), torch.randn(20, 2).double()
    monitor = monitor_of(model, squared, quantities=[Loss(), NormSignal(examples=4)])
    monitor.step(x, y)
    assert monitor.rows[0][1]["loss"] == pytest.approx(float(squared(model(x), y).detach().mean()))
    assert monitor._statistics.examples == monitor._statistics.batch == 20


def test_some_examples_of_inputs_by_name_with_ignored_labels() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x: dict[str, Any]) -> Tensor:
            return self.inner(x["a"] + x["scale"] * x["more"][0])

    torch.manual_seed(0)
    model, loss = Named(), nn.CrossEntropyLoss(reduction="none")
    x = {"a": torch.randn(9, 3), "scale": torch.ones(()), "more": (torch.randn(9, 3),)}
    y = torch.tensor([1, 2, -100, 0, 3, 1, -100, 2, 0])
    monitor = monitor_of(model, loss, quantities=[NormSignal(examples=5)])
    monitor.step(x, y)
    assert math.isfinite(monitor.rows[0][1]["norm_signal/snr"])
    assert (monitor._statistics.examples, monitor._statistics.batch) == (4, 7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Signal(window=0), ValueError, "window must be positive"),
        (lambda: NormSignal(window=True), TypeError, "window must be"),
        (lambda: NormSignal(examples=0), ValueError, "examples must be positive"),
        (
            lambda: monitor_of(linear()[0], squared, quantities=[Signal(), NormSignal()]),
            ValueError,
            r"Signal\(\) or NormSignal\(\), .* got both",
        ),
        (
            lambda: monitor_of(nn.Linear(3, 1, bias=False), squared, quantities=[NormSignal()]),
            ValueError,
            r"NormSignal\(\) needs trainable parameters of one dimension",
        ),
    ],
)
def test_bad_arguments_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_examples_one_by_one_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    params = dict(model.named_parameters())
    rows = []
    for size in (6, 1):
        found = Statistics(params)
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            found.add(model, squared, lambda m, v: m(v), xs, ys)
        rows.append({k: parts_of([s]) for k, s in found.signals().items()})
    for module, whole in rows[0].items():
        for name in ("snr", "noise_scale"):
            assert rows[1][module][name] == pytest.approx(whole[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = torch.randn(B, 8), 0.5 + torch.randn(B, 2)
    expected = row_of(model.double(), squared, x.double(), y.double())
    found = row_of(model.to(dtype), squared, x.to(dtype), y.to(dtype))
    tol = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.1)
    assert found["signal/share"] == pytest.approx(expected["signal/share"], abs=tol)
    assert found["signal/share_error"] == pytest.approx(expected["signal/share_error"], rel=2 * tol)
