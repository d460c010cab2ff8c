"""Train once, and go back from a query to what every training example did to it."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from poprisk.attribution import Attribution, Replay, attribute, replay
from poprisk.path.drift import draw_batches
from poprisk.task import Task
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.explain.plan import ExplainPlan, make_optimizer
from poprisk_lab.fit import score, seed_all
from poprisk_lab.influence.queries import (
    Asked,
    Query,
    ask,
    has_classes,
    outputs_at,
    predicted_classes,
)
from poprisk_lab.results import Metrics, Settings

MOST_STEPS = 160
"""Of the training, unless its epochs are said: longer ones are often no longer smooth."""
TOP = 10
"""Examples of each side that are shown, and those that are left out together."""
FEW = 5
"""Wrong predictions that ``wrong`` stands for."""
TELL_EVERY = 10


def length_of(plan: ExplainPlan, task: Task) -> tuple[int, int]:
    """Epochs and steps of the training."""
    each = -(-len(task.train[1]) // task.batch_size)
    epochs = plan.epochs or max(1, min(task.epochs, MOST_STEPS // each))
    return epochs, epochs * each


def measure(plan: ExplainPlan, settings: Settings, workspace: Workspace) -> Metrics:
    """Do one trial: what the training comes to, or where one query comes from.

    Raises:
        NotAnalysable: if the training cannot be gone back through.
    """
    task = plan.task()
    if settings["part"] == "training":
        return train(plan, task, workspace)
    return trace(plan, task, Query(settings["kind"], settings["which"]), workspace)


def train(plan: ExplainPlan, task: Task, workspace: Workspace) -> Metrics:
    """How good the network is, and which test predictions are wrong."""

    def tell(done: int, total: int) -> None:
        if done % TELL_EVERY == 0 or done == total:
            _tell(workspace, f"training with {plan.optimizer}", done, total)

    run = trained(plan, task, tell)
    u, y = outputs_at(run, run.final, task.test[0]), task.test[1]
    epochs, steps = length_of(plan, task)
    found = {
        "epochs": epochs,
        "steps": steps,
        "seconds": run.seconds,
        "weights": run.problem.size,
        "metric": score(task, u, y),
    }
    if has_classes(task):
        wrong = (predicted_classes(u) != y) & (y >= 0)
        found |= {"wrong": int(wrong.sum()), "first_wrong": wrong.nonzero()[:FEW, 0].tolist()}
    return found


def trained(plan: ExplainPlan, task: Task, tell: Any = None) -> Replay:
    """The run that all queries are of, which repeats bit for bit."""
    seed_all(plan.seed)
    model = task.new_model()
    n = len(task.train[1])
    optimizer = make_optimizer(
        plan, model, gated=False, batch_size=min(task.batch_size, n - 1), dataset_size=n
    )
    batches = draw_batches(n, task.batch_size, length_of(plan, task)[1], plan.seed, replace=False)
    return replay(model, task.loss, optimizer, batches, task.test, train=task.train, progress=tell)


def trace(plan: ExplainPlan, task: Task, query: Query, workspace: Workspace) -> Metrics:
    """The influence of every training example on one query, and a training without the worst."""
    what, parts = f"going back from {query.words}", 3
    _tell(workspace, what, 0, parts)
    run = trained(plan, task)
    asked = ask(query, task, run)
    _tell(workspace, what, 1, parts)
    found = attribute(run, (asked.x, asked.y), measure=asked.measure if asked.measured else None)
    _tell(workspace, what, 2, parts)
    began = time.perf_counter()
    without = left_out(run, asked, found)
    seconds = time.perf_counter() - began
    _tell(workspace, what, 3, parts)
    finite = bool(found.influence.isfinite().all())
    return {
        "quantity": asked.quantity,
        "examples": len(asked.y),
        "prediction": None if asked.prediction is None else asked.prediction._asdict(),
        "output": asked.output,
        "target": asked.target,
        "value": float(found.value),
        "standard_error": _number(found.standard_error),
        "valid": found.valid,
        "reason": found.reason,
        "agreement": _number(found.agreement),
        # This training itself, going back with its check, and the one without some examples.
        "trainings": _number(1 + found.cost + seconds / max(run.seconds, 1e-9)),
        "influence": found.influence.tolist() if finite else None,
        "without": without,
    }


def left_out(run: Replay, asked: Asked, found: Attribution) -> dict[str, Any] | None:
    """Train once more without the examples that raised the query most; None if none did.

    Args:
        run: to be repeated.
        asked: the query.
        found: its influence.
    """
    if not bool(found.influence.isfinite().all()):
        return None
    index = found.raising(TOP)
    index = index[found.influence[index] > 0]
    if not len(index):
        return None
    weights = torch.ones(run.problem.n, dtype=torch.float64)
    weights[index.cpu()] = 0.0
    with torch.enable_grad():
        at = run.trained(weights)
    return {
        "examples": index.tolist(),
        "predicted": float(found.without(index)),
        "measured": _number(asked.value(run, at)),
        "says": _says(run, asked, at),
    }


def _says(run: Replay, asked: Asked, at: Tensor) -> int | None:
    """The class that is predicted at other weights."""
    if asked.prediction is None:
        return None
    return int(predicted_classes(outputs_at(run, at, asked.x))[0])


def _number(value: float) -> float | None:
    """A number that JSON has."""
    return float(value) if math.isfinite(value) else None


def _tell(workspace: Workspace, phase: str, done: int, total: int) -> None:
    workspace.tell({"event": "progress", "phase": phase, "done": done, "total": total})
