"""Random numbers: a generator from a seed, and the state of the global ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from poprisk._validate import check_range


def generator_of(seed: int | torch.Generator, stream: str) -> torch.Generator:
    """A generator for one purpose; one of torch's, which the last release took, itself.

    Its numbers are not those that torch draws from the same seed: of one seed ``torch.randperm``
    makes one order, and the labels that a user flips by it, the order of a first epoch, and what is
    planted, held out or pushed here would be the same examples.

    Args:
        seed: an integer of 64 bits.
        stream: what is drawn: of two purposes the numbers of one seed are independent.

    Raises:
        TypeError, ValueError: for a bad argument.

    Example:
        >>> int(torch.randint(100, (), generator=generator_of(0, "probes")))
        97
    """
    if isinstance(seed, torch.Generator):
        return seed
    check_range("seed", seed, -(2**63), 2**63 - 1)
    digest = hashlib.blake2b(f"{stream} {int(seed)}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


class RandomState(NamedTuple):
    """Torch's (CPU and CUDA), numpy's and Python's global generators at one moment."""

    cpu: Tensor
    cuda: list[Tensor]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        numpy = np.random.get_state(legacy=False)
        return cls(torch.get_rng_state(), cuda, dict(numpy), random.getstate())

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[None]:
        """What is drawn inside, the numbers after it are those that would have come."""
        state = cls.now()
        try:
            yield
        finally:
            state.restore()

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def same(self, other: RandomState) -> bool:
        """Whether both would draw the same numbers."""
        mine, theirs = self.numpy["state"], other.numpy["state"]
        return (
            torch.equal(self.cpu, other.cpu)
            and all(map(torch.equal, self.cuda, other.cuda))
            and mine["pos"] == theirs["pos"]
            and np.array_equal(mine["key"], theirs["key"])
            and self.python == other.python
        )
