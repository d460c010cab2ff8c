"""The gate in a Kronecker basis beside its controls: python benchmarks/rotated.py OUT.json.

A first look, not the study that chooses settings: digits by share of wrong labels, seeds that
nothing was chosen on, final accuracy on clean test labels. Arms: PopRiskSOAP with its defaults, the
same basis without a gate at two rates, PopRiskAdamW with its defaults, and AdamW at the rate that
suits each share best of those tried in benchmarks/results/comparisons.json. Resumable.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk_lab.arms import backward_mean
from poprisk_lab.bench import environment
from poprisk_lab.tasks.digits import digits

NOISES = (0.0, 0.2, 0.4, 0.6)
SEEDS = range(700, 706)
BEST_ADAMW = {0.0: 3e-3, 0.2: 3e-4, 0.4: 1e-4, 0.6: 1e-4}
ARMS: dict[str, dict[str, Any]] = {
    "PopRiskSOAP": {},
    "basis alone, 2e-4": {"gate": False, "lr": 2e-4},
    "basis alone, 5e-4": {"gate": False, "lr": 5e-4},
    "PopRiskAdamW": {},
    "AdamW, best rate": {},
}


def build(arm: str, noise: float, model: torch.nn.Module, sizes: dict[str, int]) -> Optimizer:
    if arm == "AdamW, best rate":
        return AdamW(model.parameters(), lr=BEST_ADAMW[noise], weight_decay=0.01)
    if arm == "PopRiskAdamW":
        return PopRiskAdamW(model, **sizes)
    return PopRiskSOAP(model, **sizes, **ARMS[arm])


def train(arm: str, noise: float, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    task = digits(seed, noise=noise)
    model = task.new_model()
    (x, y), (queries, labels) = task.train, task.test
    sizes = {"batch_size": task.batch_size, "dataset_size": len(y)}
    optimizer = build(arm, noise, model, sizes)
    started = time.process_time()
    for epoch in range(task.epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(task.batch_size):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
            backward_mean(optimizer, losses)
            optimizer.step()
    with torch.no_grad():
        right = (model(queries).argmax(1) == labels).double().mean().item()
    seconds = time.process_time() - started
    return {"arm": arm, "noise": noise, "seed": seed, "accuracy": right, "seconds": seconds}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows = json.loads(out.read_text())["results"] if out.exists() else []
    done = {(r["arm"], r["noise"], r["seed"]) for r in rows}
    for seed in SEEDS:
        for noise in NOISES:
            for arm in ARMS:
                if (arm, noise, seed) in done:
                    continue
                rows.append(train(arm, noise, seed))
                content = {"environment": environment(threads=1), "results": rows}
                out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
