"""In which basis does the gradient's signal lie in few directions: signal_share.py OUT.json.

Along a run of AdamW, the squared mean gradient of new examples with right targets: the share in the
best directions, of the coordinates, of a random rotation, of Shampoo's basis (of the training set's
mean gradient, averaged over batches as SOAP does) and of that of each layer's factors by example.
Directions are ranked on one third of the test set, and measured by the product of the gradients on
the other two, which is unbiased; of all matrices together. Beside it the share of the noise, the
variance of the batches of the training set, in these same directions. Resumable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bases import TASKS
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from poprisk.optim.kronecker import (
    NO_PAIR,
    Rotation,
    factors_of_gradient,
    factors_of_terms,
    first_rotation,
    plus_pair,
    total_of,
)
from poprisk.per_sample import capture
from poprisk.task import Task
from poprisk_lab.fit import seed_all
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks import BUILT_IN

SEEDS = (730, 731, 732)
EPOCHS = (0, 1, 5, 20, 1_000_000)
"""Moments at which to look; the last: the end."""
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Of the directions."""
REGRESSIONS = ("sparse-regression", "dense-regression", "long-tail-regression", "diabetes")
BOTH = (True, True)
"""Sides that are rotated."""
BASES = ("coordinates", "random", "gradient", "examples")
Levels = dict[str, Callable[[int], Task]]


def levels() -> Levels:
    """The tasks of the contest at three shares of wrong labels, and regressions as shipped."""
    found: Levels = {
        f"{name}, {noise:.0%}": partial(task, noise=noise)
        for (name, task), noise in product(TASKS.items(), (0.0, 0.4))
    }
    return found | {name: BUILT_IN[name] for name in REGRESSIONS}


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights that have rows and columns."""
    return [p for p in model.parameters() if p.dim() > 1]


def gradients(model: nn.Module, task: Task, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of the mean loss, with respect to each matrix."""
    return [*torch.autograd.grad(task.loss(model(x), y).mean(), matrices(model))]


def bases(model: nn.Module, task: Task, seed: int) -> dict[str, list[Rotation | None]]:
    """Of each matrix, at the present weights, from the training set."""
    weights, (x, y) = matrices(model), task.train
    generator = torch.Generator().manual_seed(seed)
    by_gradient, by_example = ([NO_PAIR] * len(weights) for _ in range(2))
    for rows in torch.randperm(len(y), generator=generator).split(task.batch_size):
        grads = gradients(model, task, x[rows], y[rows])
        by_gradient = [
            plus_pair(f, factors_of_gradient(g, BOTH))
            for f, g in zip(by_gradient, grads, strict=True)
        ]
        found = capture(
            task.loss(model(x[rows]), y[rows]), {str(i): p for i, p in enumerate(weights)}
        )
        by_example = [
            plus_pair(f, total_of(factors_of_terms(found.terms[str(i)], p, BOTH)))
            for i, (f, p) in enumerate(zip(by_example, weights, strict=True))
        ]
    sizes = [(p.shape[0], p[0].numel()) for p in weights]
    drawn = [
        Rotation(*(torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in both))
        for both in sizes
    ]
    return {
        "coordinates": [None] * len(weights),
        "random": [*drawn],
        "gradient": [*map(first_rotation, by_gradient)],
        "examples": [*map(first_rotation, by_example)],
    }


def shares(model: nn.Module, task: Task, seed: int) -> dict[str, dict[str, list[float]]]:
    """Of the signal and of the noise, in the directions with most signal, by basis."""
    x, y = task.test
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    thirds = [gradients(model, task, x[rows], y[rows]) for rows in order.tensor_split(3)]
    x, y = task.train
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    batches = [gradients(model, task, x[rows], y[rows]) for rows in order.split(task.batch_size)]
    found = {}
    for name, rotations in bases(model, task, seed).items():
        rank, one, other = (_turned(grads, rotations) for grads in thirds)
        noise = torch.stack([_turned(grads, rotations) for grads in batches]).var(0)
        best = rank.abs().argsort(descending=True)
        found[name] = {
            "signal": _cumulative((one * other)[best]),
            "noise": _cumulative(noise[best]),
        }
    return found


def _turned(grads: Sequence[Tensor], rotations: Sequence[Rotation | None]) -> Tensor:
    turned = [g if r is None else r.forward(g) for g, r in zip(grads, rotations, strict=True)]
    return parameters_to_vector(turned).double()


def _cumulative(energy: Tensor) -> list[float]:
    total = energy.cumsum(0)
    return [float(total[max(0, round(s * len(total)) - 1)] / total[-1]) for s in SHARES]


def train(task: Task, seed: int) -> dict[str, Any]:
    """One run of AdamW at its usual settings, looked at on the way."""
    seed_all(seed)
    model, (x, y) = task.new_model(), task.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {}
    for epoch in range(task.epochs + 1):
        if epoch in EPOCHS or epoch == task.epochs:
            found[str(epoch)] = shares(model, task, seed)
        if epoch == task.epochs:
            break
        seed_all(1_000_003 * (seed + 1) + epoch)
        for rows in torch.randperm(len(y)).split(task.batch_size):
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).mean().backward()
            optimizer.step()
    return found


def main(out: Path) -> None:
    """What is left."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(out.read_text("utf-8"))["shares"] if out.exists() else {}
    todo: Mapping[str, Callable[[int], Task]] = levels()
    for seed, (name, make) in product(SEEDS, todo.items()):
        if str(seed) in rows.setdefault(name, {}):
            continue
        rows[name][str(seed)] = train(make(seed), seed)
        print(name, seed, flush=True)
        write_json(out, {"environment": environment(0), "directions": SHARES, "shares": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
