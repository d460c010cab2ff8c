"""A process of a distributed test, from its group's start to its end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


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
