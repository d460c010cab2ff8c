"""Inner products between the per-example gradients of one parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from poprisk.per_sample.terms import Dense, OneHot, Outer, Term, dense

PANEL = 256
"""Rows of a symmetric Gram matrix that are computed at once; above it only one triangle is."""


def gram_(
    out: Tensor, left: list[Term], right: list[Term], weight: Tensor | None, workspace: int
) -> None:
    r"""Add inner products :math:`\langle G_{ik}, M \odot G'_{jl}\rangle` to ``out``, (b·k, b'·k').

    Of two ways the one with fewer operations is taken: through the factors, without forming the
    gradients, or by forming them, some rows of the parameter at a time.

    Args:
        out: what to add to; if ``left`` is ``right``, only :func:`panels` of it.
        left: terms of one set of examples.
        right: terms of the same parameter for another set; the same object: symmetric.
        weight: M, of the parameter's shape; None for ones.
        workspace: elements that temporaries may take, roughly.
    """
    if left is not right:
        _add(out, left, right, weight, workspace)
        return
    b, k = size(left)
    left = formed(left, weight, workspace)
    for rows, columns in panels(b, k):
        upper = [t.part(rows) for t in left]
        lower = upper if rows == columns else [t.part(columns) for t in left]
        block = out[rows.start * k : rows.stop * k, columns.start * k : columns.stop * k]
        _add(block, upper, lower, weight, workspace)


def formed(terms: list[Term], weight: Tensor | None, workspace: int) -> list[Term]:
    """The gradients themselves, where their inner products need these and they fit in at once."""
    if _in_factors(terms, terms, weight) or _elements(terms) > workspace:
        return terms
    return [Dense(dense(terms), _shape(terms[0]))]


def panels(b: int, k: int) -> Iterator[tuple[slice, slice]]:
    """Pairs of ranges of examples that cover the lower triangle of a symmetric Gram matrix."""
    step = max(1, PANEL // k)
    ranges = [slice(i, min(i + step, b)) for i in range(0, b, step)]
    return ((rows, columns) for i, rows in enumerate(ranges) for columns in ranges[: i + 1])


def mirror_(out: Tensor, b: int, k: int) -> None:
    """Complete a symmetric Gram matrix whose :func:`panels` are known."""
    for rows, columns in panels(b, k):
        if rows != columns:
            high = slice(rows.start * k, rows.stop * k)
            low = slice(columns.start * k, columns.stop * k)
            out[low, high] = out[high, low].T


def squared_norms(terms: list[Term], weight: Tensor | None, workspace: int) -> Tensor:
    r"""Weighted squared norms :math:`\langle G_{ik}, M \odot G_{ik}\rangle`, (b, k)."""
    outers = [t for t in terms if isinstance(t, Outer)]
    if weight is None and len(outers) == len(terms) and _norms_in_factors(outers):
        return torch.stack([_own_products(x, y) for x in outers for y in outers]).sum(0)
    b, k = size(terms)
    out = like(terms).new_zeros(b, k)
    for rows in _row_chunks(terms, b * k, workspace):
        grads = dense([_of_rows(t, rows) for t in terms])
        scaled = grads if weight is None else grads * _weight_rows(weight, rows, terms[0])
        out += (scaled * grads).sum(dim=2)
    return out


def size(terms: list[Term]) -> tuple[int, int]:
    """Examples and values per example."""
    b, k = like(terms).shape[:2]
    return b, k


def like(terms: list[Term]) -> Tensor:
    """A tensor of the dtype, device and leading sizes (b, k) of the terms."""
    return terms[0].cotangent if isinstance(terms[0], Outer) else terms[0].grads


def _add(
    out: Tensor, left: list[Term], right: list[Term], weight: Tensor | None, workspace: int
) -> None:
    if not _in_factors(left, right, weight):
        _add_dense(out, left, right, weight, workspace)
        return
    outers = [t for t in left if isinstance(t, Outer)], [t for t in right if isinstance(t, Outer)]
    table = out.unflatten(1, size(right)).unflatten(0, size(left))
    for x in outers[0]:
        for y in outers[1]:
            pairs = x.cotangent[0, :, :, 0].numel() * y.cotangent[..., 0].numel()
            step = max(1, workspace // max(1, 2 * pairs))
            for i in range(0, len(table), step):
                rows = slice(i, i + step)
                if weight is None:
                    _add_products(table[rows], x.part(rows), y)
                else:
                    _add_weighted(table[rows], x.part(rows), y, weight)


def _in_factors(left: list[Term], right: list[Term], weight: Tensor | None) -> bool:
    """Whether inner products go through the factors, taking less work than forming gradients."""
    outers = [t for t in left if isinstance(t, Outer)], [t for t in right if isinstance(t, Outer)]
    whole = len(outers[0]) < len(left) or len(outers[1]) < len(right)
    return not whole and _factors_pay(*outers, weight)


def _elements(terms: list[Term]) -> int:
    """Elements of the gradients themselves."""
    b, k = size(terms)
    rows, columns = _matrix_shape(terms[0])
    return b * k * rows * columns


def _shape(term: Term) -> tuple[int, ...]:
    return _matrix_shape(term) if isinstance(term, Outer) else term.shape


def _factors_pay(left: list[Outer], right: list[Outer], weight: Tensor | None) -> bool:
    """Whether inner products through the factors take fewer operations than forming gradients."""
    (b, k), (c, m) = left[0].cotangent.shape[:2], right[0].cotangent.shape[:2]
    x, y = left[0], right[0]
    elements = x.columns * x.cotangent.shape[3]
    pairs = (
        b * c * sum(u.cotangent.shape[2] for u in left) * sum(u.cotangent.shape[2] for u in right)
    )
    formed = (
        b * k * x.cotangent.shape[2] + c * m * y.cotangent.shape[2] + b * k * c * m
    ) * elements
    if weight is None:
        return pairs * (x.columns + k * m * (x.cotangent.shape[3] + 1)) < formed
    one_position = x.cotangent.shape[2] == y.cotangent.shape[2] == len(left) == len(right) == 1
    looked_up = isinstance(x.activation, OneHot)
    return (
        one_position
        and not looked_up
        and pairs * (elements + k * m * x.cotangent.shape[3]) < formed
    )


def _add_products(out: Tensor, x: Outer, y: Outer) -> None:
    """Add ⟨G, G'⟩ to ``out`` (b, k, b', k')."""
    if x.flipped == y.flipped:
        first, second = _dot(x.cotangent, y.cotangent), _dot(x.activation, y.activation)
    else:
        first, second = _dot(x.cotangent, y.activation), _dot(x.activation, y.cotangent)
    if x.cotangent.shape[2] == y.cotangent.shape[2] == 1:
        out.addcmul_(first[:, :, 0, :, :, 0], second[:, :, 0, :, :, 0])
    else:
        out += (first * second).sum(dim=(2, 5))


