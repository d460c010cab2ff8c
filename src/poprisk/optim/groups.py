"""Parameters of one group that are updated together, by whichever path their settings ask for."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import ShardLayout, gradient_of, layout_of, locals_of
from poprisk.optim.fused import captured_adamw_, fused_adamw_
from poprisk.optim.gate import TensorList
from poprisk.optim.kronecker import Rotation
from poprisk.optim.settings import CompiledGroup
from poprisk.optim.sharded import RotationPart
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.update import (
    LOW_PRECISION,
    TensorLists,
    cache_blocks,
    decay_,
    gated_adamw_,
    real_lists,
    state_dtype,
)


class TensorGroup(NamedTuple):
    """Parameters of one group that share dtype, device, layout and counters, updated together.

    ``terms`` holds h of each where terms of the loss are charged differently
    (:mod:`poprisk.optim.sizes`).
    """

    group: CompiledGroup
    params: TensorList
    states: list[dict[str, Any]]
    t: Any
    observations: Any
    layout: ShardLayout | None
    terms: Mapping[Tensor, Tensor] = {}

    def subset(self, indices: Sequence[int]) -> TensorGroup:
        """Some of the parameters."""
        params, states = [self.params[i] for i in indices], [self.states[i] for i in indices]
        return self._replace(params=params, states=states)


def captured_updates(
    group: CompiledGroup, params: TensorList, states: list[dict[str, Any]], finite: Tensor
) -> None:
    """Update parameters of a group unless a gradient of the step was not finite."""
    left = [*range(len(params))]
    if group.settings["fused"] and not torch.compiler.is_compiling():  # inductor fuses by itself
        left = _captured_in_one_pass(group, params, states, finite)
    for i in left:
        captured_update(group, params[i], states[i], finite)


def _captured_in_one_pass(
    group: CompiledGroup, params: TensorList, states: list[dict[str, Any]], finite: Tensor
) -> list[int]:
    """Update what the kernel can take; return the indices of the others."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        kinds[p.device, p.dtype, layout_of(p)].append(i)
    left = list[int]()
    for (_, _, layout), own in kinds.items():
        of_kind = [states[i] for i in own]
        steps = [state["step"] for state in of_kind]
        starts = [float(state.get("variance_start", 0)) for state in of_kind]
        t, since = (
            torch.stack([*x]).double() + 1 for x in (steps, torch._foreach_sub(steps, starts))
        )
        tensors = TensorGroup(group, [params[i] for i in own], of_kind, t, since, layout)
        counts = group.counts(t, since)
        rest = captured_adamw_(
            _columns(tensors),
            settings=group.adam(counts),
            counts=counts,
            estimator=group.estimator,
            gate=group.gate(counts, layout),
            maximize=group.settings["maximize"],
            taken=finite,
        )
        if taken := [step for j, step in enumerate(steps) if j not in rest]:
            torch._foreach_add_(taken, [finite.to(taken[0].dtype)] * len(taken))
        left += [own[j] for j in rest]
    return left


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
    if settings["fused"] and not counts.captured and not group.charges:
        left = fused_adamw_(columns, **how, maximize=settings["maximize"])
        if not left:
            return
        columns = columns.subset(left)
    lists = real_lists(columns, settings["maximize"])
    update_lists(lists, settings, functools.partial(gated_adamw_, **how))
    for p, w in zip(columns.params, lists.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def update_rotated(
    tensors: TensorGroup, rotations: Sequence[Rotation | RotationPart], turned: TensorList
) -> None:
    """The same in a basis of each parameter, from the gradients there; the step is turned back.

    The moments are kept in that basis; weight decay, which is the same in any, is not turned. Of
    DTensors, ``turned`` holds the parts that are here, and so does the update.
    """
    group, settings = tensors.group, tensors.group.settings
    counts = group.counts(tensors.t, tensors.observations)
    adam, dtype = group.adam(counts), state_dtype(tensors.params[0])
    columns = _columns(tensors)
    steps = [torch.zeros_like(g) for g in turned]
    lists = real_lists(columns._replace(params=steps, grads=[*turned]), settings["maximize"])
    how = {
        "settings": adam._replace(weight_decay=0.0),
        "counts": counts,
        "estimator": group.estimator,
        "gate": group.gate(counts),
    }
    update_lists(lists, settings, functools.partial(gated_adamw_, **how))
    for p, rotation, step in zip(columns.params, rotations, steps, strict=True):
        w = p.to(dtype)
        decay_([w], adam)
        w.add_(rotation.back(step))
        if w is not p:
            p.copy_(w)


def update_lists(
    lists: TensorLists, settings: dict[str, Any], update_: Callable[[TensorLists], None]
) -> None:
    """All tensors at once, block by block, or one at a time."""
    whole_tensors = settings["reduction"] is not None or callable(settings["mask"])
    whole_tensors = whole_tensors or bool(lists.term_grads)
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
    columns = [tensors.params, _gradients(tensors)]
    columns += [[state[key] for state in tensors.states] for key in keys]
    if tensors.group.charges:
        columns.append([tensors.terms[p] for p in tensors.params])
    if tensors.layout is not None:
        columns = [locals_of(column) for column in columns]
    return TensorLists(*columns, *([] for _ in range(len(TensorLists._fields) - len(columns))))


def _gradients(tensors: TensorGroup) -> TensorList:
    """The gradients, as they are in memory: torch may put off negations and conjugations."""
    layout = tensors.layout
    grads: Any = [p.grad if layout is None else gradient_of(p, layout) for p in tensors.params]
    if not torch.compiler.is_compiling() and any(g.is_neg() or g.is_conj() for g in grads):
        return [g.resolve_neg().resolve_conj() for g in grads]
    return grads
