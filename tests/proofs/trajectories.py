"""Trajectories of the optimizers on a small problem, 200 steps each, bit for bit.

Only the public names of poprisk are used, so that older and newer code runs the same cases.

The gradients pull towards a target through uniform noise. Uniform numbers are whole numbers over a
power of two and the same on every machine; normal ones are not.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from poprisk import PopRiskAdamW, gated

STEPS = 200
SHOWN = (1, 10, 50, 200)
"""Steps at which weights and state are projected."""

RTOL = 1e-9
"""Relative difference of projections that another machine may make."""

SHAPES = ((3,), (4, 5), (), (37,), (5, 4))
TRANSPOSED = 4
EXACT_SIZES, MICROBATCHES = (4, 4), (3, 3, 2)
FLOATS = (torch.float64, torch.float32)

Build = Callable[[list[Parameter]], Any]
Event = Callable[[int, Any, list[Parameter]], Any]
"""Before a step, counted from 1: may change gradients and settings; returns the optimizer."""


def uniform(*shape: int, seed: int) -> Tensor:
    """Uniform in [-1, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


def nothing(step: int, optimizer: Any, params: list[Parameter]) -> Any:
    return optimizer


class Case(NamedTuple):
    """A trajectory.

    Attributes:
        build: makes the optimizer of the parameters.
        event: before each step.
        within: ``"exact"`` or ``"microbatch"`` for a linear model's gradients in place of the
            given ones.
        dtypes: of the parameters.
    """

    build: Build
    event: Event = nothing
    within: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS


# --- the cases ------------------------------------------------------------------------------------


def ours(**changes: Any) -> Build:
    """PopRiskAdamW with settings that leave masks neither all 0 nor all 1."""
    settings: dict[str, Any] = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "weight_decay": 0.1,
        "rho": 0.95,
        **changes,
    }
    return lambda params: PopRiskAdamW(params, **settings)


def wrapped(kind: type[Optimizer], gate: dict[str, Any], **settings: Any) -> Build:
    return lambda params: gated(kind(params, **settings), **gate)


def half_open(mean_sq: Any, var: Any, *, var_scale: float = 1.0, **_: Any) -> Any:
    """A mask given as a function, of a tensor or of a list of them."""
    if isinstance(mean_sq, Tensor):
        return mean_sq / (mean_sq + var_scale * var + 1e-30)
    return [half_open(m, s, var_scale=var_scale) for m, s in zip(mean_sq, var, strict=True)]


def missing(step: int, optimizer: Any, params: list[Parameter]) -> Any:
    """Gradients that come late, and not at every step."""
    for j, p in enumerate(params):
        if step <= j or step % (7 + j) == 0:
            p.grad = None
    return optimizer


def not_finite(step: int, optimizer: Any, params: list[Parameter]) -> Any:
    """Two steps that are skipped."""
    if step in (3, 77) and params[0].grad is not None:
        params[0].grad[-1] = float("nan")
    return optimizer


