"""What a monitor at its defaults adds to a step: python benchmarks/monitor.py OUT.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from poprisk import PopRiskAdamW, RiskMonitor
from poprisk_lab.bench import environment
from poprisk_lab.bench.models import BenchCase

CASES = (BenchCase("mlp", 64, 1024), BenchCase("mlp", 64, 256), BenchCase("transformer", 16, 128))
EVERY, BLOCKS, WARM_UP = 50, 11, 3


class Added(NamedTuple):
    """What the monitor adds, and what that was computed from; processor time in seconds.

    Attributes:
        added: share of training time: extra time of a measurement over that of 50 plain steps.
        step: median of the steps in which nothing is measured.
        extra: of each measurement: its step and the next, which finds other data in the caches,
            less two plain steps.
    """

    added: float
    step: float
    extra: list[float]


def added_by(case: BenchCase) -> Added:
    """Train with a monitor, and compare the steps in which it measures with the others."""
    model, x = case.build()
    y = torch.randint(0, 10, (len(x),))
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-4, batch_size=64, dataset_size=10_000)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    monitor = RiskMonitor(model, loss, optimizer, every=EVERY)
    times: list[float] = []
    for _ in range(EVERY * (WARM_UP + BLOCKS)):
        started = time.process_time()
        optimizer.zero_grad()
        loss(model(x), y).mean().backward()
        monitor.step(x, y)
        optimizer.step()
        times.append(time.process_time() - started)
    blocks = [times[i : i + EVERY] for i in range(EVERY * WARM_UP, len(times), EVERY)]
    step = statistics.median(t for block in blocks for t in block[2:])
    extra = [block[0] + block[1] - 2 * step for block in blocks]
    return Added(statistics.median(extra) / (EVERY * step), step, extra)


def main(out: Path) -> None:
    """Measure every case and write one JSON file."""
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        found = added_by(case)
        rows.append({"case": case.label(), **found._asdict()})
        print(f"{case.label()}: {found.added:+.1%}", flush=True)
    settings = environment(threads=1, every=EVERY, blocks=BLOCKS, load=os.getloadavg()[0])
    out.write_text(json.dumps({"environment": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
