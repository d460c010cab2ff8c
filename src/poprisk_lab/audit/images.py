"""Images: one folder a class, of any sizes and modes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from poprisk_lab.audit.examples import AuditInputError

SUFFIXES = frozenset(Image.registered_extensions())
LARGEST_SIDE = 64
GREY = frozenset(("1", "L", "LA", "I", "I;16", "F"))


def find_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The image files of a folder with one folder a class, and their labels.

    Raises:
        AuditInputError: if there are none, or they lie beside each other without a class.
    """
    kinds = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (file, kind.name)
        for kind in kinds
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not files:
        raise AuditInputError(
            f"{folder} has no images in folders; an audit needs one folder a class, as in "
            f"{folder / 'cat' / '1.png'}."
        )
    return [file for file, _ in files], [kind for _, kind in files]


def read_images(
    files: list[Path], side: int | None, notes: list[str]
) -> tuple[torch.Tensor, list[int], dict[str, str]]:
    """Images of one size and mode.

    Args:
        files: to read.
        side: height and width to bring them to; None: the median of theirs, at most 64.
        notes: what is decided is added.

    Returns:
        (n, channels, side, side) uint8, the positions of those that could be read, and why the
        others could not.

    Raises:
        AuditInputError: if none can be read.
    """
    sizes, modes, broken = Counter[tuple[int, int]](), Counter[str](), dict[str, str]()
    for file in files:
        try:
            with Image.open(file) as image:
                sizes[image.size] += 1
                modes[image.mode] += 1
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            broken[str(file)] = " ".join(str(error).split())
    if not sizes:
        raise AuditInputError(f"none of {len(files)} images can be read; the first: {files[0]}.")
    if side is None:
        side = min(int(np.median([max(size) for size in sizes.elements()])), LARGEST_SIDE)
    mode = "L" if set(modes) <= GREY else "RGB"
    if len(sizes) > 1 or next(iter(sizes)) != (side, side):
        notes.append(f"Images of {len(sizes)} sizes are brought to {side} × {side} pixels.")
    if len(modes) > 1:
        notes.append(f"Images of the modes {', '.join(sorted(modes))} are taken as {mode}.")
    pixels, kept = list[np.ndarray](), list[int]()
    for position, file in enumerate(files):
        if str(file) in broken:
            continue
        try:
            with Image.open(file) as image:
                pixels.append(_pixels(image, mode, side))
            kept.append(position)
        except (OSError, SyntaxError, ValueError) as error:  # a file that ends too early, say
            broken[str(file)] = " ".join(str(error).split())
    if not pixels:
        raise AuditInputError(f"none of {len(files)} images can be read; the first: {files[0]}.")
    if broken:
        what = (
            "1 image cannot be read and is"
            if len(broken) == 1
            else f"{len(broken)} images cannot be read and are"
        )
        notes.append(f"{what} left out; see the list on the page.")
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked.permute(0, 3, 1, 2).contiguous(), kept, broken


def _pixels(image: Image.Image, mode: str, side: int) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: to its own range
        values = np.asarray(image, dtype=np.float64)
        span = np.ptp(values) or 1.0
        image = Image.fromarray(np.uint8(255 * (values - values.min()) / span))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert(mode)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(side, side, -1)
