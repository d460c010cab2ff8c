"""Labels that a person has marked on the page, put into the file that they came from."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from poprisk_lab.audit import table
from poprisk_lab.audit.examples import (
    MISSING,
    AuditInputError,
    are_numbers,
    listed,
    numbers_in,
)
from poprisk_lab.store import replace_bytes

MARKS = {"fix", "keep", "unsure"}
HEAD = ["index", "name", "given", "label", "mark"]
SUSPECTS = "index name given suggested suspect quality rank confidence".split()
"""Columns of ``suspects.csv`` and ``labels.csv``; index and rank begin with 0."""


class Corrected(NamedTuple):
    """How many labels of a file are others now.

    Attributes:
        changed: that were there.
        filled: that were missing.
    """

    changed: int
    filled: int

    def __str__(self) -> str:
        told = f"{self.changed} label{'s' * (self.changed != 1)} changed"
        if not self.filled:
            return told
        return f"{told}, {self.filled} missing label{'s' * (self.filled != 1)} filled"


def read_marks(path: Path) -> pd.DataFrame:
    """What the page has let a person download, or all suggestions of ``suspects.csv``.

    Of ``labels.csv`` also what is predicted where a label is missing. All else stands there as it
    was given, numbers perhaps with fewer digits.

    Raises:
        AuditInputError: if it is something else.
    """
    if not path.is_file():
        raise AuditInputError(f"there is no file {path}.")
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise AuditInputError(f"{path} cannot be read: {reason}.") from error
    if found.columns[:1].tolist() == ["row"]:  # as versions before wrote it: from 1
        places = pd.to_numeric(found["row"], errors="coerce").fillna(0).astype(int) - 1
        found = found.rename(columns={"row": "index"}).assign(index=places.astype(str))
    if list(found.columns) == SUSPECTS:
        taken = (found["suspect"] == "1") | (found["given"] == "")
        found = found[taken & (found["suggested"] != "")]
        return found.assign(label=found["suggested"], mark="fix")[HEAD]
    if list(found.columns) != HEAD or not set(found["mark"]) <= MARKS:
        raise AuditInputError(
            f"{path} is not what the page downloads, nor suspects.csv or labels.csv: it must have "
            f"the columns {', '.join(HEAD)}, and marks {', '.join(sorted(MARKS))}."
        )
    return found


def apply_marks(
    source: Path, label: str | None, marks: Path, to: Path, *, kind: str | None = None
) -> Corrected:
    """Write a table with the labels that were marked *fix*; all else stays as it is written.

    Args:
        source: the table that was audited.
        label: its column of labels, which must be named.
        marks: what was downloaded from the page, ``suspects.csv`` or ``labels.csv``.
        to: the file to write.
        kind: of the labels, ``classes`` or ``regression``; None: by the labels.

    Raises:
        AuditInputError: if the source is no CSV file, the files do not belong together, a label
            is no class of the source, or ``to`` exists.
    """
    if not source.is_file() or source.suffix.lower() not in table.CSV:
        raise AuditInputError(
            f"--apply corrects a CSV file, but {source} is none; change its labels where you keep "
            "them: index (from 0) and name say which examples."
        )
    if label is None:
        raise AuditInputError("--label must name the column of labels.")
    fixed = read_marks(marks)
    if to.exists():
        raise AuditInputError(f"{to} exists; choose another file with --out.")
    fixed = fixed[fixed["mark"] == "fix"]
    form = table.format_of(source)
    with source.open("rb") as file:
        start = file.read(table.PROBE_BYTES)
    marked, windows = start.startswith(codecs.BOM_UTF8), b"\r\n" in start
    with source.open(encoding=form.encoding, newline="") as file:
        cells = csv.reader(file, delimiter=form.separator, skipinitialspace=True)
        rows = [row for row in cells if row]  # as pandas reads it, without blank lines
    head = [name.strip() for name in rows[0]]
    if label not in head:
        raise AuditInputError(f"{source} has no column {label!r}.")
    column, body = head.index(label), rows[1:]
    before = [row[column].strip() for row in body]
    as_written = _Spelling(before, kind, form.decimal)
    changed = filled = 0
    for index, given, right in zip(fixed["index"], fixed["given"], fixed["label"], strict=True):
        position = int(index) if index.isdecimal() else -1
        if not 0 <= position < len(body) or not _same(body[position][column], given):
            raise AuditInputError(
                f"{marks} does not belong to {source}: it has {given!r} at index {index}."
            )
        if reason := as_written.refusal(right):
            raise AuditInputError(
                f"{marks} gives row {position + 1} (index {position}) of {source} the label "
                f"{right!r}, which is {reason}."
            )
        old, new = before[position], as_written(right)
        missing = old.lower() in MISSING
        if right == given or new == old or (missing and new.lower() in MISSING):
            continue
        body[position][column] = new
        changed, filled = changed + (not missing), filled + missing
    text = StringIO()
    end = "\r\n" if windows else "\n"
    csv.writer(text, delimiter=form.separator, lineterminator=end).writerows(rows)
    encoding = form.encoding
    if encoding == "utf-8-sig" and not marked:
        encoding = "utf-8"
    try:
        content = text.getvalue().encode(encoding)
    except UnicodeEncodeError as error:
        wrong = error.object[error.start]
        raise AuditInputError(
            f"{source} is in {encoding}, which has no {wrong!r}; save it in UTF-8, or choose "
            "another label."
        ) from error
    replace_bytes(to, content)
    return Corrected(changed, filled)


class _Spelling:
    """Labels as a file has them: 01 or 1.0 for 1, and with its decimal comma.

    Args:
        column: its cells, without blanks around them.
        kind: ``classes`` or ``regression``; None: as an audit takes them.
        decimal: how the numbers of the file are written.
    """

    def __init__(self, column: Sequence[str], kind: str | None, decimal: str) -> None:
        self.kind, self.decimal = kind, decimal
        self.numbers = kind == "regression" or (kind is None and are_numbers(column, decimal))
        self.written = written = Counter(column)
        commas = sum(count for cell, count in written.items() if table.DECIMAL_COMMA.match(cell))
        self.comma = commas > sum(written.values()) / 2
        cells = [cell for cell, _ in written.most_common()]
        self.of_number: dict[float, str] = {}
        for cell, numbers in zip(cells, _readings(cells), strict=True):
            for number in numbers:
                self.of_number.setdefault(number, cell)
        self.missing = next((cell for cell in cells if cell.lower() in MISSING), None)

    def refusal(self, label: str) -> str:
        """Why a label cannot be one of the file; empty if it can."""
        removed = label == "none" and self.missing is not None
        if removed or (label in self.written and label.lower() not in MISSING):
            return ""
        number = _number(label)
        if self.numbers:
            by_hand = numbers_in(pd.Series([label], dtype=object), self.decimal).iloc[0]
            read = float(by_hand) if number is None else number
            return "" if isfinite(read) else "no number"
        if number in self.of_number:
            return ""
        classes = sorted(cell for cell in self.written if cell.lower() not in MISSING)
        advice = "; of numbers say --kind regression" * (number is not None and self.kind is None)
        return f"none of its classes: {listed(classes, label)}{advice}"

    def __call__(self, label: str) -> str:
        if label in self.written:
            return label
        if label == "none" and self.missing is not None:
            return self.missing
        number = _number(label)
        if number is not None and number in self.of_number:
            return self.of_number[number]
        return label.replace(".", ",") if self.comma else label


def _readings(cells: list[str]) -> list[tuple[float, float]]:
    """Each cell as a number, with a decimal comma and with a point; NaN if it is none."""
    found = pd.Series(cells, dtype=object)
    ways = (numbers_in(found, decimal).astype(float).tolist() for decimal in ",.")
    return list(zip(*ways, strict=True))


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _same(cell: str, given: str) -> bool:
    cell = cell.strip()
    if cell == given or (given in ("", "none") and cell.lower() in MISSING):
        return True
    return _number(given) in _readings([cell])[0]
