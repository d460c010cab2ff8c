"""What the gate lets through, module by module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.printing import short_repr

STARVED_BELOW = 0.02
"""A module is starved when its gated update has less than this share of the ungated RMS."""

VANISHING = 1e-20
"""Where a sum of squares is above it, squares that were lost to underflow do not matter."""


class GateStats(NamedTuple):
    r"""The gate on one module at the last step; coordinates without any gradient are left out.

    Attributes:
        pass_rate: share of coordinates above the threshold, :math:`\hat m^2 > \alpha\hat s`.
        mean_gate: mean of the mask q.
        update_ratio: RMS of the gated update over the RMS of the ungated Adam update.
        starved: ``update_ratio`` is below :data:`STARVED_BELOW`: the module practically stands
            still, apart from weight decay.
        coordinates: how many coordinates were counted.
    """

    pass_rate: float
    mean_gate: float
    update_ratio: float
    starved: bool
    coordinates: int

    __repr__ = short_repr


def gate_sums(q: Tensor, passed: Tensor, update: Tensor, active: Tensor) -> Tensor:
    """What one tensor adds to its module's statistics: five sums, float64.

    Args:
        q: mask, float32 or float64, any shape that broadcasts to ``update``.
        passed: 1 where the threshold is passed, likewise.
        update: ungated update, finite.
        active: 1 where the coordinate has received gradient, else 0; of the shape of ``update`` and
            the dtype of ``q``: sums of numbers are much faster than of booleans.
    """
    if not update.numel():  # a shard that holds nothing of the tensor
        return torch.zeros(5, dtype=torch.float64, device=update.device)
    u = (update * active).flatten()
    square, peak = u.dot(u).double(), 1.0
    if not VANISHING < float(square) < math.inf:  # squares that get lost, or overflow
        peak = float(u.abs().amax().clamp_min(torch.finfo(u.dtype).tiny))
        u = u / peak
        square = u.dot(u).double()
    gated = q.expand_as(update).flatten() * u
    counts = torch.stack([_dot(x, active) for x in (active, q, passed)]).double()
    squares = torch.stack([gated.dot(gated).double(), square]) * peak**2
    return torch.cat([counts, squares])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product, in one pass without temporaries; x may have to be broadcast."""
    return x.expand_as(y).flatten().dot(y.flatten())


def module_stats(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, GateStats]:
    """Pool the :func:`gate_sums` of the tensors of each module (their name's first part)."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for name, row in tensors:
        sums[name.rpartition(".")[0] or name] += row.cpu()
    return {name: _from_sums(row) for name, row in sums.items()}


def _from_sums(row: Tensor) -> GateStats:
    n, q, passed, gated, ungated = row.tolist()
    if n == 0 or ungated == 0:
        return GateStats(0.0, 0.0, 0.0, False, int(n))
    ratio = (gated / ungated) ** 0.5
    return GateStats(passed / n, q / n, ratio, ratio < STARVED_BELOW, int(n))
