"""The run directory of a comparison: its configuration, its rows by run, checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, final

from poprisk.records import FORMAT, RecordDirectory, RunDirectoryError, write_json

__all__ = ["FORMAT", "Key", "RunData", "RunDirectory", "RunDirectoryError", "write_json"]

EVENTS = {"start", "epoch", "end"}

Key = tuple[str, int]


class RunData(NamedTuple):
    """What a run directory says.

    Attributes:
        config: contents of ``config.json``.
        environment: contents of ``environment.json``.
        epochs: the ``epoch`` rows; those that a resumed run repeated are there once.
        ends: the ``end`` row of each finished run, by arm name and seed.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    ends: dict[Key, dict[str, Any]]


def _is_row(row: Any) -> bool:
    known = row["event"] in EVENTS and isinstance(row["arm"], str)
    return known and {type(row["seed"]), type(row["epoch"])} == {int}


@final
class RunDirectory:
    """Reads and writes one run directory; see :class:`poprisk.records.RecordDirectory`."""

    def __init__(self, path: Path) -> None:
        self._record = RecordDirectory(path, keys={"task", "arms", "seeds"}, is_row=_is_row)
        self.path, self.metrics = self._record.path, self._record.metrics
        self.checkpoints = self._record.checkpoints

    def create(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Make the directory, or check that an existing one holds the same configuration.

        Raises:
            RunDirectoryError: if it cannot be written, is not a run directory, or holds another
                configuration; nothing is changed then.
        """
        self._record.create(config, environment)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from writing here.

        Raises:
            RunDirectoryError: if one is writing already.
        """
        return self._record.locked()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row to the record and flush it."""
        self._record.append(row)

    def read(self) -> RunData:
        """Read everything back.

        Raises:
            RunDirectoryError: if the directory is missing or a file in it is damaged.
        """
        config = self._record.config()
        epochs: dict[Key, list[dict[str, Any]]] = {}
        ends: dict[Key, dict[str, Any]] = {}
        for row in self._record.rows():
            key = (row["arm"], row["seed"])
            if row["event"] == "start":
                epochs[key] = [r for r in epochs.get(key, []) if r["epoch"] <= row["epoch"]]
                ends.pop(key, None)
            elif row["event"] == "epoch":
                epochs.setdefault(key, []).append(row)
            else:
                ends[key] = row
        rows = [row for run in epochs.values() for row in run]
        return RunData(config, self._record.environment(), rows, ends)
