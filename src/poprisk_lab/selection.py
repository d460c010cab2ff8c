"""What a comparison's twins would have chosen without validation data, and what that is worth."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

from poprisk.intervals import Interval, t_interval
from poprisk.risk.choose import comparable_positions
from poprisk_lab.results import RunData
from poprisk_lab.wording import scale_of

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
        sentences: one fact each.
        rows: one an arm, least estimated risk first.
    """

    sentences: list[str]
    rows: list[TwinRow]


def twin_report(data: RunData) -> TwinReport | None:
    """Summarize the twins of a run directory; None if it was made without ``--twin``."""
    if not data.config.get("twin"):
        return None
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in data.epochs:
        if row.get("estimate"):
            runs[row["arm"], row["seed"]].append(row)
    stops = {key: row for key, rows in runs.items() if (row := _stop(rows)) is not None}
    rows = [_row(arm, stops) for arm in data.config["arms"]]
    found = sorted((row for row in rows if row is not None), key=lambda row: row.estimate)
    return TwinReport(_sentences(data, stops), found)


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


def _sentences(data: RunData, stops: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    scale, arms = scale_of(data.config), {arm["name"]: arm for arm in data.config["arms"]}
    choices = {seed: c for seed in data.config["seeds"] if (c := _choose(seed, arms, stops))}
    if not choices:
        return ["No arm has an estimate that can be compared with others."]
    rivals = {seed: r for seed in choices if (r := _held_out(seed, arms, data)) is not None}
    best = {seed: _hindsight(seed, arms, data) for seed in choices}
    chosen = t_interval([c.metric for c in choices.values()])
    labels = sorted({arms[c.arm]["label"] for c in choices.values()})
    found = [
        f"Without validation data, the twins choose {_listed(labels)} and stop at epoch "
        f"{_mean([c.epoch for c in choices.values()]):.0f} on average: test {scale.name} "
        f"{scale.value(chosen.mean)}; the best arm at its best epoch in hindsight has "
        f"{scale.value(_mean([*best.values()]))}."
    ]
    if rivals:
        gaps = [scale.gain(choices[seed].metric - rivals[seed]) for seed in rivals]
        found.append(_against_held_out(t_interval(gaps), _mean([*rivals.values()]), scale))
    levels = [abs(e / t - 1) for e, t in _levels(arms, stops)]
    if levels:
        found.append(
            f"Where a fifth was held out, estimate and held-out loss differ by "
            f"{100 * _mean(levels):.0f}% on average at the stopping point."
        )
    return found


def _against_held_out(gap: Interval, rival: float, scale: Any) -> str:
    size = scale.gap(gap.mean, rival)
    word = "better" if gap.mean > 0 else "worse"
    end = f"{size} {word} for the twins" if gap.sign else f"no clear difference ({size} {word})"
    return f"A held-out fifth, choosing arm and epoch, reaches {scale.value(rival)}: {end}."


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


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else " or ".join((", ".join(labels[:-1]), labels[-1]))
