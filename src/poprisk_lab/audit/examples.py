"""What an audit reads: inputs a network can take, labels, and what to show of each example."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from poprisk.losses import IGNORED

MISSING = frozenset(("", "nan", "na", "n/a", "null", "<na>", "?"))
"""Labels, in lower case, that stand for none. ``None`` does not: it is a common class."""
FEWEST = 20
"""Labelled examples below which nothing is learned that could be told from chance."""
MANY_VALUES = 20
"""Numbers with more values than that are no classes."""
MOST_NAMES = 20
"""Names that a message lists."""
NEAR = 0.6
"""Similarity of two names from which one may be meant by the other."""


class AuditInputError(ValueError):
    """Data that cannot be audited; the message says what was found and what to do."""


@dataclass(frozen=True)
class AuditExamples:
    """Examples as they were read.

    Attributes:
        inputs: (n, d) float32, or images (n, channels, height, width) uint8.
        targets: (n,), int64 with ``IGNORED``, or float64 with NaN, where there is no label.
        classes: names by number; empty for regression.
        name: of an example, for people: a row of a table, a file.
        show: what a person needs to judge an example: its columns, its text, the path of its image.
        notes: what was decided on the way, a sentence each.
        left_out: what could not be read, and why, by name.
        counting: what names and indices count, and from where, a sentence for people.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    name: Callable[[int], str]
    show: Callable[[int], dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    counting: str = ""

    @property
    def labelled(self) -> Tensor:
        """Which examples have a label, (n,) boolean."""
        if self.targets.is_floating_point():
            return ~self.targets.isnan()
        return self.targets != IGNORED


def near_names(names: Sequence[str], wanted: str) -> list[str]:
    """Those of the names that may be meant, the most similar first."""
    low = wanted.lower()
    similar = {name: difflib.SequenceMatcher(None, low, name.lower()).ratio() for name in names}
    inside = {
        name for name in names if low and name and (low in name.lower() or name.lower() in low)
    }
    found = [name for name in names if similar[name] >= NEAR or name in inside]
    return sorted(found, key=lambda name: -similar[name])


def listed(names: Sequence[str], wanted: str = "") -> str:
    """Names to choose from: first those near to what was asked for, and how many are left out.

    Example:
        >>> listed(["age", "weight", "diagnosis"], "diagnose")
        "'diagnosis', 'age', 'weight'"
    """
    near = near_names(names, wanted) if wanted else []
    order = [*near, *(name for name in names if name not in near)]
    shown, left = order[:MOST_NAMES], order[MOST_NAMES:]
    # The last column is often that of the labels.
    more = f" and {len(left)} more up to {left[-1]!r}" if left else ""
    return ", ".join(map(repr, shown)) + more


def numbers_in(texts: pd.Series[Any], decimal: str = ".") -> pd.Series[Any]:
    """Texts as numbers, with marks between thousands; NaN where one is none.

    Args:
        texts: without blanks around them.
        decimal: a point, or a comma.
    """
    between = "." if decimal == "," else ","
    grouped = rf"^[+-]?\d{{1,3}}({re.escape(between)}\d{{3}})+({re.escape(decimal)}\d+)?$"
    has_groups = texts.str.match(grouped)
    texts = texts.where(~has_groups, texts.str.replace(between, "", regex=False))
    return pd.to_numeric(texts.str.replace(decimal, ".", regex=False), errors="coerce")


def are_numbers(values: Sequence[str], decimal: str = ".") -> bool:
    """Whether labels are taken as numbers where nobody says what they are.

    Args:
        values: text, without blanks around them.
        decimal: how the numbers of their file are written.
    """
    text = pd.Series(values, dtype="object")
    known = ~text.str.lower().isin(MISSING)
    numbers = _label_numbers(text, known, decimal)[known]
    return bool(np.isfinite(numbers).all()) and _is_measured(numbers)


def _label_numbers(text: pd.Series[Any], known: pd.Series[bool], decimal: str) -> pd.Series[Any]:
    numbers = numbers_in(text.where(known, ""), decimal)
    if numbers[known].isna().any():  # labels may be written otherwise than the rest of a file
        numbers = numbers_in(text.where(known, ""), "." if decimal == "," else ",")
    return numbers


def read_targets(
    values: Sequence[str], kind: str | None, notes: list[str], decimal: str = "."
) -> tuple[Tensor, tuple[str, ...]]:
    """Targets from labels as they stand in a file, and the names of the classes.

    Args:
        values: text, (n,).
        kind: ``classes`` or ``regression``; None: regression for numbers of many values.
        notes: what is decided is added.
        decimal: how the numbers of their file are written.

    Raises:
        AuditInputError: if there are too few labels, one class, or words for numbers.
    """
    text = pd.Series(values, dtype="object").astype(str).str.strip()
    known = ~text.str.lower().isin(MISSING)
    if known.sum() < FEWEST:
        raise AuditInputError(
            f"{known.sum()} of {len(text)} examples have a label; an audit needs at least {FEWEST}."
        )
    if not known.all():
        notes.append(f"{(~known).sum()} examples have no label: they are predicted, not judged.")
    numbers = _label_numbers(text, known, decimal)
    numeric = bool(np.isfinite(numbers[known]).all())
    if kind is None:
        kind = "regression" if numeric and _is_measured(numbers[known]) else "classes"
        notes.append(f"The labels are taken as {'numbers' if kind == 'regression' else 'classes'}.")
    if kind == "regression":
        if not numeric:
            wrong = text[known][~np.isfinite(numbers[known])].iloc[0]
            raise AuditInputError(f"the labels should be numbers, but one is {wrong!r}.")
        return torch.from_numpy(numbers.to_numpy(np.float64, copy=True)), ()
    whole = numeric and bool((numbers[known] % 1 == 0).all())
    if whole:  # 1 and 1.0 are one class, and 10 comes after 9
        text = numbers.where(known).astype("Int64").astype(str)
        names = sorted(text[known].unique(), key=int)
    else:
        names = sorted(text[known].unique())
    if len(names) < 2:
        raise AuditInputError(f"all labels are {names[0]!r}; an audit needs two classes.")
    numbered = text.where(known).map({name: i for i, name in enumerate(names)})
    targets = numbered.where(known, IGNORED).to_numpy(np.int64, copy=True)
    counts = np.bincount(targets[targets >= 0], minlength=len(names))
    if 2 * len(names) > known.sum():
        raise AuditInputError(
            f"there are {len(names)} classes for {known.sum()} labels: is this an id, a text or a "
            "number? Name another column with --label, or say --kind regression."
        )
    rare = [name for name, count in zip(names, counts, strict=True) if count < 10]
    if rare:
        notes.append(
            f"{', '.join(rare[:5])}{' …' * (len(rare) > 5)}: fewer than 10 examples, so little can "
            "be said of their labels."
        )
    return torch.from_numpy(targets), tuple(names)


def _is_measured(numbers: pd.Series[float]) -> bool:
    distinct = numbers.nunique()
    return distinct > MANY_VALUES and (
        bool((numbers % 1 != 0).any()) or distinct > 0.05 * len(numbers)
    )
