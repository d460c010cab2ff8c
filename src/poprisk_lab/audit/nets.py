"""Networks for people without one, and how long to train them: by rule, and said."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

STEPS = 2500
"""Least number of steps, with ``FEWEST_EPOCHS`` and ``MOST_EPOCHS`` as limits."""
FEWEST_EPOCHS = 20
MOST_EPOCHS = 80


class TrainingRecipe(NamedTuple):
    """What is trained, and how.

    Attributes:
        net: what it is, for people.
        hidden: width of the hidden layers, or channels of the first convolution.
        epochs: passes over the data.
        batch_size: examples a step.
        lr: learning rate of PopRiskAdamW.
    """

    net: str
    hidden: int
    epochs: int
    batch_size: int
    lr: float

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        return f"{self.net}, {epochs} in batches of {self.batch_size}, PopRiskAdamW at {self.lr:g}"


def recipe_for(n: int, shape: tuple[int, ...], epochs: int | None = None) -> TrainingRecipe:
    """The recipe for n examples of a shape, without the batch dimension."""
    batch_size = 32 if n < 4_000 else 64 if n < 20_000 else 128 if n < 50_000 else 256
    batch_size = max(2, min(batch_size, n // 4))
    if epochs is None:
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, -(-STEPS * batch_size // n)))
    if len(shape) == 3:
        return TrainingRecipe("convolutional network of 3 layers", 32, epochs, batch_size, 1e-3)
    hidden = 128 if n < 20_000 else 256
    return TrainingRecipe(f"network of 2 × {hidden} hidden units", hidden, epochs, batch_size, 1e-3)


class Pixels(nn.Module):
    """Bytes to numbers of mean 0 and size 1 in every channel.

    Args:
        images: to take means and sizes from, (n, channels, height, width) uint8.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        some = images[:: max(1, len(images) // 1000)].float()
        self.register_buffer("mean", some.mean((0, 2, 3), keepdim=True))
        self.register_buffer("scale", some.std((0, 2, 3), keepdim=True).clamp_min(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) - self.mean) / self.scale


def build(recipe: TrainingRecipe, inputs: Tensor, outputs: int, seed: int) -> nn.Module:
    """A fresh network for inputs (n, ...); its outputs are (b, outputs)."""
    torch.manual_seed(seed)
    width = recipe.hidden
    if inputs.ndim == 4:
        layers: list[nn.Module] = [Pixels(inputs)]
        channels = inputs.shape[1]
        for out in (width, 2 * width, 2 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            channels = out
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, outputs)
        )
    sizes = [inputs[0].numel(), width, width]
    hidden = [
        layer for left, right in pairwise(sizes) for layer in (nn.Linear(left, right), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, outputs))
