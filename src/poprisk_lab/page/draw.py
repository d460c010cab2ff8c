"""Plots as Plotly figures without colours: the page paints them for light and dark.

A trace names the colour it wants in ``meta``: ``page.css`` defines it as ``--c-<name>``.
"""

from __future__ import annotations

import base64
import gzip
import html
import lzma
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from poprisk_lab.plots import Line, Plot

OURS = "poprisk"
Y_TITLE = 20
"""Letters of a line of a title beside a plot, whose height cuts off longer ones."""
PLOTLY = "plotly-basic.min.js.xz"
NAME = "<extra></extra><b>%{fullData.name}</b><br>"  # not the name itself: it may hold %{


@cache
def plotly_script() -> str:
    """Plotly's basic script, by gzip, in base64: all that lines, points and areas need.

    A copy of npm's ``plotly.js-basic-dist-min`` (MIT), a quarter of the one that the Python package
    brings.
    """
    script = lzma.decompress((Path(__file__).parent / PLOTLY).read_bytes())
    return base64.b64encode(gzip.compress(script, mtime=0)).decode()  # browsers read no xz


def figure(plot: Plot, *, shown: Sequence[bool] = (), legend: bool = True) -> Markup:
    """What :func:`traced` makes, as JSON."""
    made = traced(plot, shown=shown, legend=legend)
    return Markup(made.to_json())  # plotly escapes < and > in it


def _faint(colour: str, opacity: float) -> str:
    """A colour #rrggbb with an opacity, as every version of plotly takes it."""
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},{opacity})"


def painted(plot: Plot, *, shown: Sequence[bool] = ()) -> go.Figure:
    """A plot as a figure to show outside of a page, in the page's light colours.

    What a page hides before anyone clicks is in the legend only.
    """

    def paint(trace: Any) -> None:
        colour = _colours()[trace.meta["colour"]]
        trace.update(line={"color": colour}, marker={"color": colour})
        if trace.fill or trace.stackgroup:
            trace.update(fillcolor=_faint(colour, 0.16 if trace.fill else 0.45))  # as the script
        trace.update(legendgroup=trace.meta["series"], visible=trace.visible or "legendonly")

    made = traced(plot, shown=shown)
    made.for_each_trace(paint)
    return made.update_layout(title=html.escape(plot.title, quote=False))


@cache
def _colours() -> dict[str, str]:
    """The style sheet's colours, by name; its light ones stand first."""
    sheet = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    found = re.findall(r"--c-([\w-]+): (#\w{6})", sheet.partition("@media")[0])
    return dict(found)


def traced(plot: Plot, *, shown: Sequence[bool] = (), legend: bool = True) -> go.Figure:
    """A plot as a figure without colours; lines of one name are one series, hidden together.

    Args:
        plot: to draw.
        shown: whether each line is drawn before anyone clicks; empty for all.
        legend: whether Plotly draws one, if there is more than one line.
    """
    series = {name: i for i, name in enumerate(dict.fromkeys(line.name for line in plot.lines))}
    bands, lines = list[go.Scatter](), list[go.Scatter]()
    for line, visible in zip(plot.lines, shown or [True] * len(plot.lines), strict=True):
        meta = {"series": series[line.name], "colour": line.colour}
        common = {"meta": meta, "visible": visible}
        if any(map(math.isfinite, line.low)):
            bands.append(_band(line, plot, common))
        lines.append(_line(line, plot, common))
    lines.sort(key=lambda trace: trace.meta["colour"] == OURS)  # ours on top: drawn last
    return go.Figure([*bands, *lines], _layout(plot, legend=legend and len(series) > 1))


def _line(line: Line, plot: Plot, common: dict[str, Any]) -> go.Scatter:
    form = ".1%" if plot.percent else ".4~g"
    banded = any(map(math.isfinite, line.low))
    ends = list(zip(numbers(line.low), numbers(line.high), strict=True)) if banded else None
    interval = f" [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]" if banded else ""
    looks: dict[str, dict[str, Any]] = {
        "line": {"line": {"dash": line.dash, "width": 3.2 if line.colour == OURS else 1.8}},
        "points": {"marker": {"size": 6, "opacity": 0.75}},
        "marks": {"marker": {"symbol": "diamond", "size": 7}},
        "area": {"line": {"width": 1}, "stackgroup": "all"},
    }
    alone = line.kind in ("points", "marks") or len(line.x) == 1
    return go.Scatter(
        **common,
        **looks[line.kind],
        x=list(line.x),
        y=numbers(line.mean),
        customdata=ends,
        name=html.escape(line.name, quote=False),
        showlegend=bool(line.name),
        mode="markers" if alone else "lines",
        hovertemplate=f"{NAME}{html.escape(plot.x)} %{{x}}: %{{y:{form}}}{interval}",
    )


def _band(line: Line, plot: Plot, common: dict[str, Any]) -> go.Scatter:
    low, high = list(line.low), list(line.high)
    if plot.log_y:
        low = [max(v, m / 10) for v, m in zip(low, line.mean, strict=True)]
    x: list[float | None] = []
    y: list[float | None] = []
    for there in _stretches(low, high):
        back = there[::-1]
        x += [*(line.x[i] for i in [*there, *back]), None]
        y += [*numbers([*(high[i] for i in there), *(low[i] for i in back)]), None]
    return go.Scatter(
        **common,
        x=x,
        y=y,
        fill="toself",
        mode="lines",
        line={"width": 0},
        showlegend=False,
        hoverinfo="skip",
    )


def _stretches(low: Sequence[float], high: Sequence[float]) -> Iterator[list[int]]:
    """The indices at which both ends are finite, in runs without a gap."""
    run: list[int] = []
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if math.isfinite(a - b):
            run.append(i)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _layout(plot: Plot, *, legend: bool) -> go.Layout:
    y = [v for line in plot.lines for v in line.mean]
    return go.Layout(
        template="none",
        showlegend=legend,
        legend={"orientation": "h", "y": -0.3},
        xaxis=_axis(plot.x, [v for line in plot.lines for v in line.x], log=plot.log_x),
        yaxis={
            **_axis("\n".join(textwrap.wrap(plot.y, Y_TITLE)), y, log=plot.log_y),
            "tickformat": ".0%" if plot.percent else "",
        },
    )


def _axis(title: str, values: Iterable[float], *, log: bool) -> dict[str, Any]:
    """An axis; a logarithmic one is labelled by decades where it spans two."""
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    decades = log and bool(positive) and max(positive) > 100 * min(positive)
    return {
        "title": {"text": html.escape(title, quote=False).replace("\n", "<br>"), "standoff": 6},
        "type": "log" if log else "linear",
        "dtick": 1 if decades else None,
        "exponentformat": "e",
    }


def numbers(values: Iterable[float]) -> list[float | None]:
    """Round to what a screen can show; a value that is not finite leaves a gap."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
