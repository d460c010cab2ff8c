"""The directory of a study: configuration, environment, a record of every trial, checkpoints.

``config.json`` and ``environment.json`` are written once. Every attempt at a trial has a file of
its own in ``trials``, ``NAME.jsonl``, then ``NAME~1.jsonl`` …: one JSON object a line, flushed, so
that what is killed loses at most the line being written. An attempt claims its file by creating it
exclusively and is its only writer, so that any number of processes and machines can work in one
directory without a lock. Who finds a trial begun and not ended cannot know whether its process
still lives. It takes such a trial last, in an attempt of its own: trials repeat bit for bit, and
two attempts at one write the same rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, final

from poprisk_lab.checkpoint import Workspace

FORMAT = 1
SHOWN = 4
"""Differences that a message names."""

Config = dict[str, Any]
Row = dict[str, Any]


class RunDirectoryError(ValueError):
    """A run directory that cannot be used; the message says why and what to do."""


def differing_keys(found: Config, wanted: Config) -> list[str]:
    """The keys at which two configurations differ as JSON."""
    return sorted(
        key
        for key in {*found, *wanted}
        if json.dumps(found.get(key), sort_keys=True) != json.dumps(wanted.get(key), sort_keys=True)
    )


class Kind(NamedTuple):
    """What the directories of one kind of study hold.

    Attributes:
        keys: that ``config.json`` must have.
        is_row: whether a JSON object is a row of a record; may raise TypeError or KeyError.
        differences: what keeps a directory of the first configuration from going on under the
            second, in a few words each.
        extend: the configuration to keep when the first goes on as the second.
        anew: how to begin from the start, where a directory holds something else.
        files: that versions before wrote without a record; they keep no directory from being used.
        results: files in which a command tells what the trials found; they go when the trials do.
    """

    keys: frozenset[str]
    is_row: Callable[[Row], bool]
    differences: Callable[[Config, Config], list[str]] = differing_keys
    extend: Callable[[Config, Config], Config] = lambda found, wanted: found
    anew: str = "choose another directory with --out"
    files: frozenset[str] = frozenset()
    results: frozenset[str] = frozenset()


@dataclass
class Record:
    """The file of one attempt at a trial, for its only writer and for who follows it."""

    path: Path
    position: int = field(default=0, init=False)

    def append(self, row: Row) -> None:
        """Add one row and flush it.

        Raises:
            RunDirectoryError: if it was deleted or cannot be written.
        """
        with _writing(self.path, "what it holds is kept, repeat the command to go on"):
            try:
                with open(self.path, "a", encoding="utf-8", opener=_open_existing) as file:
                    file.write(json.dumps(row) + "\n")
            except FileNotFoundError:
                raise self._deleted() from None

    def new_rows(self) -> list[Row]:
        """The rows that were added since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            raise self._deleted() from None
        self.position += sum(len(line) + 1 for line in lines)
        return [json.loads(line) for line in lines]

    def _deleted(self) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.path} was deleted while its trial ran, and with it what it held; start anew in "
            "another directory with --out."
        )


