r"""Implicit bias: the order in which directions are learned, and the minimum-norm interpolant.

The residual along an eigenvector v of W is :math:`v^\top g_t`; its half-time is the first step at
which half of it is gone. From 0, the linear model's limit is the interpolant of least norm,
:math:`X^\dagger y`; from :math:`w_0` it is the nearest one, :math:`w_0 + X^\dagger(y - X w_0)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from poprisk.intervals import Interval, t_interval
from poprisk.path import Run
from poprisk.path.channel import Spectrum
from poprisk_lab.plots import Line, Picture, Plot, points, tabulate
from poprisk_lab.studies.claim import (
    Claim,
    Done,
    Findings,
    Found,
    Trial,
    Workspace,
    figure,
    over_seeds,
    where,
)
from poprisk_lab.studies.criteria import at_least, at_most, controls, point, rank_correlation
from poprisk_lab.studies.descent import (
    Data,
    descent,
    linear,
    operators,
    predicted,
    recorded,
    residual,
    short,
    shorts,
    stable_rate,
    two_layer,
    until_fitted,
)

LINEAR, NETWORK = "linear", "network"
MODELS = (LINEAR, NETWORK)
DESCENT, MOMENTUM, MINIBATCH = "gradient descent", "momentum", "minibatches"
ELSEWHERE, ADAM = "another start", "Adam"
METHODS = (DESCENT, MOMENTUM, MINIBATCH, ELSEWHERE, ADAM)
FROM_ZERO = (DESCENT, MOMENTUM, MINIBATCH)
ROUND_OFF = 1e-8
EXAMPLES, QUERIES = 30, 60
STEPS, ADAM_STEPS = 400, 600
NOISE_STD = 0.3
NORM_EXAMPLES, NORM_INPUTS, BATCH = 20, 60, 5
WEAKEST = 0.01
"""A direction counts if it holds this share of the mean squared output gradient at the start."""
POINTS = 40
SHOWN = (0, 2, 5, 10, 20)


def trials(quick: bool) -> list[Trial]:
    """The order of learning of two models, and the interpolants of every method."""
    seeds, steps, adam = (2, 100, 200) if quick else (6, STEPS, ADAM_STEPS)
    order = [
        Trial(f"order-{model}-{s}", {"part": "order", "model": model, "steps": steps, "seed": s})
        for model in MODELS
        for s in range(seeds)
    ]
    norm = [
        Trial(
            f"norm-{method.replace(' ', '-')}-{s}",
            {"part": "norm", "method": method, "adam": adam, "seed": s},
        )
        for method in METHODS
        for s in range(seeds)
    ]
    return [*order, *norm]


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One model's order of learning, or one method's interpolant."""
    if settings["part"] == "order":
        return _order(settings["model"], settings["seed"], settings["steps"])
    return _norm(settings["method"], settings["seed"], settings["adam"])


def make(model: str, seed: int) -> tuple[Data, Tensor, nn.Module]:
    """Data with noisy training targets, and the model at its start."""
    generator = torch.Generator().manual_seed(5_000 + seed)
    d = 60 if model == LINEAR else 8
    x = torch.randn(EXAMPLES + QUERIES, d, generator=generator, dtype=torch.float64)
    b = torch.randn(d, 1, generator=generator, dtype=torch.float64)
    if model == LINEAR:
        x /= torch.arange(1, d + 1).double().sqrt()  # variances 1, 1/2, 1/3, ...
        clean, start = x @ b, linear(d)
    else:
        clean = 1.5 * torch.tanh(x @ b / d**0.5) + x[:, :1] * x[:, 1:2] / 2
        start = two_layer(d, 24, (0.2, 0.2), seed)
    data = Data.split(x, clean, EXAMPLES)
    noise = torch.randn(data.clean.shape, generator=generator, dtype=torch.float64)
    return data, data.clean + NOISE_STD * noise, start


