"""Answers to ``poprisk explain --query`` as one HTML page that opens without a network."""

from __future__ import annotations

import json
from typing import Any

from poprisk.attribution.influence import AGREES, CHECKED
from poprisk.task import Task
from poprisk_lab.influence import words
from poprisk_lab.influence.examples import Show, shown_by
from poprisk_lab.page import draw
from poprisk_lab.page.formats import plural
from poprisk_lab.page.page import template
from poprisk_lab.plots import Line, Plot


def render(found: dict[str, Any], task: Task, environment: dict[str, Any]) -> str:
    """Return the page as text; the same input gives the same text.

    Args:
        found: what :func:`poprisk_lab.influence.answer` returned.
        task: whose examples are shown.
        environment: what the numbers were computed with.
    """
    train, test = shown_by(task)
    return template("influence.html.j2").render(
        task=found["task"],
        training=about_training(found),
        headline=words.headline(found),
        notices=[*words.warnings(found), *found["notices"]],
        summary=words.summary(found),
        sections=[section(found, query, train, test) for query in found["queries"]],
        raw=json.dumps({k: found[k] for k in ("task", "plan", "training")}, indent=2),
        environment=environment,
        checked=f"{CHECKED:.0%}",
        agrees=f"{AGREES:.0%}",
        plotly=draw.plotly_script(),
    )


def about_training(found: dict[str, Any]) -> list[str]:
    """The training in a few words each."""
    training, metric = found["training"], found["task"]["metric"]
    value = training["metric"]
    score = f"{value:.1%}" if metric["percent"] else f"{value:.3g}"
    return [
        plural(found["task"]["train_examples"], "training example"),
        plural(found["task"]["test_examples"], "test example"),
        plural(training["weights"], "weight"),
        f"{found['plan']['optimizer']}, lr {found['plan']['lr']:g}",
        f"{plural(training['epochs'], 'epoch')}, {plural(training['steps'], 'step')}",
        f"test {metric['name']} {score}",
    ]


def section(
    found: dict[str, Any], query: dict[str, Any], train: Show, test: Show
) -> dict[str, Any]:
    """What the page shows of one query."""
    of_one = query["kind"] == "prediction"
    most = max((abs(e["influence"]) for e in query["raising"] + query["lowering"]), default=1.0)
    lists = [
        (side, [_card(example, most, train) for example in query[key]])
        for side, key in zip(words.sides(query), ("raising", "lowering"), strict=True)
    ]
    curve = None if of_one else wrong_curve(query, found["labels"])
    return {
        "name": query["name"],
        "title": words.title(query),
        "query": query,
        "shown": test(query["which"]) if of_one else None,
        "lists": lists,
        "outline": words.outline(query),
        "of_one": of_one,
        "classes": words.classes(query),
        "depths": words.depths(query, found["labels"]),
        "figures": [] if curve is None else [(curve, draw.figure(curve))],
    }


def _card(example: dict[str, Any], most: float, train: Show) -> dict[str, Any]:
    return {
        **example,
        "given": words.number(example["label"])
        if isinstance(example["label"], float)
        else example["label"],
        "written": words.influence(example["influence"]),
        "share": round(100 * abs(example["influence"]) / most, 1),
        "shown": train(example["example"]),
    }


def wrong_curve(query: dict[str, Any], labels: dict[str, Any]) -> Plot | None:
    """The share of wrong labels among those that raised the query most; None if unknown."""
    if not query["curve"]:
        return None
    k, wrong = zip(*query["curve"], strict=True)
    share = labels["wrong"] / labels["examples"]
    return Plot(
        "Wrong labels among the most harmful",
        "most harmful examples",
        "wrong labels",
        [
            Line("by influence", k, [w / n for n, w in zip(k, wrong, strict=True)], "poprisk"),
            Line("by chance", [k[0], k[-1]], [share, share], "other", "dot"),
        ],
        "The line ends at the share of all labels that are wrong.",
        log_x=True,
        percent=True,
    )
