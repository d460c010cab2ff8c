"""Criteria and the verdict that follows from them, by one rule for all claims.

Ratios and differences are paired over seeds, with Student-t intervals (ratios: of the logarithms).
Runs that were stopped before they reached their goal are censored: their steps are compared up to
the horizon to which every run was watched, and their curves are those of Kaplan and Meier.

*Several criteria.* "Reproduced" takes all primary criteria at once, each with its whole 95%
interval: such a conjunction (an intersection–union test) needs no correction for their number.
Whatever is read one by one, controls included, stands uncorrected, and the page says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from poprisk.intervals import Interval, t_interval
from poprisk_lab.plots import Columns, Line, Table, mean_cells
from poprisk_lab.results import Results

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly reproduced", "not reproduced"
UNDECIDED = "undecided"

AS_CLAIMED = "as claimed"
SMALLER = "smaller than claimed"
OPEN = "open"
CONTRARY = "does not hold"


class Criterion(NamedTuple):
    """One thing that must hold.

    Attributes:
        name: of the quantity.
        estimate: our figure with its 95% interval; NaN ends where there is none.
        threshold: the bound that the whole interval must keep for it to hold at all.
        claimed: the size that the paper gives; None if it gives none, or ``threshold`` is it.
        at_most: whether small values are good.
        primary: whether it is part of the claim; the others are controls.
        percent: whether to write values times 100.
    """

    name: str
    estimate: Interval
    threshold: float
    claimed: float | None = None
    at_most: bool = False
    primary: bool = True
    percent: bool = False

    @property
    def outcome(self) -> str:
        """As claimed, smaller than claimed, open, or does not hold.

        It holds if the whole interval keeps the threshold, and is as claimed if the interval
        reaches ``claimed``; it does not hold if no point of the interval keeps the threshold.
        """
        sign = -1.0 if self.at_most else 1.0
        ends = (sign * self.estimate.low, sign * self.estimate.high)
        low, high = min(ends), max(ends)
        if math.isnan(low) or math.isnan(high):
            return OPEN
        if high < sign * self.threshold:
            return CONTRARY
        if low < sign * self.threshold:
            return OPEN
        if self.claimed is not None and high < sign * self.claimed:
            return SMALLER
        return AS_CLAIMED

    @property
    def holds(self) -> bool:
        """Whether the whole interval keeps the threshold."""
        return self.outcome in (AS_CLAIMED, SMALLER)


def at_least(name: str, estimate: Interval, threshold: float, **more: bool) -> Criterion:
    """A primary criterion: the estimate keeps a lower bound."""
    return Criterion(name, estimate, threshold, **more)


def at_most(name: str, estimate: Interval, threshold: float, **more: bool) -> Criterion:
    """A primary criterion: the estimate keeps an upper bound."""
    return Criterion(name, estimate, threshold, at_most=True, **more)


def controls(*criteria: Criterion) -> list[Criterion]:
    """The criteria as controls, which do not decide the verdict."""
    return [c._replace(primary=False) for c in criteria]


def verdict(criteria: Sequence[Criterion]) -> str:
    """The verdict that follows from the primary criteria.

    *Reproduced*: all of them as claimed. *Not reproduced*: none holds. *Partly*: some hold, or
    hold with a smaller size. *Undecided*: there is no interval to judge by, or one of them has too
    few seeds for it.

    Example:
        >>> verdict([Criterion("faster", Interval(5.0, 4.0, 6.0), threshold=1.0, claimed=5.0)])
        'reproduced'
    """
    primary = [c for c in criteria if c.primary]
    if any(c.estimate.few for c in primary) or all(math.isnan(c.estimate.low) for c in primary):
        return UNDECIDED
    if all(c.outcome == AS_CLAIMED for c in primary):
        return REPRODUCED
    return PARTLY if any(c.holds for c in primary) else NOT_REPRODUCED


def fewest_seeds(criteria: Sequence[Criterion]) -> int | None:
    """Seeds behind the primary criterion that has too few for an interval; None if none has."""
    return min((len(c.estimate.values) for c in criteria if c.primary and c.estimate.few),
               default=None)  # fmt: skip


def point(value: float) -> Interval:
    """A figure that is exact: an identity's error, a count."""
    return Interval(value, value, value)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """Mean of ``a`` minus ``b`` over the seeds that both have, with its paired interval."""
    return t_interval([a[seed] - b[seed] for seed in a if seed in b])