def _order(kind: str, seed: int, steps: int) -> Found:
    """When each direction of W was learned, and of three other sets of directions."""
    data, y, model = make(kind, seed)
    fraction = 1.0 if kind == LINEAR else 0.3
    whole = operators(recorded(model, descent(model, data.x, fraction), data, y, limit=steps))
    again = make(kind, seed)[2]
    optimizer = descent(again, data.x, fraction)
    early = operators(recorded(again, optimizer, data, y, limit=steps // 10))
    gradients = output_gradients(whole.run)
    kernel = whole.integrals.snapshots[0].kernel
    generator = torch.Generator().manual_seed(6_000 + seed)
    mixed = torch.linalg.qr(torch.randn(EXAMPLES, EXAMPLES, generator=generator).double()).Q
    sets = {
        "W": whole.spectrum,
        "early W": early.spectrum,
        "first kernel": Spectrum.of(kernel),
        "random": Spectrum((mixed * (whole.W @ mixed)).sum(0), mixed),
    }
    halves = {name: half_times(gradients, s.directions) for name, s in sets.items()}
    strong = {name: strong_directions(gradients[0], s.directions) for name, s in sets.items()}
    along = (gradients @ whole.spectrum.directions).abs()
    moments = torch.linspace(0, len(gradients) - 1, POINTS).long().unique()
    return {
        "correlation": {
            name: short(
                rank_correlation(
                    (-s.eigenvalues[strong[name]]).tolist(), halves[name][strong[name]].tolist()
                )
            )
            for name, s in sets.items()
        },
        "directions": {name: int(kept.sum()) for name, kept in strong.items()},
        "half_times": halves["W"][strong["W"]].tolist(),
        "never": int((halves["W"][strong["W"]] == len(gradients)).sum()),
        "moments": moments.tolist(),
        "decay": [shorts(along[moments, i] / along[0, i]) for i in SHOWN],
        "eigenvalues": shorts(whole.spectrum.eigenvalues),
        "drift": short(max(value for _, value in whole.kernel_drift())),
        "residual": short(residual(model, data.x, y) / float(y.norm())),
        "closure": short(max(whole.closure)),
    }


def output_gradients(run: Run) -> Tensor:
    """Realized output gradients before each step and at the end, (K+1, N)."""
    problem = run.problem.to(torch.float64)
    rows = []
    with torch.no_grad():
        for k in range(len(run) + 1):
            u = problem.outputs(run.weights[k].double(), problem.train[0])
            rows.append(problem.output_gradient(u).flatten())
    return torch.stack(rows)


def half_times(gradients: Tensor, directions: Tensor) -> Tensor:
    r"""First step at which :math:`|v^T g_t| \le |v^T g_0|/2`, (r,); K+1 where there is none.

    Args:
        gradients: (K+1, N).
        directions: (N, r), one in each column.

    Example:
        >>> half_times(torch.tensor([[4.0, 1.0], [2.0, 1.0]]), torch.eye(2)).tolist()
        [1, 2]
    """
    along = (gradients @ directions).abs()
    gone = along <= along[0] / 2
    first = gone.int().argmax(0)
    return torch.where(gone.any(0), first, len(gradients))


def strong_directions(g: Tensor, directions: Tensor) -> Tensor:
    """Which directions hold at least :data:`WEAKEST` of the mean square of g, (r,)."""
    along = (directions.T @ g).square()
    return along >= WEAKEST * along.mean()


def _norm(method: str, seed: int, adam_steps: int) -> Found:
    """Where a method ends on a linear problem with many interpolants."""
    generator = torch.Generator().manual_seed(7_000 + seed)
    shape = (NORM_EXAMPLES + QUERIES, NORM_INPUTS)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    b = torch.randn(NORM_INPUTS, 1, generator=generator, dtype=torch.float64)
    data = Data.split(x, x @ b / NORM_INPUTS**0.5, NORM_EXAMPLES)
    noise = torch.randn(data.clean.shape, generator=generator, dtype=torch.float64)
    y, model = data.clean + NOISE_STD * noise, nn.Linear(NORM_INPUTS, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, NORM_INPUTS, generator=generator).double() / 4)
        model.weight.mul_(float(method == ELSEWHERE))
    w0 = model.weight.detach().clone().T
    if method in (DESCENT, ADAM):
        return _recorded_norm(method, model, data, y, adam_steps)
    optimizer = method_of(method, model, data.x)
    for batch in batches_of(method, model, data.x, y, generator):
        optimizer.zero_grad()
        (model(data.x[batch]) - y[batch]).square().mean().div(2).backward()
        optimizer.step()
    return interpolant(model, data.x, y, w0)


def _recorded_norm(method: str, model: nn.Linear, data: Data, y: Tensor, adam_steps: int) -> Found:
    """With the operators: what they predict, and what the frozen kernel does."""
    w0, limit = model.weight.detach().clone().T, adam_steps if method == ADAM else 2_000
    below = 1e-6 if method == ADAM else 1e-13
    optimizer = method_of(method, model, data.x)
    ops = operators(recorded(model, optimizer, data, y, below=below, limit=limit))
    K = ops.integrals.frozen
    answer = (K @ y).flatten()
    found = predicted(model, data.query).flatten()
    A = ops.coupling().matrix
    return {
        **interpolant(model, data.x, y, w0),
        "closure": short(max(ops.closure[:2])),
        "frozen": short(float((found - answer).norm() / answer.norm())),
        "coupling": short(float((A - K).norm() / K.norm())),
    }


def method_of(method: str, model: nn.Linear, x: Tensor) -> Optimizer:
    """The optimizer of a method."""
    if method == ADAM:
        return Adam(model.parameters(), lr=0.02)
    if method == MINIBATCH:
        return SGD(model.parameters(), lr=stable_rate(model, x, 0.3))
    return descent(model, x, 1.0, 0.5 if method == MOMENTUM else 0.0)


def batches_of(
    method: str, model: nn.Linear, x: Tensor, y: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """All examples at once, or minibatches drawn anew, until the residual is round-off."""
    for batch in until_fitted(model, x, y, below=1e-13, limit=5_000):
        small = torch.randperm(len(x), generator=generator)[:BATCH]
        yield small if method == MINIBATCH else batch


def interpolant(model: nn.Linear, x: Tensor, y: Tensor, w0: Tensor) -> Found:
    """How far the weights are from the interpolant of least norm, and from the nearest to w0."""
    w, least = model.weight.detach().T, torch.linalg.pinv(x) @ y
    nearest = w0 + torch.linalg.pinv(x) @ (y - x @ w0)
    moved, rows = w - w0, torch.linalg.svd(x, full_matrices=False).Vh
    outside = moved - rows.T @ (rows @ moved)
    return {
        "least": float((w - least).norm() / least.norm()),
        "nearest": float((w - nearest).norm() / nearest.norm()),
        "outside": float(outside.norm() / moved.norm()),
        "norm": float(w.norm() / least.norm()),
        "residual": residual(model, x, y) / float(y.norm()),
    }


def order(done: Sequence[Done], model: str, directions: str = "W") -> Interval:
    """Rank correlation of eigenvalue and half-time."""
    trials = where(done, part="order", model=model)
    return t_interval([d.found["correlation"][directions] for d in trials])


def worst(done: Sequence[Done], key: str, methods: Sequence[str]) -> Interval:
    """The largest figure of any run with these methods."""
    return point(max(d.found[key] for m in methods for d in where(done, part="norm", method=m)))


def least(done: Sequence[Done], method: str) -> Interval:
    """Distance to the interpolant of least norm."""
    return over_seeds(done, "least", part="norm", method=method)


def judge(done: Sequence[Done]) -> Findings:
    """The bounds were fixed before the full run."""
    decided = [
        at_least("rank correlation of eigenvalue and half-time (linear)", order(done, LINEAR), 0.9),
        at_least("rank correlation of eigenvalue and half-time (network)",
                 order(done, NETWORK), 0.7),
        at_most("from 0: distance to the interpolant of least norm",
                worst(done, "least", FROM_ZERO), ROUND_OFF),
        at_most("from another start: distance to the nearest interpolant",
                worst(done, "nearest", (ELSEWHERE,)), ROUND_OFF),
        at_most("from 0: query outputs against the frozen kernel's",
                worst(done, "frozen", (DESCENT,)), ROUND_OFF),
    ]  # fmt: skip
    closure = max(d.found["closure"] for d in done if "closure" in d.found)
    beside = [
        at_least("Adam: distance to the interpolant of least norm", least(done, ADAM), 0.1),
        at_least("from another start: distance to that of least norm",
                 least(done, ELSEWHERE), 0.1),
        at_least("rank correlation by early W (network)", order(done, NETWORK, "early W"), 0.5),
        at_most("rank correlation along random directions (network)",
                order(done, NETWORK, "random"), 0.5),
        at_most("worst closure error of any run", point(closure), 1e-2),
    ]  # fmt: skip
    groups = {f"order, {model}": where(done, part="order", model=model) for model in MODELS}
    groups |= {f"interpolant, {m}": where(done, part="norm", method=m) for m in METHODS}
    sets = where(done, part="order")[0].found["correlation"]
    table = tabulate(
        "part",
        groups,
        {f"rank correlation by {name}": figure("correlation", name) for name in sets}
        | {name: figure(key) for name, key in FIGURES.items()},
        about="W of the whole run explains the order and does not predict it: for squared error an "
        "eigenvalue of W says how much of its direction was gone by the end. W of the first tenth "
        "(early W) is a prediction.",
    )
    return Findings([*decided, *controls(*beside)], table)


FIGURES = {
    "directions never half learned": "never",
    "kernel drift": "drift",
    "relative residual": "residual",
    "distance to the interpolant of least norm": "least",
    "distance to the nearest interpolant": "nearest",
    "displacement outside the span of the inputs": "outside",
    "norm over the least": "norm",
    "coupling against the frozen kernel's": "coupling",
    "closure error": "closure",
}


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Half-times over the rank of the eigenvalue, residuals over time, distances."""
    return [_half_times(done), *(_decay(done, model) for model in MODELS), _distances(done)]


def _half_times(done: Sequence[Done]) -> Plot:
    lines = []
    for model, colour in zip(MODELS, ("poprisk", "adamw"), strict=True):
        halves = [d.found["half_times"] for d in where(done, part="order", model=model)]
        x = [i + 1 for times in halves for i in range(len(times))]
        lines.append(points(model, x, [max(t, 0.5) for times in halves for t in times], colour))
    return Plot(
        "When half of a direction's residual is gone", "rank of W's eigenvalue", "step", lines,
        "A point for each direction with something to learn, of all data sets. The uppermost are "
        "those that were not half learned by the end.",
        log_y=True,
    )  # fmt: skip


def _decay(done: Sequence[Done], model: str) -> Plot:
    trial = where(done, part="order", model=model)[0].found
    lines = [
        Line(f"direction {i + 1}", trial["moments"], [max(v, 1e-12) for v in values],
             f"module-{colour}")
        for colour, (i, values) in enumerate(zip(SHOWN, trial["decay"], strict=True), start=1)
    ]  # fmt: skip
    return Plot(
        f"Residual along directions of W: {model}, first data set", "step", "relative residual",
        lines,
        "Directions by the rank of their eigenvalue of W. A residual that was small at the start "
        "can grow, where others leak into it.",
        log_y=True,
    )  # fmt: skip


def _distances(done: Sequence[Done]) -> Plot:
    places = {method: i for i, method in enumerate(METHODS, start=1)}
    norms = where(done, part="norm")
    x = [places[d.settings["method"]] for d in norms]
    lines = [
        points(f"distance to the {name}", x, [max(d.found[key], 1e-17) for d in norms], colour)
        for key, name, colour in (
            ("least", "interpolant of least norm", "poprisk"),
            ("nearest", "interpolant nearest to the start", "adamw"),
        )
    ]
    methods = ", ".join(f"{i} {method}" for method, i in places.items())
    return Plot(
        "Where a linear model ends", "method", "relative distance", lines,
        f"{methods}. A point for each data set. From 0 both interpolants are the same one.",
        log_y=True,
    )  # fmt: skip


CLAIM = Claim(
    name="implicit-bias",
    title="Implicit bias",
    statement=(
        "Directions are learned in the order of the eigenvalues of W, also while the kernel "
        "changes; a linear model ends at the interpolant of least norm."
    ),
    source="Fig. 1, §3",
    paper="",
    published=["The paper's settings for this claim are not known."],
    ours=[
        f"Order: n = {EXAMPLES}, targets with noise of variance {NOISE_STD**2:g}, {STEPS} steps of "
        "full-batch gradient descent without momentum; a linear model of 60 inputs with variances "
        "1, 1/2, 1/3, ..., and a tanh network of 8 inputs and width 24 from a small start.",
        f"Only directions that hold at least {WEAKEST:.0%} of the mean squared output gradient at "
        "the start count; in the others there is next to nothing to be learned.",
        f"Interpolants: n = {NORM_EXAMPLES}, {NORM_INPUTS} inputs, trained until the residual is "
        "1e-13 of that at the start (Adam at 0.02: 1e-6, or "
        f"{ADAM_STEPS} steps).",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
