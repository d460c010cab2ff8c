"""What has a label of its own: examples, their several labels, or tokens; as one flat list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from poprisk._validate import check_choice, check_range, check_type
from poprisk.losses import IGNORED
from poprisk.risk.inputs import check_index

KINDS = ("classes", "binary", "multilabel", "regression", "preferences", "tokens")
TWO_CLASSES = ("binary", "multilabel", "preferences")
ROUNDING = 4
"""Units of rounding that targets may differ by, of the largest one of their batch."""


@final
class Items(NamedTuple):
    """Labels in a flat list, and where in a batch each of them is predicted.

    Attributes:
        kind: one of :data:`KINDS`.
        targets: as the user holds them, (n, ...).
        labels: (N,) integers, or numbers (N, k).
        labelled: which of them there are, (N,).
        classes: number of classes; None for numbers.
        place: number of the item by example and position, (n, t), -1 for none.
        example: which example an item belongs to, (N,).
        position: and where in it, (N,).
        ignore_index: the label that stands for none.
    """

    kind: str
    targets: Tensor
    labels: Tensor
    labelled: Tensor
    classes: int | None
    place: Tensor
    example: Tensor
    position: Tensor
    ignore_index: int

    @property
    def width(self) -> int:
        """Numbers that a prediction has."""
        return self.classes or self.labels.shape[1]

    def restored(self, labels: Tensor) -> Tensor:
        """Labels of the items in the shape and type of the targets."""
        rows = self.targets.clone().reshape(len(self.targets), -1)
        if self.classes is None:
            return labels.reshape(self.targets.shape).to(self.targets.dtype)
        some = self.labelled  # what is missing stays as it was, NaN or ignore_index
        rows[self.example[some], self.position[some]] = labels[some].to(rows.dtype)
        return rows.reshape(self.targets.shape)

    def read(
        self, index: Any, outputs: Tensor, targets: Tensor, trained: Tensor, *, probabilities: bool
    ) -> tuple[Tensor, Tensor]:
        """The items of a batch, (m,), and what is predicted for each, (m, width), float32.

        Args:
            index: positions of the batch's examples, (b,).
            outputs: of the model, (b, ...).
            targets: the batch's own, (b, ...).
            trained: what training was to get, in the shape of ``self.targets``.
            probabilities: whether outputs are probabilities already.

        Raises:
            TypeError, ValueError: if one does not fit the other, or targets are other ones.
        """
        index = check_index(index, len(self.targets))
        check_type("outputs", outputs, Tensor, "a tensor")
        check_type("targets", targets, Tensor, "a tensor")
        outputs, targets = outputs.detach(), targets.detach().cpu()
        if len(outputs) != len(index) or len(targets) != len(index):
            raise ValueError(
                f"index, outputs and targets must be of one batch, but have {len(index)}, "
                f"{len(outputs)} and {len(targets)} rows."
            )
        index = index.cpu()
        if not len(index):
            return index, torch.zeros(0, self.width)
        self._check_trained(targets, trained[index])
        found = self._predictions(outputs, probabilities=probabilities)
        rows = self.place[index][:, : found.shape[1]]
        if self.kind == "tokens" and bool((self.place[index][:, found.shape[1] :] >= 0).any()):
            raise ValueError(
                f"outputs have {found.shape[1]} positions, but there are labels beyond; pad on the "
                "right, and do not cut off."
            )
        there = rows >= 0
        return rows[there], found[there].cpu()

    def _check_trained(self, targets: Tensor, trained: Tensor) -> None:
        length = targets.shape[1] if self.kind == "tokens" and targets.ndim == 2 else None
        trained = trained[:, :length] if length is not None else trained
        if targets.numel() != trained.numel():
            raise ValueError(
                f"targets must have shape {tuple(trained.shape)} as in training, but got "
                f"{tuple(targets.shape)}."
            )
        a, b = targets.reshape(trained.shape).double(), trained.double()
        floats = [t.dtype for t in (targets, trained) if t.is_floating_point()]
        # Not relative to each: of dates all are alike, and those planted a little further off.
        largest = float(b.abs().nan_to_num(0.0).max())
        atol = ROUNDING * largest * max((torch.finfo(d).eps for d in floats), default=0.0)
        same = torch.isclose(a, b, rtol=0.0, atol=atol, equal_nan=True).reshape(len(a), -1).all(1)
        if not bool(same.all()):
            raise ValueError(
                f"targets of {int((~same).sum())} of {len(same)} examples are not those of the "
                "auditor at their index: train on auditor.targets, which hold the planted labels "
                "(plant=0 plants none), and pass the positions of the batch's examples as index."
            )

    def _predictions(self, outputs: Tensor, *, probabilities: bool) -> Tensor:
        """Probabilities or numbers by example and position, (b, t, width)."""
        b, shape = len(outputs), tuple(outputs.shape)
        if self.kind in ("classes", "tokens"):
            t = self.place.shape[1] if self.kind == "classes" else None
            expected = (b, t, self.classes) if t is None else (b, self.classes)
            good = outputs.ndim == len(expected) and shape[-1] == self.classes
            if not good or (t is None and shape[1] > self.place.shape[1]):
                wanted = f"(b, {self.classes})" if t else f"(b, t, {self.classes})"
                raise ValueError(
                    f"outputs must have shape {wanted}, but got {shape}; pass classes= if some "
                    "never occur among the labels."
                )
            u = outputs.float()
            if not probabilities and bool(_sum_to_one(u).all()):
                raise ValueError(
                    "outputs must be logits, but got probabilities: no row is negative and each "
                    "sums to 1; pass probabilities=True."
                )
            p = _distributions(u) if probabilities else u.softmax(-1)
            return p if t is None else p.unsqueeze(1)
        if outputs.numel() != self.targets[:b].numel():
            raise ValueError(
                f"outputs must have the shape of the targets, {(b, *self.targets.shape[1:])}, but "
                f"got {shape}."
            )
        u = outputs.float().reshape(b, -1)
        if self.kind == "regression":
            return u.unsqueeze(1)
        p = _within_one(u) if probabilities else u.sigmoid()
        return torch.stack([1 - p, p], -1)


def items_of(
    targets: Any, *, kind: str, classes: int | None = None, ignore_index: int = IGNORED
) -> Items:
    """The labels of a data set as a flat list.

    Args:
        targets: (n,) classes; (n,) or (n, 1) zeros and ones; (n, k) zeros and ones; (n, ...)
            numbers; or (n, t) classes of tokens, padded by ``ignore_index``, or a list of rows.
        kind: one of :data:`KINDS`.
        classes: number of classes; counted if left out.
        ignore_index: the label that stands for none; NaN does among numbers.

    Raises:
        TypeError, ValueError: if targets are not of this kind.
    """
    check_choice("kind", kind, KINDS)
    if kind == "tokens" and isinstance(targets, Sequence):
        rows = [torch.as_tensor(row) for row in targets]
        targets = pad_sequence(rows, batch_first=True, padding_value=ignore_index)
    check_type("targets", targets, Tensor, "a tensor, with numbers in place of names")
    # A copy: labels that are put right in place, here or by the caller, are other labels.
    targets = targets.detach().cpu().clone()
    if targets.ndim == 0 or len(targets) < 2:
        raise ValueError(f"targets must hold at least two, but got shape {tuple(targets.shape)}.")
    _check_shape(kind, targets)
    if kind == "regression":
        return _numbers(targets, ignore_index)
    flat = targets.reshape(len(targets), -1)
    missing = (
        flat.isnan() | (flat == ignore_index)
        if flat.is_floating_point()
        else flat.long() == ignore_index
    )
    # Tokens that have no label are padding or words between; elsewhere they are to be predicted.
    kept = ~missing if kind == "tokens" else torch.ones_like(missing)
    place = torch.full(flat.shape, -1, dtype=torch.long)
    place[kept] = torch.arange(int(kept.sum()))
    example, position = kept.nonzero().unbind(1)
    labelled = ~missing[kept]
    labels = torch.where(labelled, flat[kept].nan_to_num(0.0).long(), ignore_index)
    found = _classes(labels[labelled], 2 if kind in TWO_CLASSES else classes)
    return Items(kind, targets, labels, labelled, found, place, example, position, ignore_index)


def _check_shape(kind: str, targets: Tensor) -> None:
    shape = tuple(targets.shape)
    good = {
        "classes": targets.ndim == 1,
        "binary": targets.ndim == 1 or (targets.ndim == 2 and shape[1] == 1),
        "preferences": targets.ndim == 1,
        "multilabel": targets.ndim == 2,
        "tokens": targets.ndim == 2,
        "regression": True,
    }[kind]
    numbers = targets.is_floating_point()
    if not good or (kind in ("classes", "tokens") and numbers):
        what = {"classes": "integers (n,)", "tokens": "integers (n, t)", "multilabel": "(n, k)"}
        raise TypeError(
            f"targets of kind={kind!r} must be {what.get(kind, '(n,)')}, but got {shape}, "
            f"{targets.dtype}; other kinds: {', '.join(k for k in KINDS if k != kind)}."
        )
    if kind == "regression" and not numbers:
        raise TypeError(f"targets of kind='regression' must be numbers, but got {targets.dtype}.")


def _numbers(targets: Tensor, ignore_index: int) -> Items:
    n = len(targets)
    labels = targets.reshape(n, -1).double()
    if bool(labels.isinf().any()):
        raise ValueError("targets hold Inf; remove those rows first, or mark them by NaN.")
    rows = torch.arange(n)
    labelled = ~labels.isnan().any(1)
    if int(labelled.sum()) < 2:
        raise ValueError("targets must hold at least two labels, but the others are missing.")
    place, position = rows[:, None], torch.zeros_like(rows)
    return Items("regression", targets, labels, labelled, None, place, rows, position, ignore_index)


def _classes(labels: Tensor, classes: int | None) -> int:
    if len(labels) < 2:
        raise ValueError("targets must hold at least two labels, but the others are missing.")
    low, high = int(labels.min()), int(labels.max())
    if classes is not None:
        check_range("classes", classes, 2)
    found = max(high + 1, 2) if classes is None else classes
    if low < 0 or high >= found:
        raise ValueError(
            f"labels must lie in 0..{found - 1} or be ignore_index, but got {low}..{high}."
        )
    return found


def _distributions(p: Tensor) -> Tensor:
    """Probabilities as they are; rows that are not finite are for the caller to see."""
    good = _sum_to_one(p) | ~p.isfinite().all(-1)
    if not bool(good.all()):
        raise ValueError("outputs must be probabilities, rows that sum to 1; logits are default.")
    return p


def _sum_to_one(p: Tensor) -> Tensor:
    return (p >= 0).all(-1) & ((p.sum(-1) - 1).abs() < 1e-2)


def _within_one(p: Tensor) -> Tensor:
    if not bool((((p >= 0) & (p <= 1)) | ~p.isfinite()).all()):
        raise ValueError("outputs must be probabilities from 0 to 1; logits are the default.")
    return p
