"""The state of each parameter: made when first needed, counted, and loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk._validate import check_type
from poprisk.dtensor import ShardLayout, layout_of
from poprisk.optim.settings import CompiledGroup, check_optimizer_settings
from poprisk.optim.sizes import TERM_KEYS
from poprisk.optim.update import state_dtype
from poprisk.optim.variance import GivenVariances, Precomputed, VarianceEstimator

ADAM_KEYS = ("exp_avg", "exp_avg_sq")
VARIANCE_KEYS = ("grad_mean_var", *TERM_KEYS)
SIDES = ("left", "right")
FACTORS = tuple(f"{side}_factor" for side in SIDES)
BASES = tuple(f"{side}_basis" for side in SIDES)
"""State of a parameter in another basis (:mod:`poprisk.optim.kronecker`)."""
TENSORS = {*ADAM_KEYS, *VARIANCE_KEYS, *FACTORS, *BASES}
"""What is kept in the precision of the state."""
NOT_LOADED = {
    "foreach",
    "fused",
    "capturable",
    "amsgrad",
    "differentiable",
    "decoupled_weight_decay",
}
"""Settings of a saved group that say how AdamW computed, not what."""


def prepare_state(
    p: Tensor,
    state: dict[str, Any],
    estimator: VarianceEstimator | None,
    *,
    on_device: bool = False,
) -> None:
    """Create the state that the estimator and Adam need and ``state`` lacks.

    Of a parameter that was moved to another precision since, the state follows.
    """
    follow_precision_(p, state)
    if "step" not in state:
        state["step"] = torch.tensor(0.0, device=p.device if on_device else None)
        for key in ADAM_KEYS:
            state[key] = torch.zeros_like(p, dtype=state_dtype(p))
    if on_device:  # a loaded counter is not yet
        state["step"] = state["step"].to(p.device)
    for key in TERM_KEYS:
        if key in state and (estimator is None or key not in estimator.state_keys):
            del state[key]  # it would be old, if terms came back
    if estimator is None:
        if "variance_start" in state:
            state["variance_start"] += 1  # nothing is observed while the gate is off
        return
    if "variance_start" in state and state.keys() >= {*estimator.state_keys}:
        return
    state["variance_start"] = estimator.start(int(state["step"].item()))
    for key in estimator.state_keys:
        state[key] = torch.zeros_like(p, dtype=state_dtype(p))


def forget_variance_(state: dict[str, Any]) -> None:
    """Let the next :func:`prepare_state` begin an average of the variance."""
    for key in ("variance_start", *VARIANCE_KEYS):
        state.pop(key, None)


def count_step(states: list[dict[str, Any]]) -> list[int]:
    """Advance the step counters by one and return them."""
    if not states:
        return []
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    return [int(t) for t in torch.stack(steps).tolist()]


def check_not_resized(groups: list[dict[str, Any]], states: Any) -> None:
    """Raise ValueError if a parameter has got another shape than its state since."""
    for group in groups:
        for p in group["params"]:
            state = states.get(p)
            kept = state.get(ADAM_KEYS[0]) if state else None  # the others are made in its shape
            if kept is not None and kept.shape != p.shape:
                raise ValueError(
                    f"a parameter has shape {tuple(p.shape)}, but its state {tuple(kept.shape)}: "
                    "it was resized since. Give the new parameter to the optimizer "
                    "(add_param_group, or a new optimizer), or clear its state: "
                    "optimizer.state.pop(parameter)."
                )


def check_distinct(params: Iterable[Any]) -> None:
    """Raise ValueError if a group holds a parameter twice, which one step cannot move twice.

    Args:
        params: of a group; pairs of name and parameter where they are named.
    """
    seen = set[int]()
    for i, p in enumerate(params):
        key = id(p[1]) if isinstance(p, tuple) else id(p)
        if key in seen:
            raise ValueError(
                f"params holds the same parameter twice, the second time at position {i}; list "
                "each once (model.parameters() does, also of tied weights)."
            )
        seen.add(key)


def check_dense(grads: Iterable[Tensor]) -> None:
    """Raise RuntimeError if a gradient is sparse."""
    if any(grad.layout is not torch.strided for grad in grads):
        raise RuntimeError(
            "the gate does not support sparse gradients: the variance estimate needs every "
            "coordinate. Build the embedding with sparse=False."
        )


def follow_precision_(p: Tensor, state: dict[str, Any]) -> None:
    """Let the state follow a parameter that was moved to another precision, all of it at once."""
    dtype = state_dtype(p)
    kept = state.get(ADAM_KEYS[0])
    if kept is None or kept.dtype == dtype:
        return
    for key in TENSORS:
        if key in state and state[key].dtype != dtype:
            state[key] = state[key].to(dtype)


def take_variances_(groups: list[CompiledGroup], state: Any, given: GivenVariances) -> None:
    """Put variances that were found elsewhere into the running averages."""
    for settings, estimator, _ in groups:
        if isinstance(estimator, Precomputed):
            weight = 1 - estimator.decay(settings["betas"][0])
            for p in settings["params"]:
                if p in given:
                    s = state[p]["grad_mean_var"]
                    s.lerp_(given[p]().to(s.dtype), weight)


def completed_state(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A shallow copy of ``state_dict`` whose groups have every setting."""
    check_state_keys(state_dict, ("state", "param_groups"), "an")
    saved = state_dict["param_groups"]
    # Entries of the state that belong to no parameter of a group are left to whoever put them there
    for group in saved:
        if "params" not in group or "betas" not in group:
            raise ValueError(
                "state_dict does not come from AdamW or PopRiskAdamW: a group of it has no "
                "'params' or no 'betas'."
            )
        for index in group["params"]:
            state = check_is_state(index, state_dict["state"].get(index, {}))
            if state and not all(isinstance(state.get(key), Tensor) for key in ADAM_KEYS):
                raise ValueError(
                    f"state_dict does not come from AdamW or PopRiskAdamW: its state of parameter "
                    f"{index} lacks a tensor {' or '.join(ADAM_KEYS)}."
                )
    check_group_sizes(saved, groups)
    if any(group.get("amsgrad") for group in saved):
        raise ValueError(
            "state_dict comes from AdamW(amsgrad=True), whose maximum of v̂ PopRiskAdamW does "
            "not have; train on from a checkpoint without amsgrad, or start the state fresh."
        )
    filled = [
        {**mine, **{k: v for k, v in theirs.items() if k not in NOT_LOADED}}
        for mine, theirs in zip(groups, saved, strict=True)
    ]
    for group in filled:
        check_optimizer_settings(group)
    for theirs, mine in zip(saved, groups, strict=True):
        check_same_basis(theirs, mine)
    return {"state": state_dict["state"], "param_groups": filled}


