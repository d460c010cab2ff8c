"""The claim that DPO behind the gate does not learn flipped pairs; they are found on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from poprisk.intervals import Interval
from poprisk_lab.plots import Columns, Table, tabulate
from poprisk_lab.studies.claim import Metrics, Report, Results, Workspace
from poprisk_lab.studies.criteria import CONTRARY, Criterion, at_least, controls, difference
from poprisk_lab.studies.dpo import runs
from poprisk_lab.studies.dpo.arms import (
    ADAMW,
    BETWEEN,
    FULL,
    GATE,
    MAIN,
    PAIRS,
    SAME,
    SEEDS,
    SHUFFLED,
)
from poprisk_lab.studies.dpo.arms import SLOW as SLOW
from poprisk_lab.studies.dpo.arms import trials as trials
from poprisk_lab.studies.dpo.methods import (
    AUDITED,
    FAST,
    OTHER_RECIPE,
    OURS,
    RECIPE,
    Method,
    Place,
    cells,
    place_of,
    share_of,
)
from poprisk_lab.studies.dpo.plots import show as show

SIZES, TRAINED, REPEATS = PAIRS, FULL, len(SEEDS)
PAPER_GAIN, PAPER_DRIFT = 0.641 - 0.566, 3.05
WITHIN, LOSS = 0.02, 0.01
"""Accuracy that the recipe may lose to knowing the share, and a stop to hindsight; AUROC that the
audit may lose to cross-fitting."""
COLUMNS = {
    "accuracy": "final",
    "at its best moment": "best",
    "drift": "drift",
    "KL": "kl",
    "reward of chosen": "chosen",
    "true reward of samples": "reward",
    "flipped pairs fitted": "fitted",
    "AUROC of own margin": "auroc",
    "average precision": "ap",
}


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Pre-train, draw pairs, train once, by the recipe, or on parts of the pairs."""
    kinds = {
        "pretrained": runs.pretrained,
        "pairs": runs.pairs,
        "run": runs.one,
        "recipe": runs.recipe,
        "folds": runs.folds,
        "stopping": runs.stopping,
    }
    return kinds[settings["kind"]](settings, workspace)


def judge(results: Results) -> Report:
    """Both published figures; beside them the best AdamW, the recipe, and what is found."""
    there = cells(results)
    main = there[MAIN, BETWEEN]
    gain = at_least(f"accuracy gained on AdamW at the same settings, {share_of(BETWEEN)}",
                    main.gain(OURS, FAST), 0.0, percent=True)  # fmt: skip
    drift = at_least(f"times less drift than AdamW at the same settings, {share_of(BETWEEN)}",
                     main.times_less(OURS, FAST), 1.0)  # fmt: skip
    decided = [gain._replace(claimed=PAPER_GAIN), drift._replace(claimed=PAPER_DRIFT)]
    whole = [cell for cell in there.values() if cell.folds]
    asked = [
        *_hindsight(main),
        *(c for cell in whole for c in (*_recipe(cell), *_finding(cell), *_stopping(cell))),
    ]
    beside = [c for cell in there.values() if cell is not main for c in _same(cell)]
    lacking = [
        f"{'Not so' if c.outcome == CONTRARY else 'Not settled'} here: {c.name}."
        for c in asked
        if not c.holds and c.estimate.known
    ]
    every = [*decided, *controls(*asked, *beside, *(c for cell in whole for c in _masks(cell)))]
    return Report(every, _table([*there.values()]), lacking, main=len(decided))


def _hindsight(cell: Place) -> Iterator[Criterion]:
    """The gate at one rate for all, then at its best, then chosen by noisy pairs, beside AdamW."""
    adamw, gate = cell.of((ADAMW,)), cell.of((GATE,))
    best, at = cell.best(adamw), place_of(cell)
    rival = f"the best AdamW of {len(adamw)} learning rates, in hindsight"
    yield _more(f"accuracy gained on {rival}, {at}", cell.gain(OURS, best))
    yield _more(f"the same, the gate's rate chosen likewise, {at}",
                cell.gain(cell.best(gate), best))  # fmt: skip
    yield _more(f"the same, both rates chosen by noisy held-out pairs, {at}",
                difference(cell.picked(gate), cell.picked(adamw)))  # fmt: skip
    yield at_least(f"times less drift than {rival}, {at}",
                   cell.times_less(OURS, best), 1.0)  # fmt: skip


def _same(cell: Place) -> Iterator[Criterion]:
    """The published figures elsewhere."""
    at = place_of(cell)
    yield _more(f"accuracy gained on AdamW at the same settings, {at}", cell.gain(OURS, FAST))
    yield at_least(f"times less drift than AdamW at the same settings, {at}",
                   cell.times_less(OURS, FAST), 1.0)  # fmt: skip
    if len(cell.of((ADAMW,))) > 1:
        yield from list(_hindsight(cell))[:1]


