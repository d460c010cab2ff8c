"""From the record of a comparison to a table, a headline and warnings, by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from poprisk.intervals import Interval, t_interval
from poprisk.printing import short_repr
from poprisk_lab.arms import DEFAULT_ADAMW, FAMILIES, OURS
from poprisk_lab.convergence import Improvement, still_improving
from poprisk_lab.results import RunData
from poprisk_lab.wording import Rivals, Row, headline, scale_of, warnings

__all__ = ["Row", "Verdict", "judge"]

OUR_RATE = 1e-3
RIVALS = ("early-stopping", "rms-matched", "shuffled")
FINAL, BEST, NOISE = "final_metric", "best_metric", "final_memorized"
"""Of an end row."""

T = TypeVar("T")


class Verdict(NamedTuple):
    """The table and what it says.

    Attributes:
        headline: one line.
        warnings: what to know before believing it.
        rows: ours, the best AdamW, controls and peers.
        other: the remaining points of the grid.
        reference: label of the best AdamW, chosen in hindsight by its final metric.
        leads: our final metric minus others', paired over seeds, by label.
    """

    headline: str
    warnings: list[str]
    rows: list[Row]
    other: list[Row]
    reference: str
    leads: Mapping[str, Interval] = MappingProxyType({})

    __repr__ = short_repr


def judge(data: RunData) -> Verdict:
    """Summarize a run directory; works on what has finished so far."""
    scale = scale_of(data.config)
    runs = [_single(arm, data) for arm in data.config["arms"] if arm["family"] != "early-stopping"]
    runs = [r for r in [*runs, _early_stopping(data)] if r.ends]
    grid = [r for r in runs if r.family == "adamw"]
    best = _best(grid, lambda r: r.mean(FINAL).mean, scale.higher_is_better)
    hindsight = _best(grid, lambda r: r.mean(BEST).mean, scale.higher_is_better)
    rows = {r.name: _row(r, best, _improving(r, data)) for r in runs}
    key = {r.name for r in (best, hindsight) if r}
    key |= {r.name for r in runs if r.family != "adamw" or r.settings == DEFAULT_ADAMW}
    shown = sorted((rows[n] for n in rows if n in key), key=_place)
    ours = next((r for r in runs if r.name == "poprisk"), None)
    default = next((r for r in grid if r.settings == DEFAULT_ADAMW), None)
    beside = {r.name: r for r in runs if r.name in RIVALS}
    field = Rivals(
        grid=[rows[r.name] for r in grid],
        best=rows[best.name] if best else None,
        leads={name: lead for name, r in beside.items() if (lead := _lead(ours, r)) is not None},
        edge=_edge(best, grid),
        lr=_our_rate(data.config),
        epochs=data.config["task"].get("epochs", 0),
        missing=_missing(data.config["arms"]),
    )
    rivals = [r for r in (best, default, *beside.values()) if r is not None]
    leads = {r.label: lead for r in rivals if (lead := _lead(ours, r)) is not None}
    if hindsight is not None and ours is not None:
        at_best = _paired(ours, hindsight, theirs=BEST)
        leads[f"{hindsight.label}, best epoch in hindsight"] = at_best
    mine = rows.get("poprisk")
    return Verdict(
        headline(mine, field, scale),
        warnings(mine, field, scale),
        shown,
        [row for name, row in rows.items() if name not in key],
        best.label if best else "",
        leads,
    )


def _missing(arms: list[dict[str, Any]]) -> tuple[str, ...]:
    """What a verdict takes and is not among the arms, by the names that ``compare`` takes."""
    there = {OURS: any(arm["name"] == OURS for arm in arms)}
    there["adamw"] = any(arm["family"] == "adamw" for arm in arms)
    return tuple(name for name, found in there.items() if not found)


def _our_rate(config: dict[str, Any]) -> float:
    """The learning rate of our arm, as recorded."""
    ours = next((arm for arm in config["arms"] if arm["family"] == "poprisk"), None)
    if ours is None:
        return OUR_RATE
    used = config.get("optimizers", {}).get(ours["name"], {})
    return float({"lr": OUR_RATE, **used, **ours["settings"]}["lr"])


def _improving(runs: _Runs, data: RunData) -> Improvement | None:
    """How an arm still improves at its end, by its finished runs."""
    if runs.family == "early-stopping":
        return None
    rows = [r for r in data.epochs if r["arm"] in runs.arms and r["seed"] in runs.ends]
    scale = scale_of(data.config)
    return still_improving(rows, higher_is_better=scale.higher_is_better, percent=scale.percent)


def _place(row: Row) -> tuple[int, bool]:
    """Order in the table: by family, the reference first in its own."""
    return FAMILIES.index(row.family), row.difference is not None


class _Runs(NamedTuple):
    """Results of one arm, or of arms pooled: what was measured at the end, by seed."""

    name: str
    label: str
    family: str
    settings: dict[str, Any]
    arms: tuple[str, ...]
    ends: dict[int, dict[str, Any]]

    def by_seed(self, key: str) -> dict[int, float]:
        """A figure of each seed that has it."""
        return {s: end[key] for s, end in self.ends.items() if end[key] is not None}

    def mean(self, key: str) -> Interval:
        """Mean of the figure with its interval."""
        return t_interval(self.by_seed(key).values())


def _single(arm: dict[str, Any], data: RunData) -> _Runs:
    name, seeds = arm["name"], data.config["seeds"]
    ends = {s: data.ends[name, s] for s in seeds if (name, s) in data.ends}
    return _Runs(name, arm["label"], arm["family"], arm["settings"], (name,), ends)


def _edge(best: _Runs | None, grid: list[_Runs]) -> str:
    """A warning if a better AdamW may lie outside of the grid."""
    if best is None:
        return ""
    rates = [r.settings["lr"] for r in grid]
    decays = [r.settings["weight_decay"] for r in grid]
    lr, decay = best.settings["lr"], best.settings["weight_decay"]
    edges = []
    if min(rates) < max(rates) and lr in (min(rates), max(rates)):
        edges.append(f"learning rate {lr:g}")
    if min(decays) < decay == max(decays):
        edges.append(f"decay {decay:g}")
    if not edges:
        return ""
    return (
        f"The best AdamW lies at the edge of the grid ({' and '.join(edges)}): a wider one may "
        "hold a better AdamW."
    )


def early_stopping_choices(data: RunData) -> dict[int, dict[str, Any]]:
    """The end row of the arm that each seed keeps by its held-out metric; whole grids only."""
    arms = [a["name"] for a in data.config["arms"] if a["family"] == "early-stopping"]
    higher = data.config["task"]["metric"]["higher_is_better"]
    chosen: dict[int, dict[str, Any]] = {}
    for seed in data.config["seeds"]:
        ends = [data.ends[a, seed] for a in arms if (a, seed) in data.ends]
        pick = _best(ends, lambda e: e["held_out_best"], higher)
        if pick is not None and len(ends) == len(arms):  # all of the grid, or it is not a choice
            chosen[seed] = pick
    return chosen


def _early_stopping(data: RunData) -> _Runs:
    """Settings and epoch chosen seed by seed on the held-out fifth."""
    arms = [a["name"] for a in data.config["arms"] if a["family"] == "early-stopping"]
    chosen = early_stopping_choices(data)
    ends = {
        seed: {FINAL: e["stopped_metric"], BEST: e[BEST], NOISE: e.get("stopped_memorized")}
        for seed, e in chosen.items()
    }
    label = "AdamW, early stopping on a held-out fifth"
    return _Runs("early-stopping", label, "early-stopping", {}, tuple(arms), ends)


def _best(items: Iterable[T], value: Callable[[T], float], higher: bool) -> T | None:
    finite = [i for i in items if math.isfinite(value(i))]
    return (max if higher else min)(finite, key=value, default=None)


def _lead(ours: _Runs | None, other: _Runs) -> Interval | None:
    """Our final metric minus another's; None if one of the two is missing."""
    return None if ours is None or other.name == ours.name else _paired(ours, other)


def _paired(ours: _Runs, other: _Runs, *, theirs: str = FINAL) -> Interval:
    """Our final metric minus a figure of another's, over the seeds that both have finished."""
    a, b = ours.by_seed(FINAL), other.by_seed(theirs)
    return t_interval([a[s] - b[s] for s in a if s in b])


def _row(runs: _Runs, best: _Runs | None, improving: Improvement | None) -> Row:
    return Row(
        label=runs.label,
        family=runs.family,
        arms=runs.arms,
        seeds=len(runs.ends),
        final=runs.mean(FINAL),
        best=runs.mean(BEST),
        memorized=runs.mean(NOISE) if runs.by_seed(NOISE) else None,
        difference=None if best is None or runs.name == best.name else _paired(runs, best),
        improving=improving,
    )
