"""How often a monitor's alerts are raised in runs where all is well, and where something is not.

python benchmarks/alerts.py OUT.json
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poprisk import Canaries, PopRiskAdamW, RiskMonitor
from poprisk.monitor import CanaryMemorization, Gates, Loss, Signal
from poprisk_lab.bench import environment

SEEDS, FIRST = 20, 1000
EVERY, EXAMPLES, BATCH, CANARIES = 8, 1000, 64, 0.05
BREAK = 240
"""The step at which what is to be noticed begins."""

Batches = Iterator[tuple[Tensor, Tensor]]
Change = Callable[[Tensor, Tensor, torch.optim.Optimizer], tuple[Tensor, Tensor]]
loss = nn.CrossEntropyLoss(reduction="none")


class Setting(NamedTuple):
    """How to train.

    Attributes:
        expected: name of the alert that is right; none where all is well.
        optimizer: ``"gate"`` or ``"AdamW"``.
        lr: learning rate.
        steps: of the optimizer.
        wrong: share of the labels that are drawn at random, but for the canaries.
        stream: whether every example is new, instead of digits epoch by epoch.
        warm_up: steps over which the learning rate rises.
        z: of the gate.
        change: what happens to batches and optimizer from step :data:`BREAK` on.
    """

    expected: str | None = None
    optimizer: str = "AdamW"
    lr: float = 1e-3
    steps: int = 480
    wrong: float = 0.0
    stream: bool = False
    warm_up: int = 0
    z: float = 1.0
    change: Change | None = None


def labels(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """Every label is another one."""
    return x, (y + 3) % 10


def inputs(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """Pixels in reverse order."""
    return x.flip(1), y


def rate(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """A learning rate of 0.1."""
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    return x, y


SETTINGS = {
    "digits, AdamW": Setting(),
    "digits, gate": Setting(optimizer="gate"),
    "digits, gate, warm-up": Setting(optimizer="gate", warm_up=300),
    "digits, gate, 30% wrong labels": Setting(optimizer="gate", wrong=0.3),
    "stream, AdamW, 30% wrong labels": Setting(stream=True, wrong=0.3),
    "gate with z=20": Setting("starvation", optimizer="gate", z=20.0),
    "30% wrong labels, AdamW of 5e-3": Setting("memorization", wrong=0.3, lr=5e-3, steps=800),
    "other labels": Setting("drift", change=labels),
    "other inputs": Setting("drift", change=inputs),
    "learning rate of 0.1": Setting("drift", change=rate),
    "stream, other inputs": Setting("drift", stream=True, wrong=0.3, change=inputs),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All images, flat, and their labels."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def spoiled(y: Tensor, share: float, g: torch.Generator) -> Tensor:
    """Labels, so many of them drawn at random."""
    drawn = torch.rand(len(y), generator=g) < share
    return torch.where(drawn, torch.randint(10, (len(y),), generator=g), y)


def epochs(x: Tensor, y: Tensor, g: torch.Generator) -> Batches:
    """Whole batches, epoch by epoch."""
    while True:
        for i in torch.randperm(len(x), generator=g).split(BATCH):
            if len(i) == BATCH:
                yield x[i], y[i]


def stream(setting: Setting, g: torch.Generator) -> Batches:
    """New inputs with the labels of a network."""
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    for p in teacher.requires_grad_(False).parameters():
        p.mul_(3)
    while True:
        x = torch.randn(BATCH, 64, generator=g)
        yield x, spoiled(teacher(x).argmax(1), setting.wrong, g)


def make_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """The optimizer of a setting."""
    if setting.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=setting.lr)
    size = None if setting.stream else EXAMPLES
    return PopRiskAdamW(model, lr=setting.lr, z=setting.z, batch_size=BATCH, dataset_size=size)


def run(setting: Setting, seed: int) -> RiskMonitor:
    """Train once, with every number that an alert can look at."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make_optimizer(model, setting)
    quantities: list[Any] = [Loss(), Signal(modules=False)]
    if setting.stream:
        batches = stream(setting, g)
    else:
        order = torch.randperm(len(digits()[0]), generator=g)[:EXAMPLES]
        x, y = (t[order] for t in digits())
        planted = Canaries(spoiled(y, setting.wrong, g), fraction=CANARIES, seed=seed)
        batches = epochs(x, planted.targets, g)
        quantities.append(CanaryMemorization(planted, x[planted.index]))
    if setting.optimizer == "gate":
        quantities.append(Gates())
    monitor = RiskMonitor(model, loss, optimizer, every=EVERY, quantities=quantities)
    for t, (xs, ys) in zip(range(setting.steps), batches, strict=False):
        if setting.warm_up:
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * min(1.0, (t + 1) / setting.warm_up)
        if setting.change is not None and t >= BREAK:
            xs, ys = setting.change(xs, ys, optimizer)
        optimizer.zero_grad()
        loss(model(xs), ys).mean().backward()
        monitor.step(xs, ys)
        optimizer.step()
    return monitor


def told(setting: Setting) -> dict[str, Any]:
    """The alerts of all seeds, and where the runs ended."""
    runs = [run(setting, FIRST + seed) for seed in range(SEEDS)]
    alerts = [[(a.step, a.name, list(a.places)) for a in m.alerts] for m in runs]
    last = [m.rows[-1][1] for m in runs]
    right = [
        next((step for step, name, _ in found if name == setting.expected), None)
        for found in alerts
    ]
    return {
        "expected": setting.expected,
        "seeds": SEEDS,
        "rows": len(runs[0].rows),
        "with_others": sum(any(n != setting.expected for _, n, _ in found) for found in alerts),
        "first": right,
        "alerts": alerts,
        "loss": [row["loss"] for row in last],
        "canaries": [row.get("canaries") for row in last],
    }


def main(out: Path) -> None:
    """Run every setting and write one JSON file."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    for name, setting in SETTINGS.items():
        started = time.perf_counter()
        row = {"case": name, **told(setting)}
        rows.append(row)
        found = [step for step in row["first"] if step is not None]
        print(
            f"{name}: {len(found)} of {SEEDS} as expected, median step "
            f"{sorted(found)[len(found) // 2] if found else math.nan}, others in "
            f"{row['with_others']} ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        settings = environment(threads=1, every=EVERY, begins=BREAK)
        out.write_text(json.dumps({"environment": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
