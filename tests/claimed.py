"""What the tests of the claims share: a quick form run to the end, and made-up trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from poprisk_lab.page.claims import FULL_FORM, render_claim
from poprisk_lab.studies.claim import Claim, Metrics, Results, TrialResult
from poprisk_lab.studies.criteria import UNDECIDED, verdict
from poprisk_lab.studies.record import judged
from poprisk_lab.studies.run import ClaimDirectory


def quick_form(claim: Claim, path: Path) -> str:
    """The page of the quick form of a claim, run to the end in a directory."""
    directory = ClaimDirectory(path, claim)
    directory.create(quick=True, workers=1)
    directory.work(workers=1, on_trial=lambda *_: None)
    progress = directory.read()
    assert (progress.left, progress.missing.get("sklearn", 0)) == ([], 0)
    found = judged(claim, progress)
    assert found.verdict == UNDECIDED
    page = render_claim(found)
    assert "Undecided (quick form: too small to decide" in page
    assert FULL_FORM in page
    return page


def made_up(claim: Claim, found: Callable[[dict[str, Any]], Metrics]) -> Results:
    """The full form's trials with what a function of their settings says they found."""
    return Results(TrialResult(t.settings, found(t.settings)) for t in claim.trials(False))


def verdict_of(claim: Claim, found: Callable[[dict[str, Any]], Metrics]) -> str:
    """The verdict on made-up trials; their plots must be drawable too."""
    done = made_up(claim, found)
    assert all(item.title for item in claim.show(done))
    return verdict(claim.judge(done).criteria)
