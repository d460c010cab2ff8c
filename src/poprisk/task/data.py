"""Data as people have them: a pair of tensors, or a data set that is read batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from poprisk._validate import check_tensors
from poprisk.evaluation import outputs_of
from poprisk.randomness import RandomState

Pair = tuple[Tensor, Tensor]

TARGETS = ("label", "labels", "target", "targets", "y")
"""Columns that are the target where rows are dictionaries."""
BATCH = 64
"""Examples per step where nobody says how many."""


@final
class DatasetInputs:
    """The inputs of a map-style data set: ``x[rows]`` reads them, anew each time.

    Args:
        name: of the argument, for messages.
        data: the data set, of pairs (input, target) or of dictionaries.
        collate: makes a batch of rows, as a loader's ``collate_fn``; None: they are stacked.
        batch_size: rows to hold at a time.
    """

    def __init__(
        self, name: str, data: Any, collate: Callable[[list[Any]], Any] | None, batch_size: int
    ) -> None:
        self.name, self.data, self.collate, self.batch_size = name, data, collate, batch_size
        self.index = torch.arange(_length(name, data))
        self.device = "cpu"
        self.targets: Tensor | None = None
        """Of the data set, to see that each reading gives the same; None: they are given apart."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        index = self.index[rows.cpu() if isinstance(rows, Tensor) else rows]
        x, y = self.read(index)
        expected = None if self.targets is None else self.targets[index]
        if expected is not None and not torch.equal(y.nan_to_num(), expected.nan_to_num()):
            raise ValueError(
                f"{self.name} gives other targets when its examples are read again, so that no "
                "label belongs to an example; draw what is random for the inputs alone."
            )
        return x.to(self.device)

    def read(self, index: Tensor) -> Pair:
        """Inputs and targets at these positions in the data set."""
        rows = [(i, self.data[i]) for i in index.tolist()]
        if self.collate is None:
            pair = _stacked(self.name, rows)
        else:
            batch = _row(self.name, int(index[0]), self.collate([row for _, row in rows]))
            x, y = (_entry(f"{self.name}[{int(index[0])}]", "batch", part) for part in batch)
            pair = x, y
        check_tensors(self.name, pair)
        return pair

    def changed(self, **changes: Any) -> DatasetInputs:
        """The same data set with other rows (``index``), device or batch size."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def to(self, device: str) -> DatasetInputs:
        """The same rows, brought to a device when they are read."""
        return self.changed(device=device)

    def batches(self) -> Iterator[Tensor]:
        """All rows in their order."""
        return (self[rows] for rows in torch.arange(len(self)).split(self.batch_size))


Inputs = Tensor | DatasetInputs


class TaskData(NamedTuple):
    """What a task takes: inputs, targets, and how a loader would cut them into batches."""

    inputs: Inputs
    targets: Tensor
    batch_size: int | None = None
    drop_last: bool = False


def as_data(name: str, data: Any, *, batch_size: int | None = None) -> TaskData:
    """Data as tensors (n, ...), or as :class:`DatasetInputs` with their targets (n, ...).

    Tensors stay as they are. Floating-point numbers of other libraries become torch's default
    dtype, as most models' weights are; integers become int64.

    Args:
        name: of the argument, for messages.
        data: a pair (inputs, targets) of tensors, arrays, or frames and series of pandas or polars;
            a list or a map-style data set of such pairs, or of dictionaries with one column called
            label, labels, target, targets or y and one other (``datasets.Dataset``); a
            :class:`torch.utils.data.DataLoader` of such a data set; or a pair of a data set or
            loader and targets in place of its own. The targets of a data set are read once.
        batch_size: rows of a data set to hold at a time; None: as many as its loader.

    Raises:
        TypeError: if it is none of these, has no index, or holds what is no number.
        ValueError: if it is empty, holds NaN or Inf, or lengths or shapes differ.
    """
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2
    x, y = data if is_pair else (data, None)
    if isinstance(x, DatasetInputs):  # of a task that is made already
        return TaskData(x.changed(batch_size=batch_size or x.batch_size), cast(Tensor, y))
    if is_pair and not _is_data_set(x):
        pair = as_tensor(f"{name} inputs", x), as_tensor(f"{name} targets", y)
        check_tensors(name, pair)
        return TaskData(*pair)
    collate, size, drop_last = None, None, False
    if isinstance(x, DataLoader):
        _check_loader(name, x)
        collate, size, drop_last, x = x.collate_fn, x.batch_size, x.drop_last, x.dataset
    if isinstance(x, TensorDataset) and collate in (None, default_collate) and not is_pair:
        x = x.tensors if len(x.tensors) == 2 else x
        if x is not data:
            return as_data(name, x)._replace(batch_size=size, drop_last=drop_last)
    inputs = DatasetInputs(name, x, collate, batch_size or size or BATCH)
    if isinstance(x, (tuple, list)):
        return TaskData(*inputs.read(inputs.index))
    targets = as_tensor(f"{name} targets", y) if is_pair else _targets(inputs)
    if len(targets) != len(inputs):
        raise ValueError(
            f"{name} has {len(inputs)} inputs but {len(targets)} targets; they must match."
        )
    inputs.targets = None if is_pair else targets
    return TaskData(inputs, targets, size, drop_last)


def outputs_over(model: nn.Module, inputs: Inputs) -> Tensor:
    """Outputs on all inputs without a graph; what is read goes through batch by batch."""
    if isinstance(inputs, Tensor):
        return outputs_of(model, inputs)
    return torch.cat([outputs_of(model, x) for x in inputs.batches()])


def select(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some of the inputs; those of a data set are not read by that."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    return inputs.changed(index=inputs.index[rows])


def check_raw(raw: Any, lengths: Sequence[int]) -> None:
    """Raise unless ``raw`` is a pair of what is shown of so many training and test examples.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if not isinstance(raw, (tuple, list)) or len(raw) != 2:
        raise TypeError(
            "raw must be a pair of what is shown of the training and of the test examples, but got "
            f"{type(raw).__name__}."
        )
    for name, one, n in zip(("training", "test"), raw, lengths, strict=True):
        parts = list(one.values()) if isinstance(one, Mapping) else [one]
        if isinstance(one, str) or not all(hasattr(part, "__len__") for part in parts):
            raise TypeError(
                f"raw of the {name} examples must be pictures, texts or a table, one an example, "
                f"but got {type(one).__name__}."
            )
        if wrong := [len(part) for part in parts if len(part) != n]:
            raise ValueError(f"there are {n} {name} examples, but raw has {wrong[0]} of them.")


