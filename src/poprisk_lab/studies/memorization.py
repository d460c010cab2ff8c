"""Wrong labels on handwritten digits: how accurate every arm ends, and how much it memorizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poprisk.intervals import Interval, t_interval
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
)
from poprisk_lab.studies.curves import mean_curve, rounded, thinned
from poprisk_lab.studies.judge import Criterion, difference, written
from poprisk_lab.verdict import DEFAULT_ADAMW

OURS, MATCHED, SHUFFLED, PAPER = "poprisk", "rms-matched", "shuffled", "paper-soft"
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
POINTS = 14
COST = 0.01

Values = dict[int, float]


def trials(quick: bool) -> list[Trial]:
    """One arm at one noise level on one seed; RMS-matched AdamW is trained with what it follows."""
    arms = [*LABELS, *(name for name in GRID if name != SAME)]
    noises, seeds, size = NOISES, SEEDS, {"hidden": 256, "epochs": 80}
    if quick:
        arms = [OURS, MATCHED, PAPER, SHUFFLED, SAME, GRID[4]]
        noises, seeds, size = (0.0, 0.4), range(2), {"hidden": 48, "epochs": 10}
    return [
        Trial(
            f"{arm}-noise{noise:g}-{seed}",
            {"arm": arm, "noise": noise, "seed": seed, **size},
            ("sklearn",),
        )
        for seed in seeds
        for noise in noises
        for arm in arms
        if arm != MATCHED
    ]


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Train one arm (and, after our own, AdamW at its update sizes)."""
    import dataclasses

    from poprisk_lab.arms import default_arms
    from poprisk_lab.fit import Run
    from poprisk_lab.tasks import load_task

    arms = {arm.name: arm for arm in default_arms(full=True)}
    task = load_task(
        "digits", seed=settings["seed"], noise=settings["noise"], hidden=settings["hidden"]
    )
    task = dataclasses.replace(task, epochs=settings["epochs"])
    leads = settings["arm"] == OURS
    run = Run(task, arms[settings["arm"]], settings["seed"], record=leads)
    found = {settings["arm"]: _summary(list(run.rows()))}
    if leads:
        follower = Run(task, arms[MATCHED], settings["seed"], trace=run.progress.trace)
        found[MATCHED] = _summary(list(follower.rows()))
    return {"arms": found}


def _summary(rows: list[dict[str, Any]]) -> Found:
    *epochs, end = rows
    kept = thinned(len(epochs), POINTS)
    found = {
        "accuracy": end["final_metric"],
        "memorized": end["final_memorized"],
        "best": end["best_metric"],
        "best_epoch": end["best_epoch"],
    }
    if end["arm"] not in LABELS:  # the rest of the grid is not drawn
        return found
    curves = {"epochs": [epochs[i]["epoch"] for i in kept]}
    curves["accuracies"] = rounded([epochs[i]["test_metric"] for i in kept])
    if end["final_memorized"] is not None:
        curves["shares"] = rounded([epochs[i]["memorized"] for i in kept])
    return found | {"curves": curves}


class Table:
    """What was found, by arm, noise and seed."""

    def __init__(self, done: Sequence[Done]) -> None:
        self.runs: dict[tuple[str, float], dict[int, Found]] = {}
        for settings, found in done:
            for arm, result in found["arms"].items():
                key = arm, settings["noise"]
                self.runs.setdefault(key, {})[settings["seed"]] = result
        self.noises = sorted({noise for _, noise in self.runs})
        self.noisy = [noise for noise in self.noises if noise > 0]
        self.arms = [*(a for a in LABELS if self._has(a)), *(a for a in GRID if self._has(a))]
        self.arms = list(dict.fromkeys(self.arms))

    def _has(self, arm: str) -> bool:
        return any(arm == name for name, _ in self.runs)

    def values(self, arm: str, noise: float, key: str = "accuracy") -> Values:
        """One figure of an arm by seed; what was not measured is left out."""
        found = self.runs.get((arm, noise), {})
        return {seed: r[key] for seed, r in found.items() if r[key] is not None}

    def averaged(self, arm: str, key: str) -> Values:
        """The mean over the noisy levels, by seed."""
        return _mean([self.values(arm, noise, key) for noise in self.noisy])

    def hindsight(self) -> Values:
        """Mean accuracy over the noisy levels of the best AdamW of each, by seed."""
        return _mean([self.values(self.best(noise), noise) for noise in self.noisy])

    def best(self, noise: float) -> str:
        """The AdamW of the grid with the best final test accuracy on average."""
        grid = [arm for arm in GRID if (arm, noise) in self.runs]
        return max(grid, key=lambda arm: t_interval([*self.values(arm, noise).values()]).mean)


def _mean(levels: list[Values]) -> Values:
    return {s: sum(v[s] for v in levels) / len(levels) for s in levels[0]} if levels else {}


