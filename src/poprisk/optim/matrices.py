"""Parameters as matrices, and which of their sides a basis may rotate."""

from __future__ import annotations

import math

from torch import Tensor


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor as rows of its first dimension: (o, i) of a layer, (o, i·h·w) of a convolution."""
    return tensor.flatten(1)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of :func:`as_matrix`, without a look at the tensor."""
    return tensor.shape[0], math.prod(tensor.shape[1:])


def rotated_sides(p: Tensor, max_dim: int) -> tuple[bool, bool]:
    """Which sides of a parameter are rotated: of matrices, those of at most ``max_dim`` numbers.

    Vectors, matrices of one row or column and complex parameters keep their coordinates.
    """
    if p.dim() < 2 or p.is_complex() or not p.is_floating_point():
        return (False, False)
    rows, columns = matrix_shape(p)
    if min(rows, columns) < 2:
        return (False, False)
    return (rows <= max_dim, columns <= max_dim)
