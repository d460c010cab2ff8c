"""Claim, by others: the gate fails where an answer takes two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poprisk.intervals import t_interval
from poprisk_lab.studies.claim import (
    Claim,
    Curve,
    Done,
    Findings,
    Found,
    Picture,
    Plot,
    Trial,
    Workspace,
    by_seed,
    steps_of,
    where,
)
from poprisk_lab.studies.grokking import runs
from poprisk_lab.studies.judge import Criterion, difference, speed_up, written

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
    best = {name: by_seed(done, "best", name=name) for name in ARMS}
    gap = difference(best["ours"], best["adamw"])
    literal = difference(best["letter-snr"], best["adamw"])
    ours, adamw = (steps_of(done, name=name) for name in ("ours", "adamw"))
    chance = 1 / done[0].settings["p"]
    ends = {name: _final(done, name) for name in ARMS}
    learned = t_interval(list(best["ours"].values()))
    return Findings(
        [
            Criterion("best test accuracy, gate", learned, min(0.5, 3 * chance), percent=True),
            Criterion("test accuracy, gate minus AdamW", gap, LEVEL, percent=True),
            Criterion("Algorithm 1 (snr) minus AdamW", literal, LEVEL, percent=True, decides=False),
            Criterion(
                "test accuracy at the end, gate minus AdamW",
                difference(ends["ours"], ends["adamw"]),
                LEVEL,
                percent=True,
                decides=False,
            ),
            Criterion(
                "times fewer steps to 95% than AdamW", speed_up(adamw, ours), 1.0, decides=False
            ),
        ],
        ours=f"the gate reaches {written(learned, percent=True)} test accuracy, AdamW "
        f"{written(t_interval(list(best['adamw'].values())), percent=True)}",
        controls=f"Algorithm 1 to the letter {written(literal, percent=True)} against AdamW; at "
        f"the end of training the gate stands at "
        f"{written(t_interval(list(ends['ours'].values())), percent=True)}, AdamW at "
        f"{written(t_interval(list(ends['adamw'].values())), percent=True)}",
        sentences=[
            f"95% is reached by {len(ours.reached) - ours.censored} of {len(ours.reached)} gated "
            f"runs and by {len(adamw.reached) - adamw.censored} of AdamW's in "
            f"{done[0].settings['limit']:,} steps."
        ],
        table=[
            ["arm", "seed", "best test accuracy", "at the end", "steps to 95%"],
            *(
                [
                    LABELS[d.settings["name"]][0],
                    str(d.settings["seed"]),
                    f"{100 * d.found['best']:.1f}%",
                    f"{100 * d.found['curve'][-1][3]:.1f}%",
                    str(d.found["reached"] or "never"),
                ]
                for d in done
            ),
        ],
    )


def _final(done: Sequence[Done], name: str) -> dict[int, float]:
    """Test accuracy at the last measurement, by seed."""
    return {d.settings["seed"]: d.found["curve"][-1][3] for d in where(done, name=name)}


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Accuracy over training, one line a seed."""
    curves = []
    for name, (label, colour) in LABELS.items():
        for d in where(done, name=name):
            x, y = [r[0] for r in d.found["curve"]], [r[3] for r in d.found["curve"]]
            shown = label if d.settings["seed"] == 0 else ""
            curves.append(Curve(shown, x, y, colour))
    about = "One line a seed; the same network, learning rate and decay for all."
    return [Plot("Held-out accuracy", "step", "accuracy", curves, about)]


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