def judge(done: Sequence[Done]) -> Findings:
    """More accurate than AdamW at the same settings, less memorized, nothing lost without noise."""
    table = Table(done)
    lead = {n: difference(table.values(OURS, n), table.values(SAME, n)) for n in table.noises}
    criteria = list[Criterion]()
    for noise in table.noisy:
        criteria += [
            _gain(f"{noise:.0%} wrong labels: accuracy gained on AdamW at equal settings",
                  lead[noise]),
            Criterion(
                f"{noise:.0%} wrong labels: share of them memorized, minus AdamW's",
                difference(table.values(OURS, noise, "memorized"),
                           table.values(SAME, noise, "memorized")),
                0.0, at_most=True, percent=True,
            ),
        ]  # fmt: skip
    criteria += [_gain("right labels: accuracy gained on AdamW, a loss of one point allowed",
                       lead[n], needed=-COST) for n in table.noises if n == 0]  # fmt: skip
    criteria += _literal(table) + _controls(table)
    return Findings(
        criteria,
        ours=_ours(table),
        controls=_controls_in_words(table),
        sentences=_sentences(table),
        table=_rows(table),
    )


def _gain(
    asks: str, found: Interval, *, needed: float = 0.0, decides: bool = True, at_most: bool = False
) -> Criterion:
    return Criterion(asks, found, needed, percent=True, decides=decides, at_most=at_most)


def _literal(table: Table) -> list[Criterion]:
    """Algorithm 1 to the letter, averaged over the noisy levels."""
    accuracy, memorized = (
        difference(table.averaged(PAPER, key), table.averaged(SAME, key))
        for key in ("accuracy", "memorized")
    )
    return [
        _gain(
            "Algorithm 1 to the letter, soft mask: accuracy gained on AdamW, mean of levels",
            accuracy,
        ),
        _gain(
            "Algorithm 1: share of wrong labels memorized, minus AdamW's", memorized, at_most=True
        ),
    ]


def _controls(table: Table) -> list[Criterion]:
    found = []
    for noise in table.noises:
        rival = table.values(table.best(noise), noise)
        against = difference(table.values(OURS, noise), rival)
        asks = f"{noise:.0%} wrong labels: gained on the best AdamW of the grid, picked by the "
        found.append(_gain(asks + "test set", against, decides=False))
    for arm, words in ((MATCHED, "AdamW at the same update sizes"), (SHUFFLED, "a shuffled mask")):
        against = difference(table.averaged(OURS, "accuracy"), table.averaged(arm, "accuracy"))
        found.append(_gain(f"gained on {words}, mean over noise levels", against, decides=False))
    return found


def _spread(values: Values) -> str:
    return written(t_interval([*values.values()]), percent=True)


def _ours(table: Table) -> str:
    return "; ".join(
        f"{noise:.0%} wrong: {_spread(table.values(OURS, noise))} accurate, "
        f"{_spread(table.values(OURS, noise, 'memorized'))} of them memorized"
        for noise in table.noisy
    )


def _controls_in_words(table: Table) -> str:
    ours = table.averaged(OURS, "accuracy")
    if not ours:
        return ""
    rivals = {
        "AdamW": table.averaged(SAME, "accuracy"),
        "the best AdamW of each level": table.hindsight(),
        "AdamW at the same update sizes": table.averaged(MATCHED, "accuracy"),
        "a shuffled mask": table.averaged(SHUFFLED, "accuracy"),
    }
    gained = ", ".join(
        f"{name} {written(difference(ours, rival), percent=True)}" for name, rival in rivals.items()
    )
    return f"accuracy gained, mean over noise levels, on {gained}"


def _sentences(table: Table) -> list[str]:
    found = []
    for noise in table.noisy:
        best = table.best(noise)
        gap = difference(table.values(OURS, noise), table.values(best, noise))
        oracle = t_interval([*table.values(SAME, noise, "best").values()]).mean
        found.append(
            f"With {noise:.0%} wrong labels AdamW at the same settings memorizes "
            f"{_spread(table.values(SAME, noise, 'memorized'))} of them; at its best epoch, picked "
            f"by the test set, it has {oracle:.1%}. The best of the grid is {_label(best)}; "
            f"against it PopRiskAdamW is {_told(gap)}."
        )
    if table.noisy:
        shares = (
            f"{LABELS[arm].removeprefix('Algorithm 1, ')} "
            f"{_spread(table.values(arm, table.noisy[-1], 'memorized'))}"
            for arm in table.arms
            if arm.startswith("paper")
        )
        found.append(
            f"Memorized by Algorithm 1 to the letter, {table.noisy[-1]:.0%} wrong labels: "
            f"{', '.join(shares)}."
        )
    for noise in table.noises:
        if table.best(noise) in (GRID[0], GRID[1], GRID[-2], GRID[-1]):
            found.append(
                f"With {noise:.0%} wrong labels the best AdamW lies at the edge of the grid "
                f"({_label(table.best(noise))}): a wider one may hold a better one."
            )
    return found


