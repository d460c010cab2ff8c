"""The gate on a step that another optimizer takes: what is done before it, and after it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import ShardLayout, gradient_of, locals_of
from poprisk.optim.behaviour import Decay
from poprisk.optim.fused.wrapped import keep_, observe_
from poprisk.optim.gate import Gate, TensorList
from poprisk.optim.groups import update_lists
from poprisk.optim.settings import CompiledGroup
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.update import LOW_PRECISION, TensorLists, masks, real_lists
from poprisk.optim.variance import Ema, StepCounts

MOMENTS = (ADAM_KEYS[0], "grad_mean_var")
"""The gate's own vectors in the state of a parameter."""


class StepTensors(NamedTuple):
    """Parameters of one group that share dtype, device, layout and the number of their steps.

    Attributes:
        group: of the wrapped optimizer.
        decay: its decoupled decay.
        t: steps, the present one included.
        layout: of DTensors.
        params: the parameters.
        states: the gate's own, of each.
        starts: room for the weights before the step, and after it for the whole update without
            decay, in the state's precision.
    """

    group: dict[str, Any]
    decay: Decay | None
    t: int
    layout: ShardLayout | None
    params: TensorList
    states: list[dict[str, Any]]
    starts: TensorList

    def columns(self, grads: TensorList | None = None) -> TensorLists:
        """The tensors as they are, of DTensors the parts that are here.

        In the place of the average squares are ``starts``, in that of gradients, where there are
        none, the parameters.
        """
        m, s = ([state[key] for state in self.states] for key in MOMENTS)
        columns = [self.params, self.params if grads is None else grads, m, self.starts, s]
        if self.layout is not None:
            columns = [locals_of(column) for column in columns]
        return TensorLists(*columns)


def counts_at(own: CompiledGroup, t: int) -> StepCounts:
    """Counters of step ``t``; an estimate without a first step's mean is one step behind."""
    first = own.estimator is None or own.estimator.observes(1)
    return own.counts(t, t if first else t - 1)


def share_of(decay: Decay | None, group: dict[str, Any]) -> tuple[float, bool]:
    """The share of the weights that decay takes, and whether after the update."""
    return (0.0, False) if decay is None else (decay.share(group), decay.last)


def before_step(tensors: StepTensors, own: CompiledGroup, kernel: ctypes.CDLL | None) -> None:
    """Keep the weights in ``starts``, and observe the gradients.

    Args:
        tensors: of one kind.
        own: settings of the gate.
        kernel: the compiled one; None: by foreach.
    """
    grads = [gradient_of(p, tensors.layout) for p in tensors.params]
    columns, counts = tensors.columns(grads), counts_at(own, tensors.t)
    left = [*range(len(columns.params))]
    how: dict[str, Any] = {"counts": counts, "estimator": own.estimator}
    if kernel is not None and own.estimator is not None:
        left = observe_(kernel, columns, **how)
    if left:
        columns = columns.subset(left)
        torch._foreach_copy_(columns.exp_avg_sqs, columns.params)
    if left and own.estimator is not None:
        lists = real_lists(columns, maximize=False)
        update_lists(lists, own.settings, functools.partial(observe_lists_, **how))


def after_step(tensors: StepTensors, own: CompiledGroup, kernel: ctypes.CDLL | None) -> None:
    """Let the step that was taken keep what the gate lets through; arguments as before it."""
    columns, counts = tensors.columns(), counts_at(own, tensors.t)
    share, last = share_of(tensors.decay, tensors.group)
    gate = own.gate(counts, tensors.layout)
    how: dict[str, Any] = {"counts": counts, "estimator": own.estimator, "gate": gate}
    how |= {"share": share, "last": last}
    per_tensor = gate is not None and gate.per_tensor  # sums depend on the order of summation
    if kernel is not None and not per_tensor:
        left = keep_(kernel, columns, **how)
        if not left:
            return
        columns = columns.subset(left)
    lists = real_lists(columns, maximize=False)
    update_lists(lists, own.settings, functools.partial(keep_lists_, **how))
    for p, w in zip(columns.params, lists.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def observe_lists_(lists: TensorLists, *, counts: StepCounts, estimator: Ema) -> None:
    """Update the variance and then the average gradient, which must not contain it yet."""
    _, g, m, _, s, *_ = lists
    estimator.observe_(s, g, m, counts)
    torch._foreach_lerp_(m, g, 1 - counts.beta1)


def keep_lists_(
    lists: TensorLists,
    *,
    counts: StepCounts,
    estimator: Ema | None,
    gate: Gate | None,
    share: float,
    last: bool,
) -> None:
    r"""Let a step that was taken keep :math:`q \odot \Delta w`, and apply decoupled decay.

    Interpolation between the weights before and after is exact at both ends: where q is 1, the step
    is the optimizer's own, bit for bit.

    Args:
        lists: weights after the step; moments; in the place of the average squares, the weights
            before the step, which are replaced by the ungated update.
        counts: counters and decay rates.
        estimator: of the variance.
        gate: None: keep all.
        share: of the weights that decay takes.
        last: whether decay takes it after the update.
    """
    w, start = lists.params, lists.exp_avg_sqs
    update = torch._foreach_sub(w, start)
    new: list[Tensor] | tuple[Tensor, ...] = w
    if gate is not None and estimator is not None:
        q = [x.expand_as(y) for x, y in zip(masks(lists, counts, estimator, gate), w, strict=True)]
        new = torch._foreach_lerp(start, w, q)
    if share != 0:
        lost = new if last else start
        new = torch._foreach_sub(new, lost, alpha=share)
    if new is not w:
        torch._foreach_copy_(w, new)
    torch._foreach_copy_(start, update)
