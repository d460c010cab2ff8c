"""How far what the operators of a run predict is from what happened."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from torch import Tensor

from poprisk.printing import short_repr

WARN_ABOVE = 1e-2
REMEDY = (
    "Refine kinks (refine=1e-4), use segments=, or record every step (stride=1); gradients that "
    "were clipped or masked do that too."
)


class Closure(NamedTuple):
    """Relative mismatch between what the operators predict and what happened.

    Attributes:
        train: of the displacement of the training outputs.
        query: of the displacement of the query outputs.
        gradient: of the final output gradient.
    """

    train: float
    query: float
    gradient: float

    __repr__ = short_repr

    @property
    def worst(self) -> float:
        """The largest of them; NaN if one is."""
        return math.nan if any(map(math.isnan, self)) else max(self)

    def warn(self, advice: str, stacklevel: int) -> None:
        """Warn where the operators do not predict what happened, and say what to do about it."""
        if not self.worst <= WARN_ABOVE:
            warnings.warn(
                f"the path operators are off by {self.worst:.2g}: the realized movement is not "
                f"what they predict. {advice}",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )


def relative(predicted: Tensor, realized: Tensor) -> float:
    """Norm of the difference over the norm of the second; of the first where that is zero."""
    scale = float(realized.norm())
    return float((predicted - realized).norm()) / scale if scale > 0 else float(predicted.norm())
