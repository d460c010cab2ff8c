r"""The variance of the batch mean from what DDP's processes disagree on.

With R processes and local gradients :math:`g_r`,
:math:`\frac{1}{R(R-1)}\sum_r (g_r - \bar g)^2` is an unbiased estimate of the variance of
:math:`\bar g` (ours). DDP averages the gradients; a communication hook lets it average their
squares along with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk import checks


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


def _observing(groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in groups:
        if group["gate"] and group["variance"] == "data-parallel":
            yield from ((p, group) for p in group["params"] if p.grad is not None and p.numel())


def check_observations(
    groups: list[dict[str, Any]], observations: dict[Tensor, Observation]
) -> None:
    """Raise RuntimeError if a gradient that needs an observation has none."""
    checks.check_observed(all(p in observations for p, _ in _observing(groups)))


def take_observations_(
    groups: list[dict[str, Any]], state: Any, observations: dict[Tensor, Observation]
) -> None:
    """Put the observations into the running averages, and forget them."""
    for p, group in _observing(groups):
        s, grad = state[p]["grad_mean_var"], p.grad
        if grad is not None:
            s.lerp_(observations[p].rescaled(grad).to(s.dtype), 1 - group["rho"])
    observations.clear()


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
