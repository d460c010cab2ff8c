"""Claim: grokking comes five times sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from poprisk_lab.studies.claim import Claim, Done, Findings, Found, Workspace, steps_of, where
from poprisk_lab.studies.grokking import channel, forces, runs
from poprisk_lab.studies.grokking.arms import ARMS, LABELS
from poprisk_lab.studies.grokking.page import show, table
from poprisk_lab.studies.grokking.sentences import sentences
from poprisk_lab.studies.grokking.trials import trials
from poprisk_lab.studies.judge import (
    Criterion,
    Interval,
    Steps,
    difference,
    speed_up,
    where_both,
    written,
)

PAPER = 29_450 / 5_950
"""Times fewer steps, as published."""


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One run, alone, with its kernels, or with its forces."""
    kinds = {"run": runs.run, "channel": channel.run, "forces": forces.run}
    return kinds[settings["kind"]](settings, workspace)


def judge(done: Sequence[Done]) -> Findings:
    """Five times fewer steps than AdamW; the target in the channel no later than it is learned."""
    ours, tuned = steps_of(done, name="ours"), steps_of(done, name="ours-tuned")
    against = {name: speed_up(steps_of(done, name=name), ours) for name in ARMS if name != "ours"}
    literal = speed_up(steps_of(done, name="adamw-same"), steps_of(done, name="letter-snr"))
    best = where_both(steps_of(done, name="adamw-tuned"), tuned)
    minibatch = speed_up(steps_of(done, name="adamw-512"), steps_of(done, name="ours-512"))
    lead = channel_lead(done)
    criteria = [
        Criterion(
            "times fewer steps than AdamW at the same settings, full batch",
            against["adamw-same"],
            1.0,
            PAPER,
        ),
        Criterion(
            "Algorithm 1 to the letter (snr): times fewer steps than AdamW at the same settings",
            literal,
            1.0,
            PAPER,
        ),
        Criterion(
            "measurements by which the target's energy enters the channel before the test "
            "accuracy rises",
            lead,
            0.0,
        ),
        Criterion(
            "times fewer steps than AdamW at the same settings, batches of 512",
            minibatch,
            1.0,
            PAPER,
            decides=False,
        ),
        Criterion(
            "times fewer steps than AdamW, both tuned on another seed, where both got there",
            best,
            1.0,
            decides=False,
        ),
        Criterion(
            "times fewer steps than Grokfast, both tuned on another seed, where both got there",
            where_both(steps_of(done, name="grokfast-tuned"), tuned),
            1.0,
            decides=False,
        ),
        *(
            Criterion(
                f"times fewer steps than {LABELS[name]}, same settings",
                against[name],
                1.0,
                decides=False,
            )
            for name in ("grokfast", "orthograd", "rms-matched", "shuffled")
        ),
    ]
    same = against["adamw-same"]
    return Findings(
        criteria,
        ours=f"{written(same)} times fewer steps than AdamW at the same settings"
        f"{_bound(same, steps_of(done, name='adamw-same'))}, {written(minibatch)} with batches "
        f"of 512{_bound(minibatch, steps_of(done, name='adamw-512'))}; {written(best)} times with "
        "both tuned",
        controls="times the steps of the gate: "
        + ", ".join(
            f"{LABELS[name]} {written(against[name])}"
            for name in ("rms-matched", "shuffled", "grokfast", "orthograd")
        ),
        sentences=sentences(done),
        table=table(done),
    )


def channel_lead(done: Sequence[Done]) -> Interval:
    """Measurements from the half-rise of the channel's energy to half of the test set right.

    The energy is that of the training targets in the kernel of the training set. Seeds on which
    either never comes are left out.
    """
    found = where(done, kind="channel")
    network = {d.settings["seed"]: d.found["network"] for d in found}
    entered = {d.settings["seed"]: d.found["channel"] for d in found}
    every = {d.settings["seed"]: d.settings["every"] for d in found}
    known = [s for s in network if network[s] is not None and entered[s] is not None]
    return difference(
        {s: network[s] / every[s] for s in known}, {s: entered[s] / every[s] for s in known}
    )


def _bound(found: Interval, steps: Steps) -> str:
    """A note that a ratio is a lower bound, or that there is none."""
    total = len(steps.reached)
    if math.isnan(found.mean):
        return " (too few runs got there)"
    return f" (at least: {steps.censored} of {total} did not get there)" if steps.censored else ""


CLAIM = Claim(
    name="grokking",
    title="Grokking",
    statement="On a·b⁻¹ mod 97 with a quarter of the table, the gate generalizes in five times "
    "fewer steps than AdamW, and the target moves from the reservoir into the channel as it does.",
    source="[LG, §7]",
    paper="29,450 → 5,950 steps (4.9×)",
    published=[
        "a·b⁻¹ mod 97, 25% of the table for training, a small Transformer; steps to 95% held-out",
        "Algorithm 1 with its snr mask; learning rate, decay, batch size and network are not known "
        "to us",
    ],
    ours=[
        "one pre-norm block: width 128, 4 heads, 256 hidden units, initial weights N(0, 0.25/128)",
        "full batch, learning rate 1e-3, decay 1, β = (0.9, 0.98), unless said; defaults of the "
        "gate (soft, z = 1.5)",
        "a run that never reaches 95% counts with the steps it had: the ratio is a lower bound",
        "tuned: the fastest of each grid on seed 100, which is not among the seeds judged",
        "five seeds an arm; tuned, 20 (Grokfast 10)",
        "one setting at a time changed on seed 0, up to 6,500 steps; forces on seed 0",
        "the channel on p = 31, half of the table, kernel averaged over classes by random signs",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
