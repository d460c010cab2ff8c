"""Whether data decides to which example a row belongs, which differs from batch to batch.

Sequences packed into one row of positions, say, which an index, a mask or a matrix of zeros and
ones puts back together. Where the examples lie can then be told of each batch alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node

from poprisk.per_sample.layouts import Layout, in_order, indices_of, shapes, simplest

Candidates = Mapping[int, Sequence[Collection[Layout] | None]]
"""By position of the node and by output, the layouts that fit."""

CONTRACTED = {
    "MmBackward0": (1, 0),
    "BmmBackward0": (2, 1),
    "MvBackward0": (1, 0),
    "AddmmBackward0": (None, 1, 0),
    "AddmvBackward0": (None, 1, 0),
    "BaddbmmBackward0": (None, 2, 1),
    "SparseAddmmBackward0": (None, 1, 0),
}
"""Of each input of a product of matrices, the dimension that is summed over."""

BROADCASTS = frozenset(
    f"{name}Backward{i}"
    for i in range(2)
    for name in (
        "Add Sub Mul Div Pow Where MaskedFill Expand Repeat Addcmul Addcdiv Lerp Maximum Minimum "
        "Fmax Fmin Logaddexp Hypot Atan2 Fmod Remainder"
    ).split()
)
"""Nodes of one output that may spread an input over dimensions, before data picks some."""

BY_POSITION = frozenset(
    f"{name}Backward0"
    for name in (
        "Gather IndexSelect IndexAdd IndexCopy IndexReduce Scatter ScatterAdd ScatterReduce"
    ).split()
)
"""Nodes that read or write along one dimension where an index says."""

READ = frozenset(
    f"{name}Backward0"
    for name in "MaskedSelect Take SegmentReduce PackPaddedSequence Embedding".split()
)
"""Nodes that read their first input where data says."""

WRITTEN = frozenset(
    f"{name}Backward0" for name in "MaskedScatter Put IndexPut IndexPutImpl UnsafeIndexPut".split()
)
"""Nodes that write their other inputs into the first where data says."""


def is_moved_by_data(
    nodes: Sequence[Node], candidates: Candidates, without: Collection[Node | None]
) -> bool:
    """Whether some node that belongs to examples may bring a row to one of them or to another.

    Args:
        nodes: of the graph.
        candidates: layouts of their outputs.
        without: nodes that belong to no example.
    """
    position = {node: i for i, node in enumerate(nodes)}

    def layout_of(node: Node, output: int) -> Layout | None:
        found = candidates.get(position.get(node, -1), ())
        fitting = found[output] if output < len(found) else None
        return simplest(fitting) if fitting else None

    return any(
        _moves(node, edge, layout, layout_of(node, 0), shapes(child)[output])
        for node in nodes
        if node not in without
        for edge, (child, output) in enumerate(node.next_functions)
        if child is not None and child not in without
        if (layout := layout_of(child, output)) is not None
    )


def _moves(
    node: Any, edge: int, layout: Layout, after: Layout | None, shape: Sequence[int]
) -> bool:
    """Whether a node may take what comes in by ``edge``, laid out so, to other examples.

    Args:
        node: of an example.
        edge: which of its inputs.
        layout: of that input.
        after: of its first output.
        shape: of the input.
    """
    name = node.name()
    if name in READ or name in WRITTEN:
        return (edge == 0) == (name in READ)
    if name in BY_POSITION:
        return _by_position(node, edge, layout, len(shape))
    if name in ("IndexBackward0", "UnsafeIndexBackward0"):
        return not _indexed_in_order(node, layout.dim)
    if name in CONTRACTED:
        return CONTRACTED[name][edge] == layout.dim and _is_data(node, edge)
    if name in BROADCASTS and after is not None:
        return layout.dim + len(shapes(node)[0]) - len(shape) != after.dim
    return False


def _by_position(node: Any, edge: int, layout: Layout, ndim: int) -> bool:
    """What is written to stays where it is; what is read or written moves along one dimension."""
    reads = node.name() in ("GatherBackward0", "IndexSelectBackward0")
    dim = (node._saved_dim - (node._saved_dim >> 63 << 64)) % max(1, ndim)  # unsigned there
    if (edge == 0) != reads or dim != layout.dim:
        return False
    (index,) = indices_of(node)
    ordered = in_order(index)
    if index is None or ordered is None:
        return True
    return not ordered[0 if index.ndim < 2 else 1 + dim]


def _indexed_in_order(node: Any, dim: int) -> bool:
    """Whether an index leaves a dimension as it is: by no index there, or by 0, 1, 2, ..."""
    place = 0
    for index in indices_of(node):
        spans = index.ndim if index is not None and index.dtype == torch.bool else 1
        if place <= dim < place + spans:
            ordered = in_order(index)
            return index is None or (ordered is not None and ordered[0])
        place += spans
    return True


def _is_data(node: Any, edge: int) -> bool:
    """Whether the other factor of a product needs no gradient."""
    children = [child for child, _ in node.next_functions]
    first = len(children) - 2
    return children[first + (1 - (edge - first))] is None
