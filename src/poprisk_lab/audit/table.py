"""Tables: CSV as people have it, JSON Lines, Parquet.

Columns are typed, then scikit-learn encodes them.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import warnings
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    QuantileTransformer,
    StandardScaler,
)
from torch import Tensor

from poprisk.losses import IGNORED
from poprisk_lab.audit.examples import (
    MISSING,
    AuditInputError,
    listed,
    near_names,
    numbers_in,
)

CSV = (".csv", ".tsv", ".txt")
PARQUET = ".parquet"
JSON_LINES = (".jsonl", ".ndjson")
SEPARATORS = (",", ";", "\t", "|")
PROBE_BYTES = 1 << 16
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1a\x1b"})
"""Bytes that no text holds."""
NEARLY_ALL = 0.95
"""Share of the values of a column that make it one of numbers, or of dates."""
MOST_CATEGORIES = 50
HUGE = 1e100
"""Size of a number from which only relative sizes are kept."""
HEAVY = 10.0
"""Standard deviations that a column's largest value is off, from which its ranks are taken."""
LARGEST = 5.0
"""Standard deviations at which a value is cut off."""
NA_VALUES = ("?", "-", "--")
ID_NAMES = re.compile(r"(^|_|\b)(id|index|idx|key|uuid|guid|row|no|nr)$", re.IGNORECASE)
DATE = re.compile(r"^\s*\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T]\d{1,2}:\d{2}.*)?\s*$")
DECIMAL_COMMA = re.compile(r"^\s*[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+\s*$")


