"""Choosing an arm by its twin, against hindsight: python benchmarks/risk_selection.py [SEEDS].

Learning rate × weight decay × mask on four problems; resumable like risk_stopping.py. The chosen
arm is scored at its own estimated stopping point, hindsight takes the best arm at its best point.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from risk_problems import PROBLEMS, Problem, adamw, gate
from risk_stopping import mean, slug, with_twin

from poprisk import stopping_point
from poprisk_lab.runner import environment

RUNS = Path("runs/risk-selection")
RESULTS = Path(__file__).parent / "results" / "risk-selection.json"
SEEDS = range(20, 22)
NAMES = (
    "ridges, MLP, AdamW",
    "ridges, deep MLP, PopRiskAdamW",
    "digits 40%, MLP, AdamW",
    "parabola 20%, MLP, SGD with momentum",
)
RATES, DECAYS, MASKS = (3e-4, 1e-3, 3e-3), (0.01, 0.3), (None, "soft", "snr")


def arms(problem: Problem) -> dict[str, Problem]:
    """The grid, by name; no mask is AdamW."""
    grid = itertools.product(RATES, DECAYS, MASKS)
    return {
        f"lr {lr:g}, decay {decay:g}, {mask or 'AdamW'}": problem._replace(
            optimizer=gate(lr, decay, mask) if mask else adamw(lr, decay)
        )
        for lr, decay, mask in grid
    }


def measure(problem: Problem, seed: int) -> dict[str, Any]:
    """One arm: its true risks, its estimated stopping point and the estimate there."""
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
        "default, at the end": rows["lr 0.001, decay 0.01, AdamW"]["risks"][-1],
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


def gather() -> None:
    """Choose among the arms of every problem and seed that is finished, and write the results."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in NAMES}
    for name, seed in itertools.product(NAMES, SEEDS):
        paths = {
            arm: RUNS / f"{slug(name)}-{slug(arm)}-{seed}.json" for arm in arms(PROBLEMS[name])
        }
        if all(path.exists() for path in paths.values()):
            rows = {arm: json.loads(path.read_text()) for arm, path in paths.items()}
            found[name][seed] = choose(rows)
    content = {
        "environment": environment(1),
        "grid": {"learning rates": RATES, "weight decays": DECAYS, "masks": MASKS},
        "all": summary([row for rows in found.values() for row in rows.values()]),
        "problems": {name: summary(list(rows.values())) for name, rows in found.items()},
        "choices": found,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["all"], indent=1))


def main(seeds: list[int]) -> None:
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(seeds, NAMES):
        for arm, problem in arms(PROBLEMS[name]).items():
            path = RUNS / f"{slug(name)}-{slug(arm)}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(measure(problem, seed)))
                print(name, arm, seed, flush=True)
    gather()


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or list(SEEDS))