def check_same_basis(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError if a group's averages may be kept in another basis than ours are."""
    if "max_dim" in saved and "max_dim" not in own:
        raise ValueError(
            "state_dict comes from PopRiskSOAP, whose averages are kept in bases of its own; load "
            "it into PopRiskSOAP, or start the state fresh."
        )


def check_state_keys(state_dict: Any, keys: Collection[str], kind: str) -> None:
    """Raise unless ``state_dict`` is a mapping with ``keys``; ``kind`` is the article."""
    check_type("state_dict", state_dict, Mapping, "a dict")
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: it is not {kind} optimizer's state.")


def check_is_state(index: Any, state: Any) -> Mapping[str, Any]:
    """Return the state of a parameter; raise ValueError if it is no mapping."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state_dict is damaged: its state of parameter {index} is a {type(state).__name__}, "
            "not a dict."
        )
    return state


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


def check_state_shapes(
    index: int, p: Tensor, state: Mapping[str, Any], keys: Iterable[str], *, flat: bool = False
) -> None:
    """Raise ValueError if a loaded state does not fit its parameter; ``flat``: nor is flattened."""
    for key in keys:
        value = state.get(key)
        if not isinstance(value, Tensor):
            continue
        if not flat:
            check_layout(index, key, value, layout_of(p))
        if value.shape == p.shape:
            continue
        if not (flat and value.dim() == 1 and value.numel() == p.numel()):
            raise ValueError(
                f"state_dict does not fit this optimizer: state {key!r} of parameter {index} has "
                f"shape {tuple(value.shape)}, but the parameter has shape {tuple(p.shape)}. "
                "Load the checkpoint of the same model, with the parameters in the same order."
            )


def check_layout(index: int, key: str, value: Tensor, expected: ShardLayout | None) -> None:
    """Raise ValueError if a loaded tensor is not spread over processes as it is kept."""
    layout = layout_of(value)
    if layout != expected:
        found, own = (f"sharded as {x.placements}" if x else "whole" for x in (layout, expected))
        raise ValueError(
            f"state_dict does not fit this optimizer: state {key!r} of parameter {index} is "
            f"{found}, but is kept {own}. Load it through "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which spreads it."
        )


PRE_HOOKS, POST_HOOKS = (f"_optimizer_load_state_dict_{when}_hooks" for when in ("pre", "post"))


@contextmanager
def loaded_hooks(optimizer: Optimizer, state_dict: Any) -> Iterator[dict[str, Any]]:
    """The state that the hooks before a load make of ``state_dict``; those after it run at the end.

    Checks and conversions thus see what hooks before the load made, and hooks after it have the
    last word, as with torch. Within the block torch's own load runs no hooks.
    """
    check_state_keys(state_dict, (), "an")
    state_dict = dict(state_dict)
    for hook in getattr(optimizer, PRE_HOOKS).values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    kept = {name: getattr(optimizer, name) for name in (PRE_HOOKS, POST_HOOKS)}
    optimizer.__dict__.update({name: OrderedDict() for name in kept})
    try:
        yield state_dict
    finally:
        optimizer.__dict__.update(kept)
    for hook in kept[POST_HOOKS].values():
        hook(optimizer)


def hooked_state(optimizer: Optimizer, state_of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``state_of()`` returns, with the hooks of ``state_dict()`` around it as with torch."""
    hooks: Any = optimizer
    for hook in hooks._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    state_dict = state_of()
    for hook in hooks._optimizer_state_dict_post_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict
