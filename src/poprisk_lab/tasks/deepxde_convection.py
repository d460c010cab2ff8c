"""Convection from noisy initial values, set up and trained by DeepXDE."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from poprisk_lab.tasks.convection import (
    BATCH,
    DOMAIN,
    SPEED,
    Convection,
    convection,
    periodic,
    relative_error,
)


def train(
    seed: int,
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    noise: float,
    steps: int,
    every: int,
) -> list[float]:
    """Train with an optimizer of ours; relative errors, one after each ``every`` steps."""
    os.environ["DDE_BACKEND"] = "pytorch"  # read when deepxde is imported
    import deepxde

    deepxde.config.set_random_seed(seed)
    data = convection(seed, noise=noise)
    problem = _problem(data)
    network = deepxde.nn.FNN([3, 64, 64, 64, 1], "tanh", "Glorot normal")
    network.apply_feature_transform(periodic)
    model = deepxde.Model(problem, network)
    model.compile(make_optimizer(model.net), verbose=0)
    fresh = deepxde.callbacks.PDEPointResampler(period=1, bc_points=True)
    errors = []
    for _ in range(steps // every):
        model.train(iterations=every, display_every=steps, callbacks=[fresh], verbose=0)
        values = torch.as_tensor(model.predict(data.grid.numpy())).squeeze(1)
        errors.append(relative_error(values, data.solution))
    return errors


def _problem(data: Convection) -> Any:
    import deepxde

    def equation(points: Any, u: Any) -> Any:
        slope = deepxde.grad.jacobian(u, points, i=0)
        return slope[:, 1:2] + SPEED * slope[:, 0:1]

    places = torch.stack([data.x, torch.zeros_like(data.x)], 1).numpy()
    measured = deepxde.icbc.PointSetBC(places, data.y.unsqueeze(1).numpy(), batch_size=BATCH)
    domain = deepxde.geometry.GeometryXTime(
        deepxde.geometry.Interval(0, DOMAIN[0]), deepxde.geometry.TimeDomain(0, DOMAIN[1])
    )
    return deepxde.data.TimePDE(
        domain, equation, [measured], num_domain=BATCH, train_distribution="pseudo"
    )
