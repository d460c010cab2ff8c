"""What recording and analysing a run refuses in more than one place, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from poprisk._validate import NotAnalysable


def named(names: Collection[str], most: int = 3) -> str:
    """Some names in a message, the first of many."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def check_memory(needed: float, max_memory: float, what: str, instead: str) -> None:
    """Raise NotAnalysable if something needs more bytes than allowed."""
    if needed > max_memory:
        raise NotAnalysable(
            f"{what} needs {needed / 2**30:.3g} GiB, over max_memory of {max_memory / 2**30:.3g} "
            f"GiB; {instead}"
        )


def check_uncut(problem: Any, what: str, instead: str) -> None:
    """Raise NotAnalysable if gradients are cut inside the model of a :class:`Problem`."""
    if problem.is_cut:
        raise NotAnalysable(
            "the model detaches what its outputs depend on, as layers do that learn by themselves: "
            f"its steps are no gradients of one loss, whose second derivatives {what} takes; "
            f"{instead}"
        )


def check_indices(indices: Any, examples: int) -> None:
    """Raise ValueError unless ``indices`` is a batch of the training set."""
    found = type(indices).__name__
    if isinstance(indices, Tensor):
        found = f"shape {tuple(indices.shape)} of {indices.dtype}"
        integers = not indices.is_floating_point() and indices.dtype != torch.bool
        if indices.ndim == 1 and len(indices) and integers:
            found = ""
    if found:
        raise ValueError(f"a batch must be a 1-d tensor of example indices, but got {found}.")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= examples:
        raise ValueError(
            f"a batch names example {low if low < 0 else high}, but the training set has "
            f"{examples}."
        )


def check_probes(probes: Any, shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``probes`` is (n, c, r)."""
    if not isinstance(probes, Tensor) or probes.ndim != 3 or tuple(probes.shape[:2]) != shape:
        found = tuple(probes.shape) if isinstance(probes, Tensor) else type(probes).__name__
        raise ValueError(
            f"probes must have shape (n, c, r) = ({shape[0]}, {shape[1]}, r): a starting output "
            f"gradient for each of r vectors; but got {found}."
        )
