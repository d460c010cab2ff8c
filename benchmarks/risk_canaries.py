"""What canaries cost and what they measure: python benchmarks/risk_canaries.py.

Cost: test accuracy on the clean digits with and without 2% canaries. Tracking: over runs of
different length, rate and optimizer on digits with 40% wrong labels, the canaries' memorization
against that of the labels known to be wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poprisk import Canaries, PopRiskAdamW
from poprisk.compare import environment
from poprisk.tasks import Task
from poprisk.tasks.digits import digits, digits_clean

RESULTS = Path(__file__).parent / "results" / "risk-canaries.json"
SEEDS = range(40, 45)


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


def cost(seed: int) -> float:
    """Accuracy with canaries minus without, clean labels."""
    task = digits_clean(seed, hidden=128)
    settings: dict[str, Any] = {"seed": seed, "epochs": 30, "lr": 1e-3, "gate": False}
    planted = Canaries(task.train[1], seed=seed).targets
    with_them = accuracy(train(task, planted, **settings), task)
    return with_them - accuracy(train(task, task.train[1], **settings), task)


def tracking(seed: int) -> list[dict[str, Any]]:
    """Memorization of canaries and of the wrong labels, over runs."""
    task = digits(seed, hidden=128)
    rows = []
    for epochs, lr, gate in ((3, 1e-3, False), (20, 1e-3, False), (60, 1e-3, False),
                             (40, 3e-3, False), (40, 1e-3, True), (40, 3e-4, False)):  # fmt: skip
        canaries = Canaries(task.train[1], seed=seed)
        model = train(task, canaries.targets, seed=seed, epochs=epochs, lr=lr, gate=gate)
        with torch.no_grad():
            outputs = model(task.train[0])
        wrong = (canaries.targets != task.clean) & (canaries.targets == task.train[1])
        truth = float((outputs.argmax(1) == task.train[1])[wrong].double().mean())
        found = canaries.memorization(outputs)
        rows.append(
            {
                "epochs": epochs,
                "lr": lr,
                "gate": gate,
                "wrong labels": truth,
                "canaries": found.value,
            }
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for seed in SEEDS for row in tracking(seed)]
    pairs = torch.tensor([[row["wrong labels"], row["canaries"]] for row in rows])
    costs = [cost(seed) for seed in SEEDS]
    content = {
        "environment": environment(1),
        "seeds": list(SEEDS),
        "accuracy lost on clean labels": -sum(costs) / len(costs),
        "by seed": costs,
        "correlation of memorization over runs": float(torch.corrcoef(pairs.T)[0, 1]),
        "runs": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print({k: v for k, v in content.items() if k not in ("runs", "environment")})


if __name__ == "__main__":
    main()
