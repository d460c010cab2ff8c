"""Whether the curves of a run still improve where it ends."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

SHARE, LEAST = 0.1, 5
"""The last tenth of the evaluations is looked at, and at least five."""
POINTS, RELATIVE = 1e-3, 5e-3
"""Gains over that stretch which count: a tenth of a point of a metric in percent, half a percent of
another, or of the loss. Ten times as much, at that pace, if training goes on as long again."""


class Improvement(NamedTuple):
    """How much better a run still became over its last evaluations.

    Attributes:
        by_loss: whether it is the test loss that shows it; else the metric.
        gain: mean over seeds, positive; a share of the loss where that shows it.
        epochs: that it took.
    """

    by_loss: bool
    gain: float
    epochs: int


def still_improving(
    rows: Iterable[Mapping[str, Any]], *, higher_is_better: bool, percent: bool
) -> Improvement | None:
    """How an arm still improves at its end; None if it does not, or no more than by chance.

    A line is fitted to the last evaluations of each seed. Its mean rise counts if it is more than
    the scatter of the evaluations about their lines, and that of the seeds, explain. Where the
    metric stands still the test loss, which is smoother, may tell.

    Args:
        rows: the epoch rows of one arm, ``epoch``, ``seed``, ``test_metric`` and, if there,
            ``test_loss``.
        higher_is_better: of the metric.
        percent: whether the metric is written in percent.
    """
    curves: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        curves[row["seed"]].append(row)
    last = [_last(curve) for curve in curves.values()]
    last = [curve for curve in last if len(curve) >= 2]
    if not last:
        return None
    epochs = last[0][-1]["epoch"] - last[0][0]["epoch"]
    sign = 1.0 if higher_is_better else -1.0
    metric = [[sign * row["test_metric"] for row in curve] for curve in last]
    size = 1.0 if percent else abs(fmean([y[-1] for y in metric]))
    gain = _clear_rise(metric)
    if gain is not None and gain >= (POINTS if percent else RELATIVE * size):
        return Improvement(False, gain, epochs)
    if (gain is not None and gain < 0) or any(row.get("test_loss") is None for row in last[0]):
        return None
    losses = [[-row["test_loss"] for row in curve] for curve in last]
    gain = _clear_rise(losses)
    level = abs(fmean([y[-1] for y in losses]))
    if gain is None or gain < RELATIVE * level or level == 0:
        return None
    return Improvement(True, gain / level, epochs)


def _last(curve: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    ordered = sorted(curve, key=lambda row: row["epoch"])
    return ordered[-max(LEAST, math.ceil(SHARE * len(ordered))) :]


def _clear_rise(curves: Sequence[Sequence[float]]) -> float | None:
    """Mean rise of lines fitted to the curves; None if it may be chance."""
    from scipy.stats import linregress, t

    if not all(math.isfinite(v) for y in curves for v in y):
        return None
    rises, errors = list[float](), list[float]()
    for y in curves:
        line = linregress(range(len(y)), y)
        rises.append(line.slope * (len(y) - 1))
        errors.append((line.stderr * (len(y) - 1)) ** 2)
    dof = sum(len(y) - 2 for y in curves)
    seeds, mean = len(rises), fmean(rises)
    if dof == 0 and seeds < 2:
        return None
    about_lines = math.sqrt(sum(errors)) / seeds
    bound = float(t.ppf(0.975, dof)) * about_lines if dof else 0.0
    if seeds > 1:
        among = sum((rise - mean) ** 2 for rise in rises) / (seeds - 1)
        bound = max(bound, 2 * math.sqrt(among / seeds))
    return mean if abs(mean) > bound else None
