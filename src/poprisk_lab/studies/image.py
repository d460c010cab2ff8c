"""The claim that the gate fits a picture and not its noise, without stopping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import (
    Claim,
    Curve,
    Done,
    Findings,
    Picture,
    Plot,
    Trial,
    where,
)
from poprisk_lab.studies.curves import mean_curve
from poprisk_lab.studies.image_runs import decode, run, side_by_side, square, task_of
from poprisk_lab.studies.judge import Criterion, difference, written
from poprisk_lab.studies.optimizers import Contestant, contestants, of_arm

NETWORKS = {"siren": "SIREN", "fourier": "Fourier features"}
LOST_AT_MOST = 0.5
"""dB between a run's best moment and its end, for it to count as needing no stop."""
ADAMW = {0.01: (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 1.0: (1e-5, 3e-5, 1e-4)}
GATED = (3e-4, 1e-3)
DECAY = 0.01


def trials(quick: bool) -> list[Trial]:
    """Every optimizer on both networks, one trial a seed."""
    grid = {DECAY: (1e-3,)} if quick else ADAMW
    rates = (1e-3,) if quick else GATED
    arms = [("adamw", lr, decay, False) for decay in grid for lr in grid[decay]]
    arms += [(a, lr, DECAY, a == "soft") for a in ("soft", "snr", "auto") for lr in rates]
    arms += [("shuffled-soft", lr, DECAY, False) for lr in rates]
    size: dict[str, Any] = {"size": 24, "epochs": 10} if quick else {"size": 64, "epochs": 150}
    return [
        Trial(
            f"{network}-{arm}-lr{lr:g}-wd{decay:g}-{seed}",
            {
                "network": network,
                "arm": arm,
                "lr": lr,
                "weight_decay": decay,
                "matched": matched,
                "seeds": [seed],
                "keep": [0] if arm in ("adamw", "soft", "auto") else [],
                "noise": 0.1,
                "picture": "camera",
                "every": 5,
                **size,
            },
        )
        for seed in range(2 if quick else 5)
        for network in NETWORKS
        for arm, lr, decay, matched in arms
    ]


class Field(NamedTuple):
    """The contestants on one network that are compared.

    Attributes:
        name: of the network.
        paper: Algorithm 1, mask and learning rate chosen by the final PSNR.
        adamw: the point of AdamW's grid with the best end.
        hindsight: the one with the best moment.
        soft: the soft mask at its best learning rate.
        all: everyone.
    """

    name: str
    paper: Contestant
    adamw: Contestant
    hindsight: Contestant
    soft: Contestant
    all: list[Contestant]

    def same(self, arm: str, **fields: Any) -> Contestant:
        """The contestant of an arm with the soft mask's learning rate and decay."""
        given = {"lr": self.soft.lr, "weight_decay": self.soft.weight_decay, **fields}
        return of_arm(self.all, arm, **given)[0]


def fields(done: Sequence[Done]) -> list[Field]:
    """The networks; all choices are made with the clean picture, for both sides alike."""
    return [_field(name, contestants(where(done, network=key))) for key, name in NETWORKS.items()]


def _field(name: str, all_of_them: list[Contestant]) -> Field:
    adamw, soft = of_arm(all_of_them, "adamw"), of_arm(all_of_them, "soft")
    paper = of_arm(all_of_them, "soft", "snr")
    return Field(
        name,
        _best(paper),
        _best(adamw),
        _best(adamw, "best"),
        _best(soft),
        all_of_them,
    )


def _best(among: list[Contestant], key: str = "final") -> Contestant:
    return max(among, key=lambda c: c.mean(key))


def judge(done: Sequence[Done]) -> Findings:
    """No stop needed, and a better end than AdamW's best; the controls beside."""
    found = fields(done)
    return Findings(
        criteria=[c for field in found for c in _deciding(field)]
        + [c for field in found for c in _controls(field)],
        ours="; ".join(_ours(field) for field in found),
        controls=" ".join(_controls_in_words(field) for field in found),
        sentences=[s for field in found for s in _sentences(field)],
        table=_table(found),
    )


def _deciding(field: Field) -> list[Criterion]:
    return [
        Criterion(
            f"{field.name}: dB that Algorithm 1 loses from its best moment to the end",
            _lost(field.paper),
            needed=LOST_AT_MOST,
            at_most=True,
        ),
        Criterion(
            f"{field.name}: dB by which Algorithm 1 ends above the best end of AdamW's grid",
            _above(field.paper, field.adamw),
            needed=0.0,
        ),
    ]


def _controls(field: Field) -> list[Criterion]:
    auto = _best(of_arm(field.all, "auto"))
    hindsight = difference(field.paper.values("final"), field.hindsight.values("best"))
    shared: dict[str, Any] = {"needed": 0.0, "decides": False}
    return [
        Criterion(
            f"{field.name}: dB by which it ends above AdamW stopped at its best moment",
            hindsight,
            needed=-LOST_AT_MOST,
            decides=False,
        ),
        *(
            Criterion(f"{field.name}: dB by which the soft mask ends above {name}", gap, **shared)
            for name, gap in _rivals(field).items()
        ),
        Criterion(
            f"{field.name}: dB that PopRiskAdamW's defaults lose to the end",
            _lost(auto),
            needed=LOST_AT_MOST,
            at_most=True,
            decides=False,
        ),
        Criterion(
            f"{field.name}: dB by which the defaults end above the best end of AdamW's grid",
            _above(auto, field.adamw),
            **shared,
        ),
    ]


def _rivals(field: Field) -> dict[str, Interval]:
    """The soft mask against AdamW at its learning rate, at its update sizes, and shuffled."""
    return {
        "AdamW at its learning rate": _above(field.soft, field.same("adamw")),
        "AdamW at its update sizes": _above(field.soft, field.same("matched", follows="soft")),
        "its own mask shuffled": _above(field.soft, field.same("shuffled-soft")),
    }


def _lost(contestant: Contestant) -> Interval:
    return t_interval(list(contestant.values("lost").values()))


def _above(a: Contestant, b: Contestant) -> Interval:
    return difference(a.values("final"), b.values("final"))


def _ours(field: Field) -> str:
    return (
        f"{field.name}: ends {written(_above(field.paper, field.adamw))} dB above AdamW's best "
        f"end, {written(_lost(field.paper))} dB below its own best moment"
    )


def _controls_in_words(field: Field) -> str:
    gaps = ", ".join(f"{name} {written(gap)}" for name, gap in _rivals(field).items())
    hindsight = difference(field.paper.values("final"), field.hindsight.values("best"))
    return (
        f"{field.name}, dB gained by the soft mask on {gaps}; by Algorithm 1 on AdamW stopped at "
        f"its best moment {written(hindsight)}."
    )


def _sentences(field: Field) -> list[str]:
    paper, adamw = field.paper, field.adamw
    same = field.same("adamw")
    edge = adamw.lr == min(c.lr for c in of_arm(field.all, "adamw"))
    return [
        f"{field.name}: {paper.label} ends at {paper.mean('final'):.1f} dB with "
        f"{paper.mean('memorized'):.0%} of the noise in the picture; "
        f"the best end of AdamW's grid ({adamw.label}) is {adamw.mean('final'):.1f} dB with "
        f"{adamw.mean('memorized'):.0%}, and at the soft mask's learning rate AdamW ends at "
        f"{same.mean('final'):.1f} dB with {same.mean('memorized'):.0%}.",
        f"{field.name}: AdamW's best moment is {field.hindsight.mean('best'):.1f} dB "
        f"({field.hindsight.label}), seen only with the clean picture at hand.",
        f"{field.name}: at their own best learning rates, "
        + " and ".join(f"{c.label} ends at {c.mean('final'):.1f} dB" for c in _own_best(field))
        + ".",
        *(
            [
                f"{field.name}: AdamW's best end is at the smallest learning rate of the grid, and "
                f"{adamw.mean('lost'):.1f} dB below that run's own best moment."
            ]
            if edge
            else []
        ),
    ]


def _own_best(field: Field) -> list[Contestant]:
    """The controls, each at the learning rate that serves it best."""
    return [_best(of_arm(field.all, arm)) for arm in ("matched", "shuffled-soft")]


def _table(found: Sequence[Field]) -> list[list[str]]:
    header = ["Network and optimizer", "Final PSNR, dB", "Best PSNR", "Lost", "Noise in picture"]
    rows = [
        [
            f"{field.name}: {c.label}",
            written(t_interval(list(c.values("final").values()))),
            f"{c.mean('best'):.2f}",
            f"{c.mean('lost'):.2f}",
            f"{c.mean('memorized'):.0%}",
        ]
        for field in found
        for c in sorted(field.all, key=lambda c: -c.mean("final"))
    ]
    return [header, *rows]


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """PSNR along training, then what the networks ended with, for each of them."""
    found = fields(done)
    every = done[0].settings["every"]
    return [
        *(_plot(field, every) for field in found),
        *(_picture(field, key, done) for field, key in zip(found, NETWORKS, strict=True)),
    ]


def _plot(field: Field, every: int) -> Plot:
    auto = _best(of_arm(field.all, "auto"))
    lines = [
        _line("Algorithm 1", field.paper, every, "solid"),
        _line("defaults", auto, every, "solid"),
        _line("AdamW, best end", field.adamw, every, "solid"),
        _line("AdamW, same rate", field.same("adamw"), every, "dash"),
        _line("RMS-matched", field.same("matched", follows="soft"), every, "dot"),
        _line("shuffled", field.same("shuffled-soft"), every, "dot"),
    ]
    return Plot(
        f"{field.name}: PSNR to the clean picture",
        "epoch",
        "PSNR, dB",
        lines,
        "Nothing is stopped. A line that rises and falls fits the picture first and its noise "
        f"later. {field.paper.label}; {auto.label}; best end: {field.adamw.label}; the others have "
        f"the soft mask's learning rate, {field.soft.lr:g}. Bands: 95% intervals over seeds.",
    )


def _line(name: str, contestant: Contestant, every: int, dash: str) -> Curve:
    rows = list(contestant.values("quality").values())
    epochs = [every * (i + 1) for i in range(len(rows[0]))]
    return mean_curve(name, epochs, rows, contestant.colour, dash=dash)


def _picture(field: Field, network: str, done: Sequence[Done]) -> Picture:
    same, auto = field.same("adamw"), _best(of_arm(field.all, "auto"))
    ends = [same, field.soft, auto]
    seed = min(field.soft.found)
    task = task_of(where(done, network=network)[0].settings, seed)
    pictures = [decode(c.found[seed]["picture"]) for c in ends]
    shown = [square(task.train[1]), *pictures, square(task.test[1])]
    return Picture(
        f"{field.name}: the picture at the end of training",
        side_by_side(shown),
        "From left to right: noisy, as trained on; " + "; ".join(c.label for c in ends) + "; "
        f"clean. Seed {seed}.",
    )


CLAIM = Claim(
    name="image",
    title="A noisy picture, fitted without stopping",
    statement="Trained on a noisy picture, the gated network fits the picture and not the noise, "
    "without early stopping.",
    source="Litman and Guo, arXiv:2605.01172, experiments on implicit neural representations",
    paper="",
    published=[
        "Implicit neural representation of a noisy picture, Algorithm 1 against AdamW.",
        "Not known: picture, noise, networks, learning rates, batch size, length of training.",
    ],
    ours=[
        "skimage.data.camera, averaged down to 64 × 64, normal noise of standard deviation 0.1 "
        "(20 dB).",
        "SIREN (ω₀ = 30) and a ReLU network on 64 random Fourier features, both 3 × 128.",
        "Batches of 512 of the 4,096 pixels, 150 epochs, 5 seeds of noise, network and batches.",
        "Algorithm 1 with mask soft (as printed) or snr (default of the authors' package), "
        "softness 1; mask and learning rate (3e-4, 1e-3) chosen by the final PSNR.",
        "AdamW over learning rates 1e-5 to 1e-3 with weight decay 0.01, and 1e-5 to 1e-4 with 1, "
        "chosen by the same, which favours AdamW: it has more points to choose from.",
        "AdamW's rate of 1e-5 was added after the rest had run, because its best end lay at the "
        "edge of the grid; no bound was changed.",
        "No stop needed: at most 0.5 dB from the best moment to the end.",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
