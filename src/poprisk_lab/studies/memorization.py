"""Wrong labels on handwritten digits: how accurate every arm ends, and how much it memorizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from poprisk.intervals import Interval
from poprisk_lab.arms import DEFAULT_ADAMW, default_arms
from poprisk_lab.fit import ArmRun
from poprisk_lab.plots import Line, Plot, Table, metric_line, rounded, seeds_line, tabulate, thinned
from poprisk_lab.results import TrialResult, across
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, difference
from poprisk_lab.tasks import load_task

OURS, MATCHED, SHUFFLED, PAPER = "poprisk", "rms-matched", "shuffled", "paper-soft"
BEST = "best"
RATES, DECAYS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (0.01, 1.0)
GRID = tuple(f"adamw-lr{lr:g}-wd{decay:g}" for lr in RATES for decay in DECAYS)
SAME = "adamw-lr{lr:g}-wd{weight_decay:g}".format(**DEFAULT_ADAMW)
LABELS = {
    OURS: "PopRiskAdamW",
    PAPER: "Algorithm 1, soft mask",
    "paper-hard": "Algorithm 1, hard mask",
    "paper-snr": "Algorithm 1, snr mask",
    SAME: "AdamW, same settings",
    MATCHED: "AdamW, RMS-matched",
    SHUFFLED: "shuffled mask",
}
NOISES = (0.0, 0.2, 0.4, 0.6)
SEEDS = range(100, 106)  # no comparison on record has used these
COLOURS = {OURS: "poprisk", PAPER: "paper", SAME: "adamw", BEST: "adamw"}
COLOURS |= {MATCHED: "rms-matched", SHUFFLED: "shuffled"}
POINTS, COST = 14, 0.01
FIGURES = {"accuracy": "accuracy", "best epoch": "best", "memorized": "memorized"}


def trials(quick: bool) -> list[Trial]:
    """One arm at one noise level on one seed; RMS-matched AdamW is trained with what it follows."""
    arms = [*LABELS, *(name for name in GRID if name != SAME)]
    noises, seeds, size = NOISES, SEEDS, {"hidden": 256, "epochs": 80}
    if quick:
        arms = [OURS, MATCHED, PAPER, SHUFFLED, SAME, GRID[4]]
        noises, seeds, size = (0.0, 0.4), range(2), {"hidden": 48, "epochs": 10}
    return [
        Trial(f"{arm}-noise{noise:g}-{seed}",
              {"arm": arm, "noise": noise, "seed": seed, **size}, needs=("sklearn",))
        for seed in seeds
        for noise in noises
        for arm in arms
        if arm != MATCHED
    ]  # fmt: skip


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train one arm (and, after our own, AdamW at its update sizes)."""
    arms = {arm.name: arm for arm in default_arms(full=True)}
    size = {key: settings[key] for key in ("seed", "noise", "hidden")}
    task = dataclasses.replace(load_task("digits", **size), epochs=settings["epochs"])
    leads = settings["arm"] == OURS
    run = ArmRun(task, arms[settings["arm"]], settings["seed"], record=leads)
    found = {settings["arm"]: _summary(list(run.rows()))}
    if leads:
        follower = ArmRun(task, arms[MATCHED], settings["seed"], trace=run.progress.trace)
        found[MATCHED] = _summary(list(follower.rows()))
    return {"arms": found}


def _summary(rows: list[dict[str, Any]]) -> Metrics:
    *epochs, end = rows
    kept = thinned(len(epochs), POINTS)
    found = {"accuracy": end["final_metric"], "memorized": end["final_memorized"]}
    found |= {"best": end["best_metric"], "best_epoch": end["best_epoch"]}
    if end["arm"] not in LABELS:  # the rest of the grid is not drawn
        return found
    curves = {"epochs": [epochs[i]["epoch"] for i in kept]}
    curves["accuracies"] = rounded([epochs[i]["test_metric"] for i in kept])
    if end["final_memorized"] is not None:
        curves["shares"] = rounded([epochs[i]["memorized"] for i in kept])
    return found | {"curves": curves}


class Levels:
    """What was found, by arm, noise and seed."""

    def __init__(self, results: Results) -> None:
        self.runs = Results(
            TrialResult({**settings, "arm": arm}, found)
            for settings, metrics in results
            for arm, found in metrics["arms"].items()
        )
        self.noises = sorted(self.runs.by("noise"))
        self.noisy = [noise for noise in self.noises if noise > 0]
        there = self.runs.by("arm")
        self.arms = [arm for arm in dict.fromkeys([*LABELS, *GRID]) if arm in there]

    def values(self, arm: str, noise: float, key: str = "accuracy") -> dict[int, float]:
        """One figure of an arm by seed; what was not measured is left out."""
        found = self.runs.where(arm=arm, noise=noise).by_seed(key)
        return {seed: value for seed, value in found.items() if value is not None}

    def averaged(self, arm: str, key: str, noises: Sequence[float] = ()) -> dict[int, float]:
        """The mean over some levels, by default the noisy ones, by seed."""
        return across([self.values(arm, n, key) for n in noises or self.noisy], fmean)

    def gained(self, a: str, b: str, *noises: float, key: str = "accuracy") -> Interval:
        """What one arm has more than another, averaged over levels."""
        return difference(self.averaged(a, key, noises), self.averaged(b, key, noises))

    def best(self, noise: float) -> str:
        """The AdamW of the grid with the best final test accuracy on average."""
        grid = [arm for arm in GRID if self.values(arm, noise)]
        return max(grid, key=lambda arm: fmean(self.values(arm, noise).values()))


