"""Claim: grokking comes five times sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from poprisk.intervals import Interval
from poprisk_lab.plots import Line, Plot, Table, points
from poprisk_lab.results import TrialResult
from poprisk_lab.studies import criteria
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Workspace
from poprisk_lab.studies.criteria import Criterion, Steps, at_least, controls
from poprisk_lab.studies.grokking import channel, forces, runs
from poprisk_lab.studies.grokking.arms import CHANGES, FORCES, LABELS
from poprisk_lab.studies.grokking.arms import trials as trials
from poprisk_lab.studies.grokking.delay import delay_law
from poprisk_lab.studies.grokking.forces import COLUMNS

PAPER = 29_450 / 5_950
"""Times fewer steps, as published."""
SHOWN = 5
"""Seeds of an arm that are drawn."""
COLOURS = {
    "ours": "poprisk",
    "adamw-same": "adamw",
    "adamw-tuned": "early-stopping",
    "ours-tuned": "rms-matched",
    "letter-snr": "paper",
    "shuffled": "shuffled",
    "soap-tuned": "module-2",
    "muon-tuned": "module-6",
}


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One run, alone, with its kernels, or with its forces."""
    kinds = {"run": runs.run, "channel": channel.run, "forces": forces.run}
    return kinds[settings["kind"]](settings, workspace)


def judge(results: Results) -> Report:
    """Five times fewer steps than AdamW; the target in the channel no later than it is learned."""

    def faster(name: str, slow: str, fast: str = "ours", claimed: float | None = None) -> Criterion:
        found = criteria.speed_up(steps_of(results, slow), steps_of(results, fast))
        return at_least(f"times fewer steps than {name}", found, 1.0)._replace(claimed=claimed)

    same = "AdamW at the same settings"
    decided = [
        faster(f"{same}, full batch", "adamw-same", claimed=PAPER),
        faster(f"{same}, Algorithm 1 to the letter (snr)", "adamw-same", "letter-snr", PAPER),
        *(
            faster(f"AdamW at the settings best for it, Algorithm 1 to the letter ({mask})",
                   "adamw-tuned", f"letter-{mask}-best", PAPER)
            for mask in ("snr", "soft")
        ),
        at_least("measurements by which the target's energy enters the channel before the test "
                 "accuracy rises", channel_lead(results), 0.0),
    ]  # fmt: skip
    tuned = "both tuned on another seed"
    beside = [
        faster(f"{same}, batches of 512", "adamw-512", "ours-512", PAPER),
        faster(f"AdamW, {tuned}", "adamw-tuned", "ours-tuned"),
        *(
            faster(f"{name}, {tuned}", f"{name.lower()}-tuned", "ours-tuned")
            for name in ("Grokfast", "SOAP", "Muon")
        ),
        *(
            faster(f"{LABELS[name]}, same settings", name)
            for name in ("grokfast", "orthograd", "rms-matched", "shuffled")
        ),
        *delay_law(results),
    ]
    return Report([*decided, *controls(*beside)], table(results))


def steps_of(results: Results, name: str) -> Steps:
    """When the runs of this name reached their goal."""
    return Steps.of(results.where(name=name))


def channel_lead(results: Results) -> Interval:
    """Measurements from the half-rise of the channel's energy to half of the test set right.

    The energy is that of the training targets in the kernel of the training set. Seeds on which
    either never comes are left out.
    """
    found = [d for d in results.where(kind="channel") if None not in _moments(d)]
    network, entered = (
        {d.settings["seed"]: _moments(d)[i] / d.settings["every"] for d in found} for i in (0, 1)
    )
    return criteria.difference(network, entered)


def _moments(trial: TrialResult) -> tuple[Any, Any]:
    return trial.metrics["network"], trial.metrics["channel"]


def table(results: Results) -> Table:
    """When each arm got there, each point of a grid, and each run with one setting changed."""
    found = results.where(kind="run").by("name")
    keys = {_label(name): name for name in found}

    def against(label: str) -> Results | None:
        """AdamW at the same batch size, or tuned as well."""
        name = keys[label]
        tails = {"tuned": "tuned", "best": "tuned", "512": "512"}
        rival = f"adamw-{tails.get(name.rpartition('-')[2], 'same')}"
        return None if name == rival or name not in LABELS else results.where(name=rival)

    return criteria.steps_table(
        "arm",
        {label: found[name] for label, name in keys.items()},
        against,
        {
            "steps × lr × decay": _decay_times,
            "steps to 99% training": "memorized",
            "best accuracy": "best",
            "accuracy at the end": lambda d: d.metrics["curve"][-1][3],
            "loss spikes in 1,000 steps": _spikes,
        },
        settings={"lr": "lr", "decay": "weight_decay"},
        about="Steps to 95% held-out; runs that did not get there are censored, and ratios above "
        "are of the steps up to the least number after which one was stopped. The log-rank test is "
        "against AdamW at the same settings, or tuned as well. A spike: the training loss more "
        "than doubles, and rises by 0.02, in one step.",
    )