@final
class Store:
    """Reads and writes one directory; see the text of this module.

    Args:
        path: where it is, or will be.
        kind: of what study.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        self.trials, self.checkpoints = path / "trials", path / "checkpoints"
        self.jobs = path / "jobs"
        """What a cluster's scheduler is handed, and its logs."""
        self._old = path / "metrics.jsonl"
        """The rows of all trials in one file, as versions before wrote them; only read."""

    def exists(self) -> bool:
        """Whether there is a configuration, so that it can be read."""
        return os.path.isfile(self.path / "config.json")

    def create(self, config: Config, environment: dict[str, Any], *, fresh: bool = False) -> None:
        """Make the directory, or check that an existing one can go on under a configuration.

        Args:
            config: what ``config.json`` is to hold.
            environment: likewise.
            fresh: whether to delete what a run directory of this kind holds, all else that lies in
                it stays. Its configuration is the last to go: what is killed on the way is a run
                directory still.

        Raises:
            RunDirectoryError: if it cannot be written, is not a run directory, or holds another
                configuration; nothing is changed then.
        """
        with _writing(f"the run directory {self.path}", "choose another with --out"):
            # First, as others may be making it at this moment: config.json is their last file.
            blank = not self.path.exists() or self._is_blank()
            if self.exists() and fresh:
                self.config()  # of this kind
                told = [self.path / name for name in self.kind.results]
                folders = (self.trials, self.checkpoints, self.jobs)
                kept = [file for folder in folders for file in folder.glob("*")]
                for file in [*told, *kept, self._old]:
                    file.unlink(missing_ok=True)
            elif self.exists():
                found = self._check_same(config)
                self._make_folders()
                if (kept := self.kind.extend(found, config)) != found:
                    write_json(self.path / "config.json", kept)
                return
            elif not blank:
                raise RunDirectoryError(
                    f"{self.path} exists and is not a run directory (no config.json); choose "
                    "another with --out."
                )
            self._make_folders()
            write_json(self.path / "environment.json", environment)
            write_json(self.path / "config.json", config)

    def config(self) -> Config:
        """What ``config.json`` holds.

        Raises:
            RunDirectoryError: if it is missing, damaged or of another kind.
        """
        config = self._read_json("config.json")
        known = isinstance(config, dict) and config.get("format") == FORMAT
        if known and "audit" in config and "audit" not in self.kind.keys:
            raise RunDirectoryError(
                f"{self.path} holds an audit and no comparison; choose another with --out."
            )
        if known and "explain" in config and "explain" not in self.kind.keys:
            raise RunDirectoryError(
                f"{self.path} holds an explanation, whose page is its report.html; repeat its "
                "poprisk explain command to write it again."
            )
        if not known or not self.kind.keys <= config.keys():
            raise RunDirectoryError(
                f"{self.path / 'config.json'} is not of format {FORMAT}; it was written by another "
                "version of poprisk or damaged."
            )
        return config

    def environment(self) -> dict[str, Any]:
        """What ``environment.json`` holds."""
        return self._read_json("environment.json")

    def rows(self, names: Iterable[str]) -> dict[str, list[Row]]:
        """The rows of trials, of one attempt after the other; a torn last line is left out.

        Raises:
            RunDirectoryError: if a record is damaged, or there are none at all.
        """
        if not self._old.exists() and not self.trials.is_dir():
            raise RunDirectoryError(f"{self.path} is not a run directory: it has no trials.")
        old = self._old_rows()
        return {
            name: [
                *old.get(name, ()),
                *(row for path in self.attempts(name) for row in self._read_rows(path)),
            ]
            for name in names
        }

    def attempts(self, name: str) -> list[Path]:
        """The records of the attempts at a trial, the first one first."""
        found = list[Path]()
        while (path := self.trials / _numbered(name, len(found), ".jsonl")).exists():
            found.append(path)
        return found

    def is_begun(self, name: str) -> bool:
        """Whether a process may be at work on a trial: it was begun, and has not failed."""
        found = self.attempts(name)
        rows = self._read_rows(found[-1]) if found else []
        return bool(found) and not (rows and rows[-1]["event"] == "failed")

    def begin(self, name: str, after: Iterable[str] = ()) -> tuple[Record, Workspace]:
        """Claim a new attempt at a trial, which takes up what those before it have left.

        Args:
            name: of the trial.
            after: the trials whose products it is given.

        Raises:
            RunDirectoryError: if its record cannot be made.
        """
        for k in count(len(self.attempts(name))):
            path = self.trials / _numbered(name, k, ".jsonl")
            with _writing(f"the run directory {self.path}", "choose another with --out"):
                try:
                    path.open("x").close()
                except FileExistsError:
                    continue  # another process was faster
            return Record(path), Workspace(
                self._checkpoint(name, k),
                earlier=[self._checkpoint(name, j) for j in reversed(range(k))],
                product=self._checkpoint(f"trace-{name}", k),
                given={other: file for other in after if (file := self.product(other))},
            )
        raise AssertionError  # count does not end

    def product(self, name: str) -> Path | None:
        """What a trial keeps for those after it; None if it has not."""
        attempts = range(max(1, len(self.attempts(name))))
        files = (self._checkpoint(f"trace-{name}", k) for k in reversed(attempts))
        return next((file for file in files if file.exists()), None)

    def _checkpoint(self, name: str, k: int) -> Path:
        return self.checkpoints / _numbered(name, k, ".safetensors")

    def _make_folders(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.trials.mkdir(exist_ok=True)

    def _is_blank(self) -> bool:
        """Whether it is a directory with no more in it than an interrupted ``create`` leaves."""

        def left_over(p: Path) -> bool:
            if p.is_dir():
                return p in (self.checkpoints, self.trials) and not any(p.iterdir())
            return p.suffix == ".tmp" or p.name in {"environment.json", *self.kind.files}

        return self.path.is_dir() and all(left_over(p) for p in self.path.iterdir())

    def _check_same(self, config: Config) -> Config:
        found = self.config()
        self.environment()  # damage anywhere is told
        self.rows(path.stem.partition("~")[0] for path in self.trials.glob("*.jsonl"))
        differ = self.kind.differences(found, config)
        if not differ:
            return found
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise RunDirectoryError(
            f"{self.path} holds a run with another configuration (it differs in "
            f"{', '.join(differ[:SHOWN])}{more}); repeat that command to resume it, or "
            f"{self.kind.anew}."
        )

    def _old_rows(self) -> dict[str, list[Row]]:
        """The rows of the one file that versions before wrote, by trial."""
        found: dict[str, list[Row]] = {}
        for row in self._read_rows(self._old) if self._old.exists() else ():
            name = row["trial"] if "trial" in row else f"{row['arm']}-{row['seed']}"
            found.setdefault(name, []).append(row)
        return found

    def _read_rows(self, path: Path) -> list[Row]:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(self._damaged(path, str(error))) from error
        rows = list[Row]()
        for number, line in enumerate(lines[:-1], start=1):  # the last piece was torn, or is empty
            row: Row = {}
            try:
                row = {"event": "end", **json.loads(line)}  # rows of old claims have no event
                valid = row["event"] == "failed" or self.kind.is_row(row)
            except (json.JSONDecodeError, TypeError, KeyError):
                valid = False
            if not valid:
                found = f"line {number} is not a record: {line[:60]!r}"
                raise RunDirectoryError(self._damaged(path, found))
            rows.append(row)
        return rows

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunDirectoryError(
                f"{self.path} is not a run directory: it has no {name}."
            ) from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(self._damaged(self.path / name, str(error))) from error

    def _damaged(self, path: Path, found: str) -> str:
        return (
            f"{path} is damaged: {found}. Nothing was changed; mend the file, or start anew in "
            "another directory with --out."
        )


@contextmanager
def _writing(what: Path | str, advice: str) -> Iterator[None]:
    """Tell an error of the disk in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunDirectoryError(f"cannot write {what}: {reason}; {advice}.") from error


def _numbered(name: str, k: int, suffix: str) -> str:
    return f"{name}~{k}{suffix}" if k else f"{name}{suffix}"


def _open_existing(path: str, flags: int) -> int:
    """Open a file without making it: a record that was deleted must not go on half empty."""
    return os.open(path, flags & ~os.O_CREAT)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 atomically: a reader sees the old one or the new one.

    Raises:
        OSError: if it cannot be written; an existing file is left as it was.
    """
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, as :func:`replace_text`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def end_of(rows: Sequence[Row]) -> Row | None:
    """The row with which a trial ended; None if it has not."""
    return next((row for row in reversed(rows) if row["event"] == "end"), None)
