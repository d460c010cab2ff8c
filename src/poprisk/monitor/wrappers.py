"""Models inside of what is wrapped around them for speed or for several processes."""

from __future__ import annotations

import sys

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of data-parallel and compiling wrappers.

    The forward pass of the first would wait for other ranks; the second is not needed to measure.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def sharding_of(model: nn.Module) -> str | None:
    """Whether and how weights are spread over processes: by ``"FSDP2"``, ``"FSDP1"``, or not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    if any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        return "FSDP1"
    return "FSDP2" if any(isinstance(m, fsdp.FSDPModule) for m in model.modules()) else None