def _told(gap: Interval) -> str:
    size = f"{written(gap, percent=True)} in accuracy"
    if gap.few:
        return f"too few seeds to tell: {size}"
    if gap.low > 0:
        return f"better by {size}"
    return f"worse, by {size}" if gap.high < 0 else f"not told apart: {size}"


def _label(arm: str) -> str:
    if arm in LABELS:
        return LABELS[arm]
    lr, decay = arm.removeprefix("adamw-lr").split("-wd")
    return f"AdamW, lr {lr}, decay {decay}"


def _rows(table: Table) -> list[list[str]]:
    header = ["final accuracy, share of wrong labels memorized"]
    rows = [[*header, *(f"{noise:.0%} wrong" for noise in table.noises)]]
    for arm in table.arms:
        cells = [_label(arm)]
        for noise in table.noises:
            accuracy = _spread(table.values(arm, noise))
            shares = table.values(arm, noise, "memorized")
            cells.append(accuracy + (f", {_spread(shares)}" if shares else ""))
        rows.append(cells)
    return rows


COLOURS = {
    OURS: ("poprisk", "solid"),
    PAPER: ("paper", "solid"),
    SAME: ("adamw", "solid"),
    "best": ("adamw", "dash"),
    MATCHED: ("rms-matched", "solid"),
    SHUFFLED: ("shuffled", "solid"),
}


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Accuracy and memorization by noise level, and along the runs at one level."""
    table = Table(done)
    at = min(table.noisy, key=lambda noise: abs(noise - 0.4))
    return [
        Plot("Final accuracy", "share of wrong labels", "test accuracy",
             _by_noise(table, "accuracy", table.noises),
             "Mean over seeds with 95% intervals; no run was stopped early. The best AdamW is "
             "picked by the test set at each level."),
        Plot("Memorization", "share of wrong labels", "share reproduced",
             _by_noise(table, "memorized", table.noisy),
             "How many of the wrong labels the trained net gives back, at the end."),
        Plot(f"Accuracy along the runs, {at:.0%} wrong labels", "epoch", "test accuracy",
             _along(table, "accuracies", at), "AdamW learns first and memorizes then."),
        Plot(f"Memorization along the runs, {at:.0%} wrong labels", "epoch",
             "share reproduced", _along(table, "shares", at),
             "One in ten or so is a chance agreement before anything is learned."),
    ]  # fmt: skip


def _by_noise(table: Table, key: str, noises: Sequence[float]) -> list[Curve]:
    found = []
    for arm, (colour, dash) in COLOURS.items():
        label = "AdamW, best of the grid" if arm == "best" else LABELS[arm]
        arms = [table.best(noise) if arm == "best" else arm for noise in noises]
        columns = [table.values(a, noise, key) for a, noise in zip(arms, noises, strict=True)]
        seeds = sorted(set.intersection(*map(set, columns))) if columns else []
        if seeds:
            rows = [[column[seed] for column in columns] for seed in seeds]
            found.append(mean_curve(label, list(noises), rows, colour, dash=dash))
    return found


def _along(table: Table, key: str, noise: float) -> list[Curve]:
    found = []
    for arm, (colour, dash) in COLOURS.items():
        runs = [r["curves"] for r in table.runs.get((arm, noise), {}).values()]
        if runs:
            rows = [curves[key] for curves in runs]
            found.append(mean_curve(LABELS[arm], runs[0]["epochs"], rows, colour, dash=dash))
    return found


CLAIM = Claim(
    name="memorization",
    title="Wrong labels are not memorized",
    statement="Trained on wrong labels, a net with the gate learns what generalizes and does not "
    "memorize the rest, without a validation set.",
    source="Algorithm 1 and Thm 6.5",
    paper="",
    published=[
        "Algorithm 1 with the soft, hard and snr masks, ρ = 0.99, α = b/(n-b)",
        "the paper's own experiment with wrong labels is not known to us",
    ],
    ours=[
        "scikit-learn's 8×8 digits, 1,000 for training, 797 clean ones for testing; 0, 20, 40 and "
        "60% of the training labels replaced by another class at random",
        "a 64-256-256-10 ReLU net, 80 epochs, batches of 64, learning rate 1e-3, decay 0.01; final "
        "accuracy, nothing is stopped early",
        "PopRiskAdamW on its defaults (soft mask, z = 1.5, λ = 0.1), the same at every noise level",
        "AdamW over learning rates 3e-5 to 3e-3 and decays 0.01 and 1, the best picked by the test "
        "set, which favours AdamW",
        "six seeds (data split, wrong labels, initial weights, order), paired",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
