"""Labels planted wrong, which certify what an audit finds."""

from __future__ import annotations

import math
from copy import copy
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from poprisk.audit.items import Items, items_of
from poprisk.audit.rate import Rate
from poprisk.losses import IGNORED
from poprisk.risk.canaries import Canaries

MOST_ERROR = 0.1
"""Standard error of memorization from which planted labels are too few to tell."""


@final
class Planted:
    r"""Labels planted among the items, and how much of them predictions repeat.

    With more than two classes, the mean of :class:`poprisk.Canaries`' contrast over canaries whose
    label changed. With two there is no other wrong label; what planted labels z are given beyond
    what items that kept the same original label o give theirs, :math:`p(z)-\bar p_o(z)`, which
    needs no more canaries to be sure. Numbers: the coefficient on the noise. Ours.

    Args:
        canaries: of the items' labels.
        items: with their original labels.
    """

    def __init__(self, canaries: Canaries, items: Items) -> None:
        self.index = canaries.index.cpu()
        # In the shape of the items' labels: numbers (m,) would be compared with each of (m, 1).
        shape = (len(self.index), *items.labels.shape[1:])
        self.labels = canaries.targets.cpu()[self.index].reshape(shape)
        self.original = canaries.original.cpu().reshape(shape)
        self.classes = items.classes
        self._given = items.labels
        self.changed = (self.labels != self.original).reshape(len(self.index), -1).any(1)

    def memorization(self, predictions: Tensor, seen: Tensor) -> Rate:
        """How much of the planted labels is repeated; 0: as by a model that never saw them.

        Args:
            predictions: for all items, (N, width).
            seen: which of them there are, (N,).
        """
        values = self.repeated(predictions, seen)[seen[self.index] & self.changed]
        if len(values) < 2:
            return Rate(math.nan, math.nan, False, "too few planted labels to tell")
        error = float(values.std()) / math.sqrt(len(values))
        few = f"{len(values)} planted labels leave a standard error of {error:.2f}"
        few = few if error > MOST_ERROR else ""
        return Rate(float(values.mean()), error, not few, few)

    def among(self, rows: Tensor) -> Planted:
        """The same of some items only, (m,), which are numbered anew in their order."""
        place = torch.full((len(self._given),), -1)
        place[rows] = torch.arange(len(rows))
        mine = place[self.index] >= 0
        found = copy(self)
        found.index, found._given = place[self.index[mine]], self._given[rows]
        found.labels, found.original = self.labels[mine], self.original[mine]
        found.changed = self.changed[mine]
        return found

    def repeated(self, predictions: Tensor, seen: Tensor) -> Tensor:
        """How much each planted label is repeated, (len(index),); differentiable.

        Args:
            predictions: for all items, (N, width).
            seen: for which of them they are there; of the others values mean nothing.
        """
        k = self.classes
        if k is None:
            p = predictions[self.index].double()
            noise = (self.labels - self.original).double().reshape(p.shape)
            follow = p - self.original.double().reshape(p.shape)
            return (noise * follow / noise.square().mean(0)).mean(1)
        own = predictions[self.index, self.labels.long()].double()
        if k == 2:
            return own - self._of_those_that_stayed(predictions, seen)[self.original.long()]
        replaced = predictions[self.index, self.original.long()].double()
        return own - (1 - own - replaced) / (k - 2)

    def _of_those_that_stayed(self, predictions: Tensor, seen: Tensor) -> Tensor:
        """By label, the mean probability of the other one where the label is as it was, (2,)."""
        stayed = seen.clone()
        stayed[self.index[self.changed]] = False
        means = []
        for label in (0, 1):
            found = predictions[stayed & (self._given == label), 1 - label].double()
            # Without any, as of a model that is sure of all labels.
            means.append(found.mean() if len(found) else found.sum())
        return torch.stack(means)


class Labels(NamedTuple):
    """Items of a data set, what is planted among them, and the targets to train on."""

    items: Items
    planted: Planted | None
    targets: Tensor


def planted_labels(
    targets: Any,
    *,
    kind: str = "classes",
    plant: float = 0.0,
    classes: int | None = None,
    seed: int = 0,
    ignore_index: int = IGNORED,
) -> Labels:
    """Labels as items, some of them replaced.

    Args:
        targets: as for :func:`poprisk.audit.items.items_of`, or canaries made of them.
        kind: likewise.
        plant: share of the labels to replace; what canaries are given is planted already.
        classes: number of classes; counted if left out.
        seed: of what is planted.
        ignore_index: the label that stands for none.
    """
    if isinstance(targets, Canaries):
        original = targets.targets.clone()
        original[targets.index] = targets.original
        items = items_of(
            original, kind=kind, classes=classes or targets.classes, ignore_index=ignore_index
        )
        if items.classes != targets.classes:
            raise ValueError(
                f"canaries are of {targets.classes} classes, but kind={kind!r} has {items.classes}."
            )
        return Labels(items, Planted(targets, items), targets.targets.detach().cpu())
    items = items_of(targets, kind=kind, classes=classes, ignore_index=ignore_index)
    if plant == 0:
        return Labels(items, None, items.targets)
    known = int(items.labelled.sum())
    if round(plant * known) < 1:
        raise ValueError(
            f"plant={plant:g} of {known} labels makes none; plant more, or none by plant=0, and "
            "nothing certifies the result."
        )
    canaries = Canaries(
        items.labels,
        fraction=plant,
        classes=items.classes,
        seed=seed,
        ignore_index=ignore_index,
    )
    return Labels(items, Planted(canaries, items), items.restored(canaries.targets))
