r"""One step of an optimizer as a linear map of its gradient.

Along a realized run the second moments, masks and learning rates are numbers, so that a step of
the usual optimizers is linear in the gradients seen so far. Of one parameter tensor, with the
gradient :math:`\partial` and the weights w before the step:

.. math::
    \hat g = \sigma \partial + \lambda w, \quad
    m \leftarrow a m + c \odot \hat g, \quad
    r = p\, m + q\, \hat g, \quad
    \Delta w = -\gamma\, \eta M \odot r - \delta w

SGD, Adam, AdamW and RMSprop of torch are known here; an optimizer of ours describes itself by a
method ``step_rule(param)``; for any other there is :func:`realized_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk._validate import NotAnalysable
from poprisk.printing import short_repr

Diagonal = Tensor | float


class StepRule(NamedTuple):
    r"""A step as a linear map: of one tensor, or of all weights of a recorded run.

    Numbers hold for all entries. Tensors have the shape of what the rule is of: a parameter, or
    (P, 1) for all weights; a recorded interval keeps one number per parameter, (T,).

    Attributes:
        precondition: :math:`\eta M`, learning rate times preconditioner (and gate), ≥ 0.
        correction: :math:`\gamma`, bias correction of the momentum, :math:`1/(1-\beta_1^{k+1})`.
        carry: a, how much of the momentum is kept.
        gain: c, how the gradient enters the momentum.
        from_momentum: p, share of the momentum in the step.
        from_gradient: q, share of the present gradient in the step (Nesterov).
        coupled: :math:`\lambda`, weight decay that enters the gradient.
        decay: :math:`\delta`, decoupled weight decay times learning rate.
        sign: :math:`\sigma`, -1 for an optimizer that maximizes.
        steps: taken one after the other with one gradient, where a run is recorded every few.
    """

    precondition: Diagonal
    correction: Diagonal = 1.0
    carry: Diagonal = 0.0
    gain: Diagonal = 1.0
    from_momentum: Diagonal = 1.0
    from_gradient: Diagonal = 0.0
    coupled: Diagonal = 0.0
    decay: Diagonal = 0.0
    sign: Diagonal = 1.0
    steps: int = 1

    __repr__ = short_repr

    def part(self, rows: slice) -> StepRule:
        """The rule of some of the weights."""
        return StepRule(*(v[rows] if isinstance(v, Tensor) else v for v in self))  # pyrefly: ignore

    def column(self) -> StepRule:
        """The rule for several columns of momenta: (P, 1) in place of (P,)."""
        fields = (v.unsqueeze(1) if isinstance(v, Tensor) else v for v in self)
        return StepRule(*fields)  # pyrefly: ignore

    @property
    def decays(self) -> bool:
        """Whether the weights themselves enter the step."""
        return any(bool(torch.as_tensor(v).any()) for v in (self.coupled, self.decay))

    def usual(self) -> tuple[float, float] | None:
        """Numbers a and c of one step that reads the momentum itself; None for any other rule."""
        others = (self.from_momentum, self.from_gradient, self.sign, self.steps)
        numbers = [v for v in (self.carry, self.gain, *others) if not isinstance(v, Tensor)]
        return (numbers[0], numbers[1]) if numbers[2:] == [1.0, 0.0, 1.0, 1] else None

    def take(self, momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        r"""Momentum after the steps, and r summed over them, for one :math:`\hat g`."""
        a, s = self.carry, self.steps
        if s == 1:  # the sums below are 0/0 for a tensor that gets no gradient, a = 1
            after = a * momentum + self.gain * gradient
            return after, self.from_momentum * after + self.from_gradient * gradient
        carried, entered = self.weights()
        after = a**s * momentum + self.gain * (1 - a**s) / (1 - a) * gradient
        return after, carried * momentum + entered * gradient

    def weights(self) -> tuple[Diagonal, Diagonal]:
        """How much of the momentum before, and of the gradient, r holds over several steps."""
        a, s = self.carry, self.steps
        carried = a * (1 - a**s) / (1 - a)
        entered = self.gain * (s - carried) / (1 - a)
        return self.from_momentum * carried, self.from_momentum * entered + self.from_gradient * s


def joined(rules: Sequence[StepRule], weights: Sequence[Tensor]) -> StepRule:
    """The rule of all weights in a row: numbers where all tensors have the same, else (P,)."""

    def field(name: str) -> Diagonal:
        values = [getattr(rule, name) for rule in rules]
        if all(not isinstance(v, Tensor) and v == values[0] for v in values):
            return values[0]
        pairs = zip(values, weights, strict=True)
        spread = [(v + torch.zeros_like(w)).flatten() for v, w in pairs]
        return torch.cat(spread).detach()

    return StepRule(**{name: field(name) for name in StepRule._fields[:-1]})  # pyrefly: ignore


class StepContext(NamedTuple):
    """What a rule may look at, besides the optimizer's state after the step.

    Attributes:
        group: the parameter's group.
        state: the parameter's state after the step.
        first: whether the tensor had no momentum before this step.
        update: weights after the step minus weights before it.
        grad: the gradient that the step used.
        weight: the weights before the step.
        momentum: the momentum before the step, as the rules so far imply it.
    """

    group: dict[str, Any]
    state: dict[str, Any]
    first: bool
    update: Tensor
    grad: Tensor
    weight: Tensor
    momentum: Tensor

    __repr__ = short_repr


Rule = Callable[[StepContext], StepRule]


def sgd(context: StepContext) -> StepRule:
    """``torch.optim.SGD``: the first momentum is the gradient itself, without dampening."""
    return sgd_rule(context.group, first=context.first)


def sgd_rule(group: dict[str, Any], *, first: bool) -> StepRule:
    """The same of a parameter group alone, for nothing else counts."""
    mu, nesterov = group["momentum"], group["nesterov"]
    return StepRule(
        precondition=float(group["lr"]),
        carry=0.0 if first else mu,
        gain=1.0 if first or mu == 0 else 1 - group["dampening"],
        from_momentum=mu if nesterov else 1.0,
        from_gradient=1.0 if nesterov else 0.0,
        coupled=group["weight_decay"],
        sign=_sign(group),
    )


def adam(context: StepContext) -> StepRule:
    """``torch.optim.Adam`` and ``AdamW``, with and without AMSGrad."""
    group, state = context.group, context.state
    (beta1, beta2), t = group["betas"], float(state["step"])
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    denom = v.sqrt() / (1 - beta2**t) ** 0.5 + group["eps"]
    lr, decay = float(group["lr"]), group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", False)
    return StepRule(
        precondition=lr / denom,
        correction=1 / (1 - beta1**t),
        carry=beta1,
        gain=1 - beta1,
        coupled=0.0 if decoupled else decay,
        decay=lr * decay if decoupled else 0.0,
        sign=_sign(group),
    )


def adamw(context: StepContext) -> StepRule:
    """``torch.optim.AdamW``: decay is decoupled, whether or not the group says so."""
    return adam(context._replace(group={**context.group, "decoupled_weight_decay": True}))


def rmsprop(context: StepContext) -> StepRule:
    """``torch.optim.RMSprop``, centred or not; its momentum averages preconditioned gradients."""
    group, state = context.group, context.state
    v, lr, mu = state["square_avg"], float(group["lr"]), group["momentum"]
    if group["centered"]:
        v = v - state["grad_avg"].square()
    scale = 1 / (v.sqrt() + group["eps"])
    common = {"coupled": group["weight_decay"], "sign": _sign(group)}
    if mu > 0:
        return StepRule(precondition=lr, carry=mu, gain=scale, **common)
    return StepRule(precondition=lr * scale, **common)


def realized_update(*, momentum: float = 0.0) -> Rule:
    r"""The hook for any other optimizer: reads its preconditioner off the step that it took.

    With :math:`m \leftarrow \beta m + (1-\beta)\partial`, β = ``momentum``, the preconditioner is
    :math:`\eta M = -\Delta w / m` per coordinate, 0 where m is. Exact: the realized weights, so
    that displacements and closure errors are those of the run. Not exact: how a step would answer
    to another gradient. An optimizer that mixes coordinates (Muon, Shampoo) or carries another
    momentum is described by a diagonal that happens to give the same steps; entries of it may be
    negative, and count by their absolute value in W. Where such an optimizer moves weights whose
    gradient was always zero (of inputs that are zero), no diagonal does, and recording is refused.
    """

    def rule(context: StepContext) -> StepRule:
        m = momentum * context.momentum + (1 - momentum) * context.grad
        scale = torch.where(m == 0, torch.zeros_like(m), -context.update / m)
        return StepRule(precondition=scale, carry=momentum, gain=1 - momentum)

    return rule


RULES: dict[type[Optimizer], tuple[Rule, str]] = {
    torch.optim.SGD: (sgd, "momentum_buffer"),
    torch.optim.Adam: (adam, "exp_avg"),
    torch.optim.AdamW: (adamw, "exp_avg"),
    torch.optim.RMSprop: (rmsprop, "momentum_buffer"),
}
"""Exact rules of torch's optimizers, and where each keeps its momentum."""


