"""Where parameters meet examples: reading the autograd graph of per-example values.

A backward pass leaves behind, in the nodes of its graph, all that per-example gradients are made
of. This module finds the nodes at which something that belongs to single examples meets something
that depends on parameters alone, and along which dimension the examples lie there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from poprisk.per_sample.layouts import (
    REORDERS,
    Layout,
    consistent,
    in_order,
    indices_of,
    possible,
    shapes,
    simplest,
)
from poprisk.per_sample.moved import is_moved_by_data

VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        "View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias ToCopy Clone T Permute Transpose "
        "Slice Select Split SplitWithSizes Unbind Detach"
    ).split()
)
"""Nodes with one input whose output belongs to examples only if the input does."""

PURE = frozenset(
    f"{name}Backward{i}"
    for i in range(2)
    for name in (
        "Mm Bmm Addmm Baddbmm Mv Dot Add Sub Mul Div Neg Pow Exp Log Sqrt Rsqrt Tanh Sigmoid Relu "
        "Softplus Softmax LogSoftmax Sum Mean Norm LinalgVectorNorm WeightNormInterface Cat Stack"
    ).split()
)
"""Nodes that compute from their inputs alone, if all of these have nodes of their own."""

TAKES_DATA = {
    "AddmmBackward0": (1, "_saved_mat1"),
    "MmBackward0": (0, "_saved_self"),
    "BmmBackward0": (0, "_saved_self"),
    "ConvolutionBackward0": (0, "_saved_input"),
    "EmbeddingBackward0": (1, "_saved_indices"),
}
"""Nodes whose output has a row for each row of an input, which input, and where it is saved."""

CONFIRMATIONS = 3
"""Random halves of a batch that must agree with layouts learnt from smaller batches."""

TRUSTED = 3
"""Batches that must agree on where the examples lie before a structure is taken as known."""


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
        others: nodes below the values from which none of these parameters is reached.
    """

    nodes: list[Node]
    owners: dict[Node, str]
    others: list[Node]

    def signature(self) -> str:
        """What two graphs of equal structure share."""
        position = {node: i for i, node in enumerate(self.nodes)}
        return repr(
            [
                (
                    node.name(),
                    shapes(node),
                    self.owners.get(node),
                    _settings(node),
                    [(position.get(cast(Node, n)), k) for n, k in node.next_functions],
                )
                for node in self.nodes
            ]
        )


def _settings(node: Node) -> list[object]:
    """What decides, besides shapes, where a node moves the examples: dimensions, sizes, offsets."""
    names = _plain_names(type(node))
    values = [getattr(node, name) for name in names] + list(getattr(node, "__dict__", {}).values())
    plain: list[object] = [value for value in values if _is_plain(value)]
    if node.name() in REORDERS:
        plain += [in_order(index) for index in indices_of(node)]
    return plain


@functools.cache
def _plain_names(kind: type) -> tuple[str, ...]:
    """Saved attributes of a kind of node that are no tensors."""
    names = set(dir(kind))
    return tuple(sorted(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in names))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, int | str)


def as_matrix(values: Tensor) -> Tensor:
    """Values (b,) or (b, k) as (b, k), at a node of its own above whatever computed them."""
    with torch.inference_mode(False), torch.enable_grad():
        return values.unsqueeze(1) if values.ndim == 1 else values.view_as(values)


def leaves_of(values: Tensor) -> list[Tensor]:
    """The leaves that autograd accumulates gradients in, as far as the graph shows them."""
    stack = [] if values.grad_fn is None else [values.grad_fn]
    seen: set[Node] = set(stack)
    found = [] if stack else [values]
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.append(cast(Any, node).variable)
        children = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= children
        stack.extend(children)
    return found


