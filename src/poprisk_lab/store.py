"""A directory that holds a configuration, its environment, an append-only record and checkpoints.

``config.json`` and ``environment.json`` are written once; ``metrics.jsonl`` gets one JSON object
a line, flushed, so that a killed run loses at most the line being written.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
LOCK = ".lock"
"""Of the process that writes; where the system locks by the file's being there, it ends with it."""


SHOWN = 4
"""Differences that a message names."""

Config = dict[str, Any]


class RunDirectoryError(ValueError):
    """A run directory that cannot be used; the message says why and what to do."""


def differing_keys(found: Config, wanted: Config) -> list[str]:
    """The keys at which two configurations differ as JSON."""
    return sorted(
        key
        for key in {*found, *wanted}
        if json.dumps(found.get(key), sort_keys=True) != json.dumps(wanted.get(key), sort_keys=True)
    )


class RecordDirectory:
    """Reads and writes one directory.

    Args:
        path: where it is, or will be.
        keys: that ``config.json`` must have.
        is_row: whether a JSON value is a row of the record; may raise TypeError or KeyError.
        differences: what keeps a directory of the first configuration from going on under the
            second, in a few words each.
        take_up: the configuration to keep when the first goes on as the second.
    """

    def __init__(
        self,
        path: Path,
        *,
        keys: set[str],
        is_row: Callable[[Any], bool],
        differences: Callable[[Config, Config], list[str]] = differing_keys,
        take_up: Callable[[Config, Config], Config] = lambda found, wanted: found,
    ) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self._keys, self._is_row = keys, is_row
        self._differences, self._take_up = differences, take_up

    def create(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Make the directory, or check that an existing one can go on under a configuration.

        Raises:
            RunDirectoryError: if it cannot be written, is not a run directory, or holds another
                configuration; nothing is changed then.
        """
        try:
            if (self.path / "config.json").exists():
                self._check_same(config)
                with self.locked():
                    self._drop_torn_line()
                    found = self.config()
                    kept = self._take_up(found, config)
                    if kept != found:
                        write_json(self.path / "config.json", kept)
                self.checkpoints.mkdir(exist_ok=True)
                return
            if self.path.exists() and not self._is_blank():
                raise RunDirectoryError(
                    f"{self.path} exists and is not a run directory (no config.json); choose "
                    "another with --out."
                )
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "environment.json", environment)
            self.metrics.touch()
            write_json(self.path / "config.json", config)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write the run directory {self.path}: {error.strerror or error}; choose "
                "another with --out."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here.

        Raises:
            RunDirectoryError: if one is writing already.
        """
        lock = _file_lock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            raise RunDirectoryError(
                f"another process is working in {self.path}; wait for it, or choose another "
                "directory with --out."
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write the run directory {self.path}: {error.strerror or error}; choose "
                "another with --out."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row to the record and flush it."""
        try:
            with open(self.metrics, "a", encoding="utf-8", opener=_open_existing) as file:
                file.write(json.dumps(row) + "\n")
        except FileNotFoundError:
            raise RunDirectoryError(
                f"{self.metrics} was deleted while runs were being trained, and with it what it "
                "held; start anew in another directory with --out."
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write {self.metrics}: {error.strerror or error}; what it holds is kept, "
                "repeat the command to go on."
            ) from error

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds.

        Raises:
            RunDirectoryError: if it is missing, damaged or of another kind.
        """
        config = self._read_json("config.json")
        known = isinstance(config, dict) and config.get("format") == FORMAT
        if not known or not self._keys <= config.keys():
            raise RunDirectoryError(
                f"{self.path / 'config.json'} is not of format {FORMAT}; it was written by another "
                "version of poprisk or damaged."
            )
        return config

    def environment(self) -> dict[str, Any]:
        """What ``environment.json`` holds."""
        return self._read_json("environment.json")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the record; a torn last line is left out."""
        try:
            lines = self.metrics.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(self._damaged("metrics.jsonl", str(error))) from error
        rows = []
        for number, line in enumerate(lines[:-1], start=1):  # the last piece was torn, or is empty
            row: dict[str, Any] = {}
            try:
                row = json.loads(line)
                valid = self._is_row(row)
            except (json.JSONDecodeError, TypeError, KeyError):
                valid = False
            if not valid:
                found = f"line {number} is not a record: {line[:60]!r}"
                raise RunDirectoryError(self._damaged("metrics.jsonl", found))
            rows.append(row)
        return rows

    def _is_blank(self) -> bool:
        """Whether it is a directory with no more in it than an interrupted ``create`` leaves."""

        def left_over(p: Path) -> bool:
            if p.is_dir():
                return p == self.checkpoints and not any(p.iterdir())
            empty = p in (self.metrics, self.path / LOCK) and p.stat().st_size == 0
            return p.suffix == ".tmp" or p.name == "environment.json" or empty

        return self.path.is_dir() and all(left_over(p) for p in self.path.iterdir())

    def _check_same(self, config: dict[str, Any]) -> None:
        found, _, _ = self.config(), self.environment(), self.rows()  # damage anywhere is told
        differ = self._differences(found, config)
        if not differ:
            return
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise RunDirectoryError(
            f"{self.path} holds a run with another configuration (it differs in "
            f"{', '.join(differ[:SHOWN])}{more}); repeat that command to resume it, or choose "
            "another directory with --out."
        )

    def _drop_torn_line(self) -> None:
        """Cut off a last line without a newline: the process was killed while writing it."""
        try:
            with self.metrics.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write {self.metrics}: {error.strerror or error}."
            ) from error

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunDirectoryError(
                f"{self.path} is not a run directory: it has no {name}."
            ) from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(self._damaged(name, str(error))) from error

    def _damaged(self, name: str, found: str) -> str:
        return (
            f"{self.path / name} is damaged: {found}. Nothing was changed; mend the file, or start "
            "anew in another directory with --out."
        )


def _file_lock(path: Path) -> Any:
    """The system's own lock of a file; a file that is made exclusively where it has none."""
    with warnings.catch_warnings():  # filelock says at import which of them it is
        warnings.simplefilter("ignore")
        import filelock

        return filelock.FileLock(path)


def _open_existing(path: str, flags: int) -> int:
    """Open a file without making it: a record that was deleted must not go on half empty."""
    return os.open(path, flags & ~os.O_CREAT)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
