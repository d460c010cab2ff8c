"""The methods of the claim on flipped preferences, out of its trials: figures by cell and seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from poprisk.intervals import Interval
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies.criteria import difference, ratio
from poprisk_lab.studies.dpo.arms import ADAMW, GATE, MAIN, PEERS, SAME, SHUFFLED, SLOW
from poprisk_lab.studies.optimizers import ARMS

LOSSES = {
    "dpo": "",
    "robust": "robust told the share",
    "ipo": "IPO",
    "hinge": "hinge",
    "dr-dpo": "Dr. DPO",
    "re-po": "RE-PO",
}
ONCE, WITHOUT, AUDITED = "recipe, robust", "recipe, without suspects", "recipe, its first run"
PARTS = {"robust": ONCE, "without": WITHOUT, "first": AUDITED}
"""The runs of the recipe, and which methods they are."""


class Method(NamedTuple):
    """One way of training.

    Attributes:
        arm: of the optimizer; a part of the recipe: its name.
        loss: what is minimized.
        lr: learning rate.
        adapters: whether LoRA's are trained.
        follows: the arm whose update sizes AdamW takes; empty for none.
    """

    arm: str
    loss: str = "dpo"
    lr: float = 0.0
    adapters: bool = False
    follows: str = ""

    @property
    def label(self) -> str:
        """For tables: ``AdamW, IPO, lr 0.0001``."""
        if self.arm in PARTS.values():
            return self.arm
        name = ARMS["matched"].label if self.follows else ARMS[self.arm].label
        parts = (LOSSES[self.loss], "LoRA" * self.adapters, f"lr {self.lr:g}")
        return ", ".join([name, *(part for part in parts if part)])

    @property
    def told(self) -> bool:
        """Whether it is told the share of flipped pairs."""
        return self.loss == "robust"

    @property
    def control(self) -> bool:
        """Whether it is there to be compared with: nobody would train by it."""
        return bool(self.follows) or self.arm == SHUFFLED


RECIPE, OTHER_RECIPE = Method(ONCE), Method(WITHOUT)
FAST, SLOWER, OURS = Method(ADAMW, lr=SAME), Method(ADAMW, lr=SLOW), Method(GATE, lr=SAME)
"""The recipe in both forms; AdamW and the gate at the same settings, and a slow AdamW."""


class Place:
    """What was found with one reward at one share of flipped pairs.

    Args:
        results: all trials.
        reward: which one.
        rate: share of flipped pairs.
    """

    def __init__(self, results: Results, reward: str, rate: float) -> None:
        here = results.where(reward=reward, rate=rate)
        found = dict[Method, list[TrialResult]]()
        for settings, metrics in here.where(kind="run"):
            keys = ("arm", "loss", "lr", "adapters")
            method = Method(*(settings[key] for key in keys))
            found.setdefault(method, []).append(TrialResult(settings, metrics["run"]))
            if "matched" in metrics:
                control = method._replace(follows=method.arm)
                found.setdefault(control, []).append(TrialResult(settings, metrics["matched"]))
        for settings, metrics in here.where(kind="recipe"):
            for part, name in PARTS.items():
                found.setdefault(Method(name), []).append(TrialResult(settings, metrics[part]))
        self.reward, self.rate = reward, rate
        self.runs = {method: Results(some) for method, some in found.items()}
        self.recipes, self.folds = here.where(kind="recipe"), here.where(kind="folds")
        self.stopped = here.where(kind="stopping")

    def values(self, method: Method, key: str) -> dict[int, Any]:
        """A figure by seed."""
        return self.runs.get(method, Results()).by_seed(key)

    def of(
        self,
        arms: Sequence[str] = (ADAMW, GATE),
        losses: Sequence[str] = ("dpo",),
        *,
        adapters: bool = False,
    ) -> list[Method]:
        """The methods of these arms and losses, controls left out."""
        return [
            m
            for m in self.runs
            if m.arm in arms and m.loss in losses and m.adapters == adapters and not m.control
        ]

    def told_nothing(self) -> list[Method]:
        """Every method of all weights that is told nothing, the recipe and controls left out."""
        return self.of((ADAMW, GATE, "soft", "snr"), ("dpo", *PEERS))

    def best(self, among: Iterable[Method], key: str = "final") -> Method:
        """The method with the largest mean of a figure: in hindsight."""
        return max(among, key=lambda m: fmean(self.values(m, key).values()))

    def picked(self, among: Sequence[Method], key: str = "final") -> dict[int, float]:
        """A figure of the method that the noisy held-out pairs prefer, by seed."""
        noisy = {m: self.values(m, "noisy") for m in among}
        seeds = set.intersection(*(set(by_seed) for by_seed in noisy.values()))
        best = {seed: max(among, key=lambda m, s=seed: noisy[m][s]) for seed in sorted(seeds)}
        return {seed: self.values(method, key)[seed] for seed, method in best.items()}

    def gain(self, a: Method, b: Method, key: str = "final") -> Interval:
        """What ``a`` has more than ``b``, paired over seeds."""
        return difference(self.values(a, key), self.values(b, key))

    def times_less(self, a: Method, b: Method, key: str = "drift") -> Interval:
        """How many times less ``a`` has than ``b``, paired over seeds."""
        return ratio(self.values(b, key), self.values(a, key))


def cells(results: Results) -> dict[tuple[str, float], Place]:
    """What was found, by reward and share of flipped pairs, shares in their order."""
    keys = {(s["reward"], s["rate"]) for s, _ in results if "rate" in s}
    return {key: Place(results, *key) for key in sorted(keys, key=lambda k: (k[0] != MAIN, *k))}


def share_of(rate: float) -> str:
    """In words: ``20% flipped``."""
    return f"{rate:.0%} flipped"


def place_of(cell: Place) -> str:
    """In words: the share of flipped pairs, and the reward if it is not the main one."""
    return share_of(cell.rate) + (f", {cell.reward}" if cell.reward != MAIN else "")
