"""The table and the plots of the claim on grokking."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poprisk_lab.studies.claim import Curve, Done, Picture, Plot, where
from poprisk_lab.studies.grokking.arms import LABELS
from poprisk_lab.studies.grokking.changes import CHANGES
from poprisk_lab.studies.grokking.forces import COLUMNS, FORCES

SHOWN = 5
"""Seeds of an arm that are drawn."""
COLOURS = {
    "ours": "poprisk",
    "adamw-same": "adamw",
    "adamw-tuned": "early-stopping",
    "ours-tuned": "rms-matched",
    "letter-snr": "paper",
    "shuffled": "shuffled",
}


def table(done: Sequence[Done]) -> list[list[str]]:
    """A row an arm: when each seed had memorized and when it generalized."""
    rows = [["arm", "lr", "decay", "seeds", "steps to 95% held-out, by seed", "99% training"]]
    names = dict.fromkeys(d.settings["name"] for d in done if d.settings["kind"] == "run")
    for name in names:
        runs = where(done, name=name)
        reached = [_step(d.found["reached"], d.found["limit"]) for d in runs]
        memorized = [_step(d.found["memorized"], d.found["limit"]) for d in runs]
        s = runs[0].settings
        rows.append(
            [
                _label(name),
                f"{s['lr']:g}",
                f"{s['weight_decay']:g}",
                str(len(runs)),
                ", ".join(reached),
                ", ".join(memorized),
            ]
        )
    return rows


def _label(name: str) -> str:
    change = CHANGES.get(name.removeprefix("change-"))
    if change is None:
        return LABELS.get(name, name)
    return f"{LABELS[change.arm]}: {change.label}"


def _step(step: int | None, limit: int) -> str:
    return f">{limit:,}" if step is None else f"{step:,}"


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Accuracy over training, the grids, and the channel."""
    curves = []
    for name, colour in COLOURS.items():
        for d in where(done, name=name)[:SHOWN]:
            x, y = [max(r[0], 1) for r in d.found["curve"]], [r[3] for r in d.found["curve"]]
            curves.append(Curve(f"{LABELS[name]}, seed {d.settings['seed']}", x, y, colour))
    shown = [c for c in curves if c.name.endswith("seed 0")]
    rest = [c._replace(name="") for c in curves if not c.name.endswith("seed 0")]
    plots: list[Plot | Picture] = [
        Plot(
            "Held-out accuracy",
            "step",
            "accuracy",
            [*shown, *rest],
            "One line a seed.",
            log_x=True,
        )
    ]
    grid = [d for d in done if d.settings["name"].startswith(("grid-", "gate-grid-"))]
    plots.append(
        Plot(
            "Steps against learning rate × decay",
            "learning rate × decay",
            "steps to 95%",
            [
                _pace("AdamW", [d for d in grid if d.settings["arm"] == "adamw"], "adamw"),
                _pace("PopRiskAdamW", [d for d in grid if d.settings["arm"] != "adamw"], "poprisk"),
            ],
            "Each point is a setting on the tuning seed; those that never got there are left out.",
            log_x=True,
            log_y=True,
        )
    )
    plots += [
        _forces_plot(
            done,
            "straightness",
            "How straight the way is",
            "straightness",
            "Length of the sum of all updates between two measurements, over the sum of their "
            "lengths: 1 if every update goes on where the last one went. Unrelated gradients would "
            "come to 0.28 over 250 steps and to 0.62 over the 50 of the tuned arms.",
        ),
        _forces_plot(
            done,
            "edge",
            "How near to the edge of stability",
            "share of the edge",
            "Largest curvature of the training loss in the optimizer's metric, mask included, over "
            "the largest that momentum can bear: above 1 a step on a quadratic would overshoot.",
        ),
        _forces_plot(
            done,
            "loss",
            "Training loss",
            "loss",
            "Of the same runs, at the same moments.",
        ),
    ]
    return [*plots, *(_channel_plot(d) for d in where(done, kind="channel", seed=0))]


def _forces_plot(done: Sequence[Done], column: str, title: str, y: str, about: str) -> Plot:
    """A column of the runs whose steps were taken apart."""
    at, curves = COLUMNS.index(column), list[Curve]()
    for name in FORCES:
        for d in where(done, name=f"forces-{name}"):
            rows = [row for row in d.found["curve"] if row[at] and row[0]]
            values = [row[at] for row in rows]
            curves.append(Curve(LABELS[name], [r[0] for r in rows], values, COLOURS[name]))
    return Plot(title, "step", y, curves, about, log_x=True, log_y=column != "straightness")


def _pace(name: str, grid: Sequence[Done], colour: str) -> Curve:
    """Steps against learning rate × decay, a point a setting."""
    x = [d.settings["lr"] * d.settings["weight_decay"] for d in grid]
    y = [math.nan if d.found["reached"] is None else float(d.found["reached"]) for d in grid]
    return Curve(name, x, y, colour, points=True)


def _channel_plot(d: Done) -> Plot:
    rows = d.found["curve"]
    steps = [r[0] for r in rows]
    names = (
        "training accuracy",
        "test accuracy",
        "target's energy in the channel",
        "test accuracy of the kernel alone",
    )
    looks = (("other", "dot"), ("adamw", "solid"), ("poprisk", "solid"), ("poprisk", "dash"))
    return Plot(
        f"The target enters the channel (p = {d.settings['p']})",
        "step",
        "share",
        [
            Curve(name, steps, [r[i] for r in rows], colour, dash)
            for i, (name, (colour, dash)) in enumerate(zip(names, looks, strict=True), 1)
        ],
        f"The channel: the leading {d.settings['rank']} directions of the kernel at that moment; "
        f"a random target would have {d.found['chance']:.0%} of its energy there.",
    )
