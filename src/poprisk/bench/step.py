"""Step times of optimizers, measured side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.bench import environment, write_json
from poprisk.optimizer import PopRiskAdamW

WARM_UP = 5

PARAMETER_SETS: dict[str, Sequence[tuple[int, ...]]] = {
    "1 × 10M": [(10_000_000,)],
    "12 × 768² + 4 × 768×3072": [(768, 768)] * 12 + [(768, 3072)] * 4,
    "100 × 10k": [(10_000,)] * 100,
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "PopRiskAdamW": lambda params: PopRiskAdamW(params, foreach=True),
    "PopRiskAdamW, second-moment": lambda params: PopRiskAdamW(
        params, foreach=True, variance="second-moment"
    ),
    "PopRiskAdamW, loop": lambda params: PopRiskAdamW(params, foreach=False),
}
BASELINE = "AdamW foreach"


class StepTime(NamedTuple):
    """Times of one optimizer on one parameter set.

    Attributes:
        parameters: name of the set.
        optimizer: name of the optimizer.
        milliseconds: median time of a step.
        baseline_milliseconds: the baseline's in the same rounds.
        ratio: median over steps of the time over the baseline's, taken in the same round.
        ratio_low: lower quartile of that ratio.
        ratio_high: upper quartile of that ratio.
    """

    parameters: str
    optimizer: str
    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench_steps(*, threads: int, steps: int) -> list[StepTime]:
    """Time every optimizer on every parameter set, taking turns step by step.

    Each optimizer is timed against the baseline in a pair of its own, so that the caches hold
    the state of two optimizers and not of all.

    Args:
        threads: for torch.
        steps: timed steps after a warm-up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            _bench_pair(name, shapes, other, steps)
            for name, shapes in PARAMETER_SETS.items()
            for other in OPTIMIZERS
            if other != BASELINE
        ]
    finally:
        torch.set_num_threads(before)


def _bench_pair(name: str, shapes: Sequence[tuple[int, ...]], other: str, steps: int) -> StepTime:
    pair = {key: OPTIMIZERS[key](_parameters(shapes)) for key in (BASELINE, other)}
    times: dict[str, list[float]] = {key: [] for key in pair}
    for _ in range(WARM_UP + steps):
        for key, optimizer in pair.items():
            started = time.perf_counter()
            optimizer.step()
            times[key].append(1e3 * (time.perf_counter() - started))
    kept = {key: values[WARM_UP:] for key, values in times.items()}
    return _summary(name, other, kept[other], kept[BASELINE])


def _summary(name: str, optimizer: str, own: list[float], base: list[float]) -> StepTime:
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = statistics.median(own), statistics.median(base)
    return StepTime(name, optimizer, *medians, middle, low, high)


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = [nn.Parameter(random(shape)) for shape in shapes]
    for p in params:
        p.grad = random(tuple(p.shape))
    return params


def bench_table(results: list[StepTime], *, threads: int) -> Table:
    """The results as a table: a line per parameter set and optimizer."""
    table = Table(
        title=f"one optimizer step on the CPU, threads: {threads}",
        title_justify="left",
        caption=f"each is timed in turn with {BASELINE}; ratio: median over these rounds",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("parameters")
    table.add_column("optimizer")
    table.add_column("ms", justify="right")
    table.add_column(f"{BASELINE} ms", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("quartiles", justify="right")
    last = ""
    for r in results:
        table.add_row(
            r.parameters if r.parameters != last else "",
            r.optimizer,
            f"{r.milliseconds:.2f}",
            f"{r.baseline_milliseconds:.2f}",
            f"{r.ratio:.2f}",
            f"{r.ratio_low:.2f} to {r.ratio_high:.2f}",
        )
        last = r.parameters
    return table


def write_results(path: Path, results: list[StepTime], *, threads: int, steps: int) -> None:
    """Write the results and the environment they were measured in as JSON."""
    rows = [r._asdict() for r in results]
    write_json(path, {"environment": environment(threads=threads, steps=steps), "results": rows})
