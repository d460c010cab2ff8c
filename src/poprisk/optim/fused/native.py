"""What the native kernel takes: one structure per call, filled from lists of tensors."""

from __future__ import annotations

import array
import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ESTIMATORS = {"unobserved": 0, "ema": 1, "second-moment": 2, "given": 3}
MASKS = {"open": 0, "hard": 1, "soft": 2, "snr": 3}
PHASES = {"whole": 0, "moments": 1, "weights": 2}

GRAIN = 32_768
"""Elements that are worth another thread."""
MAX_THREADS = 256

POINTERS = "params grads exp_avgs exp_avg_sqs variances numels gates sums".split()
INTEGERS = "param_dtype grad_dtype estimator mask phase threads".split()
NUMBERS = (
    "sign centre rho_weight decay beta1_weight beta2 beta2_weight v_scale m_scale_sq alpha weight "
    "mask_eps tiny q_min v_correction eps rate"
).split()


class KernelTask(ctypes.Structure):
    """The structure ``Task`` of ``kernel.cpp``, whose comments say what is what."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in INTEGERS),
        *((name, ctypes.c_double) for name in NUMBERS),
    )


def addresses(tensors: Sequence[Tensor]) -> array.array[int]:
    """Where each tensor's data starts."""
    return array.array("Q", map(Tensor.data_ptr, tensors))


def sizes(tensors: Sequence[Tensor]) -> array.array[int]:
    """How many real numbers each tensor of one dtype holds."""
    numels = array.array("q", map(Tensor.numel, tensors))
    if tensors[0].is_complex():
        return array.array("q", [2 * n for n in numels])
    return numels


def start(values: array.array[int] | array.array[float]) -> int:
    """The address of an array; the caller keeps it alive."""
    return values.buffer_info()[0]


def thread_count(total: int) -> int:
    """How many of torch's threads to use for that many elements."""
    return max(1, min(torch.get_num_threads(), total // GRAIN, MAX_THREADS))


def within(library: ctypes.CDLL, tensors: Sequence[Tensor], limit: float) -> bool:
    """Whether all entries of dense tensors of one real dtype are at most ``limit`` in magnitude."""
    pointers, numels = addresses(tensors), sizes(tensors)
    dtype = tensors[0].dtype.to_real()
    return bool(
        library.poprisk_within(
            start(pointers),
            start(numels),
            len(tensors),
            dtype.itemsize,
            limit_bits(limit, dtype),
            thread_count(sum(numels)),
        )
    )


@functools.lru_cache(maxsize=16)
def limit_bits(limit: float, dtype: torch.dtype) -> int:
    """The bit pattern of the largest number of ``dtype`` that is not above ``limit``."""
    x = torch.tensor(min(limit, torch.finfo(dtype).max), dtype=torch.float64).to(dtype)
    if x.double().item() > limit:
        x = torch.nextafter(x, torch.zeros_like(x))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(x.view(integers[dtype.itemsize]))


def pooled_sums(sums: array.array[float], numels: Sequence[int]) -> list[tuple[float, float]]:
    """Per tensor the two sums over all threads, exactly rounded."""
    n = len(numels)
    return [
        (math.fsum(sums[2 * j :: 2 * n]), math.fsum(sums[2 * j + 1 :: 2 * n])) for j in range(n)
    ]
