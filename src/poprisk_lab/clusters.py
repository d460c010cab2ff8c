"""Trials on many machines that share a directory: shards, jobs of Slurm, tasks of Ray."""

from __future__ import annotations

import concurrent.futures
import importlib
import logging
import os
import platform
import re
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

from poprisk._validate import first_line
from poprisk_lab.pool import Pool
from poprisk_lab.runner import environment
from poprisk_lab.store import Store, differing_keys
from poprisk_lab.study import Run, Share, Trial, chains, shards, with_earlier
from poprisk_lab.work import TrainingError, compute_as_a_worker, do_here, joined

KEPT = "what it recorded is kept, repeat the command to go on"
MACHINE = {"python", "system", "cores", "workers", "threads per worker"}
"""What workers may differ in from who begins them."""
CONSTRUCTED = ("cluster", "slurm_max_num_timeout", "slurm_python")
"""Settings that submitit takes when its executor is made; all others are parameters of jobs."""


def chosen(trials: Sequence[Trial], *, shard: str | None, only: Sequence[str]) -> list[Trial]:
    """The trials that one process is to do, with those that they come after.

    Args:
        trials: all of them; each has a method's name and a seed for its own.
        shard: ``I/N``, the I-th of N shares; None: all.
        only: ``METHOD:SEED``, trials by name; none: all.

    Raises:
        ValueError: if there is no such share or trial.
    """
    if shard is not None:
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError(
                f"--shard must be I/N with I from 1 to N, as in 2/8, but got {shard}; each of N "
                "processes does a share of the trainings."
            )
        return [*shards(trials, int(found[2]))[int(found[1]) - 1]]
    names = ["-".join(text.rsplit(":", 1)) if ":" in text else "" for text in only]
    for text, name in zip(only, names, strict=True):
        if name not in {trial.name for trial in trials}:
            methods = dict.fromkeys(trial.name.rpartition("-")[0] for trial in trials)
            seeds = dict.fromkeys(trial.name.rpartition("-")[2] for trial in trials)
            raise ValueError(
                f"--only must be METHOD:SEED, but got {text}; methods are {', '.join(methods)}, "
                f"seeds {', '.join(seeds)}."
            )
    return with_earlier(trials, names) if only else [*trials]


def do_share(
    run: Run, store: Store, share: Share, folder: str, made_with: Mapping[str, Any]
) -> Exception | None:
    """Do trials on a machine of a cluster; what a job or task is.

    Args:
        run: does one.
        store: their directory, which the machines share.
        share: one trial after the other; when one fails, those that do not come after it go on.
        folder: the working directory of who began it.
        made_with: the environment of who began it.

    Returns:
        What failed; None if nothing did.
    """
    errors = list[Exception]()
    try:
        os.chdir(folder)
        _check_environment(made_with)
    except Exception as error:
        return error
    compute_as_a_worker()
    for chain in chains(share):
        try:
            do_here(run, store, chain, lambda trial, row: None)
        except Exception as error:
            errors.append(error)
    return joined(errors) if errors else None


def _check_environment(made_with: Mapping[str, Any]) -> None:
    here = environment(1)
    differ = [key for key in differing_keys(here, {**made_with}) if key not in MACHINE]
    if differ:
        told = ", ".join(f"{k}: {here.get(k)} there, {made_with.get(k)} here" for k in differ)
        raise TrainingError(
            f"machine {platform.node()} would compute with other code ({told}); install the same "
            "on all machines, and repeat the command to go on."
        )


