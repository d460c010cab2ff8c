"""The results on record: full runs of every claim, kept with the source, not in the wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from poprisk_lab.store import replace_text, write_json
from poprisk_lab.studies.claim import Claim, Report, Results, TrialResult
from poprisk_lab.studies.criteria import UNDECIDED, verdict
from poprisk_lab.studies.run import ClaimDirectory, ClaimProgress
from poprisk_lab.study import Study

FOLDER = Path(__file__).parents[3] / "records"


class Judged(NamedTuple):
    """A claim with what was found.

    Attributes:
        claim: which.
        progress: the trials.
        report: what they come to; None as long as there are too few to judge.
        verdict: reproduced, partly, not, or undecided; without report, that it was not run. A
            quick form is undecided.
    """

    claim: Claim
    progress: ClaimProgress
    report: Report | None
    verdict: str


def judged(claim: Claim, progress: ClaimProgress) -> Judged:
    """Judge a claim by its finished trials; only once none is left."""
    if not progress.done:
        return Judged(claim, progress, None, "not run yet")
    if progress.left:
        return Judged(claim, progress, None, "not run to the end")
    report = claim.judge(progress.done)
    return Judged(
        claim, progress, report, UNDECIDED if progress.quick else verdict(report.criteria)
    )


def load_record(claim: Claim, folder: Path = FOLDER) -> ClaimProgress | None:
    """The results on record for a claim; None if there are none."""
    path = folder / f"{claim.name}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ClaimProgress(
        done=Results(TrialResult(row["settings"], row["found"]) for row in content["trials"]),
        left=[],
        missing=content["missing"],
        quick=content["quick"],
        environment=content["environment"],
        seconds=content["seconds"],
    )


def on_record(claim: Claim, folder: Path = FOLDER) -> Judged:
    """The results on record for a claim, judged; "not run yet" if there are none."""
    nothing = ClaimProgress(Results(), claim.trials(False), {}, False, {}, 0.0)
    return judged(claim, load_record(claim, folder) or nothing)


def save_record(claim: Claim, progress: ClaimProgress, folder: Path = FOLDER) -> None:
    """Put a finished full run on record.

    Raises:
        ValueError: if trials are left, or it is the quick form.
    """
    if progress.left or progress.quick:
        raise ValueError(f"only a finished full run goes on record; {claim.name} is not one.")
    folder.mkdir(exist_ok=True)
    head = {
        "claim": claim.name,
        "quick": progress.quick,
        "seconds": round(progress.seconds, 1),
        "missing": progress.missing,
        "environment": progress.environment,
    }
    rows = [json.dumps({"settings": d.settings, "found": d.metrics}) for d in progress.done]
    trials = ",\n".join(rows)  # a line a trial
    text = json.dumps(head, indent=1)[:-2] + f',\n "trials": [\n{trials}\n]\n}}\n'
    replace_text(folder / f"{claim.name}.json", text)


def do_study(study: Study, *, quick: bool, workers: int, runs: Path) -> None:
    """Do what is left of a study, print its report, and put a full one on record."""
    directory = ClaimDirectory(runs / (study.name + "-quick" * quick), study)
    directory.create(quick=quick, workers=workers)
    directory.work(workers=workers, on_trial=lambda *told: print(*told, flush=True))
    progress = directory.read()
    content = {"environment": progress.environment, **study.report(progress.done)}
    print(json.dumps(content, indent=1))
    if not quick:
        write_json(FOLDER / f"{study.name}.json", content)
