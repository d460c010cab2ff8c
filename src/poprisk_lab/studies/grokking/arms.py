"""Settings of the claim on grokking: arms, grids, seeds."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "kind": "run",
    "table": "division",
    "p": 97,
    "fraction": 0.25,
    "width": 128,
    "hidden": 256,
    "batch": 0,
    "beta2": 0.98,
    "every": 50,
    "after": 200,
}
SAME = {"lr": 1e-3, "weight_decay": 1.0}
FINE = {"every": 25, "limit": 3000}
LETTER = {"mode": "paper", "softness": 1.0, "alpha": 1.0, "mask": "snr"}
ARMS: dict[str, dict[str, Any]] = {
    "ours": {"arm": "poprisk", "gate": {}, **SAME, "limit": 12_000},
    "adamw-same": {"arm": "adamw", **SAME, "limit": 30_000},
    "adamw-tuned": {"arm": "adamw", "lr": 1e-2, "weight_decay": 2.0, **FINE},
    "ours-tuned": {"arm": "poprisk", "lr": 5e-3, "weight_decay": 3.0, "gate": {"z": 3.0}, **FINE},
    "grokfast-tuned": {
        "arm": "grokfast",
        "lr": 5e-3,
        "weight_decay": 3.0,
        "gate": {"grokfast_lamb": 0.5},
        **FINE,
    },
    "letter-snr": {"arm": "paper", "gate": LETTER, **SAME, "limit": 7000},
    "rms-matched": {"arm": "rms-matched", "gate": {}, **SAME, "limit": 7000},
    "shuffled": {"arm": "shuffled", "gate": {}, **SAME, "limit": 7000},
    "grokfast": {"arm": "grokfast", "gate": {}, **SAME, "limit": 7000},
    "orthograd": {"arm": "orthograd", "gate": {}, **SAME, "limit": 7000},
    "ours-512": {"arm": "poprisk", "gate": {}, **SAME, "batch": 512, "limit": 12_000},
    "adamw-512": {"arm": "adamw", **SAME, "batch": 512, "limit": 45_000},
}
SEEDS = dict.fromkeys(ARMS, 5) | {
    "adamw-tuned": 20,
    "ours-tuned": 20,
    "grokfast-tuned": 10,
}
"""Seeds of each arm; more where runs are short and close to each other."""
CHANNEL_SEEDS = 6
TUNING_SEED = 100
GRID = [
    (1e-2, 2.0),
    (5e-3, 3.0),
    (5e-3, 2.0),
    (5e-3, 1.0),
    (3e-3, 3.0),
    (1e-2, 1.0),
    (3e-3, 1.0),
    (2e-3, 5.0),
    (1e-3, 10.0),
    (1e-2, 3.0),
    (5e-3, 5.0),
    (2e-2, 1.0),
]
"""Learning rate and decay of AdamW, tried on the tuning seed."""
BETAS = (0.95, 0.999)
"""Values of β₂ beside 0.98, tried at the two best of the grid."""
GATE_GRID = [
    (5e-3, 2.0, 3.0),
    (5e-3, 2.0, 1.5),
    (3e-3, 3.0, 1.5),
    (3e-3, 3.0, 3.0),
    (1e-2, 1.0, 3.0),
    (5e-3, 3.0, 1.5),
    (5e-3, 3.0, 3.0),
    (5e-3, 1.0, 1.5),
    (3e-3, 3.0, 0.75),
    (3e-3, 5.0, 1.5),
    (1e-2, 2.0, 3.0),
    (1e-2, 3.0, 3.0),
    (5e-3, 5.0, 3.0),
    (2e-2, 1.0, 3.0),
]
"""Learning rate, decay and z of the gate, tried on the tuning seed."""
GROKFAST_GRID = [
    (1e-2, 2.0, 2.0),
    (5e-3, 3.0, 2.0),
    (5e-3, 2.0, 2.0),
    (3e-3, 3.0, 2.0),
    (1e-2, 1.0, 2.0),
    (5e-3, 5.0, 2.0),
    (3e-3, 5.0, 2.0),
    (1e-2, 3.0, 2.0),
    (5e-3, 3.0, 0.5),
    (5e-3, 3.0, 5.0),
]
"""Learning rate, decay and amplification λ of Grokfast, tried on the tuning seed."""
CHANNEL: dict[str, Any] = {
    **BASE,
    "kind": "channel",
    "p": 31,
    "fraction": 0.5,
    "width": 64,
    "hidden": 128,
    "asked": 200,
    "rank": 60,
    "arm": "poprisk",
    "lr": 5e-3,
    "weight_decay": 2.0,
    "gate": {"z": 3.0},
    "limit": 800,
}
QUICK = {"p": 19, "fraction": 0.6, "width": 32, "hidden": 64, "limit": 60, "every": 20, "after": 0}

LABELS = {
    "ours": "PopRiskAdamW, defaults",
    "adamw-same": "AdamW, same lr and decay",
    "adamw-tuned": "AdamW, tuned",
    "ours-tuned": "PopRiskAdamW, tuned",
    "grokfast-tuned": "Grokfast, tuned",
    "letter-snr": "Algorithm 1, snr mask",
    "rms-matched": "AdamW, RMS-matched",
    "shuffled": "shuffled mask",
    "grokfast": "Grokfast",
    "orthograd": "OrthoGrad",
    "ours-512": "PopRiskAdamW, batch 512",
    "adamw-512": "AdamW, batch 512",
}
