"""The ranks of a distributed run: whether all have a monitor, and how weights are spread."""

from __future__ import annotations

import itertools
import warnings
from datetime import timedelta
from typing import Any, final

import torch

from poprisk.dtensor import processes

PATIENCE = timedelta(seconds=60)
"""How long the first measurement waits for the other ranks' monitors to be made."""

_MONITORS = itertools.count()


@final
class Ranks:
    """The ranks that have the same monitor: the same in number of those that each rank made."""

    def __init__(self) -> None:
        self.key = f"poprisk/monitor/{next(_MONITORS)}"
        self.together: bool | None = None
        if processes() > 1:
            self._store().set(f"{self.key}/{torch.distributed.get_rank()}", "here")

    def pool(self) -> bool:
        """Whether numbers are those of all ranks.

        A monitor that some ranks do not have would wait for them forever: it is found out once,
        through the store by which the ranks have met, and said.
        """
        if processes() == 1:
            return False
        if self.together is None:
            self.together = self._agree()
        return self.together

    def _agree(self) -> bool:
        store, ranks = self._store(), range(torch.distributed.get_world_size())
        store.set(f"{self.key}/{torch.distributed.get_rank()}", "here")
        try:
            store.wait([f"{self.key}/{rank}" for rank in ranks], PATIENCE)
            answer = "together"
        except RuntimeError:  # torch's for a time that is over
            answer = "alone"
        # The first answer holds for all: ranks that disagree would wait for each other.
        together = store.compare_set(f"{self.key}/answer", "", answer) == b"together"
        if not together:
            warnings.warn(
                f"the monitor measures rank {torch.distributed.get_rank()} alone: not every rank "
                "has made a monitor. Make one on every rank; rank 0 writes.",
                RuntimeWarning,
                stacklevel=2,
            )
        return together

    def _store(self) -> Any:
        return torch.distributed.distributed_c10d._get_default_store()


def writes() -> bool:
    """Whether this rank writes to the sinks."""
    return processes() == 1 or torch.distributed.get_rank() == 0
