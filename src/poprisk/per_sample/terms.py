r"""Per-example gradients of one parameter as sums of outer products.

For k values per example, b examples and t positions per example, the gradient of value k of
example i with respect to a matrix is

.. math:: G_{ik} = \sum_t \mathrm{cot}_{ikt} \otimes \mathrm{act}_{it}

with the gradient that arrives at the layer's output and the layer's input. Everything that is
needed is computed from the two factors, or from :math:`G` where that is cheaper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALL = slice(None)


class OneHot(NamedTuple):
    """Rows of the identity: what an embedding's input stands for.

    Attributes:
        indices: (b, t), integers below ``size``.
        size: number of rows of the table.
    """

    indices: Tensor
    size: int


class Outer(NamedTuple):
    """Per-example gradients of a matrix in factors.

    Attributes:
        cot: (b, k, t, r), gradients at the output.
        act: (b, t, c), inputs, or their indices.
        flipped: whether the parameter is (c, r) instead of (r, c).
        shape: the parameter's shape, with r·c elements.
    """

    cot: Tensor
    act: Tensor | OneHot
    flipped: bool
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """The length c of the inputs."""
        return self.act.size if isinstance(self.act, OneHot) else self.act.shape[-1]

    def elements(self) -> int:
        """Elements of memory."""
        act = self.act.indices if isinstance(self.act, OneHot) else self.act
        return self.cot.numel() + act.numel()

    def part(self, b: slice, k: slice = ALL) -> Outer:
        """The factors of some examples and values."""
        act = self.act
        some = act._replace(indices=act.indices[b]) if isinstance(act, OneHot) else act[b]
        return self._replace(cot=self.cot[b, k], act=some)

    def dense(self) -> Tensor:
        """The gradients themselves, (b, k, r·c) in the order of the parameter."""
        b, k, _, r = self.cot.shape
        if isinstance(self.act, OneHot):
            table = self.cot.new_zeros(b, k, self.act.size, r)
            index = self.act.indices[:, None, :, None].expand(self.cot.shape)
            table.scatter_add_(2, index, self.cot)
            return (table if self.flipped else table.mT).reshape(b, k, -1)
        shape = (self.columns, r) if self.flipped else (r, self.columns)
        grads = self.cot.new_empty(b, k, *shape)
        for i in range(k):
            cot = self.cot[:, i]
            grads[:, i] = self.act.mT @ cot if self.flipped else cot.mT @ self.act
        return grads.reshape(b, k, -1)


class Dense(NamedTuple):
    """Per-example gradients themselves.

    Attributes:
        grads: (b, k, P), real, in the order of the parameter (complex ones as pairs).
        shape: the parameter's shape.
    """

    grads: Tensor
    shape: tuple[int, ...]

    def elements(self) -> int:
        """Elements of memory."""
        return self.grads.numel()

    def part(self, b: slice, k: slice = ALL) -> Dense:
        """The gradients of some examples and values."""
        return self._replace(grads=self.grads[b, k])

    def dense(self) -> Tensor:
        """The gradients, (b, k, P)."""
        return self.grads


Term = Outer | Dense


def dense(terms: list[Term]) -> Tensor:
    """The gradients of a parameter, (b, k, P), the sum over its terms."""
    first, *others = terms
    total = first.dense()
    for term in others:
        total = total + term.dense()
    return total


def merged(terms: list[Term]) -> list[Term]:
    """The same gradients in fewer terms: equal layers used twice are positions of one layer."""
    kept: list[Term] = []
    joined: dict[bool, list[Outer]] = {}
    whole: list[Dense] = []
    for term in terms:
        if isinstance(term, Dense):
            whole.append(term)
        elif isinstance(term.act, OneHot):
            kept.append(term)
        else:
            joined.setdefault(term.flipped, []).append(term)
    for same in joined.values():
        cot = torch.cat([term.cot for term in same], dim=2) if len(same) > 1 else same[0].cot
        acts = [term.act for term in same if isinstance(term.act, Tensor)]
        act = torch.cat(acts, dim=1) if len(acts) > 1 else acts[0]
        kept.append(same[0]._replace(cot=cot, act=act))
    if whole:
        grads = whole[0].grads if len(whole) == 1 else torch.stack([w.grads for w in whole]).sum(0)
        kept.append(whole[0]._replace(grads=grads))
    return kept


def products(terms: list[Term], vector: Tensor) -> Tensor:
    """Inner products of each gradient with a parameter-shaped vector, (b, k)."""
    flat = torch.view_as_real(vector).flatten() if vector.is_complex() else vector.flatten()
    total = 0
    for term in terms:
        if isinstance(term, Dense):
            total = total + term.grads @ flat
            continue
        act, c = term.act, term.columns
        matrix = flat.reshape(c, -1) if term.flipped else flat.reshape(-1, c).T
        mapped = matrix[act.indices] if isinstance(act, OneHot) else act @ matrix
        total = total + torch.einsum("bktr,btr->bk", term.cot, mapped)
    return torch.as_tensor(total)
