"""Arms × seeds in worker processes, resumable, into a run directory."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from poprisk.arms import Arm
from poprisk.checkpoint import load_checkpoint, save_checkpoint
from poprisk.rundir import FORMAT, Key, RunDirectory, RunDirectoryError
from poprisk.tasks import Task, TaskError, load_task
from poprisk.training import Row, Run

OnRow = Callable[[Row], None]


class TrainingError(RuntimeError):
    """A run that failed in a worker; the message names it and ends with its traceback."""


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Args:
        task: name of a built-in task, or ``path/to/file.py:function``.
        arms: unique names; an arm comes after the one it follows.
        seeds: of the task's data, the initial weights and the order of examples.
        settings: arguments of the task's function.
        epochs: in place of the task's own.
        full: whether these are all arms.
        device: where to train.
        workers: processes, each with one thread.
        twin: whether to estimate the risk of every arm that can have a twin.
    """

    task: str
    arms: list[Arm]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    full: bool = False
    device: str = "cpu"
    workers: int = 1
    twin: bool = False

    def __post_init__(self) -> None:
        before: set[str] = set()
        for arm in self.arms:
            if arm.follows is not None and arm.follows not in before:
                raise ValueError(f"arm {arm.name} must come after {arm.follows}, which it follows.")
            before.add(arm.name)

    def make_task(self, seed: int) -> Task:
        """The task with the data of one seed."""
        if "seed" in self.settings:
            raise TaskError("seed is no setting of a task; --seeds says how many are run.")
        task = load_task(self.task, seed=seed, **self.settings)
        if self.epochs is not None:
            object.__setattr__(task, "epochs", self.epochs)
        return task

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says; two runs with the same one are the same run."""
        _check_device(self.device)
        task = self.make_task(self.seeds[0])
        data = _fingerprint(self.task, task)
        if data != _fingerprint(self.task, self.make_task(self.seeds[0])):
            raise TaskError(
                f"task {self.task} gives other data each time it is made with the same seed; draw "
                "all of it from torch.Generator().manual_seed(seed)."
            )
        return {
            "format": FORMAT,
            "poprisk": metadata.version("poprisk"),
            "task": {
                "name": task.name,
                "source": self.task,
                "settings": self.settings,
                "description": task.description,
                "metric": {
                    "name": task.scored_by.name,
                    "higher_is_better": task.scored_by.higher_is_better,
                    "percent": task.scored_by.percent,
                },
                "classification": task.classification,
                "epochs": task.epochs,
                "batch_size": task.batch_size,
                "train_examples": len(task.train[1]),
                "test_examples": len(task.test[1]),
                "parameters": sum(p.numel() for p in task.new_model().parameters()),
                "data": data,
                "noise_known": task.noise_known,
            },
            "arms": [arm.as_json() for arm in self.arms],
            "seeds": self.seeds,
            "full": self.full,
            "device": self.device,
            **({"twin": True} if self.twin else {}),
        }


def _fingerprint(source: str, task: Task) -> str:
    """Tells tasks of one name apart: a hash of the data and of the task's file."""
    digest = hashlib.sha256()
    clean = () if task.clean is None else (task.clean,)
    for values in (*task.train, *task.test, *clean):
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path, colon, _ = source.rpartition(":")
    if colon:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _check_device(device: str) -> None:
    """Raise ValueError unless tensors can be computed with on ``device``."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error


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


def _is_followed(comparison: Comparison, arm: Arm) -> bool:
    return any(other.follows == arm.name for other in comparison.arms)


def _trace_kept(comparison: Comparison, directory: RunDirectory, arm: Arm, seed: int) -> bool:
    return not _is_followed(comparison, arm) or _trace_path(directory, arm.name, seed).exists()


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
    context.set_forkserver_preload(["poprisk.training", "torch._dynamo"])
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
    followed = _is_followed(comparison, arm)
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
