"""Ternary weights behind the gate: python benchmarks/ternary.py OUT [--seeds N].

Digits with a fully connected network whose weights are -1, 0 or 1 times a scale in the forward
pass, gradients passed straight through (BitNet b1.58, arXiv:2402.17764): the gate sees the
gradients of latent weights, of which a small step may change nothing and the next one a sign. A
public report tells of a gate that overshot there. OUT gets the final metric of each seed by arm,
and how many ternary weights changed in the last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk.task import Task
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.fit import ArmRun
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks.digits import digits

NOISES = (0.0, 0.4)
EPOCHS = 40
NAMES = ("poprisk", "adamw-lr0.0003-wd0.01", "adamw-lr0.001-wd0.01")


class Ternary(nn.Linear):
    r"""A linear layer with weights :math:`\gamma\operatorname{clip}(\lfloor W/\gamma\rceil,-1,1)`.

    :math:`\gamma` is the mean of :math:`|W|`; the derivative by W is taken for one.
    """

    @property
    def signs(self) -> Tensor:
        """-1, 0 or 1 for each weight."""
        return (self.weight / self.weight.abs().mean().clamp_min(1e-8)).round().clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        q = self.signs * w.abs().mean()
        return F.linear(x, w + (q - w).detach(), self.bias)


def network(hidden: int = 256) -> nn.Module:
    """64, hidden, hidden, 10, with a norm before each ReLU to make up for the scale."""
    widths = (64, hidden, hidden)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [Ternary(before, after), nn.LayerNorm(after), nn.ReLU()]
    return nn.Sequential(*layers, Ternary(hidden, 10))


def ternary(seed: int = 0, *, noise: float = 0.4, hidden: int = 256) -> Task:
    """The digits, ternary weights."""
    made = digits(seed, noise=noise, hidden=hidden)
    about = made.description.replace("MLP", "ternary MLP")
    model = partial(network, hidden)
    return dataclasses.replace(
        made, name="ternary-digits", model=model, description=about, epochs=EPOCHS
    )


def trained(task: Task, arm: Arm, seed: int) -> dict[str, float | None]:
    """How a training ended, and the share of ternary weights that its last evaluations changed."""
    run = ArmRun(task, arm, seed)
    layers = [m for m in run.model.modules() if isinstance(m, Ternary)]
    now = before = _signs(layers)
    row: dict[str, Any] = {}
    for row in run.rows():
        if row["event"] == "epoch":
            before, now = now, _signs(layers)
    return {
        "final": row["final_metric"],
        "best": row["best_metric"],
        "memorized": row["final_memorized"],
        "changed": float((now != before).double().mean()),
        "zeros": float((now == 0).double().mean()),
    }


@torch.no_grad()
def _signs(layers: Sequence[Ternary]) -> Tensor:
    return torch.cat([layer.signs.flatten() for layer in layers])


def main(out: Path, seeds: int) -> None:
    """Train all, and write what was found."""
    arms = [arm for arm in default_arms(full=False) if arm.name in NAMES]
    found: dict[str, Any] = {}
    for noise in NOISES:
        for arm in arms:
            rows = [trained(ternary(s, noise=noise), arm, s) for s in range(seeds)]
            found.setdefault(f"{noise:g}", {})[arm.name] = rows
            print(noise, arm.name, rows, flush=True)
            content = {"seeds": [*range(seeds)], "environment": environment(0), "noise": found}
            write_json(out, content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    main(given.out, given.seeds)
