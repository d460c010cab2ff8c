"""Losses without curvature: a valid estimate is near the true risk, a known gain is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import RiskEstimate, TwinRisk
from poprisk.risk.estimate import TwinOutputs, estimate_risk
from poprisk.risk.local_losses import BENT, bend_of, is_bent, local_loss_of
from samplers import randn

Loss = Callable[[Tensor, Tensor], Tensor]
N, FRESH, CLASSES = 300, 20_000, 3


def pinball(share: float) -> Loss:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        r = y - u[:, 0]
        return torch.maximum(share * r, (share - 1) * r)

    return loss


def smooth_l1(beta: float) -> Loss:
    return lambda u, y: F.smooth_l1_loss(u[:, 0], y, beta=beta, reduction="none")


def quantiles(u: Tensor, y: Tensor) -> Tensor:
    return sum((pinball(q)(u[:, i : i + 1], y) for i, q in enumerate((0.1, 0.5, 0.9))), 0 * y)


def hinge(u: Tensor, y: Tensor) -> Tensor:
    return (1 - (2.0 * (y > 0) - 1) * u[:, 0]).clamp_min(0)


def hinge_per_class(u: Tensor, y: Tensor) -> Tensor:
    return (1 - (2 * F.one_hot(y, CLASSES).to(u) - 1) * u).clamp_min(0).mean(1)


REGRESSION: dict[str, tuple[Loss, int]] = {
    "absolute": (lambda u, y: (u[:, 0] - y).abs(), 1),
    "pinball 0.1": (pinball(0.1), 1),
    "pinball 0.5": (pinball(0.5), 1),
    "pinball 0.9": (pinball(0.9), 1),
    "three quantiles": (quantiles, 3),
    "epsilon-insensitive": (lambda u, y: ((u[:, 0] - y).abs() - 0.5).clamp_min(0), 1),
    "smooth L1, 0.01": (smooth_l1(0.01), 1),
    "smooth L1, 0.1": (smooth_l1(0.1), 1),
    "smooth L1, 1": (smooth_l1(1.0), 1),
    "squared": (lambda u, y: (u[:, 0] - y).square(), 1),
    "Cauchy": (lambda u, y: (u[:, 0] - y).square().log1p(), 1),
    "Welsch": (lambda u, y: 1 - (-(u[:, 0] - y).square() / 2).exp(), 1),
}
CLASSIFICATION: dict[str, tuple[Loss, int]] = {
    "hinge": (hinge, 1),
    "squared hinge": (lambda u, y: hinge(u, y).square(), 1),
    "hinge per class": (hinge_per_class, CLASSES),
    "multi-margin": (lambda u, y: F.multi_margin_loss(u, y, reduction="none"), CLASSES),
    "focal": (lambda u, y: focal(u, y), CLASSES),
    "absolute error of probabilities": (
        lambda u, y: (u.softmax(1) - F.one_hot(y, CLASSES)).abs().sum(1),
        CLASSES,
    ),
    "cross-entropy": (lambda u, y: F.cross_entropy(u, y, reduction="none"), CLASSES),
}
CURVED = {"squared", "Cauchy", "Welsch", "smooth L1, 1", "cross-entropy", "focal", "squared hinge"}


def focal(u: Tensor, y: Tensor) -> Tensor:
    cost = F.cross_entropy(u, y, reduction="none")
    return (1 - (-cost).exp()).square() * cost


class Problem(NamedTuple):
    """A training set, and how good outputs are on fresh examples like it."""

    x: Tensor
    y: Tensor
    fresh: tuple[Tensor, Tensor]


def numbers(seed: int) -> Problem:
    """A sine and a product, heavy-tailed noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + FRESH, 6, generator=g)
    noise = torch.randn(len(x), generator=g) * (0.5 + torch.rand(len(x), generator=g))
    y = torch.sin(x @ torch.randn(6, generator=g)) + 0.5 * x[:, 0] * x[:, 1] + noise
    return Problem(x[:N], y[:N], (x[N:], y[N:]))


