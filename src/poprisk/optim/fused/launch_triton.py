"""Launches of the Triton kernels: many tensors at once, or one by one where steps are captured.

One launch takes all tensors of a kind, whose addresses travel to the device with the coefficients.
In a CUDA graph nothing can travel: there each tensor has launches of its own, its coefficients are
computed on the device, and so is whether the step is taken. Needs Triton.
"""

from __future__ import annotations

import array
import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from poprisk.optim.fused import kernel_triton as kernels
from poprisk.optim.fused import native
from poprisk.optim.fused.numbers import COLUMNS
from poprisk.optim.gate import Gate, TensorList
from poprisk.optim.update import TensorLists, size_limit, state_dtype

BLOCK = 1024
"""Elements that one program of a kernel works on."""

KINDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


class Places(NamedTuple):
    """The blocks of tensors of given sizes, on a device.

    Attributes:
        blocks: int32, (2, chunks): of each block its tensor, and which of the tensor's it is.
        firsts: int64, (tensors + 1,): the first block of each tensor, and how many there are.
    """

    blocks: Tensor
    firsts: Tensor


def update_(lists: TensorLists, numbers: dict[str, Any], gate: Gate | None) -> None:
    """Update tensors of one kind in place.

    Args:
        lists: dense and laid out alike; gradients of one dtype.
        numbers: coefficients and codes, see :mod:`poprisk.optim.fused.numbers`.
        gate: of this step; None: it is not gated.
    """
    starts = [w.data_ptr() for w in lists.params if w.numel()]
    if len(set(starts)) < len(starts):  # two parameters share memory: one after the other
        for i in range(len(lists.params)):
            update_(lists.subset([i]), numbers, gate)
        return
    with _on(lists.params[0].device):
        launch = _Listed(lists, numbers)
        if gate is None or not gate.per_tensor:
            launch("whole", launch.none, launch.none)
            return
        parts = torch.empty(2, launch.chunks, dtype=torch.float64, device=launch.device)
        launch("moments", parts[0], parts[1])
        means = gate.pool(*launch.pooled(parts))
        launch("weights", means[0], means[1])


def captured_update_(
    lists: TensorLists,
    numbers: dict[str, Any],
    gate: Gate | None,
    *,
    rows: list[int],
    t: Tensor,
    taken: Tensor,
) -> None:
    """The same without a copy from the host, nor a choice by value.

    Args:
        lists: as for :func:`update_`.
        numbers: likewise; each a number, or a float64 tensor of one entry per counter.
        gate: likewise.
        rows: which counter is each tensor's.
        t: counters, float64.
        taken: 0-d boolean: whether anything may change.
    """
    with _on(lists.params[0].device):
        table = torch.stack([torch.zeros_like(t) + numbers.get(name, 0.0) for name in COLUMNS], 1)
        own = [table[i] for i in rows]
        launch = _OneByOne(lists, numbers, own, taken.to(torch.int32))
        if gate is None or not gate.per_tensor:
            for j in range(len(lists.params)):
                launch("whole", j, table, table)
            return
        sums = t.new_empty(3, len(rows))
        for j in range(len(lists.params)):
            launch.moments(j, sums)
        means = gate.pool(sums[:2], sums[2])
        for j in range(len(lists.params)):
            launch("weights", j, means[0, j], means[1, j])


def try_out(device: torch.device) -> None:
    """Compile and run the kernels once, on a number.

    Raises:
        Exception: whatever Triton and the compiler that it needs raise.
    """
    one, t = torch.zeros(1, device=device), torch.ones(1, device=device, dtype=torch.float64)
    lists = TensorLists([one], *([torch.zeros_like(one)] for _ in range(4)))
    numbers = {"estimator": native.ESTIMATORS["ema"], "eps": 1.0, "v_correction": 1.0}
    taken = captured_beyond(lists.grads) == 0
    captured_update_(lists, numbers, None, rows=[0], t=t, taken=taken)


