"""Data sets whose inputs are read when they are asked for, batch by batch, never all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple, cast, final

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
from poprisk.task.data import Pair, as_pair, as_tensor, from_rows

BATCH = 64
"""Examples per step where nobody says how many."""


@final
class DatasetInputs:
    """The inputs of a map-style data set: ``x[rows]`` reads these rows anew, as they come out now.

    Args:
        name: of the argument, for messages.
        data: the data set, of pairs (input, target) or of dictionaries.
        collate: makes a batch of rows, as a loader's ``collate_fn``; None: they are stacked.
        batch_size: rows to hold at a time.
        length: how many rows there are.
    """

    def __init__(
        self,
        name: str,
        data: Any,
        collate: Callable[[list[Any]], Any] | None,
        batch_size: int,
        length: int,
    ) -> None:
        self.name, self.data, self.collate, self.batch_size = name, data, collate, batch_size
        self.index = torch.arange(length)
        self.targets: Tensor | None = None
        """Of all the data set, to see that each read gives the same; None: given from outside."""
        self.device = "cpu"

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
        rows = ((i, self.data[i]) for i in index.tolist())
        if self.collate is None:
            pair = from_rows(self.name, rows, batches=False)
        else:
            batch = self.collate([row for _, row in rows])
            pair = from_rows(self.name, [(int(index[0]), batch)], batches=True)
        check_tensors(self.name, pair)
        return pair

    def select(self, rows: Tensor) -> DatasetInputs:
        """Some of the rows, which are not read by that."""
        part = copy.copy(self)
        part.index = self.index[rows]
        return part

    def to(self, device: str) -> DatasetInputs:
        """The same rows, brought to a device when they are read."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def batches(self) -> Iterator[Tensor]:
        """All rows in their order."""
        for rows in torch.arange(len(self)).split(self.batch_size):
            yield self[rows]


Inputs = Tensor | DatasetInputs


class TaskData(NamedTuple):
    """What a task takes: inputs, targets, and how a loader would cut them into batches."""

    inputs: Inputs
    targets: Tensor
    batch_size: int | None = None
    drop_last: bool = False


def as_data(name: str, data: Any, *, batch_size: int | None) -> TaskData:
    """Data as people have them: in memory as tensors, what has an index as :class:`DatasetInputs`.

    Args:
        name: of the argument, for messages.
        data: what :func:`poprisk.task.data.as_pair` takes. A map-style data set or a loader of one
            is read when it is trained on, unless it holds tensors; its targets are read once, in
            the order of the index. As a pair with targets (n, ...) it gives the inputs alone.
        batch_size: rows to hold at a time; None: those of the loader.

    Raises:
        TypeError, ValueError: if it is none of these, has no index, or does not fit its targets.
    """
    given = None
    if isinstance(data, (tuple, list)) and len(data) == 2:
        if isinstance(data[0], DatasetInputs):  # of a task that is made already
            return TaskData(data[0], data[1])
        if _has_index(data[0]):
            data, given = data
    if not _has_index(data):
        return TaskData(*as_pair(name, data))
    collate, size, drop_last = None, None, False
    if isinstance(data, DataLoader):
        _check_loader(name, data)
        collate, size, drop_last = data.collate_fn, data.batch_size, data.drop_last
        data = data.dataset
    if given is None and isinstance(data, TensorDataset) and collate in (None, default_collate):
        pair = as_pair(name, data.tensors if len(data.tensors) == 2 else data)
        return TaskData(*pair, size, drop_last)
    inputs = DatasetInputs(name, data, collate, batch_size or size or BATCH, _length(name, data))
    targets = _targets(inputs) if given is None else as_tensor(f"{name} targets", given)
    if given is None:
        inputs.targets = targets
    elif len(targets) != len(inputs):
        raise ValueError(
            f"{name} has {len(inputs)} inputs but {len(targets)} targets; they must match."
        )
    return TaskData(inputs, targets, size, drop_last)


def outputs_over(model: nn.Module, inputs: Inputs) -> Tensor:
    """Outputs on all inputs without a graph; what is read goes through batch by batch."""
    if isinstance(inputs, Tensor):
        return outputs_of(model, inputs)
    return torch.cat([outputs_of(model, x) for x in inputs.batches()])


def select(inputs: Inputs, rows: Tensor) -> Inputs:
    """Some of the inputs."""
    return inputs[rows] if isinstance(inputs, Tensor) else inputs.select(rows)


def _has_index(data: Any) -> bool:
    """Whether it is a data set to be read; a list of rows is in memory anyway."""
    if isinstance(data, (Tensor, tuple, list)) or hasattr(data, "to_numpy"):
        return False
    if not isinstance(data, Sized):
        return isinstance(data, (Dataset, DataLoader))  # told by name if it has no index
    return isinstance(data, DataLoader) or (hasattr(data, "__getitem__") and len(data) > 0)


def _length(name: str, data: Any) -> int:
    if isinstance(data, IterableDataset) or not isinstance(data, Sized):
        raise TypeError(
            f"{name} must be a map-style data set, whose examples have an index, but "
            f"{type(data).__name__} is iterable-style; give it __len__ and __getitem__, or read it "
            "into tensors."
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
    random = RandomState.now()
    try:
        found = [inputs.read(rows)[1] for rows in inputs.index.split(inputs.batch_size)]
    finally:
        random.restore()
    if len(shapes := {tuple(y.shape[1:]) for y in found}) > 1:
        raise ValueError(
            f"{inputs.name} must hold targets of one shape, but has {sorted(shapes)}; pad or crop "
            "them in the data set."
        )
    return torch.cat(found)
