from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from asserts import assert_bitwise, assert_close, complete_state, nothing_changes, ulps_apart
from cases import (
    ALPHAS,
    ALWAYS_OPEN,
    LAYOUTS,
    MASKS,
    MODES,
    PATHS,
    REDUCTIONS,
    VARIANCES,
    settings,
)
from poprisk import GateStats, PopRiskAdamW
from poprisk.optim import gate
from poprisk.optim.stats import gate_sums
from poprisk.optim.update import BLOCK, CHUNK, TensorLists, cache_blocks
from reference.optimizer import ReferenceOptimizer
from samplers import copies, grad_rows, noisy_grads, parameter, randn, take_steps, trajectory

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_torch_path = pytest.mark.parametrize(
    "path", [PATHS["loop"], PATHS["foreach"]], ids=["loop", "foreach"]
)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def reference_trajectory(start: Tensor, grads: list[Tensor | None], **changes: Any) -> list[Tensor]:
    """Weights after each step; a step without gradient leaves them."""
    reference = ReferenceOptimizer(start, **settings(**changes))
    weights = [start.detach()]
    for g in grads:
        weights.append(weights[-1] if g is None else reference.step(g))
    return weights[1:]


def assert_equals_reference(grads: list[Tensor | None], **changes: Any) -> None:
    """All paths agree with the reference after every step."""
    start = parameter(3)
    expected = reference_trajectory(start, grads, **changes)
    for path in PATHS.values():
        actual = trajectory(
            lambda ps: PopRiskAdamW(ps, **settings(**changes), **path),  # noqa: B023
            [start],
            [[g] for g in grads],
        )
        assert_close([w for (w,) in actual], expected, 1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
@each_mask
@pytest.mark.parametrize("alpha", ["auto finite", "number"])
def test_equals_the_reference(
    mask: str, mode: str, reduction: str | None, variance: str, alpha: str
) -> None:
    assert_equals_reference(
        [*noisy_grads(60, 3)],
        mask=mask,
        mode=mode,
        reduction=reduction,
        variance=variance,
        **ALPHAS[alpha],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", ["auto stream", "fresh", "finite"])
@each_mask
def test_equals_the_reference_with_every_threshold(mask: str, mode: str, alpha: str) -> None:
    assert_equals_reference([*noisy_grads(60, 3)], mask=mask, mode=mode, **ALPHAS[alpha])


@pytest.mark.parametrize(
    "changes",
    [
        {"maximize": True},
        {"q_min": 0.2},
        {"betas": (0.0, 0.9), "mask": "hard"},
        {"weight_decay": 0.0, "rho": 0.0, "softness": 2.0, "z": 0.5},
        {"gate": False},
    ],
    ids=str,
)
def test_equals_the_reference_with_other_settings(changes: dict[str, Any]) -> None:
    assert_equals_reference([*noisy_grads(60, 3)], **changes)


def test_a_gradient_that_comes_late_or_not_every_step_has_its_own_clock() -> None:
    grads: list[Tensor | None] = [*noisy_grads(30, 3)]
    for t in (0, 1, 2, 7, 12, 13):
        grads[t] = None
    assert_equals_reference(grads)


@each_path
def test_groups_keep_their_own_settings(path: dict[str, Any]) -> None:
    changes: list[dict[str, Any]] = [
        {"mask": "hard", "lr": 0.1, "alpha": 0.3},
        {"mask": "snr", "mode": "paper", "betas": (0.5, 0.9), "weight_decay": 0.0},
        {"gate": False},
        {"variance": "second-moment", "reduction": "per_tensor", "maximize": True},
        {"q_min": 0.4, "batch_size": 5, "dataset_size": 50, "rho": 0.5},
    ]
    starts = [parameter(3, seed=j) for j in range(len(changes))]
    rows = grad_rows(starts, 30)
    groups = [
        {"params": [p], **settings(**c)} for p, c in zip(copies(starts), changes, strict=True)
    ]
    weights = take_steps(PopRiskAdamW(groups, **path), rows)
    for j, change in enumerate(changes):
        expected = reference_trajectory(starts[j], [row[j] for row in rows], **change)
        assert_close([row[j] for row in weights], expected, 1e-12)


def adamw_pair(
    starts: list[Parameter],
    open_gate: dict[str, Any],
    path: dict[str, Any],
    steps: int,
    **shared: Any,
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Trajectories of an optimizer whose gate is always open and of AdamW's loop."""
    rows = grad_rows(starts, steps)
    shared = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, **shared}
    ours = trajectory(lambda ps: PopRiskAdamW(ps, **shared, **open_gate, **path), starts, rows)
    adamw = trajectory(lambda ps: torch.optim.AdamW(ps, **shared, foreach=False), starts, rows)
    return ours, adamw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("open_gate", ALWAYS_OPEN.values(), ids=ALWAYS_OPEN)
@each_torch_path
def test_an_open_gate_is_adamw(
    open_gate: dict[str, Any], dtype: torch.dtype, path: dict[str, Any]
) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (1,), (17,), (5, 3), (4, 2, 3))]
    ours, adamw = adamw_pair(starts, open_gate, path, 100)
    if path == PATHS["loop"]:
        assert_bitwise(ours, adamw)
    pairs = [pair for rows in zip(ours, adamw, strict=True) for pair in zip(*rows, strict=True)]
    assert max(ulps_apart(*pair) for pair in pairs) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("open_gate", ALWAYS_OPEN.values(), ids=ALWAYS_OPEN)
