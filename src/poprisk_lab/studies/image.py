"""The claim that the gate fits a picture and not its noise, without stopping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from poprisk.intervals import Interval
from poprisk.task import Task
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.pictures import decode, encode, side_by_side
from poprisk_lab.plots import Line, Picture, Plot, rounded, seeds_line, tabulate
from poprisk_lab.studies import optimizers
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, difference
from poprisk_lab.studies.descent import predicted
from poprisk_lab.studies.optimizers import Contestant, most, of_arm
from poprisk_lab.tasks.image import image, psnr, square

NETWORKS = {"siren": "SIREN", "fourier": "Fourier features"}
LOST_AT_MOST = 0.5
"""dB between a run's best moment and its end, for it to count as needing no stop."""
ADAMW = {0.01: (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 1.0: (1e-5, 3e-5, 1e-4)}
GATED, DECAY = (3e-4, 1e-3), 0.01


def trials(quick: bool) -> list[Trial]:
    """Every optimizer on both networks, one trial a seed."""
    grid = {DECAY: (1e-3,)} if quick else ADAMW
    rates = (1e-3,) if quick else GATED
    arms = [("adamw", lr, decay, False) for decay in grid for lr in grid[decay]]
    arms += [(a, lr, DECAY, a == "soft") for a in ("soft", "snr", "auto") for lr in rates]
    arms += [("shuffled-soft", lr, DECAY, False) for lr in rates]
    given: dict[str, Any] = {"noise": 0.1, "picture": "camera", "every": 5}
    given |= {"size": 24, "epochs": 10} if quick else {"size": 64, "epochs": 150}
    return [
        Trial(
            f"{network}-{arm}-lr{lr:g}-wd{decay:g}-{seed}",
            {"network": network, "arm": arm, "lr": lr, "weight_decay": decay, "matched": matched,
             "seeds": [seed], "keep": [0] if arm in ("adamw", "soft", "auto") else [], **given},
        )
        for seed in range(2 if quick else 5)
        for network in NETWORKS
        for arm, lr, decay, matched in arms
    ]  # fmt: skip


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train one network on one noisy picture, and beside it AdamW at its update sizes if asked."""

    def train(arm: str, trace: UpdateTrace | None, step: optimizers.Step) -> list[Metrics]:
        return [_train(settings, arm, trace, step, seed) for seed in settings["seeds"]]

    return optimizers.train_with_control(train, settings["arm"], matched=settings["matched"])


def task_of(settings: dict[str, Any], seed: int) -> Task:
    """The noisy picture of a trial."""
    return image(seed, **{k: settings[k] for k in ("noise", "size", "network", "picture")})


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: optimizers.Step, seed: int
) -> Metrics:
    task = task_of(settings, seed)
    x, y = task.train
    torch.manual_seed(seed)
    model = task.model()
    sizes: dict[str, Any] = {"batch_size": task.batch_size, "dataset_size": len(x)}
    optimizer = optimizers.make_optimizer(arm, model, settings, **sizes, trace=trace)
    generator = torch.Generator().manual_seed(seed)
    quality = []
    for epoch in range(1, settings["epochs"] + 1):
        for batch in torch.randperm(len(x), generator=generator).split(task.batch_size):
            optimizer.zero_grad()
            task.loss(model(x[batch]), y[batch]).mean().backward()
            step(optimizer)
        if epoch % settings["every"] == 0:
            quality.append(psnr(predicted(model, x), task.test[1]))
    end, best = predicted(model, x), max(quality)
    memorized = task.memorized(end)
    return {
        "quality": rounded(quality),
        "final": round(quality[-1], 4),
        "best": round(best, 4),
        "lost": round(best - quality[-1], 4),
        "best_at": quality.index(best),
        "memorized": None if memorized is None else round(memorized, 4),
        "picture": encode(square(end)) if seed in settings["keep"] else "",
    }


class Rivalry(NamedTuple):
    """The contestants on one network; all are chosen with the clean picture, both sides alike.

    Attributes:
        name: of the network.
        all: everyone.
        paper: Algorithm 1, mask and learning rate chosen by the final PSNR.
        adamw: the point of AdamW's grid with the best end.
        soft: the soft mask at its best learning rate.
        auto: the defaults at theirs.
        rivals: the controls of the soft mask.
    """

    name: str
    all: list[Contestant]
    paper: Contestant
    adamw: Contestant
    soft: Contestant
    auto: Contestant
    rivals: dict[str, Contestant]


def rivalries(results: Results) -> list[Rivalry]:
    """What was found on each network."""
    found = []
    for key, name in NETWORKS.items():
        among = optimizers.contestants(results.where(network=key))
        soft, rivals = most(among, "soft"), optimizers.rivals_of(most(among, "soft"), among)
        paper, adamw, auto = most(among, "soft", "snr"), most(among, "adamw"), most(among, "auto")
        found.append(Rivalry(name, among, paper, adamw, soft, auto, rivals))
    return found


def judge(results: Results) -> Report:
    """No stop needed, and a better end than AdamW's best; the controls beside."""
    found, noise = rivalries(results), "noise in the picture"
    table = tabulate(
        "network and optimizer",
        {
            f"{one.name}: {c.label}": c.runs
            for one in found
            for c in sorted(one.all, key=lambda c: -c.mean("final"))
        },
        {"final": "final", "best moment": "best", "lost": "lost", noise: "memorized"},
        percent=[noise],
        about="dB of PSNR to the clean picture; the best moment is known only with it at hand.",
    )
    edges = [o.name for o in found if o.adamw.lr == min(c.lr for c in of_arm(o.all, "adamw"))]
    note = "AdamW's best end is at the smallest learning rate of the grid"
    notes = [f"{', '.join(edges)}: {note}: a wider one may hold a better one."] if edges else []
    decided = [c for one in found for c in _decided(one)]
    beside = controls(*(c for one in found for c in _beside(one)))
    return Report([*decided, *beside], table, notes, main=1)


def _decided(one: Rivalry) -> list[Criterion]:
    lost = f"{one.name}: dB that Algorithm 1 loses from its best moment to the end"
    above = f"{one.name}: dB by which Algorithm 1 ends above the best end of AdamW's grid"
    return [
        at_most(lost, one.paper.runs.mean("lost"), LOST_AT_MOST),
        at_least(above, _above(one.paper, one.adamw), 0.0),
    ]


def _beside(one: Rivalry) -> Iterator[Criterion]:
    stopped = most(one.all, "adamw", key="best").values("best")
    yield at_least(f"{one.name}: dB by which it ends above AdamW stopped at its best moment",
                   difference(one.paper.values("final"), stopped), -LOST_AT_MOST)  # fmt: skip
    for name, rival in one.rivals.items():
        yield at_least(f"{one.name}: dB by which the soft mask ends above {name}",
                       _above(one.soft, rival), 0.0)  # fmt: skip
    yield at_most(f"{one.name}: dB that PopRiskAdamW's defaults lose to the end",
                  one.auto.runs.mean("lost"), LOST_AT_MOST)  # fmt: skip
    yield at_least(f"{one.name}: dB by which the defaults end above the best end of AdamW's grid",
                   _above(one.auto, one.adamw), 0.0)  # fmt: skip


def _above(a: Contestant, b: Contestant) -> Interval:
    return difference(a.values("final"), b.values("final"))


def show(results: Results) -> Plots:
    """PSNR along training, then what the networks ended with, for each of them."""
    found = rivalries(results)
    return [*map(_plot, found), *map(_picture, found)]


def _plot(one: Rivalry) -> Plot:
    same, matched, shuffled = one.rivals.values()

    def line(name: str, contestant: Contestant, dash: str = "solid") -> Line:
        rows, every = contestant.runs.all("quality"), contestant.runs[0].settings["every"]
        epochs = range(every, every * len(rows[0]) + 1, every)
        return seeds_line(name, epochs, rows, contestant.colour, dash=dash)

    lines = [
        line("Algorithm 1", one.paper),
        line("defaults", one.auto),
        line("AdamW, best end", one.adamw),
        line("AdamW, same rate", same, "dash"),
        line("RMS-matched", matched, "dot"),
        line("shuffled", shuffled, "dot"),
    ]
    return Plot(
        f"{one.name}: PSNR to the clean picture", "epoch", "PSNR, dB", lines,
        "Nothing is stopped. A line that rises and falls fits the picture first and its noise "
        f"later. {one.paper.label}; {one.auto.label}; best end: {one.adamw.label}; the others have "
        f"the soft mask's learning rate, {one.soft.lr:g}. Bands: 95% intervals over seeds.",
    )  # fmt: skip


def _picture(one: Rivalry) -> Picture:
    ends = [one.rivals["AdamW at its learning rate"], one.soft, one.auto]
    seed = min(one.soft.values("picture"))
    task = task_of(one.soft.runs[0].settings, seed)
    pictures = [decode(c.values("picture")[seed]) for c in ends]
    return Picture(
        f"{one.name}: the picture at the end of training",
        side_by_side([square(task.train[1]), *pictures, square(task.test[1])]),
        "From left to right: noisy, as trained on; " + "; ".join(c.label for c in ends) + "; "
        f"clean. Seed {seed}.",
    )
