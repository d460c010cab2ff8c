"""The gate's part of another optimizer's step: the native kernel against foreach, bit for bit."""

from __future__ import annotations

import array
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from asserts import assert_bitwise, assert_close, complete_state
from cases import DECOUPLED, LAYOUTS, MASKS, MODES, REDUCTIONS
from poprisk import gated
from poprisk.optim import keep
from poprisk.optim.fused import build, wrapped
from poprisk.optim.settings import compiled
from poprisk.optim.update import TensorLists
from samplers import copies, grad_rows, parameter, randn, take_steps

each_mask = pytest.mark.parametrize("mask", MASKS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
Build = Callable[[list[Parameter]], Optimizer]


class DecayLast(Optimizer):
    """Weights shrink after the update, and the update with them."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad).mul_(1 - group["lr"] * group["weight_decay"])


BUILDS: dict[str, Build] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "decay first": lambda ps: torch.optim.AdamW(ps, lr=0.01, eps=1e-3, weight_decay=0.5),
    "decay last": DecayLast,
}
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def both_paths(
    build: Build, starts: list[Parameter], rows: list[list[Tensor]], **changes: Any
) -> list[dict[str, Any]]:
    """Weights, states, the gate's included, and its statistics, by the kernel and by foreach."""
    found = []
    for path in (True, False):
        opt = gated(build(copies(starts)), fused=path, **changes)
        take_steps(opt, rows)
        stats = {name: tuple(row) for name, row in opt.gate_stats().items()}
        found.append({**complete_state(opt), "updates": [*opt._updates.values()], "stats": stats})
    return found


@each_build
@each_mask
@pytest.mark.parametrize("mode", MODES)
@each_reduction
def test_fused_is_foreach_for_all_layouts_at_once(
    build: Build, mask: str, mode: str, reduction: str | None
) -> None:
    starts = [make() for make in LAYOUTS.values()]
    rows = grad_rows(starts, 4)
    changes: dict[str, Any] = {"mask": mask, "mode": mode, "reduction": reduction, "z": 1.0}
    ours, foreach = both_paths(build, starts, rows, **changes)
    assert_bitwise(ours, foreach)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_min": 0.3},
        {"gate": False},
        {"beta1": 0.3, "rho": 0.2},
        {"beta1": 0.0},
        {"batch_size": 5, "dataset_size": 50, "eps": 0.1, "mode": "paper"},
        {"softness": 0.0, "alpha": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_build
@each_mask
def test_fused_is_foreach_for_other_settings(
    mask: str, build: Build, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (7,), (64,), (129,), (20, 31))]
    ours, foreach = both_paths(build, starts, grad_rows(starts, 12), mask=mask, **changes)
    assert_bitwise(ours, foreach)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_all_passes_the_step_is_the_optimizers_own_bit_for_bit(dtype: torch.dtype) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (17,), (300, 500))]
    rows = grad_rows(starts, 10)
    build = BUILDS["SGD"]
    alone = take_steps(build(copies(starts)), rows)
    assert_bitwise(take_steps(gated(build(copies(starts)), fused=True, q_min=1.0), rows), alone)


@pytest.mark.usefixtures("threads")
@each_reduction
def test_threads_change_nothing(reduction: str | None) -> None:
    starts = [parameter(n, seed=n, dtype=torch.float32) for n in (3, 70_000, 1, 100_001, 64)]
    rows = grad_rows(starts, 4)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found = both_paths(BUILDS["SGD"], starts, rows, reduction=reduction)[0]
        results.append({k: v for k, v in found.items() if k != "stats"})  # which torch sums up
    for other in results[1:]:
        assert_bitwise(other, results[0])


@pytest.fixture
def no_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("by foreach")

    monkeypatch.setattr(keep, "update_lists", refused)


@pytest.mark.usefixtures("no_foreach")
def test_the_kernel_takes_everything_that_is_dense() -> None:
    starts = [make() for make in LAYOUTS.values()]
    opt = gated(BUILDS["SGD"](copies(starts)))
    take_steps(opt, grad_rows(starts, 3))
    with pytest.raises(AssertionError, match="by foreach"):
        take_steps(gated(BUILDS["SGD"](copies(starts)), fused=False), grad_rows(starts, 1))


@pytest.mark.usefixtures("no_foreach")
def test_a_mask_that_is_a_function_stays_with_foreach() -> None:
    def half(mean_sq: list[Tensor], var: list[Tensor], **_: float) -> list[Tensor]:
        return [torch.full_like(x, 0.5) for x in mean_sq]

    w = parameter(3)
    with pytest.raises(AssertionError, match="by foreach"):
        take_steps(gated(BUILDS["SGD"]([w]), mask=half), grad_rows([w], 1))