def judge(results: Results) -> Report:
    """More accurate than AdamW at the same settings, less memorized, nothing lost without noise."""
    levels = Levels(results)
    gain, decided = partial(at_least, percent=True), list[Criterion]()
    for n in levels.noisy:
        kept = levels.gained(OURS, SAME, n, key="memorized")
        decided += [
            gain(f"{n:.0%} wrong labels: accuracy gained on AdamW at equal settings",
                 levels.gained(OURS, SAME, n), 0.0),
            at_most(f"{n:.0%} wrong labels: share of them memorized, minus AdamW's",
                    kept, 0.0, percent=True),
        ]  # fmt: skip
    allowed = "right labels: accuracy gained on AdamW, a loss of one point allowed"
    clean = [n for n in levels.noises if n == 0]
    decided += [gain(allowed, levels.gained(OURS, SAME, n), -COST) for n in clean]
    decided += [
        gain("Algorithm 1 to the letter, soft mask: accuracy gained on AdamW, mean of levels",
             levels.gained(PAPER, SAME), 0.0),
        at_most("Algorithm 1: share of wrong labels memorized, minus AdamW's",
                levels.gained(PAPER, SAME, key="memorized"), 0.0, percent=True),
    ]  # fmt: skip
    best = {n: levels.best(n) for n in levels.noises}
    beside = [
        *(gain(f"{n:.0%} wrong labels: gained on the best AdamW of the grid, picked by the test "
               "set", levels.gained(OURS, best[n], n), 0.0) for n in levels.noises),
        gain("gained on AdamW at the same update sizes, mean over noise levels",
             levels.gained(OURS, MATCHED), 0.0),
        gain("gained on a shuffled mask, mean over noise levels",
             levels.gained(OURS, SHUFFLED), 0.0),
    ]  # fmt: skip
    notes = [
        f"With {n:.0%} wrong labels the best AdamW lies at the edge of the grid "
        f"({_label(best[n])}): a wider one may hold a better one."
        for n in levels.noises
        if best[n] in (*GRID[:2], *GRID[-2:])
    ]
    return Report([*decided, *controls(*beside)], _table(levels), notes)


def _table(levels: Levels) -> Table:
    """Final accuracy and share of the wrong labels memorized, by arm and noise level."""

    def at(noise: float, key: str) -> Callable[[TrialResult], float | None]:
        return lambda d: d.metrics[key] if d.settings["noise"] == noise else None

    columns = {
        f"{noise:.0%} wrong: {name}": at(noise, key)
        for noise in levels.noises
        for name, key in FIGURES.items()
        if noise or key != "memorized"
    }
    groups = {_label(arm): levels.runs.where(arm=arm) for arm in levels.arms}
    about = "The best epoch is picked by the test set."
    return tabulate("arm", groups, columns, percent=columns, about=about)


def _label(arm: str) -> str:
    if arm in LABELS:
        return LABELS[arm]
    lr, decay = arm.removeprefix("adamw-lr").split("-wd")
    return f"AdamW, lr {lr}, decay {decay}"


def show(results: Results) -> Plots:
    """Accuracy and memorization by noise level, and along the runs at one level."""
    levels = Levels(results)
    at = min(levels.noisy, key=lambda noise: abs(noise - 0.4))
    return [
        Plot("Final accuracy", "share of wrong labels", "test accuracy",
             _by_noise(levels, "accuracy", levels.noises),
             "Mean over seeds with 95% intervals; no run was stopped early. The best AdamW is "
             "picked by the test set at each level."),
        Plot("Memorization", "share of wrong labels", "share reproduced",
             _by_noise(levels, "memorized", levels.noisy),
             "How many of the wrong labels the trained net gives back, at the end."),
        Plot(f"Accuracy along the runs, {at:.0%} wrong labels", "epoch", "test accuracy",
             _along(levels, "accuracies", at), "AdamW learns first and memorizes then."),
        Plot(f"Memorization along the runs, {at:.0%} wrong labels", "epoch",
             "share reproduced", _along(levels, "shares", at),
             "One in ten or so is a chance agreement before anything is learned."),
    ]  # fmt: skip


def _by_noise(levels: Levels, key: str, noises: Sequence[float]) -> list[Line]:
    found = []
    for arm, colour in COLOURS.items():
        label = "AdamW, best of the grid" if arm == BEST else LABELS[arm]
        dash = "dash" if arm == BEST else "solid"
        arms = [levels.best(noise) if arm == BEST else arm for noise in noises]
        columns = [levels.values(a, noise, key) for a, noise in zip(arms, noises, strict=True)]
        if rows := across(columns, list):
            found.append(seeds_line(label, list(noises), [*rows.values()], colour, dash=dash))
    return found


def _along(levels: Levels, key: str, noise: float) -> list[Line]:
    return [
        metric_line(LABELS[arm], runs, ("curves", "epochs"), ("curves", key), colour)
        for arm, colour in COLOURS.items()
        if (runs := levels.runs.where(arm=arm, noise=noise))
    ]
