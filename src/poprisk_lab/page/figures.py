"""The curves, as Plotly figures without colours: the page paints them for light and dark.

A trace names the colour it wants in ``meta``: ``page.css`` defines it as ``--c-<name>``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup

from poprisk_lab.page.curves import Curve, curve, thin
from poprisk_lab.page.series import DASHES, OURS, Series

POINTS = 300  # epochs drawn at most
NAME = "<extra></extra><b>%{fullData.name}</b><br>"  # not the name itself: it may hold %{
LOG_FROM = 30.0  # largest over smallest mean from which an axis is logarithmic


class Panel(NamedTuple):
    """One plot: its title and its figure as JSON."""

    title: str
    figure: Markup


class Button(NamedTuple):
    """A button of the legend: it shows and hides the traces of one series."""

    label: str
    colour: str
    dashes: str
    shown: bool
    index: int
    thick: bool


class Group(NamedTuple):
    """Plots side by side that share a legend."""

    panels: list[Panel]
    buttons: list[Button]


class Quantity(NamedTuple):
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


def group(series: Sequence[Series], quantities: Iterable[Quantity]) -> Group | None:
    """Draw the quantities as panels side by side; None if there is nothing to draw."""
    panels = [_panel(q, series) for q in quantities]
    buttons = [
        Button(s.label, s.colour, DASHES[s.dash], s.shown, i, s.colour == OURS)
        for i, s in enumerate(series)
    ]
    drawn = [p for p in panels if p is not None]
    return Group(drawn, buttons) if drawn else None


def _panel(quantity: Quantity, series: Sequence[Series]) -> Panel | None:
    curves = [thin(curve(s.rows, quantity.key), POINTS) for s in series]
    if not any(math.isfinite(v) for c in curves for v in c.mean):
        return None
    log = not quantity.percent and _is_wide(
        [c for c, s in zip(curves, series, strict=True) if s.shown]
    )
    bands: list[go.Scatter] = []
    lines: list[go.Scatter] = []
    for i, (s, c) in enumerate(zip(series, curves, strict=True)):
        common = {"meta": {"series": i, "colour": s.colour}, "visible": s.shown}
        if any(map(math.isfinite, c.low)):
            bands.append(_band(c, quantity, common, log=log))
        lines.append(_line(c, s, quantity, common))
        if quantity.stops and s.stops:
            lines.append(_marks(s, quantity, common))
    # ours on top: drawn last
    lines.sort(key=lambda trace: trace.meta["colour"] == OURS)
    figure = go.Figure([*bands, *lines], _layout(quantity, log=log))
    return Panel(quantity.title, Markup(figure.to_json()))  # plotly escapes < and > in it


def _line(c: Curve, s: Series, quantity: Quantity, common: dict[str, Any]) -> go.Scatter:
    form = ".1%" if quantity.percent else ".4~g"
    banded = any(map(math.isfinite, c.low))
    interval = f" [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]" if banded else ""
    return go.Scatter(
        **common,
        x=c.epochs,
        y=_json(c.mean),
        customdata=list(zip(_json(c.low), _json(c.high), strict=True)) if banded else None,
        name=html.escape(s.label, quote=False),
        mode="lines" if len(c.epochs) > 1 else "markers",
        line={"dash": s.dash, "width": 3.2 if s.colour == OURS else 1.8},
        hovertemplate=f"{NAME}epoch %{{x}}: %{{y:{form}}}{interval}",
    )


def _band(c: Curve, quantity: Quantity, common: dict[str, Any], *, log: bool) -> go.Scatter:
    low, high = c.low, c.high
    if quantity.share:
        low, high = [max(v, 0.0) for v in low], [min(v, 1.0) for v in high]
    if log:
        low = [max(v, m / 10) for v, m in zip(low, c.mean, strict=True)]
    x: list[int | None] = []
    y: list[float | None] = []
    for there in _stretches(low, high):
        back = there[::-1]
        x += [*(c.epochs[i] for i in [*there, *back]), None]
        y += [*_json([*(high[i] for i in there), *(low[i] for i in back)]), None]
    return go.Scatter(
        **common,
        x=x,
        y=y,
        fill="toself",
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
    )


def _stretches(low: list[float], high: list[float]) -> list[list[int]]:
    """Split the indices at which both are finite into runs without a gap."""
    runs: list[list[int]] = []
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if not math.isfinite(a - b):
            continue
        if not runs or runs[-1][-1] != i - 1:
            runs.append([])
        runs[-1].append(i)
    return runs


def _marks(s: Series, quantity: Quantity, common: dict[str, Any]) -> go.Scatter:
    form = ".1%" if quantity.percent else ".4~g"
    return go.Scatter(
        **common,
        x=[x for x, _ in s.stops],
        y=_json([y for _, y in s.stops]),
        name=html.escape(s.label, quote=False),
        mode="markers",
        marker={"symbol": "diamond", "size": 7},
        hovertemplate=f"{NAME}one seed stopped at epoch %{{x}}: %{{y:{form}}}",
    )


def _layout(quantity: Quantity, *, log: bool) -> go.Layout:
    return go.Layout(
        template="none",
        showlegend=False,
        yaxis={
            "tickformat": ".0%" if quantity.percent else "",
            "type": "log" if log else "linear",
        },
    )


def _is_wide(curves: Iterable[Curve]) -> bool:
    values = [v for c in curves for v in c.mean if math.isfinite(v)]
    return bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)


def _json(values: Iterable[float]) -> list[float | None]:
    """Round to what a screen can show; a value that is not finite leaves a gap."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
