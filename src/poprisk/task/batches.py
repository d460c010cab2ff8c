"""How an epoch is cut into batches, alike for every arm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAST_BATCH = "a last batch of one example joins the one before it"
"""The rule, as the record says it."""


def split_batches(order: Tensor, size: int) -> Sequence[Tensor]:
    """Cut an order of examples into batches of ``size`` and a shorter last one.

    A last batch of one example joins the batch before it: batch normalization has nothing to
    normalize over in one example, and its gradient is the noisiest of the epoch.

    Args:
        order: positions (n,).
        size: examples per batch; with 1, every batch is of one example.

    Example:
        >>> [len(batch) for batch in split_batches(torch.arange(9), 4)]
        [4, 5]
    """
    batches = order.split(size)
    if len(batches) > 1 and len(batches[-1]) == 1 < size:
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


def batch_sizes(examples: int, size: int) -> list[int]:
    """The sizes of batches that occur in an epoch, the largest first."""
    return sorted({len(batch) for batch in split_batches(torch.arange(examples), size)})[::-1]


def joins_last(examples: int, size: int) -> bool:
    """Whether the last batch of an epoch would be of one example and joins the one before."""
    return size > 1 and examples > size and examples % size == 1
