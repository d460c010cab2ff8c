"""An explanation as one HTML page that opens without a network."""

from __future__ import annotations

import json
from typing import Any

from poprisk_lab.explain import words
from poprisk_lab.page import draw
from poprisk_lab.page.page import template
from poprisk_lab.plots import Line, Plot, points

PARTS = {
    "learned_signal": ("signal learned", "early-stopping"),
    "harmful_noise": ("label noise that got through", "poprisk"),
    "trapped_signal": ("signal in the reservoir", "adamw"),
    "benign_noise": ("label noise in the reservoir", "rms-matched"),
    "affine": ("weight decay", "other"),
}
CAUSES = {
    "signal": ("signal", "early-stopping"),
    "noise": ("label noise", "poprisk"),
    "affine": ("weight decay", "other"),
}
MOVEMENT = "root mean square movement"


def render(found: dict[str, Any], environment: dict[str, Any]) -> str:
    """Return the page as text; the same input gives the same text."""
    dense, metric = found["dense"], found["task"]["metric"]
    sections = {
        "The whole task": [p for arm in found["arms"] for p in arm_plots(arm, metric)],
        "Inside a small run": list[Plot]() if dense is None else dense_plots(dense),
    }
    return template("explain.html.j2").render(
        task=found["task"],
        dense=dense,
        headline=words.headline(found),
        notices=[*found["notices"], *words.warnings(found)],
        table=words.table(found),
        sections={
            title: [(plot, draw.figure(plot)) for plot in plots]
            for title, plots in sections.items()
            if plots
        },
        raw=json.dumps({k: found[k] for k in ("task", "plan")}, indent=2, ensure_ascii=False),
        environment=environment,
        plotly=draw.plotly_script(),
    )


def arm_plots(arm: dict[str, Any], metric: dict[str, Any]) -> list[Plot]:
    """Metric with and without noise, and the parts of the movement, of one optimizer."""
    name, rows = arm["optimizer"], arm["rows"]
    lines = [
        _column(rows, "epoch", "metric", "as it is", "adamw"),
        _column(rows, "epoch", "without_noise", "without the label noise", "early-stopping",
                dash="dash"),
    ]  # fmt: skip
    return [
        Plot(f"{name}: test {metric['name']}", "epoch", metric["name"], lines,
             "The second line takes out what label noise did to the test outputs.",
             percent=metric["percent"]),
        Plot(f"{name}: what moved the test outputs", "epoch", MOVEMENT,
             [_column(rows, "epoch", key, *look, kind="area") for key, look in CAUSES.items()],
             "Root mean square movement of a test output since the start, by its cause."),
    ]  # fmt: skip


def dense_plots(dense: dict[str, Any]) -> list[Plot]:
    """The plots of the operators."""
    c, d = dense["coupling"], dense["drift"]
    steps, inside, outside = zip(*dense["residual"], strict=True)
    ends = [min(c["realized"]), max(c["realized"])]
    at, moved = zip(*dense["kernel_drift"], strict=True)
    plots = [
        _spectrum(dense["spectrum"]),
        Plot("The residual over training", "step", "squared output gradient",
             [Line("in the channel", steps, inside, "poprisk", kind="area"),
              Line("in the soft reservoir", steps, outside, "adamw", kind="area")],
             "The squared output gradient: how far the training outputs still are from their "
             "labels. What lies in the channel can still be fitted, the rest is trapped."),
        Plot("Test movement, predicted and real", "real movement of a test output", "predicted",
             [points("kernel frozen at the start", c["realized"], c["frozen"], "other"),
              points("path operators", c["realized"], c["predicted"], "poprisk"),
              Line("exact", ends, ends, "adamw", "dot")],
             "Each dot is a test output; predictions know only how the training outputs moved."),
        Plot("Drift against diffusion", "steps", "movement of the training outputs",
             [Line("drift", d["times"], d["drift"], "early-stopping"),
              Line("diffusion", d["times"], d["diffusion"], "poprisk", "dash")],
             "How far minibatches of plain SGD move the training outputs along the channel: what "
             "they agree on, and what is chance.", log_x=True, log_y=True),
        Plot("How far the kernel moved", "step", "relative distance",
             [Line("kernel drift", at, moved, "adamw")],
             "The kernel says which outputs move together; relative distance from where it "
             "started. Below 0.1 features hardly changed, from 0.5 on they were learned."),
    ]  # fmt: skip
    if dense["cells"] is not None:
        rows = dense["cells"]["rows"]
        cells = [_column(rows, "step", key, *look, kind="area") for key, look in PARTS.items()]
        about = (
            "Root mean square movement of a test output: signal and label noise, through the "
            "channel or through the reservoir."
        )
        plots.insert(3, Plot("The four cells", "step", MOVEMENT, cells, about))
    return plots


def _spectrum(spectrum: dict[str, Any]) -> Plot:
    values = [max(v, 1e-16) for v in spectrum["relative"]]
    cut, ranks = spectrum["channel"], range(1, len(values) + 1)
    lines = [Line("channel", ranks[:cut], values[:cut], "poprisk")]
    if cut < len(ranks):
        lines.append(Line("soft reservoir", ranks[cut:], values[cut:], "adamw", "dot"))
    return Plot("Which directions training dissipated", "direction, strongest first",
                "relative to the strongest", lines,
                "Each direction is a pattern of residuals over the training outputs; its height is "
                "how much of it training can remove. Training hardly moves what lies in the soft "
                "reservoir, and test points hardly see it.", log_y=True)  # fmt: skip


def _column(
    rows: list[dict[str, Any]],
    x: str,
    key: str,
    name: str,
    colour: str,
    *,
    dash: str = "solid",
    kind: str = "line",
) -> Line:
    return Line(name, [r[x] for r in rows], [r[key] for r in rows], colour, dash, kind=kind)