def as_tensor(what: str, value: Any) -> Tensor:
    """A tensor as it is; an array, frame or series as :func:`as_data` takes it.

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


def _stacked(name: str, rows: Sequence[tuple[int, Any]]) -> Pair:
    """Rows, each with its position, as one tensor of inputs and one of targets."""
    columns: tuple[list[Tensor], list[Tensor]] = [], []
    for i, row in rows:
        for part, value, column in zip(
            ("input", "target"), _row(name, i, row), columns, strict=True
        ):
            column.append(_entry(f"{name}[{i}]", part, value))
            first, last = (tuple(column[j].shape) for j in (0, -1))
            if first != last:
                raise ValueError(
                    f"{name} must hold {part}s of one shape, but {name}[{rows[0][0]}] has {first} "
                    f"and {name}[{i}] {last}; pad or crop them in the data set."
                )
    return torch.stack(columns[0]), torch.stack(columns[1])


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


def _is_data_set(data: Any) -> bool:
    if isinstance(data, (Tensor, np.ndarray, tuple, list)) or hasattr(data, "to_numpy"):
        return False
    indexed = isinstance(data, Sized) and hasattr(data, "__getitem__")
    return indexed or isinstance(data, (Dataset, DataLoader))


def _length(name: str, data: Any) -> int:
    sized = isinstance(data, Sized)
    if isinstance(data, IterableDataset) or (isinstance(data, Dataset) and not sized):
        raise TypeError(
            f"{name} must be a map-style data set, whose examples have an index, but "
            f"{type(data).__name__} is iterable-style; give it __len__ and __getitem__, or read it "
            "into tensors."
        )
    if not (sized and hasattr(data, "__getitem__") and len(data) > 0):
        raise TypeError(
            f"{name} must be a pair (inputs, targets) of tensors or a non-empty data set of such "
            f"pairs, but got {type(data).__name__}."
        )
    return len(data)


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    """Refuse what a comparison, which draws the order itself, would not follow."""
    if isinstance(loader.dataset, IterableDataset):
        return  # told with the data set
    sampler: Any = loader.sampler
    if loader.batch_size is None:
        found = "no batch_size (a batch_sampler, or rows that are batches)"
    elif type(sampler) not in (SequentialSampler, RandomSampler):
        found = f"a {type(sampler).__name__}"
    elif len(sampler) != len(cast(Sized, loader.dataset)) or getattr(sampler, "replacement", False):
        found = "a sampler that repeats examples or leaves some out"
    else:
        return
    raise ValueError(
        f"{name} must be a loader that goes through all examples, batch_size at a time, but has "
        f"{found}; give the data set, or a Subset of it, and batch_size."
    )


def _targets(inputs: DatasetInputs) -> Tensor:
    """The targets of all rows; on the way every input is checked once."""
    with RandomState.kept():
        found = [inputs.read(rows)[1] for rows in inputs.index.split(inputs.batch_size)]
    if len(shapes := {tuple(y.shape[1:]) for y in found}) > 1:
        raise ValueError(
            f"{inputs.name} must hold targets of one shape, but has {sorted(shapes)}; pad or crop "
            "them in the data set."
        )
    return torch.cat(found)
