"""Where the examples lie in the tensors of a graph, and what an index tensor says of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

REORDERS = frozenset(
    f"{name}Backward0"
    for name in (
        "Index UnsafeIndex IndexSelect IndexPut IndexPutImpl UnsafeIndexPut IndexAdd IndexCopy "
        "IndexReduce Gather Take Put Scatter ScatterAdd ScatterReduce Embedding"
    ).split()
)
"""Nodes that may exchange examples, as an index tensor says."""


class Layout(NamedTuple):
    """Where the examples lie in a tensor: along ``dim``, ``rows`` positions for each.

    Attributes:
        dim: the dimension, of size examples × rows.
        rows: positions per example in that dimension.
        major: whether the positions of one example are neighbours (else the examples are).
    """

    dim: int
    rows: int
    major: bool

    def first(self, tensor: Tensor, examples: int) -> Tensor:
        """View (k, ..., examples·rows, ...) as (k, examples, rows, ...)."""
        moved = tensor.movedim(self.dim + 1, 1)
        if self.major:
            return moved.unflatten(1, (examples, self.rows))
        return moved.unflatten(1, (self.rows, examples)).transpose(1, 2)

    def of_example(self, tensor: Tensor, index: int, examples: int) -> Tensor:
        """A view of the part of a tensor that belongs to one example."""
        if self.major:
            return tensor.narrow(self.dim, index * self.rows, self.rows)
        return tensor.unflatten(self.dim, (self.rows, examples)).select(self.dim + 1, index)


def indices_of(node: Any) -> Iterator[Tensor | None]:
    """The index tensors that a node has saved."""
    found = getattr(node, "_saved_indices", None)
    if found is None:
        found = getattr(node, "_saved_index", None)
    yield from found if isinstance(found, (tuple, list)) else [found]


def in_order(index: Tensor | None) -> list[bool] | None:
    """Whether an index is 0, 1, 2, ... as a whole, and along each dimension; None for a mask."""
    if index is None or index.dtype == torch.bool:
        return None
    views = [index.flatten(), *(index.movedim(d, -1) for d in range(index.ndim))]
    return [bool((v == torch.arange(v.shape[-1], device=v.device)).all()) for v in views]


def shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    """The shapes of a node's outputs."""
    return tuple(tuple(meta.shape) for meta in cast(Any, node)._input_metadata)


def possible(shape: tuple[int, ...], examples: int) -> list[Layout]:
    """Every layout that a shape allows, the most common first."""
    fitting = [(d, n // examples) for d, n in enumerate(shape) if n and n % examples == 0]
    layouts = [Layout(d, rows, True) for d, rows in fitting]
    return layouts + [Layout(d, rows, False) for d, rows in fitting if rows > 1]


def simplest(layouts: Collection[Layout]) -> Layout:
    """The one to take of several that fit: single rows first, then leading dimensions."""
    return min(layouts, key=lambda layout: (layout.rows > 1, layout.dim, not layout.major))


def consistent(layouts: set[Layout], grad: Tensor, senders: Tensor) -> set[Layout]:
    """Those layouts in which every example that sent nothing has a zero gradient."""
    examples = len(senders)
    nonzero = grad.detach() != 0
    found = set()
    for layout in layouts:
        others = [d for d in range(grad.ndim) if d != layout.dim]
        rows = nonzero.any(dim=others) if others else nonzero
        shape = (examples, -1) if layout.major else (-1, examples)
        per_example = rows.reshape(shape).any(dim=1 if layout.major else 0).cpu()
        if not bool((per_example & ~senders).any()):
            found.add(layout)
    return found
