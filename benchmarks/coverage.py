"""How often the interval of a signal share holds the true share, on streams where that is known.

python benchmarks/coverage.py OUT.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poprisk.monitor.signal import Counts, GradientSignal, parts_of, sums_of
from poprisk_lab.bench import environment

SEED, WINDOWS, WINDOW, BATCH = 2000, 400, 8, 32
SHARES = (0.0, 0.1, 0.5, 0.9)
PARTS = {"whole batches": 1, "parts of two": 16}
SIZES = 1.28
"""Logarithm of the mean square of the heavy-tailed lengths."""

Noise = Callable[[torch.Generator], Tensor]


def directions(*scales: float) -> Noise:
    """Normal noise along so many directions, of these sizes."""
    sizes = torch.tensor(scales, dtype=torch.float64)
    sizes /= sizes.square().sum().sqrt()
    return lambda g: sizes * torch.randn(BATCH, len(sizes), generator=g, dtype=torch.float64)


def heavy(g: torch.Generator) -> Tensor:
    """Log-normal lengths: a few examples have most of the noise."""
    lengths = torch.exp(0.8 * torch.randn(BATCH, 1, generator=g, dtype=torch.float64))
    return directions(*[1.0] * 60)(g) * lengths / math.exp(SIZES / 2)


NOISES: dict[str, Noise] = {
    "1,000 directions": directions(*[1.0] * 1000),
    "60 directions, sizes falling as 1/i": directions(*[1 / (i + 1) for i in range(60)]),
    "60 directions, heavy tails": heavy,
    "5 directions": directions(*[1.0] * 5),
    "1 direction": directions(1.0),
}


def measured(rows: Tensor, parts: int) -> GradientSignal:
    """What a monitor has of a step whose batch comes in parts."""
    sums, counts = torch.zeros(5, dtype=torch.float64), Counts()
    for part in rows.chunk(parts):
        sums += sums_of(part @ part.T)
        counts = counts.plus(Counts.of(len(part)))
    total = rows.sum(0)
    return GradientSignal.of(float(total.dot(total)), sums.tolist(), counts)


def held(noise: Noise, share: float, parts: int) -> dict[str, float]:
    """Shares of the windows in which the interval holds the truth, or lies below or above it."""
    g = torch.Generator().manual_seed(SEED)
    dims = noise(g).shape[1]
    mean = math.sqrt(share / (1 - share) / BATCH / dims)  # the noise has a trace of 1
    ends = []
    for _ in range(WINDOWS):
        found = parts_of([measured(mean + noise(g), parts) for _ in range(WINDOW)])
        ends.append((found["share_low"], found["share_high"]))
    low, high = torch.tensor(ends, dtype=torch.float64).T
    below, above = (float(t.double().mean()) for t in (high < share, low > share))
    return {"holds": 1 - below - above, "below": below, "above": above}


def main(out: Path) -> None:
    """Try every stream and write one JSON file."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for (name, noise), (how, parts), share in product(NOISES.items(), PARTS.items(), SHARES):
        rows.append({"noise": name, "parts": how, "share": share, **held(noise, share, parts)})
        print(rows[-1], flush=True)
    settings = environment(seed=SEED, windows=WINDOWS, window=WINDOW, batch=BATCH)
    out.write_text(json.dumps({"environment": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
