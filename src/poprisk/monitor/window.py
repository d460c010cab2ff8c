"""The steps that a row of signal and noise is about."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final
from weakref import ref

from torch import nn

from poprisk._validate import check_positive
from poprisk.monitor.signal import SHARE, GradientSignal, parts_of

LEAST = 4
"""Steps that a share needs behind it, unless its window is smaller."""


@final
class MeasuredSteps:
    """What was measured at the last steps, by module, and the numbers of these together.

    Args:
        size: steps.
    """

    def __init__(self, size: int) -> None:
        check_positive("window", size)
        self.size = size
        self.steps: dict[int, dict[str, GradientSignal]] = {}
        self._model: Callable[[], nn.Module | None] = lambda: None

    def add(self, model: nn.Module, step: int, found: dict[str, GradientSignal]) -> None:
        """Keep what was measured at a step, in place of what was measured of it before."""
        if self._model() is not model or step < max(self.steps, default=step):
            self.steps.clear()  # another run
            self._model = ref(model)
        self.steps.pop(step, None)
        self.steps[step] = found
        while len(self.steps) > self.size:
            del self.steps[next(iter(self.steps))]

    def numbers(self) -> dict[str, float]:
        """By part and module."""
        row = {"steps": float(len(self.steps))}
        for module in next(reversed(self.steps.values())):
            steps = [found[module] for found in self.steps.values() if module in found]
            parts = parts_of(steps)
            if len(steps) < min(LEAST, self.size):
                parts |= dict.fromkeys(SHARE, math.nan)
            row |= {"/".join(filter(None, (part, module))): v for part, v in parts.items()}
        return row