def mean_over(groups: Iterable[Mapping[int, float]]) -> Interval:
    """Mean over seeds of the means over the groups in which a seed has a figure.

    Example:
        >>> mean_over([{0: 1.0, 1: 4.0}, {0: 3.0}]).values
        (2.0, 4.0)
    """
    by_seed = dict[int, list[float]]()
    for group in groups:
        for seed, value in group.items():
            by_seed.setdefault(seed, []).append(value)
    return t_interval(fmean(values) for values in by_seed.values())


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


def either_way(r: Interval) -> Interval:
    """The interval of a ratio as that of the factor by which two figures differ: at least 1.

    Example:
        >>> either_way(Interval(0.5, 0.25, 2.0))
        Interval(mean=2.0, low=1.0, high=4.0, values=())
    """
    ends = sorted(max(v, 1 / v) for v in (r.low, r.high)) if r.low == r.low else [r.low, r.high]
    low = 1.0 if r.low <= 1 <= r.high else ends[0]
    values = tuple(max(v, 1 / v) for v in r.values)
    return Interval(max(r.mean, 1 / r.mean), low, ends[1], values)


def worst_factor(groups: Sequence[Results], a: str, b: str) -> Interval:
    r"""By which factor two positive figures differ, in the group where they differ most.

    The interval is of the geometric mean over trials of :math:`e^{|\log(a/b)|} \ge 1`.
    """
    logs = [[abs(math.log(d.metrics[a] / d.metrics[b])) for d in group] for group in groups]
    return max((t_interval(values).mapped(math.exp) for values in logs), key=lambda i: i.mean)


def worst_ratio(groups: Sequence[Results], a: str, b: str) -> Interval:
    """By which factor the geometric mean of a / b differs from 1, in the worst group.

    What should be positive and was measured below 0 counts as next to nothing.
    """
    pairs = [
        ({seed: max(v, 1e-9) for seed, v in group.by_seed(a).items()}, group.by_seed(b))
        for group in groups
    ]
    return max((either_way(ratio(*pair)) for pair in pairs), key=lambda i: i.mean)


def _check_positive(values: Collection[float]) -> None:
    if any(value <= 0 for value in values):
        raise ValueError("a ratio needs positive values, but got one that is not.")


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 if one of them does not vary."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(spearmanr(a, b).statistic)


class Steps(NamedTuple):
    """When runs reached a goal, or that they had not when they were stopped (censored).

    Attributes:
        reached: step by seed; None where it was not reached.
        limit: steps after which the run was stopped, by seed.
    """

    reached: Mapping[int, int | None]
    limit: Mapping[int, int]

    @classmethod
    def of(cls, results: Results, *, key: str = "reached") -> Steps:
        """Those that trials found under this key, and their ``limit``."""
        return cls(results.by_seed(key), results.by_seed("limit"))

    @property
    def censored(self) -> int:
        """How many runs did not reach the goal."""
        return sum(step is None for step in self.reached.values())

    @property
    def horizon(self) -> float:
        """The least number of steps of a run that did not reach the goal; ∞ if all did."""
        return min((self.limit[s] for s, r in self.reached.items() if r is None), default=math.inf)

    def up_to(self, horizon: float) -> dict[int, float]:
        """Steps to the goal or to the horizon, whichever comes first, by seed."""
        return {
            s: float(min(self.limit[s] if r is None else r, horizon))
            for s, r in self.reached.items()
        }


