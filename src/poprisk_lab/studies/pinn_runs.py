"""Training physics-informed networks: some seeds at once, or one through DeepXDE."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poprisk_lab.controls import UpdateTrace
from poprisk_lab.studies.claim import Found, Workspace
from poprisk_lab.studies.curves import rounded
from poprisk_lab.studies.optimizers import Step, make_optimizer, train_with_control
from poprisk_lab.tasks.convection import (
    SPEED,
    Convection,
    PeriodicMLP,
    convection,
    periodic,
    relative_error,
    values_and_residuals,
)

GOAL = 0.40
"""The relative error that is to be reached."""
BATCH = 32
DOMAIN = (2 * math.pi, 1.0)
DEEPXDE = "deepxde"
STREAM = "stream"


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Train the networks of all seeds with one optimizer; errors and steps to the goal by seed."""
    if settings["arm"] == DEEPXDE:
        return {"runs": [_through_deepxde(settings, seed) for seed in settings["seeds"]]}

    def train(arm: str, trace: UpdateTrace | None, step: Step) -> list[Found]:
        return _train(settings, arm, trace, step)

    return train_with_control(train, settings["arm"], matched=settings["matched"])


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: Step
) -> list[Found]:
    data = [convection(seed, noise=settings["noise"]) for seed in settings["seeds"]]
    models = nn.ModuleList(_network(seed) for seed in settings["seeds"])
    networks = [m for m in models if isinstance(m, PeriodicMLP)]
    optimizer = _optimizer(settings, arm, models, trace)
    x, y = torch.stack([d.x for d in data]), torch.stack([d.y for d in data])
    errors: list[list[float]] = []
    for k, (index, inside) in enumerate(batches(settings["seeds"], x.shape[1]), start=1):
        optimizer.zero_grad()
        physics_loss(networks, x.gather(1, index), y.gather(1, index), inside).backward()
        step(optimizer)
        if k % settings["every"] == 0:
            errors.append(_errors(networks, data[0]))
        if k == settings["steps"]:
            break
    return [_found(settings, curve) for curve in map(list, zip(*errors, strict=True))]


def _network(seed: int) -> PeriodicMLP:
    torch.manual_seed(seed)
    return PeriodicMLP()


def _optimizer(
    settings: dict[str, Any], arm: str, model: nn.Module, trace: UpdateTrace | None
) -> torch.optim.Optimizer:
    """An optimizer of all networks: it treats every tensor by itself, hence every seed."""
    return make_optimizer(
        arm,
        model,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        batch_size=BATCH,
        dataset_size=None if arm == STREAM else convection(0, noise=0.0).x.shape[0],
        trace=trace,
    )


def batches(seeds: list[int], n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of measurements and fresh points of the domain, each seed with its own.

    Yields:
        Indices (k, 32) of measurements, every one once an epoch but for a rest of n mod 32, and
        points (k, 32, 2) inside the domain.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = torch.tensor(DOMAIN)
    while True:
        orders = torch.stack([torch.randperm(n, generator=g) for g in generators])
        for i in range(n // BATCH):
            points = torch.stack([torch.rand(BATCH, 2, generator=g) for g in generators])
            yield orders[:, i * BATCH : (i + 1) * BATCH], points * size


def physics_loss(networks: list[PeriodicMLP], x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    """Mean squared misfit at t = 0 plus mean squared residual inside, summed over networks.

    Args:
        networks: k of them.
        x: (k, b) places of measurements.
        y: (k, b) what was measured.
        inside: (k, b, 2) points of the domain.
    """
    values, residuals = values_and_residuals(
        networks, torch.stack([x, torch.zeros_like(x)], 2), inside
    )
    return (values - y).square().mean(1).sum() + residuals.square().mean(1).sum()


def _errors(networks: list[PeriodicMLP], data: Convection) -> list[float]:
    grid = data.grid.expand(len(networks), -1, -1)
    with torch.no_grad():
        values, _ = values_and_residuals(networks, grid, grid[:, :0])
    return [relative_error(v, data.solution) for v in values]


def _found(settings: dict[str, Any], errors: list[float]) -> Found:
    """What is kept of a curve of errors: the first step at the goal, both ends, a thinned curve."""
    every, last = settings["every"], len(errors) - 1
    kept = [*range(settings["keep"] - 1, last, settings["keep"]), last]
    return {
        "steps": next((every * (i + 1) for i, e in enumerate(errors) if e <= GOAL), None),
        "limit": settings["steps"],
        "final": rounded([errors[-1]])[0],
        "best": rounded([min(errors)])[0],
        "at": [every * (i + 1) for i in kept],
        "errors": rounded([errors[i] for i in kept]),
    }


def _through_deepxde(settings: dict[str, Any], seed: int) -> Found:
    """The same problem set up and trained by DeepXDE, with Algorithm 1 as its optimizer."""
    os.environ["DDE_BACKEND"] = "pytorch"  # read when deepxde is imported
    import deepxde

    deepxde.config.set_random_seed(seed)
    data = convection(seed, noise=settings["noise"])
    model = deepxde.Model(_deepxde_problem(data), _deepxde_network())
    optimizer = _optimizer(settings, "snr", model.net, None)
    model.compile(optimizer, verbose=0)
    fresh = deepxde.callbacks.PDEPointResampler(period=1, bc_points=True)
    errors = []
    for _ in range(settings["steps"] // settings["every"]):
        model.train(
            iterations=settings["every"],
            display_every=settings["steps"],
            callbacks=[fresh],
            verbose=0,
        )
        values = torch.as_tensor(model.predict(data.grid.numpy())).squeeze(1)
        errors.append(relative_error(values, data.solution))
    return _found(settings, errors)


def _deepxde_problem(data: Convection) -> Any:
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


def _deepxde_network() -> Any:
    import deepxde

    network = deepxde.nn.FNN([3, 64, 64, 64, 1], "tanh", "Glorot normal")
    network.apply_feature_transform(periodic)
    return network