def views(how: str) -> list[Parameter]:
    """Parameters with holes, or such that share memory, beside one of the usual kind."""
    base = randn(6, 8, dtype=torch.float32)
    flat = base.flatten()
    weights = {
        "holes": [base[:, ::2]],
        "the same memory": [flat[:9], flat[:9]],
        "overlapping": [flat[:9], flat[8:20]],
        "side by side": [flat[9:20], flat[:9]],
    }[how]
    return [*map(Parameter, weights), parameter(5, dtype=torch.float32)]


@pytest.mark.parametrize("how", ["holes", "the same memory", "overlapping", "side by side"])
@each_build
def test_parameters_with_gaps_or_shared_memory_are_left_to_foreach(build: Build, how: str) -> None:
    """One after the other, the kernel would gate the second on what it kept of the first."""
    found = []
    for path in (True, False):
        params = views(how)
        take_steps(gated(build(params), fused=path), grad_rows(params, 5))
        found.append([p.detach().clone() for p in params])
    assert_bitwise(found[0], found[1])


@pytest.mark.parametrize(
    ("stretches", "overlap"),
    [
        ([(0, 4), (16, 4)], False),
        ([(16, 4), (0, 5)], True),
        ([(8, 1), (8, 1)], True),
        ([(8, 0), (8, 1), (8, 0)], False),
    ],
)
def test_what_overlaps(stretches: list[tuple[int, int]], overlap: bool) -> None:
    """Addresses in bytes, sizes in numbers of four bytes."""
    starts = array.array("Q", [start for start, _ in stretches])
    sizes = array.array("q", [size for _, size in stretches])
    assert wrapped._overlap(starts.tobytes(), sizes.tobytes(), 4) is overlap


def test_other_devices_are_left_to_foreach() -> None:
    """The kernel would take their addresses for its own."""
    kernel = build.library()
    assert kernel is not None
    columns = TensorLists(*([torch.empty(3, device="meta")] for _ in range(5)))
    own = compiled(gated(BUILDS["SGD"]([parameter(3)])).settings)
    counts = own.counts(3, 2)
    how: dict[str, Any] = {"counts": counts, "estimator": own.estimator}
    assert wrapped.observe_(kernel, columns, **how) == [0]
    how |= {"gate": own.gate(counts), "share": 0.0, "last": False}
    assert wrapped.keep_(kernel, columns, **how) == [0]


class Replacing(torch.optim.SGD):
    """Puts new weights into new memory, of another layout."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    new = p - group["lr"] * p.grad
                    p.data = new.t().contiguous().t() if p.dim() == 2 else new


def test_an_optimizer_may_put_weights_elsewhere() -> None:
    starts = [parameter(4, 3), parameter(5)]
    rows = grad_rows(starts, 5)
    ours, foreach = both_paths(lambda ps: Replacing(ps, lr=0.1), starts, rows)
    assert_bitwise(ours, foreach)
    expected = both_paths(lambda ps: torch.optim.SGD(ps, lr=0.1), starts, rows)[0]
    assert_close(ours["weights"], expected["weights"], 1e-14)


@each_build
def test_gradients_of_another_layout_and_missing_ones(build: Build) -> None:
    starts = [parameter(40, 30, dtype=torch.float32), parameter(9, dtype=torch.float32)]
    rows: list[Any] = [
        [g.t().contiguous().t(), h if t % 2 else None]
        for t, (g, h) in enumerate(grad_rows(starts, 6))
    ]
    ours, foreach = both_paths(build, starts, rows)
    assert_bitwise(ours, foreach)


@pytest.mark.parametrize("name", DECOUPLED)
def test_decay_of_other_optimizers(name: str) -> None:
    starts = [parameter(8, 6, dtype=torch.float32)]
    ours, foreach = both_paths(DECOUPLED[name], starts, grad_rows(starts, 6))
    assert_bitwise(ours, foreach)


@pytest.fixture
def no_compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POPRISK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for cached in (build.library, build.library_if_any):
        cached.cache_clear()
    yield
    for cached in (build.library, build.library_if_any):
        cached.cache_clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("path", [None, True])
def test_without_a_compiler_foreach_steps_in(path: bool | None) -> None:
    """And says so where the kernel was asked for."""
    start = parameter(5)
    rows = grad_rows([start], 4)
    opt = gated(BUILDS["SGD"](copies([start])), fused=path)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        weights = take_steps(opt, rows)
    assert [str(w.message)[:36] for w in record] == ["fused=True falls back to foreach=Tru"] * (
        path is True
    )
    foreach = gated(BUILDS["SGD"](copies([start])), fused=False)
    assert_bitwise(weights, take_steps(foreach, rows))


def test_a_bad_gradient_at_the_end_leaves_the_beginning_unchanged() -> None:
    params = [parameter(70_000, dtype=torch.float32), parameter(5, dtype=torch.float32)]
    opt = gated(BUILDS["SGD"](params), fused=True)
    rows = grad_rows(params, 3)
    take_steps(opt, rows)
    before = complete_state(opt)
    rows[0][1][4] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(opt, rows[:1])
    assert_bitwise(complete_state(opt), before)
    assert opt.skipped_steps == 1