def classes(seed: int) -> Problem:
    """Three classes by a softmax of linear scores."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + FRESH, 6, generator=g)
    p = (x @ torch.randn(6, CLASSES, generator=g)).softmax(1)
    y = torch.multinomial(p, 1, generator=g)[:, 0]
    return Problem(x[:N], y[:N], (x[N:], y[N:]))


def trained(problem: Problem, loss: Loss, outputs: int) -> list[tuple[RiskEstimate, float]]:
    """Estimates along a run, each with the true risk."""
    torch.manual_seed(0)
    twin = TwinRisk(
        lambda: nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, outputs)),
        lambda m: torch.optim.AdamW(m.parameters(), lr=2e-2),
        loss,
        dataset_size=N,
    )
    found = []
    for epoch in range(24):
        for index in torch.randperm(N).split(60):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(problem.x[index]), problem.y[index]).mean().backward()
                run.optimizer.step()
        if epoch % 6 == 5:
            with torch.no_grad():
                true = float(loss(twin.model(problem.fresh[0]), problem.fresh[1]).mean())
            found.append((twin.estimate(problem.x, problem.y), true))
    return found


CASES = {
    **{f"{k}, numbers": (numbers, *v) for k, v in REGRESSION.items()},
    **{f"{k}, classes": (classes, *v) for k, v in CLASSIFICATION.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_valid_estimates_are_near_the_true_risk(name: str) -> None:
    make, loss, outputs = CASES[name]
    found = trained(make(11), loss, outputs)
    for estimate, true in found:
        if estimate.valid:
            assert abs(estimate.value - true) <= 3 * estimate.standard_error + 0.1 * true
        assert estimate.valid == (not estimate.reason)
        assert not estimate.value > 1e3  # no gain without a bound stands for one that is unknown
    assert sum(e.valid for e, _ in found) >= 2
    if name.split(", ")[0] not in CURVED:
        gap = [true - e.train_loss for e, true in found if e.valid]
        closed = [e.value - e.train_loss for e, _ in found if e.valid]
        assert sum(closed) > 0.4 * sum(gap)  # not the training loss with another name


def pulled(loss: Loss, without: Tensor, y: Tensor, gain: float, push: Tensor) -> Tensor:
    """Outputs of least ``loss - push·u + |u - without|²/2A``, by bisection on a convex loss."""
    low, high = without - 1e3, without + 1e3
    for _ in range(200):
        u = ((low + high) / 2).requires_grad_()
        (g,) = torch.autograd.grad(loss(u, y).sum(), u)
        up = g - push + (u.detach() - without) / gain < 0
        low, high = torch.where(up, u.detach(), low), torch.where(up, high, u.detach())
    return (low + high) / 2


@pytest.mark.parametrize("width", [1e-3, 0.03, 10.0])
def test_the_gain_is_exact_whatever_the_curvature(width: float) -> None:
    """Nearly an absolute error, all curvature within ``width`` of the label; and a wide one."""

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return ((u - y).square() + width**2).sqrt().sum(1)

    n, gain = 400, 0.5
    without, y = randn(n, 1), randn(n, 1, seed=1)
    push = 0.3 * (2.0 * torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(2)) - 1)
    u = pulled(loss, without, y, gain, torch.zeros(n, 1))
    twin = TwinOutputs(pulled(loss, without, y, gain, push.double()), push.double())
    found = estimate_risk(loss, u, y, [twin])
    rtol = 1e-6 if width < 1 else 0.01  # by gradients exactly, by curvature up to the push's size
    torch.testing.assert_close(found.outputs, without, rtol=rtol, atol=rtol)
    assert found.value == pytest.approx(float(loss(without, y).mean()), rel=rtol)
    if width == 1e-3:
        fitted = float(((without - y).abs() < gain).double().mean())
        assert found.dof == pytest.approx(fitted, abs=0.06)
        assert found.response == pytest.approx(gain * (1 - found.dof), rel=1e-6)


def test_both_ways_agree_for_squared_error(monkeypatch: pytest.MonkeyPatch) -> None:
    n, z = 100, 2.0 * (torch.arange(100).unsqueeze(1) % 2).double() - 1
    y = randn(n, 1)
    u = 0.3 * y + 0.1 * randn(n, 1, seed=1)
    twin = TwinOutputs(u + 0.1 * z + 0.05 * randn(n, 1, seed=2), 0.6 * z)
    squared: Loss = lambda u, y: (u - y).square().sum(1)  # noqa: E731
    curved = estimate_risk(squared, u, y, [twin])
    monkeypatch.setattr("poprisk.risk.local_losses.BENT", -1.0)
    plain = estimate_risk(squared, u, y, [twin])
    assert plain.value == pytest.approx(curved.value, rel=1e-12)
    assert plain.dof == pytest.approx(curved.dof, rel=1e-12)
    assert plain.dof_error == pytest.approx(curved.dof_error, rel=1e-12)
    # The same error of the gain, up to its curvature over one standard error.
    mine, other = (float(e.influence.norm()) for e in (plain, curved))
    assert mine == pytest.approx(other, rel=0.05)
    torch.testing.assert_close(plain.influence / mine, curved.influence / other)


def test_a_part_without_curvature_has_a_gain_of_its_own() -> None:
    n = 600
    without, y = randn(n, 1), 3 * randn(n, 1, seed=1)
    parts = torch.arange(n) % 2
    gains = torch.tensor([0.2, 0.6]).double()[parts].unsqueeze(1)
    loss: Loss = lambda u, y: (u - y).abs().sum(1)  # noqa: E731
    z = 2.0 * torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(0)).double() - 1

    def out(push: Tensor) -> Tensor:
        r = without + gains * push - y
        return y + r.sign() * (r.abs() - gains).clamp_min(0)

    u, twin = out(torch.zeros_like(z)), TwinOutputs(out(0.3 * z), 0.3 * z)
    split = estimate_risk(loss, u, y, [twin], parts=parts)
    free = (u != y).squeeze(1)
    moved = (split.outputs - u)[free].abs().squeeze(1)
    first, second = (float(moved[parts[free] == k].median()) for k in range(2))
    assert second > 1.8 * first
    assert split.parts[0].response < split.parts[1].response


def test_what_bends_is_told_by_more_than_half() -> None:
    assert 0.4 < BENT < 0.6  # quadratic: 0; without curvature: 1


def test_a_loss_that_can_be_negative_is_limited_by_its_spread() -> None:
    """A Gaussian likelihood: its value crosses zero, a ratio to it says nothing."""
    n = 400
    y, z = randn(n, 1), 2.0 * (torch.arange(n).unsqueeze(1) % 2).double() - 1
    verdicts = []
    for shift in (0.0, -0.5, -5.0):
        loss: Loss = lambda u, y, shift=shift: ((u - y).square() / 2 + shift).sum(1)  # noqa: E731
        deep = estimate_risk(loss, 0.6 * y, y, [TwinOutputs(0.6 * (y + 0.3 * z), 0.3 * z)])
        fine = estimate_risk(loss, 0.1 * y, y, [TwinOutputs(0.1 * (y + 0.3 * z), 0.3 * z)])
        verdicts.append((deep.comparable, "deep interpolation" in deep.reason, fine.valid))
        assert math.isfinite(deep.value)
    assert verdicts == [(False, True, True)] * 3


def test_examples_that_nothing_holds_do_not_raise_the_gain() -> None:
    """Sure logits go far without a gradient; the gain is that of examples that still pull."""
    n, gain, far, delta = 400, 0.3, 8.0, 0.3
    y = torch.arange(n) % 2
    sure = torch.arange(n) % 4 < 2
    u = torch.where(sure, 6.0, 0.5) * (2.0 * y.double() - 1) + 0.5 * randn(n, 1)[:, 0]
    z = 2.0 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(2)).double() - 1
    logistic: Loss = lambda u, y: F.binary_cross_entropy_with_logits(  # noqa: E731
        u[:, 0], y.double(), reduction="none"
    )
    p = u.sigmoid()
    held = gain / (1 + gain * p * (1 - p))
    moved = torch.where(sure, far, held) * delta * z
    push = (delta * z).unsqueeze(1)
    twin = TwinOutputs((u + moved).unsqueeze(1), push)
    u = u.unsqueeze(1)
    found = estimate_risk(logistic, u, y, [twin])
    assert is_bent([bend_of(logistic, local_loss_of(logistic, u, y), u, y, moved.unsqueeze(1))])
    g = p - y
    gains = ((found.outputs - u)[:, 0] / g)[~sure]
    assert gain < float(gains.mean()) < 1.5 * gain  # the response of all is 15 times as large
