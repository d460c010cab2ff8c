"""What the page on grokking says in words, each sentence from the numbers by a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from poprisk_lab.studies.claim import Done, steps_of, where
from poprisk_lab.studies.grokking.arms import BASE, LABELS, TUNING_SEED
from poprisk_lab.studies.grokking.changes import CHANGES, SEED
from poprisk_lab.studies.grokking.forces import COLUMNS, FORCES
from poprisk_lab.studies.judge import where_both, written

AS_SOON = 0.2
"""Relative difference in steps within which two single runs are said to be as fast."""
OTHERS = ("letter-snr", "rms-matched", "shuffled", "grokfast", "orthograd")


def sentences(done: Sequence[Done]) -> list[str]:
    """Everything worth telling, in order."""
    said = [
        _best_of_grid(done, "grid-", "AdamW"),
        _best_of_grid(done, "gate-grid-", "PopRiskAdamW"),
        _best_of_grid(done, "grokfast-grid-", "Grokfast"),
        _tuned(done, "adamw-tuned"),
        _tuned(done, "grokfast-tuned"),
        _others(done),
        _time_constants(done),
        _changes(done, "ours"),
        _changes(done, "letter-snr"),
        _changes(done, "adamw-same"),
        _jumps(done),
        _forces(done),
        _after(done),
    ]
    return [s for s in said if s]


def _best_of_grid(done: Sequence[Done], prefix: str, optimizer: str) -> str:
    grid = [d for d in done if d.settings["name"].startswith(prefix)]
    quick = [d for d in grid if d.found["reached"] is not None]
    best = min(quick, key=lambda d: d.found["reached"], default=None)
    if best is None:
        return ""
    s = best.settings
    more = "".join(
        f", {key.replace('grokfast_lamb', 'λ')} {value:g}"
        for key, value in s.get("gate", {}).items()
    )
    return (
        f"Of {len(grid)} {optimizer} settings on seed {TUNING_SEED} the fastest is lr {s['lr']:g}, "
        f"decay {s['weight_decay']:g}, β₂ {s['beta2']:g}{more}: {best.found['reached']} steps; "
        f"{len(grid) - len(quick)} did not get there in {s['limit']}."
    )


def _tuned(done: Sequence[Done], name: str) -> str:
    """Counts, and the seeds on which both got there: no ratio covers runs that never did."""
    ours, other = steps_of(done, name="ours-tuned"), steps_of(done, name=name)
    counts = [f"{len(s.reached) - s.censored} of {len(s.reached)}" for s in (ours, other)]
    said = f"Tuned, the gate gets there on {counts[0]} seeds and {LABELS[name]}, on {counts[1]}"
    times = where_both(other, ours)
    if math.isnan(times.mean):
        return f"{said}."
    return f"{said}; where both do, the latter takes {written(times)} times the steps."


def _others(done: Sequence[Done]) -> str:
    """What the other optimizers and the controls come to, at the same settings."""
    parts = []
    for name in OTHERS:
        runs = where(done, name=name)
        reached = [d.found["reached"] for d in runs if d.found["reached"] is not None]
        steps = f" ({min(reached):,} to {max(reached):,} steps)" if reached else ""
        best = max((d.found["best"] for d in runs if d.found["reached"] is None), default=None)
        short = "" if best is None else f", the best of the rest at {100 * best:.1f}%"
        parts.append(f"{LABELS[name]} {len(reached)} of {len(runs)}{steps}{short}")
    limit = where(done, name=OTHERS[0])[0].settings["limit"]
    return f"At the same settings, 95% within {limit:,} steps: {'; '.join(parts)}."


def _time_constants(done: Sequence[Done]) -> str:
    """Steps in units of the time that weight decay takes."""
    found = []
    for name in ("adamw-same", "ours", "adamw-tuned", "ours-tuned"):
        values = [
            d.found["reached"] * d.settings["lr"] * d.settings["weight_decay"]
            for d in where(done, name=name)
            if d.found["reached"] is not None
        ]
        if values:
            found.append(f"{LABELS[name]} {min(values):.1f} to {max(values):.1f}")
    return (
        f"In units of the decay time 1/(lr × decay), those that got there needed "
        f"{', '.join(found)}."
        if found
        else ""
    )


def _changes(done: Sequence[Done], arm: str) -> str:
    """Runs with one setting changed, sorted by how they compare with the run as it is."""
    found = where(done, name=arm, seed=SEED)[0].found
    base = found["reached"] or found["limit"]
    as_it_is = f"{'' if found['reached'] else 'not by '}{base:,} steps"
    groups: dict[str, list[str]] = {"sooner": [], "as soon": [], "later": [], "not": []}
    for name, change in CHANGES.items():
        for d in where(done, name=f"change-{name}") if change.arm == arm else []:
            reached = d.found["reached"]
            if reached is None:
                where_to = f"by {d.settings['limit']:,}: {100 * d.found['best']:.1f}%"
                groups["not"].append(f"{change.label} ({where_to})")
            else:
                late = reached / base - 1 if found["reached"] else -1.0
                key = "as soon" if abs(late) <= AS_SOON else "later" if late > 0 else "sooner"
                groups[key].append(f"{change.label} ({reached:,})")
    told = "; ".join(f"{key} with {', '.join(names)}" for key, names in groups.items() if names)
    if not told:
        return ""
    return f"{LABELS[arm]}, one setting changed, seed {SEED} (as it is: {as_it_is}): {told}."


def _jumps(done: Sequence[Done]) -> str:
    """How often the loss spikes, a thousand steps."""
    rates = {}
    for name in ("adamw-same", "ours"):
        runs = where(done, name=name)
        rates[name] = (
            1000 * sum(d.found["jumps"] for d in runs) / sum(d.found["steps"] for d in runs)
        )
    return (
        "The training loss more than doubles, and rises by 0.02, from one step to the next "
        f"{rates['adamw-same']:.1f} times in 1,000 steps of AdamW, and {rates['ours']:.1f} times "
        "with the gate."
    )


def _forces(done: Sequence[Done]) -> str:
    """Medians over the second half of the runs whose steps were taken apart."""
    parts = []
    for name in FORCES:
        for d in where(done, name=f"forces-{name}"):
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in d.found["curve"][1:]]
            rows = rows[len(rows) // 2 :]
            if rows:
                parts.append(f"{LABELS[name]} {_middle(rows)}")
    return (
        f"Medians over the second half of what was measured, seed 0: {'; '.join(parts)}."
        if parts
        else ""
    )


def _middle(rows: Sequence[dict[str, Any]]) -> str:
    """The medians of some rows."""
    known = {key: [row[key] for row in rows if row[key] is not None] for key in COLUMNS}
    middle = {key: median(values) for key, values in known.items() if values}
    edge = f"{middle['edge']:.2g} of the edge of stability, " if "edge" in middle else ""
    return (
        f"straightness {middle['straightness']:.2f}, {edge}training loss {middle['loss']:.1e}, "
        f"weights of norm {middle['norm']:.0f}, updates of length {middle['length']:.3f}"
    )


def _after(done: Sequence[Done]) -> str:
    """Whether accuracy stays."""
    ends = [d.found["curve"][-1][3] for d in where(done, name="ours") if d.found["reached"]]
    return (
        f"Up to {BASE['after']} steps after it has reached 95%, the gated run stands at "
        f"{100 * min(ends):.0f} to {100 * max(ends):.0f}%."
        if ends
        else ""
    )
