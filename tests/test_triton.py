"""The kernel in Triton, in its interpreter: the reference's numbers, and foreach's bit for bit.

What a GPU does with it cannot be seen here, but that it compiles for one.
"""

from __future__ import annotations

import array
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install 'poprisk[triton]'", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, as make test-extras sets it", allow_module_level=True)

from triton.runtime import interpreter

import gloo
from asserts import assert_bitwise, assert_close, complete_state, nothing_changes
from cases import LAYOUTS, MASKS, MODES, PATHS, REDUCTIONS, VARIANCES, settings
from poprisk import PopRiskAdamW
from poprisk.optim import adamw, fused, update
from poprisk.optim.fused import build, launch_triton, native
from processes import Call, at_once
from reference.optimizer import ReferenceOptimizer
from samplers import copies, grad_rows, noisy_grads, parameter, randn, take_steps

pytestmark = [
    pytest.mark.slow,
    # Where a mask is open for want of an estimate, what it would be may be NaN
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
]
each_mask = pytest.mark.parametrize("mask", MASKS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_variance = pytest.mark.parametrize("variance", VARIANCES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_way = pytest.mark.parametrize("captured", [False, True], ids=["listed", "one by one"])

SIZE = launch_triton.BLOCK
SHAPES = {
    **{name: make for name, make in LAYOUTS.items() if "large" not in name},
    "blocks": lambda: parameter(2 * SIZE + 3, dtype=torch.float32),
    "one block": lambda: parameter(SIZE, dtype=torch.float32),
    "transposed blocks": lambda: Parameter(parameter(40, 41, dtype=torch.float32).detach().t()),
}


def taken_over() -> None:
    """Let tensors of the CPU go to the kernel in Triton."""
    fused.TRITON_DEVICES = ("cpu",)
    fused.triton_launches.cache_clear()


@pytest.fixture(autouse=True)
def triton_on_the_cpu() -> Iterator[None]:
    taken_over()
    yield
    fused.TRITON_DEVICES = ("cuda",)
    fused.triton_launches.cache_clear()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply and add in one rounding, as GPUs and torch do; and give foreach exact roots."""

    def fma(x: Any, y: Any, z: Any) -> Any:
        wide = np.float64 if z.data.dtype == np.float32 else z.data.dtype
        a, b, c = (operand.data.astype(wide) for operand in (x, y, z))
        with np.errstate(invalid="ignore"):
            return interpreter.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    def roots(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) for x in tensors]

    if not build.rounding_flags():
        monkeypatch.setattr(interpreter.interpreter_builder, "create_fma", fma, raising=False)
    monkeypatch.setattr(torch, "_foreach_sqrt", roots)


def both_paths(
    starts: list[Parameter], rows: list[list[Tensor]], **changes: Any
) -> list[dict[str, Any]]:
    """Weights and state after steps in Triton and after foreach steps."""
    states = []
    for path in (PATHS["fused"], PATHS["foreach"]):
        opt = PopRiskAdamW(copies(starts), **changes, **path)
        take_steps(opt, rows)
        states.append(complete_state(opt, but={"foreach", "fused"}))
    return states


@each_mask
@each_mode
@each_reduction
@each_variance
@each_way
def test_triton_is_the_reference(
    mask: str, mode: str, reduction: str | None, variance: str, captured: bool
) -> None:
    changes = settings(mask=mask, mode=mode, variance=variance, reduction=reduction)
    start, grads = parameter(3), noisy_grads(40, 3)
    reference = ReferenceOptimizer(start, **changes)
    expected = [reference.step(g) for g in grads]
    opt = PopRiskAdamW(copies([start]), **changes, fused=True, capturable=captured)
    weights = take_steps(opt, [[g] for g in grads])
    assert_close([row[0] for row in weights], expected, 1e-12)


@pytest.mark.usefixtures("exact")
@each_mask
@each_mode
@each_reduction
@each_variance
def test_triton_is_foreach_for_all_layouts_at_once(
    mask: str, mode: str, reduction: str | None, variance: str
) -> None:
    starts = [make() for make in SHAPES.values()]
    changes = {"mask": mask, "mode": mode, "variance": variance, "reduction": reduction, "z": 1.0}
    ours, foreach = both_paths(starts, grad_rows(starts, 4), **changes)
    single = [i for i, w in enumerate(starts) if update.state_dtype(w) == torch.float32]
    for i in single:
        assert_bitwise(ours["state"].get(i), foreach["state"].get(i))
    if reduction is None:
        weights = [[x["weights"][i] for i in single] for x in (ours, foreach)]
        assert_bitwise(weights[0], weights[1])
    for w, v, start in zip(ours["weights"], foreach["weights"], starts, strict=True):
        assert_close([w], [v], 4 * torch.finfo(start.dtype).eps)


@each_reduction
@each_variance
def test_captured_triton_is_captured_foreach_for_all_layouts_at_once(
    reduction: str | None, variance: str
) -> None:
    starts = [make() for make in SHAPES.values()]
    rows = grad_rows(starts, 4)
    changes = {"variance": variance, "reduction": reduction, "capturable": True}
    ours, foreach = (
        take_steps(PopRiskAdamW(copies(starts), **changes, **PATHS[path]), rows)[-1]
        for path in ("fused", "foreach")
    )
    for w, v, start in zip(ours, foreach, starts, strict=True):
        assert_close([w], [v], 4 * torch.finfo(start.dtype).eps)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "changes",
    [
        {"maximize": True},
        {"q_min": 0.3},
        {"gate": False},
        {"betas": (0.3, 0.4), "rho": 0.2},
        {"betas": (0.0, 0.9), "weight_decay": 0.0},
        {"batch_size": 5, "dataset_size": 50, "eps": 0.1},
        {"alpha": 0.0, "mask": "hard"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_triton_is_foreach_for_other_settings(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    starts = [parameter(*shape, dtype=dtype) for shape in ((), (7,), (64,), (129,), (20, 31))]
    rows = grad_rows(starts, 6)
    ours, foreach = both_paths(starts, rows, lr=0.01, **changes)
    if dtype == torch.float64:
        assert_close(ours["weights"], foreach["weights"], 1e-13)
    else:
        assert_bitwise(ours, foreach)
    options = {"lr": torch.tensor(0.01, dtype=torch.float64), "capturable": True, "fused": True}
    captured = take_steps(PopRiskAdamW(copies(starts), **options, **changes), rows)[-1]
    assert_close(captured, foreach["weights"], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, SIZE - 1, SIZE, 2 * SIZE + 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_found_anywhere(
    dtype: torch.dtype, place: int, bad: float
) -> None:
    grads = [randn(2 * SIZE + 3, seed=j).to(dtype) for j in range(3)]
    for which in range(3):
        assert fused.gradients_are_finite(grads)
        assert bool(fused.gradients_are_small(grads))
        kept = grads[which][place].clone()
        grads[which][place] = bad
        assert not fused.gradients_are_finite(grads)
        assert not bool(fused.gradients_are_small(grads))
        grads[which][place] = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_gradient_that_may_enter_is_the_same_on_all_paths(dtype: torch.dtype) -> None:
    limit = torch.tensor(update.size_limit(dtype), dtype=torch.float64).to(dtype)
    for x in (limit, -limit, torch.nextafter(limit, 2 * limit), torch.nextafter(limit, 0 * limit)):
        expected = update.all_finite([x[None]])
        assert fused.gradients_are_finite([x[None]]) == expected
        assert bool(fused.gradients_are_small([x[None]])) == expected


@each_variance
@each_reduction
@each_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:PopRiskAdamW skipped a step")
def test_a_bad_gradient_at_the_end_leaves_the_beginning_unchanged(
    variance: str, reduction: str | None, captured: bool, bad: float
) -> None:
    params = [parameter(SIZE + 1, dtype=torch.float32), parameter(5), parameter(0)]
    params += [Parameter(randn(6, 8)[:, ::2]), parameter(9, dtype=torch.bfloat16)]
    how = {"variance": variance, "reduction": reduction, "capturable": captured}
    opt = PopRiskAdamW(params, fused=True, **how)
    rows = grad_rows(params, 4)
    take_steps(opt, rows[:3])
    rows[3][-1][8] = bad
    with nothing_changes(opt, but={"skipped_steps"}):
        take_steps(opt, rows[3:])
    assert opt.skipped_steps == 1


@each_way
def test_what_the_kernel_cannot_take_is_left_to_foreach(captured: bool) -> None:
    """Gaps, and what has no gradient."""
    starts = [parameter(5, dtype=torch.float32), parameter(4), parameter(3)]
    states = []
    for path in (PATHS["fused"], PATHS["foreach"]):
        params = [*copies(starts), Parameter(randn(6, 8, dtype=torch.float32)[:, ::2])]
        opt = PopRiskAdamW(params, **path, capturable=captured)
        rows: list[Any] = grad_rows(params, 5)
        for row in rows[2:]:
            row[1] = None
        take_steps(opt, rows)
        states.append([p.detach().clone() for p in params])
        assert [float(opt.state[p]["step"]) for p in params] == [5, 2, 5, 5]
    assert_close(states[0], states[1], 1e-6)


def test_gradients_are_widened_one_by_one_where_they_differ() -> None:
    """A parameter may take gradients of another precision than its own."""
    found = []
    for path in (PATHS["fused"], PATHS["foreach"]):
        params = [parameter(40, seed=j, dtype=torch.bfloat16) for j in range(2)]
        params[1].grad_dtype = torch.float32
        opt = PopRiskAdamW(params, lr=0.1, **path)
        rows = grad_rows(params, 4, dtype=torch.float32)
        take_steps(opt, [[g.bfloat16(), h] for g, h in rows])
        found.append([p.detach() for p in params])
    assert_bitwise(found[0], found[1])


@each_reduction
def test_parameters_that_share_memory_move_one_after_the_other(
    reduction: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, launched = randn(50, dtype=torch.float32), list[int]()
    together = launch_triton._Listed

    def noted(lists: update.TensorLists, numbers: Any) -> Any:
        launched.append(len(lists.params))
        return together(lists, numbers)

    monkeypatch.setattr(launch_triton, "_Listed", noted)
    found = []
    for path in (PATHS["fused"], PATHS["loop"]):
        memory = base.clone()
        params = [Parameter(memory), Parameter(memory), parameter(0), parameter(0)]
        assert params[0].data_ptr() == params[1].data_ptr()
        opt = PopRiskAdamW(params, reduction=reduction, lr=0.1, **path)
        take_steps(opt, grad_rows(params, 4))
        found.append(params[0].detach())
    assert_close([found[0]], [found[1]], 1e-6)
    assert launched == [1, 1] * 4  # in the interpreter all go one after the other anyway


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of a tensor of 5 billion weights, of which only that one is in memory.

    An offset that is cut to 32 bits ends the process.
    """
    before, n = 5_000_000, 5
    skipped = before * SIZE
    whole = copies([parameter(n, dtype=torch.float32)])
    end = copies(whole)
    rows = grad_rows(whole, 3)
    take_steps(PopRiskAdamW(whole, fused=True), rows)
    addresses, place = native.addresses, torch.tensor([[0], [before]], dtype=torch.int32)

    def earlier(column: list[Tensor]) -> array.array[int]:
        return array.array("Q", [(a - 4 * skipped) % 2**64 for a in addresses(column)])

    def sizes(column: list[Tensor]) -> array.array[int]:
        return array.array("q", [skipped + n])

    def places(*_: Any) -> launch_triton.Places:
        return launch_triton.Places(place, torch.tensor([0, 1]))

    monkeypatch.setattr(native, "addresses", earlier)
    monkeypatch.setattr(native, "sizes", sizes)
    monkeypatch.setattr(launch_triton, "places", places)
    monkeypatch.setattr(adamw, "gradients_are_finite", update.all_finite)
    take_steps(PopRiskAdamW(end, fused=True), rows)
    assert_bitwise([p.detach() for p in end], [p.detach() for p in whole])


class Forbidden(TorchDispatchMode):
    """Fails where a tensor is looked at or made from numbers, which no CUDA graph can hold."""

    NAMES = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.equal", "aten.nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(self.NAMES), func
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("exact")
@each_reduction
def test_variances_that_are_given(reduction: str | None) -> None:
    starts = [parameter(20, dtype=torch.float32), parameter(9, dtype=torch.bfloat16)]
    rows, found = grad_rows(starts, 8), list[dict[str, Any]]()
    for path in (PATHS["fused"], PATHS["foreach"]):
        params = copies(starts)
        opt = PopRiskAdamW(params, variance="microbatch", reduction=reduction, lr=0.1, **path)
        for both in zip(rows[::2], rows[1::2], strict=True):
            opt.zero_grad()
            for row in both:
                parts = [(p * g / 2).sum() for p, g in zip(params, row, strict=True)]
                torch.stack(parts).sum().backward()
                opt.microbatch(4)
            opt.step()
        found.append(complete_state(opt, but={"foreach", "fused"}))
    assert_bitwise(found[0]["state"], found[1]["state"])
    assert_close(found[0]["weights"], found[1]["weights"], 1e-6)


@each_variance
@each_reduction
def test_a_captured_step_looks_at_no_number(variance: str, reduction: str | None) -> None:
    starts = [parameter(5), parameter(SIZE + 1, dtype=torch.float32), parameter(3)]
    params = copies(starts)
    groups = [{"params": params[:2]}, {"params": params[2:], "gate": False}]
    options = {"variance": variance, "reduction": reduction, "lr": torch.tensor(0.01)}
    opt = PopRiskAdamW(groups, **options, fused=True, capturable=True)
    rows = grad_rows(starts, 2)
    take_steps(opt, rows[:1])
    for p, grad in zip(params, rows[1], strict=True):
        p.grad = grad
    with Forbidden():
        opt.step()
    assert all(float(opt.state[p]["step"]) == 2 for p in params)


def test_a_captured_state_goes_on_in_a_plain_optimizer_and_back() -> None:
    start = parameter(6)
    rows = [[g] for g in noisy_grads(20, 6)]
    expected = take_steps(PopRiskAdamW(copies([start])), rows)[-1]
    (w,) = copies([start])
    state: dict[str, Any] | None = None
    for first, captured in ((0, True), (5, False), (10, True), (15, False)):
        opt = PopRiskAdamW([w], capturable=captured, fused=True)
        if state is not None:
            opt.load_state_dict(state)
        take_steps(opt, rows[first : first + 5])
        state = opt.state_dict()
    assert_close([w.detach()], expected, 1e-12)


@each_reduction
def test_shards_are_whole_parameters(tmp_path: Path, reduction: str | None) -> None:
    """Two processes with halves of a matrix: averages and NaN are of the whole."""
    calls = [Call(sharded, (rank, tmp_path, reduction)) for rank in range(2)]
    for done in at_once(*calls):
        assert done.code == 0, done.stderr


def sharded(rank: int, folder: Path, reduction: str | None) -> None:
    """Steps of one process, compared with those of an optimizer of whole parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with gloo.joined(rank, folder):
        taken_over()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        start = parameter(5, 4)
        rows = grad_rows([start], 6)
        rows[3][0][4, 3] = float("nan")  # in the part of one process alone
        for captured in (False, True):
            how = {"reduction": reduction, "fused": True, "capturable": captured, "lr": 0.1}
            whole, part = (
                copies([start]),
                Parameter(distribute_tensor(start.data, mesh, [Shard(0)])),
            )
            ours, theirs = (PopRiskAdamW(ps, **how) for ps in ([part], whole))
            for (grad,) in rows:
                part.grad = distribute_tensor(grad, mesh, [Shard(0)])
                whole[0].grad = grad
                ours.step()
                theirs.step()
            assert ours.skipped_steps == theirs.skipped_steps == 1
            assert_close([part.full_tensor().detach()], [whole[0].detach()], 1e-12)  # pyrefly: ignore


COMPILED = """
import itertools, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from poprisk.optim.fused import kernel_triton as kernels, native

TYPES = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16, "fp16": tl.float16}

def compile(kernel, pointers, numbers, constants, capability):
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): x for name, x in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm

