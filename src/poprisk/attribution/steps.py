"""Steps of optimizers backwards: by autograd as a whole, or with the preconditioner held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk.attribution.adjoint import Adjoint, Pulled
from poprisk.optim.step import Description, StepContext, StepRule, joined, sgd_rule

FOLLOWED: Mapping[type[Optimizer], dict[str, Any]] = {
    torch.optim.Adam: {"foreach": False, "fused": False, "capturable": False},
    torch.optim.AdamW: {"foreach": False, "fused": False, "capturable": False},
    torch.optim.RMSprop: {"foreach": False, "capturable": False},
    torch.optim.Adagrad: {"foreach": False, "fused": False},
    torch.optim.Adadelta: {"foreach": False, "capturable": False},
    torch.optim.Adamax: {"foreach": False, "capturable": False},
    torch.optim.NAdam: {"foreach": False, "capturable": False},
    torch.optim.RAdam: {"foreach": False, "capturable": False},
}
"""Optimizers of torch whose step autograd goes through, and with which settings.

SGD is none: it cuts its first momentum off the graph, and its rule is exact.
"""
WEIGHTS, GRADIENT = "weights", "gradient"
NUDGE = 1e-15
"""In place of a gradient of 0: there the root of a second moment has no derivative, but the step,
whose momentum is 0 too, has one."""

State = list[dict[str, Any]]
"""What an optimizer keeps of each parameter."""
Settings = dict[str, Any]
"""Of a parameter group, without its parameters."""
Entry = tuple[str, int]
"""What it is, and of which parameter."""


class TakenStep(NamedTuple):
    """A step and all that it started from.

    Attributes:
        kind: of optimizer.
        groups: settings of each, and the positions of its parameters.
        weights: before it.
        state: before it.
        grads: of each parameter; None for one that was left out.
    """

    kind: type[Optimizer]
    groups: Sequence[tuple[Settings, Sequence[int]]]
    weights: Sequence[Tensor]
    state: State
    grads: Sequence[Tensor | None]

    def pull(self, after: Adjoint) -> Pulled:
        """Backwards through the whole step, what second moments answer included."""
        numels = [w.numel() for w in self.weights]

        def rows(name: str) -> Sequence[Tensor]:
            whole = after.weights if name == WEIGHTS else after.of_state(name)
            return whole.split(numels, 1)

        with torch.enable_grad():
            before = self._leaves()
            ends = self._take(before)
        found = [
            torch.autograd.grad(
                [*ends.values()],
                [*before.values()],
                [rows(name)[i][q].view_as(end) for (name, i), end in ends.items()],
                retain_graph=True,
                allow_unused=True,
            )
            for q in range(len(after.weights))
        ]
        slopes = dict(zip(before, zip(*found, strict=True), strict=True))

        def joined(name: str) -> Tensor:
            """(q, P); zero where nothing follows from it."""
            parts = list[Tensor]()
            for i, w in enumerate(self.weights):
                some = slopes.get((name, i), (None,) * len(found))
                parts.append(torch.stack([_or_zero(s, w).flatten() for s in some]))
            return torch.cat(parts, 1)

        names = {name for name, _ in before} - {WEIGHTS, GRADIENT}
        return Pulled(
            joined(GRADIENT), Adjoint(joined(WEIGHTS), {name: joined(name) for name in names})
        )

    def _leaves(self) -> dict[Entry, Tensor]:
        """All numbers per weight that the step starts from."""
        found = dict[Entry, Tensor]()
        for i, (w, grad, state) in enumerate(
            zip(self.weights, self.grads, self.state, strict=True)
        ):
            moved = None if grad is None else grad.masked_fill(grad == 0, NUDGE)
            entries = {WEIGHTS: w, GRADIENT: moved, **state}
            for name, value in entries.items():
                if isinstance(value, Tensor) and is_per_weight(value, w):
                    found[name, i] = value.detach().requires_grad_()
        return found

    def _take(self, before: Mapping[Entry, Tensor]) -> dict[Entry, Tensor]:
        """The step on copies that carry a graph; weights and state after it."""
        moving = [before[WEIGHTS, i].clone() for i in range(len(self.weights))]
        plain = {**FOLLOWED[self.kind], "differentiable": True}
        groups = [
            {**settings, **plain, "params": [moving[i] for i in places]}
            for settings, places in self.groups
        ]
        optimizer: Any = self.kind(groups, **plain)  # pyrefly: ignore
        for i, (w, state) in enumerate(zip(moving, self.state, strict=True)):
            w.retain_grad()
            w.grad = before.get((GRADIENT, i))
            if state:
                kept = {k: before.get((k, i), v) for k, v in state.items()}
                optimizer.state[w] = {k: copied(v) for k, v in kept.items()}
        optimizer.step()
        ends = {(WEIGHTS, i): w for i, w in enumerate(moving)}
        for i, w in enumerate(moving):
            for name, value in optimizer.state.get(w, {}).items():
                if is_per_weight(value, w) and value.requires_grad:
                    ends[name, i] = value
        return ends


def is_per_weight(value: Any, weight: Tensor) -> bool:
    """Whether something is a number for each weight, through which gradients go."""
    return isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()


def copied(value: Any) -> Any:
    """A copy of a tensor, its graph included; anything else itself."""
    return value.clone() if isinstance(value, Tensor) else value


def _or_zero(slope: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if slope is None else slope


def held_rule(
    optimizer: Optimizer,
    description: Description,
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor | None],
) -> StepRule:
    """The rule of the step just taken: numbers where they are the same, or (P,).

    Args:
        optimizer: after the step.
        description: of its rules.
        params: with the gradients that it used.
        weights: before the step.
        momentum: before it; None where there was none. Of SGD only that is asked.
    """
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    rules = list[StepRule]()
    for p, w, m in zip(params, weights, momentum, strict=True):
        if p.grad is None:
            rules.append(StepRule(precondition=0.0, carry=1.0, gain=0.0))
            continue
        if type(optimizer) is torch.optim.SGD:  # spares differences of all weights
            rules.append(sgd_rule(groups[p], first=m is None))
            continue
        state, start = optimizer.state.get(p, {}), torch.zeros_like(w) if m is None else m
        context = StepContext(groups[p], state, m is None, p.detach() - w, p.grad, w, start)
        rules.append(description.rule(p, context))
    return joined(rules, weights)