class _ShareOfAJob:
    """:func:`do_share` as submitit takes it, which a job that was cut off begins again."""

    def __call__(self, *arguments: Any) -> Exception | None:
        return do_share(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        """What to submit when the time of the job is up, or its machine is needed."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self, *arguments)


@final
class SlurmPool:
    """An array of jobs by submitit, each with a share; they live on without this process.

    Args:
        jobs: how many; None: one for each chain of trials.
        settings: of submitit: ``cluster``, ``slurm_max_num_timeout`` and ``slurm_python`` of its
            ``AutoExecutor``, all others of its ``update_parameters``.

    Raises:
        ValueError: if submitit is not installed, finds no Slurm or refuses a setting.
    """

    at_once, patient = sys.maxsize, True

    def __init__(self, jobs: int | None, settings: Mapping[str, Any]) -> None:
        self.jobs, self.settings = jobs, {"name": "poprisk", "timeout_min": 60, **settings}
        self._submitit = _extra("submitit", "slurm")
        self._unfinished = set[Any]()
        with tempfile.TemporaryDirectory() as folder:  # what is refused, is before anything is made
            self._executor(Path(folder))

    def _executor(self, folder: Path) -> Any:
        made = {key: value for key, value in self.settings.items() if key in CONSTRUCTED}
        more = {key: value for key, value in self.settings.items() if key not in CONSTRUCTED}
        try:
            found = self._submitit.AutoExecutor(folder, **{"cluster": "slurm", **made})
            found.update_parameters(**more)
        except (ValueError, TypeError, RuntimeError, NameError, AssertionError) as error:
            raise ValueError(f"submitit refuses: {' '.join(str(error).split())}") from error
        return found

    def adopted(self, store: Store) -> Mapping[Any, Share]:
        if self.settings.get("cluster", "slurm") != "slurm":
            return {}  # others cannot say whether a job lives that another process began
        ids = [p.name.removesuffix("_submitted.pkl") for p in store.jobs.glob("*_submitted.pkl")]
        jobs = [self._submitit.SlurmJob(store.jobs, one) for one in sorted(ids)]
        alive = [job for job in jobs if not job.done() and job.state != "UNKNOWN"]
        self._unfinished |= {*alive}
        return {job: job.submission().args[2] for job in alive}

    def shares(self, trials: Sequence[Trial]) -> list[Share]:
        found = chains(trials) if self.jobs is None else shards(trials, self.jobs)
        return [share for share in found if share]

    def submit(self, run: Run, store: Store, shares: Sequence[Share]) -> list[Any]:
        if not shares:
            return []
        executor, do = self._executor(store.jobs), _ShareOfAJob()
        with executor.batch():
            rest = os.getcwd(), environment(1)
            jobs = [executor.submit(do, run, store, share, *rest) for share in shares]
        self._unfinished |= {*jobs}
        return jobs

    def wait(self, handles: Collection[Any]) -> set[Any]:
        time.sleep(1)
        return {job for job in handles if job.done()}

    def error(self, handle: Any) -> Exception | None:
        self._unfinished.discard(handle)
        if (error := handle.exception()) is None:
            return handle.result()
        last = (str(error).strip().splitlines() or [""])[-1]
        return TrainingError(
            f"job {handle.job_id} died ({handle.state}; {last}); {KEPT}. Its log is "
            f"{handle.paths.stderr}."
        )

    def close(self) -> None:
        for job in self._unfinished:
            job.cancel(check=False)


@final
class RayPool:
    """A task of Ray for each trial, done again elsewhere when its process or machine dies.

    Args:
        at_once: most at once; None: as many as Ray has room for.
        settings: of tasks, as ``ray.remote`` takes them: ``num_gpus``, ``max_retries`` …

    Raises:
        ValueError: if Ray is not installed, cannot be reached or refuses a setting.
    """

    patient = True

    def __init__(self, at_once: int | None, settings: Mapping[str, Any]) -> None:
        self.at_once = at_once or sys.maxsize
        self._ray = _extra("ray", "ray")
        self._unfinished = dict[concurrent.futures.Future[Exception | None], Any]()
        self._mine = not self._ray.is_initialized()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unasked
        try:
            self._task = self._ray.remote(**{"num_cpus": 1, "max_retries": 3, **settings})(do_share)
            if self._mine:
                _check_reachable(os.environ.get("RAY_ADDRESS", ""))
                self._ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ValueError, TypeError, ConnectionError, RuntimeError) as error:
            raise ValueError(f"Ray refuses: {' '.join(str(error).split())}") from error

    def adopted(self, store: Store) -> Mapping[concurrent.futures.Future[Exception | None], Share]:
        return {}  # tasks end with the process that began them

    def shares(self, trials: Sequence[Trial]) -> list[Share]:
        return [(trial,) for trial in trials]

    def submit(
        self, run: Run, store: Store, shares: Sequence[Share]
    ) -> list[concurrent.futures.Future[Exception | None]]:
        begin = partial(self._task.remote, run, store)
        references = [begin(share, os.getcwd(), environment(1)) for share in shares]
        futures = [reference.future() for reference in references]
        self._unfinished.update(zip(futures, references, strict=True))
        return futures

    def wait(
        self, handles: Collection[concurrent.futures.Future[Exception | None]]
    ) -> set[concurrent.futures.Future[Exception | None]]:
        return concurrent.futures.wait(
            handles, 1, return_when=concurrent.futures.FIRST_COMPLETED
        ).done

    def error(self, handle: concurrent.futures.Future[Exception | None]) -> Exception | None:
        del self._unfinished[handle]
        if (error := handle.exception()) is None:
            return handle.result()
        return TrainingError(f"a task of Ray died for good ({first_line(error)}); {KEPT}.")

    def close(self) -> None:
        for reference in self._unfinished.values():
            self._ray.cancel(reference, force=True)
        if self._mine:
            self._ray.shutdown()


def pool_on(where: str, workers: int | None, settings: Mapping[str, Any]) -> Pool[Any]:
    """The pool of that name, ``slurm`` or ``ray``.

    Raises:
        ValueError: if it cannot be had.
    """
    return SlurmPool(workers, settings) if where == "slurm" else RayPool(workers, settings)


def _check_reachable(address: str) -> None:
    """Raise ValueError where nothing answers, which Ray would try for many minutes."""
    found = re.fullmatch(r"(?:\w+://)?(.+):(\d+)", address)
    try:
        if found is not None:
            socket.create_connection((found[1], int(found[2])), 10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"nothing answers at RAY_ADDRESS={address} ({error})") from error


def _extra(package: str, extra: str) -> Any:
    """A package that an extra installs."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(f"--on {extra} needs {package}: pip install 'poprisk[{extra}]'") from error
