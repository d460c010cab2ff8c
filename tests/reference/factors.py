r"""Per-example gradients, naively: one backward pass per value, one dense row each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def jacobian(values: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of every value with respect to every parameter.

    Args:
        values: (b,) or (b, k), with a graph.
        params: leaves by name.

    Returns:
        By name (b·k, P), float64 with the values of one example next to each other; the two
        components of a complex number are two coordinates.
    """
    rows = [
        torch.autograd.grad(value, list(params.values()), retain_graph=True, materialize_grads=True)
        for value in values.flatten()
    ]
    return {
        name: torch.stack([_real(row[i]).flatten() for row in rows]).double()
        for i, name in enumerate(params)
    }


def gram(
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    precondition: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r""":math:`J M J'^\top` of two sets of Jacobian rows, with a diagonal M by name."""
    total = torch.zeros((), dtype=torch.float64)
    for name, rows in left.items():
        weight = torch.ones(1) if precondition is None else _paired(precondition[name], rows)
        total = total + (rows * weight.double()) @ right[name].T
    return total


def products(rows: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> Tensor:
    """Inner products of every row with a vector in parameter space, (b·k,)."""
    return torch.stack(
        [rows[name] @ _real(v).flatten().double() for name, v in vector.items()]
    ).sum(dim=0)


def sums(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the rows over examples and values, flat."""
    return {name: r.sum(dim=0) for name, r in rows.items()}


def squares(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the squares of the rows over examples and values, flat."""
    return {name: r.square().sum(dim=0) for name, r in rows.items()}


def variance_of_mean(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r""":math:`\Sigma_B / (b - 1)` with :math:`\Sigma_B = \frac1b \sum_i (g_i - \bar g)^2`, flat."""
    return {
        name: (r - r.mean(dim=0)).square().mean(dim=0) / (len(r) - 1) for name, r in rows.items()
    }


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense()  # of a sparse embedding
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _paired(weight: Tensor, rows: Tensor) -> Tensor:
    """A weight per real coordinate: repeated for the two components of complex numbers."""
    return weight.flatten().repeat_interleave(rows.shape[1] // max(1, weight.numel()))
