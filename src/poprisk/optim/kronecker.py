r"""Bases of matrices in which a step is taken: eigenvectors of two Kronecker factors.

The gradient of a linear layer over a batch is :math:`G = \sum_i d_i a_i^\top`, of gradients
:math:`d_i` at its output and inputs :math:`a_i`. Two running averages,

.. math:: L \leftarrow \beta L + (1-\beta)\, b \sum_i d_i d_i^\top, \qquad
          R \leftarrow \beta R + (1-\beta)\, \tfrac1b \sum_i a_i a_i^\top,

have eigenvectors U and V, and :math:`U^\top G V` is the gradient in the basis of their products,
which is orthonormal: Adam, the variance of the batch mean and the mask work there on each
coordinate as they do anywhere (the theorem behind the mask holds in any fixed orthonormal basis,
[LG, Thm 6.5]). With :math:`L = GG^\top` and :math:`R = G^\top G` it is the basis of Shampoo (Gupta
et al., arXiv:1802.09568) as SOAP keeps it (Vyas et al., arXiv:2409.11321); that of the factors of
examples is that of K-FAC (Martens and Grosse, arXiv:1503.05671).

Of a layer whose examples have so many positions that their gradients :math:`G_i` take less room
than the factors, as those of most convolutions, L and R are averages of
:math:`b \sum_i G_i G_i^\top` and :math:`b \sum_i G_i^\top G_i`. A parameter of which a batch was
of that kind stays with it, as lengths may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.dtensor import layout_of, local
from poprisk.optim.matrices import as_matrix, matrix_shape
from poprisk.optim.state import ADAM_KEYS, BASES, FACTORS, check_layout
from poprisk.optim.update import state_dtype
from poprisk.per_sample.moments import CACHED, wide
from poprisk.per_sample.terms import Dense, OneHot, Outer, Term

AVERAGES = (*ADAM_KEYS, "grad_mean_var")
"""What is kept in the basis."""
OF_GRADIENTS = "factors_of_gradients"
"""State of a parameter whose factors are of the examples' gradients."""
SQUARES = ("exp_avg_sq", "grad_mean_var")
"""Averages of squares, which a change of basis mixes by squares of its entries."""

Pair = tuple[Tensor | None, Tensor | None]
"""Of the rows and of the columns of a matrix; None: this side is left as it is."""
NO_PAIR: Pair = (None, None)


