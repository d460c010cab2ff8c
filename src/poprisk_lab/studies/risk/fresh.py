"""Is `fresh_batch_risk` unbiased on one-pass streams?

Three models learn from streams of noisy examples, each with three optimizers. At some steps the
estimate is compared with what the realized step does to the risk: its product with the gradient of
the mean loss on examples from the same source that are used for nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW, fresh_batch_risk
from poprisk.losses import binary_cross_entropy, cross_entropy, squared_error
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.studies.risk.problems import NoisyData, Transformer, repeats, ridges
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial
from poprisk_lab.tasks.digits import cnn
from poprisk_lab.tasks.nets import mlp

SEEDS = range(70, 85)
BATCH, JUDGES = 32, 1024
CHECKS = range(0, 128, 8)
"""Steps at which the estimate is made and judged."""


class Stream(NamedTuple):
    """Where examples come from, what learns from them and by which loss."""

    examples: Callable[[int], NoisyData | tuple[Tensor, Tensor]]
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


LENGTH = BATCH * (max(CHECKS) + 1) + JUDGES
STREAMS = {
    "MLP": Stream(partial(ridges, n=LENGTH, dimensions=10), lambda: mlp(10, 64, 1), squared_error),
    "CNN": Stream(partial(bars, n=LENGTH), partial(cnn, 8, (1,)), binary_cross_entropy),
    "transformer": Stream(
        partial(repeats, n=LENGTH, numbers=False, noise=0.25),
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
    """All entries in a row, float64."""
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


def trials(quick: bool) -> list[Trial]:
    """Every model with every optimizer on every seed; the quick form: two seeds of one model."""
    return [
        Trial(f"{model}-{name}-{seed}", {"model": model, "optimizer": name, "seed": seed})
        for seed in (SEEDS[:2] if quick else SEEDS)
        for model in (["MLP"] if quick else STREAMS)
        for name in OPTIMIZERS
    ]


def run(settings: Settings, _: Workspace) -> Metrics:
    """Estimate and truth at every check of one run."""
    stream, seed = STREAMS[settings["model"]], settings["seed"]
    x, y = stream.examples(seed)[:2]
    torch.manual_seed(seed)
    model = stream.model()
    optimizer = OPTIMIZERS[settings["optimizer"]](model)
    judges = x[-JUDGES:], y[-JUDGES:]
    rows = list[dict[str, float]]()
    for i in range(max(CHECKS) + 1):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        xb, yb = x[batch], y[batch]
        if i not in CHECKS:
            step(model, optimizer, stream.loss(model(xb), yb))
            continue
        gradient, risk = judged(stream, model, *judges)
        found = fresh_batch_risk(model, stream.loss, xb, yb, optimizer, fresh=True)
        update = step(model, optimizer, stream.loss(model(xb), yb))
        row = {"value": found.value, "error": found.standard_error, "batch": found.empirical}
        rows.append({**row, "truth": float(gradient @ update), "level": found.level - risk})
    return {"checks": rows}


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


def report(done: Results) -> dict[str, Any]:
    """Over the seeds of every model and optimizer."""
    cells = {
        f"{model}, {name}": summary([d.metrics["checks"] for d in found])
        for model in STREAMS
        for name in OPTIMIZERS
        if (found := done.where(model=model, optimizer=name))
    }
    return {
        "batch size": BATCH,
        "cells": cells,
        "chi square of z": sum(cell["z"] ** 2 for cell in cells.values()),
    }


STUDY = Study("risk-fresh", trials, run, report)
