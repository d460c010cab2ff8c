"""What a model is fed, to see that its twin is fed the same."""

from __future__ import annotations

from typing import Any, final

from torch import nn
from torch.utils._pytree import tree_leaves


@final
class Witness:
    """A hook that notes the inputs of a model while it is switched on.

    A copy of the model, such as a recorded run keeps, gets a witness of its own that stays off.
    """

    def __init__(self) -> None:
        self.on = False
        self.seen: list[Any] = []

    def watch(self, on: bool) -> None:
        """Forget what was seen, and switch it on or off."""
        self.on = on
        self.seen.clear()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            self.seen.append(tree_leaves((args, kwargs)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Witness:
        return Witness()
