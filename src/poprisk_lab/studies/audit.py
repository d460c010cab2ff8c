"""Wrong labels found by one run's own predictions, against cleanlab on 5 and 10 folds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch

from poprisk.intervals import Interval, t_interval
from poprisk_lab.audit.nets import recipe_for
from poprisk_lab.plots import Line, Plot, Table, points, written
from poprisk_lab.results import TrialResult
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import at_least, at_most, controls, mean_over
from poprisk_lab.studies.finding import RUNS, SETS, by_folds, by_own_predictions
from poprisk_lab.tasks.mislabelled import SOURCES, mislabelled

CELL, RETRAINED = ("data", "noise", "rate"), "retrained"
OURS, FIVE, TEN = "gate", "cleanlab-5", "cleanlab-10"
LABELS = {
    OURS: "gated run, averaged",
    "gate-end": "gated run, at its end",
    "gate-plain": "gated run, averaged, no noise matrix",
    "slow": "slow AdamW, averaged",
    "shuffled": "shuffled mask, averaged",
    "adamw-end": "AdamW, at its end",
    "adamw-averaged": "AdamW, averaged over the whole run",
    "adamw": "AdamW, averaged while not memorizing",
    FIVE: "cleanlab, 5 folds",
    TEN: "cleanlab, 10 folds",
    "folds-5": "5 folds, our score",
    "folds-10": "10 folds, our score",
}
NOISES = (("random", 0.05), ("random", 0.2), ("random", 0.4), ("pairs", 0.3), ("weak", 0.2))
SEEDS = range(210, 215)  # nothing was chosen on them; 200 and 201 were chosen on
TRAININGS = (*RUNS, "folds-5", "folds-10")
LOSS, NO_WORSE, SHARE, COST = 0.01, 0.03, 0.03, 1.1
EVERY = "mean over data and noise"


def trials(quick: bool) -> list[Trial]:
    """One way of training on one kind of data and noise and one seed; several methods use it."""
    kinds, noises, seeds, ways = tuple(SOURCES), NOISES, SEEDS, TRAININGS
    size = dict[str, int]()
    if quick:
        kinds, noises, seeds = ("cancer",), (NOISES[1], NOISES[3]), range(2)
        ways, size = (OURS, "adamw", "folds-5"), {"epochs": 40, "hidden": 64}
    needs = {"mnist1d": ("mnist1d",)}
    return [
        Trial(f"{data}-{noise}{rate:g}-{way}-{seed}",
              {"data": data, "noise": noise, "rate": rate, "way": way, "seed": seed, **size},
              needs=("sklearn", *needs.get(data, ()), *(("cleanlab",) if "folds" in way else ())))
        for seed in seeds  # first, so that what is there of an unfinished run covers all data
        for data in kinds
        for noise, rate in noises
        for way in ways
    ]  # fmt: skip


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train in one way and score the methods that use it; then retrain without what was found."""
    torch.set_num_threads(1)
    seed = settings["seed"]
    data = mislabelled(settings["data"], settings["noise"], settings["rate"], seed=seed)
    recipe = recipe_for(len(data.x), tuple(data.x.shape[1:]), settings.get("epochs"))
    recipe = recipe._replace(hidden=settings.get("hidden", recipe.hidden))
    if "folds" in settings["way"]:
        return by_folds(data, recipe, int(settings["way"].removeprefix("folds-")), seed=seed)
    return by_own_predictions(data, recipe, settings["way"], seed=seed)


