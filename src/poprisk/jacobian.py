"""The Jacobian of a model's outputs with respect to its parameters, block by block of examples."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from poprisk.evaluation import evaluating, outputs_of, uncompiled
from poprisk.forward_mode import plain_kernels
from poprisk.per_sample import Factors, capture, check_graph, checks
from poprisk.per_sample.plan import Plan, learn_plan
from poprisk.per_sample.visible import check_unhooked, check_whole

Inputs = Any
"""A tensor for ``model(x)``, a tuple of tensors for ``model(*x)`` or a dict for ``model(**x)``."""

LEARNT_FROM = 4
"""Examples in the batches that show where the examples lie."""

Selection = Collection[str] | Callable[[str, nn.Parameter], bool] | None


def trainable(model: nn.Module, chosen: Selection = None) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, each once.

    Args:
        model: the module.
        chosen: names, or a function of name and parameter; None: all.

    Raises:
        ValueError: if a name is unknown or frozen, nothing is left, devices are mixed, or a
            parameter is sharded or has a hook.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if callable(chosen):
        params = {name: p for name, p in params.items() if chosen(name, p)}
    elif chosen is not None:
        checks.check_names("params", chosen, params)
        params = {name: params[name] for name in chosen}
    checks.check_some_parameters(params)
    check_whole(params)
    check_unhooked(params)
    return params


def inner(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile.

    These change no output; but the first waits for other processes, and the graph of the last is
    closed.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        found = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(found, nn.Module):
            return model
        model = found


def as_inputs(name: str, data: Any) -> Inputs:
    """Inputs as one batch; a list or loader of batches is read twice, compared and concatenated.

    A batch that is a list or tuple counts as (inputs, targets, ...): the first part is taken.

    Raises:
        TypeError, ValueError: if there is no example, lengths differ, or a second pass through
            the data gives something else.
    """
    if not isinstance(data, (Tensor, tuple, Mapping)):
        checks.check_iterable(name, data)
        first, second = list(_batches(data)), list(_batches(data))
        checks.check_tensors(name, pytree.tree_leaves(first))
        checks.check_repeatable(name, _equal(first, second))
        data = pytree.tree_map(_concatenated, *first) if first else ()
    checks.check_inputs(name, pytree.tree_leaves(data))
    return pytree.tree_map(_recordable, data)


def _recordable(tensor: Tensor) -> Tensor:
    """The tensor; a copy if it was made in inference mode, from which nothing can be recorded."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _concatenated(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _batches(data: Iterable[Any]) -> Iterator[Any]:
    for batch in data:
        yield batch[0] if isinstance(batch, (list, tuple)) else batch


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=False)
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in pairs)


def length(inputs: Inputs) -> int:
    """Number of examples."""
    return len(pytree.tree_leaves(inputs)[0])


def take(inputs: Inputs, examples: slice | list[int]) -> Inputs:
    """Some of the examples."""

    def part(tensor: Tensor) -> Tensor:
        return tensor[examples]

    return pytree.tree_map(part, inputs)


class Footprint(NamedTuple):
    """Memory of one example, in elements.

    Attributes:
        graph: tensors that a forward pass saves for the backward pass.
        factors: what is kept of them, and of the gradients.
    """

    graph: int
    factors: int


