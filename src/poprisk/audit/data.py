"""A data set that says which example is which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor
from torch.utils.data import Dataset


@final
class Indexed(Dataset[Any]):
    """A map-style data set with other labels, and the position of each example.

    Args:
        data: whose items are tuples (inputs, ..., target) or dicts.
        targets: in place of its own, (n, ...).
        label: name of the target in a dict.
        name: of the position in a dict; in a tuple it comes last.
    """

    def __init__(self, data: Any, targets: Tensor, *, label: str, name: str) -> None:
        self.data, self.targets, self.label, self.name = data, targets, label, name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):  # which ends a loop over the examples
            raise IndexError(f"there is no example {int(index)} among {len(self)}.")
        index = int(index) % len(self)  # from the end, as of a list
        found, target = self.data[index], self.targets[index]
        if isinstance(found, Mapping):
            if self.label not in found:
                raise KeyError(
                    f"examples have no {self.label!r} but {', '.join(map(str, found))}; pass label="
                )
            return {**found, self.label: target, self.name: index}
        if not isinstance(found, (tuple, list)) or len(found) < 2:
            raise TypeError(
                "examples must be tuples (inputs, ..., target) or dicts, but got "
                f"{type(found).__name__}."
            )
        *inputs, _ = found
        return (*inputs, target, index)
