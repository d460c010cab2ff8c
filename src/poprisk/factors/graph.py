"""Where parameters meet examples: reading the autograd graph of per-example values.

A backward pass leaves behind, in the nodes of its graph, all that per-example gradients are made
of. This module finds the nodes at which something that belongs to single examples meets something
that depends on parameters alone, and along which dimension the examples lie there.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        "View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias ToCopy Clone T Permute Transpose "
        "Slice Select Split SplitWithSizes Unbind Detach"
    ).split()
)
"""Nodes with one input whose output belongs to examples only if the input does."""

ORDERS = ("_saved_dims", "_saved_dim0", "_saved_dim1")
"""Saved attributes that say how a node reorders dimensions."""


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


class Use(NamedTuple):
    """One place where a parameter, or what is computed from parameters alone, meets examples.

    Attributes:
        node: position of the node in the order of the walk.
        edge: which input of the node comes from the parameters.
        layouts: where the examples lie in each output of the node; None: no gradient comes there.
    """

    node: int
    edge: int
    layouts: tuple[Layout | None, ...]


class Graph(NamedTuple):
    """The nodes between values and parameters, from the values down.

    Attributes:
        nodes: in topological order.
        owners: name of the parameter of each ``AccumulateGrad`` node that is asked for.
    """

    nodes: list[Node]
    owners: dict[Node, str]

    def signature(self) -> str:
        """What two graphs of equal structure share."""
        position = {node: i for i, node in enumerate(self.nodes)}
        return repr(
            [
                (
                    node.name(),
                    shapes(node),
                    self.owners.get(node),
                    [getattr(node, key, None) for key in ORDERS],
                    [(position.get(cast(Node, n)), k) for n, k in node.next_functions],
                )
                for node in self.nodes
            ]
        )


def shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    """The shapes of a node's outputs."""
    return tuple(tuple(meta.shape) for meta in cast(Any, node)._input_metadata)


def walk(root: Node, names: dict[int, str]) -> Graph:
    """The nodes from ``root`` to the parameters named by ``names`` (id of tensor → name)."""
    finished: dict[Node, bool] = {}
    owners: dict[Node, str] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if node in finished:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if not expanded:
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in finished)
            continue
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            owners[node] = name
        finished[node] = name is not None or any(finished[child] for child in children)
        if finished[node]:
            order.append(node)
    return Graph(order[::-1], owners)


def find_uses(graph: Graph, values: Tensor) -> list[Use]:
    """All places where parameters meet examples; remembered for graphs of equal structure."""
    key = graph.signature()
    if key in _REMEMBERED:
        _REMEMBERED.move_to_end(key)
        return _REMEMBERED[key]
    found = _find_layouts(graph, values)
    uses = _boundary(graph, found)
    if all(found[graph.nodes[use.node]].certain for use in uses):
        _REMEMBERED[key] = uses
        if len(_REMEMBERED) > 64:
            _REMEMBERED.popitem(last=False)
    return uses


_REMEMBERED: OrderedDict[str, list[Use]] = OrderedDict()


class _Found(NamedTuple):
    """The layouts of one node's outputs.

    Attributes:
        layouts: None where no gradient came, or where no layout fits.
        examples: whether all outputs that a gradient came to belong to single examples.
        certain: False if all gradients were zero.
    """

    layouts: tuple[Layout | None, ...]
    examples: bool
    certain: bool


def _find_layouts(graph: Graph, values: Tensor) -> dict[Node, _Found]:
    """Backpropagate from half of the examples, then from the others, and see which rows are zero.

    What belongs to an example has a zero gradient when only other examples send one.
    """
    examples = len(values)
    chosen = torch.zeros(examples, dtype=torch.bool)
    generator = torch.Generator().manual_seed(examples)
    chosen[torch.randperm(examples, generator=generator)[: (examples + 1) // 2]] = True
    weights = 0.5 + torch.rand(values.shape, generator=generator, dtype=torch.float64)
    candidates: dict[Node, list[set[Layout] | None]] = {}
    zero: dict[Node, bool] = {}

    for senders in (chosen, ~chosen):

        def watch(node: Node, grads: Sequence[Tensor | None], senders: Tensor = senders) -> None:
            zero[node] = zero.get(node, True) and not any(g is not None and g.any() for g in grads)
            before = candidates.get(node, [None] * len(grads))
            candidates[node] = [
                old if g is None else _consistent(g, senders) & (_all(old, g, examples))
                for g, old in zip(grads, before, strict=True)
            ]

        mask = senders.reshape(-1, *[1] * (values.ndim - 1))
        cotangent = (weights * mask).to(values.device, values.dtype)
        _backward(graph, values, cotangent, watch)
    return {
        node: _Found(
            tuple(_simplest(c) if c else None for c in found),
            all(c is None or bool(c) for c in found),
            not zero[node],
        )
        for node, found in candidates.items()
    }


def _all(old: set[Layout] | None, grad: Tensor, examples: int) -> set[Layout]:
    return set(_possible(tuple(grad.shape), examples)) if old is None else old


def _possible(shape: tuple[int, ...], examples: int) -> list[Layout]:
    """Every layout that a shape allows, the most common first."""
    fitting = [(d, n // examples) for d, n in enumerate(shape) if n and n % examples == 0]
    layouts = [Layout(d, rows, True) for d, rows in fitting]
    return layouts + [Layout(d, rows, False) for d, rows in fitting if rows > 1]


def _simplest(layouts: Collection[Layout]) -> Layout:
    return min(layouts, key=lambda layout: (layout.rows > 1, layout.dim, not layout.major))


def _consistent(grad: Tensor, senders: Tensor) -> set[Layout]:
    """The layouts in which every example that sent nothing has a zero gradient."""
    examples = len(senders)
    nonzero = grad.detach() != 0
    found = set()
    for layout in _possible(tuple(grad.shape), examples):
        others = [d for d in range(grad.ndim) if d != layout.dim]
        rows = nonzero.any(dim=others) if others else nonzero
        shape = (examples, -1) if layout.major else (-1, examples)
        per_example = rows.reshape(shape).any(dim=1 if layout.major else 0).cpu()
        if not bool((per_example & ~senders).any()):
            found.add(layout)
    return found


Watch = Callable[[Node, Sequence[Tensor | None]], None]


def _backward(graph: Graph, values: Tensor, cotangent: Tensor, watch: Watch) -> None:
    """One backward pass that shows every node its incoming gradients."""
    handles = [
        node.register_prehook(functools.partial(watch, node))
        for node in graph.nodes
        if node not in graph.owners
    ]
    edges = [GradientEdge(node, 0) for node in graph.owners]
    try:
        torch.autograd.grad(values, edges, cotangent, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _boundary(graph: Graph, found: dict[Node, _Found]) -> list[Use]:
    """The inputs of nodes of examples that come from nodes without examples."""
    without: set[Node] = set()
    for node in reversed(graph.nodes):
        inputs = [child for child, _ in node.next_functions if child is not None]
        if node in graph.owners:
            without.add(node)
        elif node.name() in VIEWS:
            if any(child in without for child in inputs):
                without.add(node)
        elif node in found and not found[node].examples:
            without.add(node)
    return [
        Use(i, edge, found[node].layouts)
        for i, node in enumerate(graph.nodes)
        if node not in without and node in found
        for edge, (child, _) in enumerate(node.next_functions)
        if child in without
    ]
