"""The claim that one run knows its population risk: where its twin stops it, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from statistics import fmean
from typing import Any

from poprisk.intervals import Interval, t_interval
from poprisk_lab.plots import Columns, Line, Plot, Table, points, tabulate
from poprisk_lab.results import TrialResult
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Workspace
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls
from poprisk_lab.studies.risk.problems import QUICK_EPOCHS, slug
from poprisk_lab.studies.stopping.problems import OLD, PROBLEMS
from poprisk_lab.studies.stopping.rivals import FOLDS as FOLDS
from poprisk_lab.studies.stopping.rivals import FREEZE as FREEZE
from poprisk_lab.studies.stopping.rivals import GRACE as GRACE
from poprisk_lab.studies.stopping.rivals import RULES
from poprisk_lab.studies.stopping.rivals import SLOPE as SLOPE
from poprisk_lab.studies.stopping.runs import BAD, END, FIFTH, FOLDED, GOOD, REFITTED, one
from poprisk_lab.studies.stopping.runs import LOOKS as LOOKS
from poprisk_lab.study import Trial

SEEDS = range(520, 525)
"""Nothing was chosen on them; seeds below 10 were chosen on."""
QUICK = ("ridges, MLP, AdamW", "digits 40%, MLP, AdamW")
REGRET, COVERED, WIDTH, LEVEL, OFF, ON = 0.02, 0.88, 0.5, 0.08, 0.95, 0.9
"""Bounds: of the regret, the share of intervals that hold the best moment, their width, the error
of believed estimates, and the shares of flags that are off and on where they should be."""
BAND = 2.0
"""Standard errors to each side of a drawn curve."""
TWIN = "the twin"
RIVALS = (*RULES, FIFTH, REFITTED, FOLDED)
"""All that is compared with the twin, but the end of the run."""
REPEATS, EARLIER, NEW = len(SEEDS), len(OLD), len(PROBLEMS)


def trials(quick: bool) -> list[Trial]:
    """Every problem on every seed, seeds first; the quick form: two problems, two epochs."""
    if quick:
        return [_trial(name, 0, epochs=QUICK_EPOCHS) for name in QUICK]
    return [_trial(name, seed) for seed in SEEDS for name in (*OLD, *PROBLEMS)]


def _trial(name: str, seed: int, **more: int) -> Trial:
    needs = {**OLD, **PROBLEMS}[name].needs or ("sklearn",) * ("digits" in name)
    return Trial(f"{slug(name)}-{seed}", {"problem": name, "seed": seed, **more}, needs)


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One problem on one seed: a run with its twin, and all rivals."""
    return one(settings, workspace)


Figure = Callable[[TrialResult], float | None]


def over_problems(results: Results, figure: Figure) -> Interval:
    """Mean over problems, with its interval, of the means over seeds; None does not count."""
    found = [
        [v for d in some if (v := figure(d)) is not None] for some in results.by("problem").values()
    ]
    return t_interval(fmean(values) for values in found if values)


def right_flags(results: Results, key: str) -> Interval:
    """Share of flags that are as they should be, by problem over all of its runs."""
    found = list[float]()
    for some in results.by("problem").values():
        right, count = (sum(column) for column in zip(*some.all(key), strict=True))
        found += [right / count] if count else []
    return t_interval(found).clipped(0.0, 1.0)


def regret_of(name: str) -> Figure:
    """Regret of the twin or a rival, in one run."""
    return lambda d: d.figure("regret" if name == TWIN else ("rivals", name, "regret"))


def spared(rival: str) -> Figure:
    """Regret of a rival less that of the twin, in the same run."""
    return lambda d: d.metrics["rivals"][rival]["regret"] - d.metrics["regret"]


def judge(results: Results) -> Report:
    """Little regret, an interval that holds the best moment, level, flags; then the rivals."""
    new = Results(d for d in results if d.settings["problem"] in PROBLEMS)
    least, most = partial(at_least, percent=True), partial(at_most, percent=True)
    cost = {name: results.mean(("rivals", name, "cost")).mean for name in (END, *RIVALS)}
    equal = [name for name in RIVALS if cost[name] <= results.mean("cost").mean]
    dearer = [name for name in RIVALS if name not in equal]

    def stopping(some: Results, where: str) -> list[Criterion]:
        covered = over_problems(some, lambda d: d.metrics["covered"]).clipped(0.0, 1.0)
        return [
            most(f"regret: risk where the twin stops over the least of the run{where}",
                 _regret(TWIN, some), REGRET),
            least(f"runs whose interval holds the best moment of hindsight{where}",
                  covered, COVERED),
        ]  # fmt: skip

    def beside(some: Results, name: str, where: str = "") -> Criterion:
        return least(f"regret spared beside {name} (cost {cost[name]:.2g}){where}",
                     over_problems(some, spared(name)), 0.0)  # fmt: skip

    only = f", the {len(new.by('problem'))} new problems"
    decided = [
        *stopping(results, ""),
        most("width of the interval, as a share of the run",
             over_problems(results, lambda d: d.metrics["width"]), WIDTH),
        most("distance of believed estimates from the true risk",
             over_problems(results, lambda d: d.metrics["level"]), LEVEL),
        least(f"flag off where an estimate is off by over {BAD:.0%}{only}",
              right_flags(new, "off"), OFF),
        least(f"flag on where it is off by less than {GOOD:.0%}{only}",
              right_flags(new, "on"), ON),
        *(beside(results, name) for name in equal),
    ]  # fmt: skip
    others = [
        *(beside(results, name) for name in (END, *dearer)),
        *stopping(new, only),
        *(beside(new, name, only) for name in RIVALS),
    ]
    return Report([*decided, *controls(*others)], _table(results), [_worst(results)])


