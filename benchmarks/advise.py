"""Make and judge the rule of `poprisk advise`: python benchmarks/advise.py OUT [--minutes M].

For every level of ``advise_tasks.levels()``: what became of it, the gate's final metric against
AdamW's at the same settings and against the best of the grid, paired over seeds (from
``comparisons.json`` where it is there, else trained here); what `poprisk advise` measures of it, on
other seeds; and what a rule expects that was made without its group. OUT keeps what is done;
repeated, the command goes on, and stops after so many minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advise_tasks import Level, levels
from advise_truth import train

from poprisk.intervals import Interval, t_interval
from poprisk_lab.advise import FIRST_SEED, NEVER
from poprisk_lab.advise.measuring import Quotient, TaskStatistics, measure
from poprisk_lab.advise.rule import (
    EVEN,
    EXPECTED,
    GAINS,
    KINDS,
    LOSES,
    OUTCOMES,
    RIVALS,
    Features,
    Outcome,
    features_of,
    fit,
)
from poprisk_lab.arms import OURS, default_arms
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks import load_task

RECORDED = Path(__file__).parent / "results" / "comparisons.json"
SEEDS = (0, 1, 2, 3, 4)
MEASURED_SEEDS = (FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2)
SAME = "adamw-lr0.001-wd0.01"
ARMS = [arm for arm in default_arms(full=False) if arm.family in (OURS, "adamw")]
DRAWS = 10_000
SEEN = frozenset(
    "labels-drawn-0 labels-drawn-0.4 noisier-diabetes-1 scaled-long-tail-regression-1 "
    "scaled-random-features-1 labels-cancer-0 labels-cancer-0.2 friedman-0 friedman-0.5 "
    "labels-wine-0 labels-wine-0.4 labels-docstrings-0 scaled-long-tail-regression-4 "
    "scaled-random-features-4 scaled-random-features-0 scaled-sparse-regression-2".split()
)
"""Levels that were known, with those on record, when kinds and their outcomes were fixed."""
Finals = dict[str, list[float]]


def finals_of(level: Level) -> Finals:
    """Final metrics by arm, over seeds."""
    if not level.recorded:
        return train(level.source, level.settings, SEEDS, ARMS)
    found = json.loads(RECORDED.read_text(encoding="utf-8"))[level.recorded]["finals"]
    return {arm.name: [*found[arm.name].values()] for arm in ARMS}


def outcome(finals: Finals, *, higher_is_better: bool) -> dict[str, Any]:
    """The gate's gain against either rival with its interval, and what that says."""
    sign = 1 if higher_is_better else -1
    grid = [arm.name for arm in ARMS if arm.family == "adamw"]
    best = max(grid, key=lambda name: sign * sum(finals[name]))
    gains = {
        rival: t_interval(sign * (a - b) for a, b in zip(finals[OURS], finals[name], strict=True))
        for rival, name in zip(RIVALS, (SAME, best), strict=True)
    }
    return {
        "best": best,
        "gain": {rival: [*gain[:3]] for rival, gain in gains.items()},
        "outcome": {rival: _said(gain) for rival, gain in gains.items()},
    }


def _said(gain: Interval) -> str:
    return {1: GAINS, 0: EVEN, -1: LOSES}[gain.sign]


def done(level: Level) -> dict[str, Any]:
    """Everything about one level."""
    finals = finals_of(level)
    task = load_task(level.source, seed=0, **level.settings)
    seeds = [
        measure(load_task(level.source, seed=seed, **level.settings), seed)
        for seed in MEASURED_SEEDS
    ]
    return {
        "group": level.group,
        "settings": level.settings,
        "recorded": level.recorded,
        "description": task.description,
        "higher_is_better": task.scored_by.higher_is_better,
        "finals": finals,
        **outcome(finals, higher_is_better=task.scored_by.higher_is_better),
        "measured": [m._asdict() for m in seeds],
    }


Row = Mapping[str, Any]


def features(row: Row) -> Features:
    """What the rule reads, from the record."""
    return features_of([TaskStatistics(**_quotients(m)) for m in row["measured"]])


def _quotients(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Quotient(*v) if isinstance(v, list | tuple) else v for k, v in measured.items()}


def pairs_of(rows: Mapping[str, Row]) -> list[tuple[Features, Outcome]]:
    """What thresholds are fitted to."""
    return [(features(row), row["outcome"]) for row in rows.values()]


