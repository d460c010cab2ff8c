"""How an epoch is cut into batches, alike for every arm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAST_BATCH = "a last batch of one example joins the one before it"
"""The rule, as the record says it."""
DROPPED = "a last batch that is not full is left out"
"""The rule with ``drop_last``."""


def split_batches(
    order: Tensor, size: int, *, drop_last: bool = False, least: int = 2
) -> Sequence[Tensor]:
    """Cut an order of examples into batches of ``size`` and a shorter last one.

    A last batch of fewer than ``least`` examples joins the batch before it: batch normalization has
    nothing to normalize over in one example, and its gradient is the noisiest of the epoch.

    Args:
        order: positions (n,).
        size: examples per batch; with 1, every batch is of one example.
        drop_last: whether to leave the shorter one out, unless it is the only one.
        least: examples that a shorter one must have; at most ``size`` counts.

    Example:
        >>> [len(batch) for batch in split_batches(torch.arange(9), 4)]
        [4, 5]
    """
    batches = order.split(size)
    if drop_last and len(batches) > 1 and len(batches[-1]) < size:
        return batches[:-1]
    if len(batches) > 1 and len(batches[-1]) < min(least, size):
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


def batch_sizes(examples: int, size: int, *, drop_last: bool = False) -> list[int]:
    """The sizes of batches that occur in an epoch, the largest first."""
    batches = split_batches(torch.arange(examples), size, drop_last=drop_last)
    return sorted({len(batch) for batch in batches})[::-1]


def last_batch(examples: int, size: int, *, drop_last: bool = False) -> str:
    """What becomes of a last batch that is no batch like the others; empty if it is as it is."""
    if drop_last:
        return DROPPED * (examples > size and examples % size > 0)
    return LAST_BATCH * (size > 1 and examples > size and examples % size == 1)
