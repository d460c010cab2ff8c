"""The estimate of the twins against its naive form, number by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk.risk.estimate import TwinOutputs, estimate_risk
from reference import twin as reference
from samplers import randn

N = 14
GROUPS = [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 8]
PARTS = [0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def poisson(u: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(u, y, reduction="none").sum(1)


def coupled(u: Tensor, y: Tensor) -> Tensor:
    """No softmax, and not separate either."""
    between = u[:, 0] * u[:, 1] + 0.3 * u.square().sum(1).square()
    return 0.1 * (u - y).square().sum(1) + 0.1 * between


def absolute(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).abs().sum(1)


def huber(u: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(u, y, reduction="none", beta=0.05).sum(1)


LOSSES: dict[str, tuple[Loss, int, bool]] = {
    "squared error": (squared, 3, False),
    "cross-entropy": (cross_entropy, 2, False),
    "Poisson": (poisson, 3, False),
    "coupled": (coupled, 3, False),
    "absolute error": (absolute, 3, True),
    "Huber": (huber, 3, True),
}
"""A loss of three outputs, their degrees of freedom, and whether it bends over what moves."""


def run_of(name: str, probes: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Outputs, targets, and twins whose outputs follow their pushes in part."""
    u = randn(N, 3)
    pushes = [randn(N, 3, seed=10 + k).sign() * 0.02 for k in range(probes)]
    if name == "cross-entropy":
        y = torch.arange(N) % 3
        pushes = [p - p.mean(1, keepdim=True) for p in pushes]
    elif name == "Poisson":
        y = (randn(N, 3, seed=1).abs() * 2).round()
    else:
        y = randn(N, 3, seed=1)
    size = 0.9 if LOSSES[name][2] else 0.02
    if LOSSES[name][2]:
        pushes = [40 * p for p in pushes]  # across the kinks
    shares = torch.linspace(0.05, 0.3, N).double()[:, None]
    twins = [
        (u + shares * p + 0.05 * size * randn(N, 3, seed=20 + k), p) for k, p in enumerate(pushes)
    ]
    return u, y, twins


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("with_parts", [False, True])
@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_an_estimate_is_its_naive_form(
    name: str, probes: int, with_groups: bool, with_parts: bool
) -> None:
    loss, dimensions, bent = LOSSES[name]
    u, y, twins = run_of(name, probes)
    expected = reference.estimate(
        loss,
        u,
        y,
        twins,
        groups=GROUPS if with_groups else None,
        parts=PARTS if with_parts else None,
        bent=bent,
        dimensions=dimensions,
    )
    found = estimate_risk(
        loss,
        u,
        y,
        [TwinOutputs(*t) for t in twins],
        groups=torch.tensor(GROUPS) if with_groups else None,
        parts=torch.tensor(PARTS) if with_parts else None,
    )
    assert found.dof == near(expected.dof)
    assert found.dof_error == near(expected.dof_error)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-7, atol=1e-9)
    assert found.value == near(expected.value)
    assert found.standard_error == near(expected.standard_error)
    torch.testing.assert_close(found.influence, expected.influence, rtol=1e-6, atol=1e-10)
    assert [p.dof for p in found.parts] == [near(v) for v in expected.part_dofs]
    assert found.train_loss == near(float(loss(u, y).mean()))


@pytest.mark.parametrize("name", ["cross-entropy", "absolute error"])
def test_examples_without_a_loss_change_nothing(name: str) -> None:
    """Neither in the numbers nor in whose they are."""
    loss, _, _ = LOSSES[name]
    u, y, twins = run_of(name, 2)
    alone = estimate_risk(loss, u, y, [TwinOutputs(*t) for t in twins], groups=torch.tensor(GROUPS))
    gone = torch.tensor([0, 5, 9, 16])
    kept = torch.tensor([i for i in range(N + 4) if i not in gone.tolist()])

    def wider(rows: Tensor, fill: float) -> Tensor:
        found = torch.full((N + 4, *rows.shape[1:]), fill, dtype=rows.dtype)
        return found.index_copy(0, kept, rows)

    def masked(v: Tensor, t: Tensor) -> Tensor:
        if name == "cross-entropy":
            return F.cross_entropy(v, t, reduction="none", ignore_index=-100)
        known = ~t.isnan().any(1)
        return torch.where(known, loss(v, t.nan_to_num(0.0)), 0.0)

    fill = -100 if name == "cross-entropy" else float("nan")
    more = [TwinOutputs(wider(o, 7.0), wider(p, 0.02)) for o, p in twins]
    groups = wider(torch.tensor(GROUPS), 3)
    found = estimate_risk(masked, wider(u, 5.0), wider(y, fill), more, groups=groups)
    assert found.value == pytest.approx(alone.value, rel=1e-12)
    assert found.standard_error == pytest.approx(alone.standard_error, rel=1e-12)
    assert found.counted is not None
    assert found.counted.nonzero().squeeze(1).tolist() == kept.tolist()
    torch.testing.assert_close(found.influence[:, kept], alone.influence)
    torch.testing.assert_close(found.outputs[kept], alone.outputs)
    assert not found.influence[:, gone].any()
    assert not found.losses[gone].any()
    assert bool((found.outputs[gone] == 5.0).all())
