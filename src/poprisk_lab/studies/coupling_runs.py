"""Runs whose kernel drifts far, and predictors of their test movement."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.path import Run, record
from poprisk.path.coupling import Prediction, coupling_matrix, score
from poprisk.path.operators import PathOperators, path_operators
from poprisk_lab.studies.claim import Found, Workspace
from poprisk_lab.studies.curves import rounded

N, M, BATCH, UNITS, SCALE, TARGET, NOISE = 24, 16, 8, 16, 0.4, 6.0, 0.3
FLIPPED = 2
STRIDE = 20
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-12)
RIDGES = torch.logspace(-12, 2, 29, dtype=torch.float64)


class Case(NamedTuple):
    """How a run is made."""

    label: str
    classes: bool
    optimizer: str
    lr: float
    batch: int = BATCH


CASES = {
    "regression-full": Case("regression, SGD, full batch", False, "sgd", 0.05, N),
    "regression-sgd": Case("regression, SGD", False, "sgd", 0.05),
    "regression-adamw": Case("regression, AdamW", False, "adamw", 0.02),
    "regression-gated": Case("regression, PopRiskAdamW", False, "poprisk", 0.02),
    "classes-sgd": Case("cross-entropy, SGD", True, "sgd", 0.5),
    "classes-adamw": Case("cross-entropy, AdamW", True, "adamw", 0.02),
}


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """Predict the query movement of a run, and of one with other labels, in four ways."""
    case, seed, steps = CASES[settings["case"]], settings["seed"], settings["steps"]
    first = train(case, seed, steps)
    ops = path_operators(first)
    coupling, drift = ops.coupling(), ops.kernel_drift()
    train_moved, query_moved = movement(first)
    frozen = frozen_ridge(first, train_moved, query_moved)
    other = train(case, seed, steps, noise_seed=10_000 + seed)
    other_train, other_query = movement(other)
    forecasts = forecast(ops, other_train, other_query)
    strided = path_operators(train(case, seed, steps, stride=STRIDE))
    with warnings.catch_warnings():  # the closure error goes on record instead
        warnings.simplefilter("ignore", RuntimeWarning)
        strided_closure, strided_coupling = strided.closure.worst, strided.coupling()
    found: Found = {
        "steps": [step for step, _ in drift],
        "drift": rounded([value for _, value in drift]),
        "peak": max(value for _, value in drift),
        "end": drift[-1][1],
        "closure": ops.closure.worst,
        "strided_closure": strided_closure,
        "path": _scores(coupling.prediction),
        "strided": _scores(strided_coupling.prediction),
        "frozen": _scores(frozen),
        "pseudo_inverse": _scores(coupling.frozen),
        "other": _scores(forecasts[-1]),
        "other_best": _scores(min(forecasts, key=lambda found: found.error)),
        "other_frozen": _scores(frozen_ridge(other, other_train, other_query)),
    }
    if settings["drawn"]:
        found["realized"] = rounded(query_moved.tolist())
        found["predicted"] = rounded(coupling.prediction.movement.tolist())
        found["frozen_predicted"] = rounded(frozen.movement.tolist())
    return found


def _scores(prediction: Prediction) -> dict[str, float]:
    return {"error": prediction.error, "correlation": prediction.correlation}


def data(case: Case, seed: int, noise_seed: int | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Noisy targets of three inputs (or their signs), and the inputs of the query points.

    With ``noise_seed`` more noise of the same size is added to the training targets (or
    :data:`FLIPPED` labels are flipped); inputs stay.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + M, 3, generator=g, dtype=torch.float64)
    y = (2 * x[:N, :1]).sin() + NOISE * torch.randn(N, 1, generator=g, dtype=torch.float64)
    other = torch.Generator().manual_seed(seed if noise_seed is None else noise_seed)
    if case.classes:
        labels = (y[:, 0] > 0).long()
        if noise_seed is not None:
            flipped = torch.randperm(N, generator=other)[:FLIPPED]
            labels[flipped] = 1 - labels[flipped]
        return (x[:N], labels), x[N:]
    if noise_seed is not None:
        y = y + NOISE * torch.randn(N, 1, generator=other, dtype=torch.float64)
    return (x[:N], TARGET * y), x[N:]


def train(
    case: Case, seed: int, steps: int, *, noise_seed: int | None = None, stride: int = 1
) -> Run:
    """Record one run; initial weights, inputs and batches depend on ``seed`` only."""
    examples, query = data(case, seed, noise_seed)
    torch.manual_seed(seed)
    outputs = 2 if case.classes else 1
    net = nn.Sequential(nn.Linear(3, UNITS), nn.Tanh(), nn.Linear(UNITS, outputs)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(SCALE)
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randperm(N, generator=g)[: case.batch] for _ in range(steps)]
    loss = "cross_entropy" if case.classes else "squared_error"
    return record(net, loss, _optimizer(case, net), batches, query, train=examples, stride=stride)


def _optimizer(case: Case, net: nn.Module) -> Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=case.lr)
    if case.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=case.lr, weight_decay=0.01)
    return PopRiskAdamW(
        net, lr=case.lr, weight_decay=0.01, alpha=0.1, batch_size=case.batch, dataset_size=N
    )


def movement(run: Run) -> tuple[Tensor, Tensor]:
    """How far the training outputs (N,) and the query outputs (Nq,) went."""
    problem = run.problem.to(torch.float64)
    first, last = (run.weights[k].double() for k in (0, len(run)))
    with torch.no_grad():
        train_moved, query_moved = (
            (problem.outputs(last, x) - problem.outputs(first, x)).flatten()
            for x in (problem.train[0], problem.query[0])
        )
    return train_moved, query_moved


def forecast(ops: PathOperators, train_moved: Tensor, query_moved: Tensor) -> list[Prediction]:
    """Another run's query movement by the coupling of this one, for each of TOLERANCES."""
    affine, found = ops.affine, list[Prediction]()
    for tol in TOLERANCES:
        A = coupling_matrix(ops.integrals, ops.channel(tol))
        found.append(score(A @ (train_moved + affine.train) - affine.query, query_moved))
    return found


def frozen_ridge(run: Run, train_moved: Tensor, query_moved: Tensor) -> Prediction:
    r""":math:`K_{QS}(K_{SS}+\lambda I)^{-1}\Delta u_S` with the kernel at the start.

    λ is the best of a grid by the query movement itself, which favours this control.
    """
    problem, w = run.problem.to(torch.float64), run.weights[0].double()
    J, J_query = (problem.jacobian(w, x) for x in (problem.train[0], problem.query[0]))
    values, basis = torch.linalg.eigh(J @ J.T)
    across, moved = J_query @ J.T @ basis, basis.T @ train_moved
    grid = RIDGES * values[-1]
    tried = [score(across @ (moved / (values.clamp_min(0) + r)), query_moved) for r in grid]
    return min(tried, key=lambda found: found.error)
