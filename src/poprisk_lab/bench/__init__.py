"""Measurements side by side in one run; one file per thing measured."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from poprisk_lab.store import write_json

WARM_UP = 5
"""Rounds that are not counted."""


class Ratio(NamedTuple):
    """Times of two functions that took turns, in milliseconds, and quartiles of their ratio."""

    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def take_turns(
    function: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    rounds: int,
    seconds: float = 4.0,
    timer: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time both in turn, so that whatever else the machine does meets both alike.

    Args:
        function: what is measured.
        baseline: what it is compared with.
        rounds: counted rounds; fewer, but at least five, when time runs out.
        seconds: time for the counted rounds.
        timer: in seconds; ``time.process_time`` leaves out what other processes take, of which a
            long step meets more than a short one.
    """
    times: list[tuple[float, float]] = []
    for _ in range(WARM_UP):
        function()
        baseline()
    stop = time.perf_counter() + seconds
    while len(times) < rounds and (len(times) < 5 or time.perf_counter() < stop):
        times.append((_timed(function, timer), _timed(baseline, timer)))
    ratios = [a / b for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    own, base = (statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(own, base, middle, low, high)


def _timed(function: Callable[[], Any], timer: Callable[[], float]) -> float:
    started = timer()
    function()
    return 1e3 * (timer() - started)


def environment(**settings: Any) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **settings,
        "gpu": "not measured",
    }


def write_results(
    path: Path, results: Sequence[Any], *, more: dict[str, Any] | None = None, **settings: Any
) -> None:
    """Write named tuples and the environment they were measured in as JSON."""
    content = {"environment": environment(**settings), "results": [r._asdict() for r in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, **(more or {})})
