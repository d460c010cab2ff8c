"""The curves of a comparison: quantities over epochs as panels that share a legend."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from poprisk.intervals import t_interval
from poprisk_lab.page import draw
from poprisk_lab.page.series import Series
from poprisk_lab.plots import Line, Plot, interval_line, thinned

POINTS = 300  # epochs drawn at most
LOG_FROM = 30.0  # largest over smallest mean from which an axis is logarithmic


class Group(NamedTuple):
    """Figures side by side, by their titles, that share a legend: a button for each series."""

    figures: dict[str, Markup]
    series: Sequence[Series]


class PanelQuantity(NamedTuple):
    """What a panel shows.

    Attributes:
        title: in words.
        key: where an epoch row has it.
        percent: whether it is written in percent.
        share: whether it lies between 0 and 1, so that bands are cut there.
        stops: whether to mark where early stopping stopped.
    """

    title: str
    key: str
    percent: bool
    share: bool
    stops: bool = False


def group(series: Sequence[Series], quantities: Iterable[PanelQuantity]) -> Group | None:
    """Draw the quantities as panels side by side; None if there is nothing to draw."""
    found = [drawn for q in quantities if (drawn := epoch_plot(q, series)) is not None]
    figures = {plot.title: draw.figure(plot, shown=shown, legend=False) for plot, shown in found}
    return Group(figures, series) if figures else None


def epoch_plot(quantity: PanelQuantity, series: Sequence[Series]) -> tuple[Plot, list[bool]] | None:
    """A quantity over epochs, and which lines to show at first; None if it has no value."""
    lines, shown = list[Line](), list[bool]()
    for s in series:
        line = epoch_line(s.label, s.rows, quantity.key, s.colour, dash=s.dash)
        if quantity.share:
            line = line._replace(low=[max(v, 0.0) for v in line.low],
                                 high=[min(v, 1.0) for v in line.high])  # fmt: skip
        lines.append(line)
        if quantity.stops and s.stops:
            epochs, values = zip(*s.stops, strict=True)
            lines.append(Line(s.label, epochs, values, s.colour, kind="marks"))
        shown += [s.shown] * (len(lines) - len(shown))
    if not any(math.isfinite(v) for line in lines for v in line.mean):
        return None
    log = not quantity.percent and _is_wide(
        [line for line, visible in zip(lines, shown, strict=True) if visible]
    )
    plot = Plot(quantity.title, "epoch", "", lines, "", log_y=log, percent=quantity.percent)
    return plot, shown


def epoch_line(
    name: str, rows: Iterable[Mapping[str, Any]], key: str, colour: str, *, dash: str = "solid"
) -> Line:
    """The mean of ``key`` over epochs: first over the arms of a seed, then over seeds.

    Rows where it is None do not count; at most :data:`POINTS` epochs are kept.
    """
    cells: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[key] is not None:
            cells[row["epoch"]][row["seed"]].append(row[key])
    epochs = sorted(cells)
    epochs = [epochs[i] for i in thinned(len(epochs), POINTS)]
    pooled = [t_interval([sum(v) / len(v) for v in cells[e].values()]) for e in epochs]
    return interval_line(name, epochs, pooled, colour, dash=dash)


def _is_wide(lines: Iterable[Line]) -> bool:
    values = [v for line in lines for v in line.mean if math.isfinite(v)]
    return bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)
