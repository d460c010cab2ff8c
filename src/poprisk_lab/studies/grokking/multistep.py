"""Claim, by others: the gate fails where an answer takes two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from poprisk.intervals import t_interval
from poprisk_lab.plots import Line, Picture, Plot, written
from poprisk_lab.studies.claim import (
    Claim,
    Done,
    Findings,
    Found,
    Trial,
    Workspace,
    by_seed,
    steps_of,
    where,
)
from poprisk_lab.studies.criteria import at_least, controls, difference, speed_up, steps_table
from poprisk_lab.studies.grokking import runs

BASE: dict[str, Any] = {
    "table": "two-step",
    "p": 13,
    "fraction": 0.6,
    "width": 128,
    "hidden": 256,
    "batch": 512,
    "beta2": 0.98,
    "every": 50,
    "after": 0,
    "limit": 3000,
    "lr": 3e-3,
    "weight_decay": 1.0,
}
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


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One run."""
    return runs.run(settings, workspace)


def judge(done: Sequence[Done]) -> Findings:
    """Whether the gate learns the two-step task as well as AdamW at the same settings."""
    ours, adamw, letter = (by_seed(done, "best", name=n) for n in ("ours", "adamw", "letter-snr"))
    chance = 1 / done[0].settings["p"]
    decided = [
        at_least("best test accuracy, gate", t_interval(ours.values()), min(0.5, 3 * chance),
                 percent=True),
        at_least("test accuracy, gate minus AdamW", difference(ours, adamw), LEVEL, percent=True),
    ]  # fmt: skip
    ends = [
        {d.settings["seed"]: d.found["curve"][-1][3] for d in where(done, name=name)}
        for name in ("ours", "adamw")
    ]
    faster = speed_up(steps_of(done, name="adamw"), steps_of(done, name="ours"))
    beside = [
        at_least("Algorithm 1 (snr) minus AdamW", difference(letter, adamw), LEVEL, percent=True),
        at_least("test accuracy at the end, gate minus AdamW", difference(*ends), LEVEL,
                 percent=True),
        at_least("times fewer steps to 95% than AdamW", faster, 1.0),
    ]  # fmt: skip
    names = {label: name for name, (label, _) in LABELS.items()}

    def mean(figure: Callable[[Done], float]) -> Callable[[str], str]:
        return lambda label: written(
            t_interval(map(figure, where(done, name=names[label]))), percent=True
        )

    table = steps_table(
        "arm",
        {label: steps_of(done, name=name) for label, name in names.items()},
        lambda label: None if names[label] == "adamw" else steps_of(done, name="adamw"),
        more={
            "best test accuracy": mean(lambda d: d.found["best"]),
            "at the end": mean(lambda d: d.found["curve"][-1][3]),
        },
        keep_all=True,
        about="Steps to 95%; the log-rank test is against AdamW.",
    )
    return Findings([*decided, *controls(*beside)], table)


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Accuracy over training, one line a seed."""
    lines = list[Line]()
    for name, (label, colour) in LABELS.items():
        for d in where(done, name=name):
            x, _, _, y = zip(*d.found["curve"], strict=True)
            lines.append(Line(label if d.settings["seed"] == 0 else "", x, y, colour))
    about = "One line a seed; the same network, learning rate and decay for all."
    return [Plot("Held-out accuracy", "step", "accuracy", lines, about)]


CLAIM = Claim(
    name="grokking-multistep",
    title="Grokking in two steps",
    statement="Where an answer takes two steps, (a·b + c) mod p, the gate still learns it as well "
    "as AdamW does.",
    source="no claim of the paper: a public report says that gated training fails there",
    paper="",
    published=[
        "the report names no settings: a multi-step algorithmic task, the gate to the letter"
    ],
    ours=[
        "p = 13, 60% of the 2,197 triples for training, the network of the claim on grokking",
        "learning rate 3e-3, decay 1, batch 512, 3,000 steps, alike for all",
        "as well: at most five points of best test accuracy below AdamW",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
