"""Which calls belong to which step of an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, final
from weakref import ReferenceType, WeakMethod, finalize, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

Told = Callable[[], None]


class Watcher(Protocol):
    """Who wants to know of steps."""

    def before_step(self) -> None:
        """The optimizer is about to step."""
        ...

    def after_step(self) -> None:
        """The optimizer has stepped."""
        ...


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside of what accelerate or Lightning wrap around it, or itself.

    A gated optimizer is one itself.
    """
    while not _has_hooks(optimizer):
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
        if inner is None:
            return optimizer
        optimizer = inner
    return optimizer


def watch(optimizer: Any, watcher: Watcher) -> bool:
    """Tell ``watcher`` of the optimizer's steps as long as it lives.

    Returns:
        Whether that can be done.
    """
    if not _has_hooks(optimizer):
        return False
    handles = (
        optimizer.register_step_pre_hook(_hook(WeakMethod(watcher.before_step))),
        optimizer.register_step_post_hook(_hook(WeakMethod(watcher.after_step))),
    )
    for handle in handles:
        finalize(watcher, handle.remove)
    return True


def _has_hooks(optimizer: Any) -> bool:
    """Wrappers are optimizers by name, or hand on every attribute, but were never set up as one."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _hook(method: WeakMethod[Told]) -> Callable[..., None]:
    def told(*_: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled step has no hooks in it
            return
        found = method()
        if found is not None:
            found()

    return told


@final
class Gradients:
    """Whether gradients were cleared since the last look, which ends a step of which nobody told.

    A GradScaler leaves steps out, and a compiled step tells nobody.
    """

    def __init__(self) -> None:
        self.noted: tuple[Tensor, ReferenceType[Tensor]] | None = None

    def note(self, params: Mapping[str, Tensor]) -> None:
        """Remember a gradient that is there now."""
        owner = next((p for p in params.values() if p.grad is not None), None)
        self.noted = None if owner is None or owner.grad is None else (owner, ref(owner.grad))

    def cleared(self, params: Mapping[str, Tensor]) -> bool | None:
        """Whether the gradient that was noted is gone; None if there was none and is none."""
        if self.noted is None:
            return None if all(p.grad is None for p in params.values()) else False
        owner, grad = self.noted
        return owner.grad is None or owner.grad is not grad()


def warn_unwatched(optimizer: Any, accumulate: int) -> None:
    """Say that steps are counted by calls."""
    warnings.warn(
        f"the monitor cannot see when {type(optimizer).__name__} steps (it is no torch.optim "
        f"optimizer, nor around one); it takes every {accumulate} call(s) of step() for a step of "
        "the optimizer: pass accumulate= with the parts of a batch.",
        RuntimeWarning,
        stacklevel=4,
    )
