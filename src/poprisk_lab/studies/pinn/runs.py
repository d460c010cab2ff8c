"""The trials of the differential equation: which optimizers are trained, and how."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.studies import lbfgs, optimizers
from poprisk_lab.studies.claim import Metrics, Trial, Workspace
from poprisk_lab.tasks import convection as task
from poprisk_lab.tasks import deepxde_convection

GOAL = 0.40
"""The relative error that is to be reached."""
DEEPXDE, STREAM, TERMS, LBFGS, SOAP = "deepxde", "stream", "terms", "lbfgs", "soap"
NOISES, MAIN = (0.5, 1.0, 2.0), 1.0
ADAMW_RATES, DECAY = (3e-4, 1e-3, 3e-3, 1e-2), 0.01
SNR_RATES, RATES, RIVAL_RATES = (3e-3, 1e-2, 3e-2), (3e-3, 1e-2), (1e-3, 3e-3)
CONTROLLED = 1e-2
"""The learning rate at which Algorithm 1 has its controls, and starved forms are shown."""
PILOT_RATE = 3e-3
"""Of the defaults beside rivals: the better one in a pilot on seeds 100 to 102, and no others."""
ADAM_SHARE, FIXED_POINTS = 0.5, 300
"""Before L-BFGS: the share of all steps by AdamW; then the points inside, which stay."""


def trials(quick: bool) -> list[Trial]:
    """Every optimizer at the main noise, some at the others, one by DeepXDE."""
    size: dict[str, Any] = {"steps": 2000, "every": 25, "keep": 2, "seeds": [0, 1, 2, 3, 4]}
    if quick:
        size = {"steps": 100, "every": 25, "keep": 1, "seeds": [0, 1]}
    found = list[Trial]()
    for noise in NOISES:
        for arm, lr, decay in _arms(noise, quick=quick):
            matched = arm == "snr" and noise == MAIN and lr == CONTROLLED
            given = {"arm": arm, "lr": lr, "weight_decay": decay, "noise": noise, **size}
            name = f"{arm}-lr{lr:g}-wd{decay:g}-noise{noise:g}"
            found.append(Trial(name, {**given, "matched": matched}))
    through = {"arm": DEEPXDE, "lr": 1e-2, "weight_decay": DECAY, "noise": MAIN, "matched": False}
    return [*found, Trial(DEEPXDE, {**through, **size, "seeds": [0]}, needs=(DEEPXDE,))]


def _arms(noise: float, *, quick: bool) -> list[tuple[str, float, float]]:
    main, rates = noise == MAIN, RATES[-1:] if quick else RATES
    grid = rates if quick else ADAMW_RATES
    found = [("adamw", lr, DECAY) for lr in grid]
    found += [("snr", lr, DECAY) for lr in (rates if quick else SNR_RATES)]
    found += [(arm, lr, DECAY) for arm in (STREAM, TERMS) for lr in rates]
    if main:
        found += [(arm, CONTROLLED, DECAY) for arm in ("soft", "auto", "shuffled-snr")]
        rival = rates if quick else RIVAL_RATES
        found += [(arm, lr, DECAY) for arm in (SOAP, LBFGS) for lr in rival]
    return found


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train the networks of all seeds with one optimizer; errors and steps to the goal by seed."""
    arm, seeds = settings["arm"], settings["seeds"]
    if arm == DEEPXDE:
        size = {key: settings[key] for key in ("noise", "steps", "every")}
        make = partial(_optimizer, settings, "snr")
        curves = [deepxde_convection.train(seed, make, **size) for seed in seeds]
        return {"runs": [optimizers.error_metrics(settings, curve, goal=GOAL) for curve in curves]}
    train = partial(_train, settings)
    return optimizers.train_with_control(train, arm, matched=settings["matched"])


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: optimizers.Step
) -> list[Metrics]:
    seeds = settings["seeds"]
    data = [task.convection(seed, noise=settings["noise"]) for seed in seeds]
    networks = [task.network(seed) for seed in seeds]
    optimizer = _optimizer(settings, arm, nn.ModuleList(networks), trace)
    x, y = torch.stack([d.x for d in data]), torch.stack([d.y for d in data])
    errors: list[list[float]] = []
    batches = task.batches(seeds, x.shape[1])
    steps = int(settings["steps"] * (ADAM_SHARE if arm == LBFGS else 1))
    for k, (index, inside) in zip(range(1, steps + 1), batches, strict=False):
        optimizer.zero_grad()
        misfit, residual = task.two_losses(networks, x.gather(1, index), y.gather(1, index), inside)
        _backward(optimizer, misfit, residual)
        step(optimizer)
        if k % settings["every"] == 0:
            errors.append(task.relative_errors(networks, data[0]))
    curves = [list(curve) for curve in zip(*errors, strict=True)]
    if arm == LBFGS:
        pairs = zip(seeds, networks, data, strict=True)
        ends = [_finish(settings, *each, settings["steps"] - steps) for each in pairs]
        curves = [curve + end for curve, end in zip(curves, ends, strict=True)]
    return [optimizers.error_metrics(settings, curve, goal=GOAL) for curve in curves]


def _backward(optimizer: torch.optim.Optimizer, misfit: Tensor, residual: Tensor) -> None:
    """Gradients of both losses, one by one where the optimizer is told which is which."""
    if not isinstance(optimizer, PopRiskAdamW) or not isinstance(
        optimizer.param_groups[0]["batch_size"], Mapping
    ):
        (misfit + residual).backward()
        return
    with optimizer.term("measured"):
        misfit.backward(retain_graph=True)
    with optimizer.term("inside"):
        residual.backward()


def _finish(
    settings: dict[str, Any], seed: int, network: task.PeriodicMLP, data: task.Convection, left: int
) -> list[float]:
    """L-BFGS on all measurements and points that stay: errors along it."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(1, FIXED_POINTS, 2, generator=generator) * torch.tensor(task.DOMAIN)
    return lbfgs.finish(
        network,
        lambda: task.physics_loss([network], data.x[None], data.y[None], inside),
        lambda: task.relative_errors([network], data)[0],
        evaluations=left,
        every=settings["every"],
    )


def _optimizer(
    settings: dict[str, Any], arm: str, model: nn.Module, trace: UpdateTrace | None = None
) -> torch.optim.Optimizer:
    """An optimizer of all networks: it treats every tensor by itself, hence every seed."""
    n = None if arm == STREAM else task.POINTS
    sizes: dict[str, Any] = {"batch_size": task.BATCH, "dataset_size": n}
    if arm == TERMS:
        sizes["batch_size"] = {"measured": task.BATCH, "inside": task.BATCH}
        sizes["dataset_size"] = {"measured": task.POINTS, "inside": None}
    return optimizers.make_optimizer(arm, model, settings, **sizes, trace=trace)
