"""Tensors that are spread over processes (DTensor, as FSDP2 makes them), seen from one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def processes() -> int:
    """How many there are, 1 without torch.distributed."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; free where nobody has imported them."""
    if type(t) is Parameter or type(t) is Tensor:  # nearly always, and asked of each at each step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


SPLIT = {
    "placements": "a DTensor (FSDP2 or tensor parallelism)",
    "_fsdp_flattened": "part of a flat parameter (FSDP)",
    "_unpadded_unsharded_size": "a flat parameter (FSDP)",
    "ds_id": "partitioned by DeepSpeed",
}
"""Attributes by which a parameter tells that it is split between processes."""


def split_of(p: Tensor) -> str | None:
    """What a parameter is if it is split between processes; None if it is whole."""
    found = (what for mark, what in SPLIT.items() if getattr(p, mark, None) not in (None, False))
    return next(found, None)


def sharding_of(model: nn.Module) -> str | None:
    """What spreads a model's weights over processes, ``"FSDP1"`` or ``"FSDP2"``; None: neither.

    By the modules: while a batch goes through, parameters may be whole.
    """
    kinds = {kind.__name__ for m in model.modules() for kind in type(m).__mro__}
    if "FullyShardedDataParallel" in kinds:
        return "FSDP1"
    return "FSDP2" if "FSDPModule" in kinds else None


def local(t: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t  # pyrefly: ignore


def locals_of(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`local` of each."""
    return [local(t) for t in tensors] if any(map(is_sharded, tensors)) else tensors


def whole(t: Tensor) -> Tensor:
    """All of a DTensor on every process; any other tensor itself. Every process must ask."""
    return t.full_tensor() if is_sharded(t) else t  # pyrefly: ignore


def agreed(t: Tensor, layout: ShardLayout) -> Tensor:
    """What the first process of the layout's mesh has as ``t``, on each. Every process must ask."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    everywhere = [Replicate()] * layout.mesh.ndim
    return local(distribute_tensor(t.contiguous(), layout.mesh, everywhere))


def spread(t: Tensor, layout: ShardLayout) -> Tensor:
    """A whole tensor as a DTensor of this layout: each process keeps its part of what it has."""
    from torch.distributed.tensor import distribute_tensor

    cut = distribute_tensor(t, layout.mesh, layout.placements, src_data_rank=None)
    # Not a view, which would keep the whole in memory.
    return joined(local(cut).clone(), t.shape, layout)


def joined(part: Tensor, shape: Sequence[int], layout: ShardLayout) -> Tensor:
    """The DTensor of which each process has a part, of this shape in all."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(*shape, device="meta").stride()
    how = {"shape": torch.Size(shape), "stride": stride, "run_check": False}
    return DTensor.from_local(part, layout.mesh, layout.placements, **how)


def gradient_of(p: Tensor, layout: ShardLayout | None) -> Tensor:
    """The gradient of a parameter in the parameter's own layout."""
    grad: Any = p.grad
    if layout is None or layout_of(grad) == layout:
        return grad
    return grad.redistribute(layout.mesh, layout.placements)


class ShardLayout(NamedTuple):
    """How tensors of one kind are spread: a device mesh and a placement per dimension of it."""

    mesh: Any
    placements: tuple[Any, ...]

    def groups(self) -> list[Any]:
        """The process groups over which a sum over all entries must be reduced."""
        # Not is_shard(), which denies the strided shards of FSDP2 over tensor parallelism.
        split = (i for i, placement in enumerate(self.placements) if not placement.is_replicate())
        return [self.mesh.get_group(i) for i in split]

    def by_rows(self) -> ShardLayout:
        """Of square matrices that go with such a tensor: by rows, over the same processes."""
        from torch.distributed.tensor import Shard

        rows = (x if x.is_replicate() else Shard(0) for x in self.placements)
        return self._replace(placements=tuple(rows))


def layout_of(t: Tensor) -> ShardLayout | None:
    """The layout of a DTensor, None for any other tensor; equal layouts compare equal."""
    if not is_sharded(t):
        return None
    return ShardLayout(t.device_mesh, tuple(t.placements))  # pyrefly: ignore


def layouts_of(tensors: Sequence[Tensor]) -> list[ShardLayout | None]:
    """:func:`layout_of` each, at no cost where none is a DTensor."""
    if not any(map(is_sharded, tensors)):
        return [None] * len(tensors)
    return [layout_of(t) for t in tensors]


def global_sums(sums: Tensor, layout: ShardLayout | None) -> Tensor:
    """Sums over whole tensors from the sums over this process's parts of them."""
    for group in layout.groups() if layout is not None else []:
        torch.distributed.all_reduce(sums, group=group)
    return sums


class GlobalMeans(NamedTuple):
    """Averages over whole tensors from sums over this process's parts: the pool of a gate.

    One all-reduce per sharded dimension of the mesh.
    """

    layout: ShardLayout

    def __call__(self, sums: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        sizes = torch.as_tensor(counts, dtype=sums.dtype, device=sums.device)
        *rows, sizes = global_sums(torch.cat([sums, sizes[None]]), self.layout).unbind()
        return torch.stack(rows) / sizes


def all_agree(truth: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether ``truth`` holds on every process that has a part of one of the tensors.

    One all-reduce of a number per mesh; none without DTensors. Every process must skip the same
    steps, or their counters would part.
    """
    for mesh in _meshes(tensors):
        truth = bool(_least_(torch.tensor(float(truth), device=mesh.device_type), mesh).item())
    return truth


def everywhere(truth: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """:func:`all_agree` of a 0-d boolean tensor, without looking at it."""
    for mesh in _meshes(tensors):
        truth = _least_(truth.float(), mesh) > 0
    return truth


def _meshes(tensors: Sequence[Tensor]) -> set[Any]:
    return {layout.mesh for layout in layouts_of(tensors) if layout is not None}


def _least_(flag: Tensor, mesh: Any) -> Tensor:
    """The least value of a number over the processes of a mesh, in place."""
    for i in range(mesh.ndim):
        group = mesh.get_group(i)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return flag
