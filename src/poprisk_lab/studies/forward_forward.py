"""Learning without backpropagation: accuracy, operators, label noise and risk of local rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from poprisk.intervals import Interval, t_interval
from poprisk_lab.plots import Line, Plot, Table, points, seeds_line, tabulate
from poprisk_lab.results import TrialResult, across
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import (
    Criterion,
    at_least,
    at_most,
    controls,
    difference,
    either_way,
    point,
    ratio,
)
from poprisk_lab.studies.local_runs import BACK, CASES, FORWARD, GRID, MONO, OURS, SAME
from poprisk_lab.tasks.local_rules import EPOCHS, HIDDEN, RULES

LOCAL = (FORWARD, MONO)
SEEDS = range(5)
NOISES, WIDTH = (0.2, 0.4), 128
PATHS = (("sgd", 0.2), ("adamw", 0.2), ("adamw", 0.4))
"""Optimizers and shares of wrong labels."""
DATA = ("digits", "mnist1d")
SOFTEST = 1e-8
ALLOWED, CLOSED, LEAK, WITHIN = 0.015, 1e-8, 1e-3, 1.1
COLOURS = {FORWARD: "poprisk", MONO: "early-stopping", BACK: "adamw"}


def trials(quick: bool) -> list[Trial]:
    """One net by one rule: how accurate, its operators, under wrong labels, its twin's estimate."""
    seeds, steps, size = SEEDS, 60, {"hidden": WIDTH, "epochs": 40}
    whole = {d: {"hidden": h, "epochs": EPOCHS} for d, h in zip(DATA, (HIDDEN, WIDTH), strict=True)}
    paths, noises, arms = PATHS, NOISES, [OURS, *GRID]
    if quick:
        seeds, steps, size = range(2), 12, {"hidden": 16, "epochs": 2}
        whole = {DATA[0]: size}
        paths, noises, arms = PATHS[1:2], NOISES[1:], [OURS, SAME]
    settings = list[dict[str, Any]]()
    for rule in RULES:
        cases: dict[str, list[dict[str, Any]]] = {
            "accuracy": [{"data": data, **sizes} for data, sizes in whole.items()],
            "path": [{"optimizer": o, "noise": n, "steps": steps} for o, n in paths],
            "noise": [{"noise": n, "arm": arm, **size} for n in noises for arm in arms],
            "twin": [size],
        }
        settings += [
            {"case": c, "rule": rule, **more} for c, found in cases.items() for more in found
        ]
    return [_trial({**some, "seed": seed}) for seed in seeds for some in settings]


def _trial(settings: dict[str, Any]) -> Trial:
    called = [str(v) for k, v in settings.items() if k not in ("hidden", "epochs", "steps")]
    needs = ("sklearn", *["mnist1d"] * (settings.get("data") == "mnist1d"))
    return Trial("-".join(called), settings, needs=needs)


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """What one trial finds, by its case."""
    return CASES[settings["case"]](settings)


class Found:
    """What was found, by case and rule."""

    def __init__(self, results: Results) -> None:
        cases = results.by("case")
        self.accuracies, self.paths, self.noise, self.twins = (
            cases[case] for case in ("accuracy", "path", "noise", "twin")
        )
        self.local = Results(d for d in self.paths if d.settings["rule"] != BACK)
        self.noises, self.data = sorted(self.noise.by("noise")), [*self.accuracies.by("data")]

    def behind(self, rule: str, data: str) -> Interval:
        """Test error minus that of backpropagation."""
        of = {r: self.accuracies.where(rule=r, data=data).by_seed("accuracy") for r in (rule, BACK)}
        return difference(of[BACK], of[rule])

    def values(
        self, rule: str, arm: str, key: str, noises: Sequence[float] = ()
    ) -> Mapping[int, float]:
        """A figure of an arm, the mean over noise levels, by seed."""
        runs = self.noise.where(rule=rule, arm=arm)
        return across([runs.where(noise=n).by_seed(key) for n in noises or self.noises], fmean)

    def gained(self, rule: str, than: str, key: str = "accuracy") -> Interval:
        """What the gate has more than another arm."""
        return difference(self.values(rule, OURS, key), self.values(rule, than, key))

    def best(self, rule: str, noise: float) -> str:
        """The AdamW with the best final test accuracy on average."""
        grid = [arm for arm in GRID if self.noise.where(rule=rule, arm=arm, noise=noise)]
        return max(
            grid, key=lambda arm: fmean(self.values(rule, arm, "accuracy", [noise]).values())
        )

    def off(self, rule: str, kind: str) -> Interval:
        """By which factor the twin's estimate differs from the risk."""
        runs = self.twins.where(rule=rule)
        return either_way(ratio(*(runs.by_seed((kind, key)) for key in ("estimate", "risk"))))