def walk(root: Node, names: dict[int, str]) -> Graph:
    """The nodes from ``root`` to the parameters named by ``names`` (id of tensor → name)."""
    finished: dict[Node, bool] = {}
    owners: dict[Node, str] = {}
    order: list[Node] = []
    others: list[Node] = []
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
        (order if finished[node] else others).append(node)
    return Graph(order[::-1], owners, others)


@dataclass
class _Known:
    """What batches of one structure have told.

    Attributes:
        candidates: by position of the node and by output, the layouts that fitted every batch;
            None where no gradient came.
        mixed: by position, nodes of data of which a row serves several examples.
        batches: how many of them left no doubt.
        uses: the conclusion.
        shared: by position, sums over the data that several examples share, as last seen.
        flagged: whether it was said that they look across the batch.
        by_data: whether data decides to which example a row belongs, so that every batch has to
            be asked (:func:`poprisk.per_sample.moved.is_moved_by_data`).
    """

    candidates: dict[int, list[set[Layout] | None]] = field(default_factory=dict)
    mixed: set[int] = field(default_factory=set)
    batches: int = 0
    uses: list[Use] = field(default_factory=list)
    shared: dict[int, float] = field(default_factory=dict)
    flagged: bool = False
    by_data: bool = False

    def belongs_to_examples(self, node: int) -> bool:
        """Whether some layout fits each output that a gradient came to."""
        return all(c is None or bool(c) for c in self.candidates[node])

    def copied(self) -> _Known:
        """The same knowledge, to which a batch may add."""
        return replace(self, candidates=dict(self.candidates), mixed=set(self.mixed))


def find_uses(graph: Graph, values: Tensor) -> list[Use]:
    """All places where parameters meet examples.

    Remembered for graphs of equal structure, unless there data moves rows between examples.
    """
    key = graph.signature()
    known = _REMEMBERED.setdefault(key, _Known())
    _REMEMBERED.move_to_end(key)
    if len(_REMEMBERED) > 64:
        _REMEMBERED.popitem(last=False)
    if known.batches < TRUSTED or known.by_data:
        told = known.copied()
        reached = _find_layouts(graph, values, told)
        without = _without_examples(graph, told)
        told.uses = _boundary(graph, told, without)
        if reached is None:  # one bad batch is not to spoil what others tell
            return known.uses if known.batches else told.uses
        shared = _shared_data(graph, told.mixed, without)
        # What serves several examples and is another in every batch is no weight, but a batch.
        changed = any(told.shared.get(i, total) != total for i, total in shared.items())
        if not told.flagged and (changed or (told.batches == 0 and _mixes(graph, told, without))):
            told.flagged = True
            _warn_mixed(len(values))
        told.shared = shared
        told.by_data = is_moved_by_data(graph.nodes, told.candidates, without)
        told.batches += all(
            use.node in reached and all(c is None or len(c) == 1 for c in told.candidates[use.node])
            for use in told.uses
        )
        _REMEMBERED[key] = known = told
    return known.uses


_REMEMBERED: OrderedDict[str, _Known] = OrderedDict()


def is_trusted(graph: Graph) -> bool:
    """Whether enough batches of this structure left no doubt, and others cannot differ."""
    known = _REMEMBERED.get(graph.signature())
    return known is not None and known.batches >= TRUSTED and not known.by_data


