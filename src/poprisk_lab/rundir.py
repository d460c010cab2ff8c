"""The run directory of a comparison: its configuration, its rows by run, checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, final

from poprisk_lab.store import FORMAT, Config, RecordDirectory, RunDirectoryError, write_json

__all__ = ["FORMAT", "Key", "RunData", "RunDirectory", "RunDirectoryError", "write_json"]

EVENTS = {"start", "epoch", "end"}

TOL = 1e-3
"""Relative difference of initial losses that rounding on another processor may make."""
NEW = {("optimizers",), *(("task", key) for key in ("model", "modules", "sources", "start"))}
"""Entries that records of earlier versions lack."""
HASHED = {
    "task.data": "the data or the task's file",
    "task.model": "the layers or shapes of the model",
}
"""Hashes, and what a difference in them means."""

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


def differences(found: Config, wanted: Config) -> list[str]:
    """What in two configurations makes them different runs: where, and both values.

    Seeds do not; nor do initial losses within rounding, what a record of an earlier version does
    not say, and settings that torch's or other libraries' optimizers have in one version only.
    """
    return [*_differences(_by_name(found), _by_name(wanted), ())]


def with_more_seeds(found: Config, wanted: Config) -> Config:
    """The first configuration with the seeds of the second added."""
    more = [seed for seed in wanted["seeds"] if seed not in found["seeds"]]
    return {**found, "seeds": [*found["seeds"], *more]}


def _by_name(config: Config) -> Config:
    """A configuration whose arms have names for places, and which has no seeds."""
    arms = config["arms"] if isinstance(config["arms"], list) else []
    return {
        **{key: value for key, value in config.items() if key != "seeds"},
        "arms": {arm["name"]: arm for arm in arms},
    }


def _differences(found: Any, wanted: Any, at: tuple[str, ...]) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            here = (*at, key)
            if key in found and key in wanted:
                yield from _differences(found[key], wanted[key], here)
            elif not _may_lack(here, found, wanted):
                yield _said(here, found.get(key), wanted.get(key))
    elif not _equal(found, wanted, at):
        yield _said(at, found, wanted)


def _may_lack(at: tuple[str, ...], found: Config, wanted: Config) -> bool:
    """Whether one of two configurations may do without what stands at a place."""
    if at in NEW and at[-1] not in found:
        return True
    if at[0] != "optimizers" or len(at) < 3:
        return False
    return not {"PopRiskAdamW"} & {str(c.get("class")).rpartition(".")[2] for c in (found, wanted)}


def _equal(found: Any, wanted: Any, at: tuple[str, ...]) -> bool:
    if at[:2] == ("task", "start"):
        return math.isclose(found, wanted, rel_tol=TOL)
    return json.dumps(found) == json.dumps(wanted)


def _said(at: tuple[str, ...], found: Any, wanted: Any) -> str:
    """A difference in a few words; hashes and what is long go unquoted."""
    place = ".".join(at)
    if at[:2] == ("task", "sources") and len(at) == 3:
        return f"the source of module {at[2]}"
    if place in HASHED:
        return f"{place}: {HASHED[place]}"
    values = [f"{v:.6g}" if isinstance(v, float) else json.dumps(v) for v in (found, wanted)]
    return place if max(map(len, values)) > 40 else f"{place}: {values[0]} there, {values[1]} now"


@final
class RunDirectory:
    """Reads and writes one run directory; see :class:`poprisk_lab.store.RecordDirectory`."""

    def __init__(self, path: Path) -> None:
        self._record = RecordDirectory(
            path,
            keys={"task", "arms", "seeds"},
            is_row=_is_row,
            differences=differences,
            take_up=with_more_seeds,
        )
        self.path, self.metrics = self._record.path, self._record.metrics
        self.checkpoints = self._record.checkpoints

    def create(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Make the directory, or check that an existing one can go on under a configuration.

        One of other seeds is extended to both; all else must be the same.

        Raises:
            RunDirectoryError: if it cannot be written, is not a run directory, or holds another
                configuration; nothing is changed then.
        """
        self._record.create(config, environment)

    def exists(self) -> bool:
        """Whether there is a configuration, so that it can be read."""
        return os.path.isfile(self.path / "config.json")

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
