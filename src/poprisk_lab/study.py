"""A study: trials that are independent pieces of work, how one is done, what they come to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Metrics, Results, Settings, TrialResult
from poprisk_lab.store import Row, Store, end_of


class Trial(NamedTuple):
    """One piece of work, done in one process.

    Attributes:
        name: unique within its study, fit for a file name.
        settings: arguments of the study's ``run``; JSON values.
        needs: packages without which it is left out.
        after: trials that must have ended before it, whose products it is given.
        keeps: whether it keeps a product for trials after it.
        label: in messages; empty: ``trial NAME``.
    """

    name: str
    settings: Settings
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    keeps: bool = False
    label: str = ""


Share = tuple[Trial, ...]
"""Trials that one worker does, one after the other."""

Run = Callable[[Settings, Workspace], Metrics | Iterable[Row]]
"""Does one trial, from its settings and a workspace for its checkpoints.

It returns what was found, or yields rows of JSON values, each with an ``event``, the last with
``"end"``. Picklable: a function of a module, or a partial of one.
"""


@dataclass(frozen=True)
class Study:
    """Trials, how one is done, and what they come to.

    Args:
        name: fit for a file name.
        trials: of the quick form (True) or the full one.
        run: does one.
        report: from finished trials to JSON values.
    """

    name: str
    trials: Callable[[bool], list[Trial]]
    run: Run
    report: Callable[[Results], dict[str, Any]]


def missing_packages(trials: Iterable[Trial]) -> set[str]:
    """The packages that trials need and that are not installed."""
    return {n for t in trials for n in t.needs if importlib.util.find_spec(n) is None}


def left(trials: Sequence[Trial], store: Store) -> list[Trial]:
    """The trials that are still to do: not ended, or with a product that is lost.

    Raises:
        RunDirectoryError: if a record is damaged.
    """
    rows, gone = store.rows(t.name for t in trials), missing_packages(trials)
    return [
        trial
        for trial in trials
        if (end_of(rows[trial.name]) is None and not gone & set(trial.needs))
        or (trial.keeps and store.product(trial.name) is None)
    ]


def chains(trials: Iterable[Trial]) -> list[Share]:
    """The trials in groups of which none waits for another, by the first trial of each.

    Example:
        >>> a, b, c = Trial("a", {}), Trial("b", {}), Trial("c", {}, after=("a",))
        >>> [[trial.name for trial in chain] for chain in chains([a, b, c])]
        [['a', 'c'], ['b']]
    """
    found = list[list[Trial]]()
    for trial in trials:
        mine = [c for c in found if any(t.name in trial.after or trial.name in t.after for t in c)]
        if not mine:
            found.append([trial])
            continue
        found = [chain for chain in found if all(chain is not other for other in mine[1:])]
        mine[0] += [*(t for other in mine[1:] for t in other), trial]
    return [*map(tuple, found)]


def shards(trials: Iterable[Trial], count: int) -> list[Share]:
    """The trials in shares of about one size, of which none waits for another; some may be empty.

    Whole chains go to the share with the fewest trials, so that all machines deal them alike.
    """
    found = [list[Trial]() for _ in range(count)]
    for chain in chains(trials):
        min(found, key=len).extend(chain)
    return [*map(tuple, found)]


def with_earlier(trials: Sequence[Trial], names: Iterable[str]) -> list[Trial]:
    """The trials of these names and those that they come after, in their order."""
    by_name, wanted, more = {t.name: t for t in trials}, set[str](), {*names}
    while more:
        wanted |= more
        more = {other for name in more for other in by_name[name].after} - wanted
    return [trial for trial in trials if trial.name in wanted]


def results_of(trials: Sequence[Trial], rows: Mapping[str, Sequence[Row]]) -> Results:
    """The trials that have ended, by the rows of their records, with what they found."""
    ends = ((trial, end_of(rows[trial.name])) for trial in trials)
    return Results(TrialResult(t.settings, end["found"]) for t, end in ends if end is not None)
