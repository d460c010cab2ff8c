r"""Double descent: test error and noise gain over the number of weights.

The noise gain :math:`\|G\|_F^2/(n^2 m)` of the path operators is what label noise of unit variance
adds to the test error (THEORY §4, ours). Capacity is swept through the interpolation threshold,
where there are as many weights as training examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from poprisk.intervals import Interval, t_interval
from poprisk.path.coupling import noise_gain
from poprisk.path.operators import PathOperators
from poprisk_lab.plots import Line, Plot, interval_line, short, tabulate
from poprisk_lab.results import Key
from poprisk_lab.studies import criteria, descent
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, ratio
from poprisk_lab.studies.descent import CleanSplit, mean_square, predicted
from poprisk_lab.tasks.interpolation import random_relu

NOISE_STD, EXAMPLES, QUERIES, SNAPSHOTS = 0.5, 30, 100, 11
FEATURES, NETWORK = "random features", "network"
THRESHOLD = {FEATURES: 30, NETWORK: 5}
"""The size with as many weights as training examples, or one more."""
SIZES = {FEATURES: (5, 10, 20, 30, 40, 60, 120, 300), NETWORK: (1, 2, 4, 5, 6, 8, 16, 48)}
QUICK = {FEATURES: (10, 30, 120), NETWORK: (2, 5, 24)}
INPUTS = {FEATURES: 8, NETWORK: 4}
STEPS = {FEATURES: 600, NETWORK: 800}


def trials(quick: bool) -> list[Trial]:
    """Every capacity on every seed."""
    seeds, sizes = (2, QUICK) if quick else (5, SIZES)
    return [
        Trial(
            f"{model.replace(' ', '-')}-{size}-{seed}",
            {"model": model, "size": size, "steps": 120 if quick else STEPS[model], "seed": seed},
        )
        for model in SIZES
        for size in sizes[model]
        for seed in range(seeds)
    ]


def make(model: str, size: int, seed: int) -> tuple[CleanSplit, nn.Module]:
    """Data of a seed, the same at every capacity, and a model of this capacity at its start."""
    generator = torch.Generator().manual_seed(3_000 + seed)
    d = INPUTS[model]
    x = torch.randn(EXAMPLES + QUERIES, d, generator=generator, dtype=torch.float64)
    b = torch.randn(d, 1, generator=generator, dtype=torch.float64) / d**0.5
    clean = torch.tanh(x @ b)
    if model == NETWORK:
        return CleanSplit.split(x, clean, EXAMPLES), descent.two_layer(
            d, size, (1.0, size**-0.5), seed
        )
    return CleanSplit.split(random_relu(x, size, generator), clean, EXAMPLES), descent.linear(size)


def optimizer_for(model: nn.Module, x: Tensor) -> Optimizer:
    """What reaches interpolation in few steps: momentum for a linear model, else Adam."""
    if isinstance(model, nn.Linear):
        return descent.descent(model, x, 1.0, 0.98)
    return Adam(model.parameters(), lr=0.02)


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One capacity on one seed."""
    kind, size, seed = settings["model"], settings["size"], settings["seed"]
    data, model = make(kind, size, seed)
    y = data.noisy(NOISE_STD, torch.Generator().manual_seed(4_000 + seed))
    calm, steps = make(kind, size, seed)[1], settings["steps"]
    descent.train(calm, optimizer_for(calm, data.x), (data.x, data.clean), limit=steps)
    optimizer = optimizer_for(model, data.x)
    ops = descent.follow(model, optimizer, data, y, limit=steps, snapshots=SNAPSHOTS)
    error = ops.four_cells(data.clean).error
    assert error is not None  # the queries have targets
    early, gain = ops.integrals.snapshots[1], ops.noise_gain()
    figures = {
        "test": error.measured,
        "gain": gain.path,
        "frozen": gain.frozen,
        "clean_test": mean_square(predicted(calm, data.query) - data.target),
        "early_test": mean_square(early.query_outputs - data.target.flatten()),
        "early_gain": gain_at(ops, early.G[:, :-1]),
        "training": mean_square(predicted(model, data.x) - y),
        "drift": max(value for _, value in ops.kernel_drift()),
        "closure": max(ops.closure[:2]),
        "gradient_closure": ops.closure.gradient,
    }
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "terms": {name: short(value) for name, value in error.terms.items()},
        **{name: short(value) for name, value in figures.items()},
    }


def gain_at(ops: PathOperators, G: Tensor) -> float:
    """Noise gain of a query transfer up to an earlier moment."""
    problem = ops.run.problem.to(torch.float64)
    u = ops.integrals.snapshots[0].train_outputs.view(problem.n, problem.c)
    return noise_gain(problem, dataclasses.replace(ops.integrals, G=G), u).path


