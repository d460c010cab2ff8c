"""What the verdict of a run does not say: what is missing, what starved, how it was set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from poprisk_lab.page.formats import listed, plain, plural
from poprisk_lab.page.series import EpochRow, module_sizes
from poprisk_lab.plots import Table
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


def starved(rows: Sequence[EpochRow]) -> Table:
    """The modules that the gate starved at any time: at the end of which seeds, and how often."""
    last = {row["seed"]: row["gate"] for row in rows}
    epochs = Counter(name for row in rows for name in row["gate"])
    ever = Counter(n for row in rows for n, gate in row["gate"].items() if gate["starved"])
    end = Counter(n for gates in last.values() for n, gate in gates.items() if gate["starved"])
    return Table(
        ["Module", "Starved at the end, seeds", "Starved, epochs"],
        [[n, f"{end[n]} of {len(last)}", f"{k / epochs[n]:.0%}"] for n, k in ever.items()],
    )


def uncounted(rows: Sequence[EpochRow], parameters: int) -> int:
    """How many weights stand in no module of the gate's plots."""
    return max(0, parameters - sum(module_sizes(rows).values()))


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
