"""Grey pictures as PNG in base64, for pages that open without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor


def encode(pixels: Tensor) -> str:
    """A picture (h, w) of bytes as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode(png: str) -> Tensor:
    """The picture (h, w) of bytes that :func:`encode` made a PNG of."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(png)))))


def side_by_side(pictures: Sequence[Tensor], *, times: int = 4, gap: int = 4) -> str:
    """Pictures of one size (h, w) in a row, so many times enlarged, white between, as a PNG."""
    large = [p.repeat_interleave(times, 0).repeat_interleave(times, 1) for p in pictures]
    white = torch.full((len(large[0]), gap), 255, dtype=torch.uint8)
    return encode(torch.cat([part for p in large for part in (p, white)][:-1], 1))
