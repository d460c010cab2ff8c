"""What the monitor asks of its arguments."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from poprisk._validate import check_positive


def check_sink(sink: Any) -> Any:
    """Return ``sink`` if it can be called, else raise TypeError."""
    if not callable(sink):
        raise TypeError(
            "sinks must hold paths of JSONL files, TensorBoard writers, wandb runs, 'wandb', or "
            f"functions of step and row, but got {sink!r}."
        )
    return sink


def check_quantity(quantity: Any) -> Any:
    """Return ``quantity`` if it has a name and can be measured, else raise TypeError."""
    if not isinstance(getattr(quantity, "name", None), str) or not callable(
        getattr(quantity, "measure", None)
    ):
        raise TypeError(
            "quantities must hold objects of poprisk.monitor such as Signal() or Kernel(x), but "
            f"got {quantity!r}; a function of your own goes in as Measured('name', function)."
        )
    return quantity


def check_unique(names: Iterable[str]) -> None:
    """Raise ValueError if two quantities have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"quantities must have different names, but two are called {name!r}.")
        seen.add(name)


def check_monitored(model: Any, loss: Any) -> None:
    """Raise TypeError unless a module and a loss are given."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}.")
    if not callable(loss):
        raise TypeError(f"loss must be callable, but got {loss!r}.")


def check_gated(optimizer: Any) -> None:
    """Raise TypeError unless the optimizer has a gate."""
    if not hasattr(optimizer, "gate_stats"):
        raise TypeError(
            f"Gates() needs PopRiskAdamW or poprisk.gated(...), but got {type(optimizer).__name__}."
        )


def check_trains(optimizer: Any, model: torch.nn.Module, sharding: str | None) -> None:
    """Raise unless an optimizer trains parameters of a model."""
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        raise TypeError(
            f"optimizer must be a torch optimizer, or around one, but got "
            f"{type(optimizer).__name__}."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model has no trainable parameter: all are frozen (requires_grad=False).")
    own = {id(p) for p in trained}
    # FSDP shows other parameters while weights are whole.
    if sharding is None and not any(id(p) in own for g in groups for p in g["params"]):
        raise ValueError(
            "optimizer trains none of the model's parameters; pass the optimizer of this model, "
            "made after it was moved or wrapped."
        )


def check_state(state_dict: Any) -> int:
    """Return the number of steps in a monitor's state."""
    steps = state_dict.get("steps") if isinstance(state_dict, dict) else None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(
            f"state_dict must be what RiskMonitor.state_dict() returned, but got {state_dict!r}."
        )
    return steps


def check_whole(whole: bool) -> None:
    """Raise RuntimeError if there are no per-example gradients of whole weights."""
    if not whole:
        raise RuntimeError(
            "it needs per-example gradients of whole weights, and FSDP spreads them over "
            "processes; it is left out."
        )


def unwritable(path: Path, error: OSError) -> OSError:
    """The error for a file that cannot be written."""
    return OSError(f"sinks: cannot write to {path}: {error.strerror or error}.")


def check_file(path: Path) -> None:
    """Raise OSError unless a file can be appended to, without making it."""
    if path.is_dir():
        raise OSError(f"sinks: cannot write to {path}: it is a folder; name a file in it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"sinks: cannot write to {path}: no permission.")


def check_settings(loss: Any, every: Any, quantities: Any) -> None:
    """Raise for what a callback can refuse before it sees a model."""
    if not callable(loss):
        raise TypeError(f"loss must be callable, but got {loss!r}.")
    check_positive("every", every)
    check_unique(check_quantity(quantity).name for quantity in quantities or ())
