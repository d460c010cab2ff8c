"""Files in the IDX format, in which MNIST and its kin are handed out, compressed or not."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Of the third byte of a file, as numpy writes them."""
FILES = {"train": "train", "test": "t10k"}
PARTS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def read_idx(path: str | Path) -> Tensor:
    """The array of one file; signed and unsigned bytes, integers or floats.

    Format: two zero bytes, one for the type, one for the number of dimensions, each dimension as a
    big-endian 32-bit integer, the entries (LeCun, Cortes and Burges, the MNIST database).

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no IDX file, or shorter or longer than it says.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in DTYPES:
        raise ValueError(f"{path} is no IDX file: it begins with {content[:4]!r}.")
    dtype, start = np.dtype(DTYPES[content[2]]), 4 + 4 * content[3]
    sizes = content[4:start].ljust(start - 4, b"\0")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes, but an IDX file of shape {shape} has {expected}; "
            "download it again."
        )
    numbers = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(numbers.astype(dtype.newbyteorder("=")))


def read_mnist(directory: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures (n, h·w) in [0, 1], float32, and classes (n,) of ``train`` and ``test``.

    Args:
        directory: with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of
            ``t10k``, each perhaps with ``.gz``; also with a point before ``idx``.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if pictures and labels do not fit each other.
    """
    found = dict[str, tuple[Tensor, Tensor]]()
    for split, prefix in FILES.items():
        images, labels = (read_idx(_file(Path(directory), f"{prefix}-{part}")) for part in PARTS)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"the {split} set must have pictures (n, h, w) and labels (n,), but has "
                f"{tuple(images.shape)} and {tuple(labels.shape)}."
            )
        found[split] = images.flatten(1).float() / 255, labels.long()
    return found


def _file(directory: Path, name: str) -> Path:
    for spelled in (name, name.replace("-idx", ".idx")):
        for path in (directory / spelled, directory / f"{spelled}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"no {name} in {directory}, nor {name}.gz; put MNIST's four files there."
    )
