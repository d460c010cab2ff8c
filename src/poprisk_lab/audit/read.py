"""From what stands on the command line to examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from poprisk.task import Task
from poprisk_lab.audit import images, table
from poprisk_lab.audit.examples import AuditExamples, AuditInputError, listed, read_targets
from poprisk_lab.tasks import load_task

TABLES = (*table.CSV, *table.JSON_LINES, table.PARQUET)
BELOW_HEADER = (
    "Row 1 is the first below the header, line 2 of the file, and has index 0: line = row + 1 = "
    "index + 2, where no line is blank and no cell has several lines."
)
OF_LINES = (
    "Row 1 is the first line of the file and has index 0: line = row = index + 1, where no line "
    "is empty."
)
OF_A_FRAME = "Row 1 is the first of the table, where a data frame has index 0: row = index + 1."
OF_AN_ARRAY = "Row 1 is the first of the array and of its labels, and has index 0: row = index + 1."
OF_A_FOLDER = (
    "The name of an image is its path in the folder; its index counts the images that could be "
    "read, from 0."
)
OF_A_TASK = "The number of an example is its index in the training set, from 0."
WORDS = 20_000
FACTORS = 256
"""Of the reduced word counts of texts."""


def read_examples(
    source: str,
    *,
    label: str | None = None,
    labels: Path | None = None,
    text: str | None = None,
    kind: str | None = None,
    side: int | None = None,
    seed: int = 0,
) -> AuditExamples:
    """Read a table, a table with a column of text, a folder of images, or an array of features.

    Args:
        source: a file ``.csv``, ``.tsv``, ``.txt``, ``.jsonl`` or ``.parquet``, a folder with one
            folder a class, or a file ``.npy``.
        label: the column of labels.
        labels: a file with the labels of an array, in its order.
        text: the column of texts.
        kind: ``classes`` or ``regression``; None: by the labels.
        side: of images, in pixels.
        seed: of the encoding.

    Raises:
        AuditInputError: if it cannot be read, or what is needed is not said.
    """
    path, notes = Path(source), list[str]()
    if not path.exists():
        raise AuditInputError(f"there is no file or folder {source}.")
    if path.is_dir():
        refuse_options("a folder of images", label=label, labels=labels, text=text)
        return _images(path, kind, side, notes)
    if path.suffix.lower() == ".npy":
        refuse_options("an array", text=text, size=side)
        return _features(path, label, labels, kind, notes)
    if path.suffix.lower() not in TABLES:
        raise AuditInputError(
            f"{source}: an audit reads {', '.join(TABLES)}, .npy, a folder of images with one "
            "folder a class, or FILE.py:function."
        )
    refuse_options("a table", labels=labels, size=side)
    frame = table.read_table(path, notes)
    if label is None and {"chosen", "rejected"} <= set(frame.columns):
        raise AuditInputError(
            f"{source} holds preferences: word counts tell too little of them. Audit them where "
            "their model trains, by poprisk.Auditor(labels, kind='preferences')."
        )
    if label is None:
        raise AuditInputError(
            f"--label must name the column of labels; {source} has {listed(list(frame.columns))}."
        )
    given = table.label_texts(path, label, frame)
    table.check_label(path, label, frame[label], kind)
    if text == label:
        raise AuditInputError(
            f"--text and --label both name {label!r}: labels would be learned from themselves; "
            "name the column of texts by --text."
        )
    words = None if text is None else table.check_texts(path, text, frame)
    targets, classes = read_targets(given, kind, notes, frame.attrs.get("decimal", "."))
    if words is None:
        inputs = _encoded(frame.drop(columns=label), targets, seed, notes)
    else:
        inputs = encode_texts(words.tolist(), seed, notes)
    shown = _shown_rows(frame if text is None else frame[[text]])
    suffix = path.suffix.lower()
    counting = OF_LINES if suffix in table.JSON_LINES else OF_A_FRAME
    counting = BELOW_HEADER if suffix in table.CSV else counting
    return AuditExamples(inputs, targets, classes, _row, shown, notes, counting=counting)


def refuse_options(source: str, **given: Any) -> None:
    """Refuse options that a kind of source does not take.

    Raises:
        AuditInputError: if one is given.
    """
    for name, value in given.items():
        if value is not None:
            raise AuditInputError(f"--{name} does not go with {source}; leave it out.")


def _row(position: int) -> str:
    return f"row {position + 1}"


def _shown_rows(frame: pd.DataFrame) -> Callable[[int], dict[str, Any]]:
    """Rows of a table as text, one at a time; a column's array is far quicker than a row."""
    columns = {str(name): frame[name].array for name in frame.columns}

    def show(position: int) -> dict[str, Any]:
        cells = {name: values[position] for name, values in columns.items()}
        return {name: None if pd.isna(cell) else str(cell) for name, cell in cells.items()}

    return show


def _encoded(frame: pd.DataFrame, targets: Tensor, seed: int, notes: list[str]) -> Tensor:
    frame = table.drop_copies(frame, targets, notes)
    typed, columns = table.type_columns(frame, notes)
    inputs = table.encode_columns(typed, columns, seed)
    notes.append(
        f"{len(columns.numbers)} columns of numbers and {len(columns.categories)} of categories "
        f"make {inputs.shape[1]} inputs."
    )
    return inputs