@each_torch_path
def test_an_open_gate_is_adamw_on_large_tensors(
    open_gate: dict[str, Any], dtype: torch.dtype, path: dict[str, Any]
) -> None:
    starts = [parameter(2 * CHUNK + 7, dtype=dtype), parameter(300, 500, dtype=dtype)]
    ours, adamw = adamw_pair(starts, open_gate, path, 3)
    if path == PATHS["loop"]:
        assert_bitwise(ours, adamw)
    assert max(ulps_apart(a, b) for a, b in zip(ours[-1], adamw[-1], strict=True)) <= 1


@pytest.mark.parametrize(
    "shared",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.0)},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
    ],
    ids=str,
)
def test_an_open_gate_is_adamw_with_other_settings(shared: dict[str, Any]) -> None:
    ours, adamw = adamw_pair([parameter(9)], {"gate": False}, PATHS["loop"], 30, **shared)
    assert_bitwise(ours, adamw)


def compare_paths(starts: list[Parameter], **changes: Any) -> None:
    """Loop and foreach end with the same weights and state bit for bit."""
    rows = grad_rows(starts, 5)
    states = []
    for foreach in (False, True):
        opt = PopRiskAdamW(copies(starts), **changes, foreach=foreach)
        take_steps(opt, rows)
        states.append(complete_state(opt, but={"foreach"}))
    assert_bitwise(states[1], states[0])


@each_layout
@each_mask
def test_foreach_is_the_loop(layout: str, mask: str) -> None:
    compare_paths([LAYOUTS[layout]() for _ in range(2)], mask=mask, z=1.0)


