"""Settings of the claim on grokking: arms, grids, seeds, single changes, and its trials."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from poprisk_lab.studies.claim import Trial

BASE: dict[str, Any] = {
    "kind": "run", "table": "division", "p": 97, "fraction": 0.25, "width": 128, "hidden": 256,
    "batch": 0, "beta2": 0.98, "every": 50, "after": 200,
}  # fmt: skip
SAME = {"lr": 1e-3, "weight_decay": 1.0}
BEST = {"lr": 1e-2, "weight_decay": 2.0}
"""Those that AdamW does best with."""
FINE = {"every": 25, "limit": 3000}
LETTER = {"mode": "paper", "softness": 1.0, "alpha": 1.0, "mask": "snr"}
LETTER_SOFT = {**LETTER, "mask": "soft"}
ARMS: dict[str, dict[str, Any]] = {
    "ours": {"arm": "poprisk", "gate": {}, **SAME, "limit": 12_000},
    "adamw-same": {"arm": "adamw", **SAME, "limit": 30_000},
    "adamw-tuned": {"arm": "adamw", **BEST, **FINE},
    "ours-tuned": {"arm": "poprisk", "lr": 5e-3, "weight_decay": 3.0, "gate": {"z": 3.0}, **FINE},
    "grokfast-tuned": {"arm": "grokfast", "lr": 5e-3, "weight_decay": 3.0,
                       "gate": {"grokfast_lamb": 0.5}, **FINE},
    "soap-tuned": {"arm": "soap", "lr": 3e-3, "weight_decay": 3.0, "gate": {}, **FINE},
    "muon-tuned": {"arm": "muon", **BEST, "gate": {}, **FINE},
    "letter-snr": {"arm": "paper", "gate": LETTER, **SAME, "limit": 7000},
    "rms-matched": {"arm": "rms-matched", "gate": {}, **SAME, "limit": 7000},
    "shuffled": {"arm": "shuffled", "gate": {}, **SAME, "limit": 7000},
    "grokfast": {"arm": "grokfast", "gate": {}, **SAME, "limit": 7000},
    "orthograd": {"arm": "orthograd", "gate": {}, **SAME, "limit": 7000},
    "letter-snr-best": {"arm": "paper", "gate": LETTER, **BEST, **FINE},
    "letter-soft-best": {"arm": "paper", "gate": LETTER_SOFT, **BEST, **FINE},
    "ours-512": {"arm": "poprisk", "gate": {}, **SAME, "batch": 512, "limit": 12_000},
    "adamw-512": {"arm": "adamw", **SAME, "batch": 512, "limit": 45_000},
}  # fmt: skip
SEEDS = dict.fromkeys(ARMS, 5) | {
    "adamw-tuned": 20, "ours-tuned": 20, "grokfast-tuned": 10, "soap-tuned": 10, "muon-tuned": 10,
    "letter-snr-best": 3, "letter-soft-best": 3,
}  # fmt: skip
"""Seeds of each arm; more where runs are short and close to each other."""
CHANNEL_SEEDS = 6
TUNING_SEED = 100
GRID = [
    (1e-2, 2.0), (5e-3, 3.0), (5e-3, 2.0), (5e-3, 1.0), (3e-3, 3.0), (1e-2, 1.0), (3e-3, 1.0),
    (2e-3, 5.0), (1e-3, 10.0), (1e-2, 3.0), (5e-3, 5.0), (2e-2, 1.0),
]  # fmt: skip
"""Learning rate and decay of AdamW, tried on the tuning seed."""
BETAS = (0.95, 0.999)
"""Values of β₂ beside 0.98, tried at the two best of the grid."""
GATE_GRID = [
    (5e-3, 2.0, 3.0), (5e-3, 2.0, 1.5), (3e-3, 3.0, 1.5), (3e-3, 3.0, 3.0), (1e-2, 1.0, 3.0),
    (5e-3, 3.0, 1.5), (5e-3, 3.0, 3.0), (5e-3, 1.0, 1.5), (3e-3, 3.0, 0.75), (3e-3, 5.0, 1.5),
    (1e-2, 2.0, 3.0), (1e-2, 3.0, 3.0), (5e-3, 5.0, 3.0), (2e-2, 1.0, 3.0),
]  # fmt: skip
"""Learning rate, decay and z of the gate, tried on the tuning seed."""
GROKFAST_GRID = [
    (1e-2, 2.0, 2.0), (5e-3, 3.0, 2.0), (5e-3, 2.0, 2.0), (3e-3, 3.0, 2.0), (1e-2, 1.0, 2.0),
    (5e-3, 5.0, 2.0), (3e-3, 5.0, 2.0), (1e-2, 3.0, 2.0), (5e-3, 3.0, 0.5), (5e-3, 3.0, 5.0),
]  # fmt: skip
"""Learning rate, decay and amplification λ of Grokfast, tried on the tuning seed."""
RIVAL_GRID = [
    (1e-2, 2.0), (5e-3, 3.0), (5e-3, 2.0), (3e-3, 3.0), (1e-2, 1.0), (5e-3, 5.0), (3e-3, 5.0),
    (1e-2, 3.0),
]  # fmt: skip
"""Learning rate and decay of SOAP and Muon, tried on the tuning seed; two more of each below."""
SHORT = {**FINE, "limit": 800, "after": 0}
OWN: dict[str, list[tuple[float, float, str, dict[str, Any]]]] = {
    "soap": [(3e-3, 3.0, "b0.95", {"betas": [0.95, 0.95]}),
             (3e-3, 3.0, "f1", {"precondition_frequency": 1})],
    "muon": [(1e-2, 2.0, "m0.9", {"momentum": 0.9}), (1e-2, 2.0, "m0.98", {"momentum": 0.98})],
}  # fmt: skip
"""The two: settings of its own at the best learning rate and decay."""
CHANNEL: dict[str, Any] = {
    **BASE, "kind": "channel", "p": 31, "fraction": 0.5, "width": 64, "hidden": 128, "asked": 200,
    "rank": 60, "arm": "poprisk", "lr": 5e-3, "weight_decay": 2.0, "gate": {"z": 3.0}, "limit": 800,
}  # fmt: skip
QUICK = {"p": 19, "fraction": 0.6, "width": 32, "hidden": 64, "limit": 60, "every": 20, "after": 0}

LABELS = {
    "ours": "PopRiskAdamW, defaults",
    "adamw-same": "AdamW, same lr and decay",
    "adamw-tuned": "AdamW, tuned",
    "ours-tuned": "PopRiskAdamW, tuned",
    "grokfast-tuned": "Grokfast, tuned",
    "letter-snr": "Algorithm 1, snr mask",
    "letter-snr-best": "Algorithm 1, snr mask, AdamW's best lr and decay",
    "letter-soft-best": "Algorithm 1, soft mask, AdamW's best lr and decay",
    "soap-tuned": "SOAP, tuned",
    "muon-tuned": "Muon, tuned",
    "rms-matched": "AdamW, RMS-matched",
    "shuffled": "shuffled mask",
    "grokfast": "Grokfast",
    "orthograd": "OrthoGrad",
    "ours-512": "PopRiskAdamW, batch 512",
    "adamw-512": "AdamW, batch 512",
}

CHANGED_SEED = 0
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
    "exact": Change("learning rate 3e-3, variance over examples", "ours",
                    {**FASTER, "gate": {"variance": "exact"}}),
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
    "paper-soft": Change("soft mask", "letter-snr", {"gate": LETTER_SOFT}),
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
}  # fmt: skip


def settings_of(change: Change) -> dict[str, Any]:
    """All settings of a changed run."""
    return {**BASE, **ARMS[change.arm], "limit": LIMIT, "seed": CHANGED_SEED, **change.settings}


SPARSE = {"kind": "forces", "every": 250, "limit": 6500}
OFTEN = {"kind": "forces", "every": 50, "limit": 1500}
FORCES: dict[str, dict[str, Any]] = {
    "ours": SPARSE,
    "adamw-same": SPARSE,
    "ours-tuned": OFTEN,
    "adamw-tuned": OFTEN,
    "shuffled": {**SPARSE, "edge": False},
}
"""Arms whose forces are measured, and when; a mask drawn anew at every step has no edge."""
FEW = 2
"""Trials of a kind in the quick form."""


def trials(quick: bool) -> list[Trial]:
    """Every arm on its seeds, the grids on the tuning seed, the channel, changes and forces."""
    smaller = QUICK if quick else {}
    found = [
        _trial(name, {**BASE, **arm, **smaller}, seed)
        for name, arm in ARMS.items()
        for seed in range(FEW if quick else SEEDS[name])
    ]
    changed = [(f"change-{name}", settings_of(change)) for name, change in CHANGES.items()]
    grids = [*_adamw_grid()], [*_gate_grid()], [*_grokfast_grid()]
    for grid in (*grids, *([*_rival_grid(name)] for name in OWN), changed):
        for name, settings in grid[:FEW] if quick else grid:
            seed = settings.get("seed", TUNING_SEED)
            found.append(_trial(name, {**BASE, **settings, **smaller}, seed))
    channel = {**CHANNEL, **smaller, "asked": 40, "rank": 19} if quick else CHANNEL
    found += [_trial("channel", channel, seed) for seed in range(FEW if quick else CHANNEL_SEEDS)]
    for name in FORCES:
        found.append(_trial(f"forces-{name}", {**BASE, **ARMS[name], **FORCES[name], **smaller}, 0))
    return found


def _adamw_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    points = [(lr, decay, 0.98) for lr, decay in GRID]
    points += [(*point, beta2) for point in GRID[:2] for beta2 in BETAS]
    for lr, decay, beta2 in points:
        settings = {"arm": "adamw", "lr": lr, "weight_decay": decay, **FINE, "beta2": beta2}
        yield f"grid-lr{lr:g}-wd{decay:g}-b{beta2:g}", settings


def _gate_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    for lr, decay, z in GATE_GRID:
        settings = {"arm": "poprisk", "lr": lr, "weight_decay": decay, "gate": {"z": z}, **FINE}
        yield f"gate-grid-lr{lr:g}-wd{decay:g}-z{z:g}", settings


def _grokfast_grid() -> Iterator[tuple[str, dict[str, Any]]]:
    for lr, decay, strength in GROKFAST_GRID:
        given = {"arm": "grokfast", "gate": {"grokfast_lamb": strength}, **FINE}
        name = f"grokfast-grid-lr{lr:g}-wd{decay:g}-l{strength:g}"
        yield name, {**given, "lr": lr, "weight_decay": decay}


def _rival_grid(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    plain: list[tuple[float, float, str, dict[str, Any]]] = [(*at, "", {}) for at in RIVAL_GRID]
    for lr, decay, label, own in plain + OWN[name]:
        given = {"arm": name, "gate": own, **SHORT, "lr": lr, "weight_decay": decay}
        yield f"{name}-grid-lr{lr:g}-wd{decay:g}" + f"-{label}" * bool(label), given


def _trial(name: str, settings: dict[str, Any], seed: int) -> Trial:
    return Trial(f"{name}-{seed}", {**settings, "name": name, "seed": seed})
