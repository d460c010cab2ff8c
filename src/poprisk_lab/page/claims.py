"""A claim, and all claims in summary, as pages that open without a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from poprisk.intervals import MIN_SEEDS
from poprisk_lab.page import draw
from poprisk_lab.page.formats import QUICK, plain, plural
from poprisk_lab.page.page import template
from poprisk_lab.plots import Plot, Table, written
from poprisk_lab.studies.claim import TrialResult
from poprisk_lab.studies.criteria import Criterion, fewest_seeds
from poprisk_lab.studies.record import Judged

VALUES_SHOWN = 12
"""Values of one setting that are listed; more are counted."""
TOO_SMALL = "quick form: too small to decide; run without --quick"
FULL_FORM = "These lines describe the full form; the quick form ran with the settings below."
"""What a page says of the text of a claim, which is written for its full form."""


def render_claim(judged: Judged) -> str:
    """Return the page of a claim as text; the same input gives the same text."""
    claim, progress, report = judged.claim, judged.progress, judged.report
    shown = claim.show(progress.done) if report else []
    return template("claim.html.j2").render(
        claim=claim,
        verdict=judged.verdict,
        full_form=FULL_FORM if judged.progress.quick else "",
        headline=headline(judged),
        report=report,
        criteria=criteria_table(report.criteria) if report else None,
        notices=notices(judged),
        figures=[(item, draw.figure(item) if isinstance(item, Plot) else None) for item in shown],
        environment=progress.environment,
        used=settings_used(progress.done),
        trials=len(progress.done),
        minutes=progress.seconds / 60,
        plotly=draw.plotly_script(),
    )


def main_figure(judged: Judged) -> Criterion | None:
    """The criterion that is the claim's main figure; None as long as nothing was judged."""
    return judged.report.criteria[judged.report.main] if judged.report else None


def headline(judged: Judged) -> str:
    """The verdict with the claim's main figure, in one line; of a quick form, why it has none."""
    main = main_figure(judged)
    if main is None:
        return judged.verdict
    if judged.progress.quick:
        return f"{judged.verdict} ({TOO_SMALL})"
    return f"{judged.verdict}: {main.name}: {written(main.estimate, percent=main.percent)}"


def notices(judged: Judged) -> list[str]:
    """What a reader must know before the numbers."""
    progress, found = judged.progress, list[str]()
    if progress.quick:
        found.append(
            "This is the quick form: smaller problems, shorter training and fewer seeds than the "
            "full one. It shows that everything runs, and what a page holds; its figures are no "
            "result, and can point the other way than those of the full form."
        )
    if progress.left:
        found.append(f"{plural(len(progress.left), 'trial')} still to do; repeat the command.")
    report = judged.report
    few = fewest_seeds(report.criteria) if report else None
    if report and few is not None:
        rows = [*criteria_table(report.criteria).rows, *report.table.rows]
        mixed = any(map(_has_interval, itertools.chain(*rows)))
        but = " (the intervals that there are count settings and measurements, too)" * mixed
        found.append(
            f"{plural(few, 'seed')}, so no intervals over seeds: the seeds stand in their place"
            f"{but}, and there is no verdict, which takes at least {MIN_SEEDS}."
        )
    missing = {package: trials for package, trials in progress.missing.items() if trials}
    if missing and judged.claim.install:
        names = ", ".join(missing)
        found.append(
            f"{plural(max(missing.values()), 'trial')} left out: {names} not installed "
            f"(pip install '{judged.claim.install}')."
        )
    else:
        found.extend(
            f"{plural(trials, 'trial')} left out: the package {package} is not installed "
            f"(pip install '{package}')."
            for package, trials in missing.items()
        )
    return [*found, *(report.notes if report else ())]


def criteria_table(criteria: Sequence[Criterion]) -> Table:
    """What a verdict rests on."""

    def bound(c: Criterion, value: float | None) -> str:
        return "—" if value is None else f"{100 * value:.3g}%" if c.percent else f"{value:.3g}"

    found = [written(c.estimate, percent=c.percent) for c in criteria]
    few = any(c.estimate.few for c in criteria)
    wide = not few or any(map(_has_interval, found))
    spread = " or ".join(["95% interval"] * wide + ["the seeds"] * few)
    return Table(
        ["Criterion", "Needed", "Paper", f"Found, with {spread}", "Outcome"],
        [
            [c.name + ("" if c.primary else " (control)"),
             f"{'≤' if c.at_most else '≥'} {bound(c, c.threshold)}",
             bound(c, c.claimed), cell, c.outcome]
            for c, cell in zip(criteria, found, strict=True)
        ],
    )  # fmt: skip


def _has_interval(cell: str) -> bool:
    """Whether a cell of :func:`poprisk_lab.plots.written` ends in an interval."""
    return cell.endswith("]")


def settings_used(done: Iterable[TrialResult]) -> dict[str, str]:
    """The values of each setting among the trials."""
    values: dict[str, dict[str, Any]] = {}
    for trial in done:
        for key, value in trial.settings.items():
            values.setdefault(key, {})[plain(value)] = value
    return {
        key: "; ".join(found) if len(found) <= VALUES_SHOWN else f"{len(found)} values"
        for key, found in values.items()
    }


def summary_table(claims: Sequence[Judged]) -> Table:
    """A row for each claim: how many criteria hold, its main figure here and in the paper."""
    rows = list[list[str]]()
    for judged in claims:
        main = main_figure(judged)
        primary = [c for c in judged.report.criteria if c.primary] if judged.report else []
        rows.append([
            judged.claim.name,
            judged.claim.title,
            judged.verdict + QUICK * judged.progress.quick,
            f"{sum(c.holds for c in primary)} of {len(primary)}" if primary else "",
            main.name if main else "",
            written(main.estimate, percent=main.percent) if main else "",
            judged.claim.paper or "none given",
        ])  # fmt: skip
    head = ["Claim", "Title", "Verdict", "Criteria that hold", "Main figure", "Here", "Paper"]
    return Table(head, rows)


def render_summary(claims: Sequence[Judged]) -> str:
    """Return the page of all claims as text."""
    return template("claims.html.j2").render(table=summary_table(claims))
