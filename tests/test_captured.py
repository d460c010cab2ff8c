"""capturable=True: the same numbers as foreach, and one graph for all steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.nn import Parameter

from asserts import assert_bitwise, assert_close, complete_state
from cases import LAYOUTS, MASKS, MODES, PATHS, REDUCTIONS, VARIANCES, settings
from poprisk import PopRiskAdamW
from poprisk.optim import fused
from poprisk.optim.state import prepare_state
from reference.optimizer import ReferenceOptimizer
from samplers import copies, grad_rows, noisy_grads, parameter, randn, take_steps

CAPTURED: dict[str, Any] = {"capturable": True}
PLAIN: dict[str, Any] = {}


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before is used, by other tests or on another capability of the processor."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def triton_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the CPU were a device that has the kernel in Triton."""
    monkeypatch.setattr(fused, "TRITON_DEVICES", ("cpu",))
    fused.triton_launches.cache_clear()
    yield
    fused.triton_launches.cache_clear()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", MASKS)
def test_captured_steps_are_the_reference(
    mask: str, mode: str, reduction: str | None, variance: str
) -> None:
    changes = settings(mask=mask, mode=mode, variance=variance, reduction=reduction)
    start, grads = parameter(3), noisy_grads(40, 3)
    reference = ReferenceOptimizer(start, **changes)
    expected = [reference.step(g) for g in grads]
    weights = take_steps(
        PopRiskAdamW(copies([start]), **changes, capturable=True), [[g] for g in grads]
    )
    assert_close([row[0] for row in weights], expected, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captured_steps_are_foreach_for_every_layout(layout: str) -> None:
    start = LAYOUTS[layout]()
    rows = grad_rows([start], 4)
    ours, foreach = (
        take_steps(PopRiskAdamW(copies([start]), **how), rows)[-1]
        for how in (CAPTURED, PATHS["foreach"])
    )
    assert_close(ours, foreach, 4 * torch.finfo(start.dtype).eps)


def test_captured_steps_leave_out_what_has_no_gradient_or_no_entries() -> None:
    w, idle, empty = parameter(3), parameter(4, seed=1), parameter(0)
    opt = PopRiskAdamW([w, idle, empty], capturable=True)
    before = idle.detach().clone()
    take_steps(opt, [[g, None, torch.zeros(0).double()] for g in noisy_grads(3, 3)])
    assert torch.equal(idle, before)
    assert [float(opt.state[p]["step"]) for p in (w, idle)] == [3.0, 0.0]
    assert opt.skipped_steps == 0


def test_skipped_steps_are_counted_in_place() -> None:
    """A CUDA graph would write each new count to the same place, and read the first one again."""
    w = parameter(2)
    opt = PopRiskAdamW([w], capturable=True)
    bad = torch.full((2,), float("nan")).double()
    take_steps(opt, [[bad]])
    count = opt.param_groups[0]["skipped_steps"]
    take_steps(opt, [[bad], [randn(2)]])
    assert opt.param_groups[0]["skipped_steps"] is count
    assert opt.skipped_steps == 2


def train(wrap: Callable[[Any], Any], **how: Any) -> tuple[list[Tensor], int]:
    """Weights and skipped steps of twelve steps, of which the sixth has a NaN."""
    starts = [parameter(7, 5, dtype=torch.float32), parameter(30, dtype=torch.float32)]
    params, late = copies(starts), Parameter(torch.ones(2))
    groups = [{"params": params}, {"params": [late], "gate": False}]
    opt = PopRiskAdamW(groups, **how)
    step = wrap(opt.step)  # before the scheduler, which puts a function of its own in its place
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for t, row in enumerate(grad_rows([*params, late], 12, seed=3)):
        for p, grad in zip([*params, late], row, strict=True):
            p.grad = grad
        if t == 5:
            row[0][0, 0] = float("nan")
        step()
        schedule.step()
    return [p.detach() for p in [*params, late]], opt.skipped_steps


def compiled(backend: str) -> Callable[[Any], Any]:
    return lambda step: torch.compile(step, fullgraph=True, backend=backend)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])]
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_one_graph(backend: str) -> None:
    """One graph makes the state, one serves all steps after it: a scheduler included."""
    lr = torch.tensor(0.01)
    weights, skipped = train(compiled(backend), lr=lr, capturable=True)
    expected, plain = train(lambda step: step, lr=0.01)
    assert (skipped, plain) == (1, 1)
    assert_close(weights, expected, 1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_a_captured_state_goes_on_in_a_plain_optimizer_and_back() -> None:
    start = parameter(6)
    rows = [[g] for g in noisy_grads(20, 6)]
    expected = take_steps(PopRiskAdamW(copies([start])), rows)[-1]
    (w,) = copies([start])
    state: dict[str, Any] | None = None
    for first, how in ((0, CAPTURED), (5, PLAIN), (10, CAPTURED), (15, PLAIN)):
        opt = PopRiskAdamW([w], **how)
        if state is not None:
            opt.load_state_dict(state)
        take_steps(opt, rows[first : first + 5])
        state = opt.state_dict()
    assert_close([w.detach()], expected, 1e-12)


def test_the_kernel_of_the_cpu_cannot_be_captured() -> None:
    w = parameter(2)
    message = r"^fused=True and capturable=True were both given, .* on cpu"
    for params in ([w], [("w", w)]):
        with pytest.raises(ValueError, match=message):
            PopRiskAdamW(params, fused=True, capturable=True)
    opt = PopRiskAdamW([{"params": [w], "capturable": False}], fused=True, capturable=True)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": (parameter(3) for _ in range(1))})
    assert len(opt.param_groups) == 1


@pytest.mark.usefixtures("fresh_compiler", "triton_devices")
@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_is_left_to_the_compiler_to_fuse() -> None:
    weights, skipped = train(compiled("eager"), lr=torch.tensor(0.01), capturable=True, fused=True)
    expected, _ = train(lambda step: step, lr=0.01)
    assert skipped == 1
    assert_close(weights, expected, 1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("triton_devices")
@pytest.mark.parametrize("captured", [False, True])
def test_without_triton_foreach_steps_in_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("launch_triton", "kernel_triton"):
        monkeypatch.delitem(sys.modules, f"poprisk.optim.fused.{name}", raising=False)
        monkeypatch.delattr(fused, name, raising=False)
    starts, how = [parameter(5), parameter(3)], {"capturable": captured}
    rows = grad_rows(starts, 4)
    opt = PopRiskAdamW(copies(starts), fused=True, **how)
    with pytest.warns(RuntimeWarning, match=r"falls back to foreach=True.*: Module.*triton"):
        take_steps(opt, rows[:1])
    take_steps(opt, rows[1:])
    twin = PopRiskAdamW(copies(starts), foreach=True, **how)
    take_steps(twin, rows)
    options = {"foreach", "fused", "skipped_steps"}
    assert_bitwise(complete_state(opt, but=options), complete_state(twin, but=options))


def test_a_loaded_counter_goes_to_its_parameter() -> None:
    """One on another device would be read once, when the step is captured."""
    w = Parameter(torch.ones(3, device="meta"))
    state = {"step": torch.tensor(4.0), "exp_avg": w.detach(), "exp_avg_sq": w.detach()}
    prepare_state(w, state, None, on_device=True)
    assert state["step"].device.type == "meta"
