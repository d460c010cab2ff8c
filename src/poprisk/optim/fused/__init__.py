"""The fast step: one pass over memory by a native kernel.

The kernel (``kernel.cpp``) repeats the arithmetic of :mod:`poprisk.optim.update`,
:mod:`poprisk.optim.gate` and :mod:`poprisk.optim.variance` rounding by rounding, so that
``fused=True`` gives the weights of ``foreach=True``. It runs on the CPU; what it
cannot take (other devices, tensors with gaps) stays with the foreach path.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from poprisk.optim.fused import native
from poprisk.optim.fused.build import library
from poprisk.optim.gate import MASKS_, Gate, TensorList
from poprisk.optim.update import AdamSettings, TensorLists, all_finite, size_limit, state_dtype
from poprisk.optim.variance import Ema, SecondMoment, StepCounts, VarianceEstimator

MASK_NAMES = {mask: name for name, mask in MASKS_.items()}


def fused_adamw_(
    lists: TensorLists,
    *,
    settings: AdamSettings,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
    maximize: bool,
) -> list[int]:
    """Update in place as :func:`poprisk.optim.update.gated_adamw_` does, as far as the kernel can.

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
    kernel = library()
    if kernel is None:
        return [*range(len(lists.params))]
    lists, left = _fitting(lists)
    if not lists.params:
        return left
    numbers = {**_adam_numbers(settings, counts), "sign": -1.0 if maximize else 1.0}
    numbers |= _variance_numbers(counts, estimator)
    launch = _Launch(kernel, lists, numbers)
    if gate is None or estimator is None:
        launch("whole")
    elif gate.per_tensor:
        _two_passes(launch, lists, counts, estimator, gate)
    else:
        launch("whole", **_mask_numbers(gate, counts, estimator, state_dtype(lists.params[0])))
    return left


def gradients_are_finite(grads: TensorList) -> bool:
    """:func:`poprisk.optim.update.all_finite` at the speed of reading the gradients once."""
    kernel = library()
    if kernel is None:
        return all_finite(grads)
    if len({g.dtype for g in grads}) == 1 and _all_contiguous(grads):
        return _within(kernel, grads)
    dense: dict[torch.dtype, TensorList] = defaultdict(list)
    rest = []
    for g in grads:
        (dense[g.dtype] if g.is_contiguous() and g.device.type == "cpu" else rest).append(g)
    return all_finite(rest) and all(_within(kernel, same) for same in dense.values())


def _within(kernel: ctypes.CDLL, grads: TensorList) -> bool:
    return native.within(kernel, grads, size_limit(grads[0].dtype))


class _Launch:
    """Calls of the kernel on the same tensors."""

    def __init__(self, kernel: ctypes.CDLL, lists: TensorLists, numbers: dict[str, float]) -> None:
        self.kernel = kernel
        self.columns = [native.addresses(column) for column in lists]
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
    launch: _Launch,
    lists: TensorLists,
    counts: StepCounts,
    estimator: VarianceEstimator,
    gate: Gate,
) -> None:
    """Moments and their sums first; then one mask per tensor, and the weights."""
    sums = _room_for_sums(launch)
    launch("moments", sums=native.start(sums))
    gates = _tensor_gates(sums, launch, lists, counts, estimator, gate)
    launch("weights", gates=native.start(gates))


def _room_for_sums(launch: _Launch) -> array.array[float]:
    """Two sums for each thread and tensor."""
    return array.array("d", bytes(16 * len(launch.numels) * launch.fields["threads"]))


