"""What canaries cost and what they measure.

Cost: test accuracy on the clean digits with and without 2% canaries. Tracking: over runs of
different length, rate and optimizer on digits with 40% wrong labels, the canaries' memorization
against that of the labels known to be wrong: measured alike (probability of the label beyond that
of other wrong ones), and as the share that is predicted. The measure was chosen on seeds 50-54.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk import Canaries, PopRiskAdamW
from poprisk.task import Task
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial
from poprisk_lab.tasks.digits import digits, digits_clean

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
    """A network trained on these labels."""
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
    """On the test set."""
    x, y = task.test
    return float((model(x).argmax(1) == y).double().mean())


def trials(quick: bool) -> list[Trial]:
    """Both parts on every seed; the quick form: two seeds of each, three epochs."""
    seeds, cost_seeds = (SEEDS[:2], COST_SEEDS[:2]) if quick else (SEEDS, COST_SEEDS)
    short = {"epochs": 3} if quick else {}
    return [
        Trial(f"{part}-{seed}", {"part": part, "seed": seed, **short})
        for part, of in (("tracking", seeds), ("cost", cost_seeds))
        for seed in of
    ]


def run(settings: Settings, _: Workspace) -> Metrics:
    """One part on one seed."""
    seed, epochs = settings["seed"], settings.get("epochs")
    return tracking(seed, epochs) if settings["part"] == "tracking" else cost(seed, epochs)


def cost(seed: int, epochs: int | None = None) -> Metrics:
    """Accuracy without canaries minus with them, clean labels."""
    task = digits_clean(seed, hidden=128)
    settings: dict[str, Any] = {"seed": seed, "epochs": epochs or 30, "lr": 1e-3, "gate": False}
    planted = Canaries(task.train[1], seed=seed).targets
    with_them = accuracy(train(task, planted, **settings), task)
    return {"lost": accuracy(train(task, task.train[1], **settings), task) - with_them}


def tracking(seed: int, at_most: int | None = None) -> Metrics:
    """Memorization of canaries and of the wrong labels, over runs."""
    task = digits(seed, hidden=128)
    rows = list[dict[str, Any]]()
    for epochs, lr, gate in CONFIGURATIONS:
        epochs = min(epochs, at_most or epochs)
        canaries = Canaries(task.train[1], seed=seed)
        model = train(task, canaries.targets, seed=seed, epochs=epochs, lr=lr, gate=gate)
        with torch.no_grad():
            outputs = model(task.train[0])
        settings = {"epochs": epochs, "lr": lr, "gate": gate, "seed": seed}
        rows.append({**settings, **memorization(task, canaries, outputs)})
    return {"runs": rows}


def memorization(task: Task, canaries: Canaries, outputs: Tensor) -> dict[str, float]:
    """Of the canaries, and of the wrong labels that are none, by two measures."""
    given, clean = task.train[1], task.clean
    assert clean is not None  # digits says which labels are wrong
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
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def report(done: Results) -> dict[str, Any]:
    """The loss of accuracy, and correlations with a jackknife error over seeds."""
    tracked = done.where(part="tracking").by_seed("runs")
    lost = done.where(part="cost").by_seed("lost")

    def alike(seeds: Sequence[int]) -> float:
        return correlations([row for s in seeds for row in tracked[s]])["measured alike"]

    seeds = [*tracked]
    rows = [row for found in tracked.values() for row in found]
    left_out = [alike([s for s in seeds if s != out]) for out in seeds]
    first, last = ([s for s in seeds if (s < 60) == early] for early in (True, False))
    return {
        "accuracy lost on clean labels": statistics.mean(lost.values()),
        "standard error": statistics.stdev(lost.values()) / math.sqrt(len(lost)),
        "lost by seed": lost,
        "correlations over runs": correlations(rows),
        "measured alike, seeds 40-44": alike(first),
        **({"measured alike, seeds 60-64": alike(last)} if last else {}),
        "measured alike, jackknife error": math.sqrt(
            (len(seeds) - 1) * statistics.pvariance(left_out)
        ),
        "runs": rows,
    }


STUDY = Study("risk-canaries", trials, run, report)
