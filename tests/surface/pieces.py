"""Per-example gradients, kernel, monitor, canaries and the gate, each against naive loops."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import poprisk
from reference import factors
from reference import monitor as signals
from reference.optimizer import ReferenceOptimizer
from surface import losses, models
from surface.outcomes import Moved, Wrong, agree, same, untouched
from surface.situations import Situation, inner, own_name, without_hooks


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {own_name(k): p for k, p in model.named_parameters() if p.requires_grad}


def gradients_of_losses(s: Situation, model: nn.Module) -> dict[str, Tensor]:
    """Rows (b, P) by parameter: one backward pass an example, in float64."""
    x, y = s.data("float64")
    parts = [s.loss(model(x[i : i + 1]), y[i : i + 1]) for i in range(s.n)]
    rows = [factors.jacobian(part, parameters(model)) for part in parts]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def paired(found: Tensor) -> Tensor:
    return found.detach().double().flatten()


def grad_mean_var(s: Situation) -> str:
    """The variance over examples against its definition."""
    model, (x, y) = s.model(), s.data()
    chunk = s.case.choice([None, None, 2, 5])
    with s.under(), untouched(model, draws=s.random):
        found = poprisk.grad_mean_var(model, s.loss, (x, y), chunk=chunk)
    if any(v.requires_grad for v in found.values()):
        raise Wrong("the variance has a graph")
    if not losses.LOSSES[s.sort].separate and s.n > 1:
        raise Wrong(f"a variance for a loss that is {s.sort}")
    if s.random:
        return "not compared: random"
    if s.kind == "examples see each other" and s.tolerance > 0.01:
        return "not compared: the others count for less than rounding can do"
    rows = gradients_of_losses(s, s.bare("float64"))
    if {own_name(k) for k in found} != rows.keys():
        raise Wrong(f"variances of {sorted(found)}, not of {sorted(rows)}")
    for name, expected in factors.variance_of_mean(rows).items():
        mine = next(v for k, v in found.items() if own_name(k) == name)
        mine = torch.view_as_real(mine) if mine.is_complex() else mine
        scale = rows[name].square().mean(0).max() / s.n
        agree(f"the variance of {name}", paired(mine), expected, s.tolerance, scale)
    return "variances"


def entk(s: Situation) -> str:
    """The kernel against J Jᵀ."""
    model, (x, _) = s.model(), s.data()
    which = s.case.choice(["all", "all", "sum", "trace"])
    cross = s.case.random() < 0.3
    with s.under(), untouched(model):
        kernel = poprisk.entk(model, x, x[: max(1, s.n // 2)] if cross else None, outputs=which)
        dense = kernel.dense()
        vector = torch.randn(kernel.shape[1], dtype=torch.float64, generator=generator(s))
        product = kernel @ vector.to(dense.dtype)
        diagonal = None if cross else kernel.diagonal()
        figures = None if cross or not bool(dense.any()) else kernel.spectrum(1, probes=16, steps=2)
    reference = without_hooks(s.bare("float64"))
    x, params = s.data("float64")[0], parameters(reference)
    rows = [factors.jacobian(reference(x[i : i + 1]).flatten(), params) for i in range(s.n)]
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    full = factors.gram(joined, joined)
    if which != "all":
        blocks = full.reshape(s.n, s.c, s.n, s.c)
        full = blocks.sum((1, 3)) if which == "sum" else blocks.diagonal(dim1=1, dim2=3).sum(-1)
    expected = full[:, : dense.shape[1]]
    scale = full.abs().max()
    agree("the kernel", dense, expected, s.tolerance, scale)
    if diagonal is not None:
        agree("the diagonal", diagonal, full.diagonal(), s.tolerance, scale)
    if figures is not None:
        first, trace, error = figures.eigenpairs.values[0], figures.trace, s.tolerance * 4
        agree("the largest eigenvalue", first, torch.linalg.eigvalsh(full)[-1], error)
        whole = full.trace()
        agree("the trace", trace.value, whole, error, whole + 6 * trace.standard_error / error)
    agree("the product", product, expected @ vector, s.tolerance * 4, scale * vector.norm())
    return "kernel"


def generator(s: Situation) -> torch.Generator:
    return torch.Generator().manual_seed(s.seed + 2)


def trained(
    s: Situation, model: nn.Module, watch: Callable[[Tensor, Tensor], Any] | None = None
) -> dict[str, Any]:
    """Weights, buffers and attributes after three steps on all examples."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    x, y = s.data()
    torch.manual_seed(s.seed)
    for _ in range(3):
        optimizer.zero_grad()
        s.loss(model(x), y).mean().backward()
        if watch is not None:
            with s.under():
                watch(x, y)
        optimizer.step()
    found = {**inner(model).state_dict(), "random numbers": torch.get_rng_state()}
    calls = {k: m.calls for k, m in inner(model).named_modules() if isinstance(m, models.Running)}
    return {**found, "calls": calls}


