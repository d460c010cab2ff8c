"""Stopping and selection follow the estimates, and keep away from invalid ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from poprisk.risk.choose import select, stopping_point
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
        cost=2.0,
        train_loss=value,
        response=0.0,
        freedom=0.0,
        freedom_error=0.0,
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
    values = [1.5, 1.09, 1.0, 1.05, 1.11, 1.02]
    estimates = [estimate(v, seed=i, noise=spread) for i, v in enumerate(values)]
    estimates[2] = estimate(1.0)
    assert stopping_point(estimates)[:3] == (2, 1, 5)  # 1.11 is worse, 1.02 after it is not
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


def test_no_arm_is_selected_where_none_is_valid() -> None:
    chosen = select({"a": estimate(1.0, reason="deep")})
    assert chosen == (None, None, [], {"a": "deep"})


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
