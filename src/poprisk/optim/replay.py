"""The last step of a parameter, evaluated again from the state that it left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poprisk.dtensor import global_sums, layout_of, local
from poprisk.optim.gate import MASKS_, Gate
from poprisk.optim.settings import estimator_of, gate_of, plain_settings
from poprisk.optim.state import ADAM_KEYS
from poprisk.optim.stats import gate_sums
from poprisk.optim.step import Facts, StepRule
from poprisk.optim.update import Slots, adam_denominator, masks, pieces
from poprisk.optim.variance import Clock, VarianceEstimator


def last_gate(
    p: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> tuple[Gate | None, Slots, Clock, VarianceEstimator | None]:
    """The gate of the last step and what it looked at; of a DTensor, the part that is here."""
    group = plain_settings(group)
    estimator = estimator_of(group)
    t = int(state["step"].item())
    clock = Clock(t, t - state.get("variance_start", t), *group["betas"])
    gate = gate_of(group, clock, estimator, layout_of(p))
    keys = (*ADAM_KEYS, *(estimator.state_keys if estimator else ()))
    moments = [local(state[key]) for key in keys]
    moments = [torch.view_as_real(x) if x.is_complex() else x for x in moments]
    slots = Slots([], [], *([x] for x in moments), *([] for _ in range(3 - len(moments))))
    return gate, slots, clock, estimator


def last_step_rule(p: Tensor, state: dict[str, Any], facts: Facts) -> StepRule:
    """The last step of one parameter as a linear map of its gradient, from the state it left."""
    group = plain_settings(facts.group)
    (beta1, _), lr, t = group["betas"], float(group["lr"]), int(state["step"].item())
    rule = StepRule(
        precondition=lr,
        correction=1 / (1 - beta1**t),
        carry=beta1,
        gain=1 - beta1,
        decay=lr * group["weight_decay"],
        sign=-1.0 if group["maximize"] else 1.0,
    )
    if group["gate"] and callable(group["mask"]):
        m = state["exp_avg"] * rule.correction
        moved = -(facts.update + rule.decay * facts.weight)
        return rule._replace(precondition=torch.where(m == 0, torch.zeros_like(m), moved / m))
    gate, slots, clock, estimator = last_gate(p, state, group)
    scale = lr / adam_denominator(slots.exp_avg_sqs, clock, group["eps"])[0]
    return rule._replace(precondition=scale * _mask(gate, slots, clock, estimator))


def last_mask(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The mask q of the last step, for masks by name; ones where the step was ungated."""
    return _mask(*last_gate(p, state, group))


def _mask(
    gate: Gate | None, slots: Slots, clock: Clock, estimator: VarianceEstimator | None
) -> Tensor:
    if gate is None or estimator is None:
        return torch.ones_like(slots.exp_avgs[0])
    return masks(slots, clock, estimator, gate)[0]


def gate_row(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Re-evaluate the gate of the last step, piece by piece: the sums of its statistics."""
    gate, slots, clock, estimator = last_gate(p, state, group)
    slots = slots._replace(params=slots.exp_avgs)
    whole = gate is not None and gate.per_tensor
    total = torch.zeros(5, dtype=torch.float64, device=slots.params[0].device)
    eps = max(float(group["eps"]), torch.finfo(slots.exp_avgs[0].dtype).tiny)  # 0/0 is no update
    for piece in [slots] if whole else pieces(slots):
        (m,), (v,) = piece.exp_avgs, piece.exp_avg_sqs
        update = adam_denominator([v], clock, eps)[0].reciprocal_().mul_(m).mul_(clock.mean_scale)
        if gate is None or estimator is None:
            q = passed = torch.ones_like(m)
        else:
            threshold = gate._replace(mask=MASKS_["hard"], q_min=0.0)
            q, passed = (masks(piece, clock, estimator, g)[0] for g in (gate, threshold))
        total += gate_sums(q, passed, update, v.sign())
    return global_sums(total, layout_of(p))
