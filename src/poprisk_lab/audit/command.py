"""What ``poprisk audit`` does, without its options and its screen."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from poprisk.audit import AuditResult
from poprisk.task import Task
from poprisk_lab.audit import table
from poprisk_lab.audit.apply import SUSPECTS
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.plan import AUDIT, AuditPlan, fingerprint, plan_of
from poprisk_lab.audit.read import of_task, read_examples, refuse_options
from poprisk_lab.audit.study import Judgement, read_audit
from poprisk_lab.plots import Table
from poprisk_lab.runner import environment
from poprisk_lab.store import RunDirectoryError, Store
from poprisk_lab.tasks import BUILT_IN

SHOWN = 10
"""Suspects that the terminal shows."""

Reading = Mapping[str, Any]
"""How examples are read, as :func:`read_again` takes it, and the commands that go on from there."""


class Finished(NamedTuple):
    """An audit whose trainings have ended."""

    examples: AuditExamples
    store: Store
    judged: Judgement

    @property
    def source(self) -> str:
        """What was audited, as it was called."""
        return str(self.store.config()["audit"]["source"])

    def command(self, name: str) -> str:
        """What to type next, ``folds`` or ``apply``; empty if there is nothing."""
        return (self.store.config().get("read") or {}).get(name, "")


def is_task(source: str) -> bool:
    """Whether a source is a task, and no file of data."""
    return source in BUILT_IN or re.search(r"\.py(:|$)", source) is not None


def directory_for(source: str, names: Sequence[str], end: str = "") -> Path:
    """Where an audit is kept if nobody says it: no place that is of another source.

    Args:
        source: what is audited, as it was called.
        names: for the directory, the first one if it can be.
        end: of its name.
    """
    digest = hashlib.sha256(str(Path(source).absolute()).encode()).hexdigest()[:8]
    places = [Path("runs") / f"{name}{end}" for name in (*names, f"{names[0]}-{digest}")]
    return next((place for place in places if not _is_of_another(place, source)), places[-1])


def _is_of_another(directory: Path, source: str) -> bool:
    """Whether a directory is of an audit of something else that is still there.

    What has gone may have been moved, and its audit goes on.
    """
    try:
        config = Store(directory, AUDIT).config()
    except RunDirectoryError:
        return False
    called = config["audit"]["source"]
    there = (config.get("read") or {}).get("source", called)
    if called == source or is_task(called) or is_task(source):
        return called != source
    try:
        return not Path(there).samefile(source)
    except OSError:
        return False


def apply_command(source: str, *, label: str | None, labels: Path | None, kind: str | None) -> str:
    """The command that corrects the file of the labels; empty if there is none.

    Args:
        source: what is audited, as it was called.
        label: the column of labels.
        labels: the file of the labels, if it is another one.
        kind: of labels, as it was asked for.
    """
    file = source if labels is None else str(labels)
    if label is None or Path(file).suffix.lower() not in table.CSV:
        return ""
    of_kind = [] if kind is None else ["--kind", kind]
    return shlex.join(
        ["poprisk", "audit", file, "--label", label, *of_kind, "--apply", "marked.csv"]
    )


def read_again(reading: Reading) -> tuple[Task | None, AuditExamples]:
    """Examples, and the task that they are of.

    Args:
        reading: ``source``, ``label``, ``labels``, ``text``, ``kind``, ``side`` and ``seed``.

    Raises:
        TaskError, AuditInputError: if they cannot be read.
    """
    source, seed = reading["source"], reading["seed"]
    labels = reading["labels"]
    if is_task(source):
        given = {name: reading[name] for name in ("label", "labels", "text", "kind")}
        refuse_options("a task", **given, size=reading["side"])
        return of_task(source, seed)
    return None, read_examples(
        source,
        label=reading["label"],
        labels=None if labels is None else Path(labels),
        text=reading["text"],
        kind=reading["kind"],
        side=reading["side"],
        seed=seed,
    )


def start(
    examples: AuditExamples,
    plan: AuditPlan,
    source: str,
    reading: Reading | None = None,
    *,
    fresh: bool = False,
) -> Store:
    """Make the run directory, or check that the one there is of the same audit.

    Raises:
        RunDirectoryError: if it is not.
    """
    store = Store(plan.directory, AUDIT)
    store.create(plan.config(examples, source, reading), environment(1), fresh=fresh)
    return store


def is_audit(directory: Path) -> bool:
    """Whether a run directory is of an audit, and not of a comparison."""
    store = Store(directory, AUDIT._replace(keys=frozenset({"audit"})))
    try:
        store.config()
    except RunDirectoryError:
        return False
    return True


def reopen(directory: Path) -> Finished:
    """What was found, from its record and the data, which are read again.

    Raises:
        RunDirectoryError: if a training has not ended, or the data are other ones now.
        AuditInputError, TaskError: if they cannot be read.
    """
    store = Store(directory, AUDIT)
    config, plan = store.config(), plan_of(store)
    if (reading := config.get("read")) is None:
        raise RunDirectoryError(
            f"{directory} is of an earlier version, which did not keep how the data are read; "
            "repeat its poprisk audit command."
        )
    _, examples = read_again(reading)
    if fingerprint(examples) != config["data"]:
        raise RunDirectoryError(
            f"{reading['source']} is not what {directory} is an audit of: it has changed since."
        )
    return Finished(examples, store, read_audit(plan, examples.targets, store))


def write_tables(directory: Path, examples: AuditExamples, result: AuditResult) -> None:
    """Write the suspects, and all labels, as :meth:`poprisk.AuditResult.to_csv`: the worst first.

    Raises:
        OSError: if a file cannot be written.
    """
    write_table(directory / "suspects.csv", examples, result, result.suspects().tolist())
    order = np.lexsort((result.rank, result.rank < 0))  # those without a label last
    write_table(directory / "labels.csv", examples, result, order.tolist())


def write_table(
    path: Path, examples: AuditExamples, result: AuditResult, items: Iterable[int]
) -> None:
    """Rows of what was found, as CSV."""
    columns = result.columns(classes=examples.classes or None)
    confidence = columns.get("confidence")
    with _replaced(path) as file:
        rows = csv.writer(file)
        rows.writerow(SUSPECTS)
        for i in items:
            rows.writerow(
                [
                    i,
                    examples.name(i),
                    _text(columns["given"][i], exact=True),  # by which --apply knows the row
                    _text(columns["suggested"][i]),
                    int(result.suspect[i]),
                    "" if np.isnan(result.quality[i]) else f"{result.quality[i]:.4f}",
                    "" if result.rank[i] < 0 else result.rank[i],
                    "" if confidence is None else f"{confidence[i]:.4f}",
                ]
            )


@contextmanager
def _replaced(path: Path) -> Iterator[IO[str]]:
    """A file to write, which replaces that of its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def worst_table(examples: AuditExamples, result: AuditResult) -> Table:
    """The surest suspects, for a terminal."""
    columns = result.columns(classes=examples.classes or None)
    return Table(
        ["", "given", "suggested"],
        [
            [examples.name(i), _text(columns["given"][i]), _text(columns["suggested"][i])]
            for i in result.suspects()[:SHOWN].tolist()
        ],
    )


def _text(label: Any, *, exact: bool = False) -> str:
    """A label as people write it, numbers with six digits or all; empty where there is none."""
    if isinstance(label, float):
        written = repr(float(label)).removesuffix(".0") if exact else f"{label:.6g}"
        return "" if np.isnan(label) else written
    return "" if label is None else str(label)
