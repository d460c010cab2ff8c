r"""Per-example gradients of one parameter as sums of outer products.

For k values per example, b examples and t positions per example, the gradient of value k of
example i with respect to a matrix is

.. math:: G_{ik} = \sum_t \mathrm{cotangent}_{ikt} \otimes \mathrm{activation}_{it}

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
        cotangent: (b, k, t, r), gradients at the output.
        activation: (b, t, c), inputs, or their indices.
        flipped: whether the parameter is (c, r) instead of (r, c).
        shape: the parameter's shape, with r·c elements.
    """

    cotangent: Tensor
    activation: Tensor | OneHot
    flipped: bool
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """The length c of the inputs."""
        return (
            self.activation.size
            if isinstance(self.activation, OneHot)
            else self.activation.shape[-1]
        )

    def elements(self) -> int:
        """Elements of memory."""
        activation = (
            self.activation.indices if isinstance(self.activation, OneHot) else self.activation
        )
        return self.cotangent.numel() + activation.numel()

    def part(self, b: slice, k: slice = ALL) -> Outer:
        """The factors of some examples and values."""
        activation = self.activation
        some = (
            activation._replace(indices=activation.indices[b])
            if isinstance(activation, OneHot)
            else activation[b]
        )
        return self._replace(cotangent=self.cotangent[b, k], activation=some)

    def dense(self) -> Tensor:
        """The gradients themselves, (b, k, r·c) in the order of the parameter."""
        b, k, _, r = self.cotangent.shape
        if isinstance(self.activation, OneHot):
            table = self.cotangent.new_zeros(b, k, self.activation.size, r)
            index = self.activation.indices[:, None, :, None].expand(self.cotangent.shape)
            table.scatter_add_(2, index, self.cotangent)
            return (table if self.flipped else table.mT).reshape(b, k, -1)
        if k == 1:  # without the copy
            return self._products(0).reshape(b, 1, -1)
        shape = (self.columns, r) if self.flipped else (r, self.columns)
        grads = self.cotangent.new_empty(b, k, *shape)
        for i in range(k):
            grads[:, i] = self._products(i)
        return grads.reshape(b, k, -1)

    def _products(self, value: int) -> Tensor:
        """The gradients of one value of each example, (b, r, c), or (b, c, r) if flipped."""
        assert isinstance(self.activation, Tensor)
        cotangent = self.cotangent[:, value]
        return self.activation.mT @ cotangent if self.flipped else cotangent.mT @ self.activation


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
        elif isinstance(term.activation, OneHot):
            kept.append(term)
        else:
            joined.setdefault(term.flipped, []).append(term)
    for same in joined.values():
        cotangent = (
            torch.cat([term.cotangent for term in same], dim=2)
            if len(same) > 1
            else same[0].cotangent
        )
        acts = [term.activation for term in same if isinstance(term.activation, Tensor)]
        activation = torch.cat(acts, dim=1) if len(acts) > 1 else acts[0]
        kept.append(same[0]._replace(cotangent=cotangent, activation=activation))
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
        activation, c = term.activation, term.columns
        matrix = flat.reshape(c, -1) if term.flipped else flat.reshape(-1, c).T
        mapped = (
            matrix[activation.indices] if isinstance(activation, OneHot) else activation @ matrix
        )
        total = total + torch.einsum("bktr,btr->bk", term.cotangent, mapped)
    return torch.as_tensor(total)
