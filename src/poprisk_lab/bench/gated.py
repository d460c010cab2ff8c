"""Steps of gated optimizers beside the steps that they wrap, in processor time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from poprisk.optim.wrapper import gated
from poprisk_lab.bench import take_turns
from poprisk_lab.bench.step import PARAMETER_SETS, Build, parameters
from poprisk_lab.plots import Table
from poprisk_lab.work import torch_threads

GPT = "12 × 768² + 4 × 768×3072"
GATED_SETS: dict[str, Sequence[tuple[int, ...]]] = {
    "MLP of 85k": [(256, 64), (256,), (256, 256), (256,), (10, 256), (10,)],
    "1 × 1M": [(1_000_000,)],
    "1 × 4.2M": [(2048, 2048)],
    GPT: PARAMETER_SETS[GPT],
}

WRAPPED: dict[str, Build] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, foreach=True),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True),
    "AdamW": lambda params: torch.optim.AdamW(params, foreach=True),
}


class GatedTime(NamedTuple):
    """Times of one gated optimizer on one parameter set, and of the foreach step that it wraps.

    Attributes:
        parameters: name of the set.
        optimizer: name of the wrapped optimizer.
        fused: whether the gate's part goes through the native kernel.
        milliseconds: median processor time of a gated step, all threads together.
        wrapped_milliseconds: the wrapped optimizer's alone, in the same rounds.
        ratio: median over steps of the time over the wrapped one's, taken in the same round.
        ratio_low: lower quartile of that ratio.
        ratio_high: upper quartile of that ratio.
    """

    parameters: str
    optimizer: str
    fused: bool
    milliseconds: float
    wrapped_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench_gated(*, threads: int, steps: int) -> list[GatedTime]:
    """Time every gated optimizer on every parameter set, taking turns with the one it wraps.

    Args:
        threads: for torch.
        steps: timed steps after a warm-up; fewer where they take over four seconds.
    """
    with torch_threads(threads):
        return [
            _bench_pair(name, shapes, wrapped, fused, steps)
            for name, shapes in GATED_SETS.items()
            for wrapped in WRAPPED
            for fused in (True, False)
        ]


def _bench_pair(
    name: str, shapes: Sequence[tuple[int, ...]], wrapped: str, fused: bool, steps: int
) -> GatedTime:
    build = WRAPPED[wrapped]
    optimizer, alone = gated(build(parameters(shapes)), fused=fused), build(parameters(shapes))
    times = take_turns(optimizer.step, alone.step, rounds=steps, timer=time.process_time)
    return GatedTime(name, wrapped, fused, *times)


def gated_table(results: Sequence[GatedTime]) -> Table:
    """The results as a table: a line per parameter set, optimizer and path."""
    return Table(
        ["parameters", "gated", "gate by", "ms", "alone ms", "ratio", "quartiles"],
        [
            [r.parameters, r.optimizer, "kernel" if r.fused else "foreach",
             f"{r.milliseconds:.2f}", f"{r.wrapped_milliseconds:.2f}", f"{r.ratio:.2f}",
             f"{r.ratio_low:.2f} to {r.ratio_high:.2f}"]
            for r in results
        ],
        "processor time, each timed in turn with the foreach step that it wraps; ratio: median "
        "over these rounds",
    )  # fmt: skip
