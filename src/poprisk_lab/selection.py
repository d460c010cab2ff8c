"""What a comparison's twins would have chosen without validation data, and what that is worth."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

from poprisk.intervals import t_interval
from poprisk.risk.choose import comparable_positions
from poprisk_lab.plots import Table
from poprisk_lab.results import RunData
from poprisk_lab.wording import Scale, scale_of

CHOOSABLE = ("poprisk", "adamw", "paper")
"""Families of arms that train on all labels and can have a twin."""


class Choice(NamedTuple):
    """What one seed chooses: an arm, an epoch, and the test metric there."""

    arm: str
    epoch: int
    metric: float


class TwinRow(NamedTuple):
    """An arm at its estimated stopping point, averaged over seeds.

    Attributes:
        label: of the arm.
        estimate: of the risk there, in units of the loss.
        error: mean standard error of one estimate.
        held_out: loss on the held-out fifth there; None for an arm that trains on all labels.
        metric: test metric there.
        epoch: mean epoch.
        seeds: how many have a comparable estimate.
    """

    label: str
    estimate: float
    error: float
    held_out: float | None
    metric: float
    epoch: float
    seeds: int


class TwinReport(NamedTuple):
    """What the twins say.

    Attributes:
        summary: what they would have chosen, and what that is worth; without rows if no arm has an
            estimate that can be compared with others.
        rows: one an arm, least estimated risk first.
        table: the rows as text.
    """

    summary: Table
    rows: list[TwinRow]
    table: Table


NOTHING = "No arm has an estimate that can be compared with others."


def twin_report(data: RunData) -> TwinReport | None:
    """Summarize the twins of a run directory; None if it was made without ``--twin``."""
    if not data.config.get("twin"):
        return None
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in data.epochs:
        if row.get("estimate"):
            runs[row["arm"], row["seed"]].append(row)
    stops = {key: row for key, rows in runs.items() if (row := _stop(rows)) is not None}
    found = [row for arm in data.config["arms"] if (row := _row(arm, stops)) is not None]
    found.sort(key=lambda row: row.estimate)
    return TwinReport(_summary(data, stops), found, _table(found, scale_of(data.config)))


def _table(rows: list[TwinRow], scale: Scale) -> Table:
    return Table(
        ["Arm", "Estimated loss", "Held-out loss", f"Test {scale.name}", "Epoch", "Seeds"],
        [
            [
                row.label,
                f"{row.estimate:.4g} ± {row.error:.2g}",
                "n/a" if row.held_out is None else f"{row.held_out:.4g}",
                scale.value(row.metric),
                f"{row.epoch:.0f}",
                str(row.seeds),
            ]
            for row in rows
        ],
        "Each arm at the point where its twin estimates the least loss on fresh examples whose "
        "labels are as noisy as the training set's, lowest first. Arms that train on all labels "
        "have no held-out loss.",
    )


def _stop(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of least estimate among those that can be compared."""
    rows = sorted(rows, key=lambda row: row["epoch"])
    usable = comparable_positions([bool(row["estimate"]["comparable"]) for row in rows])
    return min((rows[i] for i in usable), key=lambda r: r["estimate"]["value"], default=None)


def _row(arm: dict[str, Any], stops: dict[tuple[str, int], dict[str, Any]]) -> TwinRow | None:
    mine = [row for (name, _), row in stops.items() if name == arm["name"]]
    if not mine:
        return None
    held_out = [row["held_out_loss"] for row in mine if row["held_out_loss"] is not None]
    return TwinRow(
        label=arm["label"],
        estimate=_mean([row["estimate"]["value"] for row in mine]),
        error=_mean([row["estimate"]["standard_error"] for row in mine]),
        held_out=_mean(held_out) if held_out else None,
        metric=_mean([row["test_metric"] for row in mine]),
        epoch=_mean([row["epoch"] for row in mine]),
        seeds=len(mine),
    )


def _summary(data: RunData, stops: dict[tuple[str, int], dict[str, Any]]) -> Table:
    scale, arms = scale_of(data.config), {arm["name"]: arm for arm in data.config["arms"]}
    choices = {seed: c for seed in data.config["seeds"] if (c := _choose(seed, arms, stops))}
    head = ["without validation data", ""]
    if not choices:
        return Table(head, [], NOTHING)
    chosen = _mean([c.metric for c in choices.values()])
    best = _mean([_hindsight(seed, arms, data) for seed in choices])
    rows = {
        "arm chosen by the twins": " or ".join(
            sorted({arms[c.arm]["label"] for c in choices.values()})
        ),
        "epoch, mean": f"{_mean([c.epoch for c in choices.values()]):.0f}",
        f"test {scale.name} there": scale.value(chosen),
        f"test {scale.name} of the best arm at its best epoch in hindsight": scale.value(best),
    }
    rivals = {seed: r for seed in choices if (r := _held_out(seed, arms, data)) is not None}
    if rivals:
        base = _mean([*rivals.values()])
        rows[f"test {scale.name} where a held-out fifth chooses arm and epoch"] = scale.value(base)
        gap = t_interval([choices[seed].metric - rival for seed, rival in rivals.items()])
        rows["gain of the twins over it"] = scale.written(gap, base)
    levels = [abs(e / t - 1) for e, t in _levels(arms, stops)]
    if levels:
        rows["difference of estimate and held-out loss, mean"] = f"{100 * _mean(levels):.0f}%"
    return Table(head, [[name, value] for name, value in rows.items()])


def _choose(
    seed: int, arms: dict[str, Any], stops: dict[tuple[str, int], dict[str, Any]]
) -> Choice | None:
    rows = [
        row for (name, s), row in stops.items() if s == seed and arms[name]["family"] in CHOOSABLE
    ]
    best = min(rows, key=lambda row: row["estimate"]["value"], default=None)
    return Choice(best["arm"], best["epoch"], best["test_metric"]) if best else None


def _held_out(seed: int, arms: dict[str, Any], data: RunData) -> float | None:
    """Test metric of the arm and epoch that the held-out fifth chooses on one seed."""
    sign = -1 if scale_of(data.config).higher_is_better else 1
    ends = [end for (name, s), end in data.ends.items() if s == seed and arms[name]["held_out"]]
    known = [end for end in ends if end["held_out_best"] is not None]
    best = min(known, key=lambda end: sign * end["held_out_best"], default=None)
    return best["stopped_metric"] if best else None


def _hindsight(seed: int, arms: dict[str, Any], data: RunData) -> float:
    better = max if scale_of(data.config).higher_is_better else min
    return better(
        row["test_metric"]
        for row in data.epochs
        if row["seed"] == seed and arms[row["arm"]]["family"] in CHOOSABLE
    )


def _levels(
    arms: dict[str, Any], stops: dict[tuple[str, int], dict[str, Any]]
) -> list[tuple[float, float]]:
    return [
        (row["estimate"]["value"], row["held_out_loss"])
        for (name, _), row in stops.items()
        if arms[name]["held_out"] and row["estimate"]["valid"] and row["held_out_loss"]
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
