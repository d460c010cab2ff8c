"""What an audit found, as arrays, tables and files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from poprisk.audit.looks import Look
from poprisk.audit.rate import Rate
from poprisk.printing import described, short_html, short_repr


class SecondRound(NamedTuple):
    """What to train on when what was found is left out, or corrected.

    Attributes:
        keep: positions of the examples none of whose labels is suspect, (m,).
        labels: of all items, suspects replaced by what is suggested, (N,) or (N, k).
    """

    keep: NDArray[np.int64]
    labels: NDArray[Any]

    __repr__ = short_repr


@final
@dataclass(frozen=True, repr=False, eq=False)
class AuditResult:
    """How good each label is, and what is wrong over all. Arrays are numpy's.

    An item is what has a label: an example, one of its several labels (N = n k), or a token.

    Attributes:
        kind: of the targets.
        example: position of each item's example in the data set, (N,).
        position: which of its labels or tokens it is, (N,).
        labels: given, as they were before any were planted, (N,), or numbers (N, k).
        labelled: which items have one, (N,).
        predictions: probabilities of the classes (N, c), or numbers (N, k), float32.
        quality: of each label, from 0 to 1, (N,); NaN without a label or a prediction.
        margin: the score it is made of, (N,): suspect is what lies below 0.
        rank: place in the order of margins, 0 for the worst label, (N,); -1 for none.
        suggested: the label that is more probable where one is suspect or missing; elsewhere the
            given one, (N,) or (N, k).
        suspect: which labels are, (N,).
        history: agreement of predictions and label by look, (N, H): normalized margins, or minus
            the residual.
        history_looks: numbers of these looks.
        noise_matrix: share of given labels y among those that are class j after correction, (c, c),
            or one of each label (k, 2, 2); None for numbers, and for more than 10,000 classes.
        wrong_share: share of wrong labels.
        recall: share of the labels planted wrong that are found; None if none were planted.
        memorization: how much of the planted labels predictions repeat; likewise.
        looks: what each pass over the data was like.
        look: the last one that counts.
        valid: whether the result may be believed.
        reason: why not.
        cost: trainings beyond the audited one, of which there is none with folds.
        planted: labels that training got wrong on purpose.
        flip_rate: of preferences, the share of pairs that are the wrong way round, those that are
            no suspect included (:mod:`poprisk.audit.flips`), which a robust loss takes; else None.
    """

    kind: str
    example: NDArray[np.int64]
    position: NDArray[np.int64]
    labels: NDArray[Any]
    labelled: NDArray[np.bool_]
    predictions: NDArray[np.float32]
    quality: NDArray[np.float64]
    margin: NDArray[np.float64]
    rank: NDArray[np.int64]
    suggested: NDArray[Any]
    suspect: NDArray[np.bool_]
    history: NDArray[Any]
    history_looks: tuple[int, ...]
    noise_matrix: NDArray[np.float64] | None
    wrong_share: Rate
    recall: Rate | None
    memorization: Rate | None
    looks: tuple[Look, ...]
    look: int
    valid: bool
    reason: str
    cost: float
    planted: int = 0
    flip_rate: Rate | None = None

    def __repr__(self) -> str:
        return described(
            "AuditResult",
            self.kind,
            f"{int(self.suspect.sum()):,} of {int(self.labelled.sum()):,} labels suspect",
            wrong_share=self.wrong_share.value,
            recall=None if self.recall is None else self.recall.value,
            valid=self.valid,
            reason=self.reason,
        )

    _repr_html_ = short_html

    def __len__(self) -> int:
        return len(self.example)

    @property
    def value(self) -> float:
        """Share of wrong labels."""
        return self.wrong_share.value

    @property
    def standard_error(self) -> float:
        """Of the share of wrong labels."""
        return self.wrong_share.standard_error

    @property
    def pred_probs(self) -> NDArray[np.float64]:
        """Probabilities (N, c) whose rows sum to one, as cleanlab takes them; NaN for none.

        Raises:
            ValueError: if targets are numbers, which have none.
        """
        if self.kind == "regression":
            raise ValueError("targets are numbers, which have no probabilities; use .predictions.")
        p = self.predictions.astype(np.float64)
        total = p.sum(1, keepdims=True)
        return p / np.where(total > 0, total, np.nan)

    def suspects(self) -> NDArray[np.int64]:
        """Items whose labels are suspect, the worst first, (s,)."""
        found = np.flatnonzero(self.suspect)
        return found[np.argsort(self.rank[found])]

    def second_round(self) -> SecondRound:
        """What to train on next. Where labels are wrong at random, nothing is gained by it."""
        bad = np.unique(self.example[self.suspect])
        keep = np.setdiff1d(np.unique(self.example[self.labelled]), bad)
        wrong = self.suspect if self.labels.ndim == 1 else self.suspect[:, None]
        return SecondRound(keep, np.where(wrong, self.suggested, self.labels))

    def columns(self, *, classes: Sequence[Any] | None = None) -> dict[str, NDArray[Any]]:
        """A table by item, in the order of the data.

        Args:
            classes: names in place of the numbers of classes.

        Raises:
            ValueError: if there are not as many names as classes.
        """
        found: dict[str, NDArray[Any]] = {"index": self.example}
        if self.kind in ("multilabel", "tokens"):
            found["position"] = self.position
        found |= self._labels("given", self.labels, classes)
        found |= self._labels("suggested", self.suggested, classes)
        found |= {"quality": self.quality, "margin": self.margin, "rank": self.rank}
        found["suspect"] = self.suspect
        if self.kind != "regression":
            p, suggested = self.pred_probs, np.maximum(self.suggested, 0)
            found["confidence"] = p[np.arange(len(p)), suggested]
        return found

    def _labels(
        self, name: str, values: NDArray[Any], classes: Sequence[Any] | None
    ) -> dict[str, NDArray[Any]]:
        if values.ndim == 2:
            several = values.shape[1] > 1
            return {
                f"{name}_{k}" if several else name: values[:, k] for k in range(values.shape[1])
            }
        if classes is None:
            return {name: values}
        if len(classes) != self.predictions.shape[1]:
            raise ValueError(
                f"classes must hold {self.predictions.shape[1]} names, but got {len(classes)}."
            )
        names = np.array([*classes, None], dtype=object)
        # What stands for no label lies outside of the classes and becomes the last name, None.
        return {name: names[np.where((values >= 0) & (values < len(classes)), values, -1)]}

    def to_pandas(self, *, classes: Sequence[Any] | None = None) -> Any:
        """A ``pandas.DataFrame``, a row an item, in the order of the data."""
        import pandas

        return pandas.DataFrame(self.columns(classes=classes))

    def to_polars(self, *, classes: Sequence[Any] | None = None) -> Any:
        """A ``polars.DataFrame``, a row an item, in the order of the data."""
        import polars

        columns = self.columns(classes=classes)
        return polars.DataFrame(
            {k: v.tolist() if v.dtype == object else v for k, v in columns.items()}
        )

    def to_csv(self, path: Any, *, classes: Sequence[Any] | None = None) -> None:
        """Write the table, the worst labels first; missing values are empty."""
        columns = self.columns(classes=classes)
        order = np.lexsort((self.rank, self.rank < 0))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            for i in order:
                rows.writerow([_cell(column[i]) for column in columns.values()])

    def to_parquet(self, path: Any, *, classes: Sequence[Any] | None = None) -> None:
        """Write the table in the order of the data, by pandas and pyarrow."""
        self.to_pandas(classes=classes).to_parquet(path)

    def add_to(self, dataset: Any, *, prefix: str = "label_") -> Any:
        """A ``datasets.Dataset`` with columns of what was found, one row an example.

        Args:
            dataset: the examples, in the order of the audit.
            prefix: of the columns' names.

        Raises:
            ValueError: if it has another length, or examples have several labels.
        """
        if self.kind in ("multilabel", "tokens"):
            raise ValueError("examples have several labels; use columns(), a row a label.")
        if len(dataset) != len(self):
            raise ValueError(f"dataset has {len(dataset)} examples, but the audit {len(self)}.")
        for name, values in self.columns().items():
            if name not in ("index", "given"):
                dataset = dataset.add_column(f"{prefix}{name}", values)
        return dataset


def _cell(value: Any) -> Any:
    return "" if value is None or value != value else value
