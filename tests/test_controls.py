from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from asserts import assert_bitwise, assert_close
from cases import MASKS
from poprisk import PopRiskAdamW
from poprisk_lab.controls import RmsMatched, ShuffledMask, UpdateTrace, rms
from samplers import (
    copies,
    grad_rows,
    noisy_grads,
    observed_masks,
    parameter,
    take_steps,
    trajectory,
)

each_mask = pytest.mark.parametrize("mask", MASKS)
DECAY = {"lr": 0.05, "weight_decay": 0.4}


def sorted_rows(tensors: list[Tensor]) -> list[Tensor]:
    return [t.flatten().sort().values for t in tensors]


@each_mask
def test_shuffling_keeps_the_values_of_each_tensor_and_moves_them(mask: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, float] = {"alpha": 0.5, "softness": 0.1, "eps": 0.0, "var_scale": 1.0}
    mean_sq = [parameter(4, 30, seed=j).detach().square() for j in range(2)]
    var = [parameter(4, 30, seed=9 + j).detach().square() for j in range(2)]
    shuffled = ShuffledMask(mask)

    def evaluate(function: Any) -> list[Tensor]:
        return function([x.clone() for x in mean_sq], var, **settings)

    plain, one, two = evaluate(shuffled.mask), evaluate(shuffled), evaluate(shuffled)
    assert_bitwise(sorted_rows(one), sorted_rows(plain))
    assert [q.shape for q in one] == [q.shape for q in plain]
    for q, other in ((one, plain), (one, two)):
        assert not any(torch.equal(a, b) for a, b in zip(q, other, strict=True))


def test_a_shuffled_run_has_the_masks_of_the_plain_one() -> None:
    """Of whole tensors: the fast path must not shuffle within its blocks."""
    grads = noisy_grads(5, 50_000, 3)
    plain = observed_masks(grads)
    torch.manual_seed(0)
    shuffled = observed_masks(grads, mask=ShuffledMask("soft"))
    torch.manual_seed(0)
    assert_bitwise(observed_masks(grads, mask=ShuffledMask("soft"), foreach=False), shuffled)
    assert_close(sorted_rows(shuffled), sorted_rows(plain), 1e-9)
    correlation = torch.stack([plain[-1].flatten(), shuffled[-1].flatten()]).corrcoef()[0, 1]
    assert abs(correlation) < 0.02


def test_a_shuffled_run_is_reproducible() -> None:
    def run() -> list[list[Tensor]]:
        torch.manual_seed(7)
        rows = [[g] for g in noisy_grads(5, 9)]
        return trajectory(
            lambda ps: PopRiskAdamW(ps, mask=ShuffledMask("soft")), [parameter(9)], rows
        )

    assert_bitwise(run(), run())


def test_rms() -> None:
    assert_bitwise(
        rms(torch.tensor([[3.0], [-4.0]])), torch.tensor(12.5, dtype=torch.float64).sqrt()
    )


def traced(starts: list[Parameter], rows: list[list[Tensor]], **settings: Any) -> UpdateTrace:
    """The trace of a gated run."""
    opt, trace = PopRiskAdamW(copies(starts), **settings), UpdateTrace()
    for row in rows:
        for p, g in zip(opt.param_groups[0]["params"], row, strict=True):
            p.grad = g
        trace.record_step(opt)
    return trace


def test_the_trace_is_the_rms_of_what_the_step_adds() -> None:
    starts = [parameter(6), parameter(2, 3)]
    rows = grad_rows(starts, 8)
    weights = trajectory(lambda ps: PopRiskAdamW(ps, lr=0.05, weight_decay=0.0), starts, rows)
    before = [[p.detach() for p in starts], *weights]
    expected = [
        [rms(b - a).item() for a, b in zip(*pair, strict=True)]
        for pair in zip(before, weights, strict=False)
    ]
    trace = traced(starts, rows, lr=0.05, weight_decay=0.0)
    assert trace.rms == [pytest.approx(row, rel=1e-12) for row in expected]


def test_steps_that_another_takes_are_traced_as_well() -> None:
    starts = [parameter(6), parameter(2, 3)]
    rows = grad_rows(starts, 8)
    expected = traced(starts, rows, **DECAY)
    opt, trace = PopRiskAdamW(copies(starts), **DECAY), UpdateTrace()
    handles = trace.follow(opt)
    take_steps(opt, rows)
    assert trace.rms == expected.rms
    for handle in handles:
        handle.remove()
    take_steps(opt, rows[:1])
    assert len(trace.rms) == len(rows)


def test_the_trace_leaves_weight_decay_out() -> None:
    starts = [parameter(6), parameter(2, 3)]
    rows = grad_rows(starts, 8)
    plain, decayed = (traced(starts, rows, lr=0.05, weight_decay=d).rms for d in (0.0, 5.0))
    assert decayed == [pytest.approx(row, rel=1e-12) for row in plain]


def test_matched_updates_have_the_rms_of_the_trace_and_the_direction_of_adamw() -> None:
    starts = [parameter(6), parameter(2, 3)]
    rows = grad_rows(starts, 8)
    trace = traced(starts, rows, **DECAY)
    params = copies(starts)
    matched = RmsMatched(torch.optim.AdamW(params, **DECAY), trace)
    adam = trajectory(lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.0), starts, rows)
    directions = [
        [b - a for a, b in zip(*pair, strict=True)]
        for pair in zip([[p.detach() for p in starts], *adam], adam, strict=False)
    ]
    for row, expected, direction in zip(rows, trace.rms, directions, strict=True):
        decayed = [p.detach() * (1 - 0.05 * 0.4) for p in params]
        take_steps(matched, [row])
        updates = [p.detach() - w for p, w in zip(params, decayed, strict=True)]
        assert [rms(u).item() for u in updates] == pytest.approx(expected, rel=1e-12)
        for u, d in zip(updates, direction, strict=True):
            torch.testing.assert_close(u * rms(d), d * rms(u), rtol=1e-12, atol=1e-12)


def test_a_trace_that_is_used_up_leaves_weight_decay_alone() -> None:
    w = parameter(5)
    opt = RmsMatched(torch.optim.AdamW([w], **DECAY), UpdateTrace())
    expected = w.detach() * (1 - 0.05 * 0.4) ** 3
    take_steps(opt, [[g] for g in noisy_grads(3, 5)])
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=0)


def test_a_zero_update_stays_zero() -> None:
    w = parameter(5)
    opt = RmsMatched(torch.optim.AdamW([w], lr=0.1, weight_decay=0.0), UpdateTrace([[0.3]]))
    before = w.detach().clone()
    take_steps(opt, [[torch.zeros_like(w)]])
    assert_bitwise(w.detach(), before)


def test_a_matched_run_goes_on_after_a_load() -> None:
    start = parameter(6)
    rows = [[g] for g in noisy_grads(6, 6)]
    trace = traced([start], rows, **DECAY)

    def build(params: list[Parameter]) -> RmsMatched:
        return RmsMatched(torch.optim.AdamW(params, **DECAY), trace)

    expected = trajectory(build, [start], rows)
    first = build(copies([start]))
    weights = take_steps(first, rows[:3])
    second = build(copies(weights[-1]))
    second.load_state_dict(first.state_dict())
    assert_bitwise(weights + take_steps(second, rows[3:]), expected)
