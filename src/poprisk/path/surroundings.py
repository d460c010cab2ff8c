"""What a model keeps beside the weights that are trained, and whether it has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

State = dict[str, list[Any]]
"""What a model keeps beside its parameters: numbers and tensors by the name of their attribute."""


class Surroundings:
    """All of a model that is not to move in a run: other parameters, and state that it reads.

    Args:
        model: that is trained.
        copied: its private copy, which stays as it is.
        trained: names of the parameters that are to move.
        free: names of state that may change, for outputs do not read it.
    """

    def __init__(
        self, model: nn.Module, copied: nn.Module, trained: tuple[str, ...], free: frozenset[str]
    ) -> None:
        self.model, self.copied = model, copied
        self.left_out = frozenset(trained) | free
        self.seen: list[tuple[int, int]] = []

    def changed(self, *, thorough: bool = False) -> list[str]:
        """Names of what is no longer what it was.

        Args:
            thorough: compare numbers even where no tensor was written to, as far as torch counts.
        """
        tensors = self._tensors(self.model)
        seen = [(id(t), t._version) for t in tensors.values()]
        if seen == self.seen and not thorough:
            return []
        self.seen = seen
        kept = self._tensors(self.copied)
        return changed(numbers_in(kept), numbers_in(tensors))

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: t for name, t in named if name not in self.left_out}


def places_in(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where a model keeps buffers and attributes of its own: a dictionary and the key there."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    own = vars(nn.Module())
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for key in module._buffers:
            found[path + key] = (module._buffers, key)
        for key in vars(module):
            if key not in own:
                found[path + key] = (vars(module), key)
    return found


def state_of(model: nn.Module) -> State:
    """Copies of what a model keeps beside its parameters, as far as it is numbers."""
    return numbers_in({name: holder[key] for name, (holder, key) in places_in(model).items()})


def numbers_in(values: dict[str, Any]) -> State:
    """Copies of the numbers in some values, by name."""
    found: State = {}
    for name, value in values.items():
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, int, float))]
        found[name] = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
    return found


def changed(before: State, after: State) -> list[str]:
    """Names whose numbers differ; NaN is no difference."""
    names = [*after, *(name for name in before if name not in after)]
    return [name for name in names if not _same(before.get(name, []), after.get(name, []))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
