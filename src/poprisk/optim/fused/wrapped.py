"""The gate's part of another optimizer's step by the native kernel (``wrapped.hpp``)."""

from __future__ import annotations

import array
import ctypes
import functools
import itertools

from poprisk.optim.fused import (
    Launch,
    fitting,
    is_native,
    native,
)
from poprisk.optim.fused.numbers import mask_numbers, variance_numbers
from poprisk.optim.gate import Gate
from poprisk.optim.update import TensorLists, state_dtype
from poprisk.optim.variance import StepCounts, VarianceEstimator


def observe_(
    kernel: ctypes.CDLL,
    columns: TensorLists,
    *,
    counts: StepCounts,
    estimator: VarianceEstimator,
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
    numbers = {**variance_numbers(counts, estimator), "beta1_weight": 1 - counts.beta1}
    launch, left = _apart(kernel, columns, numbers)
    if launch is not None:
        task = native.KernelTask(**launch.fields)
        kernel.poprisk_observe(ctypes.addressof(task), native.start(launch.columns[3]))
    return left


def keep_(
    kernel: ctypes.CDLL,
    columns: TensorLists,
    *,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
    share: float,
    last: bool,
) -> list[int]:
    """Gate the step that was taken, of those tensors that the kernel can take.

    The numbers are those of :func:`poprisk.optim.keep.keep_lists_`, whose arguments these are but
    for ``columns``, which are those of :func:`observe_`; gradients are not looked at. The mask is
    of each entry: one per tensor is for foreach.

    Returns:
        The indices of the tensors that were left alone.
    """
    numbers = dict[str, float]()
    if gate is not None and estimator is not None:
        numbers = mask_numbers(gate, counts, estimator, state_dtype(columns.params[0]))
    launch, left = _apart(kernel, columns._replace(grads=columns.params), numbers)
    if launch is None:
        return left
    task = native.KernelTask(**{**launch.fields, "grads": None})
    kernel.poprisk_keep(ctypes.addressof(task), native.start(launch.columns[3]), share, last)
    return left


def _apart(
    kernel: ctypes.CDLL, columns: TensorLists, numbers: dict[str, float]
) -> tuple[Launch | None, list[int]]:
    """A launch on the tensors that the kernel can take, and the indices of the others.

    None of them, where weights overlap: what is kept of one must not hold the step of another.
    """
    every = [*range(len(columns.params))]
    if not is_native(columns.params[0].device):
        return None, every
    lists, left = fitting(columns)
    if not lists.params:
        return None, left
    launch = Launch(kernel, lists, numbers)
    size = lists.params[0].dtype.to_real().itemsize
    if _overlap(launch.columns[0].tobytes(), launch.numels.tobytes(), size):
        return None, every
    return launch, left


@functools.lru_cache(maxsize=64)
def _overlap(pointers: bytes, numels: bytes, itemsize: int) -> bool:
    """Whether stretches of memory overlap, given as arrays of addresses and of element counts."""
    sizes = [n * itemsize for n in array.array("q", numels)]
    stretches = sorted((p, n) for p, n in zip(array.array("Q", pointers), sizes, strict=True) if n)
    pairs = itertools.pairwise(stretches)
    return any(start + size > following for (start, size), (following, _) in pairs)
