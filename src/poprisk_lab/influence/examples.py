"""What people are shown of an example: a picture, a text, or the cells of a row."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from poprisk.task import Task

THUMBNAIL = 96
"""Pixels of the longer side, at most."""
MOST_CELLS = 40
"""Inputs beyond which a row of nameless numbers says nothing."""
MOST_TEXT = 600
"""Letters that are shown."""


class Shown(NamedTuple):
    """One example.

    Attributes:
        picture: as a data URI; empty if it is none.
        width: of the picture, in pixels.
        height: likewise.
        text: empty if it is none.
        cells: of a row, by the names of the columns.
    """

    picture: str = ""
    width: int = 0
    height: int = 0
    text: str = ""
    cells: Mapping[str, str] = {}


Show = Callable[[int], Shown]


def shown_by(task: Task) -> tuple[Show, Show]:
    """How the training and the test examples of a task are shown."""
    if task.raw is not None:
        train, test = task.raw
        return _raw(train), _raw(test)
    return _inputs(task.train[0]), _inputs(task.test[0])


def _raw(raw: Any) -> Show:
    if columns := _columns(raw):
        return lambda i: Shown(cells={name: _cell(values[i]) for name, values in columns.items()})
    if isinstance(raw, (Tensor, np.ndarray)) and raw.ndim >= 3:
        return _pictures(np.asarray(raw))
    return lambda i: Shown(text=_cut(_cell(raw[i])))


def _columns(raw: Any) -> dict[str, list[Any]]:
    """The columns of a frame, or of a mapping; empty for anything else."""
    names = raw.keys() if isinstance(raw, Mapping) else getattr(raw, "columns", ())
    return {str(name): _listed(raw[name]) for name in names}


def _listed(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, (Tensor, np.ndarray)) else [*column]


def _inputs(x: Tensor) -> Show:
    """Inputs as pictures (n, 1 or 3, h, w), as integers in a row, or as a few numbers."""
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return _pictures(x.movedim(1, -1).squeeze(-1).cpu().numpy())
    rows = x.flatten(1) if x.ndim > 1 else x[:, None]
    if not x.is_floating_point():
        return lambda i: Shown(text=_cut(" ".join(map(str, rows[i].tolist()))))
    if rows.shape[1] > MOST_CELLS:
        return lambda i: Shown()
    return lambda i: Shown(
        cells={f"input {k + 1}": _cell(v) for k, v in enumerate(rows[i].tolist())}
    )


def _pictures(values: np.ndarray[Any, Any]) -> Show:
    """Pictures (n, h, w), (n, h, w, 3) or (n, 1 or 3, h, w), of bytes or of any numbers."""
    if values.ndim == 4 and values.shape[-1] not in (1, 3) and values.shape[1] in (1, 3):
        values = np.moveaxis(values, 1, -1)
    if values.ndim == 4 and values.shape[-1] == 1:
        values = values[..., 0]
    low, high = (0.0, 255.0) if values.dtype == np.uint8 else _range(values)

    def show(i: int) -> Shown:
        scaled = 255 * (values[i].astype(np.float64) - low) / (high - low)
        return _picture(scaled.round().astype(np.uint8))

    return show


def _range(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """From black to white: 0 to 1 or to 255 if all lie there, else from the least to the most."""
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        return 0.0, next((top for top in (1.0, 255.0) if high <= top), high)
    return low, high if high > low else low + 1.0


def _picture(pixels: np.ndarray[Any, Any]) -> Shown:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Shown(uri, *image.size)


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, (torch.Tensor, np.generic)) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} …"
