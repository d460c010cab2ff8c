"""The native kernel against the foreach path: the same numbers, bit for bit where roots agree."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from asserts import assert_bitwise, assert_close, complete_state, nothing_changes
from cases import ALWAYS_OPEN, LAYOUTS, MASKS, MODES, PATHS, REDUCTIONS, VARIANCES, settings
from poprisk import PopRiskAdamW
from poprisk.optim import fused, update
from poprisk.optim.fused import build, native
from processes import Call, at_once, run_code, script
from reference.optimizer import ReferenceOptimizer
from samplers import copies, grad_rows, noisy_grads, parameter, randn, take_steps

each_mask = pytest.mark.parametrize("mask", MASKS)
each_variance = pytest.mark.parametrize("variance", VARIANCES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give foreach the kernel's correctly rounded roots: torch.sqrt may be off by one unit."""

    def roots(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) for x in tensors]

    monkeypatch.setattr(torch, "_foreach_sqrt", roots)


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def both_paths(
    starts: list[Parameter], rows: list[list[Tensor]], **changes: Any
) -> list[dict[str, Any]]:
    """Weights and state after fused and after foreach steps."""
    states = []
    for path in (PATHS["fused"], PATHS["foreach"]):
        opt = PopRiskAdamW(copies(starts), **changes, **path)
        take_steps(opt, rows)
        states.append(complete_state(opt, but={"foreach", "fused"}))
    return states


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("mode", MODES)
@each_mask
@each_variance
@each_reduction
def test_fused_is_foreach_for_all_layouts_at_once(
    mask: str, mode: str, variance: str, reduction: str | None
) -> None:
    starts = [make() for make in LAYOUTS.values()]
    rows = grad_rows(starts, 4)
    changes = {"mask": mask, "mode": mode, "variance": variance, "reduction": reduction, "z": 1.0}
    ours, foreach = both_paths(starts, rows, **changes)
    if reduction is None:
        assert_bitwise(ours, foreach)
    for key in ("exp_avg", "exp_avg_sq", "grad_mean_var"):
        moments = [
            [s[key] for s in state["state"].values() if key in s] for state in (ours, foreach)
        ]
        assert_bitwise(moments[0], moments[1])
    for w, v, start in zip(ours["weights"], foreach["weights"], starts, strict=True):
        assert_close([w], [v], 4 * torch.finfo(start.dtype).eps)


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize(
    "changes",
    [
        {"maximize": True},
        {"q_min": 0.3},
        {"gate": False},
        {"betas": (0.3, 0.4), "rho": 0.2},
        {"betas": (0.0, 0.9), "weight_decay": 0.0},
        {"batch_size": 5, "dataset_size": 50, "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_mask
def test_fused_is_foreach_for_other_settings(
    mask: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (7,), (64,), (129,), (20, 31))]
    ours, foreach = both_paths(starts, grad_rows(starts, 12), mask=mask, lr=0.01, **changes)
    assert_bitwise(ours, foreach)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_mask
@each_variance
def test_three_hundred_steps_stay_together(mask: str, variance: str, dtype: torch.dtype) -> None:
    """Moments are equal bit for bit; weights within 2 units in the last place of their size."""
    start = parameter(300, dtype=dtype)
    rows = [[g] for g in noisy_grads(300, 300, dtype=dtype)]
    ours, foreach = both_paths([start], rows, mask=mask, variance=variance)
    assert_bitwise(ours["state"], foreach["state"])
    w, v = ours["weights"][0], foreach["weights"][0]
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-14
    assert float(((w - v).abs() / v.abs().clamp_min(1.0)).max()) <= tolerance


@pytest.mark.parametrize("open_gate", ALWAYS_OPEN.values(), ids=ALWAYS_OPEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_open_gate_is_adamw(open_gate: dict[str, Any], dtype: torch.dtype) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (17,), (300, 500))]
    rows = grad_rows(starts, 30)
    shared = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    ours = take_steps(PopRiskAdamW(copies(starts), **shared, **open_gate), rows)[-1]
    adamw = take_steps(torch.optim.AdamW(copies(starts), **shared), rows)[-1]
    assert_close(ours, adamw, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", MODES)
@each_mask
@each_variance
@each_reduction
def test_fused_is_the_reference(mask: str, mode: str, variance: str, reduction: str | None) -> None:
    changes = settings(mask=mask, mode=mode, variance=variance, reduction=reduction)
    start, grads = parameter(3), noisy_grads(60, 3)
    reference = ReferenceOptimizer(start, **changes)
    expected = [reference.step(g) for g in grads]
    weights = take_steps(
        PopRiskAdamW(w := copies([start]), **changes, fused=True), [[g] for g in grads]
    )
    assert len(w) == 1
    assert_close([row[0] for row in weights], expected, 1e-12)


@pytest.mark.usefixtures("threads")
@each_reduction
def test_threads_change_nothing(reduction: str | None) -> None:
    starts = [parameter(n, seed=n, dtype=torch.float32) for n in (3, 70_000, 1, 100_001, 64)]
    rows = grad_rows(starts, 4)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(both_paths(starts, rows, reduction=reduction)[0])
    for other in results[1:]:
        assert_bitwise(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 63, 127, 128, 255, 256, 299])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_found_anywhere(
    dtype: torch.dtype, place: int, bad: float
) -> None:
    grads = [randn(300, seed=j).to(dtype) for j in range(3)]
    assert fused.gradients_are_finite(grads)
    grads[1][place] = bad
    assert not fused.gradients_are_finite(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_gradient_that_may_enter_is_the_same_on_all_paths(dtype: torch.dtype) -> None:
    limit = torch.tensor(update.size_limit(dtype), dtype=torch.float64).to(dtype)
    for x in (limit, -limit, torch.nextafter(limit, 2 * limit), torch.nextafter(limit, 0 * limit)):
        assert fused.gradients_are_finite([x[None]]) == update.all_finite([x[None]])


def test_a_bad_gradient_at_the_end_leaves_the_beginning_unchanged() -> None:
    params = [parameter(70_000, dtype=torch.float32), parameter(5, dtype=torch.float32)]
    opt = PopRiskAdamW(params, fused=True)
    rows = grad_rows(params, 3)
    take_steps(opt, rows)
    rows[0][1][4] = float("nan")
    with nothing_changes(opt, but={"skipped_steps"}), pytest.warns(RuntimeWarning, match="skipped"):
        take_steps(opt, rows[:1])
    assert opt.skipped_steps == 1


@pytest.mark.usefixtures("exact_roots")
def test_parameters_with_gaps_are_left_to_foreach() -> None:
    """A view with holes, and one that repeats its memory, have no dense state of their layout."""
    base = randn(6, 8, dtype=torch.float32)
    states = []
    for path in (PATHS["fused"], PATHS["foreach"]):
        holes = Parameter(base.clone()[:, ::2])
        params = [holes, parameter(5, dtype=torch.float32)]
        opt = PopRiskAdamW(params, **path)
        take_steps(opt, grad_rows(params, 5))
        states.append([p.detach().clone() for p in params])
    assert_bitwise(states[0], states[1])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_gradients_of_other_precisions_than_their_parameters(path: dict[str, Any]) -> None:
    """A parameter may take gradients of a dtype of their own, each another."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    starts = [parameter(40, seed=j, dtype=torch.bfloat16) for j in range(3)]
    rows = [[g.to(d) for g, d in zip(row, dtypes, strict=True)] for row in grad_rows(starts, 4)]
    params = copies(starts)
    for p, dtype in zip(params, dtypes, strict=True):
        p.grad_dtype = dtype
    ours = take_steps(PopRiskAdamW(params, lr=0.1, **path), rows)[-1]
    for i, start in enumerate(starts):  # each alone, in its parameter's precision
        (expected,) = take_steps(
            PopRiskAdamW(copies([start]), lr=0.1, foreach=True), [[r[i].bfloat16()] for r in rows]
        )[-1]
        assert_bitwise(ours[i], expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_gradients_whose_negation_or_conjugation_was_put_off(path: dict[str, Any]) -> None:
    found = []
    for solid in (False, True):
        starts = [parameter(6), parameter(6, dtype=torch.complex128)]
        rows = [[torch._neg_view(g), z.conj()] for g, z in grad_rows(starts, 3)]
        assert rows[0][0].is_neg()
        assert rows[0][1].is_conj()
        if solid:
            rows = [[g.resolve_neg(), z.resolve_conj()] for g, z in rows]
        found.append(take_steps(PopRiskAdamW(copies(starts), **path), rows)[-1])
    assert_bitwise(found[0], found[1])


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 3), (4, 1), False),
        ((2, 3), (0, 1), False),
        ((1, 3), (77, 1), True),
        ((), (), True),
        ((2, 2, 2), (1, 4, 2), True),
    ],
)
def test_what_is_dense(shape: tuple[int, ...], stride: tuple[int, ...], dense: bool) -> None:
    assert fused.is_dense(torch.zeros(100).as_strided(shape, stride)) is dense


def test_the_structure_is_the_kernels() -> None:
    kernel = build.library()
    assert kernel is not None
    assert kernel.poprisk_task_size() == ctypes.sizeof(native.KernelTask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_variance_does_not_drift_in_a_long_run(dtype: torch.dtype) -> None:
    """Kept in the precision of a bfloat16 parameter it would stop moving: 0.99·s rounds to s."""
    w, rho, steps = parameter(50, dtype=dtype), 0.999, 1000
    opt = PopRiskAdamW([w], rho=rho, fused=True, lr=1e-4)
    m = s = torch.zeros(50, dtype=torch.float64)
    for t in range(steps):
        grad = randn(50, seed=t, dtype=torch.float32).to(dtype)
        take_steps(opt, [[grad]])
        if t:
            s = rho * s + (1 - rho) * (grad.double() - m / (1 - 0.9**t)).square()
        m = 0.9 * m + 0.1 * grad.double()
    torch.testing.assert_close(opt.state[w]["grad_mean_var"].double(), s, rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_steps_leave_no_tensors_behind(path: dict[str, Any]) -> None:
    params = [parameter(5, dtype=torch.bfloat16), parameter(3, 4), parameter(2, 3).t()]
    opt = PopRiskAdamW([Parameter(p.detach()) for p in params], **path)
    rows = grad_rows(params, 2)
    gc.freeze()  # only what comes from here on is looked through
    take_steps(opt, rows * 40)  # until the cache of constants is full

    def alive() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) for x in gc.get_objects())

    try:
        before = alive()
        for _ in range(50):
            for p, grad in zip(opt.param_groups[0]["params"], rows[1], strict=True):
                p.grad = grad
            opt.step()
        assert alive() <= before
    finally:
        gc.unfreeze()


def test_fp16_with_a_gradient_scaler() -> None:
    """The scaler's overflow is skipped, by it or by the step itself, and training goes on."""
    w = parameter(6, dtype=torch.float32)
    opt = PopRiskAdamW([w], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for t in range(6):
        opt.zero_grad()
        loss = (w.half() * randn(6, seed=t).half()).sum() * (1e30 if t == 3 else 1.0)
        scaler.scale(loss.float()).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        scaler.step(opt)
        scaler.update()
    assert bool(w.isfinite().all())
    assert int(opt.state[w]["step"]) == 5
    assert opt.skipped_steps == 0


def test_transient_memory_is_small(tmp_path: Path) -> None:
    code = """
import resource, torch
from poprisk import PopRiskAdamW
torch.set_num_threads(1)
w = torch.nn.Parameter(torch.randn(20_000_000)); w.grad = torch.randn_like(w)
opt = PopRiskAdamW([w], fused=True)
opt.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3): opt.step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (80_000_000 / 1024))
"""
    (done,) = at_once(Call(run_code, (code, tmp_path, True)))
    assert done.code == 0, done.stderr
    assert float(done.stdout) <= 0.05


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        cwd=Path(fused.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BITWISE = """
import torch
from poprisk import PopRiskAdamW
generator = torch.Generator().manual_seed(0)
rows = [torch.randn(1000, generator=generator) for _ in range(12)]
found = []
for how in ({"fused": True}, {"foreach": True}):
    w = torch.nn.Parameter(torch.ones(1000))
    opt = PopRiskAdamW([w], lr=0.01, **how)
    for w.grad in rows:
        opt.step()
    found.append(opt.state[w])
fused, foreach = found
print(all(torch.equal(fused[key], foreach[key]) for key in ("exp_avg", "grad_mean_var")))
"""


@pytest.mark.long  # `make test-portable` compares more on such instructions
def test_the_kernel_rounds_as_torch_does_on_plain_instructions_too() -> None:
    """One rounding of a·b + c where torch has one, two where it has two."""
    assert run_python(BITWISE, ATEN_CPU_CAPABILITY="default") == "True\n"


FIRST_STEP = """
import torch
from poprisk import PopRiskAdamW
w = torch.nn.Parameter(torch.ones(10)); w.grad = torch.ones(10)
PopRiskAdamW([w], fused=True).step()
"""


@pytest.fixture
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ compiler without its optimizations, which take seconds."""
    folder = tmp_path_factory.mktemp("compiler")
    return script(folder / "quick", f'exec {build.find_compiler()} "$@" -O0')


@pytest.mark.slow
def test_the_first_step_compiles_once_and_then_loads(tmp_path: Path, quick_compiler: Path) -> None:
    """Warnings are errors in both processes, and without a kernel there is one."""
    (first,) = at_once(Call(with_cache, (tmp_path, quick_compiler, FIRST_STEP)))
    assert first.code == 0, first.stderr
    (kernel,) = tmp_path.iterdir()
    made = kernel.stat()
    assert kernel.match("kernel-*.so")
    (second,) = at_once(Call(with_cache, (tmp_path, quick_compiler, FIRST_STEP)))
    assert second.code == 0, second.stderr
    assert [*tmp_path.iterdir()] == [kernel]
    assert (kernel.stat().st_mtime_ns, kernel.stat().st_ino) == (made.st_mtime_ns, made.st_ino)


def with_cache(cache: Path, compiler: Path, code: str) -> None:
    """Run code, in a process of its own."""
    os.environ |= {"POPRISK_CACHE": str(cache), "CXX": str(compiler)}
    run_code(code, cache.parent, True)


def test_processes_that_compile_at_once_do_not_collide(
    tmp_path: Path, quick_compiler: Path
) -> None:
    load = "from poprisk.optim.fused import build; build.load()"
    running = at_once(*[Call(with_cache, (tmp_path, quick_compiler, load))] * 2)
    assert [process.code for process in running] == [0, 0], running
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernel is loaded or kept; the one in use comes back afterwards."""
    monkeypatch.setenv("POPRISK_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def test_without_a_compiler_foreach_steps_in_and_says_so(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    start, rows = parameter(5), [[g] for g in noisy_grads(4, 5)]
    opt = PopRiskAdamW(copies([start]), fused=True)
    with pytest.warns(RuntimeWarning, match=r"falls back to foreach=True.*no C\+\+ compiler.*CXX"):
        take_steps(opt, rows[:1])
    take_steps(opt, rows[1:])
    twin = PopRiskAdamW(copies([start]), foreach=True)
    take_steps(twin, rows)
    assert_bitwise(
        complete_state(opt, but={"foreach", "fused"}),
        complete_state(twin, but={"foreach", "fused"}),
    )


def test_a_compiler_that_fails_is_quoted(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(script(empty_cache / "broken", "echo out of order >&2; exit 1")))
    with pytest.raises(build.BuildError, match=r"broken .*failed: out of order"):
        build.load()
    assert [*(empty_cache / "cache").iterdir()] == []


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    empty_cache: Path, quick_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(quick_compiler))
    (empty_cache / "file").touch()
    monkeypatch.setenv("POPRISK_CACHE", str(empty_cache / "file" / "cache"))
    assert build.load().poprisk_task_size() > 0