class AuditCells:
    """What was found by each method, in each cell: a kind of data with a kind of noise."""

    def __init__(self, results: Results) -> None:
        found = dict[tuple[Any, ...], list[TrialResult]]()
        for settings, metrics in results:
            cell = tuple(settings[key] for key in CELL)
            for method, figures in metrics["methods"].items():
                found.setdefault((method, *cell), []).append(TrialResult(settings, figures))
            for method, value in metrics["accuracy"].items():
                one = TrialResult(settings, {"accuracy": value})
                found.setdefault((RETRAINED, method, *cell), []).append(one)
        self.found = {key: Results(some) for key, some in found.items()}
        keys = dict.fromkeys(tuple(settings[key] for key in CELL) for settings, _ in results)
        self.cells = [dict(zip(CELL, key, strict=True)) for key in keys]
        self.methods = [m for m in LABELS if any(key[0] == m for key in found)]

    def values(self, method: str, key: str, cell: Mapping[str, Any]) -> dict[int, float]:
        """A figure by seed; of cleanlab's sets the F1 of the better one here, in hindsight."""
        at = (RETRAINED,) * (key == "accuracy") + (method, *cell.values())
        there = self.found.get(at, Results())
        keys = list(SETS) if key == "f1" and method in (FIVE, TEN) and there else [key]
        found = [{s: v for s, v in there.by_seed(k).items() if v is not None} for k in keys]
        return max(found, key=lambda by_seed: fmean(by_seed.values()) if by_seed else 0.0)

    def mean(self, method: str, key: str, cell: Mapping[str, Any]) -> float:
        """Mean over seeds; NaN where it was not measured."""
        return t_interval(self.values(method, key, cell).values()).mean

    def gained(self, a: str, b: str, key: str, *, sure: bool = False, **only: Any) -> Interval:
        """What ``a`` has more than ``b`` in some cells, paired; only where it is ``sure``."""
        found = []
        for cell in self.cells:
            if only.items() <= cell.items():
                one, other = self.values(a, key, cell), self.values(b, key, cell)
                valid = self.values(a, "valid", cell) if sure else dict.fromkeys(one, True)
                found.append({s: v - other[s] for s, v in one.items() if s in other and valid[s]})
        return mean_over(found)

    def sized(self, method: str, key: str, *, sure: bool = False) -> Interval:
        """Mean absolute value of a figure; only where the method is ``sure``."""
        found = []
        for cell in self.cells:
            values, valid = (self.values(method, k, cell) for k in (key, "valid"))
            found.append({s: abs(v) for s, v in values.items() if valid[s] or not sure})
        return mean_over(found)

    def worst(self) -> tuple[str, Interval]:
        """The data where our F1 is least beside cleanlab's on 5 folds, where ours is not unsure."""
        found = {data: self.gained(OURS, FIVE, "f1", sure=True, data=data)
                 for data in dict.fromkeys(cell["data"] for cell in self.cells)}  # fmt: skip
        known = {data: gain for data, gain in found.items() if gain.values}
        return min(known.items(), key=lambda item: item[1].mean, default=("none", t_interval([])))


def judge(results: Results) -> Report:
    """A better ranking than 5 folds, as good as 10, a better set, and it knows how good it is."""
    cells = AuditCells(results)
    gain, gained = partial(at_least, percent=True), cells.gained
    worst, loss = cells.worst()
    decided = [
        gain(f"average precision gained on cleanlab on 5 folds, {EVERY}",
             gained(OURS, FIVE, "ap"), 0.0),
        gain("average precision gained on 10 folds, a loss of a point allowed",
             gained(OURS, TEN, "ap"), -LOSS),
        gain("F1 of the suspects gained on the better of cleanlab's sets, 5 folds",
             gained(OURS, FIVE, "f1"), 0.0),
        gain(f"the same where it is least and ours does not say that it is unsure ({worst})",
             loss, -NO_WORSE),
        at_most("estimated share of wrong labels: mean distance from the true one",
                cells.sized(OURS, "share_error"), SHARE, percent=True),
        at_most("trainings", cells.sized(OURS, "trainings"), COST),
    ]  # fmt: skip
    others = [m for m in cells.methods if m not in (OURS, FIVE, TEN)]
    beside = [
        gain(f"{name} gained on: {LABELS[m]}", gained(OURS, m, key), 0.0)
        for m in others
        for key, name in (("ap", "average precision"), ("f1", "F1"))
    ]
    beside += [
        gain(f"F1 gained on cleanlab's better set, {_noise(noise, rate)}",
             gained(OURS, FIVE, "f1", noise=noise, rate=rate), 0.0)
        for noise, rate in dict.fromkeys((c["noise"], c["rate"]) for c in cells.cells)
    ]  # fmt: skip
    beside += [
        at_most("the same distance of the share where ours does not say that it is unsure",
                cells.sized(OURS, "share_error", sure=True), SHARE, percent=True),
        at_most("recall of planted labels: mean distance from that of wrong ones",
                cells.sized(OURS, "recall_error"), 0.1, percent=True),
        *(gain(f"test accuracy of a retrained AdamW, ours {how}: gained on {name}",
               gained(how, other, "accuracy"), 0.0)
          for how in ("dropped", "corrected")
          for other, name in (("nothing", "nothing dropped"), (FIVE, "cleanlab's set dropped"))),
    ]  # fmt: skip
    return Report([*decided, *controls(*beside)], _table(cells), _losses(cells))


