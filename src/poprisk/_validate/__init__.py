"""Input validation: every message that refuses an argument is written here.

A message names the argument, says what was found and what to do instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {options}, but got {value!r}.")


def check_betas(betas: Any) -> tuple[float, float]:
    """Return ``betas`` as two floats in [0, 1)."""
    if not isinstance(betas, (tuple, list, np.ndarray)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair such as (0.9, 0.999), but got {betas!r}.")
    beta1 = check_number("betas[0]", betas[0], low=0.0, high=1.0, include_high=False)
    beta2 = check_number("betas[1]", betas[1], low=0.0, high=1.0, include_high=False)
    return beta1, beta2


def check_batch(batch_size: Any, dataset_size: Any) -> None:
    """Check an effective batch size against the number of training examples.

    Raises:
        TypeError: if one of them is given and is not an integer.
        ValueError: if one is not positive, the batch is missing although the data set is finite,
            or the batch is not smaller than the data set.
    """
    batch_size, dataset_size = plain(batch_size), plain(dataset_size)
    for name, value in (("batch_size", batch_size), ("dataset_size", dataset_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{name} must be an integer or None, but got {value!r} ({type(value).__name__})."
            )
        if value <= 0:
            raise ValueError(f"{name} must be positive, but got {value}.")
    if dataset_size is None:
        return
    if batch_size is None:
        raise ValueError(
            f"dataset_size={dataset_size} was given without batch_size; pass the number of "
            "examples behind one step (batch × accumulation steps × processes)."
        )
    if batch_size >= dataset_size:
        raise ValueError(
            f"batch_size={batch_size} must be smaller than dataset_size={dataset_size}: a "
            "full batch has no sampling noise to estimate. Pass dataset_size=None to ignore the "
            "finite size, or give alpha as a number."
        )


def check_gradients(grads: Iterable[Tensor]) -> None:
    """Raise RuntimeError if a gradient is sparse."""
    for grad in grads:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                "the gate does not support sparse gradients: the variance estimate needs every "
                "coordinate. Build the embedding with sparse=False."
            )


def check_state_shapes(
    index: int,
    param: Tensor,
    state: Mapping[str, Any],
    keys: Iterable[str],
    *,
    flat: bool = False,
) -> None:
    """Raise ValueError if a loaded per-parameter state does not fit its parameter.

    With ``flat`` it may be flattened, as some optimizers keep it.
    """
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor) and not _fits(value, param, flat=flat):
            raise ValueError(
                f"state_dict does not fit this optimizer: state {key!r} of parameter {index} has "
                f"shape {tuple(value.shape)}, but the parameter has shape {tuple(param.shape)}. "
                "Load the checkpoint of the same model, with the parameters in the same order."
            )


def _fits(value: Tensor, param: Tensor, *, flat: bool) -> bool:
    if flat and value.dim() == 1 != param.dim():
        return value.numel() == param.numel()
    return tuple(value.shape) == tuple(param.shape)


def check_alpha(alpha: Any, names: Collection[str], dataset_size: int | None) -> None:
    """Raise unless ``alpha`` is a number ≥ 0 or one of ``names`` that can be resolved."""
    if not isinstance(alpha, str):
        check_number("alpha", alpha, low=0.0)
        return
    check_choice("alpha", alpha, names)
    if alpha == "finite" and dataset_size is None:
        raise ValueError('alpha="finite" is b/(n-b) and needs batch_size and dataset_size.')


def check_second_moment(variance: str, beta1: float) -> None:
    """Raise ValueError where the second-moment estimator is blind."""
    if variance == "second-moment" and beta1 == 0:
        raise ValueError(
            'variance="second-moment" is v̂ - m̂² and needs betas[0] > 0, but got 0; use '
            'variance="ema".'
        )


def check_fused(*, fused: bool | None, foreach: bool | None, mask: Any, capturable: bool) -> None:
    """Raise where ``fused=True`` contradicts another setting."""
    if fused and foreach:
        raise ValueError("fused=True and foreach=True were both given; choose one of them.")
    if fused and capturable:
        raise ValueError(
            "fused=True and capturable=True were both given: the native kernel cannot be captured; "
            "choose one of them (torch.compile fuses a captured step)."
        )
    if fused and callable(mask):
        raise TypeError(
            "fused=True needs a mask by name, but got a function, which the native kernel cannot "
            "call; use foreach=True."
        )


def check_observed(observed: bool) -> None:
    """Raise RuntimeError if a step has no word from the other processes."""
    if not observed:
        raise RuntimeError(
            'variance="data-parallel" has no observation of a gradient of this step: call '
            "poprisk.observe_ranks(ddp_model, optimizer) once before training, on at least two "
            "processes, and reduce the gradients with DistributedDataParallel."
        )


def check_captured_variance(variance: str, *, capturable: bool) -> None:
    """Raise ValueError where the variance comes from outside of a captured step."""
    if capturable and variance not in ("ema", "second-moment"):
        raise ValueError(
            f"variance={variance!r} cannot be captured: it is told to the optimizer outside of "
            'the step; use capturable=False or variance="ema".'
        )


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer above zero."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but got {value!r} ({type(value).__name__}).")
    if value <= 0:
        raise ValueError(f"{name} must be positive, but got {value}.")


def check_task_batch(batch_size: Any, examples: int) -> None:
    """Raise unless ``batch_size`` is a positive integer below the number of training examples."""
    check_positive("batch_size", batch_size)
    if batch_size >= examples:
        raise ValueError(
            f"batch_size={batch_size} must be smaller than the number of training examples, "
            f"{examples}: the gate measures noise from batch to batch."
        )


def check_one_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless outputs and targets have the same shape."""
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name} needs outputs and targets of one shape, but got {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}."
        )