@final
class Jacobian:
    """J, of shape (n·c, P), row by row of examples; it is never formed.

    Args:
        model: any module whose output has the examples first.
        params: those to differentiate with respect to.
        inputs: n examples.
        outputs: positions of the outputs that count, None: all; or ``"sum"``: their sum.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        inputs: Inputs,
        outputs: Sequence[int] | str | None,
    ) -> None:
        self.model = model
        self.params = params
        self.inputs = inputs
        self.outputs = outputs
        self.examples = length(inputs)
        self.values = self._first_alone().shape[1]

    def _first_alone(self) -> Tensor:
        """The outputs of the first example.

        Raises:
            ValueError: if the model takes no single examples.
        """
        try:
            return self.outputs_of(take(self.inputs, slice(0, 1)))
        except (RuntimeError, IndexError) as error:
            checks.check_part(1, self.examples, error)
            raise

    def outputs_of(self, inputs: Inputs) -> Tensor:
        """The outputs that count, (b, k), without a graph."""
        return outputs_of(self.model, inputs, lambda _, x: self.evaluate(x))

    def evaluate(self, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs that count, (b, k), with other weights if given."""
        outputs = call(self.model, inputs, weights)
        checks.check_outputs(outputs, length(inputs))
        flat = outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(1)
        if self.outputs == "sum":
            return flat.sum(dim=1, keepdim=True)
        if self.outputs is None or isinstance(self.outputs, str):
            return flat
        checks.check_positions("outputs", self.outputs, flat.shape[1])
        return flat[:, list(self.outputs)]

    def factors(self, examples: slice) -> Factors:
        """The rows of some examples, in factors."""
        inputs = take(self.inputs, examples)
        alone = length(inputs) == 1
        with recording():
            values = self.evaluate(take(inputs, [0, 0]) if alone else inputs)
            checks.check_differentiable(values.requires_grad)
            checks.check_numbers("outputs", values, start=examples.start or 0, finite=False)
            captured = capture(values, self.params, plan=self._plan)
        return captured.part(slice(0, 1)) if alone else captured

    @functools.cached_property
    def _plan(self) -> Plan | None:
        """Where the examples lie, learnt from a few batches of four."""
        if self.examples < 2 * LEARNT_FROM:
            return None

        def values_of(some: list[int]) -> Tensor:
            return self.evaluate(take(self.inputs, some))

        with recording():
            return learn_plan(values_of, self.params, examples=self.examples, size=LEARNT_FROM)

    def footprint(self) -> Footprint:
        """What an example costs, measured on two."""
        saved: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.params.values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            return tensor

        inputs = take(self.inputs, [0, min(1, self.examples - 1)])
        with recording(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            values = self.evaluate(inputs)
            checks.check_differentiable(values.requires_grad)
        captured = capture(values, self.params, plan=self._plan)
        return Footprint(sum(saved.values()) // 2, captured.elements() // 2)

    def transposed_product(self, vector: Tensor, block: int) -> dict[str, Tensor]:
        """Jᵀv by reverse mode, (n·k,) to parameters, ``block`` examples at a time."""
        total = {name: torch.zeros_like(p) for name, p in self.params.items()}
        parts = vector.reshape(self.examples, self.values)
        for rows in chunks(self.examples, block):
            with recording():
                values = self.evaluate(take(self.inputs, rows))
                checks.check_differentiable(values.requires_grad)
                checks.check_numbers("outputs", values, start=rows.start, finite=False)
            grads = torch.autograd.grad(
                values, list(self.params.values()), parts[rows], allow_unused=True
            )
            for name, grad in zip(total, grads, strict=True):
                if grad is not None:
                    total[name] += grad
        return total

    def product(self, vector: Mapping[str, Tensor], block: int) -> Tensor:
        """Jw, parameters to (n·k,): by forward mode, or by factors where that is not to be had."""
        rows = chunks(self.examples, block)
        if self._has_forward_mode:
            products = [self._forward_mode(vector, take(self.inputs, r)) for r in rows]
        else:
            products = [self.factors(r).products(vector) for r in rows]
        return torch.cat(products).flatten()

    @functools.cached_property
    def _has_forward_mode(self) -> bool:
        """Whether forward mode exists and is the transpose of reverse mode: v·(J Jᵀv) = ‖Jᵀv‖².

        Forward mode does not stop at ``torch.no_grad()`` in a model, as reverse mode does.
        """
        some = self.part(slice(0, LEARNT_FROM))
        generator = torch.Generator().manual_seed(0)
        v = torch.rand(some.examples, some.values, generator=generator) + 0.5
        try:
            v = v.to(next(iter(self.params.values())).device)
            w = some.transposed_product(v.flatten(), some.examples)
            product = self._forward_mode(w, some.inputs)
        except (NotImplementedError, RuntimeError):
            return False
        found, expected = (v * product).sum(), sum(x.abs().square().sum() for x in w.values())
        tolerance = 1e-9 if found.dtype == torch.float64 else 1e-3
        return bool((found - expected).abs() <= tolerance * expected)

    def _forward_mode(self, vector: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        slots = _slots(self.model, self.params)
        weights = {slot: self.params[name].detach() for slot, name in slots.items()}
        tangents = {slot: vector[name] for slot, name in slots.items()}

        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return self.evaluate(inputs, weights)

        with plain_kernels(self.model):
            return torch.func.jvp(outputs, (weights,), (tangents,))[1]

    def part(self, examples: slice) -> Jacobian:
        """The rows of some examples."""
        return Jacobian(self.model, self.params, take(self.inputs, examples), self.outputs)


def _slots(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Every attribute of a module that holds a parameter, once, to the parameter's name.

    ``functional_call`` leaves other weights behind in modules that it meets under several names.
    """
    names = {id(p): name for name, p in params.items()}
    return {
        f"{prefix}.{attribute}".lstrip("."): names[id(p)]
        for prefix, module in model.named_modules()
        for attribute, p in module._parameters.items()
        if id(p) in names
    }


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Nothing done inside leaves a trace in the model or hangs on the mode of the caller."""
    untouched = evaluating(model, eval_mode=False, backward_hooks=True)
    with torch.inference_mode(False), untouched:
        yield


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Gradients are recorded, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def call(model: nn.Module, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Any:
    """The model's output for inputs of any form, with other weights if given."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    with uncompiled():
        if weights is None:
            return model(*args, **kwargs)
        return torch.func.functional_call(model, dict(weights), args, kwargs, tie_weights=False)


def chunks(count: int, size: int) -> list[slice]:
    """Ranges of at most ``size`` that cover ``count``, as equal as can be."""
    return split(count, -(-count // size))


def split(count: int, pieces: int) -> list[slice]:
    """Ranges that cover ``count``, as equal as can be."""
    edges = [count * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def check_repeatable_model(jacobian: Jacobian) -> None:
    """Raise unless outputs are the same when computed again, and in other company.

    Raises:
        ValueError: for dropout, batch statistics, or anything else that makes the outputs of an
            example random or dependent on the other examples.
    """
    some = take(jacobian.inputs, slice(0, 8))
    first, again = jacobian.outputs_of(some), jacobian.outputs_of(some)
    checks.check_numbers("outputs", first, finite=False)
    checks.check_deterministic(close(first, again), jacobian.model)
    if len(first) > 1:
        order = list(range(len(first) - 1, 0, -1))
        for rows in ([0], order):
            alone = jacobian.outputs_of(take(some, rows))
            checks.check_independent(close(first[rows], alone))


def check_readable_model(jacobian: Jacobian) -> None:
    """Raise unless gradients can be read from the graph of the outputs, tried on two examples.

    Raises:
        ValueError: for reentrant checkpointing, say, or outputs that depend on no parameter.
    """
    with recording():
        values = jacobian.evaluate(take(jacobian.inputs, [0, 0]))
        checks.check_differentiable(values.requires_grad)
        check_graph(values, jacobian.params)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are the same but for rounding, which the shape of a batch can change."""
    tolerance = 1e-8 if a.dtype == torch.float64 else max(1e-3, 6 * torch.finfo(a.dtype).eps)
    finite = a[a.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)