def risk_monitor(s: Situation) -> str:
    """A watched run ends as an unwatched one, and its numbers are those of the definitions."""
    model = s.model()
    alone: dict[str, Any] | None = None
    # Of a model that cannot be trained the monitor must not be what says so.
    with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        alone = trained(s, s.model())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    monitor = poprisk.RiskMonitor(model, s.loss, optimizer, every=2)
    if alone is None:
        x, y = s.data()
        with s.under(), untouched(model):
            monitor.step(x, y)
        return (
            "flag: NaN" if math.isnan(monitor.rows[0][1]["loss"]) else "not compared: untrainable"
        )
    watched = trained(s, model, monitor.step)
    for key in alone:
        if not same(alone[key], watched[key]):
            raise Moved(f"{key} differs between a watched run and an unwatched one")
    row = monitor.rows[0][1]
    if any(math.isnan(v) for v in row.values()):
        return "flag: NaN"
    if not losses.LOSSES[s.sort].separate and s.n > 1:
        raise Wrong(f"numbers for a loss that is {s.sort}")
    if s.kind == "examples see each other":
        return "not compared: the loss of an example is one of its batch"
    reference = s.bare("float64")
    x, y = s.data("float64")
    reference(x)  # the training step's own pass, which running statistics have seen
    reference.eval()
    values = torch.cat([s.loss(reference(x[i : i + 1]), y[i : i + 1]) for i in range(s.n)])
    kept = y != -100 if s.sort == "ignored labels" else torch.ones(s.n, dtype=torch.bool)
    value = values[kept].mean()
    agree("the mean loss", row["loss"], value, s.tolerance, value.abs() + 1)
    rows = torch.cat(list(gradients_of_losses(s, without_hooks(reference)).values()), dim=1)[kept]
    if not bool(rows.var(0).sum() > 0):
        return "loss"
    expected = signals.signal(rows)
    floor = 1 / max(s.tolerance, 1e-9)
    if expected["snr"] < floor:
        agree("the signal-to-noise ratio", row["signal/snr"], expected["snr"], 4 * s.tolerance)
    return "loss and signal"


def canaries(s: Situation) -> str:
    """Planted labels are where they should be, of the targets' kind, and memorization adds up."""
    dtype = s.case.choice(["float32", "float64", "bfloat16", "int64", "uint8", "bool", "int8"])
    n, k = s.case.choice([0, 1, 2, 60, 101]), s.case.choice([1, 2, 5])
    shape = s.case.choice([(n,), (n, 1), (n, 3)])
    y = torch.randint(k, shape, generator=generator(s))
    y = torch.randn(shape, generator=generator(s)) if "float" in dtype else y
    y = y.to(getattr(torch, dtype))
    kept = y.clone()
    planted = poprisk.Canaries(y, fraction=s.case.choice([0.02, 0.2, 0.9]), seed=s.seed)
    if not same(y, kept) or planted.targets.dtype != y.dtype or planted.targets.shape != y.shape:
        raise Moved("the targets have changed, or the planted ones are of another kind")
    where = torch.zeros(n, dtype=torch.bool)
    where[planted.index] = True
    if not same(planted.targets[~where], y[~where]):
        raise Wrong("a label that is no canary was replaced")
    if not y.is_floating_point():
        return canaries_of_classes(s, planted, n)
    outputs = planted.targets.clone()
    found = planted.memorization(outputs)
    agree("memorization of the planted numbers", found.value, 1.0, s.tolerance + TOLERANCE[dtype])
    found = planted.memorization(y)
    agree("memorization of the original numbers", found.value, 0.0, TOLERANCE[dtype], 1.0)
    return "canaries of numbers"


TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}


def canaries_of_classes(s: Situation, planted: poprisk.Canaries, n: int) -> str:
    k = planted.classes or 0
    logits = torch.randn(n, k, generator=generator(s), dtype=torch.float64)
    found = planted.memorization(logits)
    p, values = logits.softmax(1), list[float]()
    for i, old in zip(planted.index.tolist(), planted.original.tolist(), strict=True):
        new = int(planted.targets[i])
        if k == 2:
            values.append(2 * float(p[i, new]) - 1)
        elif new != old:
            others = [float(p[i, j]) for j in range(k) if j not in (new, int(old))]
            values.append(float(p[i, new]) - sum(others) / len(others))
    if values:
        agree("memorization", found.value, sum(values) / len(values), 1e-9, 1.0)
    return "canaries of classes"


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
}


def gated(s: Situation) -> str:
    """Each step is the wrapped optimizer's, times the mask by its definition."""
    name = s.case.choice(list(OPTIMIZERS))
    settings: dict[str, Any] = {
        "z": s.case.choice([0.0, 1.0, 1.5]),
        "q_min": s.case.choice([0.0, 0.3, 1.0]),
    }
    settings |= {"softness": s.case.choice([0.1, 1.0]), "mask": s.case.choice(["soft", "snr"])}
    start = torch.randn(s.n, s.c, generator=generator(s)).to(getattr(torch, s.dtype))
    w, alone = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = poprisk.gated(OPTIMIZERS[name]([w]), **settings)
    plain = OPTIMIZERS[name]([alone])
    masks = ReferenceOptimizer(
        start, **settings, betas=(0.9, 0.0), rho=0.99, alpha="auto", mode="auto", variance="ema",
        batch_size=None, dataset_size=None, reduction=None, gate=True, maximize=False, eps=0.0,
    )  # fmt: skip
    noise = generator(s)
    for _ in range(5):
        g = (0.5 + torch.randn(start.shape, generator=noise)).to(start.dtype)
        before = w.detach().clone()
        w.grad, alone.grad = g.clone(), g.clone()
        alone.data.copy_(before)
        plain.step()
        optimizer.step()
        entries = g.double().flatten().tolist()
        masks._deviate(entries)
        masks.grads.append(entries)
        q = torch.tensor(masks._masks(masks._average(0.9, 1), masks._average(0.9, 2)))
        update = (alone - before).detach().double() * q.reshape(start.shape).double()
        agree(f"a step of {name}", w, before.double() + update, 1e-5 + TOLERANCES[s.dtype], 1.0)
    return "gated steps"


TOLERANCES = {"float64": 0.0, "float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
