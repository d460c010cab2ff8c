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
from poprisk.optim.settings import estimator_of, gate_of, plain_settings
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.update import (
    LOW_PRECISION,
    AdamSettings,
    Slots,
    cache_blocks,
    gated_adamw_,
    real_slots,
)
from poprisk.optim.variance import Clock, VarianceEstimator


class Bucket(NamedTuple):
    """Parameters of one group that share dtype, device, layout and counters, updated together."""

    group: dict[str, Any]
    params: TensorList
    states: list[dict[str, Any]]
    t: Any
    observations: Any
    layout: Layout | None


def captured_update(
    group: dict[str, Any], p: Tensor, state: dict[str, Any], finite: Tensor
) -> None:
    """Update one parameter unless a gradient of the step was not finite."""
    group = plain_settings(group)
    estimator = estimator_of(group)
    t = state["step"].double() + 1
    bucket = Bucket(group, [p], [state], t, t - state.get("variance_start", 0), layout_of(p))
    columns = _columns(bucket, estimator)
    kept = [[x.clone() for x in column] for column in (columns.params, *columns[2:])]
    update_bucket(bucket)
    for column, old in zip((columns.params, *columns[2:]), kept, strict=True):
        for x, before in zip(column, old, strict=True):
            x.copy_(torch.where(finite, x, before))
    state["step"].add_(finite.to(state["step"].dtype))


def update_bucket(bucket: Bucket) -> None:
    """Update the parameters of a bucket and their moments in place."""
    group, estimator = bucket.group, estimator_of(bucket.group)
    beta1, beta2 = group["betas"]
    clock = Clock(bucket.t, bucket.observations, beta1, beta2)
    gate = gate_of(group, clock, estimator, bucket.layout)
    how = {
        "settings": AdamSettings(
            group["lr"] if clock.captured else float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
        ),
        "clock": clock,
        "estimator": estimator,
        "gate": gate,
    }
    columns = _columns(bucket, estimator)
    if group["fused"]:
        left = fused_adamw_(columns, **how, maximize=group["maximize"])
        if not left:
            return
        columns = columns.subset(left)
    slots = real_slots(columns, group["maximize"])
    update_slots(slots, group, functools.partial(gated_adamw_, **how))
    for p, w in zip(columns.params, slots.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def update_slots(slots: Slots, group: dict[str, Any], update_: Callable[[Slots], None]) -> None:
    """All tensors at once, block by block, or one at a time."""
    whole_tensors = group["reduction"] is not None or callable(group["mask"])
    if group["foreach"] is False:
        for i in range(len(slots.params)):
            update_(slots.subset([i]))
    elif slots.params[0].device.type != "cpu" or whole_tensors:
        update_(slots)
    else:
        cache_blocks(slots, update_)


def _columns(bucket: Bucket, estimator: VarianceEstimator | None) -> Slots:
    """The tensors of a bucket as they are, of DTensors the parts that are here."""
    keys = (*ADAM_KEYS, *(estimator.state_keys if estimator else ()))
    columns = [bucket.params, [gradient_of(p, bucket.layout) for p in bucket.params]]
    columns += [[state[key] for state in bucket.states] for key in keys]
    if bucket.layout is not None:
        columns = [locals_of(column) for column in columns]
    return Slots(*columns, *([] for _ in range(5 - len(columns))))
