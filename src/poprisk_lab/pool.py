"""Where trials are done: what the runner asks of it, and the processes of this machine."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Protocol, TypeVar, final

from poprisk_lab.store import Store
from poprisk_lab.study import Run, Share, Trial
from poprisk_lab.work import TrainingError, compute_as_a_worker, do_trial

H = TypeVar("H")
"""What stands for trials that were begun: a future, a job."""
POLL_SECONDS = 0.1


class Pool(Protocol[H]):
    """Where trials are done.

    Attributes:
        at_once: most shares at once.
        patient: whether the others go on when one fails.
    """

    at_once: int
    patient: bool

    def adopted(self, store: Store) -> Mapping[H, Share]:
        """What a process before this one has begun there and is still under way."""
        ...

    def shares(self, trials: Sequence[Trial]) -> list[Share]:
        """The trials as they are to be begun; one share waits for what its trials come after."""
        ...

    def submit(self, run: Run, store: Store, shares: Sequence[Share]) -> list[H]:
        """Begin shares."""
        ...

    def wait(self, handles: Collection[H]) -> set[H]:
        """Wait until one is done, or for a moment; return those that are."""
        ...

    def error(self, handle: H) -> Exception | None:
        """How one that is done failed; None if it did not."""
        ...

    def close(self) -> None:
        """End what is still under way."""
        ...


@final
class ProcessPool:
    """Processes of this machine with one thread each, which end with this one.

    Args:
        workers: how many.
    """

    patient = False

    def __init__(self, workers: int) -> None:
        warm_up_workers()
        self.at_once = workers
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=worker_context(), initializer=_prepare
        )

    def adopted(self, store: Store) -> Mapping[concurrent.futures.Future[None], Share]:
        return {}

    def shares(self, trials: Sequence[Trial]) -> list[Share]:
        return [(trial,) for trial in trials]

    def submit(
        self, run: Run, store: Store, shares: Sequence[Share]
    ) -> list[concurrent.futures.Future[None]]:
        return [self._submit(run, store, trial) for share in shares for trial in share]

    def _submit(self, run: Run, store: Store, trial: Trial) -> concurrent.futures.Future[None]:
        record, workspace = store.begin(trial.name, trial.after)
        with _interrupts_held():  # a worker that is half started could not be ended
            return self._pool.submit(do_trial, run, trial, record, workspace)

    def wait(
        self, handles: Collection[concurrent.futures.Future[None]]
    ) -> set[concurrent.futures.Future[None]]:
        return concurrent.futures.wait(
            handles, POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        ).done

    def error(self, handle: concurrent.futures.Future[None]) -> Exception | None:
        error = handle.exception()
        if isinstance(error, BrokenProcessPool):
            return self._death()
        if error is None or isinstance(error, Exception):
            return error
        raise error

    def _death(self) -> TrainingError:
        """Which end a worker came to that did not raise; the pool has ended the others."""
        processes = [*(self._pool._processes or {}).values()]
        for process in processes:
            process.join(timeout=5)
        ends = [p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)]
        code = ends[0] if ends else None
        return TrainingError(f"a worker process died (exit code {code}; out of memory?).")

    def close(self) -> None:
        processes = [*(self._pool._processes or {}).values()]
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
            process.join()


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
    compute_as_a_worker()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
