"""Generalization while the kernel changes, against what the kernel predicts at the start."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk.intervals import Interval, t_interval
from poprisk.path import trace_cells
from poprisk_lab.plots import Picture, Plot, metric_line, rounded, seeds_line, tabulate
from poprisk_lab.results import across
from poprisk_lab.studies.claim import Metrics, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import at_least, at_most, controls, ratio
from poprisk_lab.studies.descent import mean_square
from poprisk_lab.studies.small_nets import (
    Examples,
    NetRecipe,
    Tangents,
    alignment,
    relative_drift,
    ridge_fits,
    tangents,
)

N, M, BATCH, UNITS, NOISE = 300, 400, 30, 64, 0.1
POINTS = 9
RIDGES = torch.logspace(-10, 3, 40, dtype=torch.float64)
DIGITS, CLEARLY = "digits", 0.8


class TargetFunction(NamedTuple):
    """A regression and how it is trained; ``of`` None: odd against even digits."""

    recipe: NetRecipe
    inputs: int
    of: Callable[[Tensor], Tensor] | None

    @property
    def label(self) -> str:
        """In tables and plots."""
        return self.recipe.label


def _problem(
    label: str, inputs: int, optimizer: str, lr: float, of: Callable[[Tensor], Tensor] | None
) -> TargetFunction:
    return TargetFunction(NetRecipe(label, UNITS, optimizer, lr, BATCH), inputs, of)


LEARNT = {
    "product": _problem("x₁x₂ of 16 inputs, AdamW", 16, "adamw", 0.01, lambda x: x[:, 0] * x[:, 1]),
    "wave": _problem("√2·sin 2x₁ of 20 inputs, SGD", 20, "sgd", 0.1,
                     lambda x: 2**0.5 * (2 * x[:, 0]).sin()),
    "sum": _problem("x₁x₂ + max(x₃, 0) of 16 inputs, PopRiskAdamW", 16, "poprisk", 0.01,
                    lambda x: x[:, 0] * x[:, 1] + x[:, 2].relu()),
}  # fmt: skip
"""Targets of few among many directions, which a net at the start does not favour."""
ODD = _problem("digits, odd against even, AdamW", 64, "adamw", 0.003, None)
PROBLEMS = {**LEARNT, DIGITS: ODD}


def trials(quick: bool) -> list[Trial]:
    """One problem on one seed."""
    problems, seeds, steps = [*PROBLEMS], range(6), 1000
    if quick:
        problems, seeds, steps = ["product", DIGITS], range(2), 150
    return [
        Trial(
            f"{problem}-{seed}",
            {"problem": problem, "seed": seed, "steps": steps},
            needs=("sklearn",) if problem == DIGITS else (),
        )
        for problem in problems
        for seed in seeds
    ]


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train, follow the run, and compare with kernel regression."""
    problem, seed, steps = PROBLEMS[settings["problem"]], settings["seed"], settings["steps"]
    (x, y), (queries, clean), truth = data(problem, seed)
    recorded = problem.recipe.record((x, y), (queries, clean), seed=seed, steps=steps)
    with warnings.catch_warnings():  # the closure error goes on record instead
        warnings.simplefilter("ignore", RuntimeWarning)
        trace = trace_cells(recorded, truth, points=POINTS)
    places = [round(i * len(recorded) / (POINTS - 1)) for i in range(POINTS)]
    first, last = (tangents(recorded, k) for k in (0, len(recorded)))
    errors = [mean_square(trace.outputs(i) - clean) for i in range(len(trace.parts))]
    kernels = [tangents(recorded, k).kernel for k in places]
    drifts = [relative_drift(kernel, kernels[0]) for kernel in kernels]
    return {
        "steps": places,
        "drift": rounded(drifts),
        "alignment": rounded([alignment(k, truth) for k in kernels]),
        "error_steps": [part.step for part in trace.parts],
        "errors": rounded(errors),
        "end": drifts[-1],
        "error": errors[-1],
        "without_noise": mean_square(trace.without_noise() - clean),
        "nothing": mean_square(clean - y.mean()),
        "frozen": frozen_error(first, y, clean),
        "end_kernel": frozen_error(last, y, clean),
        "closure": trace.closure.query,
    }


def data(problem: TargetFunction, seed: int) -> tuple[Examples, Examples, Tensor]:
    """Training set (n, d) and (n, 1), query inputs and clean targets, clean training targets."""
    g = torch.Generator().manual_seed(seed)
    if problem.of is None:
        x, clean = _parity(g)
    else:
        x = torch.randn(N + M, problem.inputs, generator=g, dtype=torch.float64)
        clean = problem.of(x).unsqueeze(1)
    noise = NOISE * torch.randn(N, 1, generator=g, dtype=torch.float64)
    return (x[:N], clean[:N] + noise), (x[N:], clean[N:]), clean[:N]


