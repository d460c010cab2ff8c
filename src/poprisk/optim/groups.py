"""Parameters of one group that are updated together, by whichever path their settings ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import ShardLayout, gradient_of, layout_of, locals_of
from poprisk.optim.fused import fused_adamw_
from poprisk.optim.gate import TensorList
from poprisk.optim.settings import CompiledGroup
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.update import (
    LOW_PRECISION,
    TensorLists,
    cache_blocks,
    gated_adamw_,
    real_lists,
)


class TensorGroup(NamedTuple):
    """Parameters of one group that share dtype, device, layout and counters, updated together."""

    group: CompiledGroup
    params: TensorList
    states: list[dict[str, Any]]
    t: Any
    observations: Any
    layout: ShardLayout | None


def captured_update(group: CompiledGroup, p: Tensor, state: dict[str, Any], finite: Tensor) -> None:
    """Update one parameter unless a gradient of the step was not finite."""
    t = state["step"].double() + 1
    tensors = TensorGroup(group, [p], [state], t, t - state.get("variance_start", 0), layout_of(p))
    columns = _columns(tensors)
    kept = [[x.clone() for x in column] for column in (columns.params, *columns[2:])]
    update_group(tensors)
    for column, old in zip((columns.params, *columns[2:]), kept, strict=True):
        for x, before in zip(column, old, strict=True):
            x.copy_(torch.where(finite, x, before))
    state["step"].add_(finite.to(state["step"].dtype))


def update_group(tensors: TensorGroup) -> None:
    """Update parameters of one kind and their moments in place."""
    group, settings = tensors.group, tensors.group.settings
    counts = group.counts(tensors.t, tensors.observations)
    how = {
        "settings": group.adam(counts),
        "counts": counts,
        "estimator": group.estimator,
        "gate": group.gate(counts, tensors.layout),
    }
    columns = _columns(tensors)
    if settings["fused"]:
        left = fused_adamw_(columns, **how, maximize=settings["maximize"])
        if not left:
            return
        columns = columns.subset(left)
    lists = real_lists(columns, settings["maximize"])
    update_lists(lists, settings, functools.partial(gated_adamw_, **how))
    for p, w in zip(columns.params, lists.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def update_lists(
    lists: TensorLists, settings: dict[str, Any], update_: Callable[[TensorLists], None]
) -> None:
    """All tensors at once, block by block, or one at a time."""
    whole_tensors = settings["reduction"] is not None or callable(settings["mask"])
    if settings["foreach"] is False:
        for i in range(len(lists.params)):
            update_(lists.subset([i]))
    elif lists.params[0].device.type != "cpu" or whole_tensors:
        update_(lists)
    else:
        cache_blocks(lists, update_)


def _columns(tensors: TensorGroup) -> TensorLists:
    """The tensors as they are, of DTensors the parts that are here."""
    keys = (*ADAM_KEYS, *tensors.group.state_keys)
    columns = [tensors.params, [gradient_of(p, tensors.layout) for p in tensors.params]]
    columns += [[state[key] for state in tensors.states] for key in keys]
    if tensors.layout is not None:
        columns = [locals_of(column) for column in columns]
    return TensorLists(*columns, *([] for _ in range(5 - len(columns))))
