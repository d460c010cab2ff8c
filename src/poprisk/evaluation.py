"""Look at a model without leaving a trace in it.

Evaluating a model is not as harmless as it looks: layers keep running averages, caches and counters
in buffers and attributes (in evaluation mode too), ``nn.Embedding(max_norm=...)`` renormalizes its
weight, dropout draws random numbers, and a model of forces differentiates an energy on its way,
which ``torch.no_grad()`` forbids. Whatever measures a model does it through this module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from poprisk.dtensor import local
from poprisk.holders import Holder, holders_in
from poprisk.randomness import RandomState

Forward = Callable[[nn.Module, Any], Any]

_WRITES_WEIGHTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models that were evaluated before, and whether that changed their weights."""

_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
"""Where a user's hooks on backward passes stand, of modules and of parameters."""


def call(model: nn.Module, x: Any) -> Any:
    """The outputs of a model that takes one argument."""
    return model(x)


@contextmanager
def evaluating(*parts: Any, eval_mode: bool = True, backward_hooks: bool = False) -> Iterator[None]:
    """Evaluation mode inside; afterwards the models are as if nobody had looked.

    Restored, whatever is done inside and however it ends:

    - modes, and which buffers, parameters, submodules and hooks every module has;
    - buffers and attributes: tensors of any kind, arrays, generators and built-in containers with
      their contents; objects of other classes with their attributes (caches, running statistics),
      unless they refer back to the model, as a trainer does; modules hidden in lists;
    - weights that the forward pass itself writes to, gradients, and what requires them;
    - the global random numbers of torch, numpy and Python.

    Inside, everything works on copies, so that a graph in flight keeps what it has saved. Backward
    hooks of modules and parameters are suspended; forward hooks are part of the function and run.
    Compiled modules run uncompiled, and FSDP2's modules are left sharded.

    Out of reach: class attributes, module-level globals, memory inside of objects of C, files, what
    forward hooks and closures write to elsewhere, and a lazy module's first call, which makes its
    weights. A model is taken to write to its weights if it did so the first time, or if a part of
    it has ``max_norm``; if it begins later, that is said.

    Args:
        parts: modules to look at (those that share modules count once); other objects or functions
            that are used on the way, such as losses, keep their state too.
        eval_mode: False leaves modules in the modes that they are in.
        backward_hooks: True lets them act, for what is to be the gradient that autograd gives.
    """
    with ExitStack() as undo:
        if torch.is_inference_mode_enabled():  # its tensors could be written to only in there
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
        undo.callback(RandomState.now().restore)
        models = [part for part in parts if isinstance(part, nn.Module)]
        _reshard([m for model in models for m in model.modules()])
        holders = holders_in(parts)
        modules = [h.owner for h in holders if isinstance(h.owner, nn.Module)]
        params: list[Tensor] = list(
            dict.fromkeys(p for m in modules for p in m.parameters(recurse=False))
        )
        undo.enter_context(_weights_kept(models))
        undo.enter_context(_gradients_kept(params))
        undo.enter_context(_lent(holders))
        if not backward_hooks:
            undo.enter_context(_hooks_suspended([*modules, *params]))
        undo.enter_context(uncompiled())
        undo.callback(_reshard, modules)
        if eval_mode:
            for model in models:
                model.eval()
        yield


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
            if "require grad" not in str(error):
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


@contextmanager
def _lent(holders: list[Holder]) -> Iterator[None]:
    """Copies, not later repair: a write to the original would spoil a graph that saved it."""
    memo: dict[int, Any] = {}
    with ExitStack() as undo:
        for holder in holders:
            undo.callback(holder.restore)
            holder.lend_copies(memo)
        yield


@contextmanager
def _gradients_kept(params: list[Tensor]) -> Iterator[None]:
    """A backward pass inside adds to copies of the gradients, in place."""
    grads = [p.grad for p in params]
    needed = [p.requires_grad for p in params]
    try:
        for p, grad in zip(params, grads, strict=True):
            if grad is not None:
                p.grad = grad.detach().clone()
        yield
    finally:
        for p, grad, need in zip(params, grads, needed, strict=True):
            p.requires_grad_(need)
            p.grad = grad


@contextmanager
def _hooks_suspended(owners: list[Any]) -> Iterator[None]:
    """A user's backward hooks see no gradients but those of the training."""
    kept = [
        (owner, name, hooks)
        for owner in owners
        for name in _HOOKS
        if (hooks := getattr(owner, name, None))
    ]
    try:
        for owner, name, hooks in kept:
            setattr(owner, name, type(hooks)())
        yield
    finally:
        for owner, name, hooks in kept:
            setattr(owner, name, hooks)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Without compiling anew for evaluation, nor graphs whose memory is donated to one backward."""
    stance = getattr(torch.compiler, "set_stance", None)
    if "torch._dynamo" not in sys.modules or stance is None or torch.compiler.is_compiling():
        yield
        return
    with stance("force_eager"):
        yield


def _reshard(modules: list[nn.Module]) -> None:
    """Free FSDP2's whole weights: the next pass would take them for up to date."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in modules:
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


@contextmanager
def _weights_kept(models: list[nn.Module]) -> Iterator[None]:
    """Write back what a forward pass changes in weights.

    Copies of all weights cost memory: they are taken at the first look, to learn which models need
    them, in the host's memory.
    """
    suspects = [m for m in models if _WRITES_WEIGHTS.get(m, True) or _renormalizes(m)]
    copies: dict[Tensor, Tensor] = {}
    versions: dict[Tensor, int] = {}
    for model in models:
        for p in filter(_has_values, model.parameters()):
            if model in suspects:
                copies[p] = local(p.detach()).to("cpu", copy=True)
            elif not p.is_inference():
                versions[p] = p._version
    try:
        yield
    finally:
        written = _restore_weights(copies)
        for model in suspects:
            _WRITES_WEIGHTS[model] = any(p in written for p in model.parameters())
        late = {p for p, version in versions.items() if p not in copies and p._version != version}
        for model in models:
            if not late.isdisjoint(model.parameters()):
                _WRITES_WEIGHTS[model] = True
                warnings.warn(
                    f"{type(model).__name__} wrote to its weights while it was evaluated, for the "
                    "first time now; from the next time on they are restored.",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _renormalizes(model: nn.Module) -> bool:
    return any(getattr(m, "max_norm", None) is not None for m in model.modules())


def _has_values(p: Tensor) -> bool:
    return not (is_lazy(p) or p.is_meta)


def _restore_weights(copies: dict[Tensor, Tensor]) -> set[Tensor]:
    """Write back what differs from its copy; NaN is no difference."""
    written = set()
    with torch.no_grad():
        for p, before in copies.items():
            mine = local(p.detach())
            kept = before.to(mine.device)
            strided = mine.layout == torch.strided
            if not strided or not bool(((mine == kept) | (mine.isnan() & kept.isnan())).all()):
                # Not p.copy_: the bits are those that a graph in flight has saved.
                mine.data.copy_(kept)
                written.add(p)
    return written