def _parity(generator: torch.Generator) -> Examples:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    chosen = torch.randperm(len(classes), generator=generator)[: N + M]
    x = torch.tensor(pixels, dtype=torch.float64)[chosen] / 16
    return x, 2.0 * (torch.tensor(classes)[chosen] % 2).double().unsqueeze(1) - 1


def frozen_error(tangent: Tangents, y: Tensor, clean: Tensor) -> float:
    r"""Test error of kernel regression, :math:`u_Q + K_{QS}(K_{SS} + \lambda I)^{-1}(y - u_S)`.

    With and without the outputs u that the net has there, and with λ of a grid: the best of them
    by the test set, which favours this control.
    """
    return min(
        mean_square(start * tangent.query + fit - clean)
        for start in (0.0, 1.0)
        for fit in ridge_fits(tangent, y - start * tangent.train, RIDGES)
    )


def _error(results: Results) -> Interval:
    """Test error over that of the kernel at the start."""
    return ratio(results.by_seed("error"), results.by_seed("frozen"))


def _pooled(results: Results, a: str, b: str) -> Interval:
    """The ratio of two figures, a geometric mean over problems and seeds, paired over seeds."""
    pairs = [(group.by_seed(a), group.by_seed(b)) for group in results.by("problem").values()]
    logs = across([{s: math.log(x[s] / y[s]) for s in x} for x, y in pairs], fmean)
    return t_interval(logs.values()).mapped(math.exp)


def judge(results: Results) -> Report:
    """Much better than the kernel at the start, drift of 1 and more, movement accounted for."""
    error, groups = "test error over that of the kernel at the start", results.by("problem")
    learnt = Results(d for d in results if d.settings["problem"] in LEARNT)
    decided = [
        *(at_most(f"{PROBLEMS[p].label}: {error}", _error(runs), CLEARLY)
          for p, runs in learnt.by("problem").items()),
        at_least("kernel drift at the end, least of these problems",
                 t_interval(learnt.over("problem", "end", min).values()), 1.0),
        at_most("test movement that the path operators miss, relative, worst of them",
                t_interval(learnt.over("problem", "closure", max).values()), 0.02),
    ]  # fmt: skip
    beside = [
        at_most("test error of the kernel at the end over that of the kernel at the start, mean",
                _pooled(learnt, "end_kernel", "frozen"), CLEARLY),
        *(at_most(f"{PROBLEMS[p].label}: {error}", _error(runs), 1.0)
          for p, runs in groups.items() if p == DIGITS),
    ]  # fmt: skip
    table = tabulate(
        "problem",
        {PROBLEMS[p].label: runs for p, runs in groups.items()},
        {
            "test error": "error",
            "without the noise that got through": "without_noise",
            "kernel at the start": "frozen",
            "kernel at the end": "end_kernel",
            "mean of the labels": "nothing",
            "drift at the end": "end",
            "movement missed": "closure",
        },
        about="Test errors. The kernel regressions take the best ridge, and the outputs of the "
        "net or zero as their start, by the test set; the net is taken as it ends. The operators "
        "know the path: they account for the test outputs and do not forecast them.",
    )
    return Report([*decided, *controls(*beside)], table)


def show(results: Results) -> list[Plot | Picture]:
    """Test error over the runs beside the frozen kernel's, drift, and alignment."""
    problems = results.by("problem")
    drift, alignment = (
        [
            metric_line(PROBLEMS[p].label, runs, "steps", key, f"module-{i}")
            for i, (p, runs) in enumerate(problems.items(), 1)
        ]
        for key in ("drift", "alignment")
    )
    return [
        *(_errors(PROBLEMS[p].label, runs) for p, runs in problems.items()),
        Plot("Kernel drift", "step", "‖K - K₀‖ / ‖K₀‖", drift, "Spectral norms."),
        Plot("Alignment of kernel and target", "step", "yᵀKy / (‖K‖ ‖y‖²)", alignment,
             "Centred; at 1 the kernel would hold nothing but the target."),
    ]  # fmt: skip


def _errors(label: str, runs: Results) -> Plot:
    steps = runs[0].metrics["error_steps"]
    ends = [steps[0], steps[-1]]
    first, last = ([[v] * 2 for v in runs.all(key)] for key in ("frozen", "end_kernel"))
    lines = [
        metric_line("net", runs, "error_steps", "errors", "poprisk"),
        seeds_line("kernel at the start", ends, first, "adamw"),
        seeds_line("kernel at the end", ends, last, "paper", dash="dash"),
    ]
    return Plot(f"Test error: {label}", "step", "mean squared error", lines,
                "Mean over seeds with 95% intervals. The lines of the kernels have their best "
                "ridge by the test set.")  # fmt: skip
