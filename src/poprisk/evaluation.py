"""Look at a model without leaving a trace in it.

Evaluating a model is not as harmless as it looks: layers keep running averages, caches and counters
in buffers and attributes (in evaluation mode too), ``nn.Embedding(max_norm=...)`` renormalizes its
weight, dropout draws random numbers, and a model of forces differentiates an energy on its way,
which ``torch.no_grad()`` forbids. Whatever measures a model does it through this module.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from poprisk.randomness import RandomState

Forward = Callable[[nn.Module, Any], Any]

_WRITES_WEIGHTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models that were evaluated before, and whether that changed their weights."""

_OWN = frozenset(
    name for name in nn.Module().__dict__ if name.startswith("_") and name != "_buffers"
)
"""Attributes in which ``nn.Module`` keeps parameters, children and hooks."""


def call(model: nn.Module, x: Any) -> Any:
    """The outputs of a model that takes one argument."""
    return model(x)


@contextmanager
def evaluating(*models: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Evaluation mode inside; afterwards the models are as if nobody had looked.

    Restored are modes, buffers, attributes (tensors, arrays, generators and built-in containers of
    them with their contents; of other objects the reference), gradients, the global random numbers,
    and weights that the forward pass itself writes to.

    Args:
        models: to look at; those that share modules count once.
        eval_mode: False leaves them in the modes that they are in.
    """
    random = RandomState.now()
    modules = list(dict.fromkeys(m for model in models for m in model.modules()))
    params = list(dict.fromkeys(p for model in models for p in model.parameters()))
    grads = [p.grad for p in params]
    # Copies of all weights cost memory: taken at the first look, to learn which models need them.
    suspects = [m for m in models if _WRITES_WEIGHTS.get(m, True)]
    weights: dict[Tensor, Tensor] = {}
    for model in suspects:
        weights |= {p: p.detach().clone() for p in model.parameters()}
    kept = [_Kept.of(module) for module in modules]
    memo: dict[int, Any] = {}
    try:
        for each in kept:
            each.lend_copies(memo)
        if eval_mode:
            for model in models:
                model.eval()
        yield
    finally:
        for each in kept:
            each.restore()
        written = _restore_weights(weights)
        for model in suspects:
            _WRITES_WEIGHTS[model] = any(p in written for p in model.parameters())
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        random.restore()


def outputs_of(model: nn.Module, x: Any, forward: Forward = call) -> Any:
    """Outputs without a graph, also of a model that differentiates in its forward pass.

    Gradients stay enabled and the parameters are frozen instead, so that an ordinary model records
    nothing. One that differentiates by its own parameters is called with these as they are.

    Args:
        model: in the mode it is to be evaluated in.
        x: inputs of a batch.
        forward: from model and inputs to outputs.

    Returns:
        What ``forward`` returns, its tensors detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            with _frozen(model):
                found = forward(model, x)
        except RuntimeError as error:
            # Autograd's words for a derivative by something frozen.
            if "does not require grad" not in str(error):
                raise
            found = forward(model, x)
    return tree_map_only(Tensor, Tensor.detach, found)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class _Kept(NamedTuple):
    """A module's attributes and buffers, the very objects, while it works on copies of them."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Kept:
        attributes = {k: v for k, v in module.__dict__.items() if k not in _OWN}
        return cls(module, attributes, dict(attributes.pop("_buffers")))

    def lend_copies(self, memo: dict[int, Any]) -> None:
        """Copies, not later repair: a write to the original would spoil a graph that saved it."""
        own = self.module.__dict__
        for name, value in self.attributes.items():
            own[name] = _copied(value, memo)
        for name, buffer in self.buffers.items():
            own["_buffers"][name] = _copied(buffer, memo)

    def restore(self) -> None:
        own = self.module.__dict__
        for name in [k for k in own if k not in _OWN and k != "_buffers"]:
            del own[name]
        own.update(self.attributes)
        own["_buffers"].clear()
        own["_buffers"].update(self.buffers)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what a forward pass may write to in place; objects of other kinds are shared.

    Args:
        value: of an attribute.
        memo: copies by the identity of the original, so that two names of a thing stay one.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Parameter):
        return value
    if isinstance(value, Tensor):
        found = value.detach().clone().requires_grad_(value.requires_grad)
    elif isinstance(value, np.ndarray):
        found = value.copy()
    elif isinstance(value, torch.Generator):
        found = value.clone_state()
    else:
        return _copied_container(value, memo)
    memo[id(value)] = found
    return found


def _copied_container(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) is tuple:
        return tuple(_copied(v, memo) for v in value)
    if not isinstance(value, (list, deque, dict, set, bytearray)):
        return value
    # A shallow copy keeps what subclasses know, such as a deque's maxlen; then the contents.
    found: Any = copy.copy(value)
    memo[id(value)] = found
    if isinstance(found, dict):
        found.update({k: _copied(v, memo) for k, v in found.items()})
    elif isinstance(found, (list, deque)):
        for i, v in enumerate(found):
            found[i] = _copied(v, memo)
    return found


def _restore_weights(weights: dict[Tensor, Tensor]) -> set[Tensor]:
    """Write back what differs from its copy; NaN is no difference."""
    written = set()
    with torch.no_grad():
        for p, before in weights.items():
            if not bool(((p == before) | (p.isnan() & before.isnan())).all()):
                p.copy_(before)
                written.add(p)
    return written
