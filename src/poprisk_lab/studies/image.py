"""The claim that the gate fits a picture and not its noise, without stopping."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poprisk.intervals import Interval, t_interval
from poprisk.task import Task
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.plots import Line, Picture, Plot, rounded, seeds_line, tabulate
from poprisk_lab.studies.claim import Claim, Done, Findings, Found, Trial, Workspace, where
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, difference
from poprisk_lab.studies.optimizers import (
    Contestant,
    Step,
    contestants,
    make_optimizer,
    of_arm,
    train_with_control,
)
from poprisk_lab.tasks.image import image

NETWORKS = {"siren": "SIREN", "fourier": "Fourier features"}
LOST_AT_MOST = 0.5
"""dB between a run's best moment and its end, for it to count as needing no stop."""
ADAMW = {0.01: (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 1.0: (1e-5, 3e-5, 1e-4)}
GATED = (3e-4, 1e-3)
DECAY = 0.01
GAP = 4
ENLARGED = 4


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


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Train one network on one noisy picture, and beside it AdamW at its update sizes if asked."""

    def train(arm: str, trace: UpdateTrace | None, step: Step) -> list[Found]:
        return [_train(settings, arm, trace, step, seed) for seed in settings["seeds"]]

    return train_with_control(train, settings["arm"], matched=settings["matched"])


def task_of(settings: dict[str, Any], seed: int) -> Task:
    """The noisy picture of a trial."""
    names = ("noise", "size", "network", "picture")
    return image(seed, **{name: settings[name] for name in names})


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: Step, seed: int
) -> Found:
    task = task_of(settings, seed)
    x, y = task.train
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(
        arm,
        model,
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        batch_size=task.batch_size,
        dataset_size=len(x),
        trace=trace,
    )
    generator = torch.Generator().manual_seed(seed)
    quality = []
    for epoch in range(1, settings["epochs"] + 1):
        for batch in torch.randperm(len(x), generator=generator).split(task.batch_size):
            optimizer.zero_grad()
            task.loss(model(x[batch]), y[batch]).mean().backward()
            step(optimizer)
        if epoch % settings["every"] == 0:
            quality.append(psnr(_outputs(model, x), task.test[1]))
    return _found(task, _outputs(model, x), quality, keep=seed in settings["keep"])


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _found(task: Task, end: Tensor, quality: list[float], *, keep: bool) -> Found:
    best = max(quality)
    memorized = task.memorized(end)
    return {
        "quality": rounded(quality),
        "final": round(quality[-1], 4),
        "best": round(best, 4),
        "lost": round(best - quality[-1], 4),
        "best_at": quality.index(best),
        "memorized": None if memorized is None else round(memorized, 4),
        "picture": encode(square(end)) if keep else "",
    }


def psnr(outputs: Tensor, clean: Tensor) -> float:
    r"""Peak signal-to-noise ratio :math:`-10 \log_{10}` of the mean squared error, in dB.

    The peak is 1; both of one shape.

    Example:
        >>> psnr(torch.full((4,), 0.1), torch.zeros(4))
        20.0
    """
    return round(-10 * math.log10(float((outputs - clean).double().square().mean())), 6)


def square(values: Tensor) -> Tensor:
    """Grey values (size², 1) as a picture (size, size) of bytes."""
    size = math.isqrt(len(values))
    return (values.reshape(size, size).clamp(0, 1) * 255).round().to(torch.uint8)


def encode(pixels: Tensor) -> str:
    """A picture (h, w) of bytes as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode(png: str) -> Tensor:
    """The picture (h, w) of bytes that :func:`encode` made a PNG of."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(png)))))


def side_by_side(pictures: list[Tensor]) -> str:
    """Pictures of one size (h, w) in a row, enlarged, as a PNG in base64."""
    large = [p.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1) for p in pictures]
    gap = torch.full((len(large[0]), GAP), 255, dtype=torch.uint8)
    return encode(torch.cat([part for p in large for part in (p, gap)][:-1], 1))


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

    @property
    def at_edge(self) -> bool:
        """Whether AdamW's best end lies at the smallest learning rate of its grid."""
        return self.adamw.lr == min(c.lr for c in of_arm(self.all, "adamw"))

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
    table = tabulate(
        "network and optimizer",
        {
            f"{field.name}: {c.label}": [*c.found.values()]
            for field in found
            for c in sorted(field.all, key=lambda c: -c.mean("final"))
        },
        {name: lambda f, key=key: f[key] for name, key in FIGURES.items()},
        percent=["noise in the picture"],
        about="dB of PSNR to the clean picture; the best moment is known only with it at hand.",
    )
    edges = [field.name for field in found if field.at_edge]
    note = "AdamW's best end is at the smallest learning rate of the grid"
    return Findings(
        [*(c for f in found for c in _decided(f)),
         *controls(*(c for f in found for c in _beside(f)))],
        table,
        [f"{', '.join(edges)}: {note}: a wider one may hold a better one."] if edges else [],
        main=1,
    )  # fmt: skip


FIGURES = {
    "final": "final",
    "best moment": "best",
    "lost": "lost",
    "noise in the picture": "memorized",
}


def _decided(field: Field) -> list[Criterion]:
    return [
        at_most(f"{field.name}: dB that Algorithm 1 loses from its best moment to the end",
                _lost(field.paper), LOST_AT_MOST),
        at_least(f"{field.name}: dB by which Algorithm 1 ends above the best end of AdamW's grid",
                 _above(field.paper, field.adamw), 0.0),
    ]  # fmt: skip


def _beside(field: Field) -> list[Criterion]:
    auto = _best(of_arm(field.all, "auto"))
    rivals = {
        "AdamW at its learning rate": field.same("adamw"),
        "AdamW at its update sizes": field.same("matched", follows="soft"),
        "its own mask shuffled": field.same("shuffled-soft"),
    }
    return [
        at_least(f"{field.name}: dB by which it ends above AdamW stopped at its best moment",
                 difference(field.paper.values("final"), field.hindsight.values("best")),
                 -LOST_AT_MOST),
        *(at_least(f"{field.name}: dB by which the soft mask ends above {name}",
                   _above(field.soft, rival), 0.0) for name, rival in rivals.items()),
        at_most(f"{field.name}: dB that PopRiskAdamW's defaults lose to the end",
                _lost(auto), LOST_AT_MOST),
        at_least(f"{field.name}: dB by which the defaults end above the best end of AdamW's grid",
                 _above(auto, field.adamw), 0.0),
    ]  # fmt: skip


def _lost(contestant: Contestant) -> Interval:
    return t_interval(contestant.values("lost").values())


def _above(a: Contestant, b: Contestant) -> Interval:
    return difference(a.values("final"), b.values("final"))


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


def _line(name: str, contestant: Contestant, every: int, dash: str) -> Line:
    rows = [*contestant.values("quality").values()]
    epochs = [every * (i + 1) for i in range(len(rows[0]))]
    return seeds_line(name, epochs, rows, contestant.colour, dash=dash)


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
