"""The twin against a twin trained by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import poprisk
from reference import risk
from surface import losses
from surface.outcomes import Moved, Wrong, agree, same, untouched
from surface.situations import Situation, inner

LR = 0.1
DELTA = 0.3


def batches_of(s: Situation) -> list[Tensor]:
    return [i for _ in range(3) for i in torch.arange(s.n).split(5)] if s.n else [torch.arange(0)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LR)


def train(
    s: Situation, model: nn.Module, perturbation: Tensor | None, precision: str | None
) -> nn.Module:
    """By hand, with losses less ``perturbation · u``."""
    x, y = s.data(precision)
    optimizer = sgd(model)
    torch.manual_seed(s.seed)
    for batch in batches_of(s):
        optimizer.zero_grad()
        u = model(x[batch])
        values = s.loss(u, y[batch])
        if perturbation is not None:
            values = values - (perturbation[batch].flatten(1) * u.flatten(1)).sum(1)
        values.mean().backward()
        optimizer.step()
    return model


def twin_risk(s: Situation) -> str:
    """The model is trained as it would be alone; the estimate follows from a twin made by hand."""
    x, y = s.data()
    twin = poprisk.TwinRisk(s.model, sgd, s.loss, dataset_size=max(s.n, 2), delta=DELTA)
    torch.manual_seed(s.seed)
    with s.under_to_train():
        for batch in batches_of(s):
            for run in twin.runs(batch):
                run.optimizer.zero_grad()
                run.loss(run.model(x[batch]), y[batch]).mean().backward()
                run.optimizer.step()
    random = torch.get_rng_state()
    alone = s.model()
    with s.under_to_train():
        train(s, alone, None, None)
    if not torch.equal(random, torch.get_rng_state()):
        raise Moved("the random numbers differ between a run with a twin and one alone")
    for (key, mine), other in zip(
        inner(twin.model).state_dict().items(), inner(alone).state_dict().values(), strict=True
    ):
        if not same(mine, other):
            raise Moved(f"{key} differs between a run with a twin and one alone")
    with s.under(), untouched(twin.model), untouched(twin.replicas[1].model):
        found = twin.estimate(x, y)
    if not losses.LOSSES[s.sort].separate and s.n > 1:
        raise Wrong(f"an estimate for a loss that is {s.sort}")
    return compare(s, found)


def counted(s: Situation) -> Tensor:
    """Which examples a loss does not ignore."""
    y = s.data()[1]
    return y != -100 if s.sort == "ignored labels" else torch.ones(len(y), dtype=torch.bool)


def compare(s: Situation, found: poprisk.RiskEstimate) -> str:
    """The parts of an estimate against their definitions."""
    if not found.valid:
        return f"flag: {found.reason}"
    if not all(math.isfinite(v) for v in (found.value, found.standard_error, found.train_loss)):
        raise Wrong(f"a valid estimate that is not finite: {found}")
    x, y = s.data("float64")
    kept = counted(s)
    model = train(s, s.bare("float64"), None, "float64").eval()
    u = model(x).detach()
    fitted = s.loss(u, y)[kept].mean()
    rough = s.mode == "autocast" or s.dtype in ("bfloat16", "float16")
    if rough and not losses.LOSSES[s.sort].curved:
        return "not compared: signs of gradients hang on rounding"
    agree("the training loss", found.train_loss, fitted, s.tolerance, fitted.abs() + 1)
    if losses.LOSSES[s.sort].targets in ("classes", "ignored"):
        right = (found.outputs.argmax(1) == y)[kept].double().mean()
        agree("the accuracy", found.accuracy, right, 1e-9)
    if not losses.LOSSES[s.sort].curved and found.value <= found.train_loss * (1 + 1e-9):
        raise Wrong(f"a valid estimate that is the training loss: {found}")
    if s.random or s.sort == "ignored labels" or not losses.LOSSES[s.sort].curved:
        return "training loss"
    if rough:
        return "training loss"
    return compare_values(s, found, u)


def compare_values(s: Situation, found: poprisk.RiskEstimate, u: Tensor) -> str:
    """Degrees of freedom, gain, left-out outputs and value from a twin made by hand."""
    x, y = s.data("float64")
    perturbation = tilt_of(s)
    other = train(s, s.bare("float64"), perturbation, "float64").eval()
    moved = (other(x) - u).detach()
    b = [risk.hessian(s.loss, row, t) for row, t in zip(u, y, strict=True)]
    follows = sum(float((m @ t) @ v) for m, t, v in zip(b, perturbation, moved, strict=True))
    dof = follows / float(perturbation.square().sum())
    agree("the dof", found.dof, dof, 20 * s.tolerance, abs(dof) + 0.02)
    dimensions = s.c - int(losses.LOSSES[s.sort].shift_invariant)
    low, high = math.log(1e-12), math.log(1e9)
    for _ in range(60):
        middle = 0.5 * (low + high)
        small = risk.dof(s.loss, u, y, math.exp(middle), dimensions) < dof
        low, high = (middle, high) if small else (low, middle)
    gain = math.exp(high) if dof > 0 else 0.0
    left_out = risk.leave_one_out(s.loss, u, y, gain)
    value = s.loss(left_out, y).mean()
    agree("the estimate", found.value, value, 100 * s.tolerance, value.abs() + 0.1)
    return "estimate"


def tilt_of(s: Situation) -> Tensor:
    """Signs times delta times the spread of the output gradient over the first batch."""
    shift_invariant = losses.LOSSES[s.sort].shift_invariant
    x, y = s.data("float64")
    first = batches_of(s)[0]
    v = s.bare("float64")(x[first]).detach().requires_grad_()
    (g,) = torch.autograd.grad(s.loss(v, y[first]).sum(), v)
    spread = (g - g.mean(0)) if len(g) > 1 else g
    maker: Any = poprisk.risk.twin.Probe  # its signs are drawn by seed
    probe = maker(max(s.n, 2), 0)
    z = probe.perturbation(torch.arange(s.n), torch.Size([s.c]), shift_invariant=shift_invariant)
    return DELTA * float(spread.square().mean().sqrt()) * z