def _find_layouts(graph: Graph, values: Tensor, known: _Known) -> set[int] | None:
    """Backpropagate from some of the examples, in turns, and see which rows are zero.

    What belongs to an example has a zero gradient when only other examples send one. Of any two
    examples each sends once without the other, so no rearrangement of the examples goes unnoticed.

    Returns:
        The nodes, by position, to which a gradient other than zero came; None where some gradient
        was NaN or infinite, since rows that no example sends to are not zero then.
    """
    finite = True
    position = {node: i for i, node in enumerate(graph.nodes)}
    reached: set[int] = set()
    generator = torch.Generator().manual_seed(len(values))
    weights = 0.5 + torch.rand(values.shape, generator=generator, dtype=torch.float64)
    groups = _groups(len(values))
    served: dict[int, Any] = {
        i: 0 for i, node in enumerate(graph.nodes) if _rows_of_data(node, len(values))
    }
    for senders in groups:

        def watch(node: Node, grads: Sequence[Tensor | None], senders: Tensor = senders) -> None:
            nonlocal finite
            i = position[node]
            finite = finite and all(g is None or bool(g.isfinite().all()) for g in grads)
            if any(g is not None and g.any() for g in grads):
                reached.add(i)
            if i in served and grads[0] is not None:
                # NaN comes from zero times infinity as well, and says nothing of the sender.
                sent = (grads[0] != 0) & grads[0].isfinite()
                served[i] = served[i] + sent.flatten(1).any(dim=1).int()
            before = known.candidates.get(i, [None] * len(grads))
            known.candidates[i] = [
                old if g is None else consistent(_all(old, g, len(senders)), g, senders)
                for g, old in zip(grads, before, strict=True)
            ]

        cotangent = (weights * senders[:, None]).to(values.device, values.dtype)
        _backward(graph, values, cotangent, watch)
    # Each example sends in half of the groups; so does a row that serves it alone, or in fewer.
    half = len(groups) // 2
    known.mixed |= {i for i, n in served.items() if isinstance(n, Tensor) and int(n.max()) > half}
    return reached if finite else None


def confirmed(graph: Graph, values: Tensor, uses: Collection[Use]) -> bool:
    """Whether the layouts of ``uses`` agree with what comes back from random halves of a batch.

    Found once for graphs of equal structure.
    """
    key = graph.signature()
    if key not in _CONFIRMED:
        agrees = _agrees(graph, values, uses)
        if agrees is None:
            return False
        _CONFIRMED[key] = agrees
        if len(_CONFIRMED) > 64:
            _CONFIRMED.popitem(last=False)
    return _CONFIRMED[key]


_CONFIRMED: OrderedDict[str, bool] = OrderedDict()


def _agrees(graph: Graph, values: Tensor, uses: Collection[Use]) -> bool | None:
    """Whether it is so for these values; None where gradients are NaN or infinite."""
    places = {
        GradientEdge(graph.nodes[use.node], output): layout
        for use in uses
        for output, layout in enumerate(use.layouts)
    }
    generator = torch.Generator().manual_seed(len(values))
    for _ in range(CONFIRMATIONS):
        senders = torch.randperm(len(values), generator=generator) < len(values) // 2
        cotangent = senders[:, None].expand(values.shape).to(values.device, values.dtype)
        grads = torch.autograd.grad(
            values, list(places), cotangent, retain_graph=True, allow_unused=True
        )
        for g, layout in zip(grads, places.values(), strict=True):
            known = set() if layout is None else {layout}
            if g is not None and not bool(g.isfinite().all()):
                return None
            if g is not None and not consistent(known, g, senders) and bool(g.any()):
                return False
    return True