def check_class_scores(outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless outputs are (n, classes, ...) and targets (n, ...)."""
    if outputs.ndim < 2 or outputs[:, 0].shape != targets.shape:
        raise ValueError(
            f"accuracy needs outputs of shape (n, classes) and targets of shape (n,), but got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}; give another metric=Metric(...)."
        )


def check_rows(name: str, rows: list[Any]) -> None:
    """Raise TypeError unless every row of a data set is an (input, target) pair."""
    for i, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or len(row) != 2:
            raise TypeError(
                f"{name}[{i}] must be a pair (input, target), but got {type(row).__name__}."
            )


def check_tensors(name: str, pair: Any) -> None:
    """Raise unless ``pair`` holds inputs and targets: tensors of one positive length."""
    for part, value in zip(("inputs", "targets"), pair, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} {part} must be a tensor, but got {type(value).__name__}.")
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


def check_state_dict(state_dict: Any, moments: Collection[str]) -> None:
    """Raise unless ``state_dict`` is the state of an optimizer of Adam's kind.

    Entries of the state that belong to no parameter of a group are left to whoever put them there.
    """
    check_state_keys(state_dict, ("state", "param_groups"), "an")
    for group in state_dict["param_groups"]:
        if "params" not in group or "betas" not in group:
            raise ValueError(
                "state_dict does not come from AdamW or PopRiskAdamW: a group of it has no "
                "'params' or no 'betas'."
            )
        for index in group["params"]:
            state = check_is_state(index, state_dict["state"].get(index, {}))
            if state and not all(isinstance(state.get(key), Tensor) for key in moments):
                raise ValueError(
                    f"state_dict does not come from AdamW or PopRiskAdamW: its state of parameter "
                    f"{index} lacks a tensor {' or '.join(moments)}."
                )


def check_is_state(index: Any, state: Any) -> Mapping[str, Any]:
    """Return the state of a parameter; raise ValueError if it is no mapping."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state_dict is damaged: its state of parameter {index} is a {type(state).__name__}, "
            "not a dict."
        )
    return state


def check_state_complete(index: Any, state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ValueError if the state of a parameter lacks what the optimizer keeps for it."""
    missing = sorted(set(keys) - set(state))
    if state and missing:
        raise ValueError(
            f"state_dict does not come from an optimizer of this kind: its state of parameter "
            f"{index} has {sorted(state)}, but not {missing}."
        )


def check_group_sizes(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless saved groups hold as many parameters as the optimizer's."""
    if any("params" not in group for group in saved):
        raise ValueError("state_dict is damaged: a group of it has no 'params'.")
    sizes, mine = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes != mine:
        raise ValueError(
            f"state_dict does not fit this optimizer: its groups hold {sizes} parameters, the "
            f"optimizer's {mine}. Load it into an optimizer with the groups that it was saved "
            "from, and add groups after that."
        )


def check_hyperparameters(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved group lacks a number that optimizers of this kind have."""
    numbers = {k for k, v in defaults.items() if type(v) in (int, float, tuple)}
    if missing := sorted(numbers - set(saved)):
        raise ValueError(
            "state_dict does not come from an optimizer of this kind: a group of it lacks "
            f"{missing}."
        )


def check_state_keys(state_dict: Any, keys: Collection[str], kind: str) -> None:
    """Raise unless ``state_dict`` is a mapping with ``keys``; ``kind`` is the article."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, but got {type(state_dict).__name__}.")
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: it is not {kind} optimizer's state.")
