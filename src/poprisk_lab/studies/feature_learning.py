"""Generalization while the kernel changes, against what the kernel predicts at the start."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.intervals import Interval, t_interval
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.path import Run, record, trace_cells
from poprisk_lab.plots import Picture, Plot, rounded, seeds_line, tabulate
from poprisk_lab.studies.claim import (
    Claim,
    Done,
    Findings,
    Found,
    Trial,
    Workspace,
    by_seed,
    figure,
    found_line,
    where,
)
from poprisk_lab.studies.criteria import at_least, at_most, controls, ratio
from poprisk_lab.studies.descent import mean_square

N, M, BATCH, UNITS, NOISE = 300, 400, 30, 64, 0.1
POINTS = 9
RIDGES = torch.logspace(-10, 3, 40, dtype=torch.float64)


class Problem(NamedTuple):
    """A regression and how it is trained; ``target`` None: odd against even digits."""

    label: str
    inputs: int
    optimizer: str
    lr: float
    target: Callable[[Tensor], Tensor] | None


def _product(x: Tensor) -> Tensor:
    return x[:, 0] * x[:, 1]


def _wave(x: Tensor) -> Tensor:
    return 2**0.5 * (2 * x[:, 0]).sin()


def _sum(x: Tensor) -> Tensor:
    return x[:, 0] * x[:, 1] + x[:, 2].relu()


PROBLEMS = {
    "product": Problem("x₁x₂ of 16 inputs, AdamW", 16, "adamw", 0.01, _product),
    "wave": Problem("√2·sin 2x₁ of 20 inputs, SGD", 20, "sgd", 0.1, _wave),
    "sum": Problem("x₁x₂ + max(x₃, 0) of 16 inputs, PopRiskAdamW", 16, "poprisk", 0.01, _sum),
    "digits": Problem("digits, odd against even, AdamW", 64, "adamw", 0.003, None),
}


LEARNT = ("product", "wave", "sum")
"""Targets of few among many directions, which a net at the start does not favour."""
DIGITS = "digits"
SEEDS = range(6)
CLEARLY = 0.8


def trials(quick: bool) -> list[Trial]:
    """One problem on one seed."""
    problems, seeds, steps = [*PROBLEMS], SEEDS, 1000
    if quick:
        problems, seeds, steps = ["product", DIGITS], range(2), 150
    return [
        Trial(
            f"{problem}-{seed}",
            {"problem": problem, "seed": seed, "steps": steps},
            ("sklearn",) if problem == DIGITS else (),
        )
        for problem in problems
        for seed in seeds
    ]


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Train, follow the run, and compare with kernel regression."""
    problem, seed = PROBLEMS[settings["problem"]], settings["seed"]
    (x, y), (queries, clean), truth = data(problem, seed)
    recorded = train(problem, (x, y), (queries, clean), seed, settings["steps"])
    with warnings.catch_warnings():  # the closure error goes on record instead
        warnings.simplefilter("ignore", RuntimeWarning)
        trace = trace_cells(recorded, truth, points=POINTS)
    places = [round(i * len(recorded) / (POINTS - 1)) for i in range(POINTS)]
    first, last = (tangents(recorded, k) for k in (0, len(recorded)))
    errors = [mean_square(trace.outputs(i) - clean) for i in range(len(trace.parts))]
    kernels = [tangents(recorded, k).kernel for k in places]
    norm = torch.linalg.matrix_norm(kernels[0], 2)
    return {
        "steps": places,
        "drift": rounded([float(torch.linalg.matrix_norm(k - kernels[0], 2) / norm)
                          for k in kernels]),
        "alignment": rounded([alignment(k, truth) for k in kernels]),
        "error_steps": [part.step for part in trace.parts],
        "errors": rounded(errors),
        "end": float(torch.linalg.matrix_norm(kernels[-1] - kernels[0], 2) / norm),
        "error": errors[-1],
        "without_noise": mean_square(trace.without_noise() - clean),
        "nothing": mean_square(clean - y.mean()),
        "frozen": frozen_error(first, y, clean),
        "end_kernel": frozen_error(last, y, clean),
        "closure": trace.closure.query,
    }  # fmt: skip


