"""What trials have found: one table, a row a trial, or a row an evaluation and one an end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from poprisk_lab.store import Row, Store
from poprisk_lab.study import Done, end_of

Key = tuple[str, int]


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
    ends: dict[Key, Row]


def read_run(store: Store) -> RunData:
    """Everything that the directory of a comparison holds.

    Raises:
        RunDirectoryError: if it is missing or a file in it is damaged.
    """
    config = store.config()
    keys = [(arm["name"], seed) for seed in config["seeds"] for arm in config["arms"]]
    rows = store.rows(f"{arm}-{seed}" for arm, seed in keys)
    epochs, ends = list[Row](), dict[Key, Row]()
    for (arm, seed), found in zip(keys, rows.values(), strict=True):
        # Attempts at a run repeat each other's rows: an epoch counts once.
        by_epoch = {row["epoch"]: row for row in found if row["event"] == "epoch"}
        epochs += [by_epoch[epoch] for epoch in sorted(by_epoch)]
        if (end := end_of(found)) is not None:
            ends[arm, seed] = end
    return RunData(config, store.environment(), epochs, ends)


def where(done: Iterable[Done], **settings: Any) -> list[Done]:
    """The trials with these settings."""
    return [d for d in done if all(d.settings.get(k) == v for k, v in settings.items())]


def by_seed(done: Iterable[Done], key: str, **settings: Any) -> dict[int, Any]:
    """What the trials with these settings found under ``key``, by seed."""
    return {d.settings["seed"]: d.found[key] for d in where(done, **settings)}
