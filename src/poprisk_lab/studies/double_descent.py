r"""Double descent: test error and noise gain over the number of weights.

The noise gain :math:`\|G\|_F^2/(n^2 m)` of the path operators is what label noise of unit variance
adds to the test error (THEORY §4, ours). Capacity is swept through the interpolation threshold,
where there are as many weights as training examples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from poprisk.path.coupling import noise_gain
from poprisk.path.operators import PathOperators
from poprisk_lab.studies import double_judge as judging
from poprisk_lab.studies.claim import Claim, Found, Trial, Workspace
from poprisk_lab.studies.descent import (
    Data,
    descent,
    linear,
    mean_square,
    operators,
    predicted,
    recorded,
    short,
    train,
    two_layer,
)
from poprisk_lab.tasks.interpolation import random_relu

NOISE_STD = 0.5
EXAMPLES = 30
QUERIES = 100
SNAPSHOTS = 11
FEATURES, NETWORK = judging.FEATURES, judging.NETWORK
SIZES = {
    FEATURES: (5, 10, 20, 30, 40, 60, 120, 300),
    NETWORK: (1, 2, 4, 5, 6, 8, 16, 48),
}
QUICK = {FEATURES: (10, 30, 120), NETWORK: (2, 5, 24)}
INPUTS = {FEATURES: 8, NETWORK: 4}
STEPS = {FEATURES: 600, NETWORK: 800}


def trials(quick: bool) -> list[Trial]:
    """Every capacity on every seed."""
    seeds, sizes = (2, QUICK) if quick else (5, SIZES)
    return [
        Trial(
            f"{model.replace(' ', '-')}-{size}-{seed}",
            {
                "model": model,
                "size": size,
                "steps": 120 if quick else STEPS[model],
                "seed": seed,
            },
        )
        for model in SIZES
        for size in sizes[model]
        for seed in range(seeds)
    ]


def make(model: str, size: int, seed: int) -> tuple[Data, nn.Module]:
    """Data of a seed, the same at every capacity, and a model of this capacity at its start."""
    generator = torch.Generator().manual_seed(3_000 + seed)
    d = INPUTS[model]
    x = torch.randn(EXAMPLES + QUERIES, d, generator=generator, dtype=torch.float64)
    b = torch.randn(d, 1, generator=generator, dtype=torch.float64) / d**0.5
    clean = torch.tanh(x @ b)
    if model == NETWORK:
        return Data.split(x, clean, EXAMPLES), two_layer(d, size, (1.0, size**-0.5), seed)
    return Data.split(random_relu(x, size, generator), clean, EXAMPLES), linear(size)


def optimizer_for(model: nn.Module, x: Tensor) -> Optimizer:
    """What reaches interpolation in few steps: momentum for a linear model, else Adam."""
    if isinstance(model, nn.Linear):
        return descent(model, x, 1.0, 0.98)
    return Adam(model.parameters(), lr=0.02)


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One capacity on one seed."""
    kind, size, seed = settings["model"], settings["size"], settings["seed"]
    data, model = make(kind, size, seed)
    generator = torch.Generator().manual_seed(4_000 + seed)
    noise = torch.randn(data.clean.shape, generator=generator, dtype=torch.float64)
    y, steps = data.clean + NOISE_STD * noise, settings["steps"]
    calm = make(kind, size, seed)[1]
    train(calm, optimizer_for(calm, data.x), (data.x, data.clean), limit=steps)
    done = recorded(model, optimizer_for(model, data.x), data, y, limit=steps)
    ops = operators(done, snapshots=SNAPSHOTS)
    error = ops.four_cells(data.clean).error
    assert error is not None  # the queries have targets
    early = ops.integrals.snapshots[1]
    gain = ops.noise_gain()
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "test": short(error.measured),
        "terms": {name: short(value) for name, value in error.terms.items()},
        "gain": short(gain.path),
        "frozen": short(gain.frozen),
        "clean_test": short(mean_square(predicted(calm, data.query) - data.target)),
        "early_test": short(mean_square(early.query_outputs - data.target.flatten())),
        "early_gain": short(gain_at(ops, early.G[:, :-1])),
        "training": short(mean_square(predicted(model, data.x) - y)),
        "drift": short(max(value for _, value in ops.kernel_drift())),
        "closure": short(max(ops.closure[:2])),
        "gradient_closure": short(ops.closure.gradient),
    }


def gain_at(ops: PathOperators, G: Tensor) -> float:
    """Noise gain of a query transfer up to an earlier moment."""
    problem = ops.run.problem.to(torch.float64)
    u = ops.integrals.snapshots[0].train_outputs.view(problem.n, problem.c)
    return noise_gain(problem, dataclasses.replace(ops.integrals, G=G), u).path


CLAIM = Claim(
    name="double-descent",
    title="Double descent",
    statement=(
        "Over capacity the test error peaks at the interpolation threshold because label noise "
        "gets through there: the noise gain of the path operators peaks with it."
    ),
    source="Fig. 1, Cor. H.4 (frozen kernel)",
    paper="",
    published=["The paper's settings for this claim are not known."],
    ours=[
        f"n = {EXAMPLES} training examples with label noise of variance {NOISE_STD**2}, {QUERIES} "
        "queries with clean targets tanh(b·x).",
        "Random ReLU features of 8 inputs (5 to 300) with a linear readout, gradient descent with "
        "momentum 0.98; a two-layer tanh network of 4 inputs (width 1 to 48, six weights each and "
        "one), Adam at 0.02.",
        f"{STEPS[FEATURES]} and {STEPS[NETWORK]} full-batch steps: at the threshold the smallest "
        "directions are not fitted to the end, and the peak is finite where that of the "
        "minimum-norm solution is not.",
        "The threshold is where weights are as many as examples: 30 features, width 5.",
    ],
    trials=trials,
    run=run,
    judge=judging.judge,
    show=judging.show,
)
