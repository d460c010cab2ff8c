"""Small tasks as a user would write them, for the tests of all that trains and records.

Named in tests as ``tests/tiny.py:function``.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import poprisk_lab.checkpoint
from poprisk import Task

FILE = Path(__file__)
TRAINING, TEST, BATCH = 40, 20, 8
FREE_RUNS = 5


def source(function: str) -> str:
    """Return a task of this file as the command line takes it."""
    return f"{FILE}:{function}"


def network() -> nn.Module:
    """Eight hidden units and dropout, so that a step depends on the random state."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 2))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per example."""
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error per example, of outputs and targets (b, 1)."""
    return (outputs - targets).square().mean(1)


def tiny(seed: int = 0, *, epochs: int = 4) -> Task:
    """Two classes in four dimensions, 12 of 40 training labels wrong."""
    x, clean, g = _inputs(seed)
    train = clean[:TRAINING].clone()
    wrong = torch.randperm(TRAINING, generator=g)[:12]
    train[wrong] = 1 - train[wrong]
    return Task(
        name="tiny",
        model=network,
        loss=cross_entropy,
        train=(x[:TRAINING], train),
        test=(x[TRAINING:], clean[TRAINING:]),
        clean=clean[:TRAINING],
        epochs=epochs,
        batch_size=BATCH,
        description="two classes, 30% of the training labels wrong",
    )


def regression(seed: int = 0, *, epochs: int = 4) -> Task:
    """A line through noisy points; every training target is a number of its own."""
    x, _, g = _inputs(seed)
    clean = x[:, :1] - x[:, 1:2]
    y = clean + torch.randn(len(x), 1, generator=g)
    return Task(
        name="regression",
        model=lambda: nn.Linear(4, 1),
        loss=squared_error,
        train=(x[:TRAINING], y[:TRAINING]),
        test=(x[TRAINING:], y[TRAINING:]),
        clean=clean[:TRAINING],
        metric="mse",
        epochs=epochs,
        batch_size=BATCH,
    )


def patient(seed: int = 0, *, epochs: int = 20) -> Task:
    """The task ``tiny``, checkpointed every epoch.

    With TINY_HOLD, the name of a file, runs after the first :data:`FREE_RUNS` stop half-way.
    """
    worker = multiprocessing.parent_process() is not None
    if worker:
        poprisk_lab.checkpoint.CHECKPOINT_SECONDS = -1.0
    task = tiny(seed, epochs=epochs)
    hold = os.environ.get("TINY_HOLD", "")
    if hold and worker:
        object.__setattr__(task, "loss", _Held(Path(hold), epochs))
    return task


def gated(seed: int = 0, *, folder: str, epochs: int = 6) -> Task:
    """The task ``tiny``, checkpointed every epoch; runs stay half-way while ``closed`` lies there.

    Each writes a file there with the number of its process for a name, when it is half-way.
    """
    poprisk_lab.checkpoint.CHECKPOINT_SECONDS = -1.0
    task = tiny(seed, epochs=epochs)
    object.__setattr__(task, "loss", _Gated(Path(folder), epochs))
    return task


def fragile(seed: int = 0) -> Task:
    """The task ``tiny``, whose training fails on seed 1."""
    task = tiny(seed)
    if seed == 1:
        object.__setattr__(task, "loss", _failing)
    return task


def lethal(seed: int = 0) -> Task:
    """The task ``tiny``, whose training ends the process on seed 1."""
    task = tiny(seed)
    if seed == 1:
        object.__setattr__(task, "loss", _exiting)
    return task


def crowded(seed: int = 0) -> Task:
    """The task ``tiny``, checkpointed every epoch onto a disk that is full."""
    if multiprocessing.parent_process() is not None:
        poprisk_lab.checkpoint.CHECKPOINT_SECONDS = -1.0
        setattr(poprisk_lab.checkpoint.os, "replace", _full_disk)  # noqa: B010 (in the worker alone)
    return tiny(seed)


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _inputs(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TRAINING + TEST, 4, generator=generator)
    return x, (x[:, 0] > 0).long(), generator


class _Held:
    """Counts itself among the runs; one too many stays in the middle until its parent is gone.

    It stays a minute longer: what must end with its parent has ended by then.
    """

    def __init__(self, file: Path, epochs: int) -> None:
        with file.open("ab") as runs:
            runs.write(b".")
            runs.flush()
            self.free = runs.tell() <= FREE_RUNS
        self.steps, self.parent = epochs // 2 * (TRAINING // BATCH), os.getppid()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.steps -= torch.is_grad_enabled()
        if not self.free and self.steps < 0:
            while os.getppid() == self.parent:
                time.sleep(0.01)
            time.sleep(60)
        return cross_entropy(outputs, targets)


class _Gated:
    """Waits half-way while there is a file ``closed``."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder, self.steps = folder, epochs // 2 * (TRAINING // BATCH)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.steps -= torch.is_grad_enabled()
        if self.steps < 0 and (self.folder / "closed").exists():
            (self.folder / str(os.getpid())).touch()
            while (self.folder / "closed").exists():
                time.sleep(0.01)
        return cross_entropy(outputs, targets)


def _failing(outputs: Tensor, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise ArithmeticError("the loss gave up")
    return cross_entropy(outputs, targets)


def _exiting(outputs: Tensor, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        os._exit(7)
    return cross_entropy(outputs, targets)
