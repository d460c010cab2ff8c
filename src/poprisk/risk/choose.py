"""When to stop and which arm to take, without validation data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from poprisk.printing import short_html, short_repr
from poprisk.risk.estimate import RiskEstimate
from poprisk.risk.grouped import grouped_error

Z = 1.5
"""Standard errors of their difference within which two estimates count as equal: chosen on twelve
problems, so that the interval holds the best moment of hindsight in nine runs of ten."""
NO_ESTIMATE = "there is no estimate to choose from; call twin.estimate(x, y) first."


class StoppingPoint(NamedTuple):
    """Where the estimated risk is least.

    Attributes:
        index: position in the sequence of estimates.
        low: first position that is not worse by more than :data:`Z` standard errors.
        high: last such position; those between ``low`` and ``high`` may be worse.
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
    _repr_html_ = short_html

    @property
    def value(self) -> float:
        """The estimated risk there."""
        return self.estimate.value

    @property
    def standard_error(self) -> float:
        """Of the value."""
        return self.estimate.standard_error

    @property
    def cost(self) -> float:
        """Of the estimates of the run, in trainings."""
        return self.estimate.cost


class Selection(NamedTuple):
    """The arm with the least estimated risk.

    Attributes:
        name: of the arm; None if no arm has a comparable estimate.
        point: where in its run.
        tied: other arms that are not worse by more than :data:`Z` standard errors.
        left_out: arms without any comparable estimate, and why.
        reason: why no arm was chosen; empty if one was.
        cost: in trainings: the other arms, and the estimates of all.
    """

    name: str | None
    point: StoppingPoint | None
    tied: list[str]
    left_out: dict[str, str]
    reason: str
    cost: float

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def valid(self) -> bool:
        """Whether an arm was chosen."""
        return self.name is not None

    @property
    def value(self) -> float:
        """The estimated risk of the chosen arm at its point; NaN if there is none."""
        return math.nan if self.point is None else self.point.value

    @property
    def standard_error(self) -> float:
        """Of the value."""
        return math.nan if self.point is None else self.point.standard_error


def stopping_point(estimates: Sequence[RiskEstimate]) -> StoppingPoint:
    r"""The comparable estimate of least value, before the run's first two in a row that are not.

    Past those the network interpolates its labels, and a later small value would be an accident.
    The interval holds every moment that the estimates cannot tell from that one: the error of a
    difference of two estimates is that of the leave-one-out losses of the same examples, pair by
    pair, and of what their responses, measured by the same signs, do not share.

    Args:
        estimates: of one run, in the order of training, on the same examples.

    Raises:
        TypeError: if they are no estimates.
        ValueError: if there is none, or they are not of the same examples.

    Example:
        >>> import math, torch
        >>> def estimate(value: float) -> RiskEstimate:
        ...     rest = (0.0, True, "", True, 2.0, value, 0.0, 0.0, 0.0, None, torch.zeros(2))
        ...     return RiskEstimate(value, *rest, torch.full((2,), value))
        >>> stopping_point([estimate(3.0), estimate(1.0), estimate(2.0)]).index
        1
    """
    _check_estimates(estimates)
    positions = comparable_positions([e.comparable for e in estimates])
    if not positions:
        return StoppingPoint(0, 0, 0, estimates[0], False, estimates[0].reason)
    best = min(positions, key=lambda i: estimates[i].value)
    reason = next((e.reason for e in estimates if not e.comparable), "")
    equal = [i for i in positions if _ties(estimates[i], estimates[best])]
    low, high = min(equal), max(equal)
    return StoppingPoint(best, low, high, estimates[best], True, reason)


def select(arms: Mapping[str, RiskEstimate | Sequence[RiskEstimate]]) -> Selection:
    """The arm (learning rate, weight decay, mask, width ...) of least estimated risk.

    An arm with several estimates counts at its own stopping point.

    Args:
        arms: by name, one estimate or those of a run; all of the same training examples.

    Raises:
        TypeError: if ``arms`` is no mapping to estimates.
        ValueError: if there is no arm, or they are not of the same examples.
    """
    if not isinstance(arms, Mapping):
        raise TypeError(
            f"arms must be a dict from names to estimates, but got {type(arms).__name__}."
        )
    if not arms:
        raise ValueError(NO_ESTIMATE)
    runs = {k: [v] if isinstance(v, RiskEstimate) else v for k, v in arms.items()}
    for run in runs.values():
        _check_estimates(run)
    _check_estimates([e for run in runs.values() for e in run])
    points = {name: stopping_point(run) for name, run in runs.items()}
    left_out = {name: p.reason for name, p in points.items() if not p.valid}
    usable = {name: p for name, p in points.items() if p.valid}
    cost = sum(1 + p.cost for p in points.values()) - 1
    if not usable:
        return Selection(None, None, [], left_out, "no arm has a comparable estimate", cost)
    best = min(usable, key=lambda name: usable[name].estimate.value)
    chosen = usable[best]
    tied = [k for k, p in usable.items() if k != best and _ties(p.estimate, chosen.estimate)]
    return Selection(best, chosen, tied, left_out, "", cost)


def _check_estimates(estimates: Any) -> None:
    """Raise unless there are estimates, all of equally many examples."""
    single = isinstance(estimates, (RiskEstimate, str)) or not isinstance(estimates, Iterable)
    found: list[Any] = [estimates] if single else list(estimates)
    strange = (e for e in found if not isinstance(e, RiskEstimate))
    wrong = next(strange, estimates if single else None)
    if wrong is not None:
        raise TypeError(
            "estimates must be a sequence of what twin.estimate(x, y) returned (RiskEstimate), but "
            f"got {type(wrong).__name__}: their values alone have no errors to compare."
        )
    if not found:
        raise ValueError(NO_ESTIMATE)
    if len({e.groups is None for e in found}) > 1:
        raise ValueError(
            "estimates with groups are for examples of new groups, and those without for new ones "
            "of the same; pass the same groups to all."
        )
    lengths = [len(e.losses) for e in found]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"estimates must be of the same training examples, but they are of {min(lengths)} to "
            f"{max(lengths)}; pass the same x and y each time."
        )


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
    """Whether the difference of two estimates is within :data:`Z` of its standard errors."""
    return other.value - best.value <= Z * difference_error(other, best)


def difference_error(a: RiskEstimate, b: RiskEstimate) -> float:
    r"""Standard error of the difference of two estimates of the same examples.

    .. math:: \mathrm{se}^2 = \frac1{n^2}\sum_i(\Delta\ell_i-\overline{\Delta\ell})^2
              + \sum_{k,i}(\rho_{ki}^a-\rho_{ki}^b)^2

    with each example's share ρ in the error of the response by probe k; what both share cancels.
    Those of runs with other signs, or other numbers of them, are independent.
    """
    rows = slice(None) if b.counted is None else b.counted
    change = (a.losses - b.losses)[rows]
    groups = a.groups if a.groups is not None else b.groups
    own = None if groups is None else groups[rows]
    sampling = grouped_error(change - change.mean(), own) / len(change)
    shared = a.signs == b.signs and a.influence.shape == b.influence.shape
    apart = [*(a.influence - b.influence)] if shared else [*a.influence, *b.influence]
    return math.hypot(sampling, *(grouped_error(row[rows], own) for row in apart))
