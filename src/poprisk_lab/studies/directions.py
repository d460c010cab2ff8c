r"""When directions of output space are learned: along v the residual is :math:`v^\top g_t`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.path import Run
from poprisk.path.channel import Spectrum
from poprisk_lab.studies.criteria import rank_correlation

WEAKEST = 0.01
"""A direction counts if it holds this share of the mean squared output gradient at the start."""


def output_gradients(run: Run) -> Tensor:
    """Realized output gradients before each step and at the end, (K+1, N)."""
    problem = run.problem.to(torch.float64)
    rows = []
    with torch.no_grad():
        for k in range(len(run) + 1):
            u = problem.J.outputs(run.weights[k].double(), problem.train[0])
            rows.append(problem.output_gradient(u).flatten())
    return torch.stack(rows)


def half_times(gradients: Tensor, directions: Tensor) -> Tensor:
    r"""First step at which :math:`|v^T g_t| \le |v^T g_0|/2`, (r,); K+1 where there is none.

    Args:
        gradients: (K+1, N).
        directions: (N, r), one in each column.

    Example:
        >>> half_times(torch.tensor([[4.0, 1.0], [2.0, 1.0]]), torch.eye(2)).tolist()
        [1, 2]
    """
    along = (gradients @ directions).abs()
    gone = along <= along[0] / 2
    first = gone.int().argmax(0)
    return torch.where(gone.any(0), first, len(gradients))


def strong_directions(g: Tensor, directions: Tensor) -> Tensor:
    """Which directions hold at least :data:`WEAKEST` of the mean square of g, (r,)."""
    along = (directions.T @ g).square()
    return along >= WEAKEST * along.mean()


class LearningOrder(NamedTuple):
    """Whether directions are learned in the order of their eigenvalues.

    Attributes:
        correlation: rank correlation of small eigenvalues and half-times.
        half_times: of the strong directions, largest eigenvalue first.
    """

    correlation: float
    half_times: Tensor


def learning_order(gradients: Tensor, spectrum: Spectrum) -> LearningOrder:
    """The order in which the strong directions of a spectrum are learned.

    Args:
        gradients: realized output gradients, (K+1, N).
        spectrum: the directions.
    """
    strong = strong_directions(gradients[0], spectrum.directions)
    halves = half_times(gradients, spectrum.directions)[strong]
    eigenvalues = spectrum.eigenvalues[strong]
    return LearningOrder(rank_correlation((-eigenvalues).tolist(), halves.tolist()), halves)
