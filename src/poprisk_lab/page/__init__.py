"""A run directory, as one HTML page that opens without a network."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from poprisk.intervals import MIN_SEEDS
from poprisk.optim.stats import STARVED_BELOW
from poprisk_lab.page import figures, notes
from poprisk_lab.page.draw import OURS, plotly_script
from poprisk_lab.page.figures import Group, PanelQuantity
from poprisk_lab.page.page import template
from poprisk_lab.page.series import EpochRow, arm_series, module_series
from poprisk_lab.page.table import leads_table, run_table, verdict_table
from poprisk_lab.plots import Table
from poprisk_lab.results import RunData
from poprisk_lab.selection import twin_report
from poprisk_lab.verdict import Verdict

__all__ = ["quantities", "render"]


class GateSection(NamedTuple):
    """What the gate of one row of the verdict did: its label, plots, who starved, weights left."""

    label: str
    ours: bool
    group: Group | None
    starved: Table
    uncounted: int


def render(data: RunData, verdict: Verdict) -> str:
    """Return the page as text; the same input gives the same text."""
    page = template("report.html.j2")
    return page.render(context(data, verdict), plotly=plotly_script())


def context(data: RunData, verdict: Verdict) -> dict[str, Any]:
    """Return what the template shows, by name."""
    task = data.config["task"]
    series = arm_series(data, verdict)
    table = verdict_table(
        verdict,
        task["metric"],
        seeds=len(data.config["seeds"]),
        shares=task["classification"],
    )
    return {
        "config": data.config,
        "environment": data.environment,
        "raw": json.dumps(data.config, indent=2, ensure_ascii=False),
        "task": task,
        "metric": task["metric"],
        "facts": notes.about_run(data),
        "notices": notes.notices(data),
        "verdict": verdict,
        "table": table,
        "leads": leads_table(verdict, data.config),
        "runs": run_table(data, table.format),
        "curves": figures.group(series, quantities(task)),
        "stops": any(s.stops for s in series),
        "memorizing": any(row["memorized"] is not None for row in data.epochs),
        "gates": _gates(data),
        "settings": notes.settings(data.config),
        "starved_below": STARVED_BELOW,
        "intervals": len(data.config["seeds"]) >= MIN_SEEDS,
        "twins": twin_report(data),
        "families": {arm["family"] for arm in data.config["arms"]},
    }


def quantities(task: dict[str, Any]) -> list[PanelQuantity]:
    """What the page draws over epochs."""
    metric, shares = task["metric"], task["classification"]
    title = "Wrong labels memorized" if shares else "Label noise fitted"
    return [
        PanelQuantity(
            f"Test {metric['name']}",
            "test_metric",
            percent=metric["percent"],
            share=metric["percent"],
            stops=True,
        ),
        PanelQuantity(title, "memorized", percent=True, share=shares),
    ]


PASS_RATE = PanelQuantity("Pass rate", "pass_rate", percent=True, share=True)
UPDATE_RATIO = PanelQuantity("Update ratio", "update_ratio", percent=True, share=True)


def _gates(data: RunData) -> list[GateSection]:
    """What the gate of each arm that has one did, ours first."""
    rows: dict[str, list[EpochRow]] = {}
    for row in data.epochs:
        if row["gate"]:
            rows.setdefault(row["arm"], []).append(row)
    arms = [arm for arm in data.config["arms"] if arm["name"] in rows]
    kinds = data.config["task"].get("modules", {})
    arms.sort(key=lambda arm: arm["family"] != OURS)
    return [
        GateSection(
            arm["label"],
            arm["family"] == OURS,
            figures.group(module_series(rows[arm["name"]], kinds), [PASS_RATE, UPDATE_RATIO]),
            notes.starved(rows[arm["name"]]),
            notes.uncounted(rows[arm["name"]], data.config["task"]["parameters"]),
        )
        for arm in arms
    ]
