"""What several processes have seen, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.audit.looks import KEPT_LOOKS, Look, Predictions
from poprisk.audit.rate import Rate
from poprisk.dtensor import processes


class Gathered(NamedTuple):
    """Predictions and looks of all processes, as :class:`Predictions` holds them of one."""

    average: Tensor
    last: Tensor
    history: Tensor
    weight: Tensor
    kept: list[int]
    looks: list[Look]
    not_finite: int


def gather(mine: Predictions, looks: Sequence[Look], not_finite: int) -> Gathered:
    """The same on every process; each sends the examples that it has seen."""
    alone = Gathered(
        mine.average, mine.last, mine.history, mine.weight, mine.kept, list(looks), not_finite
    )
    if processes() == 1:
        return alone
    parts: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(parts, part_of(mine, looks, not_finite))
    return merged(parts, *mine.average.shape)


def part_of(mine: Predictions, looks: Sequence[Look], not_finite: int) -> dict[str, Any]:
    """What one process has seen: its rows only."""
    rows = ((mine.weight > 0) | ~mine.history.isnan().all(1)).nonzero().squeeze(1)
    return {
        "rows": rows,
        **{
            name: getattr(mine, name)[rows]
            for name in ("average", "last", "history", "weight", "last_look")
        },
        "kept": mine.kept,
        "looks": list(looks),
        "not_finite": not_finite,
    }


def merged(parts: Sequence[dict[str, Any]], items: int, width: int) -> Gathered:
    """Parts put together: averages by the weights of their looks, the last look by its number."""
    average, last = torch.zeros(items, width), torch.zeros(items, width)
    weight, newest = torch.zeros(items), torch.zeros(items, dtype=torch.int32)
    kept = sorted({number for part in parts for number in part["kept"]})[:KEPT_LOOKS]
    history = torch.full((items, len(kept)), math.nan, dtype=parts[0]["history"].dtype)
    for part in parts:
        rows = part["rows"]
        average[rows] += part["weight"][:, None] * part["average"].float()
        weight[rows] += part["weight"]
        newer = part["last_look"] > newest[rows]
        last[rows[newer]] = part["last"][newer].float()
        newest[rows] = torch.maximum(newest[rows], part["last_look"])
        for column, number in enumerate(part["kept"]):
            if number in kept:
                found = part["history"][:, column]
                known = ~found.isnan()
                history[rows[known], kept.index(number)] = found[known]
    looks = [
        _together([part["looks"][k] for part in parts if k < len(part["looks"])])
        for k in range(max(len(part["looks"]) for part in parts))
    ]
    total = sum(part["not_finite"] for part in parts)
    average /= weight.clamp_min(1)[:, None]
    return Gathered(average, last, history, weight, kept, looks, total)


def _together(looks: Sequence[Look]) -> Look:
    """One look of several processes: means over items, believed if each of them believes it."""
    n = sum(look.items for look in looks)
    shares = [look.items / n for look in looks]
    # A process may have too few planted labels to say anything.
    memorized = [m for look in looks if (m := look.memorization) and not math.isnan(m.value)]
    return Look(
        looks[0].number,
        n,
        sum(s * look.agreement for s, look in zip(shares, looks, strict=True)),
        sum(s * look.confidence for s, look in zip(shares, looks, strict=True)),
        _mean(memorized) if memorized else None,
        all(look.believed for look in looks),
    )


def _mean(rates: Sequence[Rate]) -> Rate:
    k = len(rates)
    error = math.sqrt(sum(r.standard_error**2 for r in rates)) / k
    reason = next((r.reason for r in rates if r.reason), "")
    return Rate(sum(r.value for r in rates) / k, error, not reason, reason)
