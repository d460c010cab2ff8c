"""Curves of several seeds as one line with a band."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poprisk.intervals import t_interval
from poprisk_lab.studies.claim import Curve


def mean_curve(
    name: str,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    colour: str,
    *,
    dash: str = "solid",
) -> Curve:
    """The mean over seeds with its 95% interval at each point; no band for fewer than three seeds.

    The band of a quantity that is nowhere negative, a norm or an error, stays at 0 and above.

    Args:
        name: in the legend.
        x: of the points.
        rows: a row a seed, as long as ``x``.
        colour: a colour name of the page.
        dash: of the line.

    Example:
        >>> mean_curve("a", [0, 1], [[1.0, 2.0], [3.0, 2.0]], "adamw").y
        [2.0, 2.0]
    """
    found = [t_interval(column) for column in zip(*rows, strict=True)]
    mean = [i.mean for i in found]
    if not any(i.known for i in found):
        return Curve(name, x, mean, colour, dash)
    if all(v >= 0 for row in rows for v in row):
        found = [i.clipped(0.0, math.inf) for i in found]
    return Curve(name, x, mean, colour, dash, [i.low for i in found], [i.high for i in found])


def thinned(count: int, points: int) -> list[int]:
    """Positions of at most so many of ``count`` entries, evenly spread, both ends included.

    Example:
        >>> thinned(9, 3)
        [0, 4, 8]
    """
    return sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})


def rounded(values: Sequence[float]) -> list[float]:
    """To five significant digits, for the record."""
    return [float(f"{v:.5g}") for v in values]
