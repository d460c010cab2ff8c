"""What a claim is: a statement, the trials that test it, and the rule that judges them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from poprisk_lab.checkpoint import load_checkpoint, save_checkpoint
from poprisk_lab.studies.judge import Criterion, Steps

Found = dict[str, Any]
"""What a trial found; JSON values."""
CHECKPOINT_SECONDS = 20.0


class Trial(NamedTuple):
    """One piece of work, done in one process.

    Attributes:
        name: unique within its claim, fit for a file name.
        settings: arguments of the claim's ``run``; JSON values.
        needs: packages without which it is left out.
    """

    name: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()


class Done(NamedTuple):
    """A finished trial: its settings, and what it found."""

    settings: dict[str, Any]
    found: Found


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


@final
class Workspace:
    """Where a long trial keeps its state, so that it can be stopped at any moment.

    Args:
        path: of the checkpoint; None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._saved_at = time.monotonic()

    def load(self) -> Any:
        """What was last saved; None if nothing was."""
        return load_checkpoint(self.path) if self.path is not None and self.path.exists() else None

    def save(self, state: Callable[[], Any]) -> None:
        """Save what ``state()`` returns, if the last time is long enough ago."""
        now = time.monotonic()
        if self.path is not None and now - self._saved_at > CHECKPOINT_SECONDS:
            save_checkpoint(self.path, state())
            self._saved_at = now

    def clear(self) -> None:
        """Remove the checkpoint: the trial is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


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


def where(done: Iterable[Done], **settings: Any) -> list[Done]:
    """The trials with these settings."""
    return [d for d in done if all(d.settings.get(k) == v for k, v in settings.items())]


def by_seed(done: Iterable[Done], key: str, **settings: Any) -> dict[int, Any]:
    """What the trials with these settings found under ``key``, by seed."""
    return {d.settings["seed"]: d.found[key] for d in where(done, **settings)}


def steps_of(done: Sequence[Done], **settings: Any) -> Steps:
    """When the runs with these settings reached their goal, by seed."""
    return Steps(by_seed(done, "reached", **settings), by_seed(done, "limit", **settings))
