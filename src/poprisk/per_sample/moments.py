"""Sums over examples of the gradients of one parameter and of their squares."""

from __future__ import annotations

import torch
from torch import Tensor

from poprisk.per_sample.terms import Dense, OneHot, Outer, Term, dense

CACHED = 131_072
"""Elements of per-example gradients that are formed at a time."""


def moments(terms: list[Term]) -> tuple[Tensor, Tensor]:
    r""":math:`\sum_{ik} G_{ik}` and :math:`\sum_{ik} G_{ik}^2`, flat, in the parameter's order.

    With one position per example the squares are the product of the squared factors; otherwise
    gradients are formed for a few examples at a time.
    """
    terms = [wide(term) for term in terms]
    pair = _one_position(terms)
    if pair is None:
        return _formed(terms)
    of_rows, of_columns = pair
    return (of_rows.T @ of_columns).flatten(), _squares_of(of_rows, of_columns)


def squares_of(terms: list[Term]) -> Tensor:
    """The second of :func:`moments` alone."""
    terms = [wide(term) for term in terms]
    pair = _one_position(terms)
    return _formed(terms)[1] if pair is None else _squares_of(*pair)


def _squares_of(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    return (of_rows.square().T @ of_columns.square()).flatten()


def wide(term: Term) -> Term:
    """In float32 at least: squares of scaled float16 gradients overflow."""
    if isinstance(term, Dense):
        return term._replace(grads=_at_least_float32(term.grads))
    activation = (
        term.activation
        if isinstance(term.activation, OneHot)
        else _at_least_float32(term.activation)
    )
    return term._replace(cotangent=_at_least_float32(term.cotangent), activation=activation)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _one_position(terms: list[Term]) -> tuple[Tensor, Tensor] | None:
    """The factors, a row an example, where each has one position; of rows and of columns."""
    term = terms[0]
    if len(terms) > 1 or isinstance(term, Dense):
        return None
    cotangent, activation = term.cotangent.flatten(0, 2), term.activation
    if isinstance(activation, OneHot) or term.cotangent.shape[2] != 1:
        return None
    activation = activation.flatten(0, 1)
    if len(cotangent) > len(activation):
        activation = activation.repeat_interleave(len(cotangent) // len(activation), dim=0)
    return (activation, cotangent) if term.flipped else (cotangent, activation)


def _looked_up(term: Outer, activation: OneHot) -> tuple[Tensor, Tensor]:
    """An embedding: only rows that an example uses have a gradient."""
    b, k, t, r = term.cotangent.shape
    example = torch.arange(b * k, device=term.cotangent.device)[:, None].expand(b * k, t)
    indices = activation.indices[:, None].expand(b, k, t).reshape(b * k, t)
    keys, inverse = (example * activation.size + indices).unique(return_inverse=True)
    grads = term.cotangent.new_zeros(len(keys), r).index_add_(
        0, inverse.flatten(), term.cotangent.flatten(0, 2)
    )
    total = term.cotangent.new_zeros(2, activation.size, r)
    total[0].index_add_(0, keys % activation.size, grads)
    total[1].index_add_(0, keys % activation.size, grads.square())
    if not term.flipped:
        total = total.mT
    return total[0].flatten(), total[1].flatten()


def _formed(terms: list[Term]) -> tuple[Tensor, Tensor]:
    first = terms[0]
    if len(terms) == 1 and isinstance(first, Outer) and isinstance(first.activation, OneHot):
        return _looked_up(first, first.activation)
    like = first.cotangent if isinstance(first, Outer) else first.grads
    elements = (
        first.cotangent.shape[3] * first.columns if isinstance(first, Outer) else like.shape[2]
    )
    sums, squares = like.new_zeros(elements), like.new_zeros(elements)
    step = max(1, CACHED // max(1, elements * like.shape[1]))
    for i in range(0, len(like), step):
        grads = dense([term.part(slice(i, i + step)) for term in terms]).flatten(0, 1)
        if len(grads) == 1:
            sums += grads[0]
            squares.addcmul_(grads[0], grads[0])
        else:
            sums += grads.sum(dim=0)
            squares += grads.square().sum(dim=0)
    return sums, squares


def squared(tensor: Tensor) -> Tensor:
    """The square in at least float32, of each component of a complex number."""
    if tensor.is_complex():
        return torch.complex(tensor.real.square(), tensor.imag.square())
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()


def not_negative(variance: Tensor) -> Tensor:
    """Rounding below zero cut off, in each component of a complex number."""
    if variance.is_complex():
        return torch.complex(variance.real.clamp(min=0), variance.imag.clamp(min=0))
    return variance.clamp_(min=0)


def total(terms: list[Term]) -> Tensor:
    r""":math:`\sum_i G_i` alone, flat, in the parameter's order, of one value per example."""
    found = _total_of(wide(terms[0]))
    for term in map(wide, terms[1:]):
        found = found + _total_of(term)
    return found


def _total_of(term: Term) -> Tensor:
    if isinstance(term, Dense):
        return term.grads.flatten(0, 1).sum(dim=0)
    cotangent, activation = term.cotangent.flatten(0, 2), term.activation
    if isinstance(activation, OneHot):
        table = cotangent.new_zeros(activation.size, cotangent.shape[1]).index_add_(
            0, activation.indices.flatten(), cotangent
        )
        return (table if term.flipped else table.mT).flatten()
    rows = activation.flatten(0, 1)
    return (rows.T @ cotangent if term.flipped else cotangent.T @ rows).flatten()


def energy(terms: list[Term]) -> Tensor:
    r""":math:`\sum_{ik} \|G_{ik}\|^2`, the sum of what :func:`squares_of` gives."""
    terms = [wide(term) for term in terms]
    pair = _one_position(terms)
    if pair is None:
        return _formed(terms)[1].sum()
    of_rows, of_columns = pair
    return (of_rows.square().sum(1) * of_columns.square().sum(1)).sum()
