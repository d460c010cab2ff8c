"""An explanation as one HTML page that opens without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from poprisk_lab.explain import words
from poprisk_lab.page.page import template
from poprisk_lab.store import replace_text

PARTS = {
    "learned_signal": ("signal learned", "early-stopping"),
    "harmful_noise": ("label noise that got through", "poprisk"),
    "trapped_signal": ("signal in the reservoir", "adamw"),
    "benign_noise": ("label noise in the reservoir", "rms-matched"),
    "affine": ("weight decay", "other"),
}


class Figure(NamedTuple):
    """A plot: its title, the figure as JSON, what it shows, and what it says for this run."""

    title: str
    figure: Markup
    about: str
    says: str


def write_explanation(found: dict[str, Any], environment: dict[str, Any], path: Path) -> None:
    """Write the page, atomically.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    replace_text(path, render(found, environment))


def render(found: dict[str, Any], environment: dict[str, Any]) -> str:
    """Return the page as text; the same input gives the same text."""
    dense = found["dense"]
    sections = [("The whole task", arm_figures(found))] if found["arms"] else []
    if dense is not None:
        sections.append(("Inside a small run", dense_figures(dense)))
    return template("explain.html.j2").render(
        task=found["task"],
        dense=dense,
        headline=words.headline(found),
        sentences=sentences(found),
        notices=found["notices"],
        sections=sections,
        raw=json.dumps({k: found[k] for k in ("task", "plan")}, indent=2, ensure_ascii=False),
        environment=environment,
        plotly=Markup(get_plotlyjs()),
    )


def sentences(found: dict[str, Any]) -> list[str]:
    """What the page says besides the headline."""
    arms = found["arms"]
    lines = words.size_sentences(found)
    lines += [words.noise_sentence(arm, found["task"]) for arm in arms[1:]]
    lines += [words.cells_sentence(arm) for arm in arms]
    if found["dense"] is not None:
        dense = found["dense"]
        said = [words.spectrum_sentence, words.coupling_sentence, words.kernel_sentence]
        lines += [say(dense) for say in said]
    return lines


def arm_figures(found: dict[str, Any]) -> list[Figure]:
    """Metric with and without noise, and the parts of the movement, for each optimizer."""
    metric, figures = found["task"]["metric"], list[Figure]()
    for arm in found["arms"]:
        rows = arm["rows"]
        epochs = [r["epoch"] for r in rows]
        lines = [
            _line(epochs, [r["metric"] for r in rows], "as it is", "adamw"),
            _line(
                epochs,
                [r["without_noise"] for r in rows],
                "without the label noise",
                "early-stopping",
                dash="dash",
            ),
        ]
        form = ".0%" if metric["percent"] else ""
        figures.append(
            Figure(
                f"{arm['optimizer']}: test {metric['name']}",
                _figure(lines, x="epoch", tickformat=form),
                "The second line takes out what label noise did to the test outputs.",
                words.noise_sentence(arm, found["task"]),
            )
        )
        keys = {"signal": "signal", "noise": "label noise", "affine": "weight decay"}
        colours = ("early-stopping", "poprisk", "other")
        areas = [
            _area(epochs, [r[key] for r in rows], name, colour)
            for (key, name), colour in zip(keys.items(), colours, strict=True)
        ]
        figures.append(
            Figure(
                f"{arm['optimizer']}: what moved the test outputs",
                _figure(areas, x="epoch"),
                "Root mean square movement of a test output since the start, by its cause.",
                words.cells_sentence(arm),
            )
        )
    return figures


def dense_figures(dense: dict[str, Any]) -> list[Figure]:
    """The plots of the operators."""
    figures = [_spectrum(dense), _residual(dense), _coupling(dense)]
    if dense["cells"] is not None:
        figures.append(_cells(dense))
    return [*figures, _drift(dense), _kernel(dense)]


def _spectrum(dense: dict[str, Any]) -> Figure:
    s = dense["spectrum"]
    values = [max(v, 1e-16) for v in s["relative"]]
    cut, ranks = s["channel"], list(range(1, len(values) + 1))
    lines = [_line(ranks[:cut], values[:cut], "channel", "poprisk")]
    if cut < len(ranks):
        lines.append(_line(ranks[cut:], values[cut:], "soft reservoir", "adamw", dash="dot"))
    return Figure(
        "Which directions training dissipated",
        _figure(lines, x="direction, strongest first", log=True),
        "Each direction is a pattern of residuals over the training outputs; its height is how "
        "much of it training can remove, relative to the strongest.",
        words.spectrum_sentence(dense),
    )


