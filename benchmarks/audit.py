"""Wrong labels found by a run's own predictions, on data of scikit-learn, into a JSON file.

    python benchmarks/audit.py [--seeds 20 21 22] [--optimizers gate] [--out FILE]

Each run trains once on labels of which some are wrong, 5% more of them planted: average precision
of the ranking, F1 of the suspects, found and true share, recall of planted and of wrong labels.
What FILE holds of other optimizers stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import Auditor, Canaries, PopRiskAdamW, PopRiskSOAP, audit
from poprisk_lab.arms import backward_mean

NOISE = (
    ("digits", "random", 0.2),
    ("digits", "pairs", 0.3),
    ("cancer", "random", 0.2),
    ("cancer", "one-sided", 0.3),
)
EPOCHS = 80
OPTIMIZERS: dict[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    "gate": lambda model, n: PopRiskAdamW(
        model.parameters(), lr=1e-3, weight_decay=0.01, batch_size=64, dataset_size=n
    ),
    "adamw": lambda model, _: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01),
    "basis": lambda model, n: PopRiskSOAP(model, batch_size=64, dataset_size=n),
}


def data(name: str, seed: int) -> tuple[Tensor, np.ndarray]:
    """1,000 images, or the whole table with columns of spread one; and the true labels."""
    load = load_digits if name == "digits" else load_breast_cancer
    x, y = load(return_X_y=True)
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
    rows = np.random.default_rng(seed).permutation(len(y))[:1000]
    return torch.tensor(x[rows], dtype=torch.float32), y[rows]


def noisy(y: np.ndarray, noise: str, rate: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(1000 + seed)
    found, classes, wrong = y.copy(), int(y.max()) + 1, rng.random(len(y)) < rate
    if noise == "one-sided":
        wrong &= y == 1
    step = rng.integers(1, classes, len(y)) if noise == "random" else 1
    found[wrong] = ((y + step) % classes)[wrong]
    return found


def run(name: str, noise: str, rate: float, optimizer: str, seed: int) -> dict[str, Any]:
    x, true = data(name, seed)
    given = noisy(true, noise, rate, seed)
    canaries = Canaries(torch.from_numpy(given), fraction=0.05, seed=seed)
    auditor = Auditor(canaries)
    y, n = auditor.targets, len(x)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, int(true.max()) + 1),
    )
    opt = OPTIMIZERS[optimizer](model, n)
    began, auditing = time.process_time(), 0.0
    for _ in range(EPOCHS):
        for index in torch.randperm(n).split(64):
            outputs = model(x[index])
            before = time.process_time()
            auditor.update(index, outputs, y[index])
            auditing += time.process_time() - before
            opt.zero_grad()
            backward_mean(opt, F.cross_entropy(outputs, y[index], reduction="none"))
            opt.step()
    seconds = time.process_time() - began
    result, end = auditor.result(), audit(model, x, canaries)
    wrong = given != true
    assert result.recall is not None
    assert result.memorization is not None
    return {
        "data": name,
        "noise": noise,
        "rate": rate,
        "optimizer": optimizer,
        "seed": seed,
        "average_precision": average_precision_score(wrong, -result.margin),
        "f1": f1_score(wrong, result.suspect),
        "average_precision_end": average_precision_score(wrong, -end.margin),
        "f1_end": f1_score(wrong, end.suspect),
        "wrong_share": result.value,
        "standard_error": result.standard_error,
        "true_share": float(wrong.mean()),
        "recall_planted": result.recall.value,
        "recall_wrong": float(result.suspect[wrong].mean()),
        "suggested_right": float((result.suggested == true)[wrong & result.suspect].mean()),
        "memorization": result.memorization.value,
        "look": result.look,
        "looks": len(result.looks),
        "reason": result.reason,
        "auditing_share_of_time": auditing / seconds,
    }


def rows(seeds: list[int], optimizers: list[str]) -> Iterator[dict[str, Any]]:
    for name, noise, rate in NOISE:
        for optimizer in optimizers:
            found = [run(name, noise, rate, optimizer, seed) for seed in seeds]
            yield from found
            mean = {
                key: statistics.mean(row[key] for row in found)
                for key in ("average_precision", "f1", "wrong_share", "true_share")
            }
            text = ", ".join(f"{key} {value:.3f}" for key, value in mean.items())
            print(f"{name} {noise} {rate} {optimizer}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    parser.add_argument("--optimizers", nargs="+", default=["gate", "adamw"], choices=OPTIMIZERS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/audit.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text("utf-8")) if args.out.exists() else []
    kept = [row for row in kept if row["optimizer"] not in args.optimizers]
    found = [*kept, *rows(args.seeds, args.optimizers)]
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
