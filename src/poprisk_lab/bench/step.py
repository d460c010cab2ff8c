"""Step times and state of optimizers beside torch's fused AdamW."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from poprisk.optim.adamw import PopRiskAdamW
from poprisk_lab.bench import take_turns
from poprisk_lab.bench.published import PublishedUpdate
from poprisk_lab.plots import Table
from poprisk_lab.work import torch_threads

PARAMETER_SETS: dict[str, Sequence[tuple[int, ...]]] = {
    "1 × 1M": [(1_000_000,)],
    "1 × 10M": [(10_000_000,)],
    "12 × 768² + 4 × 768×3072": [(768, 768)] * 12 + [(768, 3072)] * 4,
    "100 × 10k": [(10_000,)] * 100,
    "400 × 1k": [(1_000,)] * 400,
}

GROWTH_SETS: dict[str, Sequence[tuple[int, ...]]] = {
    "1 × 10k": [(10_000,)],
    "1 × 100k": [(100_000,)],
    "1 × 3M": [(3_000_000,)],
    "1 × 30M": [(30_000_000,)],
    "10 × 100k": [(100_000,)] * 10,
    "1000 × 1k": [(1_000,)] * 1000,
}
"""With those above: one tensor of 10k to 30M numbers, and 1M numbers in 1 to 1000 tensors."""

Build = Callable[[list[nn.Parameter]], Optimizer]


def _peer(name: str, package: str = "pytorch_optimizer", **settings: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Optimizer:
        optimizer = getattr(importlib.import_module(package), name)(params, **settings)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        return optimizer

    return build


OPTIMIZERS: dict[str, Build] = {
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "PopRiskAdamW fused": lambda params: PopRiskAdamW(params, fused=True),
    "PopRiskAdamW fused, second-moment": lambda params: PopRiskAdamW(
        params, fused=True, variance="second-moment"
    ),
    "PopRiskAdamW fused, per tensor": lambda params: PopRiskAdamW(
        params, fused=True, reduction="per_tensor"
    ),
    "PopRiskAdamW foreach": lambda params: PopRiskAdamW(params, foreach=True),
    "PRM, as published": PublishedUpdate,
    "AdaBelief": _peer("AdaBelief"),
    "ScheduleFreeAdamW": _peer("ScheduleFreeAdamW"),
}
PEERS: dict[str, tuple[str, Build]] = {
    "heavyball AdamW, compiled": ("heavyball", _peer("AdamW", "heavyball", consume_grad=False)),
    "torchao AdamW, 8-bit state": ("torchao", _peer("AdamW8bit", "torchao.optim")),
}
"""Optimizers of packages that the laboratory does not ask for: package, and how to build one."""
OURS_ON_GROWTH = ("PopRiskAdamW fused", "PopRiskAdamW foreach", "AdamW foreach")
BASELINE = "AdamW fused"


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
        state: bytes of state over bytes of parameters.
    """

    parameters: str
    optimizer: str
    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    state: float


class ColdStart(NamedTuple):
    """Seconds that a new process needs for the first fused step."""

    compiling: float
    from_cache: float


def bench_steps(*, threads: int, steps: int, growth: bool = False) -> list[StepTime]:
    """Time every optimizer on every parameter set, taking turns step by step.

    Each optimizer is timed against the baseline in a pair of its own, so that the caches hold
    the state of two optimizers and not of all.

    Args:
        threads: for torch.
        steps: timed steps after a warm-up; fewer where they take over four seconds.
        growth: also ours and AdamW's on the sets of ``GROWTH_SETS``.
    """
    few = {name: OPTIMIZERS[name] for name in OURS_ON_GROWTH}
    with torch_threads(threads):
        return [
            _bench_pair(name, shapes, other, build, steps)
            for name, shapes in {**PARAMETER_SETS, **(GROWTH_SETS if growth else {})}.items()
            for other, build in (optimizers_for(shapes) if name in PARAMETER_SETS else few).items()
        ]


def optimizers_for(shapes: Sequence[tuple[int, ...]]) -> dict[str, Build]:
    """The optimizers that are installed and take these shapes: Muon needs matrices."""
    peers = {name: build for name, (package, build) in PEERS.items() if find_spec(package)}
    found = {**OPTIMIZERS, **peers}
    muon = getattr(torch.optim, "Muon", None)
    if muon is None or any(len(shape) != 2 for shape in shapes):
        return found
    return {**found, "Muon": muon}


def missing_packages() -> list[str]:
    """Packages of ``PEERS`` that are not installed."""
    return sorted({package for package, _ in PEERS.values() if not find_spec(package)})


def _bench_pair(
    name: str, shapes: Sequence[tuple[int, ...]], other: str, build: Build, steps: int
) -> StepTime:
    params = parameters(shapes)
    optimizer = build(params)
    baseline = torch.optim.AdamW(parameters(shapes), fused=True)
    times = take_turns(optimizer.step, baseline.step, rounds=steps)
    return StepTime(name, other, *times, state_size(optimizer) / _bytes(params))


def state_size(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps per parameter."""
    return _bytes([*_tensors_in(optimizer.state)])


def _tensors_in(state: Any) -> Iterator[Tensor]:
    """Every plain tensor in nested dictionaries and lists, of packed tensors what they hold."""
    if isinstance(state, (Mapping, list, tuple)):
        for x in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors_in(x)
    elif is_traceable_wrapper_subclass(state):
        for name in state.__tensor_flatten__()[0]:
            yield from _tensors_in(getattr(state, name))
    elif isinstance(state, Tensor):
        yield state


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """Random parameters of these shapes with gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = [nn.Parameter(random(shape)) for shape in shapes]
    for p in params:
        p.grad = random(tuple(p.shape))
    return params


def _left_out() -> str:
    missing = missing_packages()
    return f"; left out, not installed: {', '.join(missing)}" if missing else ""


FIRST_STEP = """
import os, sys, time, torch
os.environ["POPRISK_CACHE"] = sys.argv[1]
from poprisk import PopRiskAdamW
w = torch.nn.Parameter(torch.ones(1000)); w.grad = torch.ones(1000)
optimizer = PopRiskAdamW([w], fused=True)
started = time.perf_counter(); optimizer.step(); print(time.perf_counter() - started)
"""


def bench_cold_start() -> ColdStart:
    """Time the first step of a new process with an empty cache, then with a filled one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_STEP, folder]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in "12"]
    return ColdStart(*(float(run.stdout) for run in runs))


def bench_table(results: list[StepTime]) -> Table:
    """The results as a table: a line per parameter set and optimizer."""
    return Table(
        ["parameters", "optimizer", "ms", f"{BASELINE} ms", "ratio", "quartiles", "state"],
        [
            [r.parameters, r.optimizer, f"{r.milliseconds:.2f}", f"{r.baseline_milliseconds:.2f}",
             f"{r.ratio:.2f}", f"{r.ratio_low:.2f} to {r.ratio_high:.2f}", f"{r.state:.2f}"]
            for r in results
        ],
        f"each is timed in turn with {BASELINE}; ratio: median over these rounds; state: bytes "
        f"over bytes of parameters{_left_out()}",
    )  # fmt: skip