def _residual(dense: dict[str, Any]) -> Figure:
    steps, inside, outside = zip(*dense["residual"], strict=True)
    areas = [
        _area(steps, inside, "in the channel", "poprisk"),
        _area(steps, outside, "in the soft reservoir", "adamw"),
    ]
    return Figure(
        "The residual over training",
        _figure(areas, x="step"),
        "The squared output gradient: how far the training outputs still are from their labels.",
        words.residual_sentence(dense),
    )


def _coupling(dense: dict[str, Any]) -> Figure:
    c = dense["coupling"]
    ends = [min(c["realized"]), max(c["realized"])]
    traces = [
        _points(c["realized"], c["frozen"], "kernel frozen at the start", "other"),
        _points(c["realized"], c["predicted"], "path operators", "poprisk"),
        _line(ends, ends, "exact", "adamw", dash="dot"),
    ]
    return Figure(
        "Test movement, predicted and real",
        _figure(traces, x="real movement of a test output", zero=False),
        "Each dot is a test output; predictions know only how the training outputs moved.",
        words.coupling_sentence(dense),
    )


def _cells(dense: dict[str, Any]) -> Figure:
    rows = dense["cells"]["rows"]
    steps = [r["step"] for r in rows]
    areas = [
        _area(steps, [r[key] for r in rows], name, colour) for key, (name, colour) in PARTS.items()
    ]
    return Figure(
        "The four cells",
        _figure(areas, x="step"),
        "Root mean square movement of a test output: signal and label noise, through the channel "
        "or through the reservoir.",
        words.four_sentence(dense),
    )


def _drift(dense: dict[str, Any]) -> Figure:
    d = dense["drift"]
    lines = [
        _line(d["times"], d["drift"], "drift", "early-stopping"),
        _line(d["times"], d["diffusion"], "diffusion", "poprisk", dash="dash"),
    ]
    return Figure(
        "Drift against diffusion",
        _figure(lines, x="steps", log=True, log_x=True),
        "How far minibatches move the training outputs along the channel: what they agree on, and "
        "what is chance.",
        words.drift_sentence(dense),
    )


def _kernel(dense: dict[str, Any]) -> Figure:
    steps, values = zip(*dense["kernel_drift"], strict=True)
    return Figure(
        "How far the kernel moved",
        _figure([_line(steps, values, "kernel drift", "adamw")], x="step"),
        "The kernel says which outputs move together; relative distance from where it started.",
        words.kernel_sentence(dense),
    )


def _line(
    x: Sequence[float], y: Sequence[float], name: str, colour: str, *, dash: str = "solid"
) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=_json(y),
        name=name,
        mode="lines",
        line={"dash": dash, "width": 2.4},
        meta={"colour": colour},
    )


def _points(x: Sequence[float], y: Sequence[float], name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=_json(x),
        y=_json(y),
        name=name,
        mode="markers",
        marker={"size": 5, "opacity": 0.7},
        meta={"colour": colour},
    )


def _area(x: Sequence[float], y: Sequence[float], name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=_json(y),
        name=name,
        mode="lines",
        stackgroup="all",
        line={"width": 1},
        meta={"colour": colour, "area": True},
    )


def _figure(
    traces: Sequence[go.Scatter],
    *,
    x: str,
    log: bool = False,
    log_x: bool = False,
    zero: bool = True,
    tickformat: str = "",
) -> Markup:
    layout = go.Layout(
        template="none",
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "y": -0.3},
        xaxis={
            "title": {"text": x, "standoff": 6},
            "type": "log" if log_x else "linear",
            "rangemode": "tozero" if zero else "normal",
        },
        yaxis={
            "type": "log" if log else "linear",
            "dtick": 1 if log and _spans_decades(traces) else None,  # no clutter of 2s and 5s
            "tickformat": tickformat,
            "exponentformat": "e",
        },
    )
    return Markup(go.Figure(list(traces), layout).to_json())


def _spans_decades(traces: Sequence[go.Scatter]) -> bool:
    """Whether there are at least two powers of ten to label."""
    shown = [v for trace in traces for v in trace.y if v is not None and v > 0]
    return bool(shown) and max(shown) > 100 * min(shown)


def _json(values: Sequence[float]) -> list[float | None]:
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