def decayed(step: int, optimizer: Any, params: list[Parameter]) -> Any:
    """A schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.98
    return optimizer


def reloaded(build: Build, at: int = 60) -> Event:
    """Saved and loaded into a new optimizer before one step."""

    def event(step: int, optimizer: Any, params: list[Parameter]) -> Any:
        if step != at:
            return optimizer
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        fresh = build(params)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        return fresh

    return event


def adamw(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def groups(params: list[Parameter]) -> Any:
    """Every parameter in a group of its own."""
    changes: list[dict[str, Any]] = [
        {"mask": "hard", "lr": 0.05, "alpha": 0.3},
        {"mask": "snr", "mode": "paper", "betas": (0.5, 0.9), "weight_decay": 0.0},
        {"gate": False},
        {"variance": "second-moment", "reduction": "per_tensor", "maximize": True, "lr": 1e-3},
        {"q_min": 0.4, "batch_size": 5, "dataset_size": 50, "rho": 0.5},
    ]
    return PopRiskAdamW([{"params": [p], **c} for p, c in zip(params, changes, strict=True)])


FINITE = {"batch_size": 5, "dataset_size": 50}
# at 1, hard masks of Algorithm 1 compare what is equal but for rounding at the first step
HARD_PAPER = {"mask": "hard", "mode": "paper", "alpha": 0.3}

CHANGES: dict[str, dict[str, Any]] = {
    "alpha fresh": {"alpha": "fresh"},
    "alpha finite": {"alpha": "finite", **FINITE},
    "alpha auto, finite": FINITE,
    "alpha a number": {"alpha": 0.3, "mask": "snr"},
    "paper, finite": {"mode": "paper", "mask": "snr", **FINITE},
    "z": {"z": 0.5},
    "softness": {"softness": 2.0},
    "softness 0": {"softness": 0.0},
    "q_min": {"q_min": 0.2},
    "maximize": {"maximize": True, "lr": 1e-3},
    "no momentum": {"betas": (0.0, 0.9), "mask": "hard"},
    "no decay": {"weight_decay": 0.0, "rho": 0.0},
    "strong decay": {"weight_decay": 1.0},
    "eps": {"eps": 1e-2},
    "no gate": {"gate": False},
    "a function as mask": {"mask": half_open},
    "lr a tensor": {"lr": torch.tensor(0.01, dtype=torch.float64)},
    "defaults": {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01, "rho": 0.99},
}
PATHS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "fused": {"fused": True},
    "captured": {"capturable": True},
}
FOREACH: dict[str, Any] = {}
ON_PATHS: dict[str, dict[str, Any]] = {
    "soft": {},
    "hard, second-moment, per_tensor": {
        "mask": "hard",
        "variance": "second-moment",
        "reduction": "per_tensor",
    },
    "paper, snr": {"mask": "snr", "mode": "paper"},
}
OTHERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD, momentum, decay": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.005}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam, AMSGrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "NAdam, decay": (
        torch.optim.NAdam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
}
GATES: dict[str, dict[str, Any]] = {
    "hard": {"mask": "hard"},
    "snr, finite": {"mask": "snr", **FINITE},
    "per_tensor": {"reduction": "per_tensor"},
    "open": {"q_min": 1.0},
    "alpha a number": {"alpha": 0.3, "z": 0.5, "softness": 1.0, "beta1": 0.5, "rho": 0.9},
}


def grid() -> dict[str, Case]:
    """Mask, mode, variance and reduction, all with all."""
    cases: dict[str, Case] = {}
    for mask in ("soft", "hard", "snr"):
        for mode in ("auto", "paper"):
            for variance in ("ema", "second-moment"):
                for reduction in (None, "per_tensor"):
                    changes = {"mask": mask, "mode": mode} if mode == "auto" else {**HARD_PAPER}
                    changes |= {"mask": mask, "variance": variance, "reduction": reduction}
                    name = ", ".join([mask, mode, variance, reduction or "per coordinate"])
                    cases[name] = Case(ours(**changes), dtypes=FLOATS[: 1 + (reduction is None)])
    return cases


def all_cases() -> dict[str, Case]:
    cases = grid()
    cases |= {name: Case(ours(**changes), dtypes=FLOATS[:1]) for name, changes in CHANGES.items()}
    for path, how in PATHS.items():
        dtypes = FLOATS[:1] if path == "captured" else FLOATS
        for name, changes in ON_PATHS.items():
            cases[f"{path}: {name}"] = Case(ours(**changes, **how), dtypes=dtypes)
    cases["captured: not finite"] = Case(ours(capturable=True), not_finite, dtypes=FLOATS[:1])
    for path, how in (("foreach", FOREACH), ("fused", PATHS["fused"])):
        build = ours(**how)
        cases[f"{path}: gradients missing"] = Case(build, missing)
        cases[f"{path}: not finite"] = Case(build, not_finite)
        cases[f"{path}: schedule"] = Case(build, decayed)
        cases[f"{path}: reloaded"] = Case(build, reloaded(build))
    cases["after AdamW"] = Case(adamw, reloaded(ours()))
    cases["groups"] = Case(groups)
    cases["complex"] = Case(ours(), dtypes=(torch.complex64, torch.complex128))
    cases["low precision"] = Case(ours(), dtypes=(torch.bfloat16, torch.float16))
    for within in ("exact", "microbatch"):
        build = ours(variance=within)
        cases[within] = Case(build, within=within)
        cases[f"{within}, snr"] = Case(ours(variance=within, mask="snr", alpha=0.3), within=within)
    for name, (kind, settings) in OTHERS.items():
        cases[f"gated {name}"] = Case(wrapped(kind, {}, **settings), dtypes=FLOATS[:1])
    for name, gate in GATES.items():
        build = wrapped(torch.optim.AdamW, gate, lr=0.01)
        cases[f"gated AdamW: {name}"] = Case(build, dtypes=FLOATS[:1])
    build = wrapped(torch.optim.AdamW, {}, lr=0.01, weight_decay=0.1)
    cases["gated AdamW: gradients missing"] = Case(build, missing)
    cases["gated AdamW: not finite"] = Case(build, not_finite)
    cases["gated AdamW: schedule"] = Case(build, decayed)
    cases["gated AdamW: reloaded"] = Case(build, reloaded(build))
    return cases


CASES = all_cases()


# --- the problem ----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """The given gradients: ``pull · (w - target) + noise``."""

    starts: list[Tensor]
    targets: list[Tensor]
    pulls: list[Tensor]
    noise: list[list[Tensor]]


@cache
def problem(dtype: torch.dtype, nudge: float = 0.0) -> Problem:
    """The problem in a precision; ``nudge`` is a relative change of the noise."""
    columns = [uniform(STEPS + 3, *shape, seed=j) for j, shape in enumerate(SHAPES)]
    if dtype.is_complex:
        columns = [torch.complex(x, x.flip(0)) for x in columns]
    starts, targets = ([x[i].to(dtype) for x in columns] for i in (0, 1))
    pulls = [(x[2] / 4 + 0.5).to(dtype) for x in columns]
    noise = [[(3 * x[t + 3] * (1 + nudge)).to(dtype) for x in columns] for t in range(STEPS)]
    return Problem(starts, targets, pulls, noise)


def parameters(dtype: torch.dtype) -> list[Parameter]:
    """Copies of the starts, one of them transposed."""
    params = [Parameter(w.clone()) for w in problem(dtype).starts]
    params[TRANSPOSED] = Parameter(params[TRANSPOSED].detach().t().contiguous().t())
    return params


def give_gradients(params: list[Parameter], t: int, nudge: float) -> None:
    given = problem(params[0].dtype, nudge)
    for p, target, pull, noise in zip(
        params, given.targets, given.pulls, given.noise[t], strict=True
    ):
        p.grad = pull * (p.detach() - target) + noise


def backward(model: nn.Module, optimizer: Any, t: int, within: str, nudge: float) -> None:
    """Gradients of the squared error on eight examples, in parts."""
    dtype = next(model.parameters()).dtype
    rows = (uniform(8, 5, seed=1000 + t) * (1 + nudge)).to(dtype)
    optimizer.zero_grad()
    for part in rows.split(EXACT_SIZES if within == "exact" else MICROBATCHES):
        losses = (model(part[:, :3]) - part[:, 3:]).square().sum(1)
        if within == "exact":
            optimizer.backward(losses, weight=len(part) / len(rows))
        else:
            (losses.sum() / len(rows)).backward()
            optimizer.microbatch(len(part))


# --- a trajectory ---------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """What is frozen of one.

    Attributes:
        digest: SHA-256 of the weights' bytes after all steps.
        projections: by step, of the weights and of each entry of the state.
    """

    digest: str
    projections: dict[str, dict[str, float]]


def trajectory(name: str, dtype: torch.dtype, nudge: float = 0.0) -> Trajectory:
    """Run a case."""
    case = CASES[name]
    give, params = partial(give_gradients, nudge=nudge), parameters(dtype)
    model = nn.Linear(3, 2, dtype=dtype)
    if case.within:
        params = list(model.parameters())
        with torch.no_grad():
            for j, p in enumerate(params):
                p.copy_(uniform(*p.shape, seed=j))
    optimizer, shown = case.build(params), dict[str, dict[str, float]]()
    for step in range(1, STEPS + 1):
        if case.within:
            backward(model, optimizer, step, case.within, nudge)
        else:
            give(params, step - 1)
        optimizer = case.event(step, optimizer, params)
        optimizer.step()
        if step in SHOWN:
            shown[str(step)] = projections(params, optimizer)
    return Trajectory(digest(params), shown)


def exact_projections(found: dict[str, Trajectory]) -> dict[str, dict[str, float]]:
    """Those of the trajectory in float64; empty without one."""
    exact = found.get(str(torch.float64))
    return exact.projections if exact is not None else {}


def digest(params: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for p in params:
        found.update(p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def projections(params: Sequence[Tensor], optimizer: Any) -> dict[str, float]:
    """Weights and each entry of the saved state on random directions; empty for complex ones."""
    if params[0].is_complex():
        return {}
    found = {"weights": sum(project(p, j) for j, p in enumerate(params))}
    for j, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, (Tensor, int, float)):
                found[key] = found.get(key, 0.0) + project(torch.as_tensor(value), j)
    return found


def project(x: Tensor, j: int) -> float:
    flat = x.detach().double().flatten()
    return float(flat @ uniform(len(flat), seed=100 + j))


# --- the machine ----------------------------------------------------------------------------------


@cache
def machine() -> dict[str, str]:
    """What the last bits depend on."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "processor": processor(),
        "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
        "compiler": compiler(),
    }


def processor() -> str:
    """Its model, with family and stepping, as Linux tells it; else what Python knows."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    wanted = ("model name", "cpu family", "model", "stepping")
    first = path.read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0].splitlines()
    rows = dict(row.replace("\t", "").split(":", 1) for row in first if ":" in row)
    return ", ".join(f"{key} {rows[key].strip()}" for key in wanted if key in rows)


def compiler() -> str:
    """Of the fused path: the first line it says of itself; empty if there is none."""
    try:
        said = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return ""
    return said.stdout.splitlines()[0]
