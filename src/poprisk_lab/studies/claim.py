"""What a claim is: a statement, the trials that test it, and the rule that judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Done, by_seed, where
from poprisk_lab.studies.judge import Criterion, Steps
from poprisk_lab.study import Found, Trial

__all__ = [
    "Claim",
    "Curve",
    "Done",
    "Findings",
    "Found",
    "Picture",
    "Plot",
    "Trial",
    "Workspace",
    "by_seed",
    "steps_of",
    "where",
]


class Curve(NamedTuple):
    """One line of a plot.

    Attributes:
        name: in the legend; empty to leave it out.
        x: as many as ``y``.
        y: NaN where there is none.
        colour: a colour name of the page (``poprisk``, ``adamw``, ``peer``, ``other`` …).
        dash: ``"solid"``, ``"dash"`` or ``"dot"``.
        low: lower end of a band around the line; empty for none.
        high: upper end.
        points: markers in place of a line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = "solid"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: bool = False


class Plot(NamedTuple):
    """A plot.

    Attributes:
        title: what is shown.
        x: name of the axis.
        y: name of the axis.
        curves: the lines.
        about: one or two sentences: how to read it.
        log_x: whether the axis is logarithmic.
        log_y: likewise.
    """

    title: str
    x: str
    y: str
    curves: list[Curve]
    about: str
    log_x: bool = False
    log_y: bool = False


class Picture(NamedTuple):
    """A picture: its title, a PNG in base64, and what it shows."""

    title: str
    png: str
    about: str


class Findings(NamedTuple):
    """What a claim comes to.

    Attributes:
        criteria: what was asked and found; the verdict follows from them.
        ours: our figure for the summary, with its interval, in words.
        controls: what the controls say, in words, for the summary.
        sentences: facts worth telling, one each.
        table: header and rows of the numbers behind.
    """

    criteria: list[Criterion]
    ours: str
    controls: str
    sentences: list[str]
    table: list[list[str]]


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


def steps_of(done: Sequence[Done], **settings: Any) -> Steps:
    """When the runs with these settings reached their goal, by seed."""
    return Steps(by_seed(done, "reached", **settings), by_seed(done, "limit", **settings))
