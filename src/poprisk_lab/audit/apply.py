"""Labels that a person has marked on the page, put into the file that they came from."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from io import StringIO
from pathlib import Path

import pandas as pd

from poprisk_lab.audit import table
from poprisk_lab.audit.examples import MISSING, AuditInputError, numbers_in
from poprisk_lab.store import replace_bytes

MARKS = {"fix", "keep", "unsure"}
HEAD = ["index", "name", "given", "label", "mark"]
SUSPECTS = "index name given suggested suspect quality rank confidence".split()
"""Columns of ``suspects.csv`` and ``labels.csv``; index and rank begin with 0."""


def read_marks(path: Path) -> pd.DataFrame:
    """What the page has let a person download, or all suggestions of ``suspects.csv``.

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
        return found.assign(label=found["suggested"], mark="fix")[HEAD]
    if list(found.columns) != HEAD or not set(found["mark"]) <= MARKS:
        raise AuditInputError(
            f"{path} is not what the page downloads, nor suspects.csv: it must have the columns "
            f"{', '.join(HEAD)}, and marks {', '.join(sorted(MARKS))}."
        )
    return found


def apply_marks(source: Path, label: str | None, marks: Path, to: Path) -> int:
    """Write a table with the labels that were marked *fix*; all else stays as it is written.

    Args:
        source: the table that was audited.
        label: its column of labels, which must be named.
        marks: what was downloaded from the page, or ``suspects.csv``.
        to: the file to write.

    Returns:
        How many labels were changed.

    Raises:
        AuditInputError: if the source is no CSV file, the files do not belong together, or ``to``
            exists.
    """
    if not source.is_file() or source.suffix.lower() not in table.CSV:
        raise AuditInputError(f"--apply corrects a CSV file, but {source} is none.")
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
    as_written = _Spelling(Counter(row[column].strip() for row in body))
    for index, given, right in zip(fixed["index"], fixed["given"], fixed["label"], strict=True):
        position = int(index) if index.isdecimal() else -1
        if not 0 <= position < len(body) or not _same(body[position][column], given):
            raise AuditInputError(
                f"{marks} does not belong to {source}: it has {given!r} at index {index}."
            )
        body[position][column] = as_written(right)
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
    return len(fixed)


class _Spelling:
    """Labels as a file has them: 01 or 1.0 for 1, and with its decimal comma.

    Args:
        written: its cells, and how often each occurs.
    """

    def __init__(self, written: Counter[str]) -> None:
        self.written = written
        commas = sum(count for cell, count in written.items() if table.DECIMAL_COMMA.match(cell))
        self.comma = commas > sum(written.values()) / 2
        cells = [cell for cell, _ in written.most_common()]
        self.of_number: dict[float, str] = {}
        for cell, numbers in zip(cells, _readings(cells), strict=True):
            for number in numbers:
                self.of_number.setdefault(number, cell)
        self.missing = next((cell for cell in cells if cell.lower() in MISSING), "none")

    def __call__(self, label: str) -> str:
        if label in self.written:
            return label
        if label == "none":
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
    if cell == given or (given == "none" and cell.lower() in MISSING):
        return True
    return _number(given) in _readings([cell])[0]
