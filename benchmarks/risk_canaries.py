"""What canaries cost and what they measure: python benchmarks/risk_canaries.py.

Cost: test accuracy on the clean digits with and without 2% canaries. Tracking: over runs of
different length, rate and optimizer on digits with 40% wrong labels, the canaries' memorization
against that of the labels known to be wrong: measured alike (probability of the label beyond that
of other wrong ones), and as the share that is predicted. Each finished seed is a file in
runs/risk-canaries. The measure was chosen on seeds 50-54.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poprisk import Canaries, PopRiskAdamW
from poprisk.task import Task
from poprisk_lab.runner import environment
from poprisk_lab.tasks.digits import digits, digits_clean

RUNS = Path("runs/risk-canaries")
RESULTS = Path(__file__).parent / "results" / "risk-canaries.json"
SEEDS = [*range(40, 45), *range(60, 65)]
COST_SEEDS = [*range(40, 45), *range(60, 85)]
CONFIGURATIONS = (
    (3, 1e-3, False),
    (20, 1e-3, False),
    (60, 1e-3, False),
    (40, 3e-3, False),
    (40, 1e-3, True),
    (40, 3e-4, False),
)
"""Epochs, learning rate, and whether the gate is on."""


def train(
    task: Task, y: Tensor, *, seed: int, epochs: int, lr: float, gate: bool
) -> torch.nn.Module:
    torch.manual_seed(seed)
    model, x = task.model(), task.train[0]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if gate:
        optimizer = PopRiskAdamW(model, lr=lr, batch_size=64, dataset_size=len(y))
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            task.loss(model(x[index]), y[index]).mean().backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: Task) -> float:
    x, y = task.test
    return float((model(x).argmax(1) == y).double().mean())


def cost(seed: int) -> dict[str, float]:
    """Accuracy without canaries minus with them, clean labels."""
    task = digits_clean(seed, hidden=128)
    settings: dict[str, Any] = {"seed": seed, "epochs": 30, "lr": 1e-3, "gate": False}
    planted = Canaries(task.train[1], seed=seed).targets
    with_them = accuracy(train(task, planted, **settings), task)
    return {"lost": accuracy(train(task, task.train[1], **settings), task) - with_them}


def tracking(seed: int) -> list[dict[str, Any]]:
    """Memorization of canaries and of the wrong labels, over runs."""
    task = digits(seed, hidden=128)
    rows = []
    for epochs, lr, gate in CONFIGURATIONS:
        canaries = Canaries(task.train[1], seed=seed)
        model = train(task, canaries.targets, seed=seed, epochs=epochs, lr=lr, gate=gate)
        with torch.no_grad():
            outputs = model(task.train[0])
        settings = {"epochs": epochs, "lr": lr, "gate": gate, "seed": seed}
        rows.append({**settings, **memorization(task, canaries, outputs)})
    return rows


def memorization(task: Task, canaries: Canaries, outputs: Tensor) -> dict[str, float]:
    """Of the canaries, and of the wrong labels that are none, by two measures."""
    given, clean = task.train[1], task.clean
    wrong = given != clean
    wrong[canaries.index] = False
    p = outputs[wrong].double().softmax(1)
    own, right = (p.gather(1, y[wrong][:, None]).squeeze(1) for y in (given, clean))
    planted = (outputs.argmax(1) == canaries.targets)[canaries.index].double().mean()
    return {
        "wrong labels": float((own - (1 - own - right) / (p.shape[1] - 2)).mean()),
        "wrong labels predicted": float((outputs[wrong].argmax(1) == given[wrong]).double().mean()),
        "canaries": canaries.memorization(outputs).value,
        "canaries predicted": float(planted),
    }


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over runs, of both measures of the wrong labels with the canaries'."""
    columns = {k: torch.tensor([row[k] for row in rows]) for k in rows[0] if "labels" in k}
    found = torch.tensor([row["canaries"] for row in rows])
    old = torch.tensor([row["canaries predicted"] for row in rows])
    return {
        "measured alike": correlation(columns["wrong labels"], found),
        "with the share of wrong labels predicted": correlation(
            columns["wrong labels predicted"], found
        ),
        "both as shares predicted": correlation(columns["wrong labels predicted"], old),
    }


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What is on record, or else made and recorded."""
    path = RUNS / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def main() -> None:
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    by_seed = {s: kept(f"tracking-{s}", lambda s=s: tracking(s)) for s in SEEDS}
    rows = [row for seed_rows in by_seed.values() for row in seed_rows]
    lost = [kept(f"cost-{s}", lambda s=s: cost(s))["lost"] for s in COST_SEEDS]
    left_out = [
        correlations([row for row in rows if row["seed"] != s])["measured alike"] for s in SEEDS
    ]
    content = {
        "environment": environment(1),
        "accuracy lost on clean labels": statistics.mean(lost),
        "standard error": statistics.stdev(lost) / math.sqrt(len(lost)),
        "lost by seed": dict(zip(COST_SEEDS, lost, strict=True)),
        "correlations over runs": correlations(rows),
        "measured alike, seeds 40-44": correlations(rows[:30])["measured alike"],
        "measured alike, seeds 60-64": correlations(rows[30:])["measured alike"],
        "measured alike, jackknife error": math.sqrt(
            (len(SEEDS) - 1) * statistics.pvariance(left_out)
        ),
        "runs": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print({k: v for k, v in content.items() if k not in ("runs", "environment")})


if __name__ == "__main__":
    main()
