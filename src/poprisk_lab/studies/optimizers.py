"""The optimizers of claims about training: AdamW, the gate in its forms, and its controls."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from poprisk.intervals import Interval
from poprisk.optim.sizes import Sizes
from poprisk_lab.arms import Arm, build_optimizer
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.fit import FROM_GRADIENT
from poprisk_lab.plots import Line, rounded, short
from poprisk_lab.studies.claim import Metrics, Results, TrialResult
from poprisk_lab.studies.criteria import Steps, restricted_mean, speed_up

PAPER: dict[str, Any] = {"mode": "paper", "softness": 1.0}
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("adamw", "AdamW", "adamw", "adamw"),
        Arm("soft", "Algorithm 1, soft mask", "paper", "poprisk", {**PAPER, "mask": "soft"}),
        Arm("snr", "Algorithm 1, snr mask", "paper", "poprisk", {**PAPER, "mask": "snr"}),
        Arm("auto", "PopRiskAdamW, defaults", "poprisk", "poprisk"),
        Arm("stream", "PopRiskAdamW, defaults, data taken as a stream", "poprisk", "poprisk"),
        Arm("terms", "PopRiskAdamW, defaults, sizes by term", "poprisk", "poprisk"),
        Arm("basis", "PopRiskSOAP", "basis", "poprisk-soap", FROM_GRADIENT),
        Arm("soap", "SOAP", "peer", "soap"),
        Arm("lbfgs", "AdamW, then L-BFGS", "peer", "adamw"),
        Arm("matched", "AdamW, RMS-matched", "rms-matched", "rms-matched"),
        Arm("shuffled-auto", "PopRiskAdamW, mask shuffled", "shuffled", "shuffled"),
        Arm("shuffled-soft", "soft mask, shuffled", "shuffled", "shuffled", PAPER),
        Arm("shuffled-snr", "snr mask, shuffled", "shuffled", "shuffled", {**PAPER, "mask": "snr"}),
    )
}
Step = Callable[[Optimizer], None]
"""Lets an optimizer take its step."""
Train = Callable[[str, UpdateTrace | None, Step], list[Metrics]]
"""Trains with the arm of that name, for some seeds."""


def make_optimizer(
    arm: str,
    model: nn.Module,
    settings: dict[str, Any],
    *,
    batch_size: Sizes,
    dataset_size: Sizes,
    trace: UpdateTrace | None = None,
) -> Optimizer:
    """The optimizer of an arm of :data:`ARMS`.

    Args:
        arm: its name.
        model: whose parameters it trains.
        settings: of the trial, with ``lr`` and ``weight_decay`` (decoupled, as in AdamW).
        batch_size: for the gate; by term for the arm ``terms``.
        dataset_size: for the gate; None for a stream.
        trace: update sizes, for the arm ``matched``.
    """
    chosen = ARMS[arm]
    given = {**chosen.settings, **{key: settings[key] for key in ("lr", "weight_decay")}}
    sizes: dict[str, Any] = {"batch_size": batch_size, "dataset_size": dataset_size}
    return build_optimizer(dataclasses.replace(chosen, settings=given), model, **sizes, trace=trace)


def train_with_control(train: Train, arm: str, *, matched: bool) -> Metrics:
    """Train with an arm and, if ``matched``, with AdamW at the size of each of its updates."""
    if not matched:
        return {"runs": train(arm, None, lambda optimizer: optimizer.step())}
    trace = UpdateTrace()
    runs = train(arm, None, trace.record_step)
    return {
        "runs": runs,
        "matched": train("matched", trace, lambda optimizer: optimizer.step()),
    }


class Contestant(NamedTuple):
    """An optimizer with its settings, and its runs.

    Attributes:
        arm: of :data:`ARMS`.
        follows: the arm whose update sizes it has; empty for none.
        lr: learning rate.
        weight_decay: decoupled.
        runs: one a seed.
    """

    arm: str
    follows: str
    lr: float
    weight_decay: float
    runs: Results

    @property
    def label(self) -> str:
        """For tables: ``AdamW, lr 0.001, decay 0.01``."""
        name = ARMS[self.arm].label + (f" to {ARMS[self.follows].label}" if self.follows else "")
        return f"{name}, lr {self.lr:g}" + f", decay {self.weight_decay:g}" * (self.arm == "adamw")

    @property
    def colour(self) -> str:
        """Of its line in a plot."""
        return ARMS[self.arm].family

    @property
    def steps(self) -> Steps:
        """When its runs reached the goal, by their ``steps`` and ``limit``."""
        return Steps.of(self.runs, key="steps")

    @property
    def slowness(self) -> tuple[int, float]:
        """For sorting: runs that did not reach the goal, then the steps of those that did."""
        steps = self.steps.up_to(math.inf).values()
        return self.steps.censored, sum(math.log(s) for s in steps)

    def times_faster(self, than: Contestant) -> Interval:
        """How many times fewer steps it needs to the goal than another, paired over seeds."""
        return speed_up(than.steps, self.steps)

    def values(self, key: str) -> dict[int, Any]:
        """What was found under ``key``, by seed."""
        return self.runs.by_seed(key)

    def mean(self, key: str) -> float:
        """Mean over seeds of a number that was found."""
        return statistics.fmean(self.values(key).values())


def contestants(results: Iterable[TrialResult]) -> list[Contestant]:
    """Trials grouped by optimizer and settings, the runs of RMS-matched AdamW apart."""
    found: dict[tuple[str, str, float, float], list[TrialResult]] = {}
    for settings, metrics in results:
        arm, rate, decay = settings["arm"], settings["lr"], settings["weight_decay"]
        keys = {"runs": (arm, "", rate, decay), "matched": ("matched", arm, rate, decay)}
        for kind, key in keys.items():
            for seed, one in zip(settings["seeds"], metrics.get(kind, []), strict=False):
                found.setdefault(key, []).append(TrialResult({**settings, "seed": seed}, one))
    return [Contestant(*key, Results(runs)) for key, runs in found.items()]


def of_arm(among: Sequence[Contestant], *arms: str, **fields: Any) -> list[Contestant]:
    """The contestants of these arms, with these fields."""
    return [
        c
        for c in among
        if c.arm in arms and all(getattr(c, name) == value for name, value in fields.items())
    ]


def fastest(among: Sequence[Contestant], *arms: str) -> Contestant:
    """The one of these arms that reaches the goal first."""
    return min(of_arm(among, *arms), key=lambda c: c.slowness)


def least(among: Sequence[Contestant], *arms: str, key: str = "final") -> Contestant:
    """The one of these arms with the least mean of a figure."""
    return min(of_arm(among, *arms), key=lambda c: c.mean(key))


def most(among: Sequence[Contestant], *arms: str, key: str = "final") -> Contestant:
    """The one of these arms with the largest mean of a figure."""
    return max(of_arm(among, *arms), key=lambda c: c.mean(key))


def steps_by_rate(name: str, among: Sequence[Contestant], *, dash: str = "solid") -> Line:
    """Mean steps to the goal over the learning rate, as Kaplan and Meier."""
    rates, steps = [c.lr for c in among], [restricted_mean(c.steps) for c in among]
    return Line(name, rates, steps, among[0].colour, dash)


def error_metrics(settings: dict[str, Any], errors: Sequence[float], *, goal: float) -> Metrics:
    """What is kept of a curve of errors: the first step at the goal, both ends, a thinned curve.

    Args:
        settings: ``steps`` of the run, ``every`` how many an error stands, and how many errors one
            that is kept stands for: ``keep``.
        errors: along the run.
        goal: that is to be reached.
    """
    every, last = settings["every"], len(errors) - 1
    kept = [*range(settings["keep"] - 1, last, settings["keep"]), last]
    return {
        "steps": next((every * i for i, e in enumerate(errors, 1) if e <= goal), None),
        "limit": settings["steps"],
        "final": short(errors[-1]),
        "best": short(min(errors)),
        "at": [every * (i + 1) for i in kept],
        "errors": rounded([errors[i] for i in kept]),
    }


def rivals_of(ours: Contestant, among: Sequence[Contestant]) -> dict[str, Contestant]:
    """The controls of a contestant at its learning rate and decay; of those that were run."""
    same = {"lr": ours.lr, "weight_decay": ours.weight_decay}
    found = {
        "AdamW at its learning rate": of_arm(among, "adamw", **same),
        "AdamW at its update sizes": of_arm(among, "matched", follows=ours.arm, **same),
        "its own mask shuffled": of_arm(among, f"shuffled-{ours.arm}", **same),
    }
    return {name: one for name, some in found.items() for one in some}