@each_mask
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_foreach_is_the_loop_for_all_layouts_at_once(
    mask: str, variance: str, reduction: str | None
) -> None:
    """Some of these tensors fill a block together, some are cut, some go whole."""
    starts = [make() for make in LAYOUTS.values()]
    starts += [parameter(CHUNK // 3, seed=j, dtype=torch.float32) for j in range(5)]
    compare_paths(starts, mask=mask, variance=variance, reduction=reduction, z=1.0)


def test_small_tensors_go_together_and_large_ones_in_pieces() -> None:
    """Where there is no state of variances, its column stays empty."""
    sizes = [BLOCK // 2, BLOCK // 2, 3, 2 * CHUNK + 5, 4, CHUNK, 5]
    w, g, m, v = columns = [[torch.zeros(n) for n in sizes] for _ in range(4)]
    seen: list[list[int]] = []

    def count(lists: TensorLists) -> None:
        assert lists.variances == []
        seen.append([w.numel() for w in lists.params])
        for column in lists[:4]:
            torch._foreach_add_(column, 1.0)

    cache_blocks(TensorLists(w, g, m, v, []), count)
    pieces = [[CHUNK], [CHUNK], [5]]
    assert seen == [[BLOCK // 2] * 2, *pieces, [3, 4], [CHUNK], [5]]
    assert all(bool((t == 1).all()) for column in columns for t in column)


@each_path
def test_shared_and_expanded_gradients(path: dict[str, Any]) -> None:
    rows = [[g, g, g.expand(3, 4)] for g in noisy_grads(6, 4)]
    starts = [parameter(4), parameter(4, seed=1), parameter(3, 4)]
    clones = [[g.clone() for g in row] for row in rows]
    shared, separate = (
        trajectory(lambda ps: PopRiskAdamW(ps, **path), starts, r) for r in (rows, clones)
    )
    assert_bitwise(shared, separate)


@each_path
def test_large_tensors_with_gradients_of_another_layout(path: dict[str, Any]) -> None:
    starts = [parameter(3, CHUNK), parameter(CHUNK, 2)]
    rows = [[g.expand(3, CHUNK), g.view(2, -1).repeat(1, 2).t()] for g in noisy_grads(3, CHUNK)]
    clones = [[g.contiguous() for g in row] for row in rows]
    views, contiguous = (
        trajectory(lambda ps: PopRiskAdamW(ps, **path), starts, r) for r in (rows, clones)
    )
    assert_bitwise(views, contiguous)


@each_path
@each_layout
def test_the_gradient_is_never_written(layout: str, path: dict[str, Any]) -> None:
    (p, q) = (LAYOUTS[layout]() for _ in range(2))
    rows = grad_rows([p, q], 3)
    before = [[g.clone() for g in row] for row in rows]
    take_steps(PopRiskAdamW([{"params": [p]}, {"params": [q], "maximize": True}], **path), rows)
    assert_bitwise(rows, before)


@each_mask
@pytest.mark.parametrize("maximize", [False, True])
def test_complex_parameters_are_gated_per_real_component(mask: str, maximize: bool) -> None:
    z = parameter(5, dtype=torch.complex128)
    rows = grad_rows([z], 20)
    pairs = [[torch.view_as_real(g)] for (g,) in rows]
    results = [
        trajectory(lambda ps: PopRiskAdamW(ps, mask=mask, maximize=maximize), [start], r)
        for start, r in ((z, rows), (torch.view_as_real(z.detach()), pairs))
    ]
    assert_bitwise([[torch.view_as_real(w)] for (w,) in results[0]], results[1])


@each_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_float32_ones(
    dtype: torch.dtype, path: dict[str, Any]
) -> None:
    low = parameter(50, dtype=dtype)
    high = Parameter(low.detach().float())
    opt, twin = (PopRiskAdamW([p], lr=0.01, **path) for p in (low, high))
    for (g,) in grad_rows([low], 20):
        take_steps(opt, [[g]])
        take_steps(twin, [[g.float()]])
        with torch.no_grad():
            high.copy_(high.to(dtype))
        assert_bitwise(low, high.to(dtype))
    assert {opt.state[low][key].dtype for key in ("exp_avg", "exp_avg_sq", "grad_mean_var")} == {
        torch.float32
    }


@each_mask
@pytest.mark.parametrize("mode", MODES)
def test_small_float16_gradients_do_not_underflow(mask: str, mode: str) -> None:
    w = Parameter(torch.zeros(4, dtype=torch.float16))
    opt = PopRiskAdamW([w], lr=0.1, mask=mask, mode=mode, alpha=0.05, weight_decay=0.0)
    take_steps(opt, [[torch.full((4,), 1e-5, dtype=torch.float16)]] * 5)
    assert bool(w.isfinite().all())
    assert bool((opt.state[w]["exp_avg_sq"] > 0).all())
    if mode == "auto":
        assert bool((w < -0.3).all())


def test_weight_decay_is_not_gated() -> None:
    """A gate that lets nothing pass leaves the decay, and nothing else."""
    w = parameter(5)
    expected = w.detach() * (1 - 0.1 * 0.5) ** 7
    opt = PopRiskAdamW([w], lr=0.1, weight_decay=0.5, mode="paper", mask="hard", alpha=1e6)
    take_steps(opt, [[g] for g in noisy_grads(7, 5)])
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=0)


def test_a_constant_gradient_passes_from_the_second_step_on() -> None:
    """The cold start of the paper (gate 0.1 at step 2) is cured in mode="auto"."""

    def moved(mode: str) -> list[float]:
        weights = trajectory(
            lambda ps: PopRiskAdamW(
                ps, lr=1.0, eps=0.0, weight_decay=0.0, mode=mode, alpha=1.0, softness=1.0
            ),
            [torch.zeros(1, dtype=torch.float64)],
            [[torch.ones(1, dtype=torch.float64)]] * 3,
        )
        return [w.item() for (w,) in weights]

    assert moved("auto") == pytest.approx([-1, -2, -3])
    first, second, _ = moved("paper")
    assert first == 0.0
    s_hat = (0.99 * 1 + 0.9**2) / 1.99  # the deviations are g - 0 and g - (1-β₁)g
    assert second == pytest.approx(-(1 - s_hat))


def closure_for(w: Parameter, calls: list[bool]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        w.grad = None
        loss = w.square().sum()
        loss.backward()
        return loss

    return closure


@each_path
def test_a_closure_is_evaluated_once_with_gradients(path: dict[str, Any]) -> None:
    w = parameter(4)
    opt, calls = PopRiskAdamW([w], **path), list[bool]()
    expected = w.detach().square().sum()
    with torch.no_grad():
        loss: Any = opt.step(closure_for(w, calls))  # pyrefly: ignore
    assert_bitwise(loss.detach(), expected)
    assert calls == [True]
    assert opt.step() is None


def test_a_closure_may_return_nothing() -> None:
    """As with torch; manual optimization in Lightning passes such a one."""
    w, twin = parameter(4), parameter(4)
    opt, plain = PopRiskAdamW([w]), PopRiskAdamW([twin])
    w.grad = twin.grad = randn(4)
    assert opt.step(lambda: None) is None
    plain.step()
    assert_bitwise(w, twin)


def hand_computed(**changes: Any) -> GateStats:
    """Statistics of one tensor after two steps that can be followed by hand.

    Gradients (1, 1), (1, -1), (1, 2) and (0, 0): m̂ = 1, -1/3, 5/3 and ŝ = 0, 4, 1; v̂ = 1, 1, 3.
    """
    w = Parameter(torch.zeros(4, dtype=torch.float64))
    opt = PopRiskAdamW(
        [w], betas=(0.5, 0.5), rho=0.5, eps=1e-30, alpha=1.0, softness=1.0, **changes
    )
    rows = [[torch.tensor(g, dtype=torch.float64)] for g in ([1, 1, 1, 0], [1, -1, 2, 0])]
    take_steps(opt, rows)
    return opt.gate_stats()["groups[0]"]


def test_gate_stats_by_hand() -> None:
    """The fourth coordinate has no gradient and is left out."""
    updates = torch.tensor([1.0, -1 / 3, 5 / 3 / 3**0.5], dtype=torch.float64)
    ungated = updates.square().sum().sqrt()

    def assert_stats(stats: GateStats, q: list[float]) -> None:
        mask = torch.tensor(q, dtype=torch.float64)
        ratio = (mask * updates).square().sum().sqrt() / ungated
        assert stats.pass_rate == pytest.approx(2 / 3)
        assert stats.mean_gate == pytest.approx(mask.mean().item())
        assert stats.update_ratio == pytest.approx(ratio.item())
        assert (stats.starved, stats.coordinates) == (False, 3)

    assert_stats(hand_computed(), [1, 0, 16 / 25])
    assert_stats(hand_computed(mask="hard"), [1, 0, 1])
    assert_stats(hand_computed(mask="snr"), [1, 1 / 37, 25 / 34])
    assert_stats(hand_computed(q_min=0.7), [1, 0.7, 0.7])


@pytest.mark.parametrize(("q_min", "starved"), [(0.0, True), (0.019, True), (0.021, False)])
def test_a_module_is_starved_below_two_percent(q_min: float, starved: bool) -> None:
    opt = PopRiskAdamW([parameter(4)], mask="hard", alpha=1e6, q_min=q_min)
    take_steps(opt, [[g] for g in noisy_grads(5, 4)])
    stats = opt.gate_stats()["groups[0]"]
    assert stats.update_ratio == pytest.approx(q_min, rel=1e-6)
    assert stats.starved is starved


def test_an_ungated_step_passes_everything() -> None:
    opt = PopRiskAdamW([parameter(4)])
    take_steps(opt, [[g] for g in noisy_grads(1, 4)])
    assert opt.gate_stats()["groups[0]"] == GateStats(1.0, 1.0, 1.0, False, 4)


def test_a_coordinate_without_gradient_is_left_out_also_without_eps() -> None:
    opt = PopRiskAdamW([parameter(3)], eps=0.0)
    take_steps(opt, [[torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)]])
    assert opt.gate_stats()["groups[0]"] == GateStats(1.0, 1.0, 1.0, False, 2)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squares_of_updates_neither_vanish_nor_overflow(scale: float) -> None:
    update, active = scale * torch.tensor([3.0, -4.0, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    q, passed = torch.tensor([0.5, 1.0, 1.0]), torch.ones(())
    sums = gate_sums(q, passed, update, active)
    expected = [2.0, 1.5, 2.0, 18.25 * scale**2, 25.0 * scale**2]
    assert sums.tolist() == pytest.approx(expected, rel=1e-6)


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    )


@pytest.mark.parametrize("given", ["module", "named_parameters", "gate_stats"])
def test_module_names(given: str) -> None:
    model = small_model()
    params: dict[str, Any] = {"module": model, "named_parameters": model.named_parameters()}
    opt = PopRiskAdamW(params.get(given, model.parameters()))
    take_steps(opt, grad_rows(list(model.parameters()), 3))
    stats = opt.gate_stats(model if given == "gate_stats" else None)
    assert {name: row.coordinates for name, row in stats.items()} == {"0": 8, "1.0": 6, "1.1": 2}


def test_groups_without_gate_or_gradient_have_no_statistics() -> None:
    params = [parameter(2), parameter(3), parameter(4)]
    opt = PopRiskAdamW([{"params": [p]} for p in params])
    opt.param_groups[1]["gate"] = False
    take_steps(opt, [[*row[:2], None] for row in grad_rows(params, 3)])
    assert set(opt.gate_stats()) == {"groups[0]"}
    assert PopRiskAdamW(params).gate_stats() == {}


def test_statistics_do_not_change_the_optimizer() -> None:
    w = parameter(4)
    opt = PopRiskAdamW([w])
    take_steps(opt, grad_rows([w], 3))
    with nothing_changes(opt):
        opt.gate_stats()


@pytest.mark.parametrize("mask", ["soft", "snr"])
def test_a_public_mask_may_be_given_as_a_function(mask: str) -> None:
    start, rows = parameter(6), [[g] for g in noisy_grads(6, 6)]
    by_name, by_function = (
        trajectory(lambda ps, m=m: PopRiskAdamW(ps, mask=m), [start], rows)
        for m in (mask, getattr(gate, mask))
    )
    assert_bitwise(by_function, by_name)


def test_random_gradients_have_open_and_closed_coordinates() -> None:
    """The comparisons above mean something only if masks are neither all 0 nor all 1."""
    opt = PopRiskAdamW([Parameter(randn(200))], mask="hard")
    take_steps(opt, [[g] for g in noisy_grads(60, 200)])
    assert 0.2 < opt.gate_stats()["groups[0]"].pass_rate < 0.8
