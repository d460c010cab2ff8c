"""Where the examples lie, learnt from small batches and used for large ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from poprisk.per_sample.graph import (
    TRUSTED,
    Graph,
    Use,
    as_matrix,
    confirmed,
    find_uses,
    is_trusted,
    walk,
)
from poprisk.per_sample.layouts import Layout, shapes


class Outline(NamedTuple):
    """What graphs of a model share, whatever the number of examples.

    Attributes:
        name: kind of the node.
        owner: its parameter, if it is one.
        inputs: positions of the nodes it takes from, and which of their outputs.
    """

    name: str
    owner: str | None
    inputs: tuple[tuple[int | None, int], ...]


class Plan(NamedTuple):
    """The uses of parameters in graphs of one outline.

    Attributes:
        outline: of every node.
        shapes: of every node's outputs in the graph that it was learnt from.
        uses: found there, with layouts that do not depend on the number of examples.
    """

    outline: list[Outline]
    shapes: list[tuple[tuple[int, ...], ...]]
    uses: list[Use]

    def uses_in(self, graph: Graph, values: Tensor) -> list[Use] | None:
        """The same uses in the graph of other values (b, k); None where they do not fit.

        Shapes alone do not tell: the same operations may rearrange larger batches.
        """
        examples = len(values)
        if _outline(graph) != self.outline:
            return None
        for use in self.uses:
            found = shapes(graph.nodes[use.node])
            for before, now, layout in zip(self.shapes[use.node], found, use.layouts, strict=True):
                if layout is not None and not _fits(before, now, layout, examples):
                    return None
        return self.uses if confirmed(graph, values, self.uses) else None


def learn_plan(
    values_of: Callable[[list[int]], Tensor],
    params: Mapping[str, Tensor],
    *,
    examples: int,
    size: int,
) -> Plan | None:
    """Where the examples lie in graphs of a model, from the values of a few small batches.

    Args:
        values_of: from positions of examples to their values (b, k), with the graph.
        params: by name.
        examples: how many there are to choose from.
        size: of each batch.

    Returns:
        None if the batches leave doubts.
    """
    names = {id(p): name for name, p in params.items()}
    generator = torch.Generator().manual_seed(0)
    plan = None
    for _ in range(TRUSTED):
        order = torch.randperm(examples, generator=generator)[:size]
        with torch.enable_grad():
            matrix = as_matrix(values_of(order.tolist()))
        if matrix.grad_fn is None:
            return None
        graph = walk(matrix.grad_fn, names)
        uses = find_uses(graph, matrix)
        plan = None
        if is_trusted(graph):
            plan = Plan(_outline(graph), [shapes(node) for node in graph.nodes], uses)
    return plan


def _outline(graph: Graph) -> list[Outline]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    return [
        Outline(
            node.name(),
            graph.owners.get(node),
            tuple((position.get(cast(Node, child)), k) for child, k in node.next_functions),
        )
        for node in graph.nodes
    ]


def _fits(before: tuple[int, ...], now: tuple[int, ...], layout: Layout, examples: int) -> bool:
    """Whether only the number of examples differs between two shapes."""
    expected = list(before)
    expected[layout.dim] = layout.rows * examples
    return tuple(expected) == now
