"""Do the trials of a claim in worker processes, resumably, into a directory."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from poprisk_lab.compare import TrainingError, environment, warm_up_workers, worker_context
from poprisk_lab.store import FORMAT, RecordDirectory
from poprisk_lab.studies.claim import Claim, Done, Found, Trial, Workspace

OnTrial = Callable[[str, int, int], None]
"""Told of a finished trial: its name, how many are done, of how many."""


class Progress(NamedTuple):
    """What a directory holds.

    Attributes:
        done: the finished trials, in the claim's order.
        left: those still to do.
        missing: packages that are missing, and how many trials were left out for that.
        quick: whether it is the quick form.
        environment: what the numbers were computed with.
        seconds: that the trials took, added up.
    """

    done: list[Done]
    left: list[Trial]
    missing: dict[str, int]
    quick: bool
    environment: dict[str, Any]
    seconds: float


@final
class ClaimDirectory:
    """The record of one claim: configuration, finished trials, checkpoints of the others."""

    def __init__(self, path: Path, claim: Claim) -> None:
        self.path, self.claim = path, claim
        self._record = RecordDirectory(path, keys={"claim", "quick", "trials"}, is_row=_is_row)

    def create(self, *, quick: bool, workers: int) -> None:
        """Make it, or check that it holds the same form of the same claim.

        Raises:
            RunDirectoryError: if it cannot be written or holds something else.
        """
        trials = [[t.name, t.settings, list(t.needs)] for t in self.claim.trials(quick)]
        config = {
            "format": FORMAT,
            "poprisk": metadata.version("poprisk"),
            "claim": self.claim.name,
            "quick": quick,
            "trials": json.loads(json.dumps(trials)),
        }
        self._record.create(config, environment(workers))

    def read(self) -> Progress:
        """What is there.

        Raises:
            RunDirectoryError: if it is missing or damaged.
        """
        config = self._record.config()
        trials = [Trial(name, given, tuple(needs)) for name, given, needs in config["trials"]]
        rows = {row["trial"]: row for row in self._record.rows()}
        gone = {n for t in trials for n in t.needs if importlib.util.find_spec(n) is None}
        blocked = {t.name for t in trials if gone & set(t.needs) and t.name not in rows}
        return Progress(
            done=[Done(t.settings, rows[t.name]["found"]) for t in trials if t.name in rows],
            left=[t for t in trials if t.name not in rows and t.name not in blocked],
            missing={
                n: sum(n in t.needs for t in trials if t.name in blocked) for n in sorted(gone)
            },
            quick=config["quick"],
            environment=self._record.environment(),
            seconds=sum(row["seconds"] for row in rows.values()),
        )

    def work(self, *, workers: int, on_trial: OnTrial) -> None:
        """Do the trials that are left; stopped at any moment, the next call goes on.

        Raises:
            TrainingError: if a trial fails; those that finished are kept.
            RunDirectoryError: if another process works here or the record cannot be written.
        """
        with self._record.locked():
            progress = self.read()
            total = len(progress.done) + len(progress.left)
            if progress.left:
                self._work(progress.left, total, workers, on_trial)

    def _work(self, left: list[Trial], total: int, workers: int, on_trial: OnTrial) -> None:
        warm_up_workers()
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(left)),
            mp_context=worker_context(),
            initializer=_prepare,
        )
        count = total - len(left)
        try:
            run = self.claim.run
            jobs = {pool.submit(_do, run, t.settings, self._checkpoint(t)): t for t in left}
            for job in concurrent.futures.as_completed(jobs):
                name = jobs[job].name
                try:
                    found, seconds = job.result()
                except Exception as error:
                    raise TrainingError(f"trial {name} failed: {error!r}") from error
                self._record.append({"trial": name, "seconds": seconds, "found": found})
                Workspace(self._checkpoint(jobs[job])).clear()
                count += 1
                on_trial(name, count, total)
        finally:
            _stop(pool)

    def _checkpoint(self, trial: Trial) -> Path:
        return self._record.checkpoints / f"{trial.name}.safetensors"


def _is_row(row: Any) -> bool:
    return isinstance(row["trial"], str) and isinstance(row["found"], dict) and row["seconds"] >= 0


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _do(
    run: Callable[[dict[str, Any], Workspace], Found], settings: dict[str, Any], checkpoint: Path
) -> tuple[Found, float]:
    started = time.monotonic()
    found = run(settings, Workspace(checkpoint))
    return json.loads(json.dumps(found)), time.monotonic() - started


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """End the workers, working or not."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
        process.join()
