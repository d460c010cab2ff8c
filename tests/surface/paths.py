"""A recorded run and what is read from it, against training again in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import poprisk
from surface import losses
from surface.outcomes import Moved, Wrong, agree, same
from surface.situations import Situation, inner

CLOSED = 1e-3
"""Closure error up to which the operators are held to be exact."""
LR = 0.05


def batches_of(s: Situation) -> list[Tensor]:
    """Six batches of half of the examples."""
    g = torch.Generator().manual_seed(s.seed + 3)
    size = max(1, s.n // 2)
    return [torch.randperm(s.n, generator=g)[:size] for _ in range(6)]


def optimizer_of(s: Situation, model: nn.Module, which: str) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if which == "SGD":
        return torch.optim.SGD(params, lr=LR)
    if which == "momentum":
        return torch.optim.SGD(params, lr=LR / 5, momentum=0.8, weight_decay=0.01)
    return torch.optim.AdamW(params, lr=LR / 10)


def train(s: Situation, model: nn.Module, which: str, precision: str | None = None) -> None:
    """The same steps without a recorder."""
    x, y = s.data(precision)
    optimizer = optimizer_of(s, model, which)
    for batch in batches_of(s):
        optimizer.zero_grad()
        s.loss(model(x[batch]), y[batch]).mean().backward()
        optimizer.step()


def record(s: Situation) -> str:
    """Training goes as without a recorder; operators, traces and left-out outputs add up."""
    which = s.case.choice(["SGD", "SGD", "momentum", "AdamW"])
    which = "SGD" if s.kind == "sparse embedding" else which  # others of torch refuse it
    model, (x, y) = s.model(), s.data()
    alone = s.model()
    torch.manual_seed(s.seed)
    random = torch.get_rng_state()
    with s.under():
        run = poprisk.record(
            model, s.loss, optimizer_of(s, model, which), batches_of(s), (x, y), train=(x, y)
        )
    if not losses.LOSSES[s.sort].separate and s.n > 1:
        raise Wrong(f"a record of a loss that is {s.sort}")
    torch.set_rng_state(random)
    with s.under_to_train():
        train(s, alone, which)
    for (key, mine), other in zip(
        inner(model).state_dict().items(), inner(alone).state_dict().values(), strict=True
    ):
        if not same(mine, other):
            raise Moved(f"{key} differs between a recorded run and an unrecorded one")
    with s.under():
        return read(s, run, which)


def read(s: Situation, run: poprisk.Run, which: str) -> str:
    """What the operators say of the run against the run itself."""
    ops = poprisk.path_operators(run)
    closure = ops.closure.worst
    first, final = s.bare("float64").eval(), s.bare("float64").eval()
    with torch.inference_mode(False), torch.enable_grad():
        train(s, final, which, "float64")
        x = s.data("float64")[0]
        moved = (final(x) - first(x)).detach().flatten()
    said = -ops.G @ ops.g0 - ops.affine.query
    scale = max(float(moved.abs().max()), 1e-6)
    if not math.isfinite(closure):
        return "flag: closure is not finite"
    allowed = s.tolerance + 30 * closure
    agree("the displacement by the operators", said, moved, allowed, scale)
    y = run.problem.train[1]
    clean = y / 2 if y.is_floating_point() else y.roll(1)
    trace = poprisk.trace_cells(run, clean, every=1, quadrature="gauss3", dtype=torch.float64)
    last = trace.parts[-1]
    total = last.signal + last.noise + last.affine
    agree("the displacement by traces", total.flatten(), said, 1e-6 + allowed, scale)
    cells = ops.four_cells(clean).cells
    noise = cells.harmful_noise + cells.benign_noise
    agree("the noise by traces", last.noise.flatten(), noise, 1e-6 + allowed)
    if closure > CLOSED:
        return "flag: closure"
    return left_out(s, run, which)


def left_out(s: Situation, run: poprisk.Run, which: str) -> str:
    """Left-out outputs: exact for a model linear in its weights and a squared error."""
    if s.n < 2:
        return "operators"
    found = poprisk.loo_risk(run)
    exact = s.kind == "linear" and which != "AdamW"
    if not (exact and s.sort in ("squared error", "mean squared error") and s.dtype == "float64"):
        return "operators" if found.valid else f"flag: {found.reason}"
    x, y = s.data("float64")
    for i in (0, s.n - 1):
        model = s.bare("float64")
        optimizer = optimizer_of(s, model, which)
        for batch in batches_of(s):
            optimizer.zero_grad()
            kept = batch[batch != i]
            total = s.loss(model(x[kept]), y[kept]).sum() if len(kept) else 0 * model(x).sum()
            (total / len(batch)).backward()
            optimizer.step()
        agree("a left-out output", found.outputs[i], model(x[i : i + 1])[0], 1e-6)
    return "operators and left-out outputs"
