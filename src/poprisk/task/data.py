"""Data as people have them, as a pair of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from poprisk._validate import check_tensors

Pair = tuple[Tensor, Tensor]

TARGETS = ("label", "labels", "target", "targets", "y")
"""Columns that are the target where rows are dictionaries."""


def as_pair(name: str, data: Any) -> Pair:
    """Data as tensors of inputs (n, ...) and targets (n, ...).

    Tensors stay as they are. Floating-point numbers of other libraries become torch's default
    dtype, as most models' weights are; integers become int64.

    Args:
        name: of the argument, for messages.
        data: a pair (inputs, targets) of tensors, arrays, or frames and series of pandas or polars;
            a map-style data set of such pairs, or of dictionaries with one column called label,
            labels, target, targets or y and one other (``datasets.Dataset``); or a
            :class:`torch.utils.data.DataLoader` of batches, which is read once, in its order.

    Raises:
        TypeError: if it is none of these, or holds what is no number.
        ValueError: if it is empty, holds NaN or Inf, or lengths or shapes differ.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        pair = tuple(
            as_tensor(f"{name} {part}", value)
            for part, value in zip(("inputs", "targets"), data, strict=True)
        )
    elif isinstance(data, DataLoader):
        pair = from_rows(name, enumerate(data), batches=True)
    elif isinstance(data, Sized) and hasattr(data, "__getitem__") and len(data) > 0:
        rows = ((i, cast(Any, data)[i]) for i in range(len(data)))
        pair = from_rows(name, rows, batches=False)
    else:
        raise TypeError(
            f"{name} must be a pair (inputs, targets) of tensors or a non-empty data set of such "
            f"pairs, but got {type(data).__name__}."
        )
    check_tensors(name, pair)
    return cast(Pair, pair)


def as_tensor(what: str, value: Any) -> Tensor:
    """A tensor as it is; an array, frame or series as :func:`as_pair` takes it.

    Raises:
        TypeError: if it is neither, or holds what is no number.
    """
    if isinstance(value, Tensor):
        return value
    array = value.to_numpy() if hasattr(value, "to_numpy") else value
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{what} must be a tensor or an array, but got {type(value).__name__}.")
    if array.dtype.kind not in "fiubc":
        raise TypeError(
            f"{what} must hold numbers, but got {_strange(value, array)}; encode them first."
        )
    tensor = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    if tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype())
    return tensor if tensor.is_complex() or tensor.dtype == torch.bool else tensor.long()


def _strange(value: Any, array: np.ndarray) -> str:
    """The columns without numbers, where they have names, or else the array's type."""
    kinds = getattr(value, "dtypes", None)
    names = getattr(value, "columns", None)
    if names is None or kinds is None:
        return f"{array.dtype} values"
    found = [str(n) for n, kind in zip(names, kinds, strict=True) if not _numeric(kind)]
    return f"the columns {', '.join(found)}"


def _numeric(kind: Any) -> bool:
    if hasattr(kind, "is_numeric"):  # polars
        return bool(kind.is_numeric())
    return getattr(kind, "kind", "O") in "fiubc"  # numpy, and pandas' own


def from_rows(name: str, rows: Iterable[tuple[int, Any]], *, batches: bool) -> Pair:
    """Rows, each of one example or of a batch, as one tensor of inputs and one of targets.

    Args:
        name: of the argument, for messages.
        rows: each with its position.
        batches: whether each holds several examples.
    """
    join = torch.cat if batches else torch.stack
    columns: tuple[list[Tensor], list[Tensor]] = [], []
    start = 0
    for i, row in rows:
        start = start if columns[0] else i
        for part, value, column in zip(
            ("input", "target"), _row(name, i, row), columns, strict=True
        ):
            column.append(_entry(f"{name}[{i}]", part, value))
            first, last = (tuple(column[j].shape[int(batches) :]) for j in (0, -1))
            if first != last:
                raise ValueError(
                    f"{name} must hold {part}s of one shape, but {name}[{start}] has {first} and "
                    f"{name}[{i}] {last}; pad or crop them in the data set."
                )
    if not columns[0]:
        raise ValueError(f"{name} must not be empty, but its loader gave no batch.")
    return join(columns[0]), join(columns[1])


def _row(name: str, i: int, row: Any) -> tuple[Any, Any]:
    """Input and target of a row."""
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return row[0], row[1]
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{name}[{i}] must be a pair (input, target), but got {type(row).__name__}."
        )
    targets = [key for key in row if key in TARGETS]
    inputs = [key for key in row if key not in TARGETS]
    if len(targets) != 1 or len(inputs) != 1:
        raise TypeError(
            f"{name}[{i}] must have one column of inputs and one called {', '.join(TARGETS)}, but "
            f"has {', '.join(map(repr, row))}; select and rename columns."
        )
    return row[inputs[0]], row[targets[0]]


def _entry(where: str, part: str, value: Any) -> Tensor:
    try:
        if isinstance(value, np.ndarray | np.generic) or type(value).__module__.startswith("PIL."):
            return as_tensor(where, np.asarray(value))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where} must hold a tensor or numbers as {part}, but got {type(value).__name__}; "
            "convert it in the data set."
        ) from error
