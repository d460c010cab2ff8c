r"""Per-example gradients in factors, from one forward pass and one backward pass per value.

The gradient of example i with respect to the weight of a linear layer is an outer product of what
came in and of the gradient that came back, summed over positions; other layers are as simple. What
the theory needs of per-example gradients (Gram matrices, sums, sums of squares, norms, products
with a vector) follows from these factors, mostly without forming a gradient.

:func:`capture` reads them from the autograd graph, so any model works as it is, with layers
called through modules or functions, tied weights, and weights used twice. Covered in factored form:
linear layers, matrix products, convolutions, embeddings, layer, RMS, group and (in eval mode) batch
normalization, added and multiplied parameters, and whatever is computed from parameters alone
before it meets an example. Any other operation takes a backward pass per example through itself
alone, and says so once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from poprisk.per_sample.gram import gram_, mirror_, squared_norms
from poprisk.per_sample.graph import Graph, Use, as_matrix, find_uses, silenced, walk
from poprisk.per_sample.moments import moments, not_negative, squared
from poprisk.per_sample.nodes import terms_of
from poprisk.per_sample.plan import Plan
from poprisk.per_sample.terms import ALL, Term, merged, products
from poprisk.per_sample.visible import check_reached, check_visible
from poprisk.printing import short_repr

WORKSPACE = 1 << 25
"""Default size of temporaries, in elements."""


class Moments(NamedTuple):
    """Sums over examples, by name of the parameter, of its shape.

    Attributes:
        sums: of the per-example gradients.
        squares: of their squares.
    """

    sums: dict[str, Tensor]
    squares: dict[str, Tensor]

    __repr__ = short_repr

    def plus(self, other: Moments) -> Moments:
        """The sums over the examples of both."""
        return Moments(
            {name: own + other.sums[name] for name, own in self.sums.items()},
            {name: own + other.squares[name] for name, own in self.squares.items()},
        )

    def mean_var(self, examples: int) -> dict[str, Tensor]:
        r"""The variance of the mean gradient, :math:`\Sigma_B/(b-1)`, of b examples."""
        b = examples
        return {
            name: not_negative((squares - squared(self.sums[name]) / b) / (b * (b - 1)))
            for name, squares in self.squares.items()
        }


@final
class Factors:
    """Gradients of b examples × k values each with respect to named parameters, in factors.

    Args:
        terms: by name of the parameter, what its gradients are the sum of.
        params: the parameters.
        examples: b.
        values: k.
        halved: whether some of them came back in half precision, as under autocast.
    """

    def __init__(
        self,
        terms: Mapping[str, list[Term]],
        params: Mapping[str, Tensor],
        *,
        examples: int,
        values: int,
        halved: bool = False,
    ) -> None:
        self.terms = {name: merged(list(t)) for name, t in terms.items() if t}
        self.params = params
        self.examples = examples
        self.values = values
        self.halved = halved

    def part(self, examples: slice = ALL, values: slice = ALL) -> Factors:
        """The gradients of some examples and values."""
        terms = {name: [t.part(examples, values) for t in ts] for name, ts in self.terms.items()}
        return Factors(
            terms,
            self.params,
            examples=len(range(self.examples)[examples]),
            values=len(range(self.values)[values]),
        )

    def elements(self) -> int:
        """Elements of memory that the factors take."""
        terms = [t for ts in self.terms.values() for t in ts]
        return sum(t.elements() for t in terms)

    def gram(
        self,
        other: Factors | None = None,
        *,
        precondition: Mapping[str, Tensor] | None = None,
        workspace: int = WORKSPACE,
    ) -> Tensor:
        r"""Inner products :math:`\sum_p M_p\, G_{ik,p}\, G'_{jl,p}` over parameters.

        Args:
            other: the second set of gradients, of the same parameters; None: this one.
            precondition: M by name, of the parameters' shapes; None: ones.
            workspace: elements that temporaries may take, roughly.

        Returns:
            (b·k, b'·k'), the values of one example next to each other.
        """
        right = self if other is None else other
        shape = (self.examples * self.values, right.examples * right.values)
        total = self._zeros(shape)
        for name, terms in self.terms.items():
            if name in right.terms:
                weight = _weight(precondition, name, self.params[name])
                gram_(total, terms, right.terms[name], weight, workspace)
        if right is self:
            mirror_(total, self.examples, self.values)
        return total

    def squared_norms(
        self,
        *,
        precondition: Mapping[str, Tensor] | None = None,
        workspace: int = WORKSPACE,
    ) -> Tensor:
        r"""Squared norms :math:`\sum_p M_p\, G_{ik,p}^2`, (b, k): the diagonal of :meth:`gram`."""
        total = self._zeros((self.examples, self.values))
        for name, terms in self.terms.items():
            weight = _weight(precondition, name, self.params[name])
            total += squared_norms(terms, weight, workspace)
        return total

    def products(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Inner products of every gradient with a vector in parameter space, (b, k)."""
        total = self._zeros((self.examples, self.values))
        for name, terms in self.terms.items():
            total += products(terms, vector[name])
        return total

    def moments(self) -> Moments:
        """Sums over examples and values of the gradients and of their squares.

        In the order of the parameters. Complex gradients are treated as pairs of real ones.
        """
        found = {name: (sums, squares) for name, sums, squares in self.each_moments()}
        result = Moments({}, {})
        for name, p in self.params.items():
            sums, squares = found.get(name) or (torch.zeros_like(p), torch.zeros_like(p))
            result.sums[name], result.squares[name] = sums, squares
        return result

    def each_moments(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """:meth:`moments` of one parameter after the other, of those that the values depend on."""
        for name, terms in self.terms.items():
            sums, squares = moments(terms)
            yield name, shaped(sums, self.params[name]), shaped(squares, self.params[name])

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        like = next(iter(self.params.values()))
        dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        return torch.zeros(shape, dtype=dtype, device=like.device)


def capture(
    values: Tensor,
    params: Mapping[str, Tensor],
    *,
    plan: Plan | None = None,
    accumulate: bool = False,
) -> Factors:
    """The per-example gradients of ``values``, read from their autograd graph.

    Hooks on activations act as in any backward pass. Hooks on leaves are left out, but for the one
    pass that ``accumulate`` asks for.

    Args:
        values: (b,) or (b, k), b ≥ 2; row i depends on example i alone. Its graph stays usable.
        params: leaves to differentiate with respect to, by name.
        plan: from small batches of the same model (:func:`poprisk.per_sample.plan.learn_plan`);
            saves the search for the examples, a few backward passes.
        accumulate: let the same backward pass (k = 1) add the sum over examples to ``.grad``, of
            whatever leaves ``values`` depend on, by autograd's own path.

    Returns:
        The factors; parameters that ``values`` do not depend on have gradient zero.

    Raises:
        ValueError: where gradients take a way that the graph does not show
            (:mod:`poprisk.per_sample.visible`), or a layer mixes the examples; before any of it.
    """
    matrix = as_matrix(values)
    size = (matrix.shape[0], matrix.shape[1])
    terms: dict[str, list[Term]] = {name: [] for name in params}
    halved = False
    if matrix.grad_fn is not None:
        graph = walk(matrix.grad_fn, {id(p): name for name, p in params.items()})
        check_visible(graph, matrix, params)
        if not accumulate:
            check_reached(graph, params)
        with silenced(params.values()):
            known = plan.uses_in(graph, matrix) if plan is not None else None
            uses = (find_uses(graph, matrix) if graph.owners else []) if known is None else known
        grads = _accumulated(graph, uses, matrix) if accumulate else _gradients(graph, uses, matrix)
        halved = any(_is_half(g) for place in grads.values() for g in place if g is not None)
        with torch.no_grad(), silenced(params.values()):
            for use in uses:
                for name, term in terms_of(graph, use, grads[use.node], size):
                    terms[name].append(term)
    return Factors(terms, params, examples=size[0], values=size[1], halved=halved)


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def check_graph(values: Tensor, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError where :func:`capture` would, without taking a gradient."""
    matrix = as_matrix(values)
    if matrix.grad_fn is not None:
        graph = walk(matrix.grad_fn, {id(p): name for name, p in params.items()})
        check_visible(graph, matrix, params)
        check_reached(graph, params)


Places = dict[int, list[Tensor | None]]
"""Gradients (k, *shape) of each of the values at the outputs of nodes, by position."""


def _gradients(graph: Graph, uses: list[Use], values: Tensor) -> Places:
    """Gradients at the nodes of ``uses``, by one backward pass per value that ends there."""
    places = [
        (node, output)
        for node, layouts in {use.node: use.layouts for use in uses}.items()
        for output, layout in enumerate(layouts)
        if layout is not None
    ]
    edges = [GradientEdge(graph.nodes[node], output) for node, output in places]
    found: Places = {u.node: [None] * len(u.layouts) for u in uses}
    count = values.shape[1]
    for k in range(count if places else 0):
        cotangent = torch.zeros_like(values)
        cotangent[:, k] = 1
        with _watching(graph, uses) as seen:
            grads = torch.autograd.grad(values, edges, cotangent, retain_graph=True)
        for (node, output), grad in zip(places, grads, strict=True):
            # Above other nodes of uses, autograd hands out a gradient before the hooks on it ran.
            grad = seen[node][output] if node in seen else grad
            if count == 1:
                found[node][output] = grad[None]
                continue
            if found[node][output] is None:
                found[node][output] = grad.new_empty(count, *grad.shape)
            cast(Tensor, found[node][output])[k] = grad
    return found


def _accumulated(graph: Graph, uses: list[Use], values: Tensor) -> Places:
    """Gradients at the nodes of ``uses``, seen while autograd accumulates those of the leaves."""
    with _watching(graph, uses) as seen:
        torch.autograd.backward(values, torch.ones_like(values), retain_graph=True)
    return {
        use.node: [
            None if layout is None or use.node not in seen else seen[use.node][output][None]
            for output, layout in enumerate(use.layouts)
        ]
        for use in uses
    }


@contextlib.contextmanager
def _watching(graph: Graph, uses: list[Use]) -> Iterator[dict[int, list[Any]]]:
    """What comes to the nodes of ``uses`` that a backward pass runs through, hooks applied."""
    seen: dict[int, list[Any]] = {}

    def watch(node: int, grads: Sequence[Tensor | None]) -> None:
        seen[node] = [None if grad is None else grad.detach() for grad in grads]

    handles = [
        graph.nodes[node].register_prehook(functools.partial(watch, node))
        for node in {use.node for use in uses}
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _weight(precondition: Mapping[str, Tensor] | None, name: str, param: Tensor) -> Tensor | None:
    """M of one parameter, once for each component of a complex one."""
    if precondition is None:
        return None
    weight = precondition[name]
    return torch.stack([weight, weight], dim=-1) if param.is_complex() else weight


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """A flat sum over examples in the shape of its parameter; of pairs if that is complex."""
    if like.is_complex():
        return torch.view_as_complex(flat.reshape(*like.shape, 2))
    return flat.reshape(like.shape)
