"""What the terms of a loss hold in balance is not charged: the bound, its limits, whole tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import MASKS, settings
from poprisk import PopRiskAdamW
from poprisk.optim.balance import Balance, unbalanced
from poprisk.optim.gate import momentum_noise
from poprisk.optim.settings import compiled
from poprisk.optim.update import CHUNK
from reference.optimizer import ReferenceTerms

SIZES: dict[str, Any] = {
    "batch_size": {"data": 8, "inside": 8},
    "dataset_size": {"data": 24, "inside": None},
}
EXACT = Balance(kept=0.0, kept_terms=0.0, scale_terms=1.0, most=1.0)


def factor(
    balance: Balance, *rows: Tensor, mean_scale: float = 1.0, var_scale: float = 1.0
) -> float:
    lists = [[x] for x in rows]
    return float(unbalanced(balance, lists, mean_scale=mean_scale, var_scale=var_scale))


def step(optimizer: PopRiskAdamW, w: Tensor, data: Tensor, inside: Tensor) -> None:
    optimizer.zero_grad()
    for name, grad in (("data", data), ("inside", inside)):
        with optimizer.term(name):
            (w * grad).sum().backward()
    optimizer.step()


# --- the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("b", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_it_bounds_what_is_left_of_the_error_in_a_quadratic(
    a: float, b: float, t: float, start: float
) -> None:
    """Gradient flow from many starts, each on a sample of its own: d' = error - (a + b) d."""
    generator = torch.Generator().manual_seed(0)
    error, begin = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    e, fitted = math.exp(-(a + b) * t), error / (a + b)
    d = fitted + e * (start * begin - fitted)
    m, repeated = (a + b) * d - error, a * d - error
    nothing = torch.zeros_like(m)
    kappa = factor(EXACT, m.square(), nothing, nothing, repeated.square())
    left = -float((m * error).mean() / error.square().mean())
    assert left == pytest.approx(e, abs=0.02 * (1 + start * (a + b)))
    assert e - 0.02 <= kappa <= 1.0
    if start == 0:
        assert kappa == pytest.approx(min(1.0, e * (a + b) / (b + a * e)), rel=1e-9)


def test_the_noise_of_the_batches_is_taken_off_both() -> None:
    m, s, c, h = (torch.tensor(x) for x in ([2.0, 1.0], [4.0, 2.0], [1.0, 3.0], [6.0, 2.0]))
    balance = Balance(kept=0.1, kept_terms=0.2, scale_terms=1.5, most=0.5)
    moved = 1.25**2 * 3.0 - 0.1 * 2.0 * 6.0
    held = 1.5**2 * 8.0 - 0.2 * 2.0 * 4.0
    found = factor(balance, m, s, c, h, mean_scale=1.25, var_scale=2.0)
    assert found == pytest.approx(math.sqrt(0.5 * moved / held), rel=1e-12)


@pytest.mark.parametrize(
    ("m", "s", "h", "expected"),
    [(0.0, 0.0, 1.0, 0.0), (1.0, 20.0, 1.0, 0.0), (9.0, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0),
     (0.0, 0.0, 0.0, 1.0)],
)  # fmt: skip
def test_it_is_a_share_and_whole_where_nothing_is_seen(
    m: float, s: float, h: float, expected: float
) -> None:
    rows = (torch.tensor(x) for x in (m, s, 0.0, h))
    assert factor(EXACT._replace(kept=0.1), *rows) == expected


def test_h_is_corrected_for_the_steps_that_it_has_seen() -> None:
    """Terms may come in the middle of a run."""
    group = PopRiskAdamW([Parameter(torch.zeros(1))], **SIZES).param_groups[0]
    now = compiled(group)
    gate = now.gate(now.counts(30, 4))
    assert gate is not None
    assert gate.charges is not None
    kept, kept_terms = (momentum_noise(t, 0.9) / (1 + momentum_noise(30, 0.9)) for t in (30, 5))
    expected = Balance(kept, kept_terms, 1 / (1 - 0.9**5), 0.5)
    assert gate.charges.balance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", [{"mode": "paper"}, {"alpha": 0.3}, {"alpha": "fresh"}])
def test_thresholds_to_the_letter_know_no_balance(changes: dict[str, Any]) -> None:
    group = PopRiskAdamW([Parameter(torch.zeros(1))], **SIZES, **changes).param_groups[0]
    now = compiled(group)
    gate = now.gate(now.counts(30, 29))
    assert gate is not None
    assert gate.charges is None or gate.charges.balance is None