def _losses(cells: AuditCells) -> list[str]:
    """Where cleanlab on 5 folds is clearly better, and whether ours said that it was unsure."""
    notes = []
    for cell in cells.cells:
        found = {key: cells.gained(OURS, FIVE, key, **cell) for key in ("ap", "f1")}
        lost = [f"{k.upper()} {i.mean:+.3f}" for k, i in found.items() if i.sign < 0]
        if lost:
            sure = fmean(cells.values(OURS, "valid", cell).values())
            notes.append(f"Cleanlab on 5 folds is better on {_where(cell)}: {', '.join(lost)}; "
                         f"ours called itself valid in {sure:.0%} of the runs.")  # fmt: skip
    return notes


def _noise(noise: str, rate: float) -> str:
    kinds = {"random": "at random", "pairs": "between pairs of classes", "weak": "by a weak model"}
    return f"{rate:.0%} {kinds[noise]}"


def _where(cell: Mapping[str, Any]) -> str:
    return f"{cell['data']}, {_noise(cell['noise'], cell['rate'])}"


def _table(cells: AuditCells) -> Table:
    """Average precision and F1 of the telling methods, by data and noise."""
    columns = {f"{LABELS[m]}: {name}": (m, key)
               for m in (OURS, FIVE, TEN, "folds-5", "slow", "adamw-end")
               for key, name in (("ap", "AP"), ("f1", "F1"))}  # fmt: skip
    columns |= {f"{LABELS[m]}: trainings": (m, "trainings") for m in (OURS, FIVE, TEN)}
    rows = [[_where(cell), *(written(t_interval(cells.values(*of, cell).values()))
                             for of in columns.values())] for cell in cells.cells]  # fmt: skip
    about = "AP: average precision of the ranking. F1: of the suspects, cleanlab's better set."
    return Table(["data and noise", *columns], rows, about)


def show(results: Results) -> Plots:
    """Average precision and F1 by cell, and what retraining gains."""
    cells = AuditCells(results)
    x = list(range(1, len(cells.cells) + 1))
    order = "; ".join(f"{i}: {_where(cell)}" for i, cell in enumerate(cells.cells, 1))
    drawn = {OURS: "poprisk", FIVE: "peer", "slow": "early-stopping", "adamw-end": "adamw"}

    def marks(key: str, of: Mapping[str, str]) -> list[Line]:
        found = {m: [cells.mean(m, key, cell) for cell in cells.cells] for m in of}
        return [points(LABELS.get(m, m), x, found[m], colour) for m, colour in of.items()]

    after = {"dropped": "poprisk", "corrected": "paper", FIVE: "peer", "nothing": "adamw"}
    return [
        Plot("Ranking", "data and noise", "average precision", marks("ap", drawn), order),
        Plot("Suspects", "data and noise", "F1", marks("f1", drawn),
             f"Of cleanlab's sets the better one in each place. {order}"),
        Plot("Retrained without them", "data and noise", "test accuracy", marks("accuracy", after),
             f"AdamW, without what was found, or with it corrected. {order}"),
    ]  # fmt: skip