def encode_texts(texts: list[str], seed: int, notes: list[str]) -> Tensor:
    """Texts as their word counts weighted by rarity, reduced to a few hundred numbers, (n, d).

    Raises:
        AuditInputError: if they have no word in common.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counted = TfidfVectorizer(
            max_features=WORDS, min_df=2, sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32
        ).fit_transform(texts)
    except ValueError as error:
        raise AuditInputError(
            f"the texts have no word in common ({str(error).rstrip('.')})."
        ) from error
    size = min(FACTORS, counted.shape[1] - 1, counted.shape[0] - 1)
    if size < 1:
        raise AuditInputError("the texts have too few words in common to learn from.")
    reduced = TruncatedSVD(size, random_state=seed).fit_transform(counted)
    notes.append(
        f"Texts are taken as TF-IDF of {counted.shape[1]} words and pairs, in {size} factors."
    )
    scale = float(np.sqrt(np.mean(np.square(reduced)))) or 1.0
    return torch.from_numpy(np.ascontiguousarray(reduced / scale, dtype=np.float32))


def _images(folder: Path, kind: str | None, side: int | None, notes: list[str]) -> AuditExamples:
    files, given = images.find_images(folder)
    pixels, kept, broken = images.read_images(files, side, notes)
    targets, classes = read_targets([given[i] for i in kept], kind or "classes", notes)
    files = [files[i] for i in kept]
    return AuditExamples(
        pixels,
        targets,
        classes,
        lambda i: str(files[i].relative_to(folder)),
        lambda i: {"image": str(files[i])},
        notes,
        broken,
        OF_A_FOLDER,
    )


def _features(
    path: Path, label: str | None, labels: Path | None, kind: str | None, notes: list[str]
) -> AuditExamples:
    if labels is None:
        raise AuditInputError(f"--labels must name the file with the labels of {path}.")
    array = _array(path)
    if array.ndim < 2 or not np.issubdtype(array.dtype, np.number):
        raise AuditInputError(
            f"{path} must hold numbers of shape (n, d), but holds {array.dtype} {array.shape}."
        )
    inputs = torch.from_numpy(np.array(array, dtype=np.float32).reshape(len(array), -1))
    if not bool(inputs.isfinite().all()):
        bad = int((~inputs.isfinite().all(1)).nonzero()[0])
        raise AuditInputError(f"{path} holds NaN or Inf, first in {_row(bad)}.")
    found = _labels_of(labels, label, kind, len(array), notes)
    targets, classes = read_targets(found, kind, notes)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)
    return AuditExamples(inputs, targets, classes, _row, lambda i: {}, notes, counting=OF_AN_ARRAY)


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise AuditInputError(f"there is no file {path}.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).rstrip(".")
        if "object" in reason.lower():
            reason = "it holds Python objects; save it as text or numbers, as by array.astype(str)"
        raise AuditInputError(f"{path} cannot be read as an array: {reason}.") from error


def _labels_of(
    path: Path, label: str | None, kind: str | None, n: int, notes: list[str]
) -> list[str]:
    """Labels from a ``.npy`` file, or a column of a table, which may have no header."""
    if path.suffix.lower() == ".npy":
        values = _array(path)
        if values.ndim == 0:
            raise AuditInputError(f"{path} must hold a label for each example, but holds one.")
        if values.size != len(values):
            raise AuditInputError(
                f"{path} must hold one label for each example, but has shape {values.shape}; of "
                "one-hot rows save array.argmax(1)."
            )
        found = [str(v) for v in values.reshape(-1)]
    else:
        frame = table.read_table(path, notes)
        if label is None and len(frame.columns) > 1:
            raise AuditInputError(
                f"--label must say which column of {path} holds the labels: "
                f"{listed(list(frame.columns))}."
            )
        label = label or str(frame.columns[0])
        found = table.label_texts(path, label, frame)
        table.check_label(path, label, frame[label], kind)
        if len(found) == n - 1:
            notes.append(f"{path} has no header: its first line is a label.")
            found = [str(frame.columns[0]), *found]
    if len(found) != n:
        raise AuditInputError(f"there are {n} examples but {len(found)} labels in {path}.")
    return found


def of_task(name: str, seed: int) -> tuple[Task, AuditExamples]:
    """The training set of a task, with the task's own network.

    Raises:
        TaskError: if the task cannot be made.
        AuditInputError: if its targets are neither classes nor one number an example.
    """
    task = load_task(name, seed=seed)
    x, y = task.train
    if not isinstance(x, Tensor):
        raise AuditInputError(
            f"task {name} reads its data batch by batch, but an audit takes data in memory; give a "
            "pair of tensors."
        )
    if task.classification:
        k = int(y.max()) + 1
        classes = tuple(str(i) for i in range(k))
        targets = y.long()
    elif y.is_floating_point() and y.reshape(len(y), -1).shape[1] == 1:
        classes, targets = (), y.reshape(-1).double()
    else:
        raise AuditInputError(f"{name}: an audit takes classes or one number an example.")
    return task, AuditExamples(
        x, targets, classes, lambda i: f"example {i}", lambda i: {}, counting=OF_A_TASK
    )
