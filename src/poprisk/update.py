r"""One gated AdamW update as a pure function of tensors.

The loop path calls :func:`gated_adamw_` with one tensor at a time, the foreach path with many;
nothing else differs. Elementwise work on the CPU goes chunk by chunk, so that the temporaries of
one chunk stay in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.gate import Gate, TensorList
from poprisk.path.rules import Facts, StepRule
from poprisk.settings import estimator_of, gate_of
from poprisk.variance import Clock, VarianceEstimator

ADAM_KEYS = ("exp_avg", "exp_avg_sq")

CHUNK = 131_072
"""Elements of a piece of a large tensor on the CPU: its temporaries stay in cache, and it is still
worth splitting over threads."""

BLOCK = 65_536
"""Elements of small tensors worked on together on the CPU."""


class AdamSettings(NamedTuple):
    """What AdamW itself needs, as numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Slots(NamedTuple):
    """Parallel lists of real tensors of one dtype on one device.

    ``variances`` is empty for an estimator without state; ``observed`` holds variances found
    within the present batch, for an estimator that averages these.
    """

    params: TensorList
    grads: TensorList
    exp_avgs: TensorList
    exp_avg_sqs: TensorList
    variances: TensorList
    observed: TensorList

    def subset(self, indices: list[int]) -> Slots:
        """The slots at ``indices``."""
        return Slots(*([column[i] for i in indices] if column else [] for column in self))


def cache_blocks(slots: Slots, update_: Callable[[Slots], None]) -> None:
    """Apply an elementwise update piece by piece.

    A tensor of over :data:`CHUNK` elements is cut into views if its memory layout has them; of the
    others, as many as fit into :data:`BLOCK` go together.
    """
    block: list[int] = []
    size = 0
    for i, numel in enumerate(w.numel() for w in slots.params):
        if numel > CHUNK:
            for piece in _pieces(slots.subset([i])):
                update_(piece)
            continue
        if block and size + numel > BLOCK:
            update_(slots.subset(block))
            block.clear()
            size = 0
        block.append(i)
        size += numel
    if block:
        update_(slots.subset(block))


def _pieces(slots: Slots) -> list[Slots]:
    """The one tensor of ``slots`` in views of at most :data:`CHUNK` elements."""
    if not all(t.is_contiguous() for column in slots for t in column):
        return [slots]
    columns = [column[0].view(-1).split(CHUNK) if column else () for column in slots]
    return [
        Slots(*([column[j]] if column else [] for column in columns))
        for j in range(len(columns[0]))
    ]


def gated_adamw_(
    slots: Slots,
    *,
    settings: AdamSettings,
    clock: Clock,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
) -> None:
    r"""Update parameters and moments in place (Algorithm 1 of [LG], calibration ours).

    .. math::
        s &\leftarrow \text{estimator}(g, m), \quad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        w &\leftarrow (1 - \eta\lambda) w - \eta\, q \odot \hat m / (\sqrt{\hat v} + \varepsilon)

    The variance is updated before the mean, which must not contain the gradient it is compared
    with. Weight decay is decoupled and not gated. With ``gate=None`` every operation, and its
    order, is that of ``torch.optim.AdamW``; with ``estimator=None`` no variance is kept.
    """
    w, g, m, v, s, observed = slots
    if estimator is not None:
        estimator.observe_(s, observed or g, m, clock)
    if settings.weight_decay != 0:
        torch._foreach_mul_(w, _number(1 - settings.lr * settings.weight_decay, w[0]))
    torch._foreach_lerp_(m, g, 1 - settings.beta1)
    torch._foreach_mul_(v, _number(settings.beta2, v[0]))
    torch._foreach_addcmul_(v, g, g, 1 - settings.beta2)

    step = m
    if gate is not None and estimator is not None:
        q = masks(slots, clock, estimator, gate)
        if gate.per_tensor:
            step = list(torch._foreach_mul(m, q))
        else:
            torch._foreach_mul_(q, m)
            step = q
    denom = adam_denominator(v, clock, settings.eps)
    torch._foreach_addcdiv_(w, step, denom, -(settings.lr / (1 - clock.beta1**clock.t)))


def masks(slots: Slots, clock: Clock, estimator: VarianceEstimator, gate: Gate) -> TensorList:
    """The mask of each tensor; the moments contain the present gradients."""
    raw, var_scale = estimator.read(slots.variances, slots.exp_avgs, slots.exp_avg_sqs, clock)
    return gate(slots.exp_avgs, raw, mean_scale=clock.mean_scale, var_scale=var_scale)


def _number(value: float, like: Tensor) -> float | Tensor:
    """``value`` in the form that a foreach kernel on the device of ``like`` takes fastest."""
    return value if like.device.type != "cpu" else _constant(value, like.dtype)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor, which costs a CPU kernel half of what a Python number does."""
    return torch.tensor(value, dtype=dtype)


def adam_denominator(exp_avg_sqs: TensorList, clock: Clock, eps: float) -> TensorList:
    r""":math:`\sqrt{\hat v} + \varepsilon`, newly allocated."""
    denom = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denom, _number((1 - clock.beta2**clock.t) ** 0.5, denom[0]))
    torch._foreach_add_(denom, eps)
    return denom


def last_gate(
    state: dict[str, Any], group: dict[str, Any]
) -> tuple[Gate | None, Slots, Clock, VarianceEstimator | None]:
    """The gate of the last step and what it looked at, from the state it left behind."""
    estimator = estimator_of(group)
    t = int(state["step"].item())
    clock = Clock(t, t - state.get("variance_start", t), *group["betas"])
    keys = (*ADAM_KEYS, *(estimator.state_keys if estimator else ()))
    moments = [torch.view_as_real(x) if x.is_complex() else x for x in (state[k] for k in keys)]
    slots = Slots([], [], *([x] for x in moments), *([] for _ in range(4 - len(moments))))
    return gate_of(group, clock, estimator), slots, clock, estimator


def last_step_rule(state: dict[str, Any], facts: Facts) -> StepRule:
    """The last step of one parameter as a linear map of its gradient, from the state it left."""
    group = facts.group
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
    gate, slots, clock, estimator = last_gate(state, group)
    scale = lr / adam_denominator(slots.exp_avg_sqs, clock, group["eps"])[0]
    if gate is not None and estimator is not None:
        scale = scale * masks(slots, clock, estimator, gate)[0]
    return rule._replace(precondition=scale)