def _recipe(cell: Place) -> Iterator[Criterion]:
    """Told nothing, the recipe is as good as robust told the share, and above the others."""
    at = place_of(cell)
    told = cell.best(cell.of(losses=("robust",)))
    others = cell.best(cell.told_nothing())
    yield at_least(f"recipe: accuracy beside robust told the share ({told.label}), {at}",
                   cell.gain(RECIPE, told), -WITHIN, percent=True)  # fmt: skip
    yield _more(f"recipe: accuracy gained on the best that is told nothing ({others.label}), {at}",
                cell.gain(RECIPE, others))  # fmt: skip
    yield _more(f"recipe without suspects: accuracy gained on the same, {at}",
                cell.gain(OTHER_RECIPE, others))  # fmt: skip


def _finding(cell: Place) -> Iterator[Criterion]:
    """The audit of the recipe's first run ranks flipped pairs."""
    at, found = place_of(cell), audited(cell, "auroc")
    adamw = cell.best(cell.of((ADAMW,)), "auroc")
    for name, other, least in (
        ("AdamW's own margin", cell.values(FAST, "auroc"), 0.0),
        (f"that of the best AdamW ({adamw.label})", cell.values(adamw, "auroc"), 0.0),
        ("5-fold cross-fitting, a loss of a point allowed", cell.folds.by_seed("auroc"), -LOSS),
    ):
        yield at_least(f"audit: AUROC of flipped pairs gained on {name}, {at}",
                       difference(found, other), least, percent=True)  # fmt: skip


def _stopping(cell: Place) -> Iterator[Criterion]:
    """A twin, which sees no clean pair, says where AdamW is to stop."""
    at, stopped = place_of(cell), cell.stopped.by_seed
    yield _more(f"twin: accuracy gained by stopping AdamW where it says, {at}",
                difference(stopped("accuracy"), stopped("end")))  # fmt: skip
    yield at_least(f"twin: accuracy beside AdamW's best moment in hindsight, {at}",
                   difference(stopped("accuracy"), stopped("best")), -WITHIN,
                   percent=True)  # fmt: skip


def _masks(cell: Place) -> Iterator[Criterion]:
    """Smaller steps and a shuffled mask do not do it."""
    for name, other in (
        ("AdamW at its update sizes", OURS._replace(follows=GATE)),
        ("its mask shuffled", Method(SHUFFLED, lr=SAME)),
        ("Algorithm 1, soft mask", Method("soft", lr=SAME)),
        ("Algorithm 1, snr mask", Method("snr", lr=SAME)),
    ):
        if other in cell.runs:
            yield _more(f"accuracy gained on {name}, {place_of(cell)}", cell.gain(OURS, other))
    lora = {arm: cell.of((arm,), adapters=True) for arm in (GATE, ADAMW)}
    if all(lora.values()):
        gained = cell.gain(lora[GATE][0], lora[ADAMW][0])
        yield _more(f"with LoRA: accuracy gained on AdamW, {place_of(cell)}", gained)


def audited(cell: Place, key: str) -> dict[int, Any]:
    """A figure of the audit of the recipe's first run, by seed."""
    return cell.recipes.by_seed(("audit", key))


def _more(name: str, gained: Interval) -> Criterion:
    return at_least(name, gained, 0.0, percent=True)


def _table(there: Sequence[Place]) -> Table:
    """Every method in every place, and the audit and cross-fitting below."""
    found = {f"{place_of(c)}: {m.label}": some for c in there for m, some in c.runs.items()}
    table = tabulate("flipped pairs and method", found, COLUMNS, percent={"flipped pairs fitted"},
                     about="Accuracy: share of clean held-out pairs whose better answer has the "
                     "larger implicit reward. Drift: mean size of the implicit rewards. KL: of the "
                     "policy from the reference over its own answers, in nats.")  # fmt: skip
    audits = {f"{place_of(c)}: audit of {AUDITED}": c.recipes for c in there if c.recipes}
    folds = {f"{place_of(c)}: 5-fold cross-fitting": c.folds for c in there if c.folds}
    keys = ("auroc", "ap")
    rows = [*_ranks(audits, {k: ("audit", k) for k in keys}), *_ranks(folds, {k: k for k in keys})]
    return Table(table.head, [*table.rows, *rows], table.about)


def _ranks(groups: Mapping[str, Results], columns: Columns) -> list[list[str]]:
    """Rows of rankings, which have the last columns alone."""
    blank = [""] * (len(COLUMNS) - len(columns))
    return [[name, *blank, *rest] for name, *rest in tabulate("", groups, columns).rows]