def _groups(examples: int) -> Tensor:
    """Rows of booleans, as few as can be: of any two columns neither is below the other.

    Subsets of equal size (Sperner's theorem).
    """
    count = next(m for m in itertools.count(2) if math.comb(m, m // 2) >= examples)
    groups = torch.zeros(count, examples, dtype=torch.bool)
    for i, members in zip(
        range(examples), itertools.combinations(range(count), count // 2), strict=False
    ):
        groups[list(members), i] = True
    return groups


def _all(old: set[Layout] | None, grad: Tensor, examples: int) -> set[Layout]:
    return set(possible(tuple(grad.shape), examples)) if old is None else old


@contextlib.contextmanager
def silenced(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Leave hooks on leaves out of backward passes that are no gradient of the user's."""
    hooks = [own for p in leaves if (own := p._backward_hooks)]
    kept = [dict(own) for own in hooks]
    try:
        for own in hooks:
            own.clear()
        yield
    finally:
        for own, before in zip(hooks, kept, strict=True):
            own.update(before)


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
        with silenced(cast(Any, node).variable for node in graph.owners):
            torch.autograd.grad(values, edges, cotangent, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _rows_of_data(node: Any, examples: int) -> bool:
    """Whether a node takes data, no activation, with as many rows as examples or a multiple."""
    edge, name = TAKES_DATA.get(node.name(), (0, ""))
    if not name or (edge < len(node.next_functions) and node.next_functions[edge][0] is not None):
        return False
    data = getattr(node, name)
    return data is not None and data.ndim > 0 and len(data) > 0 and len(data) % examples == 0


def _mixes(graph: Graph, known: _Known, without: Collection[Node | None]) -> bool:
    """Whether a row that serves several examples comes to the values as more than a weight.

    A constant times a parameter may have as many rows as there are examples, too; but then its
    product meets something of the examples.
    """
    mixed = {graph.nodes[i] for i in known.mixed if graph.nodes[i] in without}
    for use in known.uses if mixed else ():
        node = graph.nodes[use.node]
        others = [c for e, (c, _) in enumerate(node.next_functions) if e != use.edge]
        data = node.name() in REORDERS or (node.name() in TAKES_DATA and None in others)
        if not data and all(c is None or c in without for c in others):
            child = node.next_functions[use.edge][0]
            if child is not None and mixed & below(child):
                return True
    return False


def _shared_data(
    graph: Graph, mixed: Collection[int], without: Collection[Node | None]
) -> dict[int, float]:
    """Sums over the data of nodes of which a row serves several examples, by position."""
    nodes = {i: graph.nodes[i] for i in mixed if graph.nodes[i] in without}
    data = {i: getattr(node, TAKES_DATA[node.name()][1]) for i, node in nodes.items()}
    return {i: float(x.detach().double().nan_to_num().sum()) for i, x in data.items()}


def below(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, stack = {node}, [node]
    while stack:
        children = {child for child, _ in stack.pop().next_functions if child is not None}
        stack.extend(children - found)
        found |= children
    return found


def _warn_mixed(examples: int) -> None:
    warnings.warn(
        f"the gradients of several of {examples} examples pass through one row of a layer that has "
        "a row for each, so it seems that a layer or the loss looks across the batch (contrast, "
        "normalization): a variance over examples then is that of losses as if they were "
        "independent, which they are not.",
        UserWarning,
        stacklevel=2,
    )


def _without_examples(graph: Graph, known: _Known) -> set[Node]:
    """Nodes that depend on parameters alone, or on all examples at once, and what is below them."""
    without: set[Node] = set(graph.owners)
    count = 0
    while count < len(without):
        count = len(without)
        for i in range(len(graph.nodes) - 1, 0, -1):
            if _is_without(graph.nodes[i], i, known, without):
                without.add(graph.nodes[i])
        for node in graph.nodes:
            if node in without and node not in graph.owners:
                without.update(child for child, _ in node.next_functions if child is not None)
    return without


def _boundary(graph: Graph, known: _Known, without: Collection[Node | None]) -> list[Use]:
    """The inputs of nodes of examples that come from nodes without examples.

    Every path from the values to a parameter crosses the boundary once: what lies below a node
    without examples counts as without, too.
    """
    return [
        Use(i, edge, tuple(simplest(c) if c else None for c in known.candidates[i]))
        for i, node in enumerate(graph.nodes)
        if node not in without and i in known.candidates
        for edge, (child, _) in enumerate(node.next_functions)
        if child in without
    ]


def _is_without(node: Node, i: int, known: _Known, without: Collection[Node | None]) -> bool:
    children = [child for child, _ in node.next_functions]
    if node.name() in VIEWS:
        return any(child in without for child in children)
    if node.name() in PURE and all(child in without for child in children):
        return True
    return i in known.candidates and not known.belongs_to_examples(i)
