"""Do trials in this process, one after the other: what every worker does, wherever it is."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from poprisk._validate import NotAnalysable
from poprisk_lab.checkpoint import CheckpointError, Workspace
from poprisk_lab.store import Record, Row, RunDirectoryError, Store, end_of
from poprisk_lab.study import Run, Share, Trial
from poprisk_lab.tasks import TaskError

OnRow = Callable[[Trial, Row], None]


class TrainingError(RuntimeError):
    """A trial that failed in a worker; the message names it and ends with its traceback."""


def joined(errors: Sequence[Exception]) -> Exception:
    """Several failures as one, each told once."""
    texts = dict.fromkeys(str(error) for error in errors)
    return errors[0] if len(texts) == 1 else TrainingError("\n".join(texts))


def compute_as_a_worker() -> None:
    """Set what all workers compute with, so that their numbers are the same bit for bit."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def do_here(run: Run, store: Store, trials: Sequence[Trial], on_row: OnRow) -> None:
    """Do trials in this process, but those that another has done meanwhile.

    Raises:
        TrainingError, TaskError, NotAnalysable, RunDirectoryError: as
            :func:`poprisk_lab.runner.run_trials`.
    """
    waiting: list[Share] = [(trial,) for trial in trials]
    while share := next_share(waiting, {t.name for one in waiting for t in one}, store):
        waiting.remove(share)
        (trial,) = share
        if (end := done_meanwhile(trial, store)) is not None:
            on_row(trial, end)
            continue
        record, workspace = store.begin(trial.name, trial.after)
        do_trial(run, trial, record, workspace, partial(on_row, trial))


def next_share(waiting: Sequence[Share], undone: set[str], store: Store) -> Share | None:
    """What to begin: the first that can be, but last what others may be at work on."""

    def waits(share: Share) -> bool:
        return bool(undone & {name for t in share for name in t.after} - {t.name for t in share})

    ready = [share for share in waiting if not waits(share)]
    return min(ready, key=lambda s: all(store.is_begun(t.name) for t in s), default=None)


def done_meanwhile(trial: Trial, store: Store) -> Row | None:
    """The row with which a trial has ended, its product kept; None if there is more to do."""
    end = end_of(store.rows([trial.name])[trial.name])
    return None if trial.keeps and store.product(trial.name) is None else end


def do_trial(
    run: Run,
    trial: Trial,
    record: Record,
    workspace: Workspace,
    on_row: Callable[[Row], None] = lambda row: None,
) -> None:
    """Do one trial."""
    started = time.monotonic()

    def tell(row: Row) -> None:
        record.append(row)
        on_row(row)

    workspace.on_row = tell
    try:
        found = run(trial.settings, workspace)
        if isinstance(found, dict):
            found = [{"event": "end", "seconds": time.monotonic() - started, "found": found}]
        for row in found:
            tell(row)
    except Exception as error:
        told = _told(trial, error)
        record.append({"event": "failed"})  # so that others need not wait for it
        raise told from None
    workspace.clear()


def _told(trial: Trial, error: Exception) -> Exception:
    if isinstance(error, (TaskError, RunDirectoryError, NotAnalysable)):
        return error
    if isinstance(error, CheckpointError):
        return RunDirectoryError(str(error))
    last = traceback.format_exc().strip()
    return TrainingError(f"{trial.label or f'trial {trial.name}'} failed:\n{last}")
