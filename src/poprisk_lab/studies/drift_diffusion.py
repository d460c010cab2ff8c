"""Drift and diffusion of minibatch gradients: the powers of time, batch size and data size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from poprisk.intervals import Interval
from poprisk.path.drift import Recipe, movement, slope, sweep
from poprisk_lab.plots import Plot, metric_line, rounded, tabulate
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import Criterion, at_most, controls
from poprisk_lab.tasks.nets import mlp

BATCH, UNITS, INPUTS, QUERIES = 8, 24, 4, 40
MARGIN = 0.1
SEEDS = range(8)


class Regime(NamedTuple):
    """How runs of one part are made."""

    label: str
    lr: float
    replace: bool = True


PARTS = {
    "independent": Regime("independent batches, rate 1e-4", 1e-4),
    "noise": Regime("data sizes, rate 0.01, 8 steps", 0.01),
    "later": Regime("rate 2e-3", 2e-3),
    "converged": Regime("rate 0.2, to convergence", 0.2),
    "shuffled": Regime("shuffled passes, rate 1e-4", 1e-4, replace=False),
}


class Law(NamedTuple):
    """A power that the theory gives."""

    name: str
    part: str
    key: str
    theory: float


LAWS = (
    Law("power of T in the drift", "independent", "drift", 1.0),
    Law("power of T in the diffusion", "independent", "diffusion", 0.5),
    Law("power of the batch size in the diffusion", "independent", "batch", -0.5),
    Law("power of n in the label noise fitted", "noise", "noise", -0.5),
)
LIMITS = (
    Law("power of T in the drift, rate 2e-3", "later", "drift", 1.0),
    Law("power of T in the drift, to convergence", "converged", "drift", 1.0),
    Law("power of T in the diffusion, shuffled passes", "shuffled", "diffusion", 0.5),
)


def trials(quick: bool) -> list[Trial]:
    """One part on one draw of data and weights."""
    seeds, size = SEEDS, {"n": 256, "steps": 64, "replicates": 8}
    if quick:
        seeds, size = range(2), {"n": 48, "steps": 16, "replicates": 3}
    return [
        Trial(f"{part}-{seed}", {"part": part, "seed": seed, **size})
        for part in PARTS
        for seed in seeds
    ]


def recipe(part: Regime, settings: dict[str, Any]) -> Recipe:
    """A noisy regression of one of four inputs; data and weights depend on the seed."""
    seed, n = settings["seed"], settings["n"]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, INPUTS, generator=g)
    y = x[:, :1].sin() + 0.5 * torch.randn(n, 1, generator=g)

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return mlp(INPUTS, UNITS, 1, activation=nn.Tanh)

    query = torch.randn(QUERIES, INPUTS, generator=g)
    return Recipe(
        model, "squared_error", (x, y), query, part.lr, settings["steps"], replace=part.replace
    )


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Fit the powers of one part."""
    name, seed, n = settings["part"], settings["seed"], settings["n"]
    given = recipe(PARTS[name], settings)
    seeds = range(100 * seed, 100 * seed + settings["replicates"])
    if name == "noise":
        sizes = [n // 8, n // 4, n // 2, n]
        laws = sweep(given._replace(steps=8), batch_sizes=(BATCH,), sizes=sizes, seeds=seeds)
        return {"noise": _value(laws.noise)}
    sizes = (BATCH, BATCH // 2, 2 * BATCH, 4 * BATCH) if name == "independent" else (BATCH,)
    laws = sweep(given, batch_sizes=sizes, seeds=seeds)
    one = movement(given.run(BATCH, n, seeds[0]))
    drift, diffusion = (part.norm(dim=1).tolist() for part in (one.drift, one.diffusion))
    return {
        "drift": _value(laws.drift),
        "diffusion": _value(laws.diffusion),
        "batch": _value(laws.batch),
        "alone": slope(one.times, drift),
        "times": one.times,
        "drifts": rounded([v / drift[0] for v in drift]),
        "walks": rounded([v / drift[0] for v in diffusion]),
    }


def _value(exponent: Any) -> float | None:
    return None if exponent is None else exponent.value


def power(results: Results, law: Law) -> Interval:
    """A power with its interval over draws of data, weights and batches."""
    return results.where(part=law.part).mean(law.key)


def distance(found: Interval, theory: float) -> Interval:
    """How far the power may be from the theory's: from the nearest to the farthest end.

    Example:
        >>> distance(Interval(1.0, 0.5, 1.25), 1.0)
        Interval(mean=0.0, low=0.0, high=0.5, values=())
    """
    ends = abs(found.low - theory), abs(found.high - theory)
    inside = found.low <= theory <= found.high
    values = tuple(abs(v - theory) for v in found.values)
    return Interval(abs(found.mean - theory), 0.0 if inside else min(ends), max(ends), values)


def judge(results: Results) -> Report:
    """Each power within 0.1 of the theory's, the whole interval."""
    decided, limits = ([_criterion(results, law) for law in laws] for laws in (LAWS, LIMITS))
    table = tabulate(
        "powers of",
        {part.label: results.where(part=name) for name, part in PARTS.items()},
        {
            "T, drift": "drift",
            "T, diffusion": "diffusion",
            "T, full-batch part": "alone",
            "b": "batch",
            "n": "noise",
        },
        about="The drift is what runs with different batches have in common, the noise of that "
        "mean taken out; the diffusion is the root mean square displacement of the summed noise. "
        "The law of the drift is the limit of learning rate × steps going to 0; that of the "
        "diffusion takes independent batches.",
    )
    return Report([*decided, *controls(*limits)], table)


def _criterion(results: Results, law: Law) -> Criterion:
    name = f"distance of the {law.name} from {law.theory:g}"
    return at_most(name, distance(power(results, law), law.theory), MARGIN)


COLOURS = {"independent": "poprisk", "later": "adamw", "converged": "peer", "shuffled": "paper"}


def show(results: Results) -> Plots:
    """Drift and diffusion over time, with independent batches and beyond the limits."""
    drifts, walks = (
        [
            metric_line(PARTS[part].label, runs, "times", key, colour)
            for part, colour in COLOURS.items()
            if (runs := results.where(part=part))
        ]
        for key in ("drifts", "walks")
    )
    return [
        Plot("Drift", "steps", "relative size", drifts,
             "The summed full-batch part of one run a seed over its size at step 4, mean with 95% "
             "intervals; slope 1 on these axes until the mean gradient is used up.",
             log_x=True, log_y=True),
        Plot("Diffusion", "steps", "relative size", walks,
             "The summed noise of the same runs in the same unit: slope 1/2, and turning back with "
             "shuffled passes.", log_x=True, log_y=True),
    ]  # fmt: skip
