r"""Double descent: test error and noise gain over the number of weights.

The noise gain :math:`\|G\|_F^2/(n^2 m)` of the path operators is what label noise of unit variance
adds to the test error (THEORY §4, ours). Capacity is swept through the interpolation threshold,
where there are as many weights as training examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from poprisk.intervals import Interval, t_interval
from poprisk.path.coupling import noise_gain
from poprisk.path.operators import PathOperators
from poprisk_lab.plots import Line, Picture, Plot, interval_line, tabulate
from poprisk_lab.studies.claim import (
    Claim,
    Done,
    Findings,
    Found,
    Trial,
    Workspace,
    by_seed,
    figure,
    where,
)
from poprisk_lab.studies.criteria import (
    Criterion,
    at_least,
    at_most,
    controls,
    geometric,
    point,
    rank_correlation,
    ratio,
)
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
FEATURES, NETWORK = "random features", "network"
THRESHOLD = {FEATURES: 30, NETWORK: 5}
"""The size with as many weights as training examples, or one more."""
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


def sizes_of(done: Sequence[Done], model: str) -> list[int]:
    """The capacities that were tried, ascending."""
    return sorted({d.settings["size"] for d in where(done, model=model)})


def curve_of(done: Sequence[Done], model: str, seed: int, key: str) -> list[float]:
    """A figure over capacity on one seed."""
    trials = where(done, model=model, seed=seed)
    return [d.found[key] for d in sorted(trials, key=lambda d: d.settings["size"])]


def seeds_of(done: Sequence[Done], model: str) -> list[int]:
    """The seeds, ascending."""
    return sorted({d.settings["seed"] for d in where(done, model=model)})


def over_curves(
    done: Sequence[Done], model: str, figure: Callable[[list[float], list[float]], float]
) -> Interval:
    """A figure of the curves of test error and noise gain, over the seeds."""
    return t_interval(
        [
            figure(curve_of(done, model, seed, "test"), curve_of(done, model, seed, "gain"))
            for seed in seeds_of(done, model)
        ]
    )


def between_peaks(done: Sequence[Done], model: str) -> Interval:
    """By which factor of weights the peaks of test error and noise gain lie apart; at least 1."""
    weights = curve_of(done, model, seeds_of(done, model)[0], "weights")

    def apart(test: list[float], gain: list[float]) -> float:
        return abs(math.log(weights[_peak(test)] / weights[_peak(gain)]))

    return over_curves(done, model, apart).mapped(math.exp)


def _peak(curve: Sequence[float]) -> int:
    return max(range(len(curve)), key=lambda i: curve[i])


def rise(done: Sequence[Done], model: str, key: str) -> Interval:
    """A figure at the threshold over that at the largest capacity."""
    largest = sizes_of(done, model)[-1]
    at = by_seed(done, key, model=model, size=THRESHOLD[model])
    return ratio(at, by_seed(done, key, model=model, size=largest))


def harmful_share(done: Sequence[Done], model: str) -> Interval:
    """Share of the test error at the threshold that is harmful noise."""
    trials = where(done, model=model, size=THRESHOLD[model])
    return t_interval([d.found["terms"]["harmful noise"] / d.found["test"] for d in trials])


def judge(done: Sequence[Done]) -> Findings:
    """The bounds were fixed before the full run."""
    closure = at_most(
        "worst closure error of any run", point(max(d.found["closure"] for d in done)), 1e-2
    )
    beside = [c for model in THRESHOLD for c in _beside(done, model)]
    table = tabulate(
        "model and size",
        {
            f"{model}, {size}": where(done, model=model, size=size)
            for model in THRESHOLD
            for size in sizes_of(done, model)
        },
        {name: figure(key) for name, key in FIGURES.items()}
        | {name: figure("terms", name) for name in TERMS},
        about="Test errors unless said; bias, harmful noise and their cross term add up to it.",
    )
    decided = [c for model in THRESHOLD for c in _decided(done, model)]
    return Findings([*decided, *controls(*beside, closure)], table)


TERMS = ("bias", "harmful noise", "bias × harmful noise")
FIGURES = {
    "weights": "weights",
    "training error": "training",
    "test error": "test",
    "noise gain": "gain",
    "frozen kernel": "frozen",
    "clean labels": "clean_test",
    "after a tenth": "early_test",
    "kernel drift": "drift",
}


def _decided(done: Sequence[Done], model: str) -> list[Criterion]:
    return [
        at_least(f"test error, threshold over largest ({model})", rise(done, model, "test"), 1.5),
        at_most(f"weights between the peaks, a factor of ({model})",
                between_peaks(done, model), 2.0),
        at_least(f"rank correlation of error and gain ({model})",
                 over_curves(done, model, rank_correlation), 0.5),
        at_least(f"harmful noise in the error at the threshold ({model})",
                 harmful_share(done, model), 0.5, percent=True),
    ]  # fmt: skip


def _beside(done: Sequence[Done], model: str) -> list[Criterion]:
    early, end = (
        by_seed(done, key, model=model, size=THRESHOLD[model]) for key in ("early_gain", "gain")
    )
    return [
        at_most(f"clean labels: error, threshold over largest ({model})",
                rise(done, model, "clean_test"), 1.5),
        at_most(f"gain at the threshold, early over end ({model})", ratio(early, end), 0.5),
    ]  # fmt: skip


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Test error and noise gain over capacity, and what the test error is made of."""
    together = {"test error": "test", "noise gain": "gain", "clean labels": "clean_test"}
    together |= {"after a tenth of the steps": "early_test"}
    parts = {"test error": "test", "harmful noise": "", "bias": ""}
    return [
        _over_weights(done, model, title, y, figures, about)
        for model in THRESHOLD
        for title, y, figures, about in (
            ("Test error and noise gain", "error, or gain", together,
             "Geometric means over data sets with 95% bands. The claim is that the first two peak "
             "together; the others are the test error of controls."),
            ("What the test error is made of", "mean squared error", parts,
             "The four cells of each run; the cross term of bias and noise, which has either sign, "
             "is in the table."),
        )
    ]  # fmt: skip


def _over_weights(
    done: Sequence[Done], model: str, title: str, y: str, figures: dict[str, str], about: str
) -> Plot:
    """Figures over the number of weights; those without a key are terms of the test error."""
    groups = [where(done, model=model, size=size) for size in sizes_of(done, model)]
    x = [trials[0].found["weights"] for trials in groups]
    lines = list[Line]()
    for (name, key), colour in zip(figures.items(), COLOURS, strict=False):
        bands = [
            geometric([max(d.found[key] if key else d.found["terms"][name], 1e-12) for d in trials])
            for trials in groups
        ]
        lines.append(interval_line(name, x, bands, colour))
    axis = f"weights ({EXAMPLES} training examples)"
    return Plot(f"{title}: {model}", axis, y, lines, about, log_x=True, log_y=True)


COLOURS = ("poprisk", "adamw", "peer", "shuffled")


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
    judge=judge,
    show=show,
)
