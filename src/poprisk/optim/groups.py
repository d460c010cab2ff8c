"""Parameters of one group that are updated together, by whichever path their settings ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import Layout, gradient_of, layout_of, locals_of
from poprisk.optim.fused import fused_adamw_
from poprisk.optim.gate import TensorList
from poprisk.optim.settings import CompiledGroup
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.update import (
    LOW_PRECISION,
    Slots,
    cache_blocks,
    gated_adamw_,
    real_slots,
)


class Bucket(NamedTuple):
    """Parameters of one group that share dtype, device, layout and counters, updated together."""

    group: CompiledGroup
    params: TensorList
    states: list[dict[str, Any]]
    t: Any
    observations: Any
    layout: Layout | None


def captured_update(group: CompiledGroup, p: Tensor, state: dict[str, Any], finite: Tensor) -> None:
    """Update one parameter unless a gradient of the step was not finite."""
    t = state["step"].double() + 1
    bucket = Bucket(group, [p], [state], t, t - state.get("variance_start", 0), layout_of(p))
    columns = _columns(bucket)
    kept = [[x.clone() for x in column] for column in (columns.params, *columns[2:])]
    update_bucket(bucket)
    for column, old in zip((columns.params, *columns[2:]), kept, strict=True):
        for x, before in zip(column, old, strict=True):
            x.copy_(torch.where(finite, x, before))
    state["step"].add_(finite.to(state["step"].dtype))


def update_bucket(bucket: Bucket) -> None:
    """Update the parameters of a bucket and their moments in place."""
    group, settings = bucket.group, bucket.group.settings
    clock = group.clock(bucket.t, bucket.observations)
    how = {
        "settings": group.adam(clock),
        "clock": clock,
        "estimator": group.estimator,
        "gate": group.gate(clock, bucket.layout),
    }
    columns = _columns(bucket)
    if settings["fused"]:
        left = fused_adamw_(columns, **how, maximize=settings["maximize"])
        if not left:
            return
        columns = columns.subset(left)
    slots = real_slots(columns, settings["maximize"])
    update_slots(slots, settings, functools.partial(gated_adamw_, **how))
    for p, w in zip(columns.params, slots.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def update_slots(slots: Slots, settings: dict[str, Any], update_: Callable[[Slots], None]) -> None:
    """All tensors at once, block by block, or one at a time."""
    whole_tensors = settings["reduction"] is not None or callable(settings["mask"])
    if settings["foreach"] is False:
        for i in range(len(slots.params)):
            update_(slots.subset([i]))
    elif slots.params[0].device.type != "cpu" or whole_tensors:
        update_(slots)
    else:
        cache_blocks(slots, update_)


def _columns(bucket: Bucket) -> Slots:
    """The tensors of a bucket as they are, of DTensors the parts that are here."""
    keys = (*ADAM_KEYS, *bucket.group.state_keys)
    columns = [bucket.params, [gradient_of(p, bucket.layout) for p in bucket.params]]
    columns += [[state[key] for state in bucket.states] for key in keys]
    if bucket.layout is not None:
        columns = [locals_of(column) for column in columns]
    return Slots(*columns, *([] for _ in range(5 - len(columns))))