class CsvFormat(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    separator: str
    decimal: str


def read_table(path: Path, notes: list[str]) -> pd.DataFrame:
    """A CSV, JSON Lines or Parquet file as a frame; numbers are numbers, all else is text.

    Raises:
        AuditInputError: if it is missing, empty, damaged or of another kind.
    """
    if not path.is_file():
        raise AuditInputError(f"there is no file {path}.")
    if path.stat().st_size == 0:
        raise AuditInputError(f"{path} is empty.")
    readers = {PARQUET: _parquet, **dict.fromkeys(JSON_LINES, _json_lines)}
    read = readers.get(path.suffix.lower(), _csv)
    try:
        frame = read(path, notes)
    except AuditInputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise AuditInputError(f"{path} cannot be read as a table: {reason}.") from error
    if frame.empty:
        raise AuditInputError(f"{path} has a header and no row.")
    frame.columns = [str(column).strip() for column in frame.columns]
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise AuditInputError(f"{path} has two columns called {twice[0]!r}; rename one.")
    return frame


def _json_lines(path: Path, notes: list[str]) -> pd.DataFrame:
    rows = list[dict[str, Any]]()
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object with a value by name")
            rows += [row] if row else []
    frame = pd.DataFrame(rows)
    for name in frame.columns:
        nested = pd.Series([isinstance(value, (list, dict)) for value in frame[name]])
        if nested.any():
            notes.append(f"`{name}` holds lists or objects; they are taken as their text.")
            frame[name] = frame[name].where(~nested, frame[name].astype(str))
    return frame


def _parquet(path: Path, notes: list[str]) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise AuditInputError(
            f"{path}: Parquet needs pyarrow: pip install pyarrow, or save as CSV."
        ) from None


def _csv(path: Path, notes: list[str]) -> pd.DataFrame:
    form = format_of(path)
    if (form.separator, form.decimal) != (",", "."):
        separator = {"\t": "tab"}.get(form.separator, form.separator)
        comma = ", decimal commas" * (form.decimal == ",")
        notes.append(f"The file has {separator!r} between columns{comma}.")
    if form.encoding == "cp1252":
        notes.append("The file is not UTF-8; it was read as Windows-1252.")
    with path.open(encoding=form.encoding, newline="") as file:
        rows = csv.reader(file, delimiter=form.separator, skipinitialspace=True)
        head = next((row for row in rows if row), list[str]())
    named = [name.strip() for name in head if name.strip()]
    if twice := [name for name in named if named.count(name) > 1]:
        raise AuditInputError(f"{path} has two columns called {twice[0]!r}; rename one.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows wider than the header
        try:
            frame = _read(path, form, decimal=form.decimal, na_values=list(NA_VALUES))
        except pd.errors.ParserWarning:
            first = form.separator.join(head)[:60]
            raise AuditInputError(
                f"{path}: rows have more columns than the first line, {first!r}; it should name "
                "the columns, and nothing stand above it."
            ) from None
    frame.attrs["decimal"] = form.decimal
    return frame


def _read(path: Path, form: CsvFormat, **options: Any) -> pd.DataFrame:
    """Rows of a CSV file; which lines are rows does not depend on the options."""
    return pd.read_csv(
        path,
        sep=form.separator,
        encoding=form.encoding,
        skipinitialspace=True,
        low_memory=False,
        index_col=False,  # else a column that the header lacks becomes an index, unsaid
        **options,
    )


def format_of(path: Path) -> CsvFormat:
    """How a CSV file is written, from its beginning.

    Raises:
        ValueError: if it is no text.
    """
    with path.open("rb") as file:
        head = file.read(PROBE_BYTES)
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not utf16 and len(head.translate(None, CONTROLS)) < len(head):
        raise ValueError("it is no text; save it as CSV in UTF-8")
    encoding = "utf-16" if utf16 else _encoding(path)
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        text = file.read(PROBE_BYTES)
    if len(text) == PROBE_BYTES:
        text = text[: text.rfind("\n") + 1]
    separator = max(SEPARATORS, key=lambda mark: _evenness(text, mark))
    cells = [cell for row in csv.reader(StringIO(text), delimiter=separator) for cell in row]
    commas = sum(bool(DECIMAL_COMMA.match(cell)) for cell in cells)
    points = sum(bool(re.match(r"^\s*[+-]?\d+\.\d+\s*$", cell)) for cell in cells)
    return CsvFormat(encoding, separator, "," if separator != "," and commas > points else ".")


def _encoding(path: Path) -> str:
    """UTF-8 if all of a file is, or else what Windows writes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while part := file.read(PROBE_BYTES):
                decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8-sig"


def _evenness(text: str, mark: str) -> tuple[float, int]:
    """How well a mark separates columns: share of rows of the header's width, and that width."""
    widths = [len(row) for row in csv.reader(StringIO(text), delimiter=mark) if row]
    if not widths or widths[0] < 2:
        return 0.0, 0
    return sum(width == widths[0] for width in widths) / len(widths), widths[0]


class Columns(NamedTuple):
    """Columns of a table by what they hold; the others were left out."""

    numbers: list[str]
    categories: list[str]


def label_texts(path: Path, label: str, frame: pd.DataFrame) -> list[str]:
    """The column of labels as it is written, with what stands for nothing as it stands.

    Args:
        path: the file.
        label: name of the column.
        frame: what was read of the file.

    Raises:
        AuditInputError: if there is none of that name.
    """
    if label not in frame:
        raise AuditInputError(no_column(path, label, list(frame.columns)))
    column = frame[label]
    if path.suffix.lower() in CSV:
        place = frame.columns.get_loc(label)
        read = _read(path, format_of(path), usecols=[place], dtype=str, na_filter=False)
        column = read.iloc[:, 0]
    return _texts(column).tolist()


def _texts(column: pd.Series[Any]) -> pd.Series[Any]:
    """A column as texts, empty where a value is missing."""
    return column.astype(object).where(column.notna(), "").astype(str)


def no_column(path: Path, name: str, there: list[str]) -> str:
    """The refusal of a column that a file does not have."""
    near = near_names(there, name)
    hint = f"; do you mean {near[0]!r}?" if near else "."
    if all(numbers_in(pd.Series(there[:1], dtype=object)).notna()):
        hint = "; the first line must name the columns."
    return f"{path} has no column {name!r}{hint} It has {listed(there, name)}."


def check_label(path: Path, label: str, column: pd.Series[Any], kind: str | None) -> None:
    """Refuse labels that only count the rows, or say when they were made.

    Args:
        path: of the file.
        label: name of the column.
        column: as it was read.
        kind: as it was asked for: who names it means it.

    Raises:
        AuditInputError: if nothing can be learned of them.
    """
    if kind is not None or column.nunique() < 2:
        return
    if found := "an id" if _is_id(label, column) else "dates" if _holds_dates(column) else "":
        raise AuditInputError(
            f"--label {label}: that column of {path} looks like {found}, and no label; name "
            "another column, or say what it is by --kind."
        )


def check_texts(path: Path, text: str, frame: pd.DataFrame) -> pd.Series[Any]:
    """The column of texts as it stands; refused where it holds something else.

    Of numbers the digits would be counted as words, and all other columns left out.

    Raises:
        AuditInputError: if there is none of that name, or it holds no texts.
    """
    if text not in frame:
        raise AuditInputError(no_column(path, text, list(frame.columns)))
    column = frame[text]
    words = _texts(column).str.strip()
    known = words[~words.str.lower().isin(MISSING)]
    as_number = numbers_in(known, frame.attrs.get("decimal", "."))
    few_words = not known.empty and known.str.split().str.len().median() <= 1
    holds = ""
    if known.nunique() < 2:
        holds = "no two different values"
    elif pd.api.types.is_numeric_dtype(column) or as_number.notna().mean() >= NEARLY_ALL:
        holds = "numbers"
    elif _holds_dates(column):
        holds = "dates"
    elif few_words and known.nunique() <= MOST_CATEGORIES:
        holds = f"{known.nunique()} different words"
    if holds:
        raise AuditInputError(
            f"--text {text}: that column of {path} holds {holds}, and no texts; name another one, "
            "or leave --text out, and all columns are learned from."
        )
    return words


def _holds_dates(column: pd.Series[Any]) -> bool:
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if pd.api.types.is_numeric_dtype(column):
        return False
    known = column.dropna().astype(str)
    return len(known) > 0 and bool(known.str.match(DATE).mean() >= NEARLY_ALL)


def drop_copies(frame: pd.DataFrame, targets: Tensor, notes: list[str]) -> pd.DataFrame:
    """A table without columns that say the same as its labels, of which nothing else is learned.

    Such a column, the label as a number for one, gives every label back, right or wrong, and what
    is planted is found all the same.

    Args:
        frame: without the column of labels.
        targets: classes (n,) int64, ``IGNORED`` where there is none; or numbers, float64 with NaN.
        notes: what is left out is added.
    """
    y = pd.Series(targets.numpy(), index=frame.index)
    labelled = y.notna() if targets.is_floating_point() else y != IGNORED
    same = _equal if targets.is_floating_point() else _one_to_one
    copies = list[str]()
    for name in map(str, frame.columns):
        known = frame[name].notna() & labelled
        if 2 * known.sum() >= labelled.sum() and same(frame[name][known], y[known]):
            copies.append(name)
            notes.append(f"`{name}` is left out: it says the same as the label, row by row.")
    return frame.drop(columns=copies)


def _equal(column: pd.Series[Any], y: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool((column.astype(float) == y).all())


def _one_to_one(column: pd.Series[Any], y: pd.Series[Any]) -> bool:
    k = y.nunique()
    return column.nunique() == k and len(pd.DataFrame({"x": column, "y": y}).drop_duplicates()) == k


def type_columns(frame: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, Columns]:
    """What each column holds, and the frame with dates and half-numeric columns as numbers.

    Ids, constants and free text are left out, each with a note.

    Raises:
        AuditInputError: if nothing is left.
    """
    numbers: dict[str, pd.Series[Any]] = {}
    categories: dict[str, pd.Series[Any]] = {}
    for name in map(str, frame.columns):
        column = frame[name]
        if column.nunique() < 2:
            notes.append(f"`{name}` is left out: it has one value.")
        elif _is_id(name, column):
            notes.append(f"`{name}` is left out: it looks like an id.")
        elif pd.api.types.is_bool_dtype(column):
            categories[name] = column.astype(str)
        elif pd.api.types.is_numeric_dtype(column):
            numbers[name] = _finite(name, column.astype(float), notes)
        elif pd.api.types.is_datetime64_any_dtype(column):
            numbers.update(_date_parts(name, column))
        else:
            _type_text(name, column.astype(object), frame, numbers, categories, notes)
    if not numbers and not categories:
        raise AuditInputError("no column is left to learn from.")
    typed = pd.DataFrame({**numbers, **categories}, index=frame.index)
    return typed, Columns(list(numbers), list(categories))


def _type_text(
    name: str,
    column: pd.Series[Any],
    frame: pd.DataFrame,
    numbers: dict[str, pd.Series[Any]],
    categories: dict[str, pd.Series[Any]],
    notes: list[str],
) -> None:
    known = column.dropna().astype(str)
    text = _texts(column).str.strip()
    as_number = numbers_in(text, frame.attrs.get("decimal", "."))
    if (wrong := known[as_number[known.index].isna()]).size <= (1 - NEARLY_ALL) * len(known):
        if wrong.size:
            notes.append(
                f"`{name}`: {wrong.size} of its values are no numbers (such as "
                f"{wrong.iloc[0]!r}); they are taken as missing."
            )
        numbers[name] = _finite(name, as_number.astype(float), notes)
    elif _holds_dates(known):
        day_first = bool((known.str.extract(r"^\s*(\d{1,2})[-/.]")[0].astype(float) > 12).any())
        dates = pd.to_datetime(column, errors="coerce", format="mixed", dayfirst=day_first)
        notes.append(f"`{name}` holds dates: they are taken as day, month and weekday.")
        numbers.update(_date_parts(name, dates))
    elif known.nunique() > 0.5 * len(known) and known.nunique() > MOST_CATEGORIES:
        words = known.str.split().str.len().median()
        hint = f"; --text {name} would read it" if words >= 3 else ""
        notes.append(f"`{name}` is left out: {known.nunique()} values in {len(known)} rows{hint}.")
    else:
        categories[name] = column


def _finite(name: str, column: pd.Series[Any], notes: list[str]) -> pd.Series[Any]:
    """Numbers of which none is infinite, and of which squares can be taken."""
    infinite = np.isinf(column)
    if infinite.any():
        notes.append(f"`{name}`: {infinite.sum()} of its values are infinite, taken as missing.")
        column = column.where(~infinite)
    largest = column.abs().max()
    return column / largest if largest > HUGE else column


def _date_parts(name: str, dates: pd.Series[Any]) -> dict[str, pd.Series[Any]]:
    days = (dates - dates.min()).dt.total_seconds() / 86400
    parts = {"day": days, "month": dates.dt.month, "weekday": dates.dt.day_of_week}
    return {f"{name} ({k})": v.astype(float) for k, v in parts.items() if v.nunique() > 1}


def _is_id(name: str, column: pd.Series[Any]) -> bool:
    """All different, and either counted through or called so."""
    if column.isna().any() or not column.is_unique or pd.api.types.is_float_dtype(column):
        return False
    if name.startswith("Unnamed:") or ID_NAMES.search(name):
        return True
    if not pd.api.types.is_integer_dtype(column):
        text = column.astype(str)
        return bool(text.str.split().str.len().max() == 1) and not text.str.match(DATE).any()
    steps = np.diff(column.to_numpy())
    return bool((steps == steps[0]).all())


def encode_columns(frame: pd.DataFrame, columns: Columns, seed: int) -> Tensor:
    """The columns as float32 numbers of about unit size, (n, d).

    Numbers are standardized, those with heavy tails after their ranks were taken; missing ones get
    the median and an indicator. Categories become one-hot, of those beyond the
    ``MOST_CATEGORIES`` most frequent all others together; missing ones are a category.
    """
    size = (frame[columns.numbers] - frame[columns.numbers].mean()) / frame[columns.numbers].std()
    is_heavy = size.abs().max() > HEAVY
    heavy = [name for name in columns.numbers if is_heavy[name]]
    ranks = QuantileTransformer(n_quantiles=min(1000, len(frame)), random_state=seed)
    categories = OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        max_categories=MOST_CATEGORIES,
        min_frequency=2,
        sparse_output=False,
        dtype=np.float32,
    )
    encoder = ColumnTransformer(
        [
            ("numbers", _standardized(), [n for n in columns.numbers if not is_heavy[n]]),
            ("heavy", _standardized(ranks), heavy),
            ("categories", categories, columns.categories),
        ]
    )
    text = frame[columns.categories].astype(object)
    filled = frame[columns.numbers].join(text.where(text.notna(), "(missing)").astype(str))
    encoded = np.asarray(encoder.fit_transform(filled), dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(encoded))


def _standardized(*before: Any) -> Pipeline:
    cut = FunctionTransformer(np.clip, kw_args={"a_min": -LARGEST, "a_max": LARGEST})
    imputer = SimpleImputer(strategy="median", add_indicator=True)
    return make_pipeline(*before, StandardScaler(), cut, imputer)
