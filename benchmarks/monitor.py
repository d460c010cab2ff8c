"""What a monitor adds to a step, and how the cheap signal follows the whole one.

python benchmarks/monitor.py OUT.json
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import PopRiskAdamW, RiskMonitor
from poprisk.monitor import NormSignal, Quantity, Signal
from poprisk_lab.bench import environment
from poprisk_lab.bench.models import BenchCase

CASES = (BenchCase("mlp", 64, 1024), BenchCase("mlp", 64, 256), BenchCase("transformer", 16, 128))
EVERY, CHEAP_EVERY, BLOCKS, WARM_UP = 50, 100, 11, 3
SETTLED, LOOKS = 100, 16


class Added(NamedTuple):
    """What a monitor adds, and what that was computed from; processor time in seconds.

    Attributes:
        added: share of training time: extra time of a measurement over that of the plain steps
            between two.
        step: median of the steps in which nothing is measured.
        extra: of each measurement: its step and the next, which finds other data in the caches,
            less two plain steps.
    """

    added: float
    step: float
    extra: list[float]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """One value an example."""
    return F.cross_entropy(outputs, targets, reduction="none")


def added_by(case: BenchCase, quantities: Sequence[Quantity] | None, every: int) -> Added:
    """Train with a monitor, and compare the steps in which it measures with the others."""
    model, x = case.build()
    y = torch.randint(0, 10, (len(x),))
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-4, batch_size=64, dataset_size=10_000)
    monitor = RiskMonitor(model, loss, optimizer, every=every, quantities=quantities)
    times: list[float] = []
    for _ in range(every * (WARM_UP + BLOCKS)):
        started = time.process_time()
        optimizer.zero_grad()
        loss(model(x), y).mean().backward()
        monitor.step(x, y)
        optimizer.step()
        times.append(time.process_time() - started)
    blocks = [times[i : i + every] for i in range(every * WARM_UP, len(times), every)]
    step = statistics.median(t for block in blocks for t in block[2:])
    extra = [block[0] + block[1] - 2 * step for block in blocks]
    return Added(statistics.median(extra) / (every * step), step, extra)


def batch_of(case: BenchCase, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Fresh inputs with a teacher's labels, three in ten of them at random."""
    n = 64
    x = torch.randn(n, 784) if case.kind == "mlp" else torch.randint(0, 64, (n, case.length))
    with torch.no_grad():
        y = teacher(x).argmax(1)
    return x, torch.where(torch.rand(n) < 0.3, torch.randint(0, 10, (n,)), y)


def followed(case: BenchCase) -> list[dict[str, Any]]:
    """Noise scales of gains and biases and of everything, on the same batches of a training.

    At fixed weights, before the first step and every so many of them.
    """
    model, _ = case.build()
    teacher, _ = case.build()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.5 * p.std(correction=0) * torch.randn_like(p))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = []
    for part in range(3):
        found: dict[str, Any] = {"step": part * SETTLED}
        whole = Signal(modules=False, window=LOOKS)
        cheap = NormSignal(examples=None, window=LOOKS)
        batches = [batch_of(case, teacher) for _ in range(LOOKS)]
        for quantity in (whole, cheap):
            monitor = RiskMonitor(model, loss, optimizer, quantities=[quantity])
            for step, batch in enumerate(batches):
                row = monitor.measure([batch], step=step)
            found |= {k: v if math.isfinite(v) else None for k, v in row.items()}
        scales = [found[f"{name}/noise_scale"] for name in ("signal", "norm_signal")]
        found["ratio"] = None if None in scales else scales[0] / scales[1]
        rows.append(found)
        for _ in range(SETTLED if part < 2 else 0):
            x, y = batch_of(case, teacher)
            optimizer.zero_grad()
            loss(model(x), y).mean().backward()
            optimizer.step()
    return rows


def main(out: Path) -> None:
    """Measure every case and write one JSON file."""
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        found = added_by(case, None, EVERY)
        cheap = added_by(case, [NormSignal()], CHEAP_EVERY)
        row = {"case": case.label(), **found._asdict(), "cheap": cheap._asdict()}
        row["load"] = os.getloadavg()[0]
        print(f"{case.label()}: {found.added:+.1%}, cheap {cheap.added:+.2%}", flush=True)
        row["follows"] = followed(case)
        for look in row["follows"]:
            print("  ", {k: v and round(v, 3) for k, v in look.items()}, flush=True)
        rows.append(row)
    settings = environment(threads=1, every=EVERY, cheap_every=CHEAP_EVERY, blocks=BLOCKS)
    out.write_text(json.dumps({"environment": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
