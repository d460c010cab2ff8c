"""Two public failures of the gate, re-enacted small: python benchmarks/reenacted.py OUT.json.

Reports tell of single-cell data, where the gate shut 77% of the weights, and of a task of several
steps, where it learned nothing. ``cells``: counts of 500 genes in 1,500 cells of eight kinds, from
gamma-Poisson distributions, a network on their logarithms. ``steps``: (a + b + c) mod 11, four
fifths of all 1,331 cases for training. Right targets in both. Resumable.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from poprisk import PopRiskAdamW
from poprisk.losses import cross_entropy
from poprisk.optim.stats import GateStats
from poprisk.task import Task
from poprisk.task.batches import split_batches
from poprisk_lab.fit import score, seed_all
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks.nets import mlp

SEEDS = (0, 1, 2)
KINDS, GENES, CELLS = 8, 500, 2_500
BASE = 11


def cells(seed: int) -> Task:
    """Kinds of cells that differ in a tenth of their genes; depths differ by cell."""
    g = torch.Generator().manual_seed(seed)
    level = torch.randn(GENES, generator=g).exp()
    shifts = torch.randn(KINDS, GENES, generator=g)
    shifts *= torch.rand(KINDS, GENES, generator=g) < 0.1
    y = torch.randint(0, KINDS, (CELLS,), generator=g)
    depth = (0.5 * torch.randn(CELLS, 1, generator=g)).exp()
    mean = depth * level * shifts[y].exp()
    shape = torch.full_like(mean, 2.0)
    drawn = torch._standard_gamma(shape, generator=g) / shape * mean
    counts = torch.poisson(drawn, generator=g)
    x = (1e3 * counts / counts.sum(1, keepdim=True)).log1p()
    return _task("cells", x, y, (GENES, 128, 128, KINDS), 1_500, 40)


def steps(seed: int) -> Task:
    """Digits as one of eleven each."""
    digits = torch.cartesian_prod(*[torch.arange(BASE)] * 3)
    y = digits.sum(1) % BASE
    x = nn.functional.one_hot(digits, BASE).flatten(1).float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return _task("steps", x[order], y[order], (3 * BASE, 256, 256, BASE), 4 * len(y) // 5, 500)


def _task(
    name: str, x: Tensor, y: Tensor, widths: tuple[int, ...], training: int, epochs: int
) -> Task:
    train, test = (x[:training], y[:training]), (x[training:], y[training:])
    model = partial(mlp, *widths)
    return Task(name, model, cross_entropy, train, test, epochs=epochs, batch_size=64)


def build(arm: str, model: nn.Module, sizes: dict[str, int]) -> Optimizer:
    """An arm by name."""
    decay = 1.0 if arm.endswith("decay 1") else 0.01
    rest: dict[str, Any] = {"lr": 1e-3, "weight_decay": decay}
    if arm.startswith("AdamW"):
        return AdamW(model.parameters(), **rest)
    if arm.startswith("Algorithm 1, soft"):
        rest |= {"mode": "paper", "softness": 1.0}
    if arm.startswith("Algorithm 1, hard"):
        rest |= {"mode": "paper", "mask": "hard", "alpha": 0.01}
    return PopRiskAdamW(model, **sizes, **rest)


ARMS = (
    "AdamW",
    "AdamW, decay 1",
    "PopRiskAdamW",
    "PopRiskAdamW, decay 1",
    "Algorithm 1, soft, decay 1",
    "Algorithm 1, hard, alpha 0.01, decay 1",
)


def train(arm: str, task: Task, seed: int) -> dict[str, Any]:
    """Accuracy on new examples by fifths of the run, and what passed at the end."""
    seed_all(seed)
    model, (x, y) = task.new_model(), task.train
    optimizer = build(arm, model, {"batch_size": 64, "dataset_size": len(y)})
    curve = []
    for epoch in range(task.epochs):
        seed_all(1_000_003 * (seed + 1) + epoch)
        for rows in split_batches(torch.randperm(len(y)), 64):
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).mean().backward()
            optimizer.step()
        if (epoch + 1) % (task.epochs // 5) == 0:
            with torch.no_grad():
                curve.append(score(task, model(task.test[0]), task.test[1]))
    stats = optimizer.gate_stats(model) if isinstance(optimizer, PopRiskAdamW) else {}
    return {"accuracy": curve, "passed": _passed([*stats.values()])}


def _passed(stats: list[GateStats]) -> float | None:
    if not stats:
        return None
    return sum(s.pass_rate * s.coordinates for s in stats) / sum(s.coordinates for s in stats)


def main(out: Path) -> None:
    """What is left."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(out.read_text("utf-8"))["results"] if out.exists() else {}
    for seed, make, arm in product(SEEDS, (cells, steps), ARMS):
        key = f"{make.__name__} | {arm} | {seed}"
        if key not in rows:
            rows[key] = train(arm, make(seed), seed)
            print(key, rows[key], flush=True)
            write_json(out, {"environment": environment(0), "results": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
