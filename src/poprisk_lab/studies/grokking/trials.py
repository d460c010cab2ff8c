"""The trials of the claim on grokking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from poprisk_lab.studies.claim import Trial
from poprisk_lab.studies.grokking.arms import (
    ARMS,
    BASE,
    BETAS,
    CHANNEL,
    CHANNEL_SEEDS,
    FINE,
    GATE_GRID,
    GRID,
    GROKFAST_GRID,
    QUICK,
    SEEDS,
    TUNING_SEED,
)
from poprisk_lab.studies.grokking.changes import CHANGES, settings_of
from poprisk_lab.studies.grokking.forces import FORCES

FEW = 2
"""Trials of a kind in the quick form."""


def trials(quick: bool) -> list[Trial]:
    """Every arm on its seeds, the grids on the tuning seed, the channel, changes and forces."""
    smaller = QUICK if quick else {}
    found = [
        _trial(name, {**BASE, **arm, **smaller}, seed)
        for name, arm in ARMS.items()
        for seed in range(FEW if quick else SEEDS[name])
    ]
    grids = [[*_adamw_grid()], [*_gate_grid()], [*_grokfast_grid()], [*_changed()]]
    for grid in grids:
        for name, settings in grid[:FEW] if quick else grid:
            seed = settings.get("seed", TUNING_SEED)
            found.append(_trial(name, {**BASE, **settings, **smaller}, seed))
    channel = {**CHANNEL, **smaller, "asked": 40, "rank": 19} if quick else CHANNEL
    found += [_trial("channel", channel, seed) for seed in range(FEW if quick else CHANNEL_SEEDS)]
    for name in FORCES:
        found.append(_trial(f"forces-{name}", {**BASE, **ARMS[name], **FORCES[name], **smaller}, 0))
    return found


def _adamw_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    points = [(lr, decay, 0.98) for lr, decay in GRID]
    points += [(*point, beta2) for point in GRID[:2] for beta2 in BETAS]
    for lr, decay, beta2 in points:
        settings = {"arm": "adamw", "lr": lr, "weight_decay": decay, **FINE, "beta2": beta2}
        yield f"grid-lr{lr:g}-wd{decay:g}-b{beta2:g}", settings


def _gate_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    for lr, decay, z in GATE_GRID:
        settings = {"arm": "poprisk", "lr": lr, "weight_decay": decay, "gate": {"z": z}, **FINE}
        yield f"gate-grid-lr{lr:g}-wd{decay:g}-z{z:g}", settings


def _grokfast_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    for lr, decay, strength in GROKFAST_GRID:
        given = {"arm": "grokfast", "gate": {"grokfast_lamb": strength}, **FINE}
        name = f"grokfast-grid-lr{lr:g}-wd{decay:g}-l{strength:g}"
        yield name, {**given, "lr": lr, "weight_decay": decay}


def _changed() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, change in CHANGES.items():
        yield f"change-{name}", settings_of(change)


def _trial(name: str, settings: dict[str, Any], seed: int) -> Trial:
    return Trial(f"{name}-{seed}", {**settings, "name": name, "seed": seed})