class _Listed:
    """Launches on the same tensors, which the kernel finds by their addresses."""

    def __init__(self, lists: TensorLists, numbers: Mapping[str, Any]) -> None:
        self.device, self.tensors = lists.params[0].device, len(lists.params)
        columns = [native.addresses(column) for column in lists if column]
        sizes = native.sizes(lists.params)
        coefficients = array.array("d", [numbers.get(name, 0.0) for name in COLUMNS])
        empty = array.array("q", bytes(8 * (5 - len(columns)) * self.tensors))
        sent = _sent([coefficients, *columns, empty, sizes], self.device)
        self.numbers = sent[: len(COLUMNS)].view(torch.float64)
        self.addresses = sent[len(COLUMNS) : -self.tensors]
        self.sizes = sent[-self.tensors :]
        self.places = places(tuple(sizes), BLOCK, self.device)
        self.chunks = self.places.blocks.shape[1]
        self.none = self.numbers  # where a kernel takes a pointer that it does not read
        self.how = _codes(lists, numbers)
        self.aligned = not any(a % 16 for column in columns for a in column)

    def __call__(self, phase: str, mean_sq: Tensor, variance: Tensor) -> None:
        if self.chunks:
            kernels.update_listed[(self.chunks,)](
                *(self.numbers, self.addresses, self.sizes, self.places.blocks),
                *(mean_sq, variance, self.tensors, self.chunks),
                **self.how,
                phase=native.PHASES[phase],
                aligned=self.aligned,
                size=BLOCK,
                enable_fp_fusion=False,
            )

    def pooled(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over each tensor, (2, tensors), and how many numbers each holds, (tensors,)."""
        sums = parts.new_empty(3, self.tensors)
        kernels.pool_listed[(self.tensors,)](
            *(parts[0], parts[1], self.places.firsts, self.sizes, sums, self.tensors), size=BLOCK
        )
        return sums[:2], sums[2]


class _OneByOne:
    """Launches on one tensor at a time, which the kernel is given."""

    def __init__(
        self, lists: TensorLists, numbers: Mapping[str, Any], rows: TensorList, taken: Tensor
    ) -> None:
        self.rows, self.taken, self.how = rows, taken, _codes(lists, numbers)
        self.columns = [[_real(x) for x in column] for column in lists[:5]]

    def __call__(self, phase: str, j: int, mean_sq: Tensor, variance: Tensor) -> None:
        tensors = [column[j] if column else self.rows[j] for column in self.columns]
        numel = tensors[0].numel()
        if numel:
            kernels.update_one[(_blocks(numel),)](
                *(*tensors, self.rows[j], mean_sq, variance, self.taken, numel),
                **self.how,
                phase=native.PHASES[phase],
                size=BLOCK,
                enable_fp_fusion=False,
            )

    def moments(self, j: int, sums: Tensor) -> None:
        """Update the moments of tensor j, and put what its mask needs into its column of sums."""
        numel = self.columns[0][j].numel()
        parts = sums.new_empty(2, _blocks(numel))
        self("moments", j, parts[0], parts[1])
        kernels.pool_one[(1,)](
            *(parts[0], parts[1], sums[0, j:], parts.shape[1], numel, sums.shape[1]), size=BLOCK
        )


def beyond(grads: TensorList) -> Tensor:
    """A number on the device, not 0 if a gradient holds NaN, Inf, or what cannot be squared.

    Args:
        grads: contiguous, of one dtype.
    """
    device, sizes = grads[0].device, native.sizes(grads)
    found = torch.zeros((), dtype=torch.int32, device=device)
    limit = _limit(grads[0].dtype.to_real())
    with _on(device):
        sent = _sent([native.addresses(grads), sizes], device)
        blocks = places(tuple(sizes), BLOCK, device).blocks
        if chunks := blocks.shape[1]:
            kernels.look_listed[(chunks,)](
                *(sent, sent[len(grads) :], blocks, found, chunks), **limit, size=BLOCK
            )
    return found


def captured_beyond(grads: TensorList) -> Tensor:
    """The same without a copy from the host."""
    found = torch.zeros((), dtype=torch.int32, device=grads[0].device)
    with _on(grads[0].device):
        for g in map(_real, grads):
            if g.numel():
                kernels.look_one[(_blocks(g.numel()),)](
                    *(g, found, g.numel()), **_limit(g.dtype), size=BLOCK
                )
    return found


@functools.lru_cache(maxsize=64)
def places(sizes: tuple[int, ...], size: int, device: torch.device) -> Places:
    """Cut tensors into blocks of a size, the last of each perhaps incomplete."""
    counts = torch.tensor([-(-n // size) for n in sizes], dtype=torch.int64)
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    number = torch.arange(len(tensor)) - firsts[tensor]
    blocks = torch.stack([tensor, number]).to(torch.int32)
    return Places(blocks.to(device), firsts.to(device))


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _sent(arrays: Sequence[array.array[Any]], device: torch.device) -> Tensor:
    """Arrays of eight-byte numbers, one after the other, as int64 on a device, in one copy."""
    buffers = [torch.frombuffer(x, dtype=torch.int64) for x in arrays if len(x)]
    return torch.cat(buffers).to(device, non_blocking=True)


def _codes(lists: TensorLists, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "param_kind": _kind(lists.params[0].dtype),
        "grad_kind": _kind(lists.grads[0].dtype),
        "real": _kind(state_dtype(lists.params[0])),
        "estimator": numbers["estimator"],
        "mask": numbers.get("mask", native.MASKS["open"]),
    }


def _kind(dtype: torch.dtype) -> Any:
    return KINDS[dtype.to_real()]


@functools.cache
def _limit(dtype: torch.dtype) -> dict[str, Any]:
    """What :data:`kernels.look_one` compares bit patterns with."""
    return {
        "bits": BITS[dtype.itemsize],
        "unsigned": 2 ** (8 * dtype.itemsize - 1) - 1,
        "limit": native.limit_bits(size_limit(dtype), dtype),
    }


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
