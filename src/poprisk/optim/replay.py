"""The last step of a parameter, evaluated again from the state that it left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poprisk.dtensor import global_sums, layout_of, local
from poprisk.optim.gate import MASKS_, Gate
from poprisk.optim.kronecker import BASES
from poprisk.optim.settings import CompiledGroup, compiled
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.stats import gate_sums
from poprisk.optim.step import StepContext, StepRule
from poprisk.optim.update import TensorLists, adam_denominator, masks, pieces
from poprisk.optim.variance import StepCounts, VarianceEstimator


def last_gate(
    p: Tensor, state: dict[str, Any], group: CompiledGroup
) -> tuple[TensorLists, StepCounts, VarianceEstimator | None, Gate | None]:
    """What the gate of the last step looked at, and the gate; of a DTensor, the part here."""
    group = _of_parameter(group, p, state)
    t = int(state["step"].item())
    counts = group.counts(t, t - state.get("variance_start", t))
    gate = group.gate(counts, layout_of(p))
    moments = [local(state[key]) for key in (*ADAM_KEYS, *group.state_keys)]
    moments = [torch.view_as_real(x) if x.is_complex() else x for x in moments]
    rest = len(TensorLists._fields) - 2 - len(moments)
    lists = TensorLists([], [], *([x] for x in moments), *([] for _ in range(rest)))
    return lists, counts, group.estimator, gate


def _of_parameter(group: CompiledGroup, p: Tensor, state: dict[str, Any]) -> CompiledGroup:
    return group if any(key in state for key in BASES) else group.in_coordinates(p)


def last_step_rule(p: Tensor, state: dict[str, Any], context: StepContext) -> StepRule:
    """The last step of one parameter as a linear map of its gradient, from the state it left."""
    group = _of_parameter(compiled(context.group), p, state)
    settings, lr, t = group.settings, float(group.settings["lr"]), int(state["step"].item())
    beta1 = settings["betas"][0]
    rule = StepRule(
        precondition=lr,
        correction=1 / (1 - beta1**t),
        carry=beta1,
        gain=1 - beta1,
        decay=lr * settings["weight_decay"],
        sign=-1.0 if settings["maximize"] else 1.0,
    )
    if settings["gate"] and callable(settings["mask"]):
        m = state["exp_avg"] * rule.correction
        moved = -(context.update + rule.decay * context.weight)
        return rule._replace(precondition=torch.where(m == 0, torch.zeros_like(m), moved / m))
    lists, counts, estimator, gate = last_gate(p, state, group)
    scale = lr / adam_denominator(lists.exp_avg_sqs, counts, settings["eps"])[0]
    return rule._replace(precondition=scale * mask_of(lists, counts, estimator, gate))


def last_mask(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The mask q of the last step, for masks by name; ones where the step was ungated."""
    return mask_of(*last_gate(p, state, compiled(group)))


def mask_of(
    lists: TensorLists, counts: StepCounts, estimator: VarianceEstimator | None, gate: Gate | None
) -> Tensor:
    """The mask of one tensor; ones where it is not gated."""
    if gate is None or estimator is None:
        return torch.ones_like(lists.exp_avgs[0])
    return masks(lists, counts, estimator, gate)[0]


def mask_and_passed(
    lists: TensorLists, counts: StepCounts, estimator: VarianceEstimator | None, gate: Gate | None
) -> tuple[Tensor, Tensor]:
    """The mask of one tensor, and 1 where the threshold is passed."""
    hard = gate and gate._replace(mask=MASKS_["hard"], q_min=0.0)
    return mask_of(lists, counts, estimator, gate), mask_of(lists, counts, estimator, hard)


def gate_row(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Re-evaluate the gate of the last step, piece by piece: the sums of its statistics."""
    lists, counts, estimator, gate = last_gate(p, state, compiled(group))
    lists = lists._replace(params=lists.exp_avgs)
    whole = gate is not None and gate.whole_tensors
    total = torch.zeros(5, dtype=torch.float64, device=lists.params[0].device)
    eps = max(float(group["eps"]), torch.finfo(lists.exp_avgs[0].dtype).tiny)  # 0/0 is no update
    for piece in [lists] if whole else pieces(lists):
        (m,), (v,) = piece.exp_avgs, piece.exp_avg_sqs
        update = adam_denominator([v], counts, eps)[0].reciprocal_().mul_(m).mul_(counts.mean_scale)
        q, passed = mask_and_passed(piece, counts, estimator, gate)
        total += gate_sums(q, passed, update, v.sign())
    return global_sums(total, layout_of(p))
