"""What `poprisk reproduce` does: one claim, all of them, or the summary of what is there."""

from __future__ import annotations

from pathlib import Path

from poprisk_lab.store import RunDirectoryError
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Claim
from poprisk_lab.studies.record import Judged, judged, on_record
from poprisk_lab.studies.run import ClaimDirectory, OnTrial

ALL = "all"


def chosen(name: str) -> list[Claim]:
    """The claim of that name, or all.

    Raises:
        ValueError: if there is none.
    """
    if name == ALL:
        return list(CLAIMS.values())
    if name not in CLAIMS:
        raise ValueError(f"there is no claim {name!r}; choose all or one of {', '.join(CLAIMS)}.")
    return [CLAIMS[name]]


def directory_of(claim: Claim, *, quick: bool, out: Path | None, alone: bool) -> ClaimDirectory:
    """Where a claim is recorded: ``out`` itself for one claim, a folder in it for all."""
    default = f"reproduce-{claim.name}" + "-quick" * quick
    if out is None:
        return ClaimDirectory(Path("runs") / default, claim)
    return ClaimDirectory(out if alone else out / default, claim)


def run_claim(
    claim: Claim, directory: ClaimDirectory, *, quick: bool, workers: int, on_trial: OnTrial
) -> Judged:
    """Do the trials of a claim that are left, and judge it.

    Raises:
        TrainingError: if a trial fails.
        RunDirectoryError: if the directory cannot be used.
    """
    directory.create(quick=quick, workers=workers)
    directory.work(workers=workers, on_trial=on_trial)
    return judged(claim, directory.read())


def summarize(name: str, *, quick: bool, out: Path | None) -> list[Judged]:
    """What is known of a claim, or of all: finished runs here first, else those on record."""
    found = []
    for claim in chosen(name):
        own = _finished(claim, directory_of(claim, quick=quick, out=out, alone=name != ALL))
        found.append(own or on_record(claim))
    return found


def _finished(claim: Claim, directory: ClaimDirectory) -> Judged | None:
    if not directory.store.exists():
        return None
    try:
        found = judged(claim, directory.read())
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{error} (claim {claim.name})") from error
    return found if found.report is not None else None
