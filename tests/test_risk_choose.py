"""Stopping and selection follow the estimates, and keep away from invalid ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from poprisk import RiskCurve, TwinRisk
from poprisk.risk.choose import StoppingPoint, difference_error, select, stopping_point
from poprisk.risk.estimate import RiskEstimate
from samplers import randn

N = 400


def estimate(value: float, *, reason: str = "", seed: int = 0, noise: float = 0.0) -> RiskEstimate:
    deviation = randn(N, seed=seed)
    losses = value + noise * (deviation - deviation.mean())
    return RiskEstimate(
        value=value,
        standard_error=0.1,
        valid=False,
        reason=reason,
        comparable=not reason,
        cost=1.0,
        train_loss=value,
        response=0.0,
        dof=0.0,
        dof_error=0.0,
        accuracy=None,
        outputs=torch.zeros(N, 1),
        losses=losses,
    )


def run(values: list[float], invalid: tuple[int, ...] = ()) -> list[RiskEstimate]:
    return [estimate(v, reason="deep" if i in invalid else "") for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "invalid", "index", "reason"),
    [
        ([3, 1, 2], (), 1, ""),
        ([3, 2, 1], (), 2, ""),
        ([3, 1, 2], (1,), 2, "deep"),
        ([3, 2, 4, 5, 1], (2, 3), 1, "deep"),
        ([3, 2, 4, 1.5, 5], (2, 4), 3, "deep"),
        ([3, 2, 1, 0.5], (2, 3), 1, "deep"),
    ],
)
def test_the_least_comparable_value_before_two_that_are_not(
    values: list[float], invalid: tuple[int, ...], index: int, reason: str
) -> None:
    point = stopping_point(run(values, invalid))
    assert (point.index, point.reason, point.valid) == (index, reason, True)
    assert point.estimate.value == values[index]


def test_no_comparable_estimate_is_said() -> None:
    point = stopping_point(run([3, 1], (0, 1)))
    assert (point.valid, point.index, point.reason) == (False, 0, "deep")


def test_values_that_are_not_numbers_are_never_chosen() -> None:
    point = stopping_point([estimate(math.nan, reason="not finite"), estimate(2.0)])
    assert point.index == 1


def test_the_interval_is_what_pairs_of_losses_cannot_tell_apart() -> None:
    spread = 0.05 * math.sqrt(N)  # one standard error of a difference is 0.05
    values = [1.5, 1.07, 1.0, 1.05, 1.08, 1.02]
    estimates = [estimate(v, seed=i, noise=spread) for i, v in enumerate(values)]
    estimates[2] = estimate(1.0)
    assert stopping_point(estimates)[:3] == (2, 1, 5)  # 1.08 is worse, 1.02 after it is not
    assert stopping_point([estimate(v) for v in values])[:3] == (2, 2, 2)


def test_the_arm_of_least_risk_is_selected() -> None:
    spread = 0.05 * math.sqrt(N)
    chosen = select(
        {
            "a": [estimate(2.0), estimate(1.05, seed=1, noise=spread), estimate(3.0)],
            "b": [estimate(1.5), estimate(1.0), estimate(1.2)],
            "c": estimate(1.3),
            "d": [estimate(0.2, reason="deep"), estimate(0.1, reason="deep")],
        }
    )
    assert chosen.name == "b"
    assert chosen.point is not None
    assert (chosen.point.index, chosen.point.estimate.value) == (1, 1.0)
    assert chosen.tied == ["a"]
    assert chosen.left_out == {"d": "deep"}
    assert (chosen.value, chosen.standard_error, chosen.reason) == (1.0, 0.1, "")
    assert chosen.valid
    assert chosen.cost == 3 + 4  # the three other arms, and a twin of each of the four


def test_no_arm_is_selected_where_none_is_valid() -> None:
    chosen = select({"a": estimate(1.0, reason="deep")})
    assert chosen[:4] == (None, None, [], {"a": "deep"})
    assert not chosen.valid
    assert chosen.reason == "no arm has a comparable estimate"
    assert math.isnan(chosen.value)
    assert math.isnan(chosen.standard_error)


def test_the_error_of_a_difference_is_what_the_two_do_not_share() -> None:
    """Losses pair by pair, and of the responses, measured by the same signs, what differs."""
    a, b = estimate(1.0, seed=1, noise=1.0), estimate(1.1, seed=2, noise=2.0)
    rho = 0.01 * randn(2, N, seed=3)
    change = a.losses - b.losses
    sampling = float(change.std()) / math.sqrt(N)
    scale = math.sqrt(N / (N - 1))
    for share in (0.0, 1.0, 0.4):
        mine, other = replace(a, influence=rho), replace(b, influence=share * rho)
        apart = (1 - share) * float(rho.norm()) * scale
        assert difference_error(mine, other) == pytest.approx(math.hypot(sampling, apart))
    independent = replace(b, influence=rho, signs=1)
    both = float(rho.norm()) * scale * math.sqrt(2)
    assert difference_error(replace(a, influence=rho), independent) == pytest.approx(
        math.hypot(sampling, both)
    )


def test_dependent_examples_and_uncounted_ones_widen_the_error() -> None:
    a, b = estimate(1.0, seed=1, noise=1.0), estimate(1.1)
    twice = replace(a, losses=torch.cat([a.losses, a.losses]), groups=torch.arange(N).repeat(2))
    other = replace(b, losses=torch.cat([b.losses, b.losses]))
    assert difference_error(twice, other) == pytest.approx(difference_error(a, b))
    counted = torch.arange(2 * N) < N
    gone = torch.zeros(N, dtype=torch.float64)
    part = replace(a, losses=torch.cat([a.losses, gone]), counted=counted)
    rest = replace(b, losses=torch.cat([b.losses, gone]), counted=counted)
    assert difference_error(part, rest) == pytest.approx(difference_error(a, b))


def test_a_flat_curve_has_a_wide_interval() -> None:
    """The response, wrong by its error, tilts the whole curve: its minimum may lie anywhere."""
    rho = randn(1, N, seed=3)
    rho = rho / rho.norm()
    values = [1.34, 1.24, 1.23, 1.25, 1.26, 1.27, 1.28]
    run = [replace(estimate(v), influence=0.02 * i * rho) for i, v in enumerate(values)]
    assert stopping_point(run)[:3] == (2, 1, 6)
    certain = [replace(e, influence=0 * rho) for e in run]
    assert stopping_point(certain)[:3] == (2, 2, 2)


def test_the_interval_holds_the_best_moment_in_hindsight() -> None:
    """A few hundred noisy examples and one probe: the curve is flat within its errors."""
    found = [flat_run(seed) for seed in range(5)]
    assert sum(point.low <= best <= point.high for point, best in found) >= 4
    assert all(point.high > point.low for point, _ in found)  # which is best cannot be known


def flat_run(seed: int) -> tuple[StoppingPoint, int]:
    """Where a run would be stopped, and where its true risk is least."""
    g = torch.Generator().manual_seed(70 + seed)
    x = torch.randn(5200, 8, generator=g)
    clean = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] - (x[:, 3] > 0).float()
    y = (clean + 0.8 * torch.randn(5200, generator=g)).unsqueeze(1)
    torch.manual_seed(seed)
    twin = TwinRisk(
        lambda: nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 1)),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
        lambda u, y: (u - y).square().mean(1),
        dataset_size=200,
    )
    estimates, true = list[RiskEstimate](), list[float]()
    for _ in range(20):
        for index in torch.randperm(200).split(20):
            for r in twin.runs(index):
                r.optimizer.zero_grad()
                r.loss(r.model(x[index]), y[index]).mean().backward()
                r.optimizer.step()
        estimates.append(twin.estimate(x[:200], y[:200]))
        fresh = (twin.model(x[200:]).detach().squeeze(1) - clean[200:]).square().mean()
        true.append(float(fresh) + 0.64)
    return stopping_point(estimates), min(range(20), key=true.__getitem__)


@pytest.mark.parametrize("values", [[1.0, 2.0], [estimate(1.0), 2.0], 1.0, estimate(1.0), "abc"])
def test_what_is_no_estimate_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match=r"estimates must be a sequence .* \(RiskEstimate\)"):
        stopping_point(values)
    if not isinstance(values, RiskEstimate):
        with pytest.raises(TypeError, match="estimates must be a sequence"):
            select({"a": values})
    with pytest.raises(TypeError, match="arms must be a dict"):
        select(values)


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no estimate to choose from"):
        stopping_point([])
    with pytest.raises(ValueError, match="there is no estimate to choose from"):
        select({})


def test_estimates_of_other_examples_are_refused() -> None:
    other = estimate(1.0)
    shorter = replace(other, losses=other.losses[:30])
    with pytest.raises(ValueError, match="same training examples, but they are of 30 to 400"):
        stopping_point([other, shorter])


def test_estimates_with_and_without_groups_are_refused_together() -> None:
    a, b = estimate(1.0), replace(estimate(1.1), groups=torch.arange(N) // 2)
    with pytest.raises(ValueError, match="pass the same groups to all"):
        stopping_point([a, b])
    with pytest.raises(ValueError, match="pass the same groups to all"):
        select({"a": a, "b": b})


def test_a_curve_of_an_earlier_version_does_not_order_groups() -> None:
    curve = RiskCurve()
    curve.add(1, replace(estimate(1.0), groups=torch.arange(N) // 2), nn.Linear(1, 1))
    state = curve.state_dict()
    del state["estimates"][0]["intraclass"]
    curve.load_state_dict(state)
    (found,) = curve.estimates
    assert (found.valid, found.comparable) == (False, False)
    assert "earlier version" in found.reason