def judge(results: Results) -> Report:
    """As accurate, exact operators, an invisible reservoir, label noise kept out, risk known."""
    found, decided, beside = Found(results), list[Criterion](), list[Criterion]()
    name = {rule: RULES[rule].label for rule in RULES}
    for data in found.data:
        more = [at_most(f"{data}, {name[r]}: test error minus that of backpropagation",
                        found.behind(r, data), ALLOWED, percent=True) for r in LOCAL]  # fmt: skip
        (decided if data == DATA[0] else beside).extend(more)
    leaks = [d.metrics["leaks"][f"{SOFTEST:g}"] for d in found.local]
    decided += [
        at_most("closure error of the operators, worst of the local runs",
                point(max(found.local.all("closure"))), CLOSED),
        at_most(f"what queries see of the reservoir below {SOFTEST:g}, worst of the local runs",
                point(max(leaks)), LEAK),
    ]  # fmt: skip
    for r in LOCAL:
        decided += [
            at_least(f"{name[r]}, wrong labels: accuracy gained on AdamW at equal settings",
                     found.gained(r, SAME), 0.0, percent=True),
            at_most(f"{name[r]}, wrong labels: share of them memorized, minus AdamW's",
                    found.gained(r, SAME, "memorized"), 0.0, percent=True),
            at_most(f"{name[r]}: factor between the twin's estimate and the risk",
                    found.off(r, "pushed"), WITHIN),
        ]  # fmt: skip
    small = found.paths.where(optimizer="sgd") or found.paths
    for r in RULES:
        runs = small.where(rule=r)
        beside += [
            at_most(f"{name[r]}: factor between the estimate of a twin without 20% and the risk",
                    found.off(r, "left_out"), WITHIN),
            at_most(f"{name[r]}, small steps: g₀ᵀWg₀ and the drop of the loss, relative difference",
                    t_interval(abs(v - 1) for v in runs.all("quadratic")), 0.01),
            at_least(f"{name[r]}: least eigenvalue of the kernel over the largest",
                     t_interval(runs.all("lowest")), -1e-6),
            at_most(f"{name[r]}: error of the movement by the gradients' own Jacobian",
                    t_interval(found.paths.where(rule=r).all("one_jacobian")), CLOSED),
        ]  # fmt: skip
        beside += [at_least(f"{name[r]}, {n:.0%} wrong labels: gained on the best AdamW, picked by "
                            "the test set", _against_best(found, r, n), 0.0, percent=True)
                   for n in found.noises]  # fmt: skip
    return Report([*decided, *controls(*beside)], _table(found), _notes(found), main=2)


def _against_best(found: Found, rule: str, noise: float) -> Interval:
    ours, best = (found.values(rule, arm, "accuracy", [noise])
                  for arm in (OURS, found.best(rule, noise)))  # fmt: skip
    return difference(ours, best)