def update(param, grad, estimator, mask, phase, capability):
    real = "fp64" if param == "fp64" else "fp32"
    codes = {"param_kind": TYPES[param], "grad_kind": TYPES[grad], "real": TYPES[real], "size": 1024}
    codes |= {"estimator": native.ESTIMATORS[estimator], "mask": native.MASKS[mask]}
    codes["phase"] = native.PHASES[phase]
    sums = {"numbers": "*fp64", "mean_sq": "*fp64", "variance": "*fp64"}
    lists = {"addresses": "*i64", "sizes": "*i64", "places": "*i32"}
    listed = compile(kernels.update_listed, {**sums, **lists}, ["tensors", "chunks"],
                     {**codes, "aligned": True}, capability)
    state = {"w": "*" + param, "g": "*" + grad, **dict.fromkeys("mvs", "*" + real), "taken": "*i32"}
    compile(kernels.update_one, {**sums, **state}, ["numel"], codes, capability)
    return listed

cases = [
    ("fp32", "fp32", "ema", "soft", "whole"), ("fp32", "fp32", "unobserved", "open", "whole"),
    ("fp64", "fp64", "ema", "snr", "whole"), ("bf16", "bf16", "second-moment", "hard", "whole"),
    ("fp16", "fp16", "given", "soft", "whole"), ("bf16", "fp32", "ema", "soft", "moments"),
    ("fp16", "fp16", "second-moment", "soft", "moments"), ("bf16", "bf16", "ema", "snr", "weights"),
    ("fp64", "fp64", "ema", "hard", "weights"),
]
for capability, case in itertools.product((80, 90), cases):
    found = update(*case, capability)
    assert "cubin" in found
    if case[0] == case[1] == "fp32":
        assert "ld.global.v4" in found["ptx"] and "st.global.v4" in found["ptx"]
pool = {"mean_sq": "*fp64", "variance": "*fp64", "sums": "*fp64"}
compile(kernels.pool_listed, {**pool, "firsts": "*i64", "sizes": "*i64"}, ["tensors"], {"size": 1024}, 90)
compile(kernels.pool_one, pool, ["chunks", "numel", "tensors"], {"size": 1024}, 90)
for name, bits in (("bf16", 16), ("fp32", 32), ("fp64", 64)):
    code = {"bits": getattr(tl, f"int{bits}"), "unsigned": 2 ** (bits - 1) - 1, "limit": 5, "size": 1024}
    lists = {"addresses": "*i64", "sizes": "*i64", "places": "*i32", "beyond": "*i32"}
    compile(kernels.look_listed, lists, ["chunks"], code, 90)
    compile(kernels.look_one, {"g": "*" + name, "beyond": "*i32"}, ["numel"], code, 90)
print("compiled")
"""  # noqa: E501


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Of every kind one, with the assembler that comes with Triton; wide loads where aligned."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "compiled\n", done.stderr
