"""Whether a gradient has changed since it was noted, by more than a factor.

Clipping by norm and unscaling multiply a gradient by a number, which what was noted of it follows.
Anything else, such as a mask, clipping by value or another backward pass, it cannot follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALED_TOLERANCE = 1e-2
"""Relative deviation from a common factor, beyond rounding, at which gradients count as changed."""

SMALL = 4096
"""Entries up to which a gradient is kept as it is."""

CHUNK = 1021
"""Entries in a mixture; a prime: no row, column or tap of a kernel has the same places in all."""

WEIGHTS = torch.randn(CHUNK, generator=torch.Generator().manual_seed(22), device="cpu")
"""Of the entries in a mixture, which has in the mean the squared norm of its entries; with this
seed also where they are all the same."""


class GradientProbe(NamedTuple):
    """Some numbers that stand for a gradient at a moment, by which later changes are seen.

    Attributes:
        numbers: its entries; of a large one mixtures of all, with norms as those of the entries.
    """

    numbers: Tensor

    @classmethod
    def of(cls, grad: Tensor) -> GradientProbe:
        """Those of a gradient now."""
        return cls(_numbers(grad))

    def holds(self, grad: Tensor) -> bool:
        """Whether a gradient is as it was; one that is not finite makes no step anyway."""
        return torch.equal(_numbers(grad).nan_to_num(), self.numbers.nan_to_num())

    def holds_times(self, factor: float, grad: Tensor) -> bool:
        """Whether a gradient is as it was times a factor, up to rounding in single precision."""
        then = self.numbers * factor
        rounding = 64 * torch.finfo(then.dtype).eps * torch.linalg.vector_norm(then)
        return bool(torch.linalg.vector_norm(_numbers(grad) - then) <= rounding)

    def factor(self, grad: Tensor) -> float:
        """The number that the gradient was multiplied by since.

        Raises:
            RuntimeError: if not all of it was multiplied by the same.
        """
        numbers = _numbers(grad)
        if torch.equal(numbers, self.numbers):
            return 1.0
        then, now = self.numbers.double(), numbers.double()
        norm = float(torch.linalg.vector_norm(then))
        factor = float(torch.linalg.vector_norm(now)) / norm if norm > 0 else 1.0
        rest = float(torch.linalg.vector_norm(now - factor * then))
        if not rest <= SCALED_TOLERANCE * factor * norm:
            raise RuntimeError(
                "gradients were changed between the backward pass and step(): what was noted of "
                'them (by variance="exact", "microbatch" or terms of the loss) takes a common '
                "factor per tensor (unscaling, clipping by norm), but not clipping by value, added "
                "noise or terms from another backward pass."
            )
        return factor


def _numbers(grad: Tensor) -> Tensor:
    flat = (torch.view_as_real(grad) if grad.is_complex() else grad).flatten()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if flat.numel() <= SMALL:
        return flat.clone()
    mixed = flat.numel() // CHUNK * CHUNK
    mixtures = flat[:mixed].view(-1, CHUNK) @ WEIGHTS.to(flat.device, flat.dtype)
    return torch.cat([mixtures, flat[mixed:]])
