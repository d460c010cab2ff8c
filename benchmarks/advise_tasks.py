"""Tasks at several noise levels, on which the rule of `poprisk advise` is made and judged.

Each is a function for `poprisk compare benchmarks/advise_tasks.py:FUNCTION`. Noise is in the
training targets alone, but where a built-in task has it in both.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from poprisk.losses import cross_entropy
from poprisk.task import Task
from poprisk_lab.tasks import BUILT_IN
from poprisk_lab.tasks.image import image
from poprisk_lab.tasks.mislabelled import mislabelled
from poprisk_lab.tasks.nets import mlp
from poprisk_lab.tasks.regression import squared_error

TRAINED = {"cancer": (60, 32), "wine": (100, 16), "drawn": (60, 64), "docstrings": (60, 64)}
"""Epochs and batch size by data; 64 epochs and 64 otherwise."""
FRIEDMAN, FRIEDMAN_TEST = 200, 1_000


class Level(NamedTuple):
    """A task at one noise level.

    Attributes:
        group: whose levels are left out together: tasks on the same data.
        source: what `poprisk compare` takes.
        settings: of the task's function.
        recorded: its run in ``comparisons.json``; empty if it is not there.
    """

    group: str
    source: str
    settings: dict[str, Any]
    recorded: str = ""

    @property
    def name(self) -> str:
        """Unique, fit for a directory's name."""
        words = [self.source.rpartition(":")[2]]
        words += [
            f"{value:g}" if isinstance(value, float) else str(value)
            for value in self.settings.values()
        ]
        return "-".join(words)


def levels() -> list[Level]:
    """All of them, those that take longest last."""
    here = f"{Path(__file__).resolve()}:"
    scales = {
        "sparse": ("sparse-regression", (0.33, 2.0, 4.0)),
        "dense": ("dense-regression", (0.33, 2.0, 4.0)),
        "long-tail": ("long-tail-regression", (0.0, 1.0, 2.0, 4.0)),
        "random-features": ("random-features", (0.0, 1.0, 2.0, 4.0)),
    }
    rates = {
        "cancer": (0.0, 0.1, 0.2, 0.4),
        "wine": (0.0, 0.2, 0.4, 0.6),
        "drawn": (0.0, 0.2, 0.4, 0.6),
        "docstrings": (0.0, 0.2, 0.4, 0.6),
    }
    own: list[tuple[str, str, dict[str, Any]]] = [
        *(
            (group, "scaled", {"task": name, "factor": factor})
            for group, (name, factors) in scales.items()
            for factor in factors
        ),
        *(("diabetes", "noisier", {"task": "diabetes", "noise": s}) for s in (0.5, 1.0, 2.0)),
        *(("friedman", "friedman", {"noise": s}) for s in (0.0, 0.5, 1.0)),
        *(
            (name, "labels", {"data": name, "noise": rate})
            for name, own_rates in rates.items()
            for rate in own_rates
        ),
        *(
            ("digits", "labels", {"data": "digits", "kind": kind, "noise": 0.4})
            for kind in ("pairs", "weak")
        ),
        *(("image", "picture", {"noise": s}) for s in (0.0, 0.1, 0.3)),
    ]
    recorded = {
        "digits": ("digits-10-seeds", {}),
        "digits-clean": ("digits-clean-10-seeds", {}),
        "digits-cnn": ("digits-cnn-10-seeds", {}),
        "sparse-regression": ("sparse-regression-10-seeds", {}),
        "dense-regression": ("dense-regression-10-seeds", {}),
        "diabetes": ("diabetes-10-seeds", {}),
    }
    groups = {"sparse-regression": "sparse", "dense-regression": "dense", "diabetes": "diabetes"}
    return [
        *(
            Level(groups.get(source, "digits"), source, settings, run)
            for source, (run, settings) in recorded.items()
        ),
        Level("digits", "digits", {"noise": 0.2}, "digits-noise-0.2-10-seeds"),
        Level("digits", "digits", {"noise": 0.6}, "digits-noise-0.6-10-seeds"),
        *(Level(group, here + name, settings) for group, name, settings in own),
        *(Level("digits", "digits-cnn", {"noise": rate}) for rate in (0.0, 0.2)),
    ]


def scaled(seed: int = 0, *, task: str = "sparse-regression", factor: float = 1.0) -> Task:
    """A built-in regression whose training noise is ``factor`` times as large."""
    made = BUILT_IN[task](seed)
    (x, y), clean = made.train, made.clean
    return dataclasses.replace(made, train=(x, clean + factor * (y - clean)))


def noisier(seed: int = 0, *, task: str = "diabetes", noise: float = 1.0) -> Task:
    """A built-in regression with normal noise of that size added to the training targets."""
    made = BUILT_IN[task](seed)
    x, y = made.train
    e = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1_000_000))
    return dataclasses.replace(made, train=(x, y + noise * e), clean=y)


def labels(seed: int = 0, *, data: str = "drawn", kind: str = "random", noise: float = 0.4) -> Task:
    """Classes from one of the sources of wrong labels, fully connected network."""
    rows = mislabelled(data, kind, noise, seed=seed)
    epochs, batch = TRAINED.get(data, (80, 64))
    x, x_test = rows.x.flatten(1), rows.x_test.flatten(1)
    return Task(
        name=f"{data} ({kind})",
        model=partial(mlp, x.shape[1], 128, 128, rows.classes),
        loss=cross_entropy,
        train=(x, rows.given),
        test=(x_test, rows.y_test),
        clean=rows.true,
        epochs=epochs,
        batch_size=batch,
        description=f"{data}, {noise:.0%} of the labels wrong ({kind})",
    )


def friedman(seed: int = 0, *, noise: float = 1.0) -> Task:
    """Friedman's first function, five of ten inputs matter; targets and noise in its deviations."""
    from sklearn.datasets import make_friedman1

    x, y = map(torch.from_numpy, make_friedman1(FRIEDMAN + FRIEDMAN_TEST, random_state=seed))
    x, y = 2 * x.float() - 1, ((y - 14.4) / 5.0).float().unsqueeze(1)
    e = torch.randn(FRIEDMAN, 1, generator=torch.Generator().manual_seed(seed + 1_000_000))
    n = FRIEDMAN
    return Task(
        name="friedman",
        model=lambda: mlp(10, 128, 128, 1),
        loss=squared_error,
        train=(x[:n], y[:n] + noise * e),
        test=(x[n:], y[n:]),
        clean=y[:n],
        metric="mse",
        epochs=150,
        batch_size=32,
        description=f"Friedman's first function, {n} examples",
    )


def picture(seed: int = 0, *, noise: float = 0.1) -> Task:
    """The shipped image task at 32 × 32 pixels."""
    return dataclasses.replace(image(seed, noise=noise, size=32), epochs=100)
