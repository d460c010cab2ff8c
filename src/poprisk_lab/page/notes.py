"""Sentences about a run that the verdict does not say: what is missing, what starved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from poprisk_lab.page.formats import listed, plain, plural
from poprisk_lab.page.series import EpochRow, module_sizes
from poprisk_lab.results import RunData


def notices(data: RunData) -> list[str]:
    """What a reader must know before trusting the page; empty for a complete, healthy run."""
    return [text for text in (_unfinished(data), _not_finite(data), _skipped(data)) if text]


def _unfinished(data: RunData) -> str:
    runs = [(arm["name"], seed) for arm in data.config["arms"] for seed in data.config["seeds"]]
    begun = {(row["arm"], row["seed"]) for row in data.epochs}
    missing = [run for run in runs if run not in data.ends]
    if not missing:
        return ""
    part = sum(run in begun for run in missing)
    done, rest = len(runs) - len(missing), len(missing) - part
    return (
        f"This comparison is unfinished: {done} of {plural(len(runs), 'training')} are complete, "
        f"{part} stopped part-way, {rest} not begun. The verdict and its table count complete "
        "trainings only; the curves show the others as far as they got. Repeat the command to go "
        "on where it stopped."
    )


def _not_finite(data: RunData) -> str:
    labels = _labels(data)
    bad = {(row["arm"], row["seed"]) for row in data.epochs if not _finite(row["test_metric"])}
    if not bad:
        return ""
    seeds = Counter(arm for arm, _ in sorted(bad))
    names = [f"{labels.get(arm, arm)} ({plural(n, 'seed')})" for arm, n in seeds.items()]
    return (
        f"The test metric was not finite at some epoch of {listed(names)}. Curves have a gap "
        "wherever one of their seeds is not finite."
    )


def _skipped(data: RunData) -> str:
    labels = _labels(data)
    steps: Counter[str] = Counter()
    for (arm, _), end in data.ends.items():
        steps[arm] += end["skipped_steps"] or 0
    found = [f"{labels.get(arm, arm)} ({plural(n, 'step')})" for arm, n in steps.items() if n]
    return f"Skipped for gradients that were not finite: {listed(found)}." if found else ""


def starved(rows: Sequence[EpochRow]) -> str:
    """Say which modules the gate starved at the end, or before it."""
    last: dict[int, EpochRow] = {}
    ever: Counter[str] = Counter()
    epochs: Counter[str] = Counter()
    for row in rows:
        if row["gate"]:
            last[row["seed"]] = row
            epochs.update(row["gate"].keys())
            ever.update(name for name, gate in row["gate"].items() if gate["starved"])
    end = Counter(n for row in last.values() for n, gate in row["gate"].items() if gate["starved"])
    parts = [f"module {name} in {n} of {plural(len(last), 'seed')}" for name, n in end.items()]
    before = [
        f"module {name} in {100 * n / epochs[name]:.0f}% of the epochs"
        for name, n in ever.items()
        if name not in end
    ]
    if parts:
        first = f"Starved at the end: {listed(parts)}. "
    else:
        first = "No module is starved at the end. "
    return first + (f"Starved for a while earlier: {listed(before)}." if before else "")


def uncounted(rows: Sequence[EpochRow], parameters: int) -> str:
    """Say how many weights stand in no module of the gate's plots, so that they add up."""
    rest = parameters - sum(module_sizes(rows).values())
    if rest <= 0:
        return ""
    return (
        f"{rest:,} of {parameters:,} weights are counted in no module: they never had a gradient, "
        "as those that read an input which is always 0."
    )


def settings(config: dict[str, Any]) -> dict[str, str]:
    """What each arm's optimizer was made with, defaults included, as far as the record says."""
    used = config.get("optimizers", {})
    return {
        arm["name"]: _settings(used.get(arm["name"]) or arm["settings"]) for arm in config["arms"]
    }


def _settings(given: dict[str, Any]) -> str:
    if not given:
        return "defaults of that version"
    words = [f"{key} {_setting(value)}" for key, value in given.items() if key != "class"]
    return ", ".join([given["class"], *words] if "class" in given else words)


def _setting(value: Any) -> str:
    return f"({plain(value)})" if isinstance(value, (list, tuple)) else plain(value)


def about_run(data: RunData) -> list[str]:
    """The size of the experiment, in a few words each."""
    task, arms, seeds = data.config["task"], data.config["arms"], data.config["seeds"]
    return [
        plural(task["train_examples"], "training example"),
        plural(task["test_examples"], "test example"),
        plural(task["parameters"], "parameter"),
        f"{plural(task['epochs'], 'epoch')} in batches of {task['batch_size']}",
        plural(len(arms), "arm"),
        plural(len(seeds), "seed"),
    ]


def _labels(data: RunData) -> dict[str, str]:
    return {arm["name"]: arm["label"] for arm in data.config["arms"]}


def _finite(value: Any) -> bool:
    return value is None or math.isfinite(value)
