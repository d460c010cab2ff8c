"""Claim, by others: the gate fails where an answer takes two steps."""

from __future__ import annotations

from typing import Any

from poprisk.intervals import t_interval
from poprisk_lab.plots import Line, Plot
from poprisk_lab.results import TrialResult
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import (
    Steps,
    at_least,
    controls,
    difference,
    speed_up,
    steps_table,
)
from poprisk_lab.studies.grokking import runs

BASE: dict[str, Any] = {
    "table": "two-step", "p": 13, "fraction": 0.6, "width": 128, "hidden": 256, "batch": 512,
    "beta2": 0.98, "every": 50, "after": 0, "limit": 3000, "lr": 3e-3, "weight_decay": 1.0,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "ours": {"arm": "poprisk", "gate": {}},
    "adamw": {"arm": "adamw"},
    "letter-snr": {
        "arm": "paper",
        "gate": {"mode": "paper", "mask": "snr", "softness": 1.0, "alpha": "finite"},
    },
}
LABELS = {
    "ours": ("PopRiskAdamW, defaults", "poprisk"),
    "adamw": ("AdamW, same settings", "adamw"),
    "letter-snr": ("Algorithm 1, snr mask", "paper"),
}
QUICK = {"p": 5, "width": 32, "hidden": 64, "batch": 32, "limit": 60, "every": 20}
LEVEL = -0.05
"""Accuracy that the gate may lose and still be said to learn as well."""


def trials(quick: bool) -> list[Trial]:
    """Every arm on every seed."""
    smaller = QUICK if quick else {}
    return [
        Trial(f"{name}-{seed}", {**BASE, **arm, **smaller, "name": name, "seed": seed})
        for name, arm in ARMS.items()
        for seed in range(2 if quick else 5)
    ]


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One run."""
    return runs.run(settings, workspace)


def judge(results: Results) -> Report:
    """Whether the gate learns the two-step task as well as AdamW at the same settings."""
    arms = {name: results.where(name=name) for name in ARMS}
    ours, adamw, letter = (some.by_seed("best") for some in arms.values())
    ends = {name: {d.settings["seed"]: _end(d) for d in some} for name, some in arms.items()}
    chance = 1 / results[0].settings["p"]
    decided = [
        at_least("best test accuracy, gate", t_interval(ours.values()), min(0.5, 3 * chance),
                 percent=True),
        at_least("test accuracy, gate minus AdamW", difference(ours, adamw), LEVEL, percent=True),
    ]  # fmt: skip
    beside = [
        at_least("Algorithm 1 (snr) minus AdamW", difference(letter, adamw), LEVEL, percent=True),
        at_least("test accuracy at the end, gate minus AdamW",
                 difference(ends["ours"], ends["adamw"]), LEVEL, percent=True),
        at_least("times fewer steps to 95% than AdamW",
                 speed_up(Steps.of(arms["adamw"]), Steps.of(arms["ours"])), 1.0),
    ]  # fmt: skip
    table = steps_table(
        "arm",
        {LABELS[name][0]: some for name, some in arms.items()},
        lambda label: None if label == LABELS["adamw"][0] else arms["adamw"],
        {"best test accuracy": "best", "at the end": _end},
        percent=["best test accuracy", "at the end"],
        keep_all=True,
        about="Steps to 95%; the log-rank test is against AdamW.",
    )
    return Report([*decided, *controls(*beside)], table)


def _end(trial: TrialResult) -> float:
    return trial.metrics["curve"][-1][3]


def show(results: Results) -> Plots:
    """Accuracy over training, one line a seed."""
    lines = list[Line]()
    for name, (label, colour) in LABELS.items():
        for d in results.where(name=name):
            x, y = [r[0] for r in d.metrics["curve"]], [r[3] for r in d.metrics["curve"]]
            lines.append(Line(label if d.settings["seed"] == 0 else "", x, y, colour))
    about = "One line a seed; the same network, learning rate and decay for all."
    return [Plot("Held-out accuracy", "step", "accuracy", lines, about)]
