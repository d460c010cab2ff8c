"""What a claim is: a statement, the trials that test it, and the rule that judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from poprisk.intervals import Interval, t_interval
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.plots import Line, Picture, Plot, Table, seeds_line
from poprisk_lab.results import by_seed, where
from poprisk_lab.studies.criteria import Criterion, Steps
from poprisk_lab.study import Done, Found, Trial

__all__ = [
    "Claim",
    "Done",
    "Findings",
    "Found",
    "Trial",
    "Workspace",
    "by_seed",
    "figure",
    "found_line",
    "grouped",
    "over_seeds",
    "steps_of",
    "where",
]


class Findings(NamedTuple):
    """What a claim comes to.

    Attributes:
        criteria: what was asked and found; the verdict follows from them.
        table: the numbers behind.
        notes: warnings that protect a reader, such as a choice at the edge of its grid.
        main: which of the criteria is the claim's main figure.
    """

    criteria: list[Criterion]
    table: Table
    notes: Sequence[str] = ()
    main: int = 0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how it is checked.

    Args:
        name: as on the command line.
        title: a few words.
        statement: what is claimed, one sentence.
        source: where in the paper.
        paper: the paper's figure, in words; empty if it gives none.
        published: settings as published.
        ours: settings that are ours, because the paper's are not known or for the machine's sake.
        trials: the trials of the quick form (True) or the full one.
        run: does one trial.
        judge: from finished trials to findings.
        show: from finished trials to plots and pictures.
    """

    name: str
    title: str
    statement: str
    source: str
    paper: str
    published: Sequence[str]
    ours: Sequence[str]
    trials: Callable[[bool], list[Trial]]
    run: Callable[[dict[str, Any], Workspace], Found]
    judge: Callable[[Sequence[Done]], Findings]
    show: Callable[[Sequence[Done]], list[Plot | Picture]]


def grouped(done: Iterable[Done], key: str) -> dict[Any, list[Done]]:
    """The trials by their value of one setting, in the order in which values appear."""
    found: dict[Any, list[Done]] = {}
    for trial in done:
        found.setdefault(trial.settings[key], []).append(trial)
    return found


def over_seeds(done: Iterable[Done], key: str, **settings: Any) -> Interval:
    """The mean of what the trials with these settings found under ``key``."""
    return t_interval(by_seed(done, key, **settings).values())


def figure(*path: str) -> Callable[[Done], Any]:
    """What a trial found under these keys, one in the other; None if there is none."""

    def value(trial: Done) -> Any:
        found: Any = trial.found
        for key in path:
            found = None if found is None else found.get(key)
        return found

    return value


def found_line(
    name: str, done: Sequence[Done], x: str, y: str, colour: str, *, dash: str = "solid"
) -> Line:
    """What trials of several seeds found under ``y``, a list, over what they found under ``x``."""
    return seeds_line(name, done[0].found[x], [d.found[y] for d in done], colour, dash=dash)


def steps_of(done: Sequence[Done], **settings: Any) -> Steps:
    """When the runs with these settings reached their goal, by seed."""
    return Steps(by_seed(done, "reached", **settings), by_seed(done, "limit", **settings))
