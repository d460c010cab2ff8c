"""Spectra of symmetric operators that are known through their products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.printing import short_html, short_repr


class Estimate(NamedTuple):
    """A number and its standard error (:class:`poprisk.Estimated`).

    Attributes:
        value: the estimate.
        standard_error: of the value; 0 if it is exact.
        valid: whether both are finite.
        reason: why not.
        cost: in trainings; NaN where no training is known.
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    cost: float

    __repr__ = short_repr
    _repr_html_ = short_html

    @classmethod
    def of(cls, value: float, standard_error: float, cost: float = math.nan) -> Estimate:
        """One that is valid if both numbers are finite."""
        reason = "" if math.isfinite(standard_error) else "nothing tells the standard error"
        reason = reason if math.isfinite(value) else "the value is not finite"
        return cls(value, standard_error, not reason, reason, cost)


class Eigenpairs(NamedTuple):
    r"""Largest eigenvalues of a symmetric matrix K.

    Attributes:
        values: (k,), in descending order.
        vectors: (n, k), orthonormal columns.
        residuals: (k,), :math:`\|K v - \lambda v\|`: an eigenvalue of K lies that near. That is a
            bound, no standard error; it does not say that no larger eigenvalue was missed.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    __repr__ = short_repr


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    tolerance: float,
    max_products: int,
    max_columns: int | None = None,
) -> Eigenpairs:
    """Largest eigenpairs by a block Krylov method with full orthogonalization.

    Where the basis would outgrow ``max_columns``, it is restarted from its best pairs (a thick
    restart: Wu and Simon 2000), whose images are known without a product.

    Args:
        product: K times the columns of (n, s).
        start: (n, s) random; with s ≥ the multiplicity of an eigenvalue all of it is found.
        k: number of pairs.
        tolerance: largest residual, relative to the largest eigenvalue.
        max_products: columns that may be multiplied in all.
        max_columns: columns of the basis, at least 3 s or n; None: no limit.
    """
    n, width = start.shape
    most = min(n, max_products + width, n if max_columns is None else max_columns)
    # Rows of one piece of memory: to concatenate would take half as much again, and fragment it.
    basis, images = start.new_empty(2, max(most, width), n)
    block = torch.linalg.qr(start).Q
    size = spent = 0
    while True:
        width = block.shape[1]
        basis[size : size + width] = block.T
        images[size : size + width] = product(block).T
        size, spent = size + width, spent + width
        found = _ritz(basis[:size].T, images[:size].T, k)
        limit = tolerance * float(found.values[0].abs())
        full = size >= n or spent >= max_products
        if full or (size >= k and bool((found.residuals <= limit).all())):
            return found
        block = _orthogonal_part(images[size - width : size].T, basis[:size].T)[:, : n - size]
        if block.shape[1] == 0:
            return found
        if size + block.shape[1] > most:
            size = _restart(basis, images, size, max(k, (most - block.shape[1]) // 2))


def _restart(basis: Tensor, images: Tensor, size: int, kept: int) -> int:
    """Replace a basis by the best approximations within its span, in place; how many are kept.

    What all of them lack lies along the block that comes next, so that the method goes on as if
    nothing had been left out.
    """
    turn = _rotation(basis[:size].T, images[:size].T)[1][:, :kept].T
    for rows in (basis, images):
        rows[:kept] = turn @ rows[:size]
    return kept


def _rotation(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of K within the span of ``basis``, descending, and vectors in its terms."""
    projected = basis.T @ images
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return values.flip(0), vectors.flip(1)


def _ritz(basis: Tensor, images: Tensor, k: int) -> Eigenpairs:
    """The best approximations within the span of ``basis``."""
    values, vectors = (found[..., :k] for found in _rotation(basis, images))
    residuals = torch.linalg.vector_norm(images @ vectors - basis @ vectors * values, dim=0)
    return Eigenpairs(values, basis @ vectors, residuals)


def _orthogonal_part(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what ``block`` adds to the span of ``basis``."""
    scale = torch.linalg.vector_norm(block, dim=0).max()
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    u, s, _ = torch.linalg.svd(block, full_matrices=False)
    kept = u[:, s > 100 * torch.finfo(block.dtype).eps * scale]
    return torch.linalg.qr(kept - basis @ (basis.T @ kept)).Q


def trace_estimate(product: Callable[[Tensor], Tensor], probes: Tensor) -> Estimate:
    r"""Hutchinson's estimate of a trace, the mean of :math:`z^\top K z` over random signs z.

    Args:
        product: K times the columns of (n, s).
        probes: (n, s) of independent random signs, s ≥ 2.
    """
    samples = (probes * product(probes)).sum(dim=0).double()
    return Estimate.of(float(samples.mean()), standard_error(samples))


def standard_error(samples: Tensor) -> float:
    """Of the mean of independent samples, (s,) with s ≥ 2."""
    return float(samples.std() / len(samples) ** 0.5)
