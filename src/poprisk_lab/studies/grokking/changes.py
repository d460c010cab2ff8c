"""What decides the speed: one setting at a time changed from the gate's run, and from AdamW's."""

from __future__ import annotations

from typing import Any, NamedTuple

from poprisk_lab.studies.grokking.arms import ARMS, BASE, LETTER

SEED = 0
LIMIT = 6500
"""A quarter more than the gate needs on this seed as it is."""
NARROW = {"width": 64, "hidden": 128}
FASTER = {"lr": 3e-3, "limit": 2500}


class Change(NamedTuple):
    """A change of settings: how to write it, what it is made to, what is set."""

    label: str
    arm: str
    settings: dict[str, Any]


def _gate(label: str, **gate: Any) -> Change:
    return Change(label, "ours", {"gate": gate})


CHANGES = {
    "batch-128": Change("batches of 128", "ours", {"batch": 128}),
    "lr": Change("learning rate 3e-3", "ours", FASTER),
    "exact": Change(
        "learning rate 3e-3, variance over examples",
        "ours",
        {**FASTER, "gate": {"variance": "exact"}},
    ),
    "decay": Change("decay 3", "ours", {"weight_decay": 3.0}),
    "decay-gated": Change("decay gated as well", "ours", {"arm": "decay-gated"}),
    "beta1": _gate("β₁ 0.97", betas=[0.97, 0.98]),
    "beta2": Change("β₂ 0.999", "ours", {"beta2": 0.999}),
    "hard": _gate("hard mask", mask="hard"),
    "z-low": _gate("z 0.75", z=0.75),
    "z-high": _gate("z 3", z=3.0),
    "alpha": _gate("α 1", alpha=1.0),
    "per-tensor": _gate("averaged over a tensor", reduction="per_tensor"),
    "second-moment": _gate("variance from the second moment", variance="second-moment"),
    "narrow": Change("half as wide", "ours", NARROW),
    "deep": Change("two feed-forward layers", "ours", {"layers": 2}),
    "paper-soft": Change("soft mask", "letter-snr", {"gate": {**LETTER, "mask": "soft"}}),
    "paper-lr": Change("learning rate 3e-3", "letter-snr", {"lr": 3e-3}),
    "adamw-batch-128": Change("batches of 128", "adamw-same", {"batch": 128}),
    "adamw-lr": Change("learning rate 3e-3", "adamw-same", FASTER),
    "adamw-decay": Change("decay 3", "adamw-same", {"weight_decay": 3.0}),
    "adamw-beta2": Change("β₂ 0.999", "adamw-same", {"beta2": 0.999}),
    "adamw-eps-5": Change("ε 1e-5", "adamw-same", {"eps": 1e-5}),
    "adamw-eps-4": Change("ε 1e-4", "adamw-same", {"eps": 1e-4}),
    "adamw-floor-low": Change("training loss held at 0.03", "adamw-same", {"floor": 0.03}),
    "adamw-floor-high": Change("training loss held at 0.1", "adamw-same", {"floor": 0.1}),
    "adamw-narrow": Change("half as wide", "adamw-same", NARROW),
    "adamw-deep": Change("two feed-forward layers", "adamw-same", {"layers": 2}),
}


def settings_of(change: Change) -> dict[str, Any]:
    """All settings of a changed run."""
    return {**BASE, **ARMS[change.arm], "limit": LIMIT, "seed": SEED, **change.settings}
