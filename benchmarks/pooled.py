r"""Evidence that coordinates have together, none of them alone: python benchmarks/pooled.py OUT.

A mask for PopRiskAdamW. Where the gate's own test keeps a coordinate shut, and there is nothing but
noise, :math:`\hat m^2` over its own noise is a squared standard normal number below :math:`z^2`. If
the mean of these over a tensor exceeds what that gives by ``k`` standard errors, signal is spread
over them, and all are opened, as far as the excess is large beside ``softness``. Resumable.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bases import TASKS, _trained
from torch import Tensor

from poprisk import PopRiskAdamW
from poprisk.optim.gate import soft
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks import BUILT_IN

Z, FEWEST = 1.5, 8
SEEDS = (740, 741, 742)
CELLS = [
    *((name, 0.0) for name in ("sparse-regression", "dense-regression", "diabetes")),
    *((name, level) for name in ("digits", "mnist1d", "docstrings") for level in (0.0, 0.4)),
]


class Truncated(NamedTuple):
    """A standard normal number whose square is below a bound, squared: its mean and deviation."""

    mean: float
    deviation: float

    @classmethod
    def below(cls, z: float) -> Truncated:
        """For :math:`|x| < z`."""
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        inside = math.erf(z / math.sqrt(2))
        mean = 1 - 2 * z * density / inside
        fourth = 3 - 2 * density * (z**3 + 3 * z) / inside
        return cls(mean, math.sqrt(fourth - mean * mean))


def pooled(
    mean_sq: list[Tensor],
    var: list[Tensor],
    *,
    k: float,
    alpha: float,
    softness: float,
    eps: float,
    var_scale: float,
) -> list[Tensor]:
    """The soft mask, opened where the shut ones of a tensor have evidence together."""
    own = soft(mean_sq, var, alpha=alpha, softness=softness, eps=eps, var_scale=var_scale)
    noise = Truncated.below(Z)
    for m, v, q in zip(mean_sq, var, own, strict=True):
        shut = (q == 0) & (v > 0)
        n = int(shut.sum())
        if n >= FEWEST:
            found = float((m[shut] / v[shut]).mean()) * Z**2 / (alpha * var_scale)
            over = found - noise.mean - k * noise.deviation / math.sqrt(n)
            q.clamp_(min=over / (over + softness * noise.mean) if over > 0 else 0.0)
    return own


MASKS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "z 1": {"z": 1.0},
    "together, k 2": {"mask": partial(pooled, k=2.0)},
    "together, k 0": {"mask": partial(pooled, k=0.0)},
    "together, k -2": {"mask": partial(pooled, k=-2.0)},
}


def train(name: str, level: float, mask: str, seed: int) -> float:
    """The task's metric in the end."""
    task = TASKS[name](seed, noise=level) if name in TASKS else BUILT_IN[name](seed)
    rate = 2e-3 if name in TASKS else 1e-3
    settings = {"lr": rate, "z": Z, **MASKS[mask]}

    def build(model: torch.nn.Module, sizes: dict[str, int]) -> PopRiskAdamW:
        return PopRiskAdamW(model, **sizes, **settings)

    return _trained(task, seed, build)


def main(out: Path) -> None:
    """Train what is left."""
    torch.set_num_threads(1)
    rows = json.loads(out.read_text("utf-8"))["results"] if out.exists() else []
    done = {tuple(row[:-1]) for row in rows}
    for seed in SEEDS:
        for name, level in CELLS:
            for mask in MASKS:
                if (name, level, mask, seed) not in done:
                    rows.append([name, level, mask, seed, train(name, level, mask, seed)])
                    write_json(out, {"environment": environment(0), "results": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
