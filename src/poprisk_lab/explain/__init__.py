"""Explain one run of a task: what training dissipated, what it trapped, what noise got through.

A study of two or three trials: with clean targets the whole task is trained with the plan's
optimizer and with PopRiskAdamW, and followed matrix-free; a small run gives the dense operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from poprisk.task import Task
from poprisk_lab.comparison import describe_task, fingerprint
from poprisk_lab.explain.measure import Say, measure
from poprisk_lab.explain.plan import ExplainPlan
from poprisk_lab.results import Results
from poprisk_lab.runner import environment, run_trials
from poprisk_lab.store import FORMAT, Config, Kind, Row, Store, differing_keys
from poprisk_lab.study import Trial, results_of

__all__ = ["EXPLANATION", "ExplainPlan", "explain"]


def _is_row(row: Row) -> bool:
    return row["event"] == "progress" or isinstance(row["found"], dict)


def _differences(found: Config, wanted: Config) -> list[str]:
    return differing_keys(
        {**found["explain"], "data": found["data"]}, {**wanted["explain"], "data": wanted["data"]}
    )


RESULTS = frozenset({"explanation.json", "influence.csv", "report.html"})
EXPLANATION = Kind(
    frozenset({"explain", "data"}),
    _is_row,
    _differences,
    anew="choose another directory (--out) or start over (--fresh)",
    files=RESULTS,
    results=RESULTS,
)
"""The run directories of explanations."""


def explain(
    plan: ExplainPlan, store: Store, *, workers: int, say: Say, fresh: bool = False
) -> dict[str, Any]:
    """Record the runs of a plan and measure them, as far as the directory does not hold them yet.

    Args:
        plan: what to explain.
        store: the directory of the run.
        workers: processes with one thread each; 0: this process.
        say: told what is being done.
        fresh: whether to delete what the directory holds.

    Returns:
        What was found, JSON values.

    Raises:
        NotAnalysable: if none of it can be analysed; the message says what would work.
        TaskError: if the task cannot be made.
        RunDirectoryError: if the directory cannot be used.
    """
    task = plan.checked_task("followed")
    data = fingerprint(plan.source, task)
    config = {"format": FORMAT, "explain": plan._asdict(), "data": data}
    store.create(config, environment(workers), fresh=fresh)
    trials = trials_of(plan, task)

    def on_row(_: Trial, row: Row) -> None:
        if row["event"] == "progress":
            say(row["phase"], row["done"], row["total"])

    run_trials(trials, partial(measure, plan), store, workers=workers, on_row=on_row)
    return assemble(plan, task, results_of(trials, store.rows(t.name for t in trials)))


def trials_of(plan: ExplainPlan, task: Task) -> list[Trial]:
    """The whole task by each optimizer, if its clean targets are known, and the small run."""
    gates = (True,) if plan.optimizer == "PopRiskAdamW" else (False, True)
    cells = [
        Trial("gated" if gated else "plain", {"part": "cells", "gated": gated})
        for gated in gates
        if task.clean is not None
    ]
    return [*cells, Trial("operators", {"part": "operators", "alone": not cells})]


def assemble(plan: ExplainPlan, task: Task, results: Results) -> dict[str, Any]:
    """What the trials have found, as the page takes it."""
    (dense,) = results.where(part="operators")
    notices = list[str]()
    if task.clean is None:
        notices.append(
            "The task does not say what its clean targets are (clean=...), so signal and label "
            "noise cannot be told apart."
        )
    if refused := dense.figure("refused"):
        notices.append(f"No operators: {refused}")
    return {
        "format": FORMAT,
        "task": describe_task(plan.source, task),
        "plan": plan._asdict(),
        "arms": [cells.metrics for cells in results.where(part="cells")],
        "dense": None if refused else dense.metrics,
        "notices": notices,
    }