def data(
    problem: Problem, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Training set (n, d) and (n, 1), query inputs and clean targets, clean training targets."""
    g = torch.Generator().manual_seed(seed)
    if problem.target is None:
        x, clean = _parity(g)
    else:
        x = torch.randn(N + M, problem.inputs, generator=g, dtype=torch.float64)
        clean = problem.target(x).unsqueeze(1)
    noise = NOISE * torch.randn(N, 1, generator=g, dtype=torch.float64)
    return (x[:N], clean[:N] + noise), (x[N:], clean[N:]), clean[:N]


def _parity(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    chosen = torch.randperm(len(classes), generator=generator)[: N + M]
    x = torch.tensor(pixels, dtype=torch.float64)[chosen] / 16
    return x, 2.0 * (torch.tensor(classes)[chosen] % 2).double().unsqueeze(1) - 1


def train(
    problem: Problem,
    examples: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    seed: int,
    steps: int,
) -> Run:
    """Record one run of a net with one hidden layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(problem.inputs, UNITS), nn.Tanh(), nn.Linear(UNITS, 1)).double()
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randperm(N, generator=g)[:BATCH] for _ in range(steps)]
    return record(net, "squared_error", _optimizer(problem, net), batches, query, train=examples)


def _optimizer(problem: Problem, net: nn.Module) -> Optimizer:
    if problem.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=problem.lr)
    if problem.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=problem.lr, weight_decay=0.01)
    return PopRiskAdamW(net, lr=problem.lr, batch_size=BATCH, dataset_size=N)


class Tangents(NamedTuple):
    """A net as a linear model: its outputs, :math:`K_{SS}` and :math:`K_{QS}`."""

    train: Tensor
    query: Tensor
    kernel: Tensor
    across: Tensor


def tangents(recorded: Run, k: int) -> Tangents:
    """The tangents after k steps."""
    problem, w = recorded.problem, recorded.weights[k]
    x, queries = problem.train[0], problem.query[0]
    J, J_query = problem.jacobian(w, x), problem.jacobian(w, queries)
    with torch.no_grad():
        outputs = problem.outputs(w, x), problem.outputs(w, queries)
    return Tangents(*outputs, J @ J.T, J_query @ J.T)


def frozen_error(tangent: Tangents, y: Tensor, clean: Tensor) -> float:
    r"""Test error of kernel regression, :math:`u_Q + K_{QS}(K_{SS} + \lambda I)^{-1}(y - u_S)`.

    With and without the outputs u that the net has there, and with λ of a grid: the best of them
    by the test set, which favours this control.
    """
    values, basis = torch.linalg.eigh(tangent.kernel)
    across, errors = tangent.across @ basis, list[float]()
    for start in (0.0, 1.0):
        residual = basis.T @ (y - start * tangent.train)
        for ridge in RIDGES * values[-1]:
            fitted = across @ (residual / (values.clamp_min(0) + ridge).unsqueeze(1))
            errors.append(mean_square(start * tangent.query + fitted - clean))
    return min(errors)


def alignment(kernel: Tensor, y: Tensor) -> float:
    r""":math:`y^T K y/(\|K\|_F\|y\|^2)` of the centred kernel and target; 1 is K ∝ y yᵀ."""
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    t = y - y.mean()
    return float((t.T @ centred @ t).squeeze() / (centred.norm() * t.square().sum()))


def _there(done: Sequence[Done], among: Sequence[str] = LEARNT) -> list[str]:
    found = {d.settings["problem"] for d in done}
    return [problem for problem in among if problem in found]


def _error(done: Sequence[Done], problem: str) -> Interval:
    """Test error over that of the kernel at the start."""
    return ratio(by_seed(done, "error", problem=problem), by_seed(done, "frozen", problem=problem))


def _extreme(done: Sequence[Done], key: str, how: Callable[..., float]) -> Interval:
    """The largest or smallest figure of the problems, seed by seed."""
    columns = [by_seed(done, key, problem=problem) for problem in _there(done)]
    return t_interval([how(c[seed] for c in columns) for seed in columns[0]])


def _pooled(done: Sequence[Done], a: str, b: str) -> Interval:
    """The ratio of two figures, a geometric mean over problems and seeds, paired over seeds."""
    pairs = [(by_seed(done, a, problem=p), by_seed(done, b, problem=p)) for p in _there(done)]
    logs = [sum(math.log(x[s] / y[s]) for x, y in pairs) / len(pairs) for s in pairs[0][0]]
    return t_interval(logs).mapped(math.exp)


