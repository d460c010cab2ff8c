"""The Jacobian of a model's outputs by its weights: products, rows, and the data they are of."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils import _pytree as pytree

from poprisk._validate import first_line
from poprisk.evaluation import evaluating, outputs_of, uncompiled
from poprisk.forward_mode import plain_kernels
from poprisk.per_sample import checks
from poprisk.per_sample.visible import check_unhooked, check_whole
from poprisk.uncut import uncut

Inputs = Any
"""A tensor for ``model(x)``, a tuple of tensors for ``model(*x)`` or a dict for ``model(**x)``."""

Result = TypeVar("Result")

ParameterSelection = Collection[str] | Callable[[str, nn.Parameter], bool] | None


def trainable(model: nn.Module, chosen: ParameterSelection = None) -> dict[str, nn.Parameter]:
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


class _Holder(nn.Module):
    """Gives weights to a model for the time of any work, where a call is not all of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


@final
class Jacobian:
    r"""J, (b·k, P): derivatives of a model's outputs by its weights, at any weights and inputs.

    Products take J and its transpose without forming it. Weights are given by name; None: the
    model's own. At flat weights there are rows, too: see :mod:`poprisk.path.jacobian`.

    Args:
        model: any module whose output has the examples first.
        params: the weights to differentiate by, of the model itself.
        outputs: positions of the outputs that count, None: all; or ``"sum"``: their sum.
        written: buffers that a forward pass writes to, without outputs that depend on them.
        whole: of the outputs as a function of all weights, also where the model detaches what it
            hands on, see :mod:`poprisk.uncut`; False: what autograd gives.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        outputs: Sequence[int] | str | None = None,
        written: Sequence[str] = (),
        *,
        whole: bool = False,
    ) -> None:
        self.model, self.params, self.outputs, self.whole = model, params, outputs, whole
        buffers = dict(model.named_buffers())
        self.written = {name: buffers[name] for name in written}
        self._places = _places(model, {**params, **self.written})

    def __call__(self, x: Inputs, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs that count, (b, k)."""

        def called() -> Any:
            with uncut() if self.whole else contextlib.nullcontext():
                return call(self.model, x)

        outputs = called() if weights is None else self.holding(weights, called)
        checks.check_outputs(outputs, length(x))
        flat = outputs.flatten(1) if outputs.ndim > 1 else outputs.unsqueeze(1)
        if self.outputs == "sum":
            return flat.sum(dim=1, keepdim=True)
        if self.outputs is None or isinstance(self.outputs, str):
            return flat
        checks.check_positions("outputs", self.outputs, flat.shape[1])
        return flat[:, list(self.outputs)]

    def values(self, x: Inputs, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs that count, (b, k), without a graph."""
        return outputs_of(self.model, x, lambda _, x: self(x, weights))

    def holding(self, weights: Mapping[str, Tensor], work: Callable[[], Result]) -> Result:
        """What ``work`` returns while the model has other weights, and no fused kernel is used.

        A backward pass through checkpointed layers calls them again, and is to be in here too.
        """
        # Copies, for torch.func lets no captured tensor be written to.
        tensors = {**weights, **{name: t.clone() for name, t in self.written.items()}}
        held = {f"model.{place}": tensors[name] for place, name in self._places.items()}
        with plain_kernels(self.model), uncompiled():
            found = torch.func.functional_call(
                _Holder(self.model), held, (work,), tie_weights=False
            )
            return cast(Result, found)

    def pullback(
        self, x: Inputs, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Callable[..., list[dict[str, Tensor]]]]:
        """Outputs (b, k) with their graph, and Jᵀ as a map from some (b, k) to weights, of each."""
        given = self.params if weights is None else weights
        with recording():
            leaves = given if weights is None else leaves_at(given)
            u = self(x, None if weights is None else leaves)

        def product(vector: Tensor) -> dict[str, Tensor]:
            inputs = list(leaves.values())
            grads = torch.autograd.grad(
                u, inputs, vector, retain_graph=True, materialize_grads=True
            )
            return dict(zip(leaves, grads, strict=True))

        def pull(*vectors: Tensor) -> list[dict[str, Tensor]]:
            def work() -> list[dict[str, Tensor]]:
                return [product(vector) for vector in vectors]

            return work() if weights is None else self.holding(leaves, work)

        return u, pull

    def pushforward(
        self, x: Inputs, weights: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Tensor:
        """J times a direction by forward mode, (b, k)."""

        def at(z: dict[str, Tensor]) -> Tensor:
            return self(x, z)

        with plain_kernels(self.model):
            return jvp(at, (dict(weights),), (dict(direction),))[1]

    def flaw_of(
        self,
        product: Callable[[dict[str, Tensor]], Tensor],
        x: Inputs,
        weights: Mapping[str, Tensor] | None = None,
    ) -> str:
        r"""Why a product with J by forward mode is not to be had, or not right; else empty.

        The right one is the transpose of reverse mode, :math:`v^T(J J^T v) = \|J^T v\|^2`: forward
        mode does not stop at ``torch.no_grad()`` inside a model, as reverse mode does.
        """
        u, pull = self.pullback(x, weights)
        u = u.detach()
        v = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype, device=u.device).view_as(u)
        (row,) = pull(v)
        try:
            found = (v * product(row)).sum()
        except (NotImplementedError, RuntimeError) as error:
            return f"the model has no forward-mode derivative ({first_line(error)})"
        expected = torch.stack([g.abs().square().sum() for g in row.values()]).sum()
        if bool((found - expected).abs() <= tolerance_of(found) * expected):
            return ""
        return "forward and reverse mode differ (torch.no_grad() or detach() inside the model?)"


def tolerance_of(like: Tensor) -> float:
    """Relative difference of two ways to a product that rounding may make."""
    return 1e-9 if like.dtype == torch.float64 else 1e-3


def _places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Every attribute of a module that holds one of the tensors, once, to the tensor's name.

    ``functional_call`` leaves other weights behind in modules that it meets under several names.
    """
    names = {id(t): name for name, t in tensors.items()}
    return {
        f"{prefix}.{attribute}".lstrip("."): names[id(t)]
        for prefix, module in model.named_modules()
        for attribute, t in (*module._parameters.items(), *module._buffers.items())
        if id(t) in names
    }


def leaves_at(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, to be differentiated by."""
    return {name: w.detach().requires_grad_() for name, w in weights.items()}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all entries, detached and copied."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


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


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for inputs of any form."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    with uncompiled():
        return model(*args, **kwargs)


def chunks(count: int, size: int) -> list[slice]:
    """Ranges of at most ``size`` that cover ``count``, as equal as can be."""
    return split(count, -(-count // size))


def split(count: int, pieces: int) -> list[slice]:
    """Ranges that cover ``count``, as equal as can be."""
    edges = [count * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are the same but for rounding, which the shape of a batch can change."""
    tolerance = 1e-8 if a.dtype == torch.float64 else max(1e-3, 6 * torch.finfo(a.dtype).eps)
    finite = a[a.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)