def _dot(x: Tensor | OneHot, y: Tensor | OneHot) -> Tensor:
    """Inner products of all vectors of two factors, (b, k or 1, t, b', k' or 1, t')."""
    if isinstance(x, OneHot):
        if isinstance(y, OneHot):
            equal = x.indices.reshape(-1, 1) == y.indices.flatten()
            return equal.unflatten(0, (len(x.indices), 1, -1)).unflatten(3, (len(y.indices), 1, -1))
        return _dot(y, x).permute(3, 4, 5, 0, 1, 2)
    rows = x.unsqueeze(1) if x.ndim == 3 else x
    if isinstance(y, OneHot):
        found = rows.flatten(0, 2)[:, y.indices.flatten()]
        return found.unflatten(0, rows.shape[:3]).unflatten(3, (len(y.indices), 1, -1))
    columns = y.unsqueeze(1) if y.ndim == 3 else y
    products = rows.flatten(0, 2) @ columns.flatten(0, 2).T
    return products.unflatten(0, rows.shape[:3]).unflatten(3, columns.shape[:3])


def _add_weighted(out: Tensor, x: Outer, y: Outer, weight: Tensor) -> None:
    """Add ⟨G, M ⊙ G'⟩ to ``out`` for one position: row by row of the output's side."""
    assert isinstance(x.activation, Tensor)
    assert isinstance(y.activation, Tensor)
    matrix = weight.reshape(x.columns, -1).T if x.flipped else weight.reshape(-1, x.columns)
    inputs, others = x.activation[:, 0], y.activation[:, 0]
    for o, row in enumerate(matrix):
        pairs = (inputs * row) @ others.T
        products = x.cotangent[:, :, 0, o].flatten()[:, None] * y.cotangent[:, :, 0, o].flatten()
        out.addcmul_(products.reshape(out.shape), pairs[:, None, :, None])


