"""Losses of all sorts, and targets for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Any, Tensor], Any]
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


@dataclass(frozen=True)
class Sort:
    """A sort of loss.

    Attributes:
        loss: from outputs (b, c) and targets to, as a rule, one value an example.
        targets: "numbers", "classes", "ignored", "binary" or "counts".
        shift_invariant: whether a constant added to all outputs changes nothing.
        curved: whether its second derivative is positive wherever it is differentiable.
        separate: whether it is one value an example.
    """

    loss: Loss
    targets: str
    shift_invariant: bool = False
    curved: bool = True
    separate: bool = True


def rows(values: Tensor) -> Tensor:
    """Summed over all dimensions but the first."""
    return values.flatten(1).sum(1)


def cross_entropy(**options: Any) -> Loss:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        cast: dict[str, Any] = {
            k: v.to(u.dtype) if isinstance(v, Tensor) else v for k, v in options.items()
        }
        return F.cross_entropy(u, y, reduction="none", **cast)

    return loss


def each(function: Callable[..., Tensor], **options: Any) -> Loss:
    """A loss of torch, summed over outputs."""
    return lambda u, y: rows(function(u, y, reduction="none", **options))


ORDINARY: dict[str, Sort] = {
    "squared error": Sort(lambda u, y: rows((u - y).square()) / 2, "numbers"),
    "mean squared error": Sort(lambda u, y: (u - y).square().mean(1), "numbers"),
    "cross-entropy": Sort(cross_entropy(), "classes", shift_invariant=True),
    "weighted cross-entropy": Sort(cross_entropy(weight=WEIGHTS), "classes", shift_invariant=True),
    "label smoothing": Sort(cross_entropy(label_smoothing=0.1), "classes", shift_invariant=True),
    "ignored labels": Sort(cross_entropy(ignore_index=-100), "ignored", shift_invariant=True),
    "logistic": Sort(each(F.binary_cross_entropy_with_logits), "binary"),
    "Poisson": Sort(each(F.poisson_nll_loss), "counts"),
    "absolute error": Sort(each(F.l1_loss), "numbers", curved=False),
    "Huber": Sort(each(F.huber_loss), "numbers", curved=False),
    "sharp smooth L1": Sort(each(F.smooth_l1_loss, beta=1e-9), "numbers", curved=False),
    "hinge": Sort(lambda u, y: rows((1 - (2 * y - 1) * u).clamp_min(0)), "binary", curved=False),
    "multi-class hinge": Sort(
        lambda u, y: F.multi_margin_loss(u, y, reduction="none"), "classes", True, curved=False
    ),
    "quantile": Sort(
        lambda u, y: rows(torch.maximum(0.9 * (y - u), 0.1 * (u - y))), "numbers", curved=False
    ),
}
"""Losses that somebody might train on, by name."""

ODD: dict[str, Sort] = {
    "reduced by mistake": Sort(F.mse_loss, "numbers", separate=False),
    "one value an output": Sort(lambda u, y: (u - y).square(), "numbers", separate=False),
    "broadcast by mistake": Sort(
        lambda u, y: (u - y.flatten(1).sum(1)).square().mean(1), "numbers", separate=False
    ),
    "spread over the batch": Sort(
        lambda u, y: rows((u - y).square()) / max(len(u), 1) + (u - y).square().mean(),
        "numbers",
        separate=False,
    ),
    "ranks in the batch": Sort(
        lambda u, y: rows((u - u.mean(0) - y).square()), "numbers", separate=False
    ),
    "NaN": Sort(lambda u, y: rows((u - y).square()) * float("nan"), "numbers"),
    "square root at zero": Sort(
        lambda u, y: rows((u - u.detach()).square()).sqrt(), "numbers", curved=False
    ),
    "constant": Sort(lambda u, y: rows((u.detach() - y).square()), "numbers"),
    "a number": Sort(lambda u, y: float(rows((u - y).square()).sum()), "numbers", separate=False),
}
"""Losses that are none, or not one value an example, by name."""

LOSSES = {**ORDINARY, **ODD}


def draw_targets(
    sort: Sort, n: int, c: int, labels: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Targets of n examples in float64, or classes in an integer dtype."""
    if sort.targets in ("classes", "ignored"):
        y = torch.randint(c, (n,), generator=generator)
        if sort.targets == "ignored":
            y[torch.rand(n, generator=generator) < 0.3] = -100
            return y
        return y.to(labels)
    if sort.targets == "binary":
        return torch.randint(2, (n, c), generator=generator).double()
    if sort.targets == "counts":
        return torch.randint(5, (n, c), generator=generator).double()
    return torch.randn(n, c, generator=generator, dtype=torch.float64)
