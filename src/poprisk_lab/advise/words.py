"""An advice as a table, one headline and warnings."""

from __future__ import annotations

import math

from poprisk.linalg import Estimate
from poprisk_lab.advise import Advice
from poprisk_lab.advise.rule import EVEN, GAINS, LOSES, RIVALS, THRESHOLDS, TRACK
from poprisk_lab.arms import DEFAULT_ADAMW
from poprisk_lab.plots import Table

EXPECTED = {GAINS: "a gain over", EVEN: "no difference from", LOSES: "a loss against"}
NAMES = {"same": "AdamW at the same settings", "best": "the best of eight AdamW settings"}
MEANINGS = {
    "easy": "targets right, and learned early",
    "hard": "targets right, and not learned early",
    "few": "a linear model with signal in few coordinates",
    "spread": "a linear model with signal in all coordinates",
    "noisy": "noisy targets",
}
LATE = (
    "A tenth of training taught nothing that a held-out example shows: noise cannot be told from a "
    "task that is learned late (grokking, arithmetic of several steps). Use compare."
)

IF_NOISE = "Only if this is no task that is learned late, expect"
"""Before what noise would let expect, where nothing was learned that a held-out example shows."""


def headline(found: Advice) -> str:
    """What to expect against either rival, and on which condition."""
    same, best = (f"{EXPECTED[found.expected[rival]]} {NAMES[rival]}" for rival in RIVALS)
    expect = IF_NOISE if found.learned_nothing else "Expect"
    return f"{expect} {same}, and {best}: {MEANINGS[found.kind]}."


def warnings(found: Advice) -> list[str]:
    """Why the expectation may be wrong, beyond the rule's own record."""
    told = [LATE] if found.learned_nothing else []
    if found.unsure:
        names = " and ".join(name.replace("_", " ") for name in found.unsure)
        told.append(
            f"Within two errors of {names} lies another kind of task: measure more seeds "
            "(--seeds 10), or compare."
        )
    return told


def table(found: Advice) -> Table:
    """What was measured, with errors, and where the rule parts the kinds."""
    cuts = THRESHOLDS
    easy, right = f"{cuts.easy:g}", f"{cuts.unexplained:g}"
    rows = [
        ["unexplained: held-out loss over that of constants", number(found.unexplained),
         f"below {easy}: easy; below {right}: hard"],
        ["layers", f"{found.features.layers}", "more than 1: noisy"],
        ["concentration: signal in 1% of the coordinates", number(found.concentration),
         f"from {cuts.concentration:g}: few; else spread"],
        ["noise scale, examples", number(found.noise_scale), ""],
        ["weights per example, P/n", f"{found.weights_per_example:.3g}", ""],
        ["batch share, b/n", f"{found.batch_share:.2g}", ""],
    ]  # fmt: skip
    return Table(["measured", "value", "rule, in this order"], rows)


def record(found: Advice) -> Table:
    """How often the rule was right where the task was left out of its making."""
    rows = []
    for rival in RIVALS:
        (right, of), (own, own_of) = TRACK[rival]["all"], TRACK[rival][found.kind]
        rows.append([NAMES[rival], found.expected[rival], f"{right} of {of}", f"{own} of {own_of}"])
    head = ["against", "expect", "right, of all left out", f"right, of those called {found.kind}"]
    return Table(head, rows)


def setting(found: Advice) -> str:
    """What to train with first."""
    n, b = found.sizes
    lr, decay = DEFAULT_ADAMW["lr"], DEFAULT_ADAMW["weight_decay"]
    sizes = f"batch_size={b}, dataset_size={n}"
    if LOSES in found.expected.values():
        return f"torch.optim.AdamW, rate and decay tuned; as a control PopRiskAdamW(model, {sizes})"
    return f"PopRiskAdamW(model, lr={lr:g}, weight_decay={decay:g}, {sizes})"


def number(estimate: Estimate) -> str:
    """A value with its error, if it has one."""
    if math.isnan(estimate.value):
        return "not seen"
    error = f" ± {estimate.standard_error:.2g}" if estimate.valid else ""
    return f"{estimate.value:.3g}{error}"
