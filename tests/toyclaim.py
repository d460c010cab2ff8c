"""A claim for tests: one arm is faster than the other by a factor; trials take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poprisk_lab.plots import Line, Picture, Plot, Table, points
from poprisk_lab.studies.claim import (
    Claim,
    Metrics,
    Plots,
    Report,
    Results,
    Trial,
    Workspace,
)
from poprisk_lab.studies.criteria import Criterion, Steps, point, speed_up

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def trials(quick: bool, marker: str = "") -> list[Trial]:
    """Two arms on a few seeds."""
    found = [
        Trial(f"{arm}-{seed}", {"arm": arm, "seed": seed, "marker": marker})
        for arm in ("slow", "fast")
        for seed in range(3 if quick else 4)
    ]
    return [*found, Trial("peer", {"arm": "peer", "seed": 0}, ("no_such_package",))]


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Pretend; a marker file makes the trial that it names fail."""
    marker = Path(settings["marker"] or "none")
    if marker.exists() and marker.read_text() == f"{settings['arm']}-{settings['seed']}":
        raise RuntimeError("told to fail")
    base = {"slow": 100, "fast": 20, "peer": 50}[settings["arm"]]
    return {"steps": base + settings["seed"], "limit": 1000}


def judge(results: Results) -> Report:
    """Five times faster."""
    slow, fast = (Steps.of(results.where(arm=arm), key="steps") for arm in ("slow", "fast"))
    return Report(
        [
            Criterion("times fewer steps", speed_up(slow, fast), threshold=1.0, claimed=4.9),
            Criterion("share of <runs> that end", point(1.0), 0.9, percent=True, primary=False),
        ],
        Table(["arm", "steps"], [["slow", "100"], ["fast, <b>markup</b>", "20"]]),
        ["A note with <b>markup</b>."],
    )


def show(results: Results) -> Plots:
    """A line with a band, and a picture."""
    line = Line("steps", [0, 1], [1.0, float("nan")], "poprisk", low=[0.5, 0.5], high=[2.0, 2.0])
    dots = points("dots", [1, 10], [1.0, 2.0], "adamw")
    return [
        Plot("A plot", "step", "value", [line, dots], "How to read it.", log_y=True),
        Picture("A picture", PIXEL, "One pixel."),
    ]


CLAIM = Claim(
    name="toy",
    title="A toy",
    statement="The fast arm is five times faster.",
    source="nowhere",
    paper="5×",
    published=["nothing"],
    ours=["everything"],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