def _worst(results: Results) -> str:
    """The run in which the twin's choice costs most."""
    worst = max(results, key=lambda d: d.metrics["regret"])
    where = f"{worst.settings['problem']}, seed {worst.settings['seed']}"
    return f"The largest regret of a single run is {worst.metrics['regret']:.1%}: {where}."


def _table(results: Results) -> Table:
    """By problem: regrets of the twin and of rivals, what the interval and the level are worth."""
    shares: dict[str, Figure] = {
        **{f"regret: {name}": regret_of(name) for name in (TWIN, *RIVALS, END)},
        "interval holds the best": lambda d: d.metrics["covered"],
        "width": lambda d: d.metrics["width"],
        "level error": lambda d: d.metrics["level"],
        "believed": lambda d: fmean(d.metrics["valid"]),
    }
    columns: Columns = {**shares, "cost of the twin": "cost"}
    groups = {f"{name}{'' if name in OLD else ' (new)'}": some
              for name, some in results.by("problem").items()}  # fmt: skip
    return tabulate("problem", groups, columns, percent=shares,
                    about="Means over seeds with 95% intervals. Regret: true risk of the model "
                    "that is kept over the least of the run, less 1. Believed: share of the "
                    "looks.")  # fmt: skip


def show(results: Results) -> Plots:
    """Two curves with their bands, regret by problem and over cost, the interval by problem."""
    groups = results.by("problem")
    x = list(range(1, len(groups) + 1))
    order = "; ".join(f"{i}: {name}" for i, name in enumerate(groups, 1))
    drawn = {TWIN: "poprisk", REFITTED: "early-stopping", FOLDED: "paper",
             "evidence of all examples": "rms-matched", END: "adamw"}  # fmt: skip
    held = {"holds the best moment": ("covered", "poprisk"), "width": ("width", "adamw")}
    curves = {name: some[0] for name, some in groups.items()}
    return [
        *(_curve(curves[name]) for name in dict.fromkeys((min(curves), max(curves)))),
        Plot("Regret by problem", "problem", "regret",
             [points(name, x, [_regret(name, some).mean for some in groups.values()], colour)
              for name, colour in drawn.items()], order, percent=True),
        Plot("Regret over cost", "trainings", "regret, mean over problems",
             [points(name, [_cost(name, results)], [_regret(name, results).mean], colour)
              for name, colour in (drawn | dict.fromkeys(_others(drawn), "peer")).items()],
             "Grey: " + ", ".join(_others(drawn)) + ".", percent=True),
        Plot("Interval of the stopping point", "problem", "share",
             [points(name, x, [fmean(some.all(key)) for some in groups.values()], colour)
              for name, (key, colour) in held.items()],
             f"Runs whose interval holds the best moment; its width in the run. {order}",
             percent=True),
    ]  # fmt: skip


def _others(drawn: Collection[str]) -> list[str]:
    return [name for name in RIVALS if name not in drawn]


def _regret(name: str, results: Results) -> Interval:
    """Mean regret of the twin or a rival over problems."""
    return over_problems(results, regret_of(name))


def _cost(name: str, results: Results) -> float:
    return results.mean("cost" if name == TWIN else ("rivals", name, "cost")).mean


def _curve(trial: TrialResult) -> Plot:
    """The true risk of one run, its estimate with two standard errors, and where rules stop."""
    found = trial.metrics
    t, risks, value = found["epochs"], found["risks"], found["estimates"]
    low, high = ([v + sign * BAND * e for v, e in zip(value, found["errors"], strict=True)]
                 for sign in (-1, 1))  # fmt: skip
    stops = {"best": (found["best"], "other"), TWIN: (found["stop"], "poprisk")}
    stops |= {name: (found["rivals"][name]["at"], colour)
              for name, colour in ((REFITTED, "early-stopping"), (FOLDED, "paper"))}  # fmt: skip
    lines = [
        Line("true risk", t, risks, "other"),
        Line("estimate", t, value, "poprisk", "solid", low, high),
        Line("training loss", t, found["train"], "adamw", "dot"),
        *(Line(f"stop: {name}", [t[i]], [risks[i]], colour, kind="marks")
          for name, (i, colour) in stops.items()),
    ]  # fmt: skip
    between = f"{t[found['low']]} to {t[found['high']]}"
    title = f"{trial.settings['problem']}, seed {trial.settings['seed']}"
    return Plot(title, "epoch", "loss", lines, "Band: two standard errors. Interval "
                f"of the twin's stop: epochs {between}.")  # fmt: skip
