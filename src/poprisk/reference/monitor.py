"""The monitor's gradient statistics, naively: one gradient an example, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def example_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Gradients (b, P) of all parameters, one backward pass an example."""
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).double()


def signal(rows: Tensor) -> dict[str, float]:
    """Share, signal-to-noise ratio and noise scale of gradients (b, P), as defined."""
    b = len(rows)
    square = noise = passed = 0.0
    for column in rows.T.tolist():
        mean = sum(column) / b
        variance = sum((g - mean) ** 2 for g in column) / b / (b - 1)
        square, noise = square + mean**2, noise + variance
        passed += max(mean**2 - variance, 0.0)
    return {
        "share": passed / square,
        "snr": square / noise,
        "noise_scale": b * noise / (square - noise),
    }
