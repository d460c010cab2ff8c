"""When to stop and which arm to take, without validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from poprisk.checks import risk as inputs
from poprisk.printing import short_repr
from poprisk.risk.estimate import RiskEstimate, grouped_error

Z = 2.0
"""Standard errors within which two estimates count as equal."""


class StoppingPoint(NamedTuple):
    """Where the estimated risk is least.

    Attributes:
        index: position in the sequence of estimates.
        low: first position around it that is not worse by more than two standard errors.
        high: last such position.
        estimate: the one at ``index``.
        valid: whether any estimate was comparable.
        reason: why the search ended where it did; empty if all estimates were comparable.
    """

    index: int
    low: int
    high: int
    estimate: RiskEstimate
    valid: bool
    reason: str

    __repr__ = short_repr


class Selection(NamedTuple):
    """The arm with the least estimated risk.

    Attributes:
        name: of the arm; None if no arm has a comparable estimate.
        point: where in its run.
        tied: other arms that are not worse by more than two standard errors.
        left_out: arms without any comparable estimate, and why.
    """

    name: str | None
    point: StoppingPoint | None
    tied: list[str]
    left_out: dict[str, str]

    __repr__ = short_repr


def stopping_point(estimates: Sequence[RiskEstimate]) -> StoppingPoint:
    r"""The comparable estimate of least value, before the run's first two in a row that are not.

    Past those the network interpolates its labels, and a later small value would be an accident.
    The interval compares the leave-one-out losses of the same examples, pair by pair.

    Args:
        estimates: of one run, in the order of training, on the same examples.

    Raises:
        ValueError: if there is none, or they are not of the same examples.

    Example:
        >>> import math, torch
        >>> def estimate(value: float) -> RiskEstimate:
        ...     rest = (0.0, True, "", True, 2.0, value, 0.0, 0.0, 0.0, None, torch.zeros(2))
        ...     return RiskEstimate(value, *rest, torch.full((2,), value))
        >>> stopping_point([estimate(3.0), estimate(1.0), estimate(2.0)]).index
        1
    """
    inputs.check_estimates([len(e.losses) for e in estimates])
    positions = comparable_positions([e.comparable for e in estimates])
    if not positions:
        return StoppingPoint(0, 0, 0, estimates[0], False, estimates[0].reason)
    best = min(positions, key=lambda i: estimates[i].value)
    reason = next((e.reason for e in estimates if not e.comparable), "")
    low = high = best
    while low - 1 in positions and _ties(estimates[low - 1], estimates[best]):
        low -= 1
    while high + 1 in positions and _ties(estimates[high + 1], estimates[best]):
        high += 1
    return StoppingPoint(best, low, high, estimates[best], True, reason)


def select(arms: Mapping[str, RiskEstimate | Sequence[RiskEstimate]]) -> Selection:
    """The arm (learning rate, weight decay, mask, width ...) of least estimated risk.

    An arm with several estimates counts at its own stopping point.

    Args:
        arms: by name, one estimate or those of a run; all of the same training examples.

    Raises:
        ValueError: if there is no arm, or they are not of the same examples.
    """
    runs = {k: [v] if isinstance(v, RiskEstimate) else list(v) for k, v in arms.items()}
    inputs.check_estimates([len(e.losses) for run in runs.values() for e in run])
    points = {name: stopping_point(run) for name, run in runs.items()}
    left_out = {name: p.reason for name, p in points.items() if not p.valid}
    usable = {name: p for name, p in points.items() if p.valid}
    if not usable:
        return Selection(None, None, [], left_out)
    best = min(usable, key=lambda name: usable[name].estimate.value)
    chosen = usable[best]
    tied = [k for k, p in usable.items() if k != best and _ties(p.estimate, chosen.estimate)]
    return Selection(best, chosen, tied, left_out)


def comparable_positions(comparable: Sequence[bool]) -> list[int]:
    """Positions of a run's comparable estimates, before the first two in a row that are not."""
    positions: list[int] = []
    for i, usable in enumerate(comparable):
        if usable:
            positions.append(i)
        elif i and not comparable[i - 1]:
            break
    return positions


def _ties(other: RiskEstimate, best: RiskEstimate) -> bool:
    """Whether the mean difference of the losses is within two of its standard errors."""
    difference = other.losses - best.losses
    mean = float(difference.mean())
    return mean <= Z * grouped_error(difference - mean, None) / len(difference)
