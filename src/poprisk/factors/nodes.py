"""From the places where a parameter is used to the terms of its per-example gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from poprisk.factors.graph import Graph, Layout, Use, shapes
from poprisk.factors.rules import RULES, Local, Site
from poprisk.factors.terms import Dense, OneHot, Outer, Term

TRANSPOSES = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
RESHAPES = tuple(
    f"{name}Backward0" for name in "View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias".split()
)


def terms_of(
    graph: Graph, use: Use, grads: Sequence[Tensor | None], size: tuple[int, int]
) -> list[tuple[str, Term]]:
    """The gradients of one use, with the names of the parameters they belong to.

    Args:
        graph: the graph of the use.
        use: one element of :func:`poprisk.factors.graph.find_uses`.
        grads: gradient of every output of the node, (k, *shape), or None.
        size: (examples b, values per example k).
    """
    site = Site(graph.nodes[use.node], use.edge, use.layouts, grads, *size)
    rule = RULES.get(site.node.name())
    real = not any(g is not None and g.is_complex() for g in grads)
    local = rule(site) if rule is not None and real else None
    return _to_parameters(graph, site, one_by_one(graph, site) if local is None else local)


def one_by_one(graph: Graph, site: Site) -> Tensor:
    """Gradients by one backward pass per example and value, through the one node alone."""
    child, index = site.node.next_functions[site.edge]
    _say_once(site.node.name(), sorted(_names_below(graph, child)))
    outputs = [i for i, g in enumerate(site.grads) if g is not None]
    rows = []
    for i in range(site.examples):
        for k in range(site.values):
            (grad,) = torch.autograd.grad(
                [GradientEdge(site.node, o) for o in outputs],
                [GradientEdge(child, index)],
                [_only(cast(Tensor, site.grads[o])[k], site, o, i) for o in outputs],
                retain_graph=True,
            )
            rows.append(grad)
    return torch.stack(rows).unflatten(0, (site.examples, site.values))


def _only(grad: Tensor, site: Site, output: int, example: int) -> Tensor:
    """The part of a gradient that one example sends, zero elsewhere."""
    layout = cast(Layout, site.layouts[output])
    kept = torch.zeros_like(grad)
    part = layout.of_example(grad, example, site.examples)
    layout.of_example(kept, example, site.examples).copy_(part)
    return kept


_SAID: set[str] = set()


def _say_once(node: str, names: list[str]) -> None:
    if node in _SAID:
        return
    _SAID.add(node)
    warnings.warn(
        f"no factored form for {node}, through which the gradient of {', '.join(names)} passes: "
        "per-example gradients of these take one backward pass per example through this "
        "operation alone. Exact, but slower. (Said once per kind of operation.)",
        UserWarning,
        stacklevel=2,
    )


def _names_below(graph: Graph, node: Node) -> set[str]:
    """The parameters that a node without examples is computed from."""
    if node in graph.owners:
        return {graph.owners[node]}
    children = (child for child, _ in node.next_functions if child is not None)
    return {name for child in children for name in _names_below(graph, child)}


def _to_parameters(graph: Graph, site: Site, local: Local) -> list[tuple[str, Term]]:
    """Carry gradients from the input of a node to the parameters that it is computed from."""
    child, _ = site.node.next_functions[site.edge]
    end, flips = _follow(child, len(site.shape))
    if end in graph.owners and isinstance(local, Outer):
        param = cast(Any, end).variable
        dtype, shape = param.dtype, tuple(param.shape)
        act = local.act if isinstance(local.act, OneHot) else local.act.to(dtype)
        flipped = local.flipped != flips
        term = _smaller(Outer(local.cot.to(dtype), act, flipped, shape))
        return [(graph.owners[end], term)]
    if isinstance(local, Outer):
        local = local.dense().unflatten(2, site.shape)
    if end in graph.owners and not flips:
        return [(graph.owners[end], _dense_term(local, cast(Any, end).variable))]
    return _pull_back(graph, site, local)


def _follow(node: Any, ndim: int) -> tuple[Any, bool]:
    """Through transpositions of a matrix, then through reshapes; whether an odd number was met."""
    flips = False
    while True:
        if ndim == 2 and node.name() in TRANSPOSES and len(shapes(node)[0]) == 2:
            swaps = node.name() == "TBackward0" or _swaps(node)
            flips ^= swaps
        elif node.name() != "ToCopyBackward0":
            break
        node = node.next_functions[0][0]
    while node.name() in RESHAPES or node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return node, flips


def _swaps(node: Any) -> bool:
    """Whether a transposition of a matrix exchanges its dimensions."""
    if node.name() == "PermuteBackward0":
        return node._saved_dims[0] % 2 == 1
    return (node._saved_dim0 - node._saved_dim1) % 2 == 1


def _smaller(term: Outer) -> Term:
    """The factors, or the gradients themselves if these take less memory and work."""
    _, k, t, r = term.cot.shape
    if isinstance(term.act, OneHot) or t * (term.columns + k * r) <= k * r * term.columns:
        return term
    return Dense(term.dense(), term.shape)


def _dense_term(grads: Tensor, param: Tensor) -> Dense:
    """Gradients (b, k, ...) of a parameter as a term, complex numbers as pairs of real ones."""
    grads = grads.to(param.dtype)
    real = torch.view_as_real(grads) if grads.is_complex() else grads
    return Dense(real.flatten(2), tuple(param.shape))


def _pull_back(graph: Graph, site: Site, local: Tensor) -> list[tuple[str, Term]]:
    """Gradients of the parameters from those of a tensor computed from them, by autograd."""
    child, index = site.node.next_functions[site.edge]
    names = _names_below(graph, child)
    ends = [node for node, name in graph.owners.items() if name in names]
    edges = [GradientEdge(end, 0) for end in ends]
    pulled = torch.autograd.grad(
        [GradientEdge(child, index)],
        edges,
        [local.flatten(0, 1)],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    size = (site.examples, site.values)
    return [
        (graph.owners[end], _dense_term(grad.unflatten(0, size), cast(Any, end).variable))
        for end, grad in zip(ends, pulled, strict=True)
        if grad is not None
    ]
