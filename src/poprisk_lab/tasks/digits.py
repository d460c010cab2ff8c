"""Handwritten digits (scikit-learn's copy of the UCI test set) with wrong labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from poprisk._validate import check_number, check_positive
from poprisk.losses import cross_entropy
from poprisk.task import Task
from poprisk_lab.tasks.nets import mlp

CLASSES = 10
TRAINING = 1_000


def flip_labels(labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Replace exactly ``round(rate·n)`` labels by another class, uniformly (symmetric noise)."""
    noisy = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shift = torch.randint(1, CLASSES, (len(chosen),), generator=generator)
    noisy[chosen] = (labels[chosen] + shift) % CLASSES
    return noisy


def split_digits(
    seed: int, noise: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Training set with wrong labels, test set without, and the right labels of the first."""
    from sklearn.datasets import load_digits

    check_number("noise", noise, low=0.0, high=1.0)
    pixels, classes = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32) / 16
    y = torch.tensor(classes, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train, test = order[:TRAINING], order[TRAINING:]
    noisy = flip_labels(y[train], noise, generator)
    return (x[train], noisy), (x[test], y[test]), y[train]


def cnn(channels: int = 32, widths: Sequence[int] = (128, CLASSES)) -> nn.Module:
    """Two 3×3 convolutions on flat pictures of 8×8, then fully connected layers.

    Args:
        channels: of the first convolution; the second has twice as many, at half the size.
        widths: of the fully connected layers, the outputs last.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        *mlp(32 * channels, *widths),
    )  # made in this order, in which they draw their weights


def _task(
    name: str, model: Callable[[], nn.Module], seed: int, noise: float, epochs: int, about: str
) -> Task:
    train, test, clean = split_digits(seed, noise)
    return Task(
        name=name,
        model=model,
        loss=cross_entropy,
        train=train,
        test=test,
        clean=clean,
        epochs=epochs,
        raw=(train[0].unflatten(1, (8, 8)), test[0].unflatten(1, (8, 8))),
        description=f"handwritten digits, {about.format(noise=noise)}",
    )


def digits(seed: int = 0, *, noise: float = 0.4, hidden: int = 256) -> Task:
    """8×8 digits, 1,000 for training with 40% symmetric label noise, 797 clean ones for testing."""
    check_positive("hidden", hidden)
    about = "MLP, {noise:.0%} of the training labels wrong"
    model = partial(mlp, 64, hidden, hidden, CLASSES)
    return _task("digits", model, seed, noise, 80, about)


def digits_cnn(seed: int = 0, *, noise: float = 0.4) -> Task:
    """The same data with a small convolutional network."""
    about = "CNN, {noise:.0%} of the training labels wrong"
    return _task("digits-cnn", cnn, seed, noise, 60, about)


def digits_clean(seed: int = 0, *, hidden: int = 256) -> Task:
    """The digits with correct labels: here a gate can only cost accuracy."""
    return _task(
        "digits-clean",
        lambda: mlp(64, hidden, hidden, CLASSES),
        seed,
        0.0,
        80,
        "MLP, correct labels",
    )
