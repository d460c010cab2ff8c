"""Is `fresh_batch_risk` unbiased on one-pass streams? python benchmarks/risk_fresh.py [SEEDS].

Three models learn from streams of noisy examples, each with three optimizers. At some steps the
estimate is compared with what the realized step does to the risk: its product with the gradient of
the mean loss on examples from the same source that are used for nothing else. Each finished run is
a file in runs/risk-fresh; the results are gathered from all that are there.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from risk_problems import (
    Transformer,
    binary,
    cross_entropy,
    mlp,
    repeats,
    ridges,
    squared,
)
from torch import Tensor, nn

from poprisk import PopRiskAdamW, fresh_batch_risk
from poprisk_lab.runner import environment

RUNS = Path("runs/risk-fresh")
RESULTS = Path(__file__).parent / "results" / "risk-fresh.json"
SEEDS = range(70, 85)
BATCH, JUDGES = 32, 1024
CHECKS = range(0, 128, 8)
"""Steps at which the estimate is made and judged."""


class Stream(NamedTuple):
    """Where examples come from, what learns from them and by which loss."""

    examples: Callable[[int], tuple[Tensor, Tensor]]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]


def bars(seed: int, *, n: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures, flat, of a row or a column; a fifth of the labels flipped."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, 8, generator=g)
    place, upright = torch.randint(8, (2, n), generator=g)
    upright %= 2
    x[torch.arange(n), place] += 1.5 * (1 - upright[:, None])
    x[torch.arange(n), :, place] += 1.5 * upright[:, None]
    y = torch.where(torch.rand(n, generator=g) < 0.2, 1 - upright, upright)
    return x.flatten(1), y[:, None].float()


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 1),
    )


LENGTH = BATCH * (max(CHECKS) + 1) + JUDGES
STREAMS = {
    "MLP": Stream(
        lambda s: ridges(s, n=LENGTH, dimensions=10)[:2], lambda: mlp(10, 64, 1), squared
    ),
    "CNN": Stream(lambda s: bars(s, n=LENGTH), cnn, binary),
    "transformer": Stream(
        lambda s: repeats(s, n=LENGTH, numbers=False, noise=0.25)[:2],
        lambda: Transformer(4),
        cross_entropy,
    ),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3),
    "PopRiskAdamW": lambda m: PopRiskAdamW(m, lr=2e-3, batch_size=BATCH),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def step(model: nn.Module, optimizer: Any, losses: Tensor) -> Tensor:
    """Take a step, and return the update."""
    before = flat(model.parameters())
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    return flat(model.parameters()) - before


def judged(stream: Stream, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Gradient of the risk, and the risk."""
    loss = stream.loss(model(x), y).mean()
    return flat(torch.autograd.grad(loss, list(model.parameters()))), float(loss.detach())


def measure(stream: Stream, make: Any, seed: int) -> list[dict[str, float]]:
    """Estimate and truth at every check of one run."""
    x, y = stream.examples(seed)
    torch.manual_seed(seed)
    model = stream.model()
    optimizer = make(model)
    judges = x[-JUDGES:], y[-JUDGES:]
    rows = []
    for i in range(max(CHECKS) + 1):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        xb, yb = x[batch], y[batch]
        found = None
        if i in CHECKS:
            gradient, risk = judged(stream, model, *judges)
            found = fresh_batch_risk(model, stream.loss, xb, yb, optimizer, fresh=True)
        update = step(model, optimizer, stream.loss(model(xb), yb))
        if found is not None:
            row = {"value": found.value, "error": found.standard_error, "batch": found.empirical}
            rows.append({**row, "truth": float(gradient @ update), "level": found.level - risk})
    return rows


def summary(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    """Differences of a run's sums over its checks, in units of the mean true change, over seeds."""
    sums = [{k: sum(row[k] for row in run) for k in run[0]} for run in runs]
    size = abs(statistics.mean(s["truth"] for s in sums))
    root = math.sqrt(len(runs))

    def over_seeds(values: list[float]) -> tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values) / root

    bias, error = over_seeds([(s["value"] - s["truth"]) / size for s in sums])
    batch, batch_error = over_seeds([(s["batch"] - s["truth"]) / size for s in sums])
    level, level_error = over_seeds([s["level"] / len(CHECKS) for s in sums])
    return {
        "seeds": len(runs),
        "true change": statistics.mean(s["truth"] for s in sums),
        "bias": bias,
        "standard error": error,
        "z": bias / error,
        "bias of the batch's own loss": batch,
        "its z": batch / batch_error,
        "z of the level": level / level_error,
    }


def gather() -> None:
    """Write the results of all runs that are there."""
    cells: dict[str, Any] = {}
    for model in STREAMS:
        for name in OPTIMIZERS:
            paths = [RUNS / f"{model}-{name}-{seed}.json" for seed in SEEDS]
            runs = [json.loads(path.read_text()) for path in paths if path.exists()]
            if len(runs) > 1:
                cells[f"{model}, {name}"] = summary(runs)
    content = {"environment": environment(1), "batch size": BATCH, "cells": cells}
    content["chi square of z"] = sum(cell["z"] ** 2 for cell in cells.values())
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    for name, cell in cells.items():
        print(name, {k: round(v, 4) for k, v in cell.items()})


def main(seeds: list[int]) -> None:
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for model, stream in STREAMS.items():
            for name, make in OPTIMIZERS.items():
                path = RUNS / f"{model}-{name}-{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(measure(stream, make, seed)))
        print("seed", seed, flush=True)
    gather()


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or list(SEEDS))