def judge(done: Sequence[Done]) -> Findings:
    """Much better than the kernel at the start, drift of 1 and more, movement accounted for."""
    error = "test error over that of the kernel at the start"
    decided = [
        *(at_most(f"{PROBLEMS[p].label}: {error}", _error(done, p), CLEARLY)
          for p in _there(done)),
        at_least("kernel drift at the end, least of these problems",
                 _extreme(done, "end", min), 1.0),
        at_most("test movement that the path operators miss, relative, worst of them",
                _extreme(done, "closure", max), 0.02),
    ]  # fmt: skip
    beside = [
        at_most("test error of the kernel at the end over that of the kernel at the start, mean",
                _pooled(done, "end_kernel", "frozen"), CLEARLY),
        *(at_most(f"{PROBLEMS[p].label}: {error}", _error(done, p), 1.0)
          for p in _there(done, [DIGITS])),
    ]  # fmt: skip
    table = tabulate(
        "problem",
        {PROBLEMS[p].label: where(done, problem=p) for p in _there(done, [*PROBLEMS])},
        {name: figure(key) for name, key in COLUMNS.items()},
        about="Test errors. The kernel regressions take the best ridge, and the outputs of the "
        "net or zero as their start, by the test set; the net is taken as it ends. The operators "
        "know the path: they account for the test outputs and do not forecast them.",
    )
    return Findings([*decided, *controls(*beside)], table)


COLUMNS = {
    "test error": "error",
    "without the noise that got through": "without_noise",
    "kernel at the start": "frozen",
    "kernel at the end": "end_kernel",
    "mean of the labels": "nothing",
    "drift at the end": "end",
    "movement missed": "closure",
}


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Test error over the runs beside the frozen kernel's, drift, and alignment."""
    problems = {p: where(done, problem=p) for p in _there(done, [*PROBLEMS])}
    drift, alignment = (
        [
            found_line(PROBLEMS[p].label, runs, "steps", key, f"module-{i + 1}")
            for i, (p, runs) in enumerate(problems.items())
        ]
        for key in ("drift", "alignment")
    )
    return [
        *(_errors(PROBLEMS[p].label, runs) for p, runs in problems.items()),
        Plot("Kernel drift", "step", "‖K - K₀‖ / ‖K₀‖", drift, "Spectral norms."),
        Plot("Alignment of kernel and target", "step", "yᵀKy / (‖K‖ ‖y‖²)", alignment,
             "Centred; at 1 the kernel would hold nothing but the target."),
    ]  # fmt: skip


def _errors(label: str, runs: Sequence[Done]) -> Plot:
    steps = runs[0].found["error_steps"]
    ends = [steps[0], steps[-1]]
    first, last = ([[d.found[key]] * 2 for d in runs] for key in ("frozen", "end_kernel"))
    lines = [
        found_line("net", runs, "error_steps", "errors", "poprisk"),
        seeds_line("kernel at the start", ends, first, "adamw"),
        seeds_line("kernel at the end", ends, last, "paper", dash="dash"),
    ]
    return Plot(f"Test error: {label}", "step", "mean squared error", lines,
                "Mean over seeds with 95% intervals. The lines of the kernels have their best "
                "ridge by the test set.")  # fmt: skip


CLAIM = Claim(
    name="feature-learning",
    title="Generalization while the kernel changes",
    statement="A net generalizes where the kernel it starts with does not, its kernel changing by "
    "more than its own size, and the operators of the path account for its test outputs.",
    source="§3 and Thm 5.1",
    paper="",
    published=["the theory is not to assume a frozen kernel; its experiment is not known to us"],
    ours=[
        f"{N} training examples with label noise {NOISE}, {M} clean test points, one hidden layer "
        f"of {UNITS} tanh units in PyTorch's initialization, 1,000 steps, batches of {BATCH}",
        "x₁x₂ and √2 sin 2x₁ and x₁x₂ + max(x₃, 0) of 16 to 20 Gaussian inputs; AdamW, SGD and "
        "PopRiskAdamW on its defaults",
        "the digits, odd against even, as a control: there the kernel at the start is good",
        "the net as it ends, kernel regression with the best ridge by the test set; six seeds",
        f"clearly better is {CLEARLY:g} times the error or less; a drift of 1 is the kernel's size",
        "operators matrix-free, all outputs moved once per pass over the data",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
