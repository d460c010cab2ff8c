"""Test movement predicted from training movement, while the kernel drifts by more than O(1)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from poprisk.intervals import t_interval
from poprisk.path import Run
from poprisk.path.coupling import Prediction, coupling_matrix, score
from poprisk.path.operators import PathOperators, path_operators
from poprisk_lab.plots import Picture, Plot, metric_line, points, rounded, tabulate
from poprisk_lab.studies.claim import Metrics, Report, Results, Trial, Workspace
from poprisk_lab.studies.coupling_error import error_criteria, error_parts
from poprisk_lab.studies.criteria import Criterion, at_least, controls, difference, geometric
from poprisk_lab.studies.small_nets import Examples, NetRecipe, movement, ridge_fits, tangents

N, M, UNITS, SCALE, TARGET, NOISE = 24, 16, 16, 0.4, 6.0, 0.3
FLIPPED, STRIDE, PAPER_ERROR = 2, 20, 0.165
PARTED = range(3)
"""Seeds whose transfer error is taken apart."""
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-12)
RIDGES = torch.logspace(-12, 2, 29, dtype=torch.float64)


def _kind(label: str, *, optimizer: str, lr: float, outputs: int = 1, batch: int = 8) -> NetRecipe:
    gate = {"alpha": 0.1, "weight_decay": 0.01}
    return NetRecipe(label, UNITS, optimizer, lr, batch, outputs, SCALE, gate)


KINDS = {
    "regression-full": _kind("regression, SGD, full batch", optimizer="sgd", lr=0.05, batch=N),
    "regression-sgd": _kind("regression, SGD", optimizer="sgd", lr=0.05),
    "regression-adamw": _kind("regression, AdamW", optimizer="adamw", lr=0.02),
    "regression-gated": _kind("regression, PopRiskAdamW", optimizer="poprisk", lr=0.02),
    "classes-sgd": _kind("cross-entropy, SGD", optimizer="sgd", lr=0.5, outputs=2),
    "classes-adamw": _kind("cross-entropy, AdamW", optimizer="adamw", lr=0.02, outputs=2),
}


def trials(quick: bool) -> list[Trial]:
    """One run, its strided record and the same with other labels; parts of transfer errors."""
    kinds, seeds, steps = [*KINDS], range(6), 300
    if quick:
        kinds, seeds, steps = ["regression-gated", "classes-sgd"], range(2), 80
    found = list[Trial]()
    for kind in kinds:
        for seed in seeds:
            own = {"case": kind, "seed": seed, "steps": steps, "drawn": seed == 0}
            found.append(Trial(f"{kind}-{seed}", own))
            if seed in PARTED:
                parts = {**own, "drawn": False, "kind": "parts"}
                found.append(Trial(f"parts-{kind}-{seed}", parts))
    return found


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Predict the query movement of a run, and of one with other labels, in four ways."""
    kind, seed, steps = KINDS[settings["case"]], settings["seed"], settings["steps"]
    first = train(kind, seed, steps)
    ops = path_operators(first)
    other = train(kind, seed, steps, noise_seed=10_000 + seed)
    if settings.get("kind") == "parts":
        return error_parts(ops, path_operators(other))
    coupling, drift = ops.coupling(), ops.kernel_drift()
    moved = movement(first)
    frozen = frozen_ridge(first, *moved)
    other_moved = movement(other)
    forecasts = forecast(ops, *other_moved)
    strided = path_operators(train(kind, seed, steps, stride=STRIDE))
    with warnings.catch_warnings():  # the closure error goes on record instead
        warnings.simplefilter("ignore", RuntimeWarning)
        strided_closure, strided_coupling = strided.closure.worst, strided.coupling()
    predictions = {
        "path": coupling.prediction,
        "strided": strided_coupling.prediction,
        "frozen": frozen,
        "pseudo_inverse": coupling.frozen,
        "other": forecasts[-1],
        "other_best": min(forecasts, key=lambda found: found.error),
        "other_frozen": frozen_ridge(other, *other_moved),
    }
    found: Metrics = {
        "steps": [step for step, _ in drift],
        "drift": rounded([value for _, value in drift]),
        "peak": max(value for _, value in drift),
        "end": drift[-1][1],
        "closure": ops.closure.worst,
        "strided_closure": strided_closure,
        **{k: {"error": p.error, "correlation": p.correlation} for k, p in predictions.items()},
    }
    drawn = {
        "realized": rounded(moved[1].tolist()),
        "predicted": rounded(coupling.prediction.movement.tolist()),
        "frozen_predicted": rounded(frozen.movement.tolist()),
    }
    return found | (drawn if settings["drawn"] else {})


def data(kind: NetRecipe, seed: int, noise_seed: int | None) -> tuple[Examples, Tensor]:
    """Noisy targets of three inputs (or their signs), and the inputs of the query points.

    With ``noise_seed`` more noise of the same size is added to the training targets (or
    :data:`FLIPPED` labels are flipped); inputs stay.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + M, 3, generator=g, dtype=torch.float64)
    y = (2 * x[:N, :1]).sin() + NOISE * torch.randn(N, 1, generator=g, dtype=torch.float64)
    other = torch.Generator().manual_seed(seed if noise_seed is None else noise_seed)
    if kind.outputs > 1:
        labels = (y[:, 0] > 0).long()
        if noise_seed is not None:
            flipped = torch.randperm(N, generator=other)[:FLIPPED]
            labels[flipped] = 1 - labels[flipped]
        return (x[:N], labels), x[N:]
    if noise_seed is not None:
        y = y + NOISE * torch.randn(N, 1, generator=other, dtype=torch.float64)
    return (x[:N], TARGET * y), x[N:]


def train(
    kind: NetRecipe, seed: int, steps: int, *, noise_seed: int | None = None, stride: int = 1
) -> Run:
    """Record one run; initial weights, inputs and batches depend on ``seed`` only."""
    return kind.record(*data(kind, seed, noise_seed), seed=seed, steps=steps, stride=stride)


def forecast(ops: PathOperators, train_moved: Tensor, query_moved: Tensor) -> list[Prediction]:
    """Another run's query movement by the coupling of this one, for each of TOLERANCES."""
    affine, found = ops.affine, list[Prediction]()
    for tol in TOLERANCES:
        A = coupling_matrix(ops.integrals, ops.channel(tol))
        found.append(score(A @ (train_moved + affine.train) - affine.query, query_moved))
    return found


