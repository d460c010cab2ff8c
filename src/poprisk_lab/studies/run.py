"""The directory of one claim: its trials, what they found, what is left of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, final

from poprisk_lab.results import Results
from poprisk_lab.runner import environment, run_trials
from poprisk_lab.store import FORMAT, Kind, Row, Store, end_of
from poprisk_lab.studies.claim import Claim
from poprisk_lab.study import Study, Trial, missing_packages, results_of

OnTrial = Callable[[str, int, int], None]
"""Told of a finished trial: its name, how many are done, of how many."""


def _is_row(row: Row) -> bool:
    return row["event"] == "end" and isinstance(row["found"], dict) and row["seconds"] >= 0


KIND = Kind(frozenset({"claim", "quick", "trials"}), _is_row)


class ClaimProgress(NamedTuple):
    """What a directory holds.

    Attributes:
        done: the finished trials, in the claim's order.
        left: those still to do.
        missing: packages that are missing, and how many trials were left out for that.
        quick: whether it is the quick form.
        environment: what the numbers were computed with.
        seconds: that the trials took, added up.
    """

    done: Results
    left: list[Trial]
    missing: dict[str, int]
    quick: bool
    environment: dict[str, Any]
    seconds: float


@final
class ClaimDirectory:
    """The directory of one claim, or of another study."""

    def __init__(self, path: Path, claim: Claim | Study) -> None:
        self.path, self._claim = path, claim
        self.store = Store(path, KIND)

    def create(self, *, quick: bool, workers: int) -> None:
        """Make it, or check that it holds the same form of the same claim.

        Raises:
            RunDirectoryError: if it cannot be written or holds something else.
        """
        trials = [_as_json(trial) for trial in self._claim.trials(quick)]
        config = {
            "format": FORMAT,
            "poprisk": metadata.version("poprisk"),
            "claim": self._claim.name,
            "quick": quick,
            "trials": json.loads(json.dumps(trials)),
        }
        self.store.create(config, environment(workers))

    def read(self) -> ClaimProgress:
        """What is there.

        Raises:
            RunDirectoryError: if it is missing or damaged.
        """
        config = self.store.config()
        trials = [_trial(*row) for row in config["trials"]]
        rows, gone = self.store.rows(t.name for t in trials), missing_packages(trials)
        ends = {name: end for name, found in rows.items() if (end := end_of(found)) is not None}
        blocked = [t for t in trials if gone & set(t.needs) and t.name not in ends]
        return ClaimProgress(
            done=results_of(trials, rows),
            left=self._left(trials, ends, blocked),
            missing={n: sum(n in t.needs for t in blocked) for n in sorted(gone)},
            quick=config["quick"],
            environment=self.store.environment(),
            seconds=sum(end["seconds"] for end in ends.values()),
        )

    def _left(self, trials: list[Trial], ends: dict[str, Row], blocked: list[Trial]) -> list[Trial]:
        """The trials still to do; one whose product is lost, while others still need it, too."""
        begun = [t for t in trials if t.name not in ends and t not in blocked]
        needed = {name for trial in begun for name in trial.after}
        lost = {n for n in needed if n in ends and self.store.product(n) is None}
        return [t for t in trials if t in begun or (t.keeps and t.name in lost)]

    def work(self, *, workers: int, on_trial: OnTrial) -> None:
        """Do the trials that are left; stopped at any moment, the next call goes on.

        Raises:
            TrainingError: if a trial fails; those that finished are kept.
            RunDirectoryError: if the record cannot be written.
        """
        progress = self.read()
        count, total = len(progress.done), len(progress.done) + len(progress.left)

        def tell(trial: Trial, row: Row) -> None:
            nonlocal count
            if row["event"] == "end":
                count += 1
                on_trial(trial.name, count, total)

        run_trials(progress.left, self._claim.run, self.store, workers=workers, on_row=tell)


def _as_json(trial: Trial) -> list[Any]:
    """A trial as written to ``config.json``; without what it neither needs nor keeps."""
    found = [trial.name, trial.settings, list(trial.needs)]
    return [*found, list(trial.after), trial.keeps] if trial.after or trial.keeps else found


def _trial(
    name: str,
    settings: dict[str, Any],
    needs: list[str],
    after: Sequence[str] = (),
    keeps: bool = False,
) -> Trial:
    return Trial(name, settings, tuple(needs), tuple(after), keeps)
