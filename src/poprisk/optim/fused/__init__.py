"""The fast step: one pass over memory by a kernel of our own.

The kernels (``kernel.cpp`` for the CPU, ``kernel_triton.py`` for CUDA devices) repeat the
arithmetic of :mod:`poprisk.optim.update`, :mod:`poprisk.optim.gate` and
:mod:`poprisk.optim.variance`, the first of them rounding by rounding, so that ``fused=True`` gives
the weights of ``foreach=True``. What they cannot take (other devices, tensors with gaps) stays with
the foreach path.
"""

from __future__ import annotations

import array
import ctypes
import functools
from collections import defaultdict
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from poprisk._validate import first_line
from poprisk.optim.fused import native
from poprisk.optim.fused.build import library, tell_fallback
from poprisk.optim.fused.numbers import step_numbers
from poprisk.optim.gate import Gate, TensorList
from poprisk.optim.update import (
    LOW_PRECISION,
    AdamSettings,
    TensorLists,
    all_finite,
    all_small,
    size_limit,
    state_dtype,
)
from poprisk.optim.variance import StepCounts, VarianceEstimator

TRITON_DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices for which there is the kernel in Triton."""


def fused_adamw_(
    lists: TensorLists,
    *,
    settings: AdamSettings,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
    maximize: bool,
) -> list[int]:
    """Update in place as :func:`poprisk.optim.update.gated_adamw_` does, as far as a kernel can.

    Args:
        lists: as for ``gated_adamw_``, but parameters and gradients may have 16 bits, all may be
            complex, and gradients are not negated yet.
        settings: what AdamW needs.
        counts: counters.
        estimator: of the variance; None: not gated.
        gate: None: this step is not gated.
        maximize: ascend.

    Returns:
        The indices of the tensors that were left alone.
    """
    device = lists.params[0].device
    gpu = triton_launches(device)
    kernel = library() if gpu is None and is_native(device) else None
    if gpu is None and kernel is None:
        return [*range(len(lists.params))]
    lists, left = fitting(lists)
    if not lists.params:
        return left
    numbers = step_numbers(settings, counts, estimator, gate, state_dtype(lists.params[0]))
    numbers["sign"] = -1.0 if maximize else 1.0
    if gpu is not None:
        gpu.update_(lists, numbers, gate)
    elif kernel is not None:
        launch = Launch(kernel, lists, numbers)
        if gate is not None and estimator is not None and gate.per_tensor:
            _two_passes(launch, lists, counts, estimator, gate)
        else:
            launch("whole")
    return left


def captured_adamw_(
    lists: TensorLists,
    *,
    settings: AdamSettings,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
    maximize: bool,
    taken: Tensor,
) -> list[int]:
    """Update as :func:`fused_adamw_` does where steps are captured, if ``taken`` is true.

    Args:
        lists: likewise.
        settings: likewise; the learning rate may be a tensor.
        counts: counters of each tensor, (tensors,), float64.
        estimator: likewise.
        gate: likewise, of numbers or tensors, (tensors,).
        maximize: likewise.
        taken: 0-d boolean on the device.

    Returns:
        The indices of the tensors that were left alone.
    """
    every = [*range(len(lists.params))]
    gpu = triton_launches(lists.params[0].device)
    if gpu is None:
        return every
    dtype = state_dtype(lists.params[0])
    numbers = step_numbers(settings, counts, estimator, gate, dtype)
    numbers["sign"] = -1.0 if maximize else 1.0
    lists, left = fitting(lists)
    if lists.params:
        rows = [i for i in every if i not in left]
        gpu.captured_update_(lists, numbers, gate, rows=rows, t=counts.t, taken=taken)
    return left


@functools.cache
def triton_launches(device: torch.device) -> ModuleType | None:
    """What launches the kernels in Triton on a device; None where there are none.

    Where Triton or the compiler that it needs is missing, one RuntimeWarning says so.
    """
    if device.type not in TRITON_DEVICES:
        return None
    try:
        from poprisk.optim.fused import launch_triton

        launch_triton.try_out(device)
    except Exception as error:
        # Whatever it is, nothing has moved yet, and the foreach path asks for no compiler.
        tell_fallback(first_line(error))
        return None
    return launch_triton


def is_native(device: torch.device) -> bool:
    """Whether the kernel in C++ runs there."""
    return device.type == "cpu"


def check_capturable(group: Mapping[str, Any]) -> None:
    """Refuse a group whose steps no kernel can be captured in.

    Raises:
        ValueError: if it is to be fused and captured, and not on a CUDA device.
    """
    if not (group["fused"] and group["capturable"]):
        return
    for p in group["params"]:
        device = (p[1] if isinstance(p, tuple) else p).device
        if device.type not in TRITON_DEVICES:
            raise ValueError(
                "fused=True and capturable=True were both given, but there is a parameter on "
                f"{device}: only the kernel of CUDA devices can be captured. Move the parameters "
                "there first, or choose one of them (torch.compile fuses a captured step)."
            )


def gradients_are_finite(grads: TensorList) -> bool:
    """:func:`poprisk.optim.update.all_finite` at the speed of reading the gradients once."""
    rest, dense = _by_kind(grads)
    return all_finite(rest) and all(map(_within, dense))


def gradients_are_small(grads: TensorList) -> Tensor:
    """The same as a 0-d boolean tensor, without looking at it: ``all_small`` in one reading."""
    rest, dense = _by_kind(grads)
    small = [all_small(rest)] if rest or not dense else []
    for same in dense:
        gpu = triton_launches(same[0].device)
        small.append(all_small(same) if gpu is None else gpu.captured_beyond(same) == 0)
    return torch.stack(small).all()


def _by_kind(grads: TensorList) -> tuple[TensorList, list[TensorList]]:
    """Gradients with gaps or of an unknown device, and the others by device and dtype."""
    if len({(g.device, g.dtype) for g in grads}) == 1 and _all_contiguous(grads):
        device = grads[0].device
        known = is_native(device) or device.type in TRITON_DEVICES
        return ([], [grads]) if known else (grads, [])
    dense: dict[Any, TensorList] = defaultdict(list)
    rest = []
    for g in grads:
        known = is_native(g.device) or g.device.type in TRITON_DEVICES
        (dense[g.device, g.dtype] if known and g.is_contiguous() else rest).append(g)
    return rest, [*dense.values()]


def _within(grads: TensorList) -> bool:
    """Whether gradients of one kind are finite; they are contiguous."""
    gpu = triton_launches(grads[0].device)
    if gpu is not None:
        return not gpu.beyond(grads).item()
    kernel = library() if is_native(grads[0].device) else None
    if kernel is None:
        return all_finite(grads)
    return native.within(kernel, grads, size_limit(grads[0].dtype))


class Launch:
    """Calls of the kernel on the same tensors, which it holds: they may be copies of others."""

    def __init__(self, kernel: ctypes.CDLL, lists: TensorLists, numbers: dict[str, float]) -> None:
        self.kernel, self.lists = kernel, lists
        self.columns = [native.addresses(column) for column in lists[:5]]  # what a kernel takes
        self.numels = native.sizes(lists.params)
        threads = native.thread_count(sum(self.numels))
        if len(set(self.columns[0])) < len(lists.params):
            threads = 1  # two parameters share memory
        pointers = dict(zip(native.POINTERS, map(native.start, self.columns), strict=False))
        self.fields: dict[str, Any] = {
            **pointers,
            **numbers,
            "variances": native.start(self.columns[4]) if lists.variances else None,
            "numels": native.start(self.numels),
            "tensors": len(lists.params),
            "param_dtype": _code(lists.params[0]),
            "grad_dtype": _code(lists.grads[0]),
            "threads": threads,
        }

    def __call__(self, phase: str, **changes: Any) -> None:
        task = native.KernelTask(**self.fields, phase=native.PHASES[phase], **changes)
        self.kernel.poprisk_update(ctypes.addressof(task))


def _two_passes(
    launch: Launch,
    lists: TensorLists,
    counts: StepCounts,
    estimator: VarianceEstimator,
    gate: Gate,
) -> None:
    """Moments and their sums first; then one mask per tensor, and the weights."""
    sums = room_for_sums(launch)
    launch("moments", sums=native.start(sums))
    gates = tensor_gates(sums, launch, lists, counts, estimator, gate)
    launch("weights", gates=native.start(gates))


def room_for_sums(launch: Launch) -> array.array[float]:
    """Two sums for each thread and tensor."""
    return array.array("d", bytes(16 * len(launch.numels) * launch.fields["threads"]))


def tensor_gates(
    sums: array.array[float],
    launch: Launch,
    lists: TensorLists,
    counts: StepCounts,
    estimator: VarianceEstimator,
    gate: Gate,
) -> array.array[float]:
    """The mask of each tensor from its sums."""
    numels = launch.numels
    totals = torch.tensor(native.pooled_sums(sums, numels), dtype=torch.float64).T.contiguous()
    means = gate.averages(totals, numels, state_dtype(lists.params[0]).to_real())
    q = gate.on_squares(*means, mean_scale=counts.mean_scale, var_scale=estimator.scale(counts))
    return array.array("d", [x.item() for x in q])


def fitting(lists: TensorLists) -> tuple[TensorLists, list[int]]:
    """The tensors that the kernel can take, gradients laid out like them, and the others' indices.

    Parameter and state must be dense and laid out alike.
    """
    every = range(len(lists.params))
    if all(_all_contiguous(column) for column in lists) and _state_fits(lists):
        taken = [*every]
    else:
        taken = [i for i in every if _alike(*(column[i] for column in lists if column))]
    left = sorted({*every} - {*taken})
    if left:
        lists = lists.subset(taken)
    if not (_all_contiguous(lists.grads) and _all_contiguous(lists.params)):
        pairs = zip(lists.grads, lists.params, strict=True)
        lists = lists._replace(grads=[_laid_out(g, w) for g, w in pairs])
    if taken and not _readable(lists.grads, state_dtype(lists.params[0])):
        lists = lists._replace(grads=[g.to(state_dtype(lists.params[0])) for g in lists.grads])
    return lists, left


def _readable(grads: TensorList, state: torch.dtype) -> bool:
    """Whether the kernels can widen these gradients: all have one dtype, the state's or less."""
    dtypes = {g.dtype for g in grads}
    return len(dtypes) == 1 and (
        state in dtypes or (state == torch.float32 and dtypes <= {*LOW_PRECISION})
    )


def _all_contiguous(tensors: TensorList) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _state_fits(lists: TensorLists) -> bool:
    """Whether the state is of the dtype and size that the kernel takes it for."""
    needed = {state_dtype(lists.params[0])}
    shapes = [w.shape for w in lists.params]
    return all(
        {x.dtype for x in column} == needed and [x.shape for x in column] == shapes
        for column in lists[2:]
        if column
    )


def _alike(w: Tensor, g: Tensor, *state: Tensor) -> bool:
    fits = all(
        x.dtype == state_dtype(w) and x.shape == w.shape and x.stride() == w.stride() for x in state
    )
    return w.dtype == g.dtype and is_dense(w) and fits


def is_dense(t: Tensor) -> bool:
    """Whether the entries fill a stretch of memory without gap or overlap, in any order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _laid_out(g: Tensor, w: Tensor) -> Tensor:
    """The gradient in its parameter's memory layout: itself, or a copy."""
    return g if g.stride() == w.stride() else torch.empty_like(w).copy_(g)


def _code(t: Tensor) -> int:
    return native.DTYPES[t.dtype.to_real()]
