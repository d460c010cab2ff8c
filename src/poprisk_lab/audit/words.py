"""What an audit found, in a few words."""

from __future__ import annotations

import re

from poprisk.audit import AuditResult
from poprisk_lab.audit.examples import AuditExamples


def headline(result: AuditResult) -> str:
    """The one sentence that stands above all."""
    n, bad = int(result.labelled.sum()), int(result.suspect.sum())
    if bad == 0:
        return f"None of {n:,} labels is suspect."
    return f"{bad:,} of {n:,} labels ({bad / n:.1%}) are suspect."


def details(examples: AuditExamples, result: AuditResult) -> list[str]:
    """Numbers below the headline."""
    found = [f"{len(examples.targets):,} examples"]
    if examples.classes:
        found.append(f"{len(examples.classes)} classes")
    share = result.wrong_share
    if share.valid:
        low, high = share.interval
        found.append(f"estimated share of wrong labels {share.value:.1%} [{low:.1%}, {high:.1%}]")
    if result.recall is not None and result.recall.valid:
        low, high = result.recall.interval
        found.append(
            f"planted labels found {result.recall.value:.0%} [{low:.0%}, {high:.0%}] of "
            f"{result.planted:,} that are wrong"
        )
    if result.memorization is not None and result.memorization.valid:
        found.append(f"memorized {max(0.0, result.memorization.value):.0%}")
    trainings = round(1 + result.cost)
    found.append(f"{trainings} training{'s' * (trainings != 1)}")
    return found


def notices(result: AuditResult, folds: str = "") -> list[str]:
    """What a reader must know before believing it.

    Args:
        result: what was found.
        folds: the command that trains on parts of the data; empty if there is none.
    """
    if result.valid:
        share = result.wrong_share
        return [] if share.valid else [f"How many labels are wrong is not known: {share.reason}."]
    if result.cost:  # it was done
        reason = re.sub(r"(, or|;) consider audit\(\.\.\., folds=5\)", "", result.reason)
    else:
        reason = result.reason.replace("audit(..., folds=5)", f"`{folds}`" if folds else "folds")
    reason = re.sub(r"\bplant=([\d.]+\d)", r"`--plant \1` plants some", reason)
    return [f"{reason[0].upper()}{reason[1:]}."]
