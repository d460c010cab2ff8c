"""The trials of the claim on flipped preferences: what is trained, on what, over which seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from poprisk_lab.study import Trial

NEEDS = ("transformers", "trl", "datasets", "tokenizers", "sklearn")
"""Packages without which nothing is trained: ``pip install 'poprisk[lab,hf]'``."""
MAIN, OTHER = "prose", "characters"
"""The reward of the claim, and the one beside it."""
FLIPPED = (0.2, 0.4)
"""Shares of flipped pairs at which all methods are trained."""
BETWEEN = 0.3
"""The share of the paper, at which AdamW and the gate are compared."""
FEW = (0.0, 0.1)
SEEDS, FEW_SEEDS = range(510, 515), range(510, 513)
"""Nothing was chosen on them; seeds below 10 were chosen on."""
ADAMW, GATE, SHUFFLED = "adamw", "auto", "shuffled-auto"
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Learning rates, the same for AdamW and the gate."""
SAME = 3e-4
"""The learning rate at which the gate and AdamW are compared at the same settings."""
SLOW = 1e-4
PEERS = ("ipo", "hinge", "dr-dpo", "re-po")
LORA = 1e-3
FIRST = {"arm": GATE, "lr": SAME}
"""How both runs of the recipe are trained."""
STOPPED = {"arm": ADAMW, "lr": SAME}
"""The run that a twin is to stop: it fits the flipped pairs after its best moment."""
FOLDS = {"arm": ADAMW, "lr": SLOW, "folds": 5}
FULL = {"width": 128, "layers": 4, "steps": 1200}
QUICK = {"width": 32, "layers": 2, "steps": 150}
PAIRS = {"training": 640, "held_out": 300, "noisy": 160}
QUICK_PAIRS = {"training": 192, "held_out": 64, "noisy": 48}


class Draw(NamedTuple):
    """A reward, a share of flipped pairs, and a seed."""

    reward: str
    rate: float
    seed: int


def trials(quick: bool) -> list[Trial]:
    """The reference, the pairs of each reward and seed, and all that is trained on them."""
    size, count = (QUICK, QUICK_PAIRS) if quick else (FULL, PAIRS)
    reference = Trial("pretrained", {"kind": "pretrained", **size}, NEEDS, keeps=True)
    pairs, rest = dict[str, Trial](), list[Trial]()
    for cell in _quick_cells() if quick else _cells():
        shared = f"pairs-{cell.reward}-{cell.seed}"
        drawn = {"kind": "pairs", "reward": cell.reward, "seed": cell.seed}
        after = (reference.name,)
        pairs[shared] = Trial(shared, {**drawn, **count, **size}, NEEDS, after, keeps=True)
        for name, settings, needs in _trained(cell, quick=quick):
            of = {"reward": cell.reward, "rate": cell.rate, "seed": cell.seed}
            rest.append(
                Trial(
                    f"{name}-{cell.reward}-{cell.rate:g}-{cell.seed}",
                    {**settings, **of, **size},
                    (*NEEDS, *needs),
                    (reference.name, shared),
                )
            )
    return [reference, *pairs.values(), *rest]


def _quick_cells() -> list[Draw]:
    return [Draw(MAIN, 0.3, seed) for seed in (0, 1)]


def _cells() -> list[Draw]:
    """Seeds first, so that what is there of an unfinished run covers everything."""
    found = [Draw(MAIN, rate, seed) for seed in SEEDS for rate in (*FLIPPED, BETWEEN)]
    found += [Draw(OTHER, rate, seed) for seed in SEEDS for rate in FLIPPED]
    found += [Draw(MAIN, rate, seed) for seed in FEW_SEEDS for rate in FEW]
    return sorted(found, key=lambda cell: cell.seed)


Settings = tuple[str, dict[str, Any], tuple[str, ...]]


def _trained(cell: Draw, *, quick: bool) -> Iterator[Settings]:
    """Name, settings and further packages of each trial in a cell."""
    whole = cell.rate in FLIPPED and cell.reward == MAIN
    if quick:
        yield from _grid((SLOW, SAME), (SAME,))
        yield _run(ADAMW, SAME, loss="robust")
        yield from (_run(ADAMW, SAME, loss=loss) for loss in PEERS)
        yield "folds", {"kind": "folds", **FOLDS, "folds": 2, "lr": SAME}, ()
        yield "recipe", {"kind": "recipe", **FIRST}, ()
        yield "stopping", {"kind": "stopping", **STOPPED}, ()
        return
    if not whole:
        rates = RATES if cell.rate == BETWEEN else (SLOW, SAME)
        yield from _grid(rates, rates)
        if cell.rate != BETWEEN:
            yield _run(ADAMW, SLOW, loss="robust")
            yield "recipe", {"kind": "recipe", **FIRST}, ()
        return
    yield from _grid(RATES, RATES, matched=SAME)
    yield _run(SHUFFLED, SAME)
    yield from (_run(arm, SAME) for arm in ("soft", "snr"))
    yield from (_run(ADAMW, lr, loss="robust") for lr in (SLOW, SAME))
    yield _run(GATE, SAME, loss="robust")
    yield from (_run(ADAMW, lr, loss=loss) for loss in PEERS for lr in (SLOW, SAME))
    yield from (_run(arm, LORA, adapters=True) for arm in (ADAMW, GATE))
    yield "folds", {"kind": "folds", **FOLDS}, ()
    yield "recipe", {"kind": "recipe", **FIRST}, ()
    yield "stopping", {"kind": "stopping", **STOPPED}, ()


def _grid(
    adamw: Sequence[float], gate: Sequence[float], *, matched: float | None = None
) -> Iterator[Settings]:
    yield from (_run(ADAMW, lr) for lr in adamw)
    yield from (_run(GATE, lr, matched=lr == matched) for lr in gate)


def _run(
    arm: str, lr: float, *, loss: str = "dpo", matched: bool = False, adapters: bool = False
) -> Settings:
    name = f"{arm}-{loss}{'-lora' * adapters}-lr{lr:g}"
    settings = {"arm": arm, "lr": lr, "loss": loss, "matched": matched, "adapters": adapters}
    return name, {"kind": "run", **settings}, ("peft",) * adapters
