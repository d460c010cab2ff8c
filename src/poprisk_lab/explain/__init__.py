"""Explain one run of a task: what training dissipated, what it trapped, what noise got through."""

from __future__ import annotations

from typing import Any

from poprisk.path import NotAnalysable
from poprisk.task import Task
from poprisk.task.data import DatasetInputs
from poprisk_lab.explain.measure import Say, measure_cells, measure_operators
from poprisk_lab.explain.plan import ExplainPlan

__all__ = ["ExplainPlan", "explain"]

FORMAT = 1


def explain(plan: ExplainPlan, *, say: Say) -> dict[str, Any]:
    """Record the runs of a plan and measure them; JSON values.

    With clean targets, the whole task is trained with the plan's optimizer and with PopRiskAdamW,
    and followed matrix-free. A small run gives the dense operators.

    Raises:
        NotAnalysable: if none of it can be analysed; the message says what would work.
        TaskError: if the task cannot be made.
    """
    task = plan.task()
    if any(isinstance(x, DatasetInputs) for x, _ in (task.train, task.test)):
        raise NotAnalysable(
            f"task {task.name} reads its data batch by batch, but a run is followed on data in "
            "memory; give a pair of tensors."
        )
    found: dict[str, Any] = {
        "format": FORMAT,
        "task": describe_task(plan, task),
        "plan": plan._asdict(),
        "arms": [],
        "dense": None,
        "notices": [],
    }
    if task.clean is None:
        found["notices"].append(
            "The task does not say what its clean targets are (clean=...), so signal and label "
            "noise cannot be told apart."
        )
    for gated in (False, True) if task.clean is not None else ():
        if gated and plan.optimizer == "PopRiskAdamW":
            continue
        found["arms"].append(measure_cells(plan, task, gated=gated, say=say))
    small, smaller = plan.small_task()
    try:
        found["dense"] = {**measure_operators(plan, small, say=say), "smaller": smaller}
    except NotAnalysable as error:
        if not found["arms"]:
            raise
        found["notices"].append(f"No operators: {error}")
    return found


def describe_task(plan: ExplainPlan, task: Task) -> dict[str, Any]:
    """The task as the report names it."""
    metric = task.scored_by
    return {
        "name": task.name,
        "source": plan.source,
        "description": task.description,
        "classification": task.classification,
        "metric": {
            "name": metric.name,
            "percent": metric.percent,
            "higher_is_better": metric.higher_is_better,
        },
        "train_examples": len(task.train[1]),
        "test_examples": len(task.test[1]),
    }
