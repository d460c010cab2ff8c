"""The recursion of momentum and weights in many columns, against its equations by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from poprisk.optim.step import StepRule
from poprisk.path.recursion import Recursion
from samplers import randn

P, COLUMNS, B = 7, 4, 3


def rule_of(kind: str, steps: int = 1) -> StepRule:
    """Every coefficient another number, or another vector."""

    def number(k: int) -> Any:
        return 0.1 * k if kind != "tensors" else (0.1 * k * (1 + 0.1 * torch.arange(P))).double()

    column = (1.0 + torch.arange(P) / P).double()
    if kind == "usual":  # the quick way of one step that reads the momentum
        return StepRule(column[:, None], 1.25, 0.9, 0.4, coupled=0.3, decay=0.05)
    values = [number(k) for k in range(2, 9)]
    if kind == "tensors":
        values = [v[:, None] for v in values]
    return StepRule(column[:, None], *values, sign=-1.0, steps=steps)


def by_hand(
    rule: StepRule, m: Tensor, z: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Momentum, r and V of the equations, one step after the other."""
    r_sum, v_sum = torch.zeros_like(m), torch.zeros_like(m)
    for _ in range(rule.steps):
        g = rule.sign * gradient + rule.coupled * z
        m = rule.carry * m + rule.gain * g
        r = rule.from_momentum * m + rule.from_gradient * g
        r_sum = r_sum + r
        v_sum = v_sum + rule.correction * rule.precondition * r + rule.decay * z
    return m, r_sum, v_sum


@pytest.mark.parametrize("on", ["weights", "moved", "nothing"])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(
    ("kind", "steps"),
    [("usual", 1), ("numbers", 1), ("numbers", 3), ("tensors", 1), ("tensors", 4)],
)
def test_a_step_is_its_equations(kind: str, steps: int, factored: bool, on: str) -> None:
    """Decay acts on the weights, in the last column; on what each column moved; or on nothing."""
    rule, m, z = rule_of(kind, steps), randn(P, COLUMNS), torch.zeros(P, COLUMNS).double()
    weights, moved = randn(P) if on == "weights" else None, None
    if weights is not None:
        z[:, -1] = weights
    elif on == "moved":
        z = randn(P, COLUMNS)
        moved = z.clone()
    left, right = randn(P, B), randn(B, COLUMNS)
    expected = by_hand(rule, m.clone(), z, left @ right)
    recursion, factors = Recursion(m.clone(), moved), (left, right) if factored else (left @ right,)
    r, v = recursion.step(rule, *factors, weights=weights)
    close = torch.testing.assert_close
    close(r.clone(), expected[1])
    close(v, expected[2])
    close(recursion.momentum, expected[0])
    if moved is not None:
        close(moved, z - v)


def test_some_of_the_weights_step_alone() -> None:
    rule, m, z, g = rule_of("numbers"), *(randn(P, COLUMNS, seed=s) for s in range(3))
    rule = rule._replace(precondition=1.5)
    moved = z.clone()
    whole, parts = Recursion(m.clone(), z.clone()), Recursion(m.clone(), moved)
    v = whole.step(rule, g)[1]
    found = [parts.step(rule.part(rows), g[rows], rows=rows)[1] for rows in (slice(3), slice(3, P))]
    assert torch.equal(torch.cat(found), v)
    assert torch.equal(parts.momentum, whole.momentum)
    assert torch.equal(moved, z - v)


@pytest.mark.parametrize(
    ("change", "usual"),
    [
        ({}, (0.9, 0.4)),
        ({"from_momentum": 0.5}, None),
        ({"from_gradient": 0.5}, None),
        ({"sign": -1.0}, None),
        ({"steps": 2}, None),
        ({"carry": torch.ones(P, 1)}, None),
    ],
)
def test_the_quick_way_is_for_plain_momentum(
    change: dict[str, Any], usual: tuple[float, float] | None
) -> None:
    assert rule_of("usual")._replace(**change).usual() == usual
