"""A process of a distributed test, from its group's start to its end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WORLD = 2


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Inputs (size, 5) and noisy targets (size, 1) of one step, the same on every process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True) + noise


def mine() -> slice:
    """This process's share of a batch."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def full(t: Tensor) -> Tensor:
    """All of a tensor, wherever its parts are."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def weights(model: nn.Module) -> Tensor:
    """All weights of a model, flat."""
    return torch.cat([full(p).flatten() for p in model.parameters()])


@contextmanager
def joined(rank: int, folder: Path | str, world: int = WORLD) -> Iterator[None]:
    """Be one of some processes with one thread; ends the process where the block ends well.

    Args:
        rank: from 0.
        folder: where all meet.
        world: how many there are.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    yield
    dist.barrier()  # the first to leave would take the store from the other
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo that are not joined yet abort an interpreter that takes itself down.
    os._exit(0)
