"""The optimizers of claims about training: AdamW, the gate in its forms, and its controls."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from poprisk_lab.arms import Arm, build_optimizer
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.studies.claim import Done, Found

PAPER: dict[str, Any] = {"mode": "paper", "softness": 1.0}
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("adamw", "AdamW", "adamw", "adamw"),
        Arm("soft", "Algorithm 1, soft mask", "paper", "poprisk", {**PAPER, "mask": "soft"}),
        Arm("snr", "Algorithm 1, snr mask", "paper", "poprisk", {**PAPER, "mask": "snr"}),
        Arm("auto", "PopRiskAdamW, defaults", "poprisk", "poprisk"),
        Arm("stream", "PopRiskAdamW, defaults, data taken as a stream", "poprisk", "poprisk"),
        Arm("matched", "AdamW, RMS-matched", "rms-matched", "rms-matched"),
        Arm("shuffled-soft", "soft mask, shuffled", "shuffled", "shuffled", PAPER),
        Arm("shuffled-snr", "snr mask, shuffled", "shuffled", "shuffled", {**PAPER, "mask": "snr"}),
    )
}
Step = Callable[[Optimizer], None]
"""Lets an optimizer take its step."""
Train = Callable[[str, UpdateTrace | None, Step], list[Found]]
"""Trains with the arm of that name, for some seeds."""


def make_optimizer(
    arm: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    batch_size: int,
    dataset_size: int | None,
    trace: UpdateTrace | None = None,
) -> Optimizer:
    """The optimizer of an arm of :data:`ARMS`.

    Args:
        arm: its name.
        model: whose parameters it trains.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
        batch_size: for the gate.
        dataset_size: for the gate; None for a stream.
        trace: update sizes, for the arm ``matched``.
    """
    chosen = ARMS[arm]
    given = {**chosen.settings, "lr": lr, "weight_decay": weight_decay}
    sizes: dict[str, Any] = {"batch_size": batch_size, "dataset_size": dataset_size}
    return build_optimizer(dataclasses.replace(chosen, settings=given), model, **sizes, trace=trace)


def train_with_control(train: Train, arm: str, *, matched: bool) -> Found:
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
    """An optimizer with its settings, and what it found.

    Attributes:
        arm: of :data:`ARMS`.
        follows: the arm whose update sizes it has; empty for none.
        lr: learning rate.
        weight_decay: decoupled.
        found: by seed.
    """

    arm: str
    follows: str
    lr: float
    weight_decay: float
    found: dict[int, Found]

    @property
    def label(self) -> str:
        """For tables: ``AdamW, lr 0.001, decay 0.01``."""
        name = ARMS[self.arm].label + (f" to {ARMS[self.follows].label}" if self.follows else "")
        return f"{name}, lr {self.lr:g}" + f", decay {self.weight_decay:g}" * (self.arm == "adamw")

    @property
    def colour(self) -> str:
        """Of its line in a plot."""
        return ARMS[self.arm].family

    def values(self, key: str) -> dict[int, Any]:
        """What was found under ``key``, by seed."""
        return {seed: found[key] for seed, found in self.found.items()}

    def mean(self, key: str) -> float:
        """Mean over seeds of a number that was found."""
        return statistics.fmean(self.values(key).values())


def contestants(done: Iterable[Done]) -> list[Contestant]:
    """Trials grouped by optimizer and settings, the runs of RMS-matched AdamW apart."""
    found: dict[tuple[str, str, float, float], dict[int, Found]] = {}
    for settings, result in done:
        arm, rate, decay = settings["arm"], settings["lr"], settings["weight_decay"]
        keys = {"runs": (arm, "", rate, decay), "matched": ("matched", arm, rate, decay)}
        for kind, key in keys.items():
            for seed, one in zip(settings["seeds"], result.get(kind, []), strict=False):
                found.setdefault(key, {})[seed] = one
    return [Contestant(*key, runs) for key, runs in found.items()]


def of_arm(all_of_them: Sequence[Contestant], *arms: str, **fields: Any) -> list[Contestant]:
    """The contestants of these arms, with these fields."""
    return [
        c
        for c in all_of_them
        if c.arm in arms and all(getattr(c, name) == value for name, value in fields.items())
    ]
