"""Choosing an arm by its twin, against hindsight.

Learning rate × weight decay × mask on four problems. The chosen arm is scored at its own estimated
stopping point, hindsight takes the best arm at its best point.
"""

from __future__ import annotations

import itertools
from typing import Any

from poprisk import stopping_point
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.studies.risk.problems import QUICK_EPOCHS, adamw, gate, mean, problem_of, slug
from poprisk_lab.studies.risk.stopping import with_twin
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial

SEEDS = range(20, 22)
NAMES = (
    "ridges, MLP, AdamW",
    "ridges, deep MLP, PopRiskAdamW",
    "digits 40%, MLP, AdamW",
    "parabola 20%, MLP, SGD with momentum",
)
RATES, DECAYS, MASKS = (3e-4, 1e-3, 3e-3), (0.01, 0.3), (None, "soft", "snr")


DEFAULT = "lr 0.001, decay 0.01, AdamW"


def trials(quick: bool) -> list[Trial]:
    """The grid of arms on every problem and seed; no mask is AdamW. Quick: one problem and rate."""
    grid = itertools.product(
        [0] if quick else SEEDS, NAMES[:1] if quick else NAMES, RATES[1:2] if quick else RATES
    )
    return [
        Trial(
            f"{slug(name)}-{slug(arm)}-{seed}",
            {"problem": name, "seed": seed, "arm": arm, "lr": lr, "decay": decay, "mask": mask}
            | ({"epochs": QUICK_EPOCHS} if quick else {}),
        )
        for (seed, name, lr), decay, mask in itertools.product(grid, DECAYS, MASKS)
        for arm in [f"lr {lr:g}, decay {decay:g}, {mask or 'AdamW'}"]
    ]


def run(settings: Settings, _: Workspace) -> Metrics:
    """One arm: its true risks, its estimated stopping point and the estimate there."""
    lr, decay, mask, seed = (settings[k] for k in ("lr", "decay", "mask", "seed"))
    problem = problem_of(settings)._replace(
        optimizer=gate(lr, decay, mask) if mask else adamw(lr, decay)
    )
    estimates, risks = with_twin(problem, problem.data(seed), seed)
    point = stopping_point(estimates)
    return {
        "risks": risks,
        "stop": point.index,
        "value": point.estimate.value,
        "valid": point.valid,
        "reason": point.reason,
    }


def choose(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arm that `poprisk.select` takes, beside hindsight."""
    chosen = min((r["value"], name) for name, r in rows.items() if r["valid"])[1]
    least = {name: min(r["risks"]) for name, r in rows.items()}
    best = min(least, key=lambda name: least[name])
    return {
        "chosen": chosen,
        "risk": rows[chosen]["risks"][rows[chosen]["stop"]],
        "best": best,
        "least risk": least[best],
        "default, at the end": rows[DEFAULT]["risks"][-1],
        "median arm at its best": sorted(least.values())[len(least) // 2],
        "arms without a valid estimate": sorted(n for n, r in rows.items() if not r["valid"]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Excess risk of the chosen arm over hindsight, and of a default and of the median arm."""

    def excess(risk: float, row: dict[str, Any]) -> float:
        return risk / row["least risk"] - 1

    return {
        "runs": len(rows),
        "excess risk of the chosen arm": mean([excess(r["risk"], r) for r in rows]),
        "AdamW at 1e-3 to the end": mean([excess(r["default, at the end"], r) for r in rows]),
        "median arm at its best": mean([excess(r["median arm at its best"], r) for r in rows]),
    }


def report(done: Results) -> dict[str, Any]:
    """Choose among the arms of every problem and seed."""
    seeds = sorted({d.settings["seed"] for d in done})
    found = {
        name: {
            seed: choose(
                {d.settings["arm"]: d.metrics for d in done.where(problem=name, seed=seed)}
            )
            for seed in seeds
        }
        for name in dict.fromkeys(d.settings["problem"] for d in done)
    }
    return {
        "grid": {"learning rates": RATES, "weight decays": DECAYS, "masks": MASKS},
        "all": summary([row for rows in found.values() for row in rows.values()]),
        "problems": {name: summary([*rows.values()]) for name, rows in found.items()},
        "choices": found,
    }


STUDY = Study("risk-selection", trials, run, report)