def _tensor_gates(
    sums: array.array[float],
    launch: _Launch,
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


def _fitting(lists: TensorLists) -> tuple[TensorLists, list[int]]:
    """The tensors that the kernel can take, gradients laid out like them, and the others' indices.

    Parameter and state must be dense and laid out alike.
    """
    every = range(len(lists.params))
    if lists.params[0].device.type != "cpu":
        return lists.subset([]), [*every]
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
    return lists, left


def _all_contiguous(tensors: TensorList) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _state_fits(lists: TensorLists) -> bool:
    """Whether the state is of the dtype and size that the kernel takes it for."""
    needed = state_dtype(lists.params[0])
    return all(
        x.dtype == needed and x.shape == w.shape
        for column in lists[2:]
        for x, w in zip(column, lists.params, strict=False)
    )


def _alike(w: Tensor, g: Tensor, *state: Tensor) -> bool:
    fits = all(
        x.dtype == state_dtype(w) and x.shape == w.shape and x.stride() == w.stride() for x in state
    )
    return w.dtype == g.dtype and is_dense(w) and fits


def observe_(
    kernel: ctypes.CDLL, columns: TensorLists, *, counts: StepCounts, estimator: Ema
) -> list[int]:
    """Keep the weights and observe the gradients, of those tensors that the kernel can take.

    The numbers are those of :func:`poprisk.optim.keep.observe_lists_`.

    Args:
        kernel: the compiled one.
        columns: weights, gradients (both may have 16 bits, all may be complex) and moments; in the
            place of the average squares, where the weights are kept.
        counts: counters.
        estimator: of the variance.

    Returns:
        The indices of the tensors that were left alone.
    """
    if {g.dtype for g in columns.grads} != {columns.params[0].dtype}:
        return [*range(len(columns.params))]
    numbers = {**_variance_numbers(counts, estimator), "beta1_weight": 1 - counts.beta1}
    launch, _, left = _apart(kernel, columns, numbers)
    if launch is not None:
        task = native.KernelTask(**launch.fields)
        kernel.poprisk_observe(ctypes.addressof(task), native.start(launch.columns[3]))
    return left


def keep_(
    kernel: ctypes.CDLL,
    columns: TensorLists,
    *,
    counts: StepCounts,
    estimator: Ema | None,
    gate: Gate | None,
    share: float,
    last: bool,
) -> list[int]:
    """Gate the step that was taken, of those tensors that the kernel can take.

    The numbers are those of :func:`poprisk.optim.keep.keep_lists_`, whose arguments these are but
    for ``columns``, which are those of :func:`observe_`; gradients are not looked at.

    Returns:
        The indices of the tensors that were left alone.
    """
    numbers = dict[str, float]()
    if gate is not None and estimator is not None and not gate.per_tensor:
        numbers = _mask_numbers(gate, counts, estimator, state_dtype(columns.params[0]))
    launch, lists, left = _apart(kernel, columns._replace(grads=columns.params), numbers)
    if launch is None:
        return left
    fields = {**launch.fields, "grads": None}
    if gate is not None and estimator is not None and gate.per_tensor:
        sums = _room_for_sums(launch)
        task = native.KernelTask(**{**fields, "sums": native.start(sums)})
        kernel.poprisk_sums(ctypes.addressof(task))
        gates = _tensor_gates(sums, launch, lists, counts, estimator, gate)
        fields["gates"] = native.start(gates)
    task = native.KernelTask(**fields)
    kernel.poprisk_keep(ctypes.addressof(task), native.start(launch.columns[3]), share, last)
    return left


def _apart(
    kernel: ctypes.CDLL, columns: TensorLists, numbers: dict[str, float]
) -> tuple[_Launch | None, TensorLists, list[int]]:
    """A launch on the tensors that the kernel can take, these, and the indices of the others.

    None of them, where weights overlap: what is kept of one must not hold the step of another.
    """
    lists, left = _fitting(columns)
    if not lists.params:
        return None, lists, left
    launch = _Launch(kernel, lists, numbers)
    size = lists.params[0].dtype.to_real().itemsize
    if _overlap(launch.columns[0].tobytes(), launch.numels.tobytes(), size):
        return None, lists, [*range(len(columns.params))]
    return launch, lists, left


@functools.lru_cache(maxsize=64)
def _overlap(pointers: bytes, numels: bytes, itemsize: int) -> bool:
    """Whether stretches of memory overlap, given as arrays of addresses and of element counts."""
    sizes = [n * itemsize for n in array.array("q", numels)]
    stretches = sorted((p, n) for p, n in zip(array.array("Q", pointers), sizes, strict=True) if n)
    pairs = itertools.pairwise(stretches)
    return any(start + size > following for (start, size), (following, _) in pairs)


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


def _adam_numbers(settings: AdamSettings, counts: StepCounts) -> dict[str, float]:
    lr = float(settings.lr)
    return {
        "decay": 1 - lr * settings.weight_decay,
        "beta1_weight": 1 - settings.beta1,
        "beta2": settings.beta2,
        "beta2_weight": 1 - settings.beta2,
        "v_correction": (1 - counts.beta2**counts.t) ** 0.5,
        "eps": settings.eps,
        "rate": lr / (1 - counts.beta1**counts.t),
    }


def _variance_numbers(counts: StepCounts, estimator: VarianceEstimator | None) -> dict[str, float]:
    """What the kernel observes, and how it reads the variance."""
    if isinstance(estimator, Ema) and counts.observations > 0:
        return {
            "estimator": native.ESTIMATORS["ema"],
            "centre": estimator.centre(counts),
            "rho_weight": 1 - estimator.rho,
        }
    if isinstance(estimator, SecondMoment):
        return {
            "estimator": native.ESTIMATORS["second-moment"],
            "v_scale": 1 / (1 - counts.beta2**counts.t),
            "m_scale_sq": counts.mean_scale**2,
        }
    given = estimator is not None and not isinstance(estimator, Ema)
    return {"estimator": native.ESTIMATORS["given" if given else "unobserved"]}


def _mask_numbers(
    gate: Gate, counts: StepCounts, estimator: VarianceEstimator, dtype: torch.dtype
) -> dict[str, float]:
    """The coefficients of the mask on raw moments, in the order of operations of the masks."""
    name, info = MASK_NAMES[gate.mask], torch.finfo(dtype)
    var_scale = estimator.scale(counts) / counts.mean_scale**2
    alpha = gate.alpha * var_scale * (1 + 8 * info.eps if name == "hard" else 1.0)
    weight = gate.softness * (gate.alpha if name == "snr" else 1.0) * var_scale
    return {
        "mask": native.MASKS[name],
        "alpha": alpha,
        "weight": weight,
        "mask_eps": gate.eps / counts.mean_scale**2,
        "tiny": info.tiny,
        "q_min": gate.q_min,
    }
