"""How large a run is explained: what fits the time and memory that were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from poprisk._validate import check_number
from poprisk.evaluation import evaluating, outputs_of
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.path import NotAnalysable
from poprisk.task import Task
from poprisk.task.data import DatasetInputs
from poprisk_lab.tasks import load_task

SMALLER: dict[str, dict[str, Any]] = {
    "digits": {"hidden": 32},
    "digits-clean": {"hidden": 32},
}
"""Settings with which a built-in task is small enough for dense operators."""

SIZES = ((128, 192), (96, 192), (64, 192), (48, 192), (32, 192), (24, 128), (16, 96))
"""Examples and steps of the small run, from the largest on."""
MAX_STEPS = 800
FLOPS = 2.5e10
SECONDS_PER_ENTRY = 2e-8
SECONDS_PER_STEP = 0.02
MEMORY = 3 * 2**30


class ExplainPlan(NamedTuple):
    """What to explain.

    Attributes:
        source: the task, as the command line takes it.
        settings: of the task's function.
        seed: of data, initial weights and batches.
        optimizer: class name, of ``torch.optim`` or PopRiskAdamW.
        lr: learning rate.
        epochs: of the full run; None: the task's, at most 40.
        seconds: that the dense operators may take, roughly.
    """

    source: str
    settings: dict[str, Any]
    seed: int = 0
    optimizer: str = "AdamW"
    lr: float = 1e-3
    epochs: int | None = None
    seconds: float = 60.0

    def task(self, **more: Any) -> Task:
        """The task, with more settings."""
        return load_task(self.source, seed=self.seed, **{**self.settings, **more})

    def checked_task(self, done: str) -> Task:
        """The task, if it and the plan can be explained.

        Args:
            done: what a run is, in words.

        Raises:
            NotAnalysable, ValueError: if not.
        """
        task = self.task()
        if any(isinstance(x, DatasetInputs) for x, _ in (task.train, task.test)):
            raise NotAnalysable(
                f"task {task.name} reads its data batch by batch, but a run is {done} on data in "
                "memory; give a pair of tensors."
            )
        self.check()
        return task

    def check(self) -> None:
        """See that there are such an optimizer and such a learning rate.

        Raises:
            NotAnalysable, ValueError: if not.
        """
        kind = PopRiskAdamW if self.optimizer == "PopRiskAdamW" else None
        kind = kind or getattr(torch.optim, self.optimizer, None)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise NotAnalysable(
                f"there is no optimizer {self.optimizer!r} in torch.optim; choose SGD, Adam, "
                "AdamW, RMSprop or PopRiskAdamW."
            )
        check_number("lr", self.lr, low=0.0)

    def small_task(self) -> tuple[Task, dict[str, Any]]:
        """The task for dense operators, and which settings were made smaller for it."""
        smaller = {k: v for k, v in SMALLER.get(self.source, {}).items() if k not in self.settings}
        return self.task(**smaller), smaller


class Size(NamedTuple):
    """Of a run with dense operators: training and query examples, batch, steps."""

    n: int
    m: int
    batch: int
    steps: int


def full_steps(plan: ExplainPlan, task: Task) -> tuple[int, int]:
    """Epochs and steps of the full run."""
    each = -(-len(task.train[1]) // task.batch_size)
    epochs = plan.epochs or max(1, min(task.epochs, 40, MAX_STEPS // each))
    return epochs, epochs * each


def choose_size(task: Task, model: nn.Module, seconds: float) -> Size:
    """The largest run whose dense operators fit.

    Raises:
        NotAnalysable: if not even the smallest does.
    """
    P = sum(p.numel() for p in model.parameters())
    with evaluating(model):
        c = outputs_of(model, task.train[0][:2])[0].numel()
    for examples, steps in SIZES:
        n = min(examples, len(task.train[1]))
        size = Size(n, min(n, len(task.test[1])), max(2, min(task.batch_size, n // 4)), steps)
        if _seconds(size, P, c) <= seconds and _bytes(size, P, c) < MEMORY:
            return size
    raise NotAnalysable(
        f"dense operators of a model with {P:,} weights and {c} outputs take over {seconds:g} s "
        f"even for {SIZES[-1][0]} examples; make the model smaller (--set, if the task has a "
        "setting for it) or give more time (--seconds). The four cells need no dense operators."
    )


def _seconds(size: Size, P: int, c: int) -> float:
    N, Nq, b = size.n * c, size.m * c, size.batch * c
    products = 2.0 * P * N * (b + 2 * N + Nq) / FLOPS
    jacobians = (3 * (N + Nq) + b) * P * SECONDS_PER_ENTRY
    return size.steps * (SECONDS_PER_STEP + products + jacobians)


def _bytes(size: Size, P: int, c: int) -> float:
    N, Nq = size.n * c, size.m * c
    return 8.0 * (P * (5 * N + Nq) + 6 * N * (N + Nq))


def make_optimizer(
    plan: ExplainPlan, model: nn.Module, *, gated: bool, batch_size: int, dataset_size: int
) -> Optimizer:
    """The optimizer of a run; ``gated``: PopRiskAdamW, whatever the plan says."""
    if gated or plan.optimizer == "PopRiskAdamW":
        return PopRiskAdamW(
            model.parameters(), lr=plan.lr, batch_size=batch_size, dataset_size=dataset_size
        )
    make: Callable[..., Optimizer] = getattr(torch.optim, plan.optimizer)
    return make(model.parameters(), lr=plan.lr)
