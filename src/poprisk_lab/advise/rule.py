"""What to expect of the gate from what was measured: three thresholds, five kinds of tasks.

The thresholds are fitted to tasks at several noise levels that were trained with the gate and with
AdamW (``benchmarks/advise.py``), and judged with all levels of a task left out together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from poprisk_lab.advise.measuring import TaskStatistics, pooled

GAINS, EVEN, LOSES = "gains", "even", "loses"
OUTCOMES = (GAINS, EVEN, LOSES)
"""The 95% interval of the gate's final gain, paired over seeds: above 0, around it, below."""
RIVALS = ("same", "best")
"""AdamW at the gate's learning rate and decay, and the best of the grid, picked by the test set."""
KINDS = ("easy", "hard", "few", "spread", "noisy")
"""Targets right, and learned early or not so early; of linear models, signal in few coordinates or
spread over all; everything else."""
CANDIDATES = (
    (0.05, 0.1, 0.15, 0.2),
    (0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
)
"""Thresholds to choose from, in the order of :class:`Thresholds`."""


class Features(NamedTuple):
    """What the rule reads; see :class:`poprisk_lab.advise.measuring.TaskStatistics`."""

    unexplained: float
    layers: int
    concentration: float


class Thresholds(NamedTuple):
    """Where the kinds of tasks part.

    Attributes:
        easy: of what is unexplained, ``easy`` below it.
        unexplained: ``hard`` below it; from it on, targets are noisy.
        concentration: of a model of one layer, ``few`` from it on, else ``spread``.
    """

    easy: float
    unexplained: float
    concentration: float

    def kind(self, found: Features) -> str:
        """Which of :data:`KINDS` a task is; a network with noisy targets is ``noisy``."""
        if found.unexplained < self.unexplained:
            return "easy" if found.unexplained < self.easy else "hard"
        if found.layers > 1:
            return "noisy"
        return "few" if found.concentration >= self.concentration else "spread"

    def expect(self, found: Features) -> Mapping[str, str]:
        """The outcome to expect, by rival."""
        return EXPECTED[self.kind(found)]


Outcome = Mapping[str, str]
"""One of :data:`OUTCOMES` by rival."""
EXPECTED: Mapping[str, Outcome] = {
    "easy": {"same": EVEN, "best": LOSES},
    "hard": {"same": LOSES, "best": LOSES},
    "few": {"same": GAINS, "best": GAINS},
    "spread": {"same": LOSES, "best": LOSES},
    "noisy": {"same": GAINS, "best": EVEN},
}
"""What becomes of each kind: what the first eight tasks had shown, before the others were run."""


def features_of(seeds: Sequence[TaskStatistics]) -> Features:
    """The features over seeds; a signal that is not seen is in no coordinate."""
    few = pooled(m.concentration for m in seeds).value
    return Features(
        pooled(m.unexplained for m in seeds).value,
        seeds[0].layers,
        few if few == few else 0.0,
    )


def fit(tasks: Sequence[tuple[Features, Outcome]]) -> Thresholds:
    """The thresholds among :data:`CANDIDATES` with which most outcomes are as :data:`EXPECTED`.

    Of those that are as good, the middle one in their order is taken.

    Args:
        tasks: what was measured of each, and what became of it.
    """
    found = [Thresholds(*cut) for cut in itertools.product(*CANDIDATES)]
    scores = [right(thresholds, tasks) for thresholds in found]
    best = [t for t, score in zip(found, scores, strict=True) if score == max(scores)]
    return best[len(best) // 2]


def right(thresholds: Thresholds, tasks: Iterable[tuple[Features, Outcome]]) -> int:
    """How many outcomes are as expected, over tasks and rivals."""
    return sum(thresholds.expect(f)[rival] == o[rival] for f, o in tasks for rival in RIVALS)


THRESHOLDS = Thresholds(easy=0.2, unexplained=0.3, concentration=0.1)
"""Fitted to all tasks."""
TRACK: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "same": {
        "all": (41, 51),
        "easy": (4, 5),
        "hard": (2, 3),
        "few": (7, 7),
        "spread": (5, 9),
        "noisy": (23, 27),
    },
    "best": {
        "all": (39, 51),
        "easy": (4, 5),
        "hard": (2, 3),
        "few": (7, 7),
        "spread": (8, 9),
        "noisy": (18, 27),
    },
}
"""Outcomes that were as expected with the task left out of the fit, by rival and kind."""