def left_out(rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """What a rule made without a level's group expects of it, by level."""
    found: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        thresholds = fit(pairs_of({n: r for n, r in rows.items() if r["group"] != group}))
        for name, row in rows.items():
            if row["group"] == group:
                kind = thresholds.kind(features(row))
                expected = dict(EXPECTED[kind])
                found[name] = {"thresholds": [*thresholds], "kind": kind, "expected": expected}
    return found


def judged(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The rule, its confusion tables with tasks left out, and trivial rules beside it."""
    expected = left_out(rows)
    return {
        "thresholds": fit(pairs_of(rows))._asdict(),
        "unseen": unseen(rows),
        "left_out": expected,
        "rivals": {rival: _of_rival(rows, expected, rival) for rival in RIVALS},
    }


def unseen(rows: Mapping[str, Row]) -> dict[str, Any]:
    """How the rule does on levels trained after its form was fixed, those of :data:`SEEN` apart."""
    old = {name: row for name, row in rows.items() if row["recorded"] or name in SEEN}
    thresholds = fit(pairs_of(old))
    new = {
        name: {"kind": thresholds.kind(found), "expected": dict(thresholds.expect(found))}
        for name, row in rows.items()
        if name not in old
        for found in [features(row)]
    }
    chosen = {name: rows[name] for name in new}
    return {
        "thresholds": thresholds._asdict(),
        "expected": new,
        "rivals": {rival: _of_rival(chosen, new, rival) for rival in RIVALS},
    }


def _of_rival(
    rows: Mapping[str, Row], expected: Mapping[str, Mapping[str, Any]], rival: str
) -> dict[str, Any]:
    pairs = {n: (expected[n]["expected"][rival], r["outcome"][rival]) for n, r in rows.items()}
    right = {name: e == o for name, (e, o) in pairs.items()}
    gain = {name: (e == GAINS) == (o == GAINS) for name, (e, o) in pairs.items()}
    groups = {name: row["group"] for name, row in rows.items()}
    counts = Counter(pairs.values())
    came = Counter(o for _, o in pairs.values())
    return {
        "confusion": {e: {o: counts[e, o] for o in OUTCOMES} for e in OUTCOMES},
        "right": [sum(right.values()), len(right), *accuracy(right, groups)],
        "gain_or_not": [sum(gain.values()), len(gain), *accuracy(gain, groups)],
        "right_where_learned": [
            sum(right[n] for n in rows if features(rows[n]).unexplained < NEVER),
            sum(features(row).unexplained < NEVER for row in rows.values()),
        ],
        "right_by_kind": {
            kind: [sum(own), len(own)]
            for kind in KINDS
            for own in [[right[n] for n in rows if expected[n]["kind"] == kind]]
        },
        "always": {o: [came[o], len(rows)] for o in OUTCOMES},
        "always_gains_or_not": [max(came[GAINS], len(rows) - came[GAINS]), len(rows)],
    }


def accuracy(right: Mapping[str, bool], groups: Mapping[str, str]) -> list[float]:
    """Share that is right, and its 95% interval from groups drawn with replacement."""
    by_group: dict[str, list[bool]] = {}
    for name, one in right.items():
        by_group.setdefault(groups[name], []).append(one)
    draw, parts = random.Random(0), [*by_group.values()]
    shares = sorted(
        _share([one for part in draw.choices(parts, k=len(parts)) for one in part])
        for _ in range(DRAWS)
    )
    return [_share([*right.values()]), shares[DRAWS // 40], shares[-DRAWS // 40]]


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main(out: Path, minutes: float) -> None:
    """Do what is left, as far as the time goes, and judge what is there."""
    content: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    rows: dict[str, Any] = content.get("levels", {})
    until = time.monotonic() + 60 * minutes
    for level in levels():
        if level.name in rows or time.monotonic() > until:
            continue
        rows[level.name] = done(level)
        print(level.name, rows[level.name]["outcome"], flush=True)
        seeds = {"trained": [*SEEDS], "measured": [*MEASURED_SEEDS]}
        write_json(out, {"environment": environment(0), "seeds": seeds, "levels": rows})
    write_json(out, {**json.loads(out.read_text("utf-8")), **judged(rows)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after")
    given = parser.parse_args()
    main(given.out, given.minutes)
