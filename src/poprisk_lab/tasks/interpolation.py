"""Regression that is trained to interpolation: inputs with a long tail, and random features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poprisk.task import Task
from poprisk_lab.tasks.regression import squared_error

SPIKES = 2
TAIL_ENERGY = 2.0
TEST = 2_000
NOISE_STD = 0.5


def long_tail(examples: int, tail: int, generator: torch.Generator) -> Tensor:
    r"""Inputs with :data:`SPIKES` strong directions and ``tail`` weak ones, (examples, ...).

    The strong ones have variance 1; the weak ones share the variance :data:`TAIL_ENERGY`, so that
    an example is told from every other by a little of each of them (Bartlett et al. 2020).
    """
    x = torch.randn(examples, SPIKES + tail, generator=generator, dtype=torch.float64)
    x[:, SPIKES:] *= (TAIL_ENERGY / tail) ** 0.5
    return x


def inputs_of(
    examples: int, generator: torch.Generator, *, tail: int = 0, isotropic: int = 0
) -> Tensor:
    """A :func:`long_tail`, or standard normal inputs of so many dimensions, (examples, ...)."""
    if tail:
        return long_tail(examples, tail, generator)
    return torch.randn(examples, isotropic, generator=generator, dtype=torch.float64)


def random_relu(x: Tensor, features: int, generator: torch.Generator) -> Tensor:
    r"""ReLU features :math:`\max(0, V x)/\sqrt p` with standard normal V/√d, (n, d) to (n, p)."""
    d = x.shape[1]
    V = torch.randn(d, features, generator=generator, dtype=x.dtype) / d**0.5
    return torch.relu(x @ V) / features**0.5


def _task(name: str, phi: Tensor, clean: Tensor, generator: torch.Generator, about: str) -> Task:
    """Linear regression on given features, the last :data:`TEST` of them for the test."""
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    y = (clean + NOISE_STD * noise).float()
    x, n, features = phi.float(), len(phi) - TEST, phi.shape[1]
    return Task(
        name=name,
        model=lambda: nn.Linear(features, 1, bias=False),
        loss=squared_error,
        train=(x[:n], y[:n]),
        test=(x[n:], y[n:]),
        clean=clean[:n].float(),
        metric="mse",
        epochs=300,
        batch_size=20,
        description=about,
    )


def long_tail_regression(seed: int = 0, tail: int = 1_000) -> Task:
    """Linear regression, two strong features and many weak ones, 100 noisy examples."""
    generator = torch.Generator().manual_seed(seed)
    x = long_tail(100 + TEST, tail, generator)
    clean = x[:, :1] - x[:, 1:2]
    about = f"linear regression, 2 strong and {tail} weak features, 100 examples"
    return _task("long-tail-regression", x, clean, generator, about)


def random_features(seed: int = 0, features: int = 100) -> Task:
    """Linear regression on random ReLU features, by default as many as the 100 noisy examples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100 + TEST, 8, generator=generator, dtype=torch.float64)
    clean = torch.tanh(x.sum(1, keepdim=True) / 8**0.5)
    about = f"linear regression on {features} random ReLU features, 100 examples"
    return _task("random-features", random_relu(x, features, generator), clean, generator, about)
