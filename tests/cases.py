"""Named settings, memory layouts and optimizers that tests run over."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from poprisk.optim import gate
from poprisk.optim.update import CHUNK
from samplers import parameter

MASKS = ("hard", "soft", "snr")
MODES = ("auto", "paper")
REDUCTIONS = (None, "per_tensor")
VARIANCES = ("ema", "second-moment")
PATHS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

ALPHAS: dict[str, dict[str, Any]] = {
    "auto stream": {"alpha": "auto"},
    "auto finite": {"alpha": "auto", "batch_size": 5, "dataset_size": 50},
    "fresh": {"alpha": "fresh"},
    "finite": {"alpha": "finite", "batch_size": 5, "dataset_size": 50},
    "number": {"alpha": 0.3},
}

ALWAYS_OPEN: dict[str, dict[str, Any]] = {
    "gate off": {"gate": False},
    "floor at one": {"q_min": 1.0},
    "threshold at zero": {"mask": "hard", "alpha": 0.0},
}


def evaluate(mask: str, mean_sq: Any, var: Any, **settings: float) -> Any:
    """The public mask function of that name; hard takes fewer settings."""
    if mask == "hard":
        settings = {k: v for k, v in settings.items() if k in ("alpha", "var_scale")}
    return getattr(gate, mask)(mean_sq, var, **settings)


def settings(**changes: Any) -> dict[str, Any]:
    """Every setting that PopRiskAdamW shares with the reference, some of them changed."""
    return {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "rho": 0.95,
        "mask": "soft",
        "alpha": "auto",
        "z": 1.5,
        "softness": 0.1,
        "batch_size": None,
        "dataset_size": None,
        "mode": "auto",
        "variance": "ema",
        "reduction": None,
        "q_min": 0.0,
        "maximize": False,
        "gate": True,
        **changes,
    }


def _channels_last() -> Parameter:
    w = parameter(2, 3, 4, 5, dtype=torch.float32).detach()
    return Parameter(w.contiguous(memory_format=torch.channels_last))


LAYOUTS: dict[str, Callable[[], Parameter]] = {
    "matrix": lambda: parameter(7, 5, dtype=torch.float32),
    "float64": lambda: parameter(7, 5),
    "large": lambda: parameter(CHUNK + 3, dtype=torch.float32),
    "large matrix": lambda: parameter(3, CHUNK - 5, dtype=torch.float32),
    "large transposed": lambda: Parameter(parameter(2, CHUNK, dtype=torch.float32).detach().t()),
    "transposed": lambda: Parameter(parameter(5, 7, dtype=torch.float32).detach().t()),
    "channels last": _channels_last,
    "scalar": lambda: parameter(dtype=torch.float32),
    "empty": lambda: parameter(0, 3, dtype=torch.float32),
    "complex64": lambda: parameter(6, dtype=torch.complex64),
    "complex128": lambda: parameter(6, dtype=torch.complex128),
    "bfloat16": lambda: parameter(9, dtype=torch.bfloat16),
    "float16": lambda: parameter(9, dtype=torch.float16),
}

Build = Callable[[Sequence[Parameter]], Optimizer]

WRAPPED: dict[str, Build] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "SGD Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "Adam AMSGrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
}

DECOUPLED: dict[str, Build] = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
    "NAdam": lambda ps: torch.optim.NAdam(
        ps, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True
    ),
    "RAdam": lambda ps: torch.optim.RAdam(
        ps, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True
    ),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.1, weight_decay=0.5),
}

if hasattr(torch.optim, "Muon"):
    WRAPPED["Muon"] = lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.0)
    DECOUPLED["Muon"] = lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.5)
