"""Forms that many arguments and results share: losses, estimates, progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

PerExampleLoss = Callable[[Any, Any], Tensor]
"""From outputs (b, ...) and targets (b, ...) to one value per example, (b,)."""


@runtime_checkable
class Estimated(Protocol):
    """A number that was estimated, and what it takes to judge it; every result of the library.

    Example:
        >>> from poprisk.linalg import Estimate
        >>> isinstance(Estimate.of(1.0, 0.0), Estimated)
        True
    """

    @property
    def value(self) -> float:
        """The estimate."""
        ...

    @property
    def standard_error(self) -> float:
        """Of the value; 0 if it is exact, NaN or infinite if nothing tells it."""
        ...

    @property
    def valid(self) -> bool:
        """Whether the value may be believed."""
        ...

    @property
    def reason(self) -> str:
        """Why not; empty if valid."""
        ...

    @property
    def cost(self) -> float:
        """Work beyond the training that the estimate is about, in trainings.

        1 is as much as that training, 0 next to nothing, NaN unknown.
        """
        ...


class ProgressCallback(Protocol):
    """What long work calls after each of its parts; any function of two numbers will do."""

    def __call__(self, done: int, total: int | None, /) -> None:
        """Be told how many parts are done, and of how many; None: unknown."""
        ...
