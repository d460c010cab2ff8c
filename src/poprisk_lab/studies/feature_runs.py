"""Nets that learn features, and what their kernel at the start (or at the end) would predict."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.path import Run, record, trace_cells
from poprisk_lab.studies.claim import Found, Workspace
from poprisk_lab.studies.curves import rounded

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


def mean_square(values: Tensor) -> float:
    """Mean of the squares of all entries."""
    return float(values.square().mean())


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
