"""The rule of each optimizer is the step that it takes, on one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

from poprisk.optim.step import Rule, adam, describe
from poprisk.path import StepContext, StepRule, realized_update
from samplers import noisy_grads, parameter, take_steps

BUILDS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.1, weight_decay=0.2),
    "SGD momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.2),
    "SGD dampening": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.3),
    "SGD dampening only": lambda ps: SGD(ps, lr=0.1, dampening=0.3),
    "SGD Nesterov": lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2),
    "SGD maximize": lambda ps: SGD(ps, lr=0.1, momentum=0.5, maximize=True, weight_decay=0.2),
    "Adam": lambda ps: Adam(ps, lr=0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=0.2),
    "Adam AMSGrad": lambda ps: Adam(ps, lr=0.1, betas=(0.8, 0.5), amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=0.2),
    "AdamW maximize": lambda ps: AdamW(ps, lr=0.1, maximize=True, weight_decay=0.2),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.1, alpha=0.9, eps=0.1, weight_decay=0.2),
    "RMSprop momentum": lambda ps: RMSprop(ps, lr=0.1, momentum=0.9, weight_decay=0.2),
    "RMSprop centred": lambda ps: RMSprop(ps, lr=0.1, centered=True, maximize=True),
}


def assert_rule_is_the_step(optimizer: Optimizer, rule: Rule | None = None) -> list[StepRule]:
    """Ten steps of a parameter are what their rules say; so is the momentum, where one is kept."""
    described, found = describe(optimizer, rule), list[StepRule]()
    (p,) = optimizer.param_groups[0]["params"]
    m = torch.zeros_like(p)
    for g in noisy_grads(10, *p.shape):
        w, first = p.detach().clone(), described.momentum(p) is None
        take_steps(optimizer, [[g]])
        group, state = optimizer.param_groups[0], optimizer.state[p]
        step = described.rule(p, StepContext(group, state, first, p.detach() - w, g, w, m))
        seen = step.sign * g + step.coupled * w
        m = step.carry * m + step.gain * seen
        r = step.from_momentum * m + step.from_gradient * seen
        moved: Tensor = -step.correction * step.precondition * r - step.decay * w
        torch.testing.assert_close(p.detach() - w, moved, rtol=1e-10, atol=1e-12)
        kept = described.momentum(p)
        if kept is not None:
            torch.testing.assert_close(kept, m, rtol=1e-10, atol=1e-12)
        found.append(step)
    return found


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_rule_is_the_step(build: Callable[[Any], Optimizer]) -> None:
    assert_rule_is_the_step(build([parameter(5)]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_realized_update_is_the_step(momentum: float) -> None:
    steps = assert_rule_is_the_step(NAdam([parameter(5)]), realized_update(momentum=momentum))
    assert {(s.carry, s.gain) for s in steps} == {(momentum, 1 - momentum)}


def test_no_momentum_by_default_and_no_scale_where_there_is_no_gradient() -> None:
    g, update = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    rule = realized_update()(StepContext({}, {}, False, update, g, g, g))
    assert isinstance(rule.precondition, Tensor)
    assert rule.precondition.tolist() == [0.0, 0.5]
    assert (rule.carry, rule.gain) == (0.0, 1.0)


@pytest.mark.parametrize("said", [None, False, True])
def test_the_decay_of_adam_is_coupled_unless_its_group_says_otherwise(said: bool | None) -> None:
    """Groups of an older torch, or from its checkpoints, do not say."""
    w = parameter(3)
    optimizer = Adam([w], lr=0.1, weight_decay=0.2)
    take_steps(optimizer, [[torch.ones(3, dtype=torch.float64)]])
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "decoupled_weight_decay"}
    if said is not None:
        group["decoupled_weight_decay"] = said
    context = StepContext(group, optimizer.state[w], False, w, w, w, w)
    assert (adam(context).coupled, adam(context).decay) == (
        (0.0, 0.1 * 0.2) if said else (0.2, 0.0)
    )