class Rotation(NamedTuple):
    """The basis of one parameter, of rows and of columns; orthogonal matrices, or None.

    Attributes:
        left: (rows, rows), a basis vector a column.
        right: (columns, columns), likewise.
    """

    left: Tensor | None
    right: Tensor | None

    def forward(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape in this basis, of the basis' precision."""
        return _between(tensor, self.left.mT if self.left is not None else None, self.right)

    def back(self, tensor: Tensor) -> Tensor:
        """A tensor in this basis as one of the parameter's."""
        return _between(tensor, self.left, self.right.mT if self.right is not None else None)

    def terms(self, terms: Sequence[Term], shape: Sequence[int]) -> list[Term]:
        """Per-example gradients of a parameter of this shape in this basis, in factors."""
        return [self._term(wide(term), shape) for term in terms]

    def is_cheaper_on(self, terms: Sequence[Term], shape: Sequence[int]) -> bool:
        """Whether to turn the factors of examples and multiply takes less than turning their sum.

        By multiplications; of few rows in wide layers.
        """
        rows, columns = shape[0], math.prod(shape[1:])
        of_rows, of_columns = (0 if x is None else len(x) for x in self)
        turning = rows * columns * (of_rows + of_columns)
        return all(isinstance(term, Outer) for term in terms) and turning > sum(
            term.cotangent[..., 0].numel() * (rows * (of_rows + columns) + columns * of_columns)
            for term in terms
            if isinstance(term, Outer)
        )

    def _term(self, term: Term, shape: Sequence[int]) -> Term:
        if isinstance(term, Dense):
            grads = term.grads.unflatten(-1, (shape[0], -1))
            return term._replace(grads=self._each(grads).flatten(-2))
        of_output, of_input = (self.right, self.left) if term.flipped else (self.left, self.right)
        cotangent, activation = term.cotangent, term.activation
        if of_output is not None:
            cotangent = _times(cotangent, of_output)
        if of_input is not None:
            activation = _inputs_in(activation, of_input)
        return term._replace(cotangent=cotangent, activation=activation)

    def _each(self, matrices: Tensor) -> Tensor:
        if self.left is not None:
            matrices = self.left.mT.to(matrices.dtype) @ matrices
        return matrices if self.right is None else matrices @ self.right.to(matrices.dtype)


def _inputs_in(activation: Tensor | OneHot, basis: Tensor) -> Tensor:
    """Inputs in a basis; those of an embedding, as one that is tied to a head, are unit rows."""
    if isinstance(activation, OneHot):
        return basis[activation.indices]
    return _times(activation, basis)


def _times(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows (..., c) in a basis, by one product; torch may take one for each outer index."""
    return (rows.flatten(0, -2) @ basis.to(rows.dtype)).view(*rows.shape[:-1], -1)


def _between(tensor: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    matrix = as_matrix(tensor)
    if left is not None:
        matrix = left @ matrix.to(left.dtype)
    if right is not None:
        matrix = matrix.to(right.dtype) @ right
    return matrix.reshape(tensor.shape)


def rotation_of(p: Tensor, state: dict[str, Any]) -> Rotation | None:
    """The present basis of a parameter, None while it has none; in the precision of its state."""
    found = [state.get(key) for key in BASES]
    if all(basis is None for basis in found):
        return None
    dtype = state_dtype(p)
    return Rotation(*(None if basis is None else basis.to(dtype) for basis in found))


class ExampleSums(NamedTuple):
    """Factors of some examples: sums of both sides that rotate.

    Attributes:
        gradients: what a factor on the loss multiplies by its square.
        inputs: what it does not change.
        of_gradients: whether they are of the examples' gradients, not of what these are made of.
    """

    gradients: Pair = NO_PAIR
    inputs: Pair = NO_PAIR
    of_gradients: bool = False

    def plus(self, other: ExampleSums) -> ExampleSums:
        """Of both; of those of gradients alone if the two are of different kinds."""
        if self.of_gradients != other.of_gradients:
            return self if self.of_gradients else other
        gradients = plus_pair(self.gradients, other.gradients)
        return ExampleSums(gradients, plus_pair(self.inputs, other.inputs), self.of_gradients)

    def times(self, of_gradients: float, of_inputs: float) -> ExampleSums:
        """Each times a number."""
        gradients = scaled_pair(self.gradients, of_gradients)
        return self._replace(gradients=gradients, inputs=scaled_pair(self.inputs, of_inputs))

    def total(self, scale: float = 1.0) -> Pair:
        """Both added up, the former times ``scale``."""
        return plus_pair(scaled_pair(self.gradients, scale), self.inputs)


def factors_of_terms(
    terms: Sequence[Term], p: Tensor, sides: tuple[bool, bool], *, of_gradients: bool = False
) -> ExampleSums:
    r"""Sums :math:`\sum_i d_i d_i^\top` and :math:`\sum_i a_i a_i^\top` of the sides that rotate.

    Over examples and positions, of layers called twice over both calls; or, if one of the terms
    holds gradients, :math:`\sum_i G_i G_i^\top` and :math:`\sum_i G_i^\top G_i`. An embedding's
    rows are looked up, not mixed: that side keeps its coordinates.

    Args:
        terms: of the parameter.
        p: it.
        sides: which rotate.
        of_gradients: take the second kind in any case.
    """
    of_gradients = of_gradients or any(isinstance(term, Dense) for term in terms)
    found = ExampleSums(of_gradients=of_gradients)
    for term in map(wide, terms):
        looked_up = isinstance(term, Outer) and isinstance(term.activation, OneHot)
        kind = _factors_of_gradients if of_gradients and not looked_up else _factors_of
        found = found.plus(kind(term, p, sides)._replace(of_gradients=of_gradients))
    return found


def _factors_of_gradients(term: Term, p: Tensor, sides: tuple[bool, bool]) -> ExampleSums:
    """Of gradients, which are formed for a few examples at a time unless they are there."""
    left, right = None, None
    if isinstance(term, Dense):
        examples = step = len(term.grads)
    else:
        examples, step = len(term.cotangent), max(1, CACHED // p.numel())
    for i in range(0, examples, step):
        grads = term.part(slice(i, i + step)).dense().flatten(0, 1).unflatten(-1, (len(p), -1))
        left = plus(left, _gram(grads.transpose(0, 1).flatten(1).mT) if sides[0] else None)
        right = plus(right, _gram(grads) if sides[1] else None)
    return ExampleSums((left, right))


def _factors_of(term: Term, p: Tensor, sides: tuple[bool, bool]) -> ExampleSums:
    assert isinstance(term, Outer)
    given, (of_output, of_input) = term.activation, sides[::-1] if term.flipped else sides
    output = _gram(term.cotangent) if of_output else None
    mixed = _gram(given) if of_input and isinstance(given, Tensor) else None
    if term.flipped:
        return ExampleSums((None, output), (mixed, None))
    return ExampleSums((output, None), (None, mixed))


def _gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, -2)
    return flat.mT @ flat


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    return b if a is None else a if b is None else a + b


def plus_pair(a: Pair, b: Pair) -> Pair:
    """The sum on each side."""
    return plus(a[0], b[0]), plus(a[1], b[1])


def scaled_pair(pair: Pair, scale: float) -> Pair:
    """A pair times a number."""
    if scale == 1:
        return pair
    left, right = pair
    return left if left is None else left * scale, right if right is None else right * scale


def fits(terms: Sequence[Term], p: Tensor) -> bool:
    """Whether the factors are of the parameter's rows and columns, as those of groups are not."""
    rows, columns = matrix_shape(p)
    for term in terms:
        if isinstance(term, Outer):
            sizes = (term.cotangent.shape[-1], term.columns)
            if (sizes[::-1] if term.flipped else sizes) != (rows, columns):
                return False
    return True


def factors_of_gradient(grad: Tensor, sides: tuple[bool, bool]) -> Pair:
    r""":math:`GG^\top` and :math:`G^\top G` of the sides that rotate."""
    g = as_matrix(grad)
    return g @ g.mT if sides[0] else None, g.mT @ g if sides[1] else None


def begin_factors_anew_(state: dict[str, Any], *, of_gradients: bool) -> None:
    """Forget averages of factors of the other kind than those of a step."""
    if of_gradients and OF_GRADIENTS not in state:
        for key in FACTORS:
            state.pop(key, None)
        state[OF_GRADIENTS] = torch.ones(())


def add_factors_(state: dict[str, Any], found: Pair, decay: float) -> None:
    """Put the factors of a step into their averages; the first as it is.

    Args:
        state: of the parameter.
        found: factors that are :func:`finite`; of a sharded parameter DTensors of the averages'
            layout.
        decay: of the averages.
    """
    for key, factor in zip(FACTORS, found, strict=True):
        if factor is None:
            continue
        if key in state:
            average = local(state[key])
            average.lerp_(local(factor).to(average.dtype), 1 - decay)
        else:
            state[key] = factor.clone()


def finite(found: Pair) -> Pair:
    """Those that are finite."""
    left, right = (x if x is not None and _finite(x) else None for x in found)
    return left, right


def _finite(factor: Tensor) -> bool:
    """Whether a sum of outer squares is finite: none of its numbers exceeds its diagonal."""
    return bool(factor.diagonal().sum().isfinite())


def is_due(step: int, every: int) -> bool:
    """Whether the basis is found anew after this step: 2, 4, 8, ..., later every so many."""
    return step % every == 0 or (1 < step < every and step & (step - 1) == 0)


def first_rotation(found: Pair) -> Rotation | None:
    """The eigenvectors of the first factors; None where there are none, or not finite ones."""
    if all(x is None for x in found):
        return None
    if not all(_finite(x) for x in found if x is not None):
        return None
    return Rotation(*(x if x is None else _eigenvectors(x) for x in found))


def adopt_(p: Tensor, state: dict[str, Any], rotation: Rotation) -> None:
    """Go from coordinates over into a first basis."""
    for key, basis in zip(BASES, rotation, strict=True):
        if basis is not None:
            state[key] = basis.to(state_dtype(p))
    carry_(state, rotation)


def refresh_(state: dict[str, Any], *, exact: bool) -> None:
    """Find the basis anew from the factors, and carry the averages over into it.

    A side that is rotated by now, as ``max_dim`` was raised, gets its first.

    Args:
        state: of a parameter that has a basis.
        exact: by eigenvectors; else by one step of orthogonal iteration from the present basis.
    """
    changes: list[Tensor | None] = []
    for factor_key, key in zip(FACTORS, BASES, strict=True):
        if factor_key not in state:
            changes.append(None)
            continue
        factor, old = state[factor_key], state.get(key)
        new = _eigenvectors(factor) if exact or old is None else _iterated(factor, old)
        changes.append(new if old is None else old.to(new.dtype).mT @ new)
        state[key] = new
    carry_(state, Rotation(*changes))


def carry_(state: dict[str, Any], change: Rotation) -> None:
    """Turn averages by ``change``; those of squares by the squares of its entries."""
    squares = Rotation(*(None if c is None else c.square() for c in change))
    for key in AVERAGES:
        if key in state:
            by = squares if key in SQUARES else change
            state[key].copy_(by.forward(state[key]))


def check_basis_shapes(index: int, p: Tensor, state: Mapping[str, Any]) -> None:
    """Raise ValueError if loaded factors or bases are not of the parameter's rows and columns."""
    sizes, layout = matrix_shape(p) if p.dim() > 1 else (0, 0), layout_of(p)
    for keys in (FACTORS, BASES):
        for key, size in zip(keys, sizes, strict=True):
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape != (size, size):
                raise ValueError(
                    f"state_dict does not fit this optimizer: state {key!r} of parameter {index} "
                    f"has shape {tuple(value.shape)}, but the parameter has shape "
                    f"{tuple(p.shape)}. Load the checkpoint of the same model, with the parameters "
                    "in the same order."
                )
            if isinstance(value, Tensor):
                check_layout(index, key, value, layout and layout.by_rows())


def _eigenvectors(factor: Tensor) -> Tensor:
    """By falling eigenvalue; row by row in memory, so that products round alike once reloaded."""
    return torch.linalg.eigh(factor.double()).eigenvectors.flip(1).to(factor.dtype).contiguous()


def _iterated(factor: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration, whose columns stay near those of before."""
    q, r = torch.linalg.qr(factor @ basis.to(factor.dtype))
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)).contiguous()
