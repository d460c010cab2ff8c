"""Plots, pictures and tables as data: studies, comparisons and explanations make them, pages draw.

Every number over seeds is a mean with its 95% interval: a band of a line, or a cell of a table.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from poprisk.intervals import Interval, t_interval
from poprisk_lab.results import Key, Results, TrialResult


class Line(NamedTuple):
    """One line of a plot.

    Attributes:
        name: in the legend; empty to leave it out.
        x: as many as ``mean``.
        mean: NaN where there is none.
        colour: a colour name of the page (``poprisk``, ``adamw``, ``peer``, ``other`` …).
        dash: ``"solid"``, ``"dash"`` or ``"dot"``.
        low: lower end of a band around the line; empty for none.
        high: upper end.
        kind: ``"line"``, ``"points"``, ``"marks"`` (large ones), or ``"area"``: stacked on the
            areas before it.
    """

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    colour: str
    dash: str = "solid"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    kind: str = "line"


class Plot(NamedTuple):
    """A plot.

    Attributes:
        title: of the figure.
        x: name of the axis.
        y: name of the axis.
        lines: drawn in this order.
        about: the caption.
        log_x: whether the axis is logarithmic, labelled by decades.
        log_y: likewise.
        percent: whether y is written times 100.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    about: str
    log_x: bool = False
    log_y: bool = False
    percent: bool = False


class Picture(NamedTuple):
    """A picture: its title, a PNG in base64, and its caption."""

    title: str
    png: str
    about: str


class Table(NamedTuple):
    """A table: the names of its columns, and its rows, whose first cell names them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""

    def csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()


def points(name: str, x: Sequence[float], y: Sequence[float], colour: str) -> Line:
    """Markers in place of a line."""
    return Line(name, x, y, colour, kind="points")


def interval_line(
    name: str, x: Sequence[float], found: Sequence[Interval], colour: str, *, dash: str = "solid"
) -> Line:
    """Means with the band of their intervals; without one where no interval is known."""
    mean = [i.mean for i in found]
    if not any(i.known for i in found):
        return Line(name, x, mean, colour, dash)
    return Line(name, x, mean, colour, dash, [i.low for i in found], [i.high for i in found])


def seeds_line(
    name: str,
    x: Sequence[float],
    rows: Sequence[Sequence[float]],
    colour: str,
    *,
    dash: str = "solid",
) -> Line:
    """The mean over seeds with its 95% interval at each point; no band for fewer than three seeds.

    The band of a quantity that is nowhere negative, a norm or an error, stays at 0 and above.

    Args:
        name: in the legend.
        x: of the points.
        rows: a row a seed, as long as ``x``.
        colour: a colour name of the page.
        dash: of the line.

    Example:
        >>> seeds_line("a", [0, 1], [[1.0, 2.0], [3.0, 2.0]], "adamw").mean
        [2.0, 2.0]
    """
    found = [t_interval(column) for column in zip(*rows, strict=True)]
    if all(v >= 0 for row in rows for v in row):
        found = [i.clipped(0.0, math.inf) for i in found]
    return interval_line(name, x, found, colour, dash=dash)


def metric_line(
    name: str, results: Results, x: Key, y: Key, colour: str, *, dash: str = "solid"
) -> Line:
    """What trials of several seeds found under ``y``, a list, over what they found under ``x``."""
    return seeds_line(name, results[0].figure(x), results.all(y), colour, dash=dash)


Columns = Mapping[str, Key | Callable[[TrialResult], float | None]]
"""By the name of a column, the figure that stands in it, or what makes it of a trial."""


def tabulate(
    corner: str,
    groups: Mapping[str, Results],
    columns: Columns,
    *,
    percent: Collection[str] = (),
    about: str = "",
) -> Table:
    """A row for each group of trials, a column for each figure: means with their intervals.

    Args:
        corner: name of the first column.
        groups: the trials of each row, by its name.
        columns: a trial whose figure is None does not count.
        percent: columns written times 100.
        about: the caption.
    """
    rows = [[name, *mean_cells(some, columns, percent=percent)] for name, some in groups.items()]
    return Table([corner, *columns], rows, about)


def mean_cells(results: Results, columns: Columns, *, percent: Collection[str] = ()) -> list[str]:
    """The mean of each figure over trials, with its interval, as text; empty where none has it."""
    cells = []
    for name, of in columns.items():
        found = [of(d) if callable(of) else d.figure(of) for d in results]
        values = [value for value in found if value is not None]
        cells.append(written(t_interval(values), percent=name in percent) if values else "")
    return cells


def written(interval: Interval, *, percent: bool = False) -> str:
    """An interval as text: ``5.1 [4.2, 6.3]``, the figure alone where it has no width.

    Without one, for want of seeds, the figure with the seeds behind it: ``5 (4 and 6)``.
    """
    unit = 100.0 if percent else 1.0
    mean, low, high = (_number(unit * v) + "%" * percent for v in interval[:3])
    if interval.few and len(interval.values) > 1:
        seeds = [_number(unit * v) + "%" * percent for v in interval.values]
        return f"{mean} ({' and '.join(seeds)})"
    if not interval.known or low == mean == high:
        return mean
    return f"{mean} [{low}, {high}]"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def thinned(count: int, points: int) -> list[int]:
    """Positions of at most so many of ``count`` entries, evenly spread, both ends included.

    Example:
        >>> thinned(9, 3)
        [0, 4, 8]
    """
    if count <= points:
        return list(range(count))
    return sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})


def rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    """To significant digits, for records and plots."""
    return [short(v, digits) for v in values]


def short(value: float, digits: int = 5) -> float:
    """A number to so many significant digits."""
    return float(f"{value:.{digits}g}")


def short_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of values over seeds with its 95% interval, for a record; under three there is none."""
    found = t_interval(values)
    ends = (found.low, found.high) if math.isfinite(found.low) else (None, None)
    low, high = (None if end is None else short(end) for end in ends)
    return {"mean": short(found.mean), "low": low, "high": high}