def _decay_times(trial: TrialResult) -> float | None:
    """Steps in units of the time that weight decay takes."""
    reached, settings = trial.metrics["reached"], trial.settings
    return None if reached is None else reached * settings["lr"] * settings["weight_decay"]


def _spikes(trial: TrialResult) -> float:
    return 1000 * trial.metrics["jumps"] / max(trial.metrics["steps"], 1)


def _label(name: str) -> str:
    change = CHANGES.get(name.removeprefix("change-"))
    if change is None:
        return LABELS.get(name, name)
    return f"{LABELS[change.arm]}: {change.label}"


def show(results: Results) -> Plots:
    """Accuracy over training, who got there when, the grids, forces, and the channel."""
    lines = list[Line]()
    for name, colour in COLOURS.items():
        for d in [*results.where(name=name)][:SHOWN]:
            x, y = [max(r[0], 1) for r in d.metrics["curve"]], [r[3] for r in d.metrics["curve"]]
            lines.append(Line(LABELS[name] if d.settings["seed"] == 0 else "", x, y, colour))
    lines.sort(key=lambda line: not line.name)
    waiting = [
        criteria.survival_line(LABELS[name], steps_of(results, name), colour)
        for name, colour in COLOURS.items()
    ]
    tried = [d for d in results if d.settings["name"].startswith(("grid-", "gate-grid-"))]
    adamw = [d for d in tried if d.settings["arm"] == "adamw"]
    gated = [d for d in tried if d.settings["arm"] != "adamw"]
    return [
        Plot("Held-out accuracy", "step", "accuracy", lines, "One line a seed.", log_x=True),
        Plot("Not yet at 95%", "step", "share of seeds", waiting,
             "Kaplan and Meier: the share of seeds that have not got there yet.", log_x=True),
        Plot("Steps against learning rate × decay", "learning rate × decay", "steps to 95%",
             [_pace("AdamW", adamw, "adamw"), _pace("PopRiskAdamW", gated, "poprisk")],
             "Each point is a setting on the tuning seed; those that never got there are left out.",
             log_x=True, log_y=True),
        _forces_plot(
            results, "straightness", "How straight the way is", "straightness",
            "Length of the sum of all updates between two measurements, over the sum of their "
            "lengths: 1 if every update goes on where the last one went. Unrelated gradients would "
            "come to 0.28 over 250 steps and to 0.62 over the 50 of the tuned arms."),
        _forces_plot(
            results, "edge", "How near to the edge of stability", "share of the edge",
            "Largest curvature of the training loss in the optimizer's metric, mask included, over "
            "the largest that momentum can bear: above 1 a step on a quadratic would overshoot."),
        _forces_plot(results, "loss", "Training loss", "loss",
                     "Of the same runs, at the same moments."),
        *(_channel_plot(d) for d in results.where(kind="channel", seed=0)),
    ]  # fmt: skip


def _forces_plot(results: Results, column: str, title: str, y: str, about: str) -> Plot:
    """A column of the runs whose steps were taken apart."""
    at, lines = COLUMNS.index(column), list[Line]()
    for name in FORCES:
        for d in results.where(name=f"forces-{name}"):
            rows = [row for row in d.metrics["curve"] if row[at] and row[0]]
            x, values = [r[0] for r in rows], [row[at] for row in rows]
            lines.append(Line(LABELS[name], x, values, COLOURS[name]))
    return Plot(title, "step", y, lines, about, log_x=True, log_y=column != "straightness")


def _pace(name: str, grid: Sequence[TrialResult], colour: str) -> Line:
    """Steps against learning rate × decay, a point a setting."""
    x = [d.settings["lr"] * d.settings["weight_decay"] for d in grid]
    y = [math.nan if d.metrics["reached"] is None else float(d.metrics["reached"]) for d in grid]
    return points(name, x, y, colour)


def _channel_plot(d: TrialResult) -> Plot:
    steps, *columns = zip(*d.metrics["curve"], strict=True)
    looks = {
        "training accuracy": ("other", "dot"),
        "test accuracy": ("adamw", "solid"),
        "target's energy in the channel": ("poprisk", "solid"),
        "test accuracy of the kernel alone": ("poprisk", "dash"),
    }
    return Plot(
        f"The target enters the channel (p = {d.settings['p']})", "step", "share",
        [Line(name, steps, column, *look)
         for column, (name, look) in zip(columns, looks.items(), strict=True)],
        f"The channel: the leading {d.settings['rank']} directions of the kernel at that moment; "
        f"a random target would have {d.metrics['chance']:.0%} of its energy there.",
    )  # fmt: skip