def _add_dense(
    out: Tensor, left: list[Term], right: list[Term], weight: Tensor | None, workspace: int
) -> None:
    same = left is right
    for rows in _row_chunks(left, len(out) + (0 if same else out.shape[1]), workspace):
        x = dense([_of_rows(t, rows) for t in left]).flatten(0, 1)
        y = x if same else dense([_of_rows(t, rows) for t in right]).flatten(0, 1)
        if weight is not None:
            x = x * _weight_rows(weight, rows, left[0])
        out.addmm_(x, y.T)


def _row_chunks(terms: list[Term], gradients: int, workspace: int) -> list[slice]:
    """Ranges of rows of the parameter such that so many gradients of a range fit."""
    rows, columns = _matrix_shape(terms[0])
    step = max(1, workspace // max(1, gradients * columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _matrix_shape(term: Term) -> tuple[int, int]:
    if isinstance(term, Dense):
        rows = term.shape[0] if term.shape else 1
        return rows, term.grads.shape[2] // max(1, rows)
    r, c = term.cotangent.shape[3], term.columns
    return (c, r) if term.flipped else (r, c)


def _weight_rows(weight: Tensor, rows: slice, term: Term) -> Tensor:
    return weight.reshape(_matrix_shape(term)[0], -1)[rows].flatten()


def _of_rows(term: Term, rows: slice) -> Term:
    """The gradients of some rows of the parameter."""
    if isinstance(term, Dense):
        count, columns = _matrix_shape(term)
        return term._replace(grads=term.grads.unflatten(2, (count, columns))[:, :, rows].flatten(2))
    if not term.flipped:
        return term._replace(cotangent=term.cotangent[..., rows])
    if isinstance(term.activation, Tensor):
        return term._replace(activation=term.activation[..., rows])
    inside = (term.activation.indices >= rows.start) & (term.activation.indices < rows.stop)
    indices = torch.where(inside, term.activation.indices - rows.start, 0)
    cotangent = term.cotangent * inside[:, None, :, None]
    return term._replace(cotangent=cotangent, activation=OneHot(indices, rows.stop - rows.start))


def _norms_in_factors(terms: list[Outer]) -> bool:
    t = sum(term.cotangent.shape[2] for term in terms)
    r, c = terms[0].cotangent.shape[3], terms[0].columns
    return t * (r + c) <= r * c


def _own_products(x: Outer, y: Outer) -> Tensor:
    """⟨G_ik, G'_ik⟩ of two terms for the same examples, (b, k)."""
    if x.flipped == y.flipped:
        return (_own_dot(x.cotangent, y.cotangent) * _own_dot(x.activation, y.activation)).sum(
            dim=(2, 3)
        )
    return (_own_dot(x.cotangent, y.activation) * _own_dot(x.activation, y.cotangent)).sum(
        dim=(2, 3)
    )


def _own_dot(x: Tensor | OneHot, y: Tensor | OneHot) -> Tensor:
    """Inner products between positions of the same example and value, (b, k or 1, t, t')."""
    if isinstance(x, OneHot):
        if isinstance(y, OneHot):
            return (x.indices[:, :, None] == y.indices[:, None, :])[:, None]
        return _own_dot(y, x).mT
    rows = x.unsqueeze(1) if x.ndim == 3 else x
    if isinstance(y, OneHot):
        index = y.indices[:, None, None, :].expand(*rows.shape[:3], -1)
        return rows.gather(3, index)
    return rows @ (y.unsqueeze(1) if y.ndim == 3 else y).mT
