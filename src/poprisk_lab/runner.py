"""Do the trials of a study in worker processes; stopped at any moment, the next call goes on."""

from __future__ import annotations

import concurrent.futures
import hashlib
import multiprocessing
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple

import torch

from poprisk._validate import NotAnalysable, first_line
from poprisk_lab.checkpoint import CheckpointError, Workspace
from poprisk_lab.store import Record, Row, RunDirectoryError, Store, end_of
from poprisk_lab.study import Run, Trial, left
from poprisk_lab.tasks import TaskError

OnRow = Callable[[Trial, Row], None]
POLL_SECONDS = 0.1
PACKAGES = ("poprisk", "poprisk_lab")


class TrainingError(RuntimeError):
    """A trial that failed in a worker; the message names it and ends with its traceback."""


class _Job(NamedTuple):
    """A trial in the works, the record that it writes, and the files that it has."""

    trial: Trial
    record: Record
    workspace: Workspace


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
    trials: Sequence[Trial], run: Run, store: Store, *, workers: int, on_row: OnRow
) -> None:
    """Do every trial that the directory does not hold yet; ``on_row`` gets each recorded row.

    Several processes may do this in one directory at once: they share the trials.

    Args:
        trials: in the order to begin them.
        run: does one; picklable where there are workers.
        store: their directory.
        workers: processes with one thread each; 0: this process, with the threads that it has.
        on_row: called here.

    Raises:
        TrainingError: if a trial fails; the others up to then are kept.
        TaskError: if the task fails for a seed.
        NotAnalysable: if a run of the task cannot be followed.
        RunDirectoryError: if a checkpoint is damaged or a record cannot be written.
    """
    waiting = left(trials, store)
    if not workers:
        return _work_here(run, store, waiting, on_row)
    if not waiting:
        return
    warm_up_workers()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers := min(workers, len(waiting)), mp_context=worker_context(), initializer=_prepare
    )
    try:
        _work_off(run, store, waiting, pool, workers, on_row)
    except BrokenProcessPool:
        raise _death(pool) from None
    finally:
        _stop(pool)


def _work_here(run: Run, store: Store, waiting: list[Trial], on_row: OnRow) -> None:
    while trial := _next(waiting, {t.name for t in waiting}, store):
        waiting.remove(trial)
        record, workspace = store.begin(trial.name, trial.after)
        _do(run, trial, record, workspace, partial(on_row, trial))


def _work_off(
    run: Run,
    store: Store,
    waiting: list[Trial],
    pool: concurrent.futures.ProcessPoolExecutor,
    workers: int,
    on_row: OnRow,
) -> None:
    running: dict[concurrent.futures.Future[None], _Job] = {}
    while waiting or running:
        undone = {t.name for t in waiting} | {job.trial.name for job in running.values()}
        while len(running) < workers and (trial := _next(waiting, undone, store)) is not None:
            waiting.remove(trial)
            end = end_of(store.rows([trial.name])[trial.name])
            if end is not None and (not trial.keeps or store.product(trial.name)):
                undone.discard(trial.name)  # another process has done it meanwhile
                on_row(trial, end)
                continue
            job = _Job(trial, *store.begin(trial.name, trial.after))
            with _interrupts_held():  # a worker that is half started could not be ended
                running[pool.submit(_do, run, *job)] = job
        done, _ = concurrent.futures.wait(
            running, POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for job in running.values():
            for row in job.record.new_rows():
                if row["event"] != "failed":
                    on_row(job.trial, row)
        for future in done:
            future.result()
            del running[future]


def _next(waiting: list[Trial], undone: set[str], store: Store) -> Trial | None:
    """The trial to begin: the first that can be, but last those that others may be at work on."""
    ready = [trial for trial in waiting if undone.isdisjoint(trial.after)]
    return min(ready, key=lambda trial: store.is_begun(trial.name), default=None)


def _do(
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


def _death(pool: concurrent.futures.ProcessPoolExecutor) -> TrainingError:
    """Which end a worker came to that did not raise; the pool has ended the others."""
    processes = [*(pool._processes or {}).values()]
    for process in processes:
        process.join(timeout=5)
    ends = [p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)]
    code = ends[0] if ends else None
    return TrainingError(f"a worker process died (exit code {code}; out of memory?).")


def worker_context() -> BaseContext:
    """How workers are started: forked from a server where there is one, else from nothing."""
    methods = multiprocessing.get_all_start_methods()  # Windows has no forkserver
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def warm_up_workers() -> None:
    """Let the process that workers are forked from begin its imports; they take seconds.

    It ignores Ctrl-C, which is the parent's to handle.
    """
    context = worker_context()
    if context.get_start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    # Constructing any torch optimizer imports torch._dynamo, a second of work: once for all.
    context.set_forkserver_preload(["poprisk_lab.fit", "torch._dynamo"])
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        forkserver.ensure_running()
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by it and by the workers
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = list[int]()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def _prepare() -> None:
    """Begin a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not hand it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """End the workers, working or not."""
    processes = [*(pool._processes or {}).values()]
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
        process.join()