def frozen_ridge(run: Run, train_moved: Tensor, query_moved: Tensor) -> Prediction:
    """By the kernel at the start and the ridge that is best in hindsight: favours this control."""
    fits = ridge_fits(tangents(run, 0), train_moved, RIDGES)
    return min((score(fit, query_moved) for fit in fits), key=lambda found: found.error)


def _error(name: str, values: Mapping[int, float]) -> Criterion:
    return Criterion(name, geometric(values.values()), 0.5, PAPER_ERROR, at_most=True)


def _forecasts(results: Results) -> Iterator[Criterion]:
    """How well another run's movement is predicted, beside the kernel at the start."""
    for name, outputs in {"regression": 1, "cross-entropy": 2}.items():
        some = Results(d for d in results if KINDS[d.settings["case"]].outputs == outputs)
        there, best, start = (
            some.over("case", (key, "error"), mean)
            for key in ("other", "other_best", "other_frozen")
        )
        name = f"another run with other labels, {name}"
        yield _error(f"{name}: relative error, geometric mean", there)
        yield at_least(f"{name}: error with the kernel at the start minus that of the path, both "
                       "regularized in hindsight", difference(start, best), 0.0)  # fmt: skip


def judge(results: Results) -> Report:
    """Drift of 2 and more, prediction as good as the paper's, better than with a frozen kernel."""
    parted, results = results.where(kind="parts"), results.where(kind=None)
    over, error = partial(results.over, "case"), ("path", "error")
    decided = [
        at_least("kernel drift at its peak, least of the settings",
                 t_interval(over("peak", min).values()), 2.0),
        Criterion("correlation of predicted and realized test movement, least of the settings",
                  t_interval(over(("path", "correlation"), min).values()), 0.9, 0.991),
        _error("relative error of the prediction, worst of the settings", over(error, max)),
        at_least("relative error with the kernel at the start, best ridge in hindsight, minus "
                 "that of the path, mean of the settings",
                 difference(over(("frozen", "error"), mean), over(error, mean)), 0.0),
    ]  # fmt: skip
    strided = f"relative error from a record of every {STRIDE}th step, worst of the settings"
    beside = [
        _error(strided, over(("strided", "error"), max)),
        *_forecasts(results),
        *error_criteria(parted),
    ]
    table = tabulate(
        "relative error of the prediction",
        {KINDS[kind].label: runs for kind, runs in results.by("case").items()},
        {
            "own run": ("path", "error"),
            f"own run, every {STRIDE}th step": ("strided", "error"),
            "own run, kernel at the start": ("frozen", "error"),
            "other labels": ("other", "error"),
            "other labels, in hindsight": ("other_best", "error"),
            "other labels, kernel at the start": ("other_frozen", "error"),
            "kernel drift, peak": "peak",
            "kernel drift, end": "end",
            "closure error": "closure",
            f"closure error, every {STRIDE}th step": "strided_closure",
        },
        about="The predictor is made from the weights, batches and steps of the same run, without "
        "test labels and outputs. For its own run it is an identity: a small error says that the "
        "coupling is computed right, not that anything was forecast. The forecast is the run with "
        "other labels: same inputs, initial weights and batches, its own path; only its training "
        "movement is known to the predictor.",
    )
    return Report([*decided, *controls(*beside)], table, main=1)


def show(results: Results) -> list[Plot | Picture]:
    """Drift along the runs, movements, and errors against drift."""
    results = results.where(kind=None)
    kinds = results.by("case")
    last = max(len(kinds) - 1, 1)
    drifts = [
        metric_line(KINDS[kind].label, kinds[kind], "steps", "drift", f"module-{1 + i * 6 // last}")
        for i, kind in enumerate(kinds)
    ]
    realized, path, frozen = (
        [v for row in results.all(key) for v in row]
        for key in ("realized", "predicted", "frozen_predicted")
    )
    peaks = results.all("peak")
    start, first = (results.all((key, "error")) for key in ("other_frozen", "other_best"))
    return [
        Plot("Kernel drift", "step", "‖K - K₀‖ / ‖K₀‖", drifts,
             "Spectral norms, mean over seeds with 95% intervals. In the paper it peaks near 4.8."),
        Plot("Movement of the test outputs", "realized", "predicted",
             [points("kernel at the start, best ridge", realized, frozen, "adamw"),
              points("along the path", realized, path, "poprisk")],
             "All settings, first seed; on the diagonal the prediction is exact."),
        Plot("Forecast of a run with other labels", "kernel drift at its peak", "relative error",
             [points("kernel at the start", peaks, start, "adamw"),
              points("along the path of the first run", peaks, first, "poprisk")],
             "One point a run; both predictors are regularized in hindsight, by the movement that "
             "they predict. Below 1 is better than to predict no movement.", log_y=True),
    ]  # fmt: skip