@pytest.mark.parametrize("reduction", [None, "per_tensor"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ratios", [(24, None), (24, 60)])
def test_equals_the_reference_where_terms_oppose(
    mask: str, reduction: str | None, ratios: tuple[int, int | None]
) -> None:
    sizes = {**SIZES, "dataset_size": dict(zip(("data", "inside"), ratios, strict=True))}
    given = settings(**sizes, mask=mask, reduction=reduction)
    generator = torch.Generator().manual_seed(5)
    always, left, *noise = torch.randn(82, 6, generator=generator, dtype=torch.float64)
    w = Parameter(torch.ones(6, dtype=torch.float64))
    optimizer, reference = PopRiskAdamW([w], **given), ReferenceTerms(w, **given)
    for one, other in zip(noise[::2], noise[1::2], strict=True):
        grads = {"data": 2 * always + 0.5 * one, "inside": 0.4 * left - 2 * always + 0.5 * other}
        step(optimizer, w, **grads)
        expected = reference.step_terms(grads)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-12)


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [None, "per_tensor"])
def test_a_fresh_term_of_no_weight_changes_nothing(reduction: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    w, plain = (Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2))
    told = PopRiskAdamW([w], **settings(**SIZES, reduction=reduction))
    one = PopRiskAdamW([plain], **settings(batch_size=8, dataset_size=24, reduction=reduction))
    always = 0.6 * torch.randn(40, generator=generator, dtype=torch.float64)
    for _ in range(40):
        grad = always + torch.randn(40, generator=generator, dtype=torch.float64)
        step(told, w, grad, torch.zeros_like(grad))
        plain.grad = grad
        one.step()
    torch.testing.assert_close(w.detach(), plain.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("held", [0.0, 1.0])
def test_what_is_held_in_balance_is_charged_as_fresh(held: float) -> None:
    """Gradients of the data that the other term cancels, but for a small common part."""
    generator = torch.Generator().manual_seed(2)

    def draw() -> Tensor:
        return torch.randn(4000, generator=generator, dtype=torch.float64)

    w, always = Parameter(torch.zeros(4000, dtype=torch.float64)), 0.5**0.5 * draw()
    optimizer = PopRiskAdamW([w], lr=0.0, mask="hard", **SIZES)
    for _ in range(200):
        step(optimizer, w, always + draw(), 0.6 - held * always + 0.1 * draw())
    passed = optimizer.gate_stats()["groups[0]"].pass_rate
    r, m_sd = 0.1 / 1.9, math.sqrt(0.5 * (1 - held) + 0.1 / 1.9)
    kappa = 1.0 if held == 0 else 0.6 / math.sqrt(0.5)
    edge = 1.5 * math.sqrt(r * 1.01 + 0.5 * kappa)
    normal = torch.distributions.Normal(0.6, m_sd)
    expected = 1 - float(normal.cdf(torch.tensor(edge)) - normal.cdf(torch.tensor(-edge)))
    assert passed == pytest.approx(expected, abs=0.03)


def test_a_tensor_that_would_be_cut_is_looked_at_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    n = CHUNK + 1000
    ends = []
    grads = [torch.randn(2, n, generator=generator) for _ in range(6)]
    tilt = torch.linspace(-1, 1, n)
    for foreach in (True, False):
        w = Parameter(torch.zeros(n))
        optimizer = PopRiskAdamW([w], lr=0.1, foreach=foreach, **SIZES)
        for data, inside in grads:
            step(optimizer, w, data + 2 * tilt, 0.3 * inside - tilt.clamp_min(0) * 2)
        stats = optimizer.gate_stats()["groups[0]"]
        ends.append((w.detach(), stats))
        mask = optimizer.step_rule(w, _context(optimizer, w)).precondition
        assert isinstance(mask, Tensor)
        assert float((mask > 0).double().mean()) == pytest.approx(stats.pass_rate, abs=1e-3)
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-9)
    assert 0.01 < ends[0][1].pass_rate < 0.9


def _context(optimizer: PopRiskAdamW, w: Tensor) -> Any:
    from poprisk.optim.step import StepContext

    grad = w.grad
    assert grad is not None
    at = {
        "first": False,
        "update": torch.zeros_like(w),
        "grad": grad,
        "weight": w,
        "momentum": grad,
    }
    return StepContext(optimizer.param_groups[0], optimizer.state[w], **at)
