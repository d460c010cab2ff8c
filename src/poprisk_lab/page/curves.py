"""Means over seeds, epoch by epoch, with 95% intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from poprisk.intervals import t_interval

EpochRow = Mapping[str, Any]


class Curve(NamedTuple):
    """A quantity over epochs.

    Attributes:
        epochs: epochs at which at least one seed has a value, ascending.
        mean: mean over seeds; not finite where one of the seeds is not.
        low: lower end of the 95% interval (Student's t); NaN with one seed.
        high: upper end.
    """

    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(rows: Iterable[EpochRow], key: str) -> Curve:
    """Pool ``key`` of the epoch rows: first over the arms of a seed, then over seeds.

    Rows where it is None do not count.
    """
    cells: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[key] is not None:
            cells[row["epoch"]][row["seed"]].append(row[key])
    epochs = sorted(cells)
    pooled = [t_interval([_mean(v) for v in cells[e].values()]) for e in epochs]
    return Curve(
        epochs, [p.mean for p in pooled], [p.low for p in pooled], [p.high for p in pooled]
    )


def thin(curve: Curve, points: int) -> Curve:
    """Keep about ``points`` evenly spaced epochs, the first and the last among them."""
    n = len(curve.epochs)
    if n <= points:
        return curve
    keep = sorted({round(i * (n - 1) / (points - 1)) for i in range(points)})
    mean, low, high = ([column[i] for i in keep] for column in curve[1:])
    return Curve([curve.epochs[i] for i in keep], mean, low, high)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
