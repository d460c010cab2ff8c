"""The plots of the claim on flipped preferences."""

from __future__ import annotations

from collections.abc import Mapping

from poprisk_lab.plots import Line, Plot, interval_line, metric_line, points
from poprisk_lab.studies.claim import Plots, Results
from poprisk_lab.studies.dpo.arms import ADAMW, BETWEEN, GATE, MAIN
from poprisk_lab.studies.dpo.methods import (
    FAST,
    OTHER_RECIPE,
    OURS,
    RECIPE,
    SLOWER,
    Method,
    Place,
    cells,
    place_of,
)
from poprisk_lab.tasks.preferences import REWARDS


def show(results: Results) -> Plots:
    """Accuracy, drift and chosen reward over steps, the frontier, and what is found by share."""
    there = cells(results)
    cell = there.get((MAIN, 0.4)) or there[MAIN, BETWEEN]
    best = cell.best(cell.of((ADAMW,)))
    told = cell.best(cell.of(losses=("robust",)))
    drawn = {
        "AdamW, same settings": (FAST, "adamw", "solid"),
        "AdamW, best in hindsight": (best, "adamw", "dash"),
        "PopRiskAdamW": (OURS, "poprisk", "solid"),
        "robust, told the share": (told, "peer", "solid"),
        "recipe": (RECIPE, "paper", "solid"),
    }
    at = f"{place_of(cell)}, {REWARDS[cell.reward].name}"

    def along(key: str) -> list[Line]:
        return [metric_line(name, cell.runs[m], "at", key, colour, dash=dash)
                for name, (m, colour, dash) in drawn.items() if m in cell.runs]  # fmt: skip

    return [
        Plot(f"Accuracy over steps, {at}", "step", "accuracy on clean pairs", along("accuracies"),
             "Bands: 95% intervals over seeds."),
        Plot(f"Drift over steps, {at}", "step", "mean size of implicit rewards", along("drifts"),
             "On held-out pairs, both answers.", log_y=True),
        Plot(f"Reward of chosen answers, {at}", "step", "mean implicit reward", along("chosens"),
             "Of the better answers of held-out pairs: below 0 they have become less likely."),
        _frontier(cell, at),
        _by_share(there, "Accuracy by share of flipped pairs", "final"),
        _by_share(there, "Flipped pairs found", "auroc"),
    ]  # fmt: skip


def _frontier(cell: Place, at: str) -> Plot:
    """Accuracy over KL: who stays near the reference."""
    groups: Mapping[str, tuple[list[Method], str]] = {
        "AdamW": (cell.of((ADAMW,)), "adamw"),
        "PopRiskAdamW": (cell.of((GATE,)), "poprisk"),
        "robust, told the share": (cell.of(losses=("robust",)), "peer"),
        "recipe": ([m for m in (RECIPE, OTHER_RECIPE) if m in cell.runs], "paper"),
    }
    lines = [points(name, [cell.runs[m].mean("kl").mean for m in some],
                    [cell.runs[m].mean("final").mean for m in some], colour)
             for name, (some, colour) in groups.items() if some]  # fmt: skip
    return Plot(f"Accuracy over KL, {at}", "KL from the reference, nats", "accuracy", lines,
                "Points of one colour differ in learning rate. Means over seeds.",
                log_x=True)  # fmt: skip


def _by_share(there: Mapping[tuple[str, float], Place], title: str, key: str) -> Plot:
    here = [c for c in there.values() if c.reward == MAIN and (key == "final" or c.rate > 0)]
    lines = list[Line]()
    for name, method, colour, dash in (
        ("AdamW, same settings", FAST, "adamw", "solid"),
        ("slow AdamW", SLOWER, "adamw", "dash"),
        ("PopRiskAdamW", OURS, "poprisk", "solid"),
        ("recipe", RECIPE, "paper", "solid"),
    ):
        cells_ = [c for c in here if method in c.runs]
        if key == "auroc" and method == RECIPE:
            name, found = "audit", [c.recipes.mean(("audit", key)) for c in cells_]
        else:
            found = [c.runs[method].mean(key) for c in cells_]
        if cells_:
            lines.append(interval_line(name, [c.rate for c in cells_], found, colour, dash=dash))
    return Plot(title, "share of flipped pairs", key.replace("final", "final accuracy"), lines,
                "Bands: 95% intervals over seeds.")  # fmt: skip
