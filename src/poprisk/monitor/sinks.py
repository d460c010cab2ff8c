"""Where a monitor writes its rows: a file, TensorBoard, Weights & Biases, or a function."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, float]
Sink = Callable[[int, Row], None]
"""Takes the step and the numbers measured at it."""


class Jsonl:
    """Appends one JSON object a row to a file, flushed; a number that is not finite becomes null.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refused = f"sinks: cannot write to {self.path}: "
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{refused}{error.strerror or error}.") from error
        if self.path.is_dir():
            raise OSError(f"{refused}it is a folder; name a file in it.")
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise OSError(f"{refused}no permission.")

    def __repr__(self) -> str:
        return str(self.path)

    def __call__(self, step: int, row: Row) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


class TensorBoard:
    """Writes scalars to a ``SummaryWriter``."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """Logs to a run of ``wandb`` (or to anything with its ``log``)."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, step: int, row: Row) -> None:
        self.run.log(row, step=step)


def as_sinks(sinks: Any) -> list[Sink]:
    """Make sinks of several things, or of one that is not in a list."""
    several = isinstance(sinks, Iterable) and not isinstance(sinks, (str, Path))
    return [as_sink(sink) for sink in (sinks if several else [sinks])]


def as_sink(sink: Any) -> Sink:
    """Make a sink of a path, a writer, a run, the word ``"wandb"``, or a function.

    Raises:
        TypeError: if it is none of these.
        OSError: if a file cannot be written.
        ImportError: for ``"wandb"`` where it is not installed.
    """
    if isinstance(sink, str) and sink == "wandb":
        import wandb

        return WeightsAndBiases(wandb)
    if isinstance(sink, (str, Path)):
        return Jsonl(sink)
    if hasattr(sink, "add_scalar"):
        return TensorBoard(sink)
    if hasattr(sink, "log"):
        return WeightsAndBiases(sink)
    if not callable(sink):
        raise TypeError(
            "sinks must hold paths of JSONL files, TensorBoard writers, wandb runs, 'wandb', or "
            f"functions of step and row, but got {sink!r}."
        )
    return sink
