"""What a claim is: a statement, the trials that test it, and the rule that judges them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from poprisk_lab.checkpoint import Workspace
from poprisk_lab.claims import WORDS
from poprisk_lab.plots import Picture, Plot, Table
from poprisk_lab.results import Metrics, Results, TrialResult
from poprisk_lab.studies.criteria import Criterion
from poprisk_lab.study import Trial

__all__ = ["Claim", "Metrics", "Plots", "Report", "Results", "Trial", "TrialResult", "Workspace"]

Plots = list[Plot | Picture]

NOT_KNOWN = ("The paper's settings for this claim are not known.",)


class Report(NamedTuple):
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


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and how it is checked.

    Args:
        name: as on the command line.
        title: a few words; this and what follows as ``claims.toml`` says.
        statement: what is claimed, one sentence.
        source: where in the paper.
        paper: the paper's figure, in words; empty if it gives none.
        published: settings as published.
        ours: settings that are ours.
        install: what pip is to install for it, if its trials need packages beside the laboratory's.
        trials: the trials of the quick form (True) or the full one.
        run: does one trial.
        judge: from finished trials to the report.
        show: from finished trials to plots and pictures.
    """

    name: str
    title: str
    statement: str
    source: str
    paper: str = ""
    published: Sequence[str] = NOT_KNOWN
    ours: Sequence[str]
    install: str = ""
    trials: Callable[[bool], list[Trial]]
    run: Callable[[dict[str, Any], Workspace], Metrics]
    judge: Callable[[Results], Report]
    show: Callable[[Results], Plots]


def claim_of(module: ModuleType) -> Claim:
    """The claim whose trials, ``run``, ``judge`` and ``show`` a module of the studies has.

    Its words are those of ``claims.toml``, names in braces those of the module.
    """
    name = re.sub(r"[._]", "-", module.__name__.removeprefix("poprisk_lab.studies."))

    def filled(words: Any) -> Any:
        if isinstance(words, list):
            return [text.format_map(vars(module)) for text in words]
        return words.format_map(vars(module))

    return Claim(
        name=name,
        trials=module.trials,
        run=module.run,
        judge=module.judge,
        show=module.show,
        **{key: filled(words) for key, words in WORDS[name].items()},
    )
