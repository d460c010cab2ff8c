"""How estimators track the variance of the batch-mean gradient: benchmarks/variance.py OUT.

One run of the digits with 40% wrong labels under AdamW; at every evaluation each estimator's value,
kept along the whole run, is compared with the true variance at the present weights, from the
per-example gradients of all training examples. Then the optimizer itself with each estimator.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW, grad_mean_var
from poprisk.optim.gate import momentum_noise
from poprisk.optim.variance import Precomputed, StepCounts, VarianceEstimator, make_estimator
from poprisk.task import Task
from poprisk_lab.bench import environment
from poprisk_lab.tasks import load_task

BETAS = (0.9, 0.999)
CHUNKS = 4
STEPS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
TRACKED = ("ema", "second-moment", "exact", "one batch", "microbatch")
TRAINED = ("ema", "second-moment", "exact", "microbatch")


def batches(task: Task, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, the last incomplete one left out."""
    x, y = task.train
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(task.batch_size):
            if len(rows) == task.batch_size:
                yield x[rows], y[rows]


def flat(tensors: Any) -> Tensor:
    """All entries of several tensors."""
    return torch.cat([t.detach().flatten() for t in tensors])


class Tracker:
    """One estimator fed along a run of another optimizer."""

    def __init__(self, estimator: VarianceEstimator, size: int) -> None:
        self.estimator = estimator
        self.variances = [torch.zeros(size)] if estimator.state_keys else []
        self.observations = 0

    def observe(self, t: int, mean: Tensor, observed: Tensor) -> None:
        """Take a gradient, or a variance found within the batch."""
        if self.estimator.observes(t):
            self.observations += 1
            if isinstance(self.estimator, Precomputed):
                self.variances[0].lerp_(observed, 1 - self.estimator.decay(BETAS[0]))
            else:
                self.estimator.observe_(self.variances, [observed], [mean], self._counts(t))

    def value(self, t: int, mean: Tensor, square: Tensor) -> Tensor:
        """The estimated variance of one batch mean."""
        counts = self._counts(t)
        (raw,), scale = self.estimator.read(self.variances, [mean], [square], counts)
        return raw * scale / max(self.estimator.inflation(counts), 1e-12)

    def _counts(self, t: int) -> StepCounts:
        return StepCounts(t, self.observations, *BETAS)


def between_chunks(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The variance of the batch mean from the gradients of a few parts of the batch."""
    grads = []
    for rows in torch.arange(len(y)).chunk(CHUNKS):
        loss = task.loss(model(x[rows]), y[rows]).mean()
        grads.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(grads).var(dim=0) / CHUNKS


def compared(value: Tensor, truth: Tensor) -> dict[str, float]:
    """Ratio of the totals, and the median over coordinates of |log₂(value / truth)|."""
    seen = truth > 0
    ratio = (value[seen].clamp(min=1e-30) / truth[seen]).log2().abs()
    return {"total": float(value.sum() / truth.sum()), "error": float(ratio.median())}


def track(seed: int, lr: float) -> list[dict[str, Any]]:
    """Compare the estimators along one run."""
    task = load_task("digits", seed=seed)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS)
    size = sum(p.numel() for p in model.parameters())
    names = {"one batch": "exact"}
    trackers = {
        name: Tracker(make_estimator(names.get(name, name), rho=0.99, paper=False), size)
        for name in TRACKED
    }
    mean, square = torch.zeros(size), torch.zeros(size)
    rows = []
    for t, (x, y) in enumerate(islice(batches(task, seed, 1000), max(STEPS)), start=1):
        exact = flat(grad_mean_var(model, task.loss, (x, y)).values())
        chunks = between_chunks(task, model, x, y)
        optimizer.zero_grad()
        task.loss(model(x), y).mean().backward()
        g = flat(p.grad for p in model.parameters())
        seen = {"ema": g, "second-moment": g, "exact": exact, "one batch": exact}
        for name, tracker in trackers.items():
            tracker.observe(t, mean, seen.get(name, chunks))
        mean, square = mean.lerp(g, 1 - BETAS[0]), square.lerp(g * g, 1 - BETAS[1])
        if t in STEPS:
            n = len(task.train[1])
            everything = grad_mean_var(model, task.loss, task.train, chunk=250)
            truth = flat(everything.values()) * n / task.batch_size
            values = {k: v.value(t, mean, square) for k, v in trackers.items()}
            values["one batch"] = exact
            found = {k: compared(v, truth) for k, v in values.items()}
            rows.append({"seed": seed, "lr": lr, "step": t, "estimators": found})
        optimizer.step()
    return rows


def train(name: str, seed: int) -> dict[str, Any]:
    """Train the gated optimizer with one estimator to the end of the task."""
    task = load_task("digits", seed=seed)
    torch.manual_seed(seed)
    model = task.model()
    n = len(task.train[1])
    options: dict[str, Any] = {"variance": name, "batch_size": task.batch_size, "dataset_size": n}
    optimizer = PopRiskAdamW(model.parameters(), **options)
    started = time.process_time()
    for x, y in batches(task, seed, task.epochs):
        optimizer.zero_grad()
        if name == "exact":
            optimizer.backward(task.loss(model(x), y))
        elif name == "microbatch":
            for rows in torch.arange(len(y)).chunk(CHUNKS):
                (task.loss(model(x[rows]), y[rows]).sum() / len(y)).backward()
                optimizer.microbatch(len(rows))
        else:
            task.loss(model(x), y).mean().backward()
        optimizer.step()
    seconds = time.process_time() - started
    with torch.no_grad():
        test = (model(task.test[0]).argmax(1) == task.test[1]).float().mean()
        guesses = model(task.train[0]).argmax(1)
    assert task.clean is not None
    wrong = task.clean != task.train[1]
    memorized = (guesses[wrong] == task.train[1][wrong]).float().mean()
    figures = {"accuracy": float(test), "memorized": float(memorized), "seconds": seconds}
    return {"estimator": name, "seed": seed, **figures}


def main(out: Path) -> None:
    """Run everything and write one JSON file."""
    torch.set_num_threads(1)
    tracked = [row for lr in (1e-3, 1e-2) for seed in range(3) for row in track(seed, lr)]
    trained = [train(name, seed) for seed in range(5) for name in TRAINED]
    noise = momentum_noise(10**6, BETAS[0])
    content = {"tracking": tracked, "training": trained, "momentum_noise": noise}
    settings = environment(threads=1, betas=BETAS, chunks=CHUNKS)
    out.write_text(json.dumps({"environment": settings, **content}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
