"""The batches of a run as indices into its training set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast, final

import torch
from torch import Tensor

from poprisk._validate import NotAnalysable
from poprisk.path.checks import check_indices

Batch = Tensor | tuple[Tensor, Tensor]


@final
class Examples:
    """Batches of indices, whatever they were given as.

    Args:
        batches: index tensors (b,), or pairs of inputs and targets.
        train: the training set; None: the distinct examples among pairs.

    Raises:
        NotAnalysable: if pairs without ``train`` hold few examples twice: the data does not
            repeat; or, while iterating, if a pair is not in ``train``.
        ValueError: if index tensors come without ``train``.
    """

    def __init__(self, batches: Iterable[Batch], train: tuple[Tensor, Tensor] | None) -> None:
        self.batches: Iterable[Batch] = batches
        self.known: dict[bytes, int] = {}
        if train is not None:
            self.train = train
            return
        self.batches = list(batches)
        if not self.batches or isinstance(self.batches[0], Tensor):
            raise ValueError(
                "batches of indices need the training set they index: pass train=(inputs, targets)."
            )
        self.train = self._distinct(cast(list[tuple[Tensor, Tensor]], self.batches))

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            if isinstance(batch, Tensor):
                check_indices(batch, len(self.train[0]))
                yield batch
            else:
                yield self._find(*batch)

    def _distinct(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        rows: list[tuple[Tensor, Tensor]] = []
        for x, y in pairs:
            for row in zip(x, y, strict=True):
                key = _key(*row)
                if key not in self.known:
                    self.known[key] = len(rows)
                    rows.append(row)
        seen = sum(len(x) for x, _ in pairs)
        largest = max(len(x) for x, _ in pairs)
        if len(rows) > 0.9 * seen and seen > largest:
            raise NotAnalysable(
                f"the data does not repeat: {len(rows)} distinct examples among {seen} (a stream, "
                "or augmentation?). Record several passes over fixed examples, or pass the "
                "training set as train=(inputs, targets)."
            )
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    def _find(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.known:
            pairs = zip(*self.train, strict=True)
            self.known = {_key(*row): i for i, row in enumerate(pairs)}
        found = [self.known.get(_key(*row), -1) for row in zip(x, y, strict=True)]
        if min(found) < 0:
            raise NotAnalysable(
                "a batch holds an example that is not in the training set: the data does not "
                "repeat (augmentation?). Record on fixed examples."
            )
        return torch.tensor(found)


def _key(x: Tensor, y: Tensor) -> bytes:
    return b"|".join(t.detach().cpu().contiguous().numpy().tobytes() for t in (x, y))
