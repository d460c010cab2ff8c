"""What the monitor asks of its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


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
