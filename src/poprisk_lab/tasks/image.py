"""A noisy photograph as a function of the place: implicit neural representations.

[S]: V. Sitzmann et al., *Implicit Neural Representations with Periodic Activation Functions*,
arXiv:2006.09661. [T]: M. Tancik et al., *Fourier Features Let Networks Learn High Frequency
Functions in Low Dimensional Domains*, arXiv:2006.10739.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor, nn

from poprisk._validate import check_choice, check_number
from poprisk.task import Task
from poprisk_lab.tasks.nets import mlp
from poprisk_lab.tasks.regression import squared_error

PHOTOGRAPHS = ("camera", "astronaut", "chelsea", "coffee")
OMEGA = 30.0
FREQUENCY_STD = 5.0


@final
class Siren(nn.Module):
    r"""Layers :math:`\sin(\omega_0 (W x + b))` and a linear one, initialized as in [S].

    Args:
        width: units of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, *, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        sizes = [2, *[width] * depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        for i, layer in enumerate(self.linear):
            bound = math.sqrt(6 / sizes[i]) / OMEGA if i else 1 / sizes[0]
            nn.init.uniform_(layer.weight, -bound, bound)

    @property
    def linear(self) -> list[nn.Linear]:
        """The layers."""
        return cast("list[nn.Linear]", list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Grey values (b, 1) at places ``x`` (b, 2) in [-1, 1]²."""
        *hidden, last = self.linear
        for layer in hidden:
            x = (OMEGA * layer(x)).sin()
        return last(x)


@final
class FourierMLP(nn.Module):
    r"""A ReLU network on :math:`\cos 2\pi Bx, \sin 2\pi Bx`, B normal and not trained, as in [T].

    Args:
        width: units of a hidden layer.
        depth: hidden layers.
        features: number of frequencies, rows of B.
    """

    frequencies: Tensor

    def __init__(self, *, width: int = 128, depth: int = 3, features: int = 64) -> None:
        super().__init__()
        # Places lie in [-1, 1], those of [T] in [0, 1]: hence the half.
        self.register_buffer("frequencies", FREQUENCY_STD / 2 * torch.randn(features, 2))
        self.layers = mlp(2 * features, *[width] * depth, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Grey values (b, 1) at places ``x`` (b, 2) in [-1, 1]²."""
        phase = 2 * math.pi * x @ self.frequencies.T
        return self.layers(torch.cat([phase.cos(), phase.sin()], 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"siren": Siren, "fourier": FourierMLP}


def photograph(name: str, size: int) -> Tensor:
    """A photograph that ships with scikit-image, grey, averaged down to (size, size), in [0, 1].

    Raises:
        ValueError: for another name, or a size that the photograph does not allow.
    """
    import skimage.color
    import skimage.data
    import skimage.transform

    check_choice("name", name, PHOTOGRAPHS)
    pixels = getattr(skimage.data, name)()
    grey = skimage.color.rgb2gray(pixels) if pixels.ndim == 3 else pixels / 255
    side = min(grey.shape)
    check_number("size", size, low=2, high=side)
    top, left = (grey.shape[0] - side) // 2, (grey.shape[1] - side) // 2
    square = grey[top : top + side, left : left + side]
    small = skimage.transform.resize(square, (size, size), anti_aliasing=True)
    return torch.as_tensor(small, dtype=torch.float32)


def places(size: int) -> Tensor:
    """The centres (size², 2) of the pixels, row by row, in [-1, 1]²."""
    axis = (2 * torch.arange(size) + 1) / size - 1
    return torch.cartesian_prod(axis, axis)


def image(
    seed: int = 0,
    *,
    noise: float = 0.1,
    size: int = 64,
    network: str = "siren",
    picture: str = "camera",
) -> Task:
    """Grey values of a photograph with normal noise; the test set is the same pixels without."""
    check_choice("network", network, NETWORKS)
    check_number("noise", noise, low=0.0, high=10.0)
    clean = photograph(picture, size).reshape(-1, 1)
    generator = torch.Generator().manual_seed(seed)
    noisy = clean + noise * torch.randn(clean.shape, generator=generator)
    where = places(size)
    return Task(
        name="image",
        model=NETWORKS[network],
        loss=squared_error,
        train=(where, noisy),
        test=(where, clean),
        clean=clean,
        metric="mse",
        epochs=250,
        batch_size=len(where) // 8,
        description=f"{network} on a noisy photograph of {size}×{size} pixels",
    )


def psnr(outputs: Tensor, clean: Tensor) -> float:
    r"""Peak signal-to-noise ratio :math:`-10 \log_{10}` of the mean squared error, in dB.

    The peak is 1; both of one shape.

    Example:
        >>> psnr(torch.full((4,), 0.1), torch.zeros(4))
        20.0
    """
    return round(-10 * math.log10(float((outputs - clean).double().square().mean())), 6)


def square(values: Tensor) -> Tensor:
    """Grey values (size², 1) as a picture (size, size) of bytes."""
    size = math.isqrt(len(values))
    return (values.reshape(size, size).clamp(0, 1) * 255).round().to(torch.uint8)
