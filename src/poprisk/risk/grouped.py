r"""Examples that are left out together: how much of their response a group has in common.

Labels of one group (one patient, one document) pull at each other's outputs. With R the response of
the examples to pushes t, and m the size of a group,

.. math:: \sum_{i,j\in g} t_i\cdot R_j = \varphi\,(1+(m_g-1)\,\kappa)\,
          \Bigl|\sum_{i\in g}t_i\Bigr|^2,

fitted over all groups g, has its intraclass correlation κ. A response of :math:`\varphi` per
example is then one of :math:`\varphi(1+(m-1)\kappa)` of what a group has in common and of
:math:`\varphi(1-\kappa)` of what its examples differ by, the eigenvalues of a compound symmetric
matrix; each has a gain of its own, by which the outputs move that the model would have without the
group. Ours; prior art: Fisher (1925) for the correlation, leave-one-cluster-out cross-validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-300
"""What nothing is divided by."""
PAIRED = math.sqrt(1.6)
r"""By what a response J scatters more over signs than over examples.

Over signs :math:`\mathrm{Var}(z^\top Jz)=\sum_{i\ne j}(J_{ij}^2+J_{ij}J_{ji})`, of which one probe
shows the first sum only. The second one is as large if J is symmetric (gradient descent on a linear
model); on trained networks it was 0.6 of it (0.3 to 0.9 on eleven problems, 20 probes each).
"""


class Intraclass(NamedTuple):
    """What the responses of a group have in common.

    Attributes:
        correlation: κ, between 0 and 1.
        error: its standard error.
        deviations: of the groups from it, spread evenly over their examples, (probes, n).
    """

    correlation: float
    error: float
    deviations: Tensor


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sums (G, ...) of values (n, ...) by group id."""
    shape = (int(groups.max()) + 1, *values.shape[1:])
    return torch.zeros(shape, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def sizes_of(groups: Tensor) -> Tensor:
    """How many examples the group of each has, (n,)."""
    return torch.bincount(groups)[groups]


def grouped_error(deviations: Tensor, groups: Tensor | None) -> float:
    """Standard error of the sum of deviations (n,) whose groups are independent."""
    if groups is not None:
        deviations = group_sums(deviations, groups)
    n = len(deviations)
    return float(deviations.square().sum().sqrt()) * math.sqrt(n / max(n - 1, 1))


def intraclass(answers: Iterable[tuple[Tensor, Tensor]], groups: Tensor) -> Intraclass:
    """The intraclass correlation of a response, over all probes.

    Args:
        answers: of each probe, its pushes and the response to them, both (n, c).
        groups: ids 0..G-1, (n,).
    """
    answers = [*answers]
    sizes = torch.bincount(groups).double()
    size, response = (
        sum(float((t * d).sum()) for t, d in some)
        for some in ([(push, push) for push, _ in answers], answers)
    )
    alone = response / size
    pushed, answered = list[Tensor](), list[Tensor]()
    for push, moved in answers:
        sums = group_sums(push, groups)
        pushed.append(alone * sums.square().sum(1))
        answered.append((sums * group_sums(moved, groups)).sum(1))
    total = sum(float(((sizes - 1) * row).sum()) for row in pushed)
    none = torch.zeros(len(answers), len(groups), dtype=sizes.dtype, device=groups.device)
    if not total > 0:
        return Intraclass(0.0, 0.0, none)
    found = sum(float((a - p).sum()) for a, p in zip(answered, pushed, strict=True)) / total
    factor = 1 + (sizes - 1) * found
    deviations = [a - factor * p for a, p in zip(answered, pushed, strict=True)]
    error = PAIRED * math.hypot(*(grouped_error(row, None) for row in deviations)) / total
    spread = torch.stack([(row / sizes)[groups] for row in deviations])
    return Intraclass(min(max(found, 0.0), 1.0), error, spread)


def left_out_together(moves: Tensor, groups: Tensor, within: float, between: Tensor) -> Tensor:
    """How outputs move (n, c) without the whole group, from how they do without one example.

    Args:
        moves: of each without itself, (n, c).
        groups: ids 0..G-1, (n,).
        within: ratio of the gain of what the examples of a group differ by to that of one.
        between: likewise of what they have in common, (n,).
    """
    common = group_sums(moves, groups)[groups] / sizes_of(groups).unsqueeze(1)
    return within * (moves - common) + between.unsqueeze(1) * common
