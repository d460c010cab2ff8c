"""Regression with noisy targets: linear with few or many true features, and a real data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poprisk.task import Task
from poprisk_lab.tasks.nets import mlp

FEATURES = 200
TRAINING = 100
TEST = 2_000
SIGNAL_POWER = 20.0
NOISE_STD = 1.5


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error per example, averaged over its outputs: (b, ...) to (b,)."""
    return (outputs - targets).square().flatten(1).mean(1)


def _linear_task(name: str, seed: int, true_features: int) -> Task:
    """Y = x·w + noise with ‖w‖² = 20 spread over ``true_features`` of 200, n = 100."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(FEATURES, 1)
    chosen = torch.randperm(FEATURES, generator=generator)[:true_features]
    w[chosen] = torch.randn(true_features, 1, generator=generator)
    w *= (SIGNAL_POWER / w.square().sum()).sqrt()
    x = torch.randn(TRAINING + TEST, FEATURES, generator=generator)
    clean = x @ w
    y = clean + NOISE_STD * torch.randn(len(x), 1, generator=generator)
    return Task(
        name=name,
        model=lambda: nn.Linear(FEATURES, 1),
        loss=squared_error,
        train=(x[:TRAINING], y[:TRAINING]),
        test=(x[TRAINING:], y[TRAINING:]),
        clean=clean[:TRAINING],
        metric="mse",
        epochs=1000,
        batch_size=20,
        description=f"linear regression, {true_features} of {FEATURES} features matter, "
        f"{TRAINING} examples",
    )


def sparse_regression(seed: int = 0) -> Task:
    """Linear regression where 5 of 200 features matter, 100 noisy examples."""
    return _linear_task("sparse-regression", seed, 5)


def dense_regression(seed: int = 0) -> Task:
    """Linear regression where all 200 features matter a little, 100 noisy examples."""
    return _linear_task("dense-regression", seed, FEATURES)


def diabetes(seed: int = 0) -> Task:
    """Disease progression of 442 patients from 10 measurements (real, noise unknown), MLP."""
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes(scaled=False)
    measurements, progression = found.data, found.target
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(progression), generator=generator)
    x = torch.tensor(measurements, dtype=torch.float32)[order]
    y = torch.tensor(progression, dtype=torch.float32)[order].unsqueeze(1)
    n = 300
    raw = [dict(zip(found.feature_names, part.T, strict=True)) for part in (x[:n], x[n:])]
    x = (x - x[:n].mean(0)) / x[:n].std(0)
    y = (y - y[:n].mean()) / y[:n].std()
    return Task(
        name="diabetes",
        model=lambda: mlp(10, 128, 128, 1),
        loss=squared_error,
        train=(x[:n], y[:n]),
        test=(x[n:], y[n:]),
        metric="mse",
        epochs=200,
        batch_size=32,
        raw=raw,
        description="diabetes progression of 442 patients, MLP; targets in standard deviations",
    )
