"""Whether the gate will help on a task, from a few cheap measurements, before one tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from poprisk._validate import check_positive
from poprisk.linalg import Estimate
from poprisk_lab.advise.measuring import TaskStatistics, measure, pooled
from poprisk_lab.advise.rule import THRESHOLDS, TRACK, Features, Outcome, features_of
from poprisk_lab.tasks import Source, TaskError, load_task, source_name

__all__ = ["FIRST_SEED", "NEVER", "Advice", "advise"]

FIRST_SEED = 1_000
"""Seeds are others than those of `poprisk compare`, which begin at 0."""
NEVER = 0.97
"""Share unexplained from which on nothing was learned that a held-out example shows."""
NONE: Mapping[str, Any] = {}


@final
@dataclass(frozen=True)
class Advice:
    """What was measured of a task, and what to expect of the gate.

    Attributes:
        source: the task as messages call it.
        seeds: that were measured.
        sizes: examples and batch size.
        concentration: share of the squared mean gradient in a hundredth of the coordinates.
        unexplained: smallest held-out loss of a tenth of AdamW's run, over that of the best
            constant outputs.
        noise_scale: examples behind which signal and noise of the mean gradient are alike; not
            part of the rule.
        batch_share: b/n; not part of the rule, as the next.
        weights_per_example: P/n.
        features: what the rule reads.
    """

    source: str
    seeds: tuple[int, ...]
    sizes: tuple[int, int]
    concentration: Estimate
    unexplained: Estimate
    noise_scale: Estimate
    batch_share: float
    weights_per_example: float
    features: Features

    @classmethod
    def of(cls, source: str, seeds: Mapping[int, TaskStatistics], sizes: tuple[int, int]) -> Advice:
        """From the measurements by seed."""
        found = [*seeds.values()]
        return cls(
            source=source,
            seeds=(*seeds,),
            sizes=sizes,
            concentration=pooled(m.concentration for m in found),
            unexplained=pooled(m.unexplained for m in found),
            noise_scale=pooled(m.noise_scale for m in found),
            batch_share=found[0].batch_share,
            weights_per_example=found[0].weights_per_example,
            features=features_of(found),
        )

    @property
    def kind(self) -> str:
        """One of :data:`poprisk_lab.advise.rule.KINDS`."""
        return THRESHOLDS.kind(self.features)

    @property
    def expected(self) -> Outcome:
        """The outcome to expect, by rival."""
        return THRESHOLDS.expect(self.features)

    @property
    def unsure(self) -> tuple[str, ...]:
        """The features by which another kind is within two errors."""
        moved = {
            "unexplained": [self.features._replace(unexplained=x) for x in _ends(self.unexplained)],
            "concentration": [
                self.features._replace(concentration=x) for x in _ends(self.concentration)
            ],
        }
        kinds = {name: {*map(THRESHOLDS.kind, ends)} for name, ends in moved.items()}
        return tuple(name for name, found in kinds.items() if not found <= {self.kind})

    @property
    def learned_nothing(self) -> bool:
        """Whether noise cannot be told from a task that is learned late."""
        return self.unexplained.value >= NEVER

    def as_json(self) -> dict[str, Any]:
        """All of it, JSON values; what is not finite is None."""
        ratios = {name: getattr(self, name) for name in RATIOS}
        return {
            "task": self.source,
            "seeds": [*self.seeds],
            "examples": self.sizes[0],
            "batch_size": self.sizes[1],
            "measured": {
                **{name: _json(found) for name, found in ratios.items()},
                "batch_share": self.batch_share,
                "weights_per_example": self.weights_per_example,
                "layers": self.features.layers,
            },
            "kind": self.kind,
            "expected": dict(self.expected),
            "record": {
                rival: {called: [*counts[called]] for called in ("all", self.kind)}
                for rival, counts in TRACK.items()
            },
            "unsure": [*self.unsure],
            "learned_nothing": self.learned_nothing,
        }


RATIOS = ("concentration", "unexplained", "noise_scale")


def _ends(found: Estimate) -> list[float]:
    """Two errors below and above; nothing where the error is not known."""
    apart = 2 * found.standard_error
    return [found.value - apart, found.value + apart] if found.valid else []


def _json(found: Estimate) -> dict[str, float | None]:
    """Value and error; None for what is not finite."""
    numbers = {"value": found.value, "standard_error": found.standard_error}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def advise(
    task: Source,
    *,
    seeds: int = 3,
    settings: Mapping[str, Any] = NONE,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Measure a task and say whether to expect a gain over AdamW.

    The cost is that of a third of one training with three seeds, and of a few gradients.

    Args:
        task: as :func:`poprisk_lab.compare` takes it.
        seeds: how many, from :data:`FIRST_SEED` on; of data, initial weights and order.
        settings: arguments of the task's function.
        progress: told how many seeds are done, and of how many.

    Raises:
        TaskError: if the task cannot be made or measured.
        ValueError: if another argument is wrong.
    """
    check_positive("seeds", seeds)
    if "seed" in settings:
        raise TaskError("seed is no setting of a task; --seeds says how many are measured.")
    found: dict[int, TaskStatistics] = {}
    sizes = (0, 0)
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        made = load_task(task, seed=seed, **settings)
        try:
            found[seed] = measure(made, seed)
        except ValueError as error:
            raise TaskError(str(error)) from error
        except Exception as error:
            raise TaskError.of(f"task {source_name(task)} could not be measured", error) from error
        sizes = len(made.train[1]), made.batch_size
        if progress is not None:
            progress(len(found), seeds)
    return Advice.of(source_name(task), found, sizes)