def _table(found: Found) -> Table:
    """A row a rule."""

    def accuracy(data: str) -> Callable[[TrialResult], float | None]:
        return lambda d: d.metrics.get("accuracy") if d.settings.get("data") == data else None

    def small(key: str) -> Callable[[TrialResult], float | None]:
        return lambda d: d.metrics.get(key) if d.settings.get("optimizer") == "sgd" else None

    accuracies = {f"accuracy, {data}": accuracy(data) for data in found.data}
    columns = {
        **accuracies,
        "closure error": "closure",
        "by the gradients' own Jacobian": "one_jacobian",
        "g₀ᵀWg₀ over the drop of the loss, SGD": small("quadratic"),
        "least eigenvalue of the kernel, SGD": small("lowest"),
        "error of the coupling": "coupling",
        f"seen of the reservoir below {SOFTEST:g}": ("leaks", f"{SOFTEST:g}"),
        "share of the signal in the channel": ("cells", "signal_share"),
        "share of the noise in the channel": ("cells", "noise_share"),
        "movement by harmful noise": ("cells", "harmful_noise"),
        "twin: estimate": ("pushed", "estimate"),
        "twin: risk": ("pushed", "risk"),
        "twin called itself valid": ("pushed", "valid"),
        "twin without a fifth: estimate": ("left_out", "estimate"),
    }
    rows = Results([*found.accuracies, *found.paths, *found.twins]).by("rule")
    about = (
        "Operators: two tanh layers on digits 0 to 2, both optimizers and noise levels together. "
        "Risks are those of each rule's own loss, not to be compared between rows."
    )
    groups = {RULES[rule].label: runs for rule, runs in rows.items()}
    return tabulate("rule", groups, columns, percent=accuracies, about=about)


def _notes(found: Found) -> list[str]:
    """Twins that did not believe themselves."""
    doubted = [RULES[r].label for r, runs in found.twins.by("rule").items()
               if not all(runs.all(("pushed", "valid")))]  # fmt: skip
    said = f"The twin's estimate was flagged in some of the runs: {', '.join(doubted)}."
    return [said] if doubted else []


def show(results: Results) -> Plots:
    """The reservoir, wrong labels, and the twin."""
    found = Found(results)
    return [
        Plot("What queries see of the soft reservoir", "tolerance, relative to W's largest",
             "‖G R‖ / ‖G‖", [_leaks(found, r) for r in RULES],
             "Spectral norms, R the directions of W below the tolerance; one point a run. Where no "
             "direction lies below, there is no point.", log_x=True, log_y=True),
        Plot("Accuracy under wrong labels", "share of wrong labels", "test accuracy",
             _by_noise(found, "accuracy"),
             "Mean over seeds with 95% intervals; dashed: AdamW at the same settings."),
        Plot("Memorization", "share of wrong labels", "share reproduced",
             _by_noise(found, "memorized"),
             "How many of the wrong labels the trained net gives back; dashed: AdamW."),
        Plot("Risk of a rule's own loss, by a twin", "risk", "estimate",
             [points(RULES[r].label, *_pairs(found, r), COLOURS[r]) for r in RULES],
             "One point a run, 20% wrong labels in training and in the risk; on the diagonal the "
             "estimate is exact.", log_x=True, log_y=True),
    ]  # fmt: skip


def _leaks(found: Found, rule: str) -> Line:
    seen = [(float(tol), leak) for row in found.paths.where(rule=rule).all("leaks")
            for tol, leak in row.items() if leak > 0]  # fmt: skip
    x, y = zip(*seen, strict=True) if seen else ((), ())
    return points(RULES[rule].label, x, y, COLOURS[rule])


def _by_noise(found: Found, key: str) -> list[Line]:
    arms = {OURS: ("PopRiskAdamW", "solid"), SAME: ("AdamW", "dash")}
    lines = list[Line]()
    for rule in RULES:
        for arm, (label, dash) in arms.items():
            columns = [found.values(rule, arm, key, [noise]) for noise in found.noises]
            rows = [*across(columns, list).values()]
            name = f"{RULES[rule].label}, {label}"
            lines.append(seeds_line(name, found.noises, rows, COLOURS[rule], dash=dash))
    return lines


def _pairs(found: Found, rule: str) -> tuple[list[float], list[float]]:
    runs = found.twins.where(rule=rule)
    return runs.all(("pushed", "risk")), runs.all(("pushed", "estimate"))
