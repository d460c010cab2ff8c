"""Train one arm on one seed of a task, epoch by epoch, and measure as it goes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.evaluation import evaluating
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.randomness import RandomState
from poprisk.risk import TwinRisk
from poprisk.task import Task
from poprisk.task.batches import batch_sizes, split_batches
from poprisk.task.data import Inputs, outputs_over, select
from poprisk_lab.arms import Arm, backward_mean, build_optimizer
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.controls import UpdateTrace

EVALUATIONS = 50
PATIENCE = 10
"""Early stopping gives up after this many evaluations without a better held-out metric."""

FROM_GRADIENT: dict[str, Any] = {"factors": "gradient", "variance": "ema"}
"""For PopRiskSOAP, where examples cannot be told apart."""

Row = dict[str, Any]


@dataclass
class RunState:
    """What a run must remember besides model and optimizer; saved in its checkpoint."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_metric: float | None = None
    best_epoch: int = 0
    held_out_best: float | None = None
    stopped_metric: float | None = None
    stopped_epoch: int | None = None
    stopped_memorized: float | None = None
    final_metric: float = float("nan")
    final_memorized: float | None = None
    trace: list[list[float]] = field(default_factory=list)


@dataclass
class ArmRun:
    """One arm on one seed.

    Args:
        task: made with the same seed.
        arm: how to train.
        seed: of initial weights, order of examples, and the held-out split.
        trace: update sizes, for an arm that follows another.
        record: whether to record update sizes for an arm that follows this one.
        workspace: where to keep the state between evaluations.
        device: where to train.
        with_twin: whether to estimate the risk at every evaluation, at the cost of a second run.
    """

    task: Task
    arm: Arm
    seed: int
    trace: list[list[float]] | None = None
    record: bool = False
    workspace: Workspace = field(default_factory=Workspace)
    device: str = "cpu"
    with_twin: bool = False

    def __post_init__(self) -> None:
        seed_all(self.seed)
        x, y = self.task.train
        n, fifth = len(y), len(y) // 5
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        kept = order[fifth:].sort().values if self.arm.held_out else torch.arange(n)
        self.data = _to((select(x, kept), y[kept]), self.device)
        self.held_out = _to((select(x, order[:fifth]), y[order[:fifth]]), self.device)
        self.everything = _to((x, y), self.device)
        self.test = _to(self.task.test, self.device)
        self.model = self.task.new_model(self.device)
        self.twin: TwinRisk | None = None
        if self.with_twin:
            self.twin = TwinRisk(
                lambda: self.model, self._build, self.task.loss, dataset_size=len(kept)
            )
        self.optimizer = self.twin.optimizer if self.twin else self._build(self.model)
        self.progress = RunState()

    def _build(self, model: nn.Module) -> Optimizer:
        n = len(self.data[1])
        if self.arm.optimizer == "poprisk-soap":
            return self._build_rotated(model, n)
        return build_optimizer(
            self.arm,
            model,
            batch_size=min(self.task.batch_size, n - 1),
            dataset_size=n,
            trace=None if self.trace is None else UpdateTrace(self.trace),
        )

    def _build_rotated(self, model: nn.Module, n: int) -> Optimizer:
        """From each example's factors; where a batch does not show these, from its gradient."""
        sizes = batch_sizes(n, self.task.batch_size, drop_last=self.task.drop_last)
        told = {"batch_size": min(sizes[0], n - 1), "dataset_size": n}
        with RandomState.kept():
            trial = self.task.new_model(self.device).train()
            optimizer = build_optimizer(self.arm, trial, **told)
            x, y = (part[torch.arange(sizes[-1], device=self.device)] for part in self.data)
            seen = _shows_examples(optimizer, self.task.loss(trial(x), y))
        settings = self.arm.settings if seen else {**self.arm.settings, **FROM_GRADIENT}
        return build_optimizer(replace(self.arm, settings=settings), model, **told)

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one; return whether there was.

        Raises:
            CheckpointError: if it is damaged.
        """
        state = self.workspace.load()
        if state is None:
            return False
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.twin is not None:
                self.twin.load_state_dict(state["twin"])
            self.progress = RunState(**state["progress"], trace=state["trace"].tolist())
        except Exception as error:
            raise self.workspace.damaged(error) from error
        return True

    def rows(self) -> Iterator[Row]:
        """Train to the end and yield a row an evaluation, then the closing row."""
        p, epochs = self.progress, self.task.epochs
        every = max(1, epochs // EVALUATIONS)
        while p.epoch < epochs:
            started = time.monotonic()
            for _ in range(min(every - p.epoch % every, epochs - p.epoch)):
                self._train_epoch()
            row = self.evaluate()
            p.seconds += time.monotonic() - started
            yield {**self._row("epoch"), **row, "seconds": p.seconds}
            if self._gave_up():
                break
            if p.epoch < epochs:
                self.workspace.save(self._state)
        yield {**self._row("end"), **self._closing()}
        self.workspace.clear()

    def try_out(self) -> None:
        """Take a step on each size of batch that an epoch has; the run is spent by it."""
        trace = UpdateTrace() if self.record else None
        self.model.train()
        task = self.task
        for size in batch_sizes(len(self.data[1]), task.batch_size, drop_last=task.drop_last):
            self._train_batch(torch.arange(size, device=self.device), trace)

    def _train_epoch(self) -> None:
        p, task = self.progress, self.task
        seed_all(1_000_003 * (self.seed + 1) + p.epoch)  # alike in all arms and on resume
        order = torch.randperm(len(self.data[1])).to(self.device)
        trace = UpdateTrace(p.trace) if self.record else None
        self.model.train()
        if self.twin is not None:
            self.twin.replicas[1].model.train()
        for batch in split_batches(order, task.batch_size, drop_last=task.drop_last):
            self._train_batch(batch, trace)
            p.step += 1
        p.epoch += 1

    def _train_batch(self, batch: Tensor, trace: UpdateTrace | None) -> None:
        x, y = (part[batch] for part in self.data)
        if self.twin is None:
            loss = self.task.loss(self.model(x), y)
            self._update(self.optimizer, loss, trace)
            return
        for run in self.twin.runs(batch):
            loss = run.loss(run.model(x), y)
            self._update(run.optimizer, loss, None if run.position else trace)

    def _update(self, optimizer: Optimizer, loss: Tensor, trace: UpdateTrace | None) -> None:
        optimizer.zero_grad()
        backward_mean(optimizer, loss)
        if trace is not None:
            trace.record_step(optimizer)
        else:
            optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Measure now, on the training set, the test set and what is held out."""
        p, task = self.progress, self.task
        with evaluating(self.model):
            fitted = outputs_over(self.model, self.everything[0])
            outputs = outputs_over(self.model, self.test[0])
            left = outputs_over(self.model, self.held_out[0]) if self.arm.held_out else None
        metric = score(task, outputs, self.test[1])
        memorized = task.memorized(fitted.cpu())
        p.final_metric, p.final_memorized = metric, memorized
        if self._better(metric, p.best_metric):
            p.best_metric, p.best_epoch = metric, p.epoch
        held_out = held_out_loss = None
        if left is not None:
            held_out = score(task, left, self.held_out[1])
            held_out_loss = task.loss(left, self.held_out[1]).mean().item()
            if self._better(held_out, p.held_out_best):
                p.held_out_best, p.stopped_metric, p.stopped_epoch = held_out, metric, p.epoch
                p.stopped_memorized = memorized
        return {
            "train_loss": task.loss(fitted, self.everything[1]).mean().item(),
            "train_metric": score(task, fitted, self.everything[1]),
            "test_loss": task.loss(outputs, self.test[1]).mean().item(),
            "test_metric": metric,
            "memorized": memorized,
            "held_out_metric": held_out,
            "gate": gate_row(self.optimizer),
            **(self._estimate(self.twin, held_out_loss) if self.twin is not None else {}),
        }

    def _estimate(self, twin: TwinRisk, held_out_loss: float | None) -> Row:
        """The twin's estimate, and the loss on the held-out fifth to compare it with."""
        x, y = self.data
        found = twin.estimate(x, y, batch_size=getattr(x, "batch_size", 1024))
        keys = ("value", "standard_error", "valid", "comparable", "dof", "accuracy")
        finite = {k: v for k in keys if (v := getattr(found, k)) is None or math.isfinite(v)}
        return {"estimate": {k: finite.get(k) for k in keys}, "held_out_loss": held_out_loss}

    def _gave_up(self) -> bool:
        p = self.progress
        every = max(1, self.task.epochs // EVALUATIONS)
        return self.arm.held_out and p.epoch - (p.stopped_epoch or 0) >= PATIENCE * every

    def _better(self, a: float, b: float | None) -> bool:
        if b is None or math.isnan(b):
            return True
        return a > b if self.task.scored_by.higher_is_better else a < b

    def _row(self, event: str) -> Row:
        p = self.progress
        return {
            "event": event,
            "arm": self.arm.name,
            "seed": self.seed,
            "epoch": p.epoch,
            "step": p.step,
        }

    def _closing(self) -> Row:
        p = self.progress
        keys = ("final_metric", "final_memorized", "best_metric", "best_epoch")
        keys += ("held_out_best", "stopped_metric", "stopped_epoch", "stopped_memorized", "seconds")
        row = {key: getattr(p, key) for key in keys}
        row["skipped_steps"] = getattr(self.optimizer, "skipped_steps", 0)
        return row

    def _state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": without_functions(self.optimizer.state_dict()),
            "progress": {k: v for k, v in vars(self.progress).items() if k != "trace"},
            "trace": torch.tensor(self.progress.trace, dtype=torch.float64),  # too long for JSON
        }
        if self.twin is not None:
            twin = self.twin.state_dict()
            state["twin"] = twin | {"optimizers": [*map(without_functions, twin["optimizers"])]}
        return state


def _shows_examples(optimizer: Optimizer, losses: Tensor) -> bool:
    """Whether the gradients of a batch can be told apart by example, if that is asked for."""
    assert isinstance(optimizer, PopRiskAdamW)
    if optimizer.told_by_loop() is None:
        return True
    try:
        optimizer.backward(losses)
    except (TypeError, ValueError, RuntimeError):  # batch normalization, hooks, odd functions
        return False
    return True


def score(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """The task's metric as a float."""
    return float(task.scored_by.function(outputs, targets))


def gate_row(optimizer: Optimizer) -> Row | None:
    """The gate's statistics by module, JSON values; None for an optimizer without a gate."""
    if not isinstance(optimizer, PopRiskAdamW):
        return None
    return {name: stats._asdict() for name, stats in optimizer.gate_stats().items()}


def without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without settings that are functions; loading keeps the present ones."""
    if "param_groups" not in state:
        return state
    groups = [{k: v for k, v in g.items() if not callable(v)} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def seed_all(seed: int) -> None:
    """Seed every global generator that a model may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _to(pair: tuple[Inputs, Tensor], device: str) -> tuple[Inputs, Tensor]:
    return pair[0].to(device), pair[1].to(device)
