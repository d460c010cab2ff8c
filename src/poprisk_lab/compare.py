"""Arms × seeds in worker processes, resumable, into a run directory."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from poprisk_lab.arms import Arm
from poprisk_lab.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from poprisk_lab.comparison import Comparison
from poprisk_lab.fit import Row, Run
from poprisk_lab.rundir import Key, RunDirectory, RunDirectoryError
from poprisk_lab.tasks import TaskError

OnRow = Callable[[Row], None]


class TrainingError(RuntimeError):
    """A run that failed in a worker; the message names it and ends with its traceback."""


def environment(workers: int) -> dict[str, str | int]:
    """What the numbers were computed with."""
    packages = ("torch", "numpy", "scikit-learn", "pytorch-optimizer")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "workers": workers,
        "threads per worker": 1,
    }


def compare(comparison: Comparison, directory: RunDirectory, on_row: OnRow) -> None:
    """Train every arm on every seed that the run directory does not hold yet.

    Rows go to the record, then to ``on_row``. Killed at any moment and called again, it goes on
    where it stopped and ends with the same numbers.

    Raises:
        TrainingError: if a run fails; the others up to then are kept.
        TaskError: if the task fails for a seed.
        RunDirectoryError: if a checkpoint is damaged or the record cannot be written.
    """
    with directory.locked():
        _compare(comparison, directory, on_row)


def _compare(comparison: Comparison, directory: RunDirectory, on_row: OnRow) -> None:
    ended = set(directory.read().ends)
    jobs = [
        (arm, seed)
        for seed in comparison.seeds
        for arm in comparison.arms
        if (arm.name, seed) not in ended or not _trace_kept(comparison, directory, arm, seed)
    ]
    if not jobs:
        return
    pool = _Pool(comparison, directory, min(comparison.workers, len(jobs)))
    try:
        pool.run(jobs, ended, on_row)
    finally:
        pool.close()


def _trace_path(directory: RunDirectory, arm: str, seed: int) -> Path:
    return directory.checkpoints / f"trace-{arm}-{seed}.safetensors"


def _trace_kept(comparison: Comparison, directory: RunDirectory, arm: Arm, seed: int) -> bool:
    return not comparison.is_followed(arm) or _trace_path(directory, arm.name, seed).exists()


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
    with _deaf_to_interrupts():
        forkserver.ensure_running()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside inherit that Ctrl-C is ignored, where the system hands it on."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class _Pool:
    """Worker processes, each with a pipe; a worker ends when its pipe does."""

    def __init__(self, comparison: Comparison, directory: RunDirectory, size: int) -> None:
        warm_up_workers()
        context: Any = worker_context()  # the type of a context does not tell its Process
        self.directory = directory
        self.workers: dict[Connection, BaseProcess] = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, comparison, directory.path), daemon=True
            )
            with _deaf_to_interrupts():
                process.start()
            theirs.close()
            self.workers[ours] = process

    def run(self, jobs: list[tuple[Arm, int]], ended: set[Key], on_row: OnRow) -> None:
        """Hand out jobs as their dependencies end, and record what comes back."""
        busy: set[Connection] = set()
        while jobs or busy:
            for pipe in self.workers.keys() - busy:
                job = next(
                    (j for j in jobs if j[0].follows is None or (j[0].follows, j[1]) in ended), None
                )
                if job is not None:
                    jobs.remove(job)
                    ended.discard((job[0].name, job[1]))
                    self._send(pipe, job)
                    busy.add(pipe)
            for pipe in wait(list(busy)):
                kind, content = self._receive(pipe)
                if kind == "error":
                    raise content
                if kind == "idle":
                    busy.discard(pipe)
                    continue
                self.directory.append(content)
                self._send(pipe, "recorded")
                if content["event"] == "end":
                    ended.add((content["arm"], content["seed"]))
                on_row(content)

    def _send(self, pipe: Any, message: Any) -> None:
        try:
            pipe.send(message)
        except ConnectionError:
            raise self._death(pipe) from None

    def _receive(self, pipe: Any) -> tuple[str, Any]:
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            raise self._death(pipe) from None

    def _death(self, pipe: Any) -> TrainingError:
        self.workers[pipe].join(timeout=5)
        return TrainingError(
            f"a worker process died (exit code {self.workers[pipe].exitcode}; out of memory?)."
        )

    def close(self) -> None:
        """End the workers, working or not."""
        for pipe, process in self.workers.items():
            pipe.close()
            process.terminate()
            process.join()


def _work(pipe: Connection, comparison: Comparison, path: Path) -> None:
    """Body of a worker: train what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not hand it on
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    directory = RunDirectory(path)
    try:
        while True:
            arm, seed = pipe.recv()
            try:
                _train(pipe, comparison, directory, arm, seed)
            except (ConnectionError, EOFError):
                raise
            except (TaskError, RunDirectoryError) as error:
                pipe.send(("error", error))
            except CheckpointError as error:
                kept = f"{error}; what was trained is kept, repeat the command to go on."
                pipe.send(("error", RunDirectoryError(kept)))
            except Exception:
                last = traceback.format_exc().strip()
                failure = TrainingError(f"arm {arm.name}, seed {seed} failed:\n{last}")
                pipe.send(("error", failure))
            pipe.send(("idle", None))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return  # the parent is gone or was interrupted


def _train(
    pipe: Connection, comparison: Comparison, directory: RunDirectory, arm: Arm, seed: int
) -> None:
    followed = comparison.is_followed(arm)
    trace = None
    if arm.follows is not None:
        trace = load_checkpoint(_trace_path(directory, arm.follows, seed))["rms"].tolist()
    run = Run(
        task=comparison.make_task(seed),
        arm=arm,
        seed=seed,
        trace=trace,
        record=followed,
        checkpoint=directory.checkpoints / f"{arm.name}-{seed}.safetensors",
        device=comparison.device,
        with_twin=comparison.twin and arm.can_have_twin,
    )
    try:
        run.resume()
    except Exception as error:
        raise RunDirectoryError(
            f"{run.checkpoint} is damaged: {error}. Nothing was changed; delete that file to train "
            "its run from the start."
        ) from error
    start = {"event": "start", "arm": arm.name, "seed": seed, "epoch": run.progress.epoch}
    _record(pipe, start)
    for row in run.rows():
        if row["event"] == "end" and followed:
            rms = torch.tensor(run.progress.trace, dtype=torch.float64)
            save_checkpoint(_trace_path(directory, arm.name, seed), {"rms": rms})
        _record(pipe, row)


def _record(pipe: Connection, row: Row) -> None:
    """Have a row recorded, and wait until it is: no checkpoint may be ahead of the record."""
    pipe.send(("row", row))
    pipe.recv()
