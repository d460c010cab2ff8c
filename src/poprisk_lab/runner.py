"""Do the trials of a study in worker processes; stopped at any moment, the next call goes on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from poprisk._validate import first_line
from poprisk_lab.pool import Pool, ProcessPool, Share
from poprisk_lab.store import Record, Store
from poprisk_lab.study import Run, Trial, left
from poprisk_lab.work import OnRow, do_here, done_meanwhile, joined, next_share

PACKAGES = ("poprisk", "poprisk_lab")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Raise ValueError unless tensors can be computed with on ``device``."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error


def code_fingerprint() -> str:
    """A hash of the sources of both packages, which tells commits of one version apart."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(p for name in PACKAGES for p in (folder / name).rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def environment(workers: int) -> dict[str, str | int]:
    """What the numbers were computed with."""
    packages = ("torch", "numpy", "scikit-learn", "pytorch-optimizer")
    return {
        "poprisk": metadata.version("poprisk"),
        "code": code_fingerprint(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "workers": max(workers, 1),
        "threads per worker": 1 if workers else torch.get_num_threads(),
    }


def run_trials(
    trials: Sequence[Trial], run: Run, store: Store, *, workers: int | Pool[Any], on_row: OnRow
) -> None:
    """Do every trial that the directory does not hold yet; ``on_row`` gets each recorded row.

    Several processes may do this in one directory at once: they share the trials.

    Args:
        trials: in the order to begin them.
        run: does one; picklable where there are workers.
        store: their directory.
        workers: processes with one thread each; 0: this process, with the threads that it has; a
            pool, which is closed at the end: where it does them.
        on_row: called here.

    Raises:
        TrainingError: if a trial fails; the others up to then are kept.
        TaskError: if the task fails for a seed.
        NotAnalysable: if a run of the task cannot be followed.
        RunDirectoryError: if a checkpoint is damaged or a record cannot be written.
    """
    waiting = left(trials, store)
    if workers == 0 or (isinstance(workers, int) and not waiting):
        do_here(run, store, waiting, on_row)
        return
    pool = ProcessPool(min(workers, len(waiting))) if isinstance(workers, int) else workers
    try:
        _work_off(run, store, waiting, pool, on_row)
    finally:
        pool.close()


def _work_off(run: Run, store: Store, waiting: list[Trial], pool: Pool[Any], on_row: OnRow) -> None:
    undone, errors = {trial.name for trial in waiting}, list[Exception]()
    running = {
        handle: [_Followed(store, t, before=0) for t in share if t.name in undone]
        for handle, share in pool.adopted(store).items()
    }
    taken = {one.trial.name for followed in running.values() for one in followed}
    shares = pool.shares([trial for trial in waiting if trial.name not in taken])
    while True:
        begun = list[Share]()
        while len(running) + len(begun) < pool.at_once and (
            share := next_share(shares, undone, store)
        ):
            shares.remove(share)
            if rest := _rest(share, undone, store, on_row):
                begun.append(rest)
        followed = [[_Followed(store, trial) for trial in share] for share in begun]
        running.update(zip(pool.submit(run, store, begun), followed, strict=True))
        if not running:
            break
        done = pool.wait(running)
        for one in (one for followed in running.values() for one in followed):
            one.tell(on_row)
        for handle in done:
            names = {one.trial.name for one in running.pop(handle)}
            if (error := pool.error(handle)) is None:
                undone -= names
            elif not pool.patient:
                raise error
            else:
                errors.append(error)
    if errors:
        raise joined(errors)


def _rest(share: Share, undone: set[str], store: Store, on_row: OnRow) -> Share:
    """What another process has not done meanwhile of a share; the others' ends are told."""
    ends = {trial.name: done_meanwhile(trial, store) for trial in share}
    for trial in share:
        if (end := ends[trial.name]) is not None:
            undone.discard(trial.name)
            on_row(trial, end)
    return tuple(trial for trial in share if ends[trial.name] is None)


class _Followed:
    """The rows of a trial in the works, up to the first with which an attempt ends it.

    Args:
        store: its directory.
        trial: which.
        before: how many attempts belong to the past; those that are there if left out.
    """

    def __init__(self, store: Store, trial: Trial, before: int | None = None) -> None:
        self.store, self.trial = store, trial
        self.before = len(store.attempts(trial.name)) if before is None else before
        self.records, self.ended = list[Record](), False

    def tell(self, on_row: OnRow) -> None:
        """Hand on the rows that were added since the last call."""
        attempts = self.store.attempts(self.trial.name)[self.before + len(self.records) :]
        self.records += map(Record, attempts)
        for row in (row for record in self.records for row in record.new_rows()):
            if row["event"] != "failed" and not self.ended:
                on_row(self.trial, row)
            self.ended |= row["event"] == "end"
