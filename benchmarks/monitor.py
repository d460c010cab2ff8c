"""What a monitor at its defaults adds to a step: python benchmarks/monitor.py OUT.json."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from poprisk import PopRiskAdamW, RiskMonitor
from poprisk.bench import environment
from poprisk.bench.models import Case

CASES = (Case("mlp", 64, 1024), Case("mlp", 64, 256), Case("transformer", 16, 128))
EVERY, BLOCKS, WARM_UP = 50, 9, 2


def block_seconds(case: Case) -> dict[str, list[float]]:
    """Processor times of blocks of steps in which one measurement falls, with and without it."""
    model, x = case.build()
    y = torch.randint(0, 10, (len(x),))
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-4, batch_size=64, dataset_size=10_000)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    monitor = RiskMonitor(model, loss, optimizer, every=EVERY)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for block in range(2 * (WARM_UP + BLOCKS)):
        watched = block % 2 == 1
        started = time.process_time()
        for _ in range(EVERY):
            optimizer.zero_grad()
            loss(model(x), y).mean().backward()
            if watched:
                monitor.step(x, y)
            optimizer.step()
        if block >= 2 * WARM_UP:
            times["with" if watched else "without"].append(time.process_time() - started)
    return times


def main(out: Path) -> None:
    """Measure every case and write one JSON file."""
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        times = block_seconds(case)
        pairs = zip(times["with"], times["without"], strict=True)
        added = statistics.median(a / b - 1 for a, b in pairs)
        rows.append({"case": case.label(), "added": added, "seconds": times})
        print(f"{case.label()}: {added:+.1%}")
    settings = environment(threads=1, every=EVERY, blocks=BLOCKS)
    out.write_text(json.dumps({"environment": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
