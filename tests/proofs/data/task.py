"""The task of the frozen run directory: two classes in four dimensions, 12 of 40 labels wrong.

A record holds a hash of this file: do not change it. With PROOF_HOLD, the name of a file, the
worker that does the runs checkpoints them at every epoch and fails in the middle of the ninth.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import Task

EPOCHS, BATCH, TRAINING = 3, 8, 40


def network() -> nn.Module:
    """Six hidden units and dropout, so that a step depends on the random state."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.25), nn.Linear(6, 2))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per example."""
    return F.cross_entropy(outputs, targets, reduction="none")


class Held:
    """Cross-entropy that fails in the middle of the ninth run."""

    def __init__(self, file: Path) -> None:
        with file.open("ab") as runs:
            runs.write(b".")
            runs.flush()
            self.fails = runs.tell() == 9
        self.steps = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += torch.is_grad_enabled()
        if self.fails and self.steps > TRAINING // BATCH * 3 // 2:
            raise ArithmeticError("held")
        return cross_entropy(outputs, targets)


def tiny(seed: int = 0) -> Task:
    """The task."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(60, 4, generator=generator) - 1
    clean = (x[:, 0] > 0).long()
    train = clean[:TRAINING].clone()
    wrong = torch.randperm(TRAINING, generator=generator)[:12]
    train[wrong] = 1 - train[wrong]
    task = Task(
        name="tiny",
        model=network,
        loss=cross_entropy,
        train=(x[:TRAINING], train),
        test=(x[TRAINING:], clean[TRAINING:]),
        clean=clean[:TRAINING],
        epochs=EPOCHS,
        batch_size=BATCH,
        description="two classes, 30% of the training labels wrong",
    )
    hold = os.environ.get("PROOF_HOLD", "")
    if hold and multiprocessing.parent_process() is not None:
        for name in ("poprisk.training", "poprisk_lab.fit"):
            if name in sys.modules:
                sys.modules[name].CHECKPOINT_SECONDS = -1.0
        object.__setattr__(task, "loss", Held(Path(hold)))
    return task
