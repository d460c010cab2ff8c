r"""The variance of the batch mean from what DDP's processes disagree on.

With R processes and local gradients :math:`g_r`,
:math:`\frac{1}{R(R-1)}\sum_r (g_r - \bar g)^2` is an unbiased estimate of the variance of
:math:`\bar g` (ours). DDP averages the gradients; a communication hook lets it average their
squares along with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk.optim.variance import GivenVariances


class Observation(NamedTuple):
    """The variance of one averaged gradient, and the norm that gradient had."""

    variance: Tensor
    norm: Tensor

    def rescaled(self, grad: Tensor) -> Tensor:
        """The variance of ``grad``: the averaged gradient after clipping or unscaling."""
        factor = (grad.norm() / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)).square()
        return self.variance * factor


def observe_ranks(model: Any, optimizer: Optimizer) -> None:
    """Let a DistributedDataParallel model tell an optimizer how its processes differ.

    Needed once by ``PopRiskAdamW(variance="data-parallel")``. One reduction of twice the size
    takes the place of DDP's own.

    Args:
        model: the wrapped model, on at least two processes.
        optimizer: of the model's parameters.

    Raises:
        TypeError: if ``model`` takes no communication hook.
        ValueError: on one process, which disagrees with nobody.
    """
    if not hasattr(model, "register_comm_hook"):
        raise TypeError(
            "observe_ranks() takes a DistributedDataParallel model, but got "
            f"{type(model).__name__}."
        )
    world = torch.distributed.get_world_size()
    if world < 2:
        raise ValueError(
            f"observe_ranks() needs at least 2 processes to compare, but there are {world}; use "
            'variance="ema".'
        )
    # DDP accepts no other annotation of a hook than its own classes
    model.register_comm_hook(optimizer, lambda state, bucket: _reduce(state, bucket))  # pyrefly: ignore


def rank_variances(
    params: Sequence[Tensor], observations: dict[Tensor, Observation]
) -> GivenVariances:
    """The variance of each gradient, as it is now.

    Raises:
        RuntimeError: if a gradient has no observation.
    """
    if not all(p in observations for p in params):
        raise RuntimeError(
            'variance="data-parallel" has no observation of a gradient of this step: call '
            "poprisk.observe_ranks(ddp_model, optimizer) once before training, on at least two "
            "processes, and reduce the gradients with DistributedDataParallel."
        )
    return {p: partial(observations[p].rescaled, cast(Tensor, p.grad)) for p in params}


def _reduce(optimizer: Any, bucket: Any) -> Any:
    world = torch.distributed.get_world_size()
    grads, sizes = bucket.buffer(), [g.numel() for g in bucket.gradients()]
    both = torch.cat([grads, grads.square()]).div_(world)

    def split(future: Any) -> Tensor:
        mean, square = future.value()[0].chunk(2)
        variance = (square - mean.square()).clamp_min_(0.0).div_(world - 1)
        pieces = zip(bucket.parameters(), variance.split(sizes), mean.split(sizes), strict=True)
        for p, s, m in pieces:
            optimizer.rank_observations[p] = Observation(s.view(p.shape), m.norm())
        return mean

    return torch.distributed.all_reduce(both, async_op=True).get_future().then(split)
