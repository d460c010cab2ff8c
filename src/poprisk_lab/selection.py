"""What a comparison's twins would have chosen without validation data, and what that is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from poprisk.intervals import t_interval
from poprisk.risk.choose import comparable_positions
from poprisk_lab.plots import Table
from poprisk_lab.results import RunData
from poprisk_lab.wording import scale_of

CHOOSABLE = ("poprisk", "adamw", "paper")
"""Families of arms that train on all labels and can have a twin."""
NOTHING = "No arm has an estimate that can be compared with others."

Stop = Mapping[str, Any]
"""The epoch row at which the twin of a run estimates the least loss."""


class TwinReport(NamedTuple):
    """What the twins say.

    Attributes:
        summary: what they would have chosen, and what that is worth; without rows if no arm has an
            estimate that can be compared with others.
        table: each arm at its estimated stopping point, mean over seeds, least estimate first.
    """

    summary: Table
    table: Table


def twin_report(data: RunData) -> TwinReport | None:
    """Summarize the twins of a run directory; None if it was made without ``--twin``."""
    if not data.config.get("twin"):
        return None
    runs: dict[tuple[str, int], list[Stop]] = defaultdict(list)
    for row in data.epochs:
        if row.get("estimate"):
            runs[row["arm"], row["seed"]].append(row)
    stops = [row for rows in runs.values() if (row := _stop(rows)) is not None]
    return TwinReport(_summary(data, stops), _table(data, stops))


def _stop(rows: list[Stop]) -> Stop | None:
    """The row of least estimate among those that can be compared."""
    rows = sorted(rows, key=lambda row: row["epoch"])
    usable = comparable_positions([bool(row["estimate"]["comparable"]) for row in rows])
    return min((rows[i] for i in usable), key=_estimate, default=None)


def _estimate(row: Stop) -> float:
    return row["estimate"]["value"]


def _table(data: RunData, stops: Sequence[Stop]) -> Table:
    scale, rows = scale_of(data.config), list[tuple[float, list[str]]]()
    for arm in data.config["arms"]:
        mine = [row for row in stops if row["arm"] == arm["name"]]
        if not mine:
            continue
        held_out = [row["held_out_loss"] for row in mine if row["held_out_loss"] is not None]
        estimate = fmean(map(_estimate, mine))
        error = fmean(row["estimate"]["standard_error"] for row in mine)
        cells = [
            arm["label"],
            f"{estimate:.4g} ± {error:.2g}",
            f"{fmean(held_out):.4g}" if held_out else "n/a",
            scale.value(fmean(row["test_metric"] for row in mine)),
            f"{fmean(row['epoch'] for row in mine):.0f}",
            str(len(mine)),
        ]
        rows.append((estimate, cells))
    return Table(
        ["Arm", "Estimated loss", "Held-out loss", f"Test {scale.name}", "Epoch", "Seeds"],
        [cells for _, cells in sorted(rows, key=lambda row: row[0])],
        "Each arm at the point where its twin estimates the least loss on fresh examples whose "
        "labels are as noisy as the training set's, lowest first. Arms that train on all labels "
        "have no held-out loss.",
    )


def _summary(data: RunData, stops: Sequence[Stop]) -> Table:
    scale, arms = scale_of(data.config), {arm["name"]: arm for arm in data.config["arms"]}
    chosen: dict[int, Stop] = {}
    for row in sorted(stops, key=_estimate):
        if arms[row["arm"]]["family"] in CHOOSABLE:
            chosen.setdefault(row["seed"], row)
    head = ["without validation data", ""]
    if not chosen:
        return Table(head, [], NOTHING)
    best = fmean(_hindsight(seed, arms, data) for seed in chosen)
    rows = {
        "arm chosen by the twins": " or ".join(
            sorted({arms[row["arm"]]["label"] for row in chosen.values()})
        ),
        "epoch, mean": f"{fmean(row['epoch'] for row in chosen.values()):.0f}",
        f"test {scale.name} there": scale.value(fmean(c["test_metric"] for c in chosen.values())),
        f"test {scale.name} of the best arm at its best epoch in hindsight": scale.value(best),
    }
    rivals = {s: r for s in data.config["seeds"] if (r := _held_out(s, arms, data)) is not None}
    rivals = {seed: rival for seed, rival in rivals.items() if seed in chosen}
    if rivals:
        base = fmean(rivals.values())
        rows[f"test {scale.name} where a held-out fifth chooses arm and epoch"] = scale.value(base)
        gap = t_interval([chosen[seed]["test_metric"] - rival for seed, rival in rivals.items()])
        rows["gain of the twins over it"] = scale.written(gap, base)
    levels = [
        abs(_estimate(row) / row["held_out_loss"] - 1)
        for row in stops
        if arms[row["arm"]]["held_out"] and row["estimate"]["valid"] and row["held_out_loss"]
    ]
    if levels:
        rows["difference of estimate and held-out loss, mean"] = f"{100 * fmean(levels):.0f}%"
    return Table(head, [[name, value] for name, value in rows.items()])


def _held_out(seed: int, arms: Mapping[str, Any], data: RunData) -> float | None:
    """Test metric of the arm and epoch that the held-out fifth chooses on one seed."""
    sign = -1 if scale_of(data.config).higher_is_better else 1
    ends = [end for (name, s), end in data.ends.items() if s == seed and arms[name]["held_out"]]
    known = [end for end in ends if end["held_out_best"] is not None]
    best = min(known, key=lambda end: sign * end["held_out_best"], default=None)
    return best["stopped_metric"] if best else None


def _hindsight(seed: int, arms: Mapping[str, Any], data: RunData) -> float:
    better = max if scale_of(data.config).higher_is_better else min
    return better(
        row["test_metric"]
        for row in data.epochs
        if row["seed"] == seed and arms[row["arm"]]["family"] in CHOOSABLE
    )