class Description(NamedTuple):
    """What the recorder needs to know about an optimizer.

    Attributes:
        rule: of a parameter's last step.
        momentum: a parameter's momentum at present, None if it has none yet.
    """

    rule: Callable[[Tensor, StepContext], StepRule]
    momentum: Callable[[Tensor], Tensor | None]


def describe(optimizer: Optimizer, rule: Rule | None = None) -> Description:
    """Find the rule of an optimizer: the one given, its own ``step_rule``, or torch's.

    Raises:
        NotAnalysable: if there is none.
    """
    own = getattr(optimizer, "step_rule", None)
    if rule is None and callable(own):
        return Description(own, getattr(optimizer, "momentum_of", _Momentum(optimizer, "exp_avg")))
    if rule is None:
        if type(optimizer) not in RULES:
            raise NotAnalysable(
                f"{type(optimizer).__name__} has no rule that writes its step as a linear map of "
                f"the gradient; exact ones exist for {', '.join(kind.__name__ for kind in RULES)}, "
                "PopRiskAdamW and gated(). Pass rule=poprisk.path.realized_update(momentum=...), "
                "which is exact for displacements only, or give the optimizer a method "
                "step_rule(param, context)."
            )
        rule, key = RULES[type(optimizer)]
    else:
        key = ""
    found = rule

    def of_any(param: Tensor, context: StepContext) -> StepRule:
        return found(context)

    return Description(of_any, _Momentum(optimizer, key))


class _Momentum:
    """Looks a parameter's momentum up in the state of its optimizer."""

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        self.optimizer, self.key = optimizer, key

    def __call__(self, p: Tensor) -> Tensor | None:
        return self.optimizer.state.get(p, {}).get(self.key)


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group.get("maximize", False) else 1.0