def speed_up(slow: Steps, fast: Steps) -> Interval:
    r"""How many times fewer steps ``fast`` needs up to the common horizon, paired over seeds.

    The geometric mean of :math:`\min(T_{slow}, \tau)/\min(T_{fast}, \tau)`, where τ is the least
    number of steps after which a run was given up: the steps restricted to τ, which are known for
    every run. Where all runs got there, τ = ∞ and it is the ratio of the steps. Unknown (NaN) if
    no run of either side got there within τ.
    """
    horizon = min(slow.horizon, fast.horizon)
    steps = slow.up_to(horizon), fast.up_to(horizon)
    shared = [seed for seed in steps[0] if seed in steps[1]]
    if all(found[seed] >= horizon for found in steps for seed in shared):
        return Interval(math.nan, math.nan, math.nan)
    return ratio(*steps)


def log_rank(a: Steps, b: Steps) -> float:
    """p-value of the log-rank test that both sides reach the goal alike; NaN if none did."""
    from scipy.stats import logrank

    if a.censored == len(a.reached) and b.censored == len(b.reached):
        return math.nan
    return float(logrank(_censored(a), _censored(b)).pvalue)


def restricted_mean(steps: Steps) -> float:
    """Mean steps up to the horizon: the area under the curve of Kaplan and Meier."""
    times, left = survival(steps)
    end = steps.horizon if math.isfinite(steps.horizon) else times[-1]
    inside = [(t, s) for t, s in zip(times, left, strict=True) if t < end]
    ends = [*(t for t, _ in inside[1:]), end]
    return sum(s * (b - t) for (t, s), b in zip(inside, ends, strict=True))


def survival(steps: Steps) -> tuple[list[float], list[float]]:
    """Kaplan and Meier: steps at which the share of runs not there yet falls, and the share."""
    from scipy.stats import ecdf

    found = ecdf(_censored(steps)).sf
    return [0.0, *map(float, found.quantiles)], [1.0, *map(float, found.probabilities)]


def survival_line(name: str, steps: Steps, colour: str, *, dash: str = "solid") -> Line:
    """The share of runs that have not reached the goal yet, as a staircase from step 1 on."""
    times, left = survival(steps)
    x = [t for t in times[1:] for _ in (0, 1)]
    y = [s for pair in itertools.pairwise(left) for s in pair]
    return Line(name, [1.0, *x], [1.0, *y], colour, dash)


def _censored(steps: Steps) -> Any:
    from scipy.stats import CensoredData

    known = steps.up_to(math.inf)
    cut = [step is None for step in steps.reached.values()]
    return CensoredData.right_censored([*known.values()], cut)


def steps_table(
    corner: str,
    groups: Mapping[str, Results],
    against: Callable[[str], Results | None],
    columns: Columns,
    *,
    settings: Mapping[str, str] | None = None,
    percent: Collection[str] = (),
    steps: str = "reached",
    keep_all: bool = False,
    about: str = "",
) -> Table:
    """When the runs of each group reached the goal, and whether that differs from another group.

    Args:
        corner: name of the first column.
        groups: the runs of each row, by its name.
        against: the group that a group is compared with by the log-rank test; None for none.
        columns: further columns, as of :func:`poprisk_lab.plots.tabulate`.
        settings: columns of a setting that the runs of a group share.
        percent: columns written times 100.
        steps: key of the step at which the goal was reached.
        keep_all: whether groups of which no run got there have a row; else the caption counts them.
        about: the caption.
    """
    rows, never, shared = list[list[str]](), 0, settings or {}
    for name, runs in groups.items():
        own, other = Steps.of(runs, key=steps), against(name)
        there = len(own.reached) - own.censored
        if not there and not keep_all:
            never += 1
            continue
        bound = f" up to {own.horizon:,.0f}" if own.censored else ""
        p = math.nan if other is None else log_rank(own, Steps.of(other, key=steps))
        rows.append([
            name,
            f"{there} of {len(own.reached)}",
            f"{restricted_mean(own):,.0f}{bound}" if there else "",
            "" if math.isnan(p) else f"{p:.2g}",
            *(f"{runs[0].settings[key]:g}" for key in shared.values()),
            *mean_cells(runs, columns, percent=percent),
        ])  # fmt: skip
    left_out = f" {never} settings of which no run got there have no row." if never else ""
    head = [corner, "got there", "mean steps (Kaplan-Meier)", "log-rank p", *shared, *columns]
    return Table(head, rows, about + left_out)