def by_size(results: Results, model: str) -> dict[int, Results]:
    """The trials of a model by capacity, ascending."""
    return dict(sorted(results.where(model=model).by("size").items()))


def over_curves(
    results: Results, model: str, figure: Callable[[list[float], list[float]], float]
) -> Interval:
    """A figure of the curves of test error and noise gain over capacity, over the seeds."""
    sizes = [*by_size(results, model).values()]
    test, gain = ([trials.by_seed(key) for trials in sizes] for key in ("test", "gain"))
    seeds = sorted(test[0])
    return t_interval([figure([c[s] for c in test], [c[s] for c in gain]) for s in seeds])


def between_peaks(results: Results, model: str) -> Interval:
    """By which factor of weights the peaks of test error and noise gain lie apart; at least 1."""
    weights = [trials[0].metrics["weights"] for trials in by_size(results, model).values()]

    def apart(test: list[float], gain: list[float]) -> float:
        peaks = weights[test.index(max(test))], weights[gain.index(max(gain))]
        return abs(math.log(peaks[0] / peaks[1]))

    return over_curves(results, model, apart).mapped(math.exp)


def rise(results: Results, model: str, key: str) -> Interval:
    """A figure at the threshold over that at the largest capacity."""
    sizes = by_size(results, model)
    return ratio(sizes[THRESHOLD[model]].by_seed(key), [*sizes.values()][-1].by_seed(key))


def judge(results: Results) -> Report:
    """The bounds were fixed before the full run."""
    closure = at_most("worst closure error of any run", results.largest("closure"), 1e-2)
    decided = [c for model in THRESHOLD for c in _decided(results, model)]
    beside = [c for model in THRESHOLD for c in _beside(results, model)]
    terms = ("bias", "harmful noise", "bias × harmful noise")
    columns: Mapping[str, Key] = {
        "weights": "weights",
        "training error": "training",
        "test error": "test",
        "noise gain": "gain",
        "frozen kernel": "frozen",
        "clean labels": "clean_test",
        "after a tenth": "early_test",
        "kernel drift": "drift",
        **{name: ("terms", name) for name in terms},
    }
    table = tabulate(
        "model and size",
        {f"{m}, {s}": trials for m in THRESHOLD for s, trials in by_size(results, m).items()},
        columns,
        about="Test errors unless said; bias, harmful noise and their cross term add up to it.",
    )
    return Report([*decided, *controls(*beside, closure)], table)


def _decided(results: Results, model: str) -> Iterator[Criterion]:
    yield at_least(f"test error, threshold over largest ({model})",
                   rise(results, model, "test"), 1.5)  # fmt: skip
    yield at_most(f"weights between the peaks, a factor of ({model})",
                  between_peaks(results, model), 2.0)  # fmt: skip
    yield at_least(f"rank correlation of error and gain ({model})",
                   over_curves(results, model, criteria.rank_correlation), 0.5)  # fmt: skip
    trials = results.where(model=model, size=THRESHOLD[model])
    shares = [d.metrics["terms"]["harmful noise"] / d.metrics["test"] for d in trials]
    yield at_least(f"harmful noise in the error at the threshold ({model})",
                   t_interval(shares), 0.5, percent=True)  # fmt: skip


def _beside(results: Results, model: str) -> Iterator[Criterion]:
    yield at_most(f"clean labels: error, threshold over largest ({model})",
                  rise(results, model, "clean_test"), 1.5)  # fmt: skip
    trials = results.where(model=model, size=THRESHOLD[model])
    early = ratio(trials.by_seed("early_gain"), trials.by_seed("gain"))
    yield at_most(f"gain at the threshold, early over end ({model})", early, 0.5)


def show(results: Results) -> Plots:
    """Test error and noise gain over capacity, and what the test error is made of."""
    together: dict[str, Key] = {"test error": "test", "noise gain": "gain"}
    together |= {"clean labels": "clean_test", "after a tenth of the steps": "early_test"}
    parts: dict[str, Key] = {"test error": "test"}
    parts |= {name: ("terms", name) for name in ("harmful noise", "bias")}
    return [
        _over_weights(by_size(results, model), f"{title}: {model}", y, figures, about)
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
    sizes: dict[int, Results], title: str, y: str, figures: dict[str, Key], about: str
) -> Plot:
    """Figures over the number of weights."""
    x, lines = [trials[0].metrics["weights"] for trials in sizes.values()], list[Line]()
    colours = ("poprisk", "adamw", "peer", "shuffled")
    for (name, key), colour in zip(figures.items(), colours, strict=False):
        bands = [
            criteria.geometric([max(v, 1e-12) for v in trials.all(key)])
            for trials in sizes.values()
        ]
        lines.append(interval_line(name, x, bands, colour))
    axis = f"weights ({EXAMPLES} training examples)"
    return Plot(title, axis, y, lines, about, log_x=True, log_y=True)
