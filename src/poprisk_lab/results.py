"""What trials have found: one table, a row a trial, or a row an evaluation and one an end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from poprisk.intervals import Interval, t_interval
from poprisk_lab.store import Row, Store, end_of

Settings = dict[str, Any]
Metrics = dict[str, Any]
"""What a trial found; JSON values."""
T = TypeVar("T")
Key = str | tuple[str, ...]
"""Where a figure stands among metrics: its key, or keys, one in the other."""


class RunData(NamedTuple):
    """What the directory of a comparison says.

    Attributes:
        config: contents of ``config.json``.
        environment: contents of ``environment.json``.
        epochs: the ``epoch`` rows, each epoch of a run once.
        ends: the ``end`` row of each finished run, by arm name and seed.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[Row]
    ends: dict[tuple[str, int], Row]


def read_run(store: Store) -> RunData:
    """Everything that the directory of a comparison holds.

    Raises:
        RunDirectoryError: if it is missing or a file in it is damaged.
    """
    config = store.config()
    keys = [(arm["name"], seed) for seed in config["seeds"] for arm in config["arms"]]
    rows = store.rows(f"{arm}-{seed}" for arm, seed in keys)
    epochs, ends = list[Row](), dict[tuple[str, int], Row]()
    for (arm, seed), found in zip(keys, rows.values(), strict=True):
        # Attempts at a run repeat each other's rows: an epoch counts once.
        by_epoch = {row["epoch"]: row for row in found if row["event"] == "epoch"}
        epochs += [by_epoch[epoch] for epoch in sorted(by_epoch)]
        if (end := end_of(found)) is not None:
            ends[arm, seed] = end
    return RunData(config, store.environment(), epochs, ends)


class TrialResult(NamedTuple):
    """A finished trial: its settings, and what it found."""

    settings: Settings
    metrics: Metrics

    def figure(self, key: Key) -> Any:
        """What was found under a key; None if nothing was."""
        value: Any = self.metrics
        for one in (key,) if isinstance(key, str) else key:
            value = None if value is None else value.get(one)
        return value


class Results(tuple[TrialResult, ...]):
    """Finished trials: a part of them by settings, and their figures by seed, as mean or as worst.

    A figure is named by its key among the metrics, by a tuple of keys where it lies deeper.

    Example:
        >>> done = Results(TrialResult({"seed": s}, {"loss": {"end": 2.0 * s}}) for s in range(3))
        >>> done.where(seed=2).by_seed(("loss", "end"))
        {2: 4.0}
        >>> done.mean(("loss", "end")).mean
        2.0
    """

    def where(self, **settings: Any) -> Results:
        """The trials with these settings."""
        return Results(d for d in self if all(d.settings.get(k) == v for k, v in settings.items()))

    def by(self, setting: str) -> dict[Any, Results]:
        """The trials by their value of one setting, in the order in which values appear."""
        values = dict.fromkeys(d.settings.get(setting) for d in self)
        return {value: self.where(**{setting: value}) for value in values}

    def all(self, key: Key) -> list[Any]:
        """The figure of each trial that has it."""
        return [v for d in self if (v := d.figure(key)) is not None]

    def by_seed(self, key: Key) -> dict[int, Any]:
        """The figure of each trial by seed; None where it has none."""
        return {d.settings["seed"]: d.figure(key) for d in self}

    def mean(self, key: Key) -> Interval:
        """Mean of the figure with its interval."""
        return t_interval(self.all(key))

    def over(self, setting: str, key: Key, how: Callable[[list[float]], float]) -> dict[int, float]:
        """One figure a seed out of those of all values of a setting: their least, or mean."""
        return across([group.by_seed(key) for group in self.by(setting).values()], how)

    def largest(self, key: Key) -> Interval:
        """The largest figure, which has no interval."""
        worst = max(self.all(key))
        return Interval(worst, worst, worst)


def across(
    groups: Collection[Mapping[int, float]], how: Callable[[list[float]], T]
) -> dict[int, T]:
    """One figure a seed out of those of several groups, over the seeds that all of them have.

    Example:
        >>> across([{0: 1.0, 1: 5.0}, {1: 2.0}], max)
        {1: 5.0}
    """
    shared = set.intersection(*map(set, groups)) if groups else set()
    return {seed: how([group[seed] for group in groups]) for seed in sorted(shared)}
