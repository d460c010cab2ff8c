"""A claim, and all claims in summary, as pages that open without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from poprisk.intervals import MIN_SEEDS
from poprisk_lab.page.formats import plural
from poprisk_lab.page.page import template
from poprisk_lab.store import replace_text
from poprisk_lab.studies.claim import Curve, Picture, Plot
from poprisk_lab.studies.judge import Criterion, fewest_seeds, written
from poprisk_lab.studies.record import Judged

MARKS = {
    "reproduced": "good",
    "partly reproduced": "",
    "not reproduced": "bad",
    "as claimed": "good",
    "does not hold": "bad",
}


class Panel(NamedTuple):
    """A plot or a picture of the page."""

    title: str
    about: str
    figure: Markup | None
    png: str


class Line(NamedTuple):
    """A criterion as the page writes it."""

    asks: str
    bound: str
    claimed: str
    found: str
    outcome: str
    mark: str


class SummaryRow(NamedTuple):
    """A claim in the summary."""

    name: str
    title: str
    paper: str
    ours: str
    controls: str
    verdict: str
    mark: str


def write_claim(judged: Judged, path: Path) -> None:
    """Write the page of a claim, atomically.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    replace_text(path, render_claim(judged))


def render_claim(judged: Judged) -> str:
    """Return the page of a claim as text; the same input gives the same text."""
    claim, progress, findings = judged.claim, judged.progress, judged.findings
    shown = claim.show(progress.done) if findings else []
    return template("claim.html.j2").render(
        claim=claim,
        verdict=judged.verdict,
        mark=MARKS.get(judged.verdict, ""),
        findings=findings,
        criteria=[criterion_line(c) for c in findings.criteria] if findings else [],
        few=bool(findings) and fewest_seeds(findings.criteria) is not None,
        notices=notices(judged),
        panels=[_panel(item) for item in shown],
        environment=progress.environment,
        trials=len(progress.done),
        minutes=progress.seconds / 60,
        plotly=Markup(get_plotlyjs()),
    )


def notices(judged: Judged) -> list[str]:
    """What a reader must know before the numbers."""
    progress, found = judged.progress, list[str]()
    if progress.quick:
        found.append(
            "This is the quick form: smaller problems and fewer seeds than the full one. Its "
            "verdict is a first look, not a result."
        )
    if progress.left:
        found.append(f"{plural(len(progress.left), 'trial')} still to do; repeat the command.")
    few = fewest_seeds(judged.findings.criteria) if judged.findings else None
    if few is not None:
        found.append(
            f"{plural(few, 'seed')}, so no intervals: the seeds stand in their place, "
            f"and there is no verdict, which takes at least {MIN_SEEDS}."
        )
    for package, trials in progress.missing.items():
        if trials:
            found.append(
                f"{plural(trials, 'trial')} left out: the package {package} is not installed "
                f"(pip install '{package}')."
            )
    return found


def criterion_line(criterion: Criterion) -> Line:
    """A criterion in words."""
    sign = "≤" if criterion.at_most else "≥"
    unit = 100.0 if criterion.percent else 1.0
    percent = "%" * criterion.percent
    claimed = "" if criterion.claimed is None else f"{unit * criterion.claimed:.3g}{percent}"
    return Line(
        criterion.asks + ("" if criterion.decides else " (control)"),
        f"{sign} {unit * criterion.needed:.3g}{percent}",
        claimed,
        written(criterion.found, percent=criterion.percent),
        criterion.outcome,
        MARKS.get(criterion.outcome, ""),
    )


def summary_rows(claims: Sequence[Judged]) -> list[SummaryRow]:
    """A row for each claim: the paper's figure, ours, the controls, the verdict."""
    rows = []
    for judged in claims:
        findings = judged.findings
        verdict = judged.verdict + (" (quick form)" if judged.progress.quick else "")
        rows.append(
            SummaryRow(
                judged.claim.name,
                judged.claim.title,
                judged.claim.paper or "none given",
                findings.ours if findings else "",
                findings.controls if findings else "",
                verdict,
                MARKS.get(judged.verdict, ""),
            )
        )
    return rows


def write_summary(claims: Sequence[Judged], path: Path) -> None:
    """Write the page of all claims, atomically.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    replace_text(path, template("claims.html.j2").render(rows=summary_rows(claims)))


def _panel(item: Plot | Picture) -> Panel:
    if isinstance(item, Picture):
        return Panel(item.title, item.about, None, item.png)
    return Panel(item.title, item.about, _figure(item), "")


def _figure(plot: Plot) -> Markup:
    traces = [trace for curve in plot.curves for trace in _traces(curve)]
    axis: dict[str, Any] = {"exponentformat": "e"}
    layout = go.Layout(
        template="none",
        showlegend=len(plot.curves) > 1,
        legend={"orientation": "h", "y": -0.3},
        xaxis={
            **axis,
            "title": {"text": plot.x, "standoff": 6},
            "type": "log" if plot.log_x else "linear",
        },
        yaxis={
            **axis,
            "title": {"text": plot.y, "standoff": 6},
            "type": "log" if plot.log_y else "linear",
        },
    )
    return Markup(go.Figure(traces, layout).to_json())


def _traces(curve: Curve) -> list[go.Scatter]:
    shared = {"x": list(curve.x), "legendgroup": curve.name}
    meta = {"colour": curve.colour}
    found = []
    if len(curve.low):
        edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        found.append(go.Scatter(**shared, **edge, y=_json(curve.low), meta=meta))
        found.append(
            go.Scatter(
                **shared,
                **edge,
                y=_json(curve.high),
                fill="tonexty",
                meta={**meta, "area": True, "faint": True},
            )
        )
    look: dict[str, Any] = {"mode": "lines", "line": {"dash": curve.dash, "width": 2.4}}
    if curve.points:
        look = {"mode": "markers", "marker": {"size": 6, "opacity": 0.75}}
    return [
        *found,
        go.Scatter(
            **shared,
            **look,
            y=_json(curve.y),
            name=curve.name,
            showlegend=bool(curve.name),
            meta=meta,
        ),
    ]


def _json(values: Sequence[float]) -> list[float | None]:
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
