"""Which training examples did this: for predictions and losses of one run of a task.

A study of one trial that trains and says which predictions are wrong, and one a query, which trains
the same again and goes back through it. A directory takes more queries at any time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poprisk.path import NotAnalysable
from poprisk.task import Task
from poprisk_lab.comparison import describe_task, fingerprint
from poprisk_lab.explain import EXPLANATION
from poprisk_lab.explain.measure import Say
from poprisk_lab.explain.plan import ExplainPlan
from poprisk_lab.influence.measure import FEW, TOP, measure
from poprisk_lab.influence.queries import (
    PREDICTION,
    WRONG,
    Query,
    check_query,
    has_classes,
    parse_query,
)
from poprisk_lab.results import Metrics
from poprisk_lab.runner import environment, run_trials
from poprisk_lab.store import FORMAT, Row, Store, replace_text
from poprisk_lab.study import Trial, results_of

__all__ = ["EXPLANATION", "answer", "influence_table", "parse_query", "write_influence"]

TRAINING = Trial("training", {"part": "training"})
DEPTHS = (10, 30, 100, 300, 1_000)
"""How many of the most harmful examples are counted, of those that there are."""
POINTS = 60
"""Of the curve of wrong labels among the most harmful."""


def answer(
    plan: ExplainPlan,
    queries: Sequence[Query],
    store: Store,
    *,
    workers: int,
    say: Say,
    fresh: bool = False,
) -> dict[str, Any]:
    """Go back from every query, as far as the directory does not hold it yet.

    Args:
        plan: the task and how it is trained; its ``seconds`` do not count.
        queries: what is asked.
        store: the directory of the run.
        workers: processes with one thread each; 0: this process.
        say: told what is being done.
        fresh: whether to delete what the directory holds.

    Returns:
        What was found, JSON values.

    Raises:
        ValueError: if the task has not what is asked for.
        NotAnalysable: if the run cannot be gone back through, or no prediction is wrong.
        TaskError: if the task cannot be made.
        RunDirectoryError: if the directory cannot be used.
    """
    task = plan.checked_task("gone back through")
    for query in queries:
        check_query(query, task)
    trained = {k: v for k, v in plan._asdict().items() if k != "seconds"}
    data = fingerprint(plan.source, task)
    config = {"format": FORMAT, "explain": {**trained, "query": True}, "data": data}
    store.create(config, environment(workers), fresh=fresh)

    def on_row(_: Trial, row: Row) -> None:
        if row["event"] == "progress":
            say(row["phase"], row["done"], row["total"])

    do = partial(measure, plan)
    run_trials([TRAINING], do, store, workers=workers, on_row=on_row)
    training = results_of([TRAINING], store.rows([TRAINING.name]))[0].metrics
    asked = resolved(queries, training)
    if not asked:
        raise NotAnalysable(
            "no test prediction is wrong; ask for one by its position in the test set, or for test."
        )
    trials = [Trial(q.name, {"part": "query", "kind": q.kind, "which": q.which}) for q in asked]
    run_trials(trials, do, store, workers=workers, on_row=on_row)
    answers = results_of(trials, store.rows(t.name for t in trials))
    found = [described(task, q, a.metrics) for q, a in zip(asked, answers, strict=True)]
    return {
        "format": FORMAT,
        "task": describe_task(plan.source, task),
        "plan": trained,
        "training": training,
        "labels": label_counts(task),
        "queries": found,
        "notices": _notices(queries, training),
    }


def resolved(queries: Iterable[Query], training: Metrics) -> list[Query]:
    """The queries, each once, with the first wrong predictions in place of :data:`WRONG`."""
    found = list[Query]()
    for query in queries:
        if query.kind == WRONG:
            found += [Query(PREDICTION, i) for i in training["first_wrong"]]
        else:
            found.append(query)
    return [*dict.fromkeys(found)]


def _notices(queries: Sequence[Query], training: Metrics) -> list[str]:
    if not any(q.kind == WRONG for q in queries):
        return []
    wrong = training["wrong"]
    if not wrong:
        return ["No test prediction is wrong."]
    return [f"The first {FEW} of {wrong:,} wrong predictions."] if wrong > FEW else []


def wrong_labels(task: Task) -> Tensor | None:
    """Which training labels are wrong, (n,) boolean; None if the task does not say or has none."""
    if not has_classes(task) or not task.noise_known or task.clean is None:
        return None
    return task.train[1] != task.clean


def label_counts(task: Task) -> dict[str, int | None]:
    """Training examples, and how many of them have a wrong label."""
    wrong = wrong_labels(task)
    return {
        "examples": len(task.train[1]),
        "wrong": None if wrong is None else int(wrong.sum()),
    }


def described(task: Task, query: Query, found: Metrics) -> dict[str, Any]:
    """An answer with the examples behind it; without any where the derivative is not finite."""
    more: dict[str, Any] = {"name": query.name, "kind": query.kind, "which": query.which}
    if found["influence"] is None:
        names = ("raising", "lowering", "classes", "depths", "curve")
        return {**more, **found, **{name: list[Any]() for name in names}}
    influence, wrong = torch.tensor(found["influence"], dtype=torch.float64), wrong_labels(task)
    order = influence.argsort(descending=True, stable=True)
    up = order[:TOP][influence[order[:TOP]] > 0]
    down = order.flip(0)[:TOP]
    down = down[influence[down] < 0]
    ranked = None if wrong is None else wrong[order].cumsum(0).tolist()
    n = len(influence)
    depths = [k for k in DEPTHS if k < n] or [n]
    return {
        **more,
        **found,
        "raising": [_example(task, wrong, influence, i) for i in up.tolist()],
        "lowering": [_example(task, wrong, influence, i) for i in down.tolist()],
        "classes": _classes(task, influence, wrong),
        "depths": [] if ranked is None else [[k, ranked[k - 1]] for k in depths],
        "curve": [] if ranked is None else [[k, ranked[k - 1]] for k in _spread(n)],
    }


def _spread(n: int) -> list[int]:
    """Numbers of examples from ten, or one, to all, by equal factors."""
    first = min(10, n)
    steps = [first * (n / first) ** (i / (POINTS - 1)) for i in range(POINTS)]
    return sorted({round(k) for k in steps})


def _example(task: Task, wrong: Tensor | None, influence: Tensor, i: int) -> dict[str, Any]:
    y, classes = task.train[1], has_classes(task)
    one = y[i].numel() == 1
    return {
        "example": i,
        "label": y[i].item() if one else None,
        "right": int(task.clean[i]) if wrong is not None and task.clean is not None else None,
        "wrong": bool(wrong[i]) if classes and wrong is not None else None,
        "influence": float(influence[i]),
    }


def _classes(task: Task, influence: Tensor, wrong: Tensor | None) -> list[dict[str, Any]]:
    """Influence summed by the label that was trained on, and that of wrong ones among them."""
    if not has_classes(task):
        return []
    y, rows = task.train[1], list[dict[str, Any]]()
    for label in y.unique().tolist():
        mine = y == label
        row = {"label": label, "examples": int(mine.sum()), "influence": _sum(influence, mine)}
        if wrong is not None:
            row |= {
                "wrong": int((mine & wrong).sum()),
                "by_wrong": _sum(influence, mine & wrong),
            }
        rows.append(row)
    return rows


def _sum(influence: Tensor, mine: Tensor) -> float:
    return float(influence[mine].sum())


def influence_table(task: Task, found: dict[str, Any]) -> list[list[Any]]:
    """The influence of every training example on every query, a row an example, names first."""
    y = task.train[1]
    asked = [q for q in found["queries"] if q["influence"] is not None]
    head: list[Any] = ["example"]
    columns: list[list[Any]] = [[*range(len(y))]]
    if y[0].numel() == 1:
        head.append("label")
        columns.append(y.flatten().tolist())
        if task.clean is not None:
            head.append("clean")
            columns.append(task.clean.flatten().tolist())
    head += [q["name"] for q in asked]
    columns += [q["influence"] for q in asked]
    return [head, *map(list, zip(*columns, strict=True))]


def write_influence(path: Path, task: Task, found: dict[str, Any]) -> None:
    """Write :func:`influence_table` as CSV, atomically.

    Raises:
        OSError: if it cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(influence_table(task, found))
    replace_text(path, text.getvalue())
