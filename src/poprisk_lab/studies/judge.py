"""From numbers to a verdict: reproduced, partly, or not reproduced, by one rule for all claims."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from poprisk.intervals import Interval, t_interval

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly reproduced", "not reproduced"
UNDECIDED = "undecided"

AS_CLAIMED = "as claimed"
SMALLER = "smaller than claimed"
OPEN = "open"
CONTRARY = "does not hold"


class Criterion(NamedTuple):
    """One thing that must hold.

    Attributes:
        asks: what must hold, in words.
        found: our figure with its 95% interval; NaN ends where there is none.
        needed: the bound that the whole interval must keep for it to hold at all.
        claimed: the size that the paper gives; None if it gives none, or ``needed`` is it.
        at_most: whether small values are good.
        decides: whether it is part of the claim; the others are controls.
        percent: whether to write values times 100.
    """

    asks: str
    found: Interval
    needed: float
    claimed: float | None = None
    at_most: bool = False
    decides: bool = True
    percent: bool = False

    @property
    def outcome(self) -> str:
        """As claimed, smaller than claimed, open, or does not hold.

        It holds if the whole interval keeps ``needed``, and is as claimed if the interval reaches
        ``claimed``; it does not hold if no point of the interval keeps ``needed``.
        """
        sign = -1.0 if self.at_most else 1.0
        ends = (sign * self.found.low, sign * self.found.high)
        low, high = min(ends), max(ends)
        if math.isnan(low) or math.isnan(high):
            return OPEN
        if high < sign * self.needed:
            return CONTRARY
        if low < sign * self.needed:
            return OPEN
        if self.claimed is not None and high < sign * self.claimed:
            return SMALLER
        return AS_CLAIMED


def verdict(criteria: Sequence[Criterion]) -> str:
    """The verdict that follows from the criteria that decide.

    *Reproduced*: all of them as claimed. *Not reproduced*: none holds. *Partly*: some hold, or
    hold with a smaller size. *Undecided*: there is no interval to judge by, or one of them has too
    few seeds for it.

    Example:
        >>> verdict([Criterion("faster", Interval(5.0, 4.0, 6.0), needed=1.0, claimed=5.0)])
        'reproduced'
    """
    deciding = [c for c in criteria if c.decides]
    outcomes = [c.outcome for c in deciding]
    if any(c.found.few for c in deciding) or all(math.isnan(c.found.low) for c in deciding):
        return UNDECIDED
    if all(outcome == AS_CLAIMED for outcome in outcomes):
        return REPRODUCED
    return PARTLY if {AS_CLAIMED, SMALLER} & set(outcomes) else NOT_REPRODUCED


def fewest_seeds(criteria: Sequence[Criterion]) -> int | None:
    """Seeds behind the deciding criterion that has too few for an interval; None if none has."""
    return min((len(c.found.values) for c in criteria if c.decides and c.found.few), default=None)


def point(value: float) -> Interval:
    """A figure that is exact: an identity's error, a count."""
    return Interval(value, value, value)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """Mean of ``a`` minus ``b`` over the seeds that both have, with its paired interval."""
    return t_interval([a[seed] - b[seed] for seed in a if seed in b])


def ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """Geometric mean of ``a / b`` over the seeds that both have, with its paired interval.

    Raises:
        ValueError: if a value is not positive.
    """
    shared = [seed for seed in a if seed in b]
    _check_positive([*(a[seed] for seed in shared), *(b[seed] for seed in shared)])
    return geometric([a[seed] / b[seed] for seed in shared])


def geometric(values: Collection[float]) -> Interval:
    """Geometric mean with its interval, which reaches as far up as down in ratio.

    Raises:
        ValueError: if a value is not positive.

    Example:
        >>> round(geometric([0.01, 0.1, 1.0]).mean, 6)
        0.1
    """
    _check_positive(values)
    return t_interval([math.log(value) for value in values]).mapped(math.exp)


def _check_positive(values: Collection[float]) -> None:
    if any(value <= 0 for value in values):
        raise ValueError("a ratio needs positive values, but got one that is not.")


class Steps(NamedTuple):
    """When runs reached a goal, or that they had not when they were stopped.

    Attributes:
        reached: step by seed; None where it was not reached.
        limit: steps after which the run was stopped, by seed.
    """

    reached: Mapping[int, int | None]
    limit: Mapping[int, int]

    @property
    def censored(self) -> int:
        """How many runs did not reach the goal."""
        return sum(step is None for step in self.reached.values())

    def at_least(self) -> dict[int, float]:
        """The step, or the limit where the goal was not reached: a lower bound."""
        return {s: float(self.limit[s] if r is None else r) for s, r in self.reached.items()}


def speed_up(slow: Steps, fast: Steps) -> Interval:
    """How many times fewer steps ``fast`` needs, paired over seeds.

    A slow run that never reached the goal counts with the steps it had: the mean is then a lower
    bound and the interval open above; unknown (NaN) if the fast run had needed more. A fast run
    that never got there has no bound to offer: the ratio is 0 if, on any such seed, the slow one
    got there within the steps that the fast one had, and unknown otherwise.
    """
    lost = [seed for seed, step in fast.reached.items() if step is None]
    if lost:
        times = [(slow.reached.get(seed), fast.limit[seed]) for seed in lost]
        beaten = any(step is not None and step <= limit for step, limit in times)
        return point(0.0 if beaten else math.nan)
    cut = [seed for seed, step in slow.reached.items() if step is None and seed in fast.reached]
    steps = slow.at_least(), fast.at_least()
    if any(steps[0][seed] < steps[1][seed] for seed in cut):
        return point(math.nan)
    found = ratio(*steps)
    return found._replace(high=math.inf) if cut else found


def where_both(slow: Steps, fast: Steps) -> Interval:
    """How many times fewer steps ``fast`` needs on the seeds on which both got there."""
    slow_steps, fast_steps = (
        {seed: float(step) for seed, step in steps.reached.items() if step is not None}
        for steps in (slow, fast)
    )
    return ratio(slow_steps, fast_steps)


def written(interval: Interval, *, percent: bool = False) -> str:
    """An interval in words: ``5.1 [4.2, 6.3]``, the figure alone where it has no width.

    Without one, for want of seeds, the figure with the seeds behind it: ``5 (4 and 6)``.
    """
    unit = 100.0 if percent else 1.0
    texts = [_number(unit * v) + "%" * percent for v in interval[:3]]
    if interval.few and len(interval.values) > 1:
        seeds = [_number(unit * v) + "%" * percent for v in interval.values]
        return f"{texts[0]} ({' and '.join(seeds)})"
    if not interval.known or interval.low == interval.high:
        return texts[0]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
