"""Refusals that many arguments share; a message names the argument, the value and the way out."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LONGEST = 300
"""Characters of an error's text that another message quotes."""


class NotAnalysable(ValueError):
    """A run that the theory cannot be put on as it is; the message says what would work."""


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text, if it has any."""
    name = type(error).__name__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {said[:LONGEST]}" if said else name


def plain(value: Any) -> Any:
    """The Python value of a numpy scalar or of a tensor of one element; anything else itself."""
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return value.item() if size == 1 else value
    return value.item() if isinstance(value, np.generic) else value


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    include_low: bool = True,
    include_high: bool = True,
) -> float:
    """Return ``value`` as a float within the given bounds.

    Raises:
        TypeError: if ``value`` is not a real number (numpy's and a tensor of one element are).
        ValueError: if it is NaN or outside the bounds; infinity lies outside of every bound.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but got {value!r} ({type(value).__name__}).")
    include_low, include_high = include_low and low > -math.inf, include_high and high < math.inf
    above = value >= low if include_low else value > low
    below = value <= high if include_high else value < high
    if not (above and below):
        left = "[" if include_low else "("
        right = "]" if include_high else ")"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, but got {value}.")
    return float(value)


def check_range(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer in [low, high]."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but got {value!r} ({type(value).__name__}).")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if low != 1 else "positive"
        bounds = bounds if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, but got {value}.")


def check_positive(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer above zero."""
    check_range(name, value, 1)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {options}, but got {value!r}.")


def check_type(name: str, value: Any, kind: type, what: str) -> None:
    """Raise TypeError unless ``value`` is of a kind, in words ``what``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, but got {type(value).__name__}.")


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, but got {value!r}.")


def check_tensors(name: str, pair: Any) -> None:
    """Raise unless ``pair`` holds inputs and targets: tensors of one positive length."""
    for part, value in zip(("inputs", "targets"), pair, strict=True):
        check_type(f"{name} {part}", value, Tensor, "a tensor")
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(
                f"{name} {part} must not be empty, but got shape {tuple(value.shape)}."
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} {part} hold NaN or Inf; remove or impute those rows first.")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(
            f"{name} has {len(pair[0])} inputs but {len(pair[1])} targets; they must match."
        )


def check_losses(losses: Any, examples: int | None = None, *, hint: str = "") -> Tensor:
    """Return ``losses`` if they are one value per example, (examples,); None: of any number.

    Raises:
        ValueError: if not; a loss that is already a mean is the usual case.
    """
    good = isinstance(losses, Tensor) and losses.ndim == 1
    if not good or (examples is not None and len(losses) != examples):
        expected = "(b,)" if examples is None else f"({examples},) for {examples} examples"
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss must give one value per example, shape {expected}, but gave {found}; pass "
            f"reduction='none' and average over all dimensions but the first.{hint}"
        )
    return losses


def shapes_hint(outputs: Any, targets: Any) -> str:
    """A hint where outputs and targets have one number of entries in two shapes."""
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if not both or outputs.numel() != targets.numel() or outputs.shape == targets.shape:
        return ""
    return (
        f" Outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}: torch compares "
        "all with all then; bring them to one shape, as in y.unsqueeze(1)."
    )


def check_separate(loss: Any, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Raise ValueError if an example's loss depends on the others of its batch.

    Args:
        loss: from outputs (b, ...) and targets (b, ...) to ``losses``; it is evaluated once more,
            on either half of them.
        outputs: of the batch.
        targets: of the batch.
        losses: per example, (b,).
    """
    half = len(losses) // 2
    if half == 0:
        return
    parts = (loss(outputs[rows], targets[rows]) for rows in (slice(half), slice(half, None)))
    alone, found = torch.cat([part.detach() for part in parts]), losses.detach()
    rtol = max(1e-3, 8 * torch.finfo(found.dtype).eps)
    atol = 1e-5 * float(found.nan_to_num(0.0, 0.0, 0.0).abs().max())  # what rounding can do
    if not alone.allclose(found, rtol=rtol, atol=atol, equal_nan=True):
        raise ValueError(
            "loss gives one value per example, but that of an example changes with the others of "
            "its batch (a mean spread over all, a normalization?); pass reduction='none', and take "
            f"the mean over examples yourself.{shapes_hint(outputs, targets)}"
        )


def check_no_batch_statistics(model: nn.Module) -> None:
    """Raise ValueError if a batch normalization would mix examples."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) normalizes by the statistics of "
                "the batch, so that there are no per-example gradients; call model.eval(), or use "
                "GroupNorm or LayerNorm."
            )
