"""Who is compared with whom in the claim of the differential equation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from poprisk.intervals import Interval
from poprisk_lab.studies.claim import Done, where
from poprisk_lab.studies.judge import Steps, ratio, speed_up
from poprisk_lab.studies.optimizers import Contestant, contestants, of_arm
from poprisk_lab.studies.pinn_runs import DEEPXDE

NOISES = (0.5, 1.0, 2.0)
MAIN = 1.0
DECAY = 0.01


class Pair(NamedTuple):
    """Two sides compared, each chosen by the error against the true solution.

    Attributes:
        fast: of ours, the one that reaches the goal first.
        fast_adamw: of AdamW's grid likewise.
        end: of ours, the one with the smallest error at the end.
        end_adamw: of AdamW's grid likewise.
    """

    fast: Contestant
    fast_adamw: Contestant
    end: Contestant
    end_adamw: Contestant

    @property
    def speed_up(self) -> Interval:
        """How many times fewer steps ours needs to the goal."""
        return speed_up(steps_of(self.fast_adamw), steps_of(self.fast))

    @property
    def shared(self) -> list[int]:
        """The seeds where both got there."""
        slow, fast = steps_of(self.fast_adamw).reached, steps_of(self.fast).reached
        return [s for s in fast if fast[s] is not None and slow.get(s) is not None]

    @property
    def speed_up_where_both(self) -> Interval:
        """The same over those seeds only."""
        slow, fast = steps_of(self.fast_adamw).at_least(), steps_of(self.fast).at_least()
        return ratio({s: slow[s] for s in self.shared}, fast)

    @property
    def error(self) -> Interval:
        """Our error at the end as a share of AdamW's."""
        return share(self.end, self.end_adamw)


def pair(all_of_them: Sequence[Contestant], *arms: str) -> Pair:
    """The best of these arms against the best of AdamW's grid."""
    ours, adamw = of_arm(all_of_them, *arms), of_arm(all_of_them, "adamw")
    return Pair(
        min(ours, key=slowness),
        min(adamw, key=slowness),
        min(ours, key=lambda c: c.mean("final")),
        min(adamw, key=lambda c: c.mean("final")),
    )


def steps_of(contestant: Contestant) -> Steps:
    """When its runs reached the goal."""
    return Steps(contestant.values("steps"), contestant.values("limit"))


def slowness(contestant: Contestant) -> tuple[int, float]:
    """For sorting: runs that did not reach the goal, then the steps of those that did."""
    steps = steps_of(contestant)
    return steps.censored, sum(math.log(s) for s in steps.at_least().values())


def share(a: Contestant, b: Contestant) -> Interval:
    """The error of ``a`` at the end as a share of that of ``b``, paired over seeds."""
    return ratio(a.values("final"), b.values("final"))


def at_noise(done: Sequence[Done], noise: float) -> list[Contestant]:
    """The contestants at a noise, the run through DeepXDE left out."""
    own = [d for d in where(done, noise=noise) if d.settings["arm"] != DEEPXDE]
    return contestants(own)


def rivals(main: Sequence[Contestant]) -> list[tuple[str, Contestant, Contestant]]:
    """The snr mask beside AdamW at its learning rate, at its update sizes, and shuffled."""
    snr = [c for c in of_arm(main, "snr") if of_arm(main, "shuffled-snr", lr=c.lr)]
    snr = [c for c in snr if of_arm(main, "adamw", lr=c.lr)]
    best = min(snr, key=lambda c: c.mean("final"))
    given = {"lr": best.lr, "weight_decay": best.weight_decay}
    return [
        ("AdamW at its learning rate", best, of_arm(main, "adamw", **given)[0]),
        ("AdamW at its update sizes", best, of_arm(main, "matched", follows="snr", **given)[0]),
        ("its own mask shuffled", best, of_arm(main, "shuffled-snr", **given)[0]),
    ]


def typical(steps: Steps) -> float:
    """Geometric mean, runs that did not get there counted with the steps they had."""
    values = steps.at_least().values()
    return math.exp(sum(math.log(v) for v in values) / len(values))
