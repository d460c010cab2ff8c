"""From the places where a parameter is used to the terms of its per-example gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from poprisk.per_sample.graph import PURE, VIEWS, Graph, Use, below
from poprisk.per_sample.layouts import Layout, shapes
from poprisk.per_sample.rules import RULES, Local, Site
from poprisk.per_sample.terms import Dense, OneHot, Outer, Term

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
        use: one element of :func:`poprisk.per_sample.graph.find_uses`.
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
    child, _ = site.node.next_functions[site.edge]
    _say_once(site.node.name(), sorted(_names_below(graph, child)))
    outputs = [i for i, g in enumerate(site.grads) if g is not None]
    rows = [
        _through(
            site, outputs, [_only(cast(Tensor, site.grads[o])[k], site, o, i) for o in outputs]
        )
        for i in range(site.examples)
        for k in range(site.values)
    ]
    return torch.stack(rows).unflatten(0, (site.examples, site.values))


def _through(site: Site, outputs: Sequence[int], grads: Sequence[Tensor]) -> Tensor:
    """Gradient at one input of a node, by this node alone.

    Other inputs may depend on the same parameter, or be it; nothing is passed on through these.
    """
    child, index = site.node.next_functions[site.edge]
    caught: list[Tensor | None] = []

    def catch(inputs: tuple[Tensor | None, ...], _: object) -> tuple[None, ...]:
        caught.append(inputs[site.edge])
        return (None,) * len(inputs)

    handle = site.node.register_hook(catch)
    try:
        torch.autograd.grad(
            [GradientEdge(site.node, o) for o in outputs],
            [GradientEdge(child, index)],
            grads,
            retain_graph=True,
            allow_unused=True,
        )
    finally:
        handle.remove()
    (grad,) = caught
    return grads[0].new_zeros(site.shape) if grad is None else grad.to_dense()


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
    return {graph.owners[end] for end in below(node) if end in graph.owners}


def _to_parameters(graph: Graph, site: Site, local: Local) -> list[tuple[str, Term]]:
    """Carry gradients from the input of a node to the parameters that it is computed from."""
    child, _ = site.node.next_functions[site.edge]
    end, flips = _follow(child, len(site.shape))
    if end in graph.owners and isinstance(local, Outer):
        param = cast(Any, end).variable
        dtype, shape = param.dtype, tuple(param.shape)
        activation = (
            local.activation
            if isinstance(local.activation, OneHot)
            else local.activation.detach().to(dtype)
        )
        flipped = local.flipped != flips
        term = _smaller(Outer(local.cotangent.to(dtype), activation, flipped, shape))
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
    """The factors, or the gradients themselves if these take less memory and work.

    Terms of one parameter are cut into the same rows, so factors of a reshaped one are multiplied.
    """
    _, k, t, r = term.cotangent.shape
    rows = term.columns if term.flipped else r
    if term.shape[:1] != (rows,) or term.cotangent.is_complex():
        return Dense(term.dense(), term.shape)
    if isinstance(term.activation, OneHot) or t * (term.columns + k * r) <= k * r * term.columns:
        return term
    return Dense(term.dense(), term.shape)


def _dense_term(grads: Tensor, param: Tensor) -> Dense:
    """Gradients (b, k, ...) of a parameter as a term, complex numbers as pairs of real ones."""
    grads = (grads if param.is_complex() or not grads.is_complex() else grads.real).to(param.dtype)
    real = torch.view_as_real(grads) if grads.is_complex() else grads
    return Dense(real.unsqueeze(-1).flatten(2), tuple(param.shape))


def _pull_back(graph: Graph, site: Site, local: Tensor) -> list[tuple[str, Term]]:
    """Gradients of the parameters from those of a tensor computed from them, by autograd."""
    child, index = site.node.next_functions[site.edge]
    found = below(child)
    ends = [end for end in graph.owners if end in found]
    edges = [GradientEdge(end, 0) for end in ends]
    batched = all(n.name() in PURE | VIEWS or not n.next_functions for n in found)
    rows = local.flatten(0, 1)
    pulled = [
        torch.autograd.grad(
            [GradientEdge(child, index)],
            edges,
            [grad],
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
        for grad in ([rows] if batched else rows)
    ]
    joined = [g[0] if batched else torch.stack(g) for g in zip(*pulled, strict=True)]
    size = (site.examples, site.values)
    return [
        (graph.owners[end], _dense_term(grads.unflatten(0, size), cast(Any, end).variable))
        for end, grads in zip(ends, joined, strict=True)
    ]
