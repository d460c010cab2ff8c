"""The signal's share is unbiased, and its errors are those that it has over draws of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk import RiskMonitor
from poprisk.monitor.signal import Counts, GradientSignal, sums_of
from poprisk.monitor.statistics import Statistics

B, DRAWS = 32, 150


def row_of(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, loss, sgd)
    monitor.step(x, y)
    return monitor.rows[0][1]


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


@pytest.mark.parametrize("name", CASES)
def test_pure_noise_has_no_share_on_average(name: str) -> None:
    make, shape, loss = CASES[name]
    torch.manual_seed(0)
    model = make()
    if name == "classes":
        nn.init.zeros_(model.weight)  # pyrefly: ignore
        nn.init.zeros_(model.bias)  # pyrefly: ignore
    g = torch.Generator().manual_seed(1)
    rows = [row_of(model, loss, *draw(model, shape, loss, g)) for _ in range(DRAWS)]
    shares = torch.tensor([row["signal/share"] for row in rows]).double()
    errors = torch.tensor([row["signal/share_error"] for row in rows]).double()
    over_draws = float(shares.std() / math.sqrt(DRAWS))
    assert abs(float(shares.mean())) < 3 * over_draws + 0.02
    assert over_draws < 0.06
    within = (shares.abs() < 2 * errors).double().mean()
    assert within > 0.85
    low = torch.tensor([row["signal/noise_scale_low"] for row in rows])
    high = torch.tensor([row["signal/noise_scale_high"] for row in rows])
    assert float((high == math.inf).double().mean()) > 0.9
    assert float(low.median()) > B / 2


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


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_known_share_is_found_within_its_errors(share: float, parts: int) -> None:
    g, dims, draws = torch.Generator().manual_seed(3), 60, 600
    spread = float(((0.5 + torch.rand(100_000, generator=g)) ** 2).mean())
    truth = share / (share + (1 - share) * spread)
    found = [signal_of(gradients(share, dims, g), parts) for _ in range(draws)]
    shares = torch.tensor([f.parts()["share"] for f in found]).double()
    errors = torch.tensor([f.parts()["share_error"] for f in found]).double()
    assert float(shares.mean()) == pytest.approx(truth, abs=0.03)
    # Parts of 8 say little of pairs; what is cut off at zero makes errors too large, never small.
    assert 0.75 < float(errors.square().mean().sqrt() / shares.std()) < 1.3 * parts**0.25
    assert float(((shares - truth).abs() < 2 * errors).double().mean()) > 0.9
    norms = torch.tensor([f.norm for f in found]).double()
    variances = torch.tensor([f.along + f.across for f in found]).double()
    assert 0.75 < float(variances.mean() / norms.var()) < 1.5 * math.sqrt(parts)
    if share:
        scale = B * (1 - truth) / truth
        ends = [(f.parts()["noise_scale_low"], f.parts()["noise_scale_high"]) for f in found]
        covered = sum(low < scale < high for low, high in ends) / draws
        assert covered > 0.9


def test_few_examples_have_a_share_and_no_error() -> None:
    g = torch.Generator().manual_seed(0)
    parts = signal_of(gradients(0.5, 10, g), parts=16).parts()
    assert math.isfinite(parts["share"])
    assert math.isnan(parts["share_error"])
    assert math.isnan(parts["noise_scale_low"])


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
        rows.append({k: s.parts() for k, s in found.signals().items()})
    for module, whole in rows[0].items():
        for name in ("share", "snr", "noise_scale"):
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
