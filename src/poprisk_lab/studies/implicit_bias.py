r"""Implicit bias: the order in which directions are learned, and the minimum-norm interpolant.

The residual along an eigenvector v of W is :math:`v^\top g_t`; its half-time is the first step at
which half of it is gone. From 0, the linear model's limit is the interpolant of least norm,
:math:`X^\dagger y`; from :math:`w_0` it is the nearest one, :math:`w_0 + X^\dagger(y - X w_0)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from poprisk.path.channel import Spectrum
from poprisk.path.operators import PathOperators
from poprisk_lab.plots import Line, Plot, points, rounded, short, tabulate
from poprisk_lab.studies import descent
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import at_least, at_most, controls
from poprisk_lab.studies.descent import CleanSplit, interpolant_distances
from poprisk_lab.studies.directions import learning_order, output_gradients

LINEAR, NETWORK = MODELS = ("linear", "network")
METHODS = ("gradient descent", "momentum", "minibatches", "another start", "Adam")
DESCENT, MOMENTUM, MINIBATCH, ELSEWHERE, ADAM = METHODS
ROUND_OFF, NOISE_STD = 1e-8, 0.3
EXAMPLES, QUERIES, STEPS, ADAM_STEPS = 30, 60, 400, 600
NORM_EXAMPLES, NORM_INPUTS, BATCH = 20, 60, 5
POINTS, SHOWN = 40, (0, 2, 5, 10, 20)
SETS = ("W", "early W", "first kernel", "random")


def trials(quick: bool) -> list[Trial]:
    """The order of learning of two models, and the interpolants of every method."""
    seeds, steps, adam = (2, 100, 200) if quick else (6, STEPS, ADAM_STEPS)
    parts = [("order", m, {"part": "order", "model": m, "steps": steps}) for m in MODELS]
    parts += [("norm", m, {"part": "norm", "method": m, "adam": adam}) for m in METHODS]
    return [
        Trial(f"{part}-{name.replace(' ', '-')}-{seed}", {**settings, "seed": seed})
        for part, name, settings in parts
        for seed in range(seeds)
    ]


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One model's order of learning, or one method's interpolant."""
    if settings["part"] == "order":
        return _order(settings["model"], settings["seed"], settings["steps"])
    return _norm(settings["method"], settings["seed"], settings["adam"])


def make(model: str, seed: int) -> tuple[CleanSplit, Tensor, nn.Module]:
    """Data with noisy training targets, and the model at its start."""
    generator = torch.Generator().manual_seed(5_000 + seed)
    d = 60 if model == LINEAR else 8
    x = torch.randn(EXAMPLES + QUERIES, d, generator=generator, dtype=torch.float64)
    b = torch.randn(d, 1, generator=generator, dtype=torch.float64)
    if model == LINEAR:
        x /= torch.arange(1, d + 1).double().sqrt()  # variances 1, 1/2, 1/3, ...
        clean, start = x @ b, descent.linear(d)
    else:
        clean = 1.5 * torch.tanh(x @ b / d**0.5) + x[:, :1] * x[:, 1:2] / 2
        start = descent.two_layer(d, 24, (0.2, 0.2), seed)
    data = CleanSplit.split(x, clean, EXAMPLES)
    return data, data.noisy(NOISE_STD, generator), start


def _order(kind: str, seed: int, steps: int) -> Metrics:
    """When each direction of W was learned, and of three other sets of directions."""
    data, y, model = make(kind, seed)
    fraction = 1.0 if kind == LINEAR else 0.3

    def follow(net: nn.Module, limit: int) -> PathOperators:
        return descent.follow(net, descent.descent(net, data.x, fraction), data, y, limit=limit)

    whole, early = follow(model, steps), follow(make(kind, seed)[2], steps // 10)
    gradients = output_gradients(whole.run)
    generator = torch.Generator().manual_seed(6_000 + seed)
    mixed = torch.linalg.qr(torch.randn(EXAMPLES, EXAMPLES, generator=generator).double()).Q
    sets = {
        "W": whole.spectrum,
        "early W": early.spectrum,
        "first kernel": Spectrum.of(whole.integrals.snapshots[0].kernel),
        "random": Spectrum((mixed * (whole.W @ mixed)).sum(0), mixed),
    }
    found = {name: learning_order(gradients, spectrum) for name, spectrum in sets.items()}
    halves = found["W"].half_times
    along = (gradients @ whole.spectrum.directions).abs()
    moments = torch.linspace(0, len(gradients) - 1, POINTS).long().unique()
    return {
        "correlation": {name: short(order.correlation) for name, order in found.items()},
        "directions": {name: len(order.half_times) for name, order in found.items()},
        "half_times": halves.tolist(),
        "never": int((halves == len(gradients)).sum()),
        "moments": moments.tolist(),
        "decay": [rounded((along[moments, i] / along[0, i]).tolist()) for i in SHOWN],
        "eigenvalues": rounded(whole.spectrum.eigenvalues.tolist()),
        "drift": short(max(value for _, value in whole.kernel_drift())),
        "residual": short(descent.residual(model, data.x, y) / float(y.norm())),
        "closure": short(max(whole.closure)),
    }


def _norm(method: str, seed: int, adam_steps: int) -> Metrics:
    """Where a method ends on a linear problem with many interpolants."""
    generator = torch.Generator().manual_seed(7_000 + seed)
    shape = (NORM_EXAMPLES + QUERIES, NORM_INPUTS)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    b = torch.randn(NORM_INPUTS, 1, generator=generator, dtype=torch.float64)
    data = CleanSplit.split(x, x @ b / NORM_INPUTS**0.5, NORM_EXAMPLES)
    y = data.noisy(NOISE_STD, generator)
    model = nn.Linear(NORM_INPUTS, 1, bias=False).double()
    start = torch.randn(1, NORM_INPUTS, generator=generator).double() / 4
    model.load_state_dict({"weight": start * float(method == ELSEWHERE)})
    w0, fraction = model.weight.detach().clone().T, 0.3 if method == MINIBATCH else 1.0
    momentum, found = 0.5 if method == MOMENTUM else 0.0, dict[str, float]()
    optimizer: Optimizer = descent.descent(model, data.x, fraction, momentum)
    if method == ADAM:
        optimizer = Adam(model.parameters(), lr=0.02)
    if method in (DESCENT, ADAM):
        below, limit = (1e-6, adam_steps) if method == ADAM else (1e-13, 2_000)
        ops = descent.follow(model, optimizer, data, y, below=below, limit=limit)
        K, A = ops.integrals.frozen, ops.coupling().matrix
        answer, outputs = (K @ y).flatten(), descent.predicted(model, data.query).flatten()
        found = {
            "closure": short(max(ops.closure[:2])),
            "frozen": short(float((outputs - answer).norm() / answer.norm())),
            "coupling": short(float((A - K).norm() / K.norm())),
        }
    else:
        descent.train(model, optimizer, (data.x, y), below=1e-13, limit=5_000,
                      minibatch=BATCH * (method == MINIBATCH), generator=generator)  # fmt: skip
    return {**interpolant_distances(model, data.x, y, w0), **found}


def judge(results: Results) -> Report:
    """The bounds were fixed before the full run."""
    models = {m: results.where(part="order", model=m) for m in MODELS}
    methods = {m: results.where(part="norm", method=m) for m in METHODS}
    from_zero = Results(d for m in METHODS[:3] for d in methods[m])
    order, least = "rank correlation of eigenvalue and half-time", "interpolant of least norm"
    decided = [
        at_least(f"{order} (linear)", models[LINEAR].mean(("correlation", "W")), 0.9),
        at_least(f"{order} (network)", models[NETWORK].mean(("correlation", "W")), 0.7),
        at_most(f"from 0: distance to the {least}", from_zero.largest("least"), ROUND_OFF),
        at_most("from another start: distance to the nearest interpolant",
                methods[ELSEWHERE].largest("nearest"), ROUND_OFF),
        at_most("from 0: query outputs against the frozen kernel's",
                methods[DESCENT].largest("frozen"), ROUND_OFF),
    ]  # fmt: skip
    beside = [
        at_least(f"Adam: distance to the {least}", methods[ADAM].mean("least"), 0.1),
        at_least("from another start: distance to that of least norm",
                 methods[ELSEWHERE].mean("least"), 0.1),
        at_least("rank correlation by early W (network)",
                 models[NETWORK].mean(("correlation", "early W")), 0.5),
        at_most("rank correlation along random directions (network)",
                models[NETWORK].mean(("correlation", "random")), 0.5),
        at_most("worst closure error of any run", results.largest("closure"), 1e-2),
    ]  # fmt: skip
    table = tabulate(
        "part",
        {f"order, {m}": some for m, some in models.items()}
        | {f"interpolant, {m}": some for m, some in methods.items()},
        {f"rank correlation by {name}": ("correlation", name) for name in SETS}
        | {
            "directions never half learned": "never",
            "kernel drift": "drift",
            "relative residual": "residual",
            f"distance to the {least}": "least",
            "distance to the nearest interpolant": "nearest",
            "displacement outside the span of the inputs": "outside",
            "norm over the least": "norm",
            "coupling against the frozen kernel's": "coupling",
            "closure error": "closure",
        },
        about="W of the whole run explains the order and does not predict it: for squared error an "
        "eigenvalue of W says how much of its direction was gone by the end. W of the first tenth "
        "(early W) is a prediction.",
    )
    return Report([*decided, *controls(*beside)], table)


def show(results: Results) -> Plots:
    """Half-times over the rank of the eigenvalue, residuals over time, distances."""
    models = {m: results.where(part="order", model=m) for m in MODELS}
    return [
        _half_times(models),
        *(_decay(m, some[0].metrics) for m, some in models.items()),
        _distances(results.where(part="norm")),
    ]


def _half_times(models: dict[str, Results]) -> Plot:
    lines = []
    for (model, some), colour in zip(models.items(), ("poprisk", "adamw"), strict=True):
        halves = some.all("half_times")
        ranks = [rank for times in halves for rank in range(1, len(times) + 1)]
        lines.append(points(model, ranks, [max(t, 0.5) for times in halves for t in times], colour))
    return Plot("When half of a direction's residual is gone", "rank of W's eigenvalue", "step",
                lines, "A point for each direction with something to learn, of all data sets. The "
                "uppermost are those that were not half learned by the end.",
                log_y=True)  # fmt: skip


def _decay(model: str, found: Metrics) -> Plot:
    lines = [
        Line(f"direction {i + 1}", found["moments"], [max(v, 1e-12) for v in row], f"module-{n}")
        for n, (i, row) in enumerate(zip(SHOWN, found["decay"], strict=True), start=1)
    ]
    return Plot(f"Residual along directions of W: {model}, first data set", "step",
                "relative residual", lines, "Directions by the rank of their eigenvalue of W. A "
                "residual that was small at the start can grow, where others leak into it.",
                log_y=True)  # fmt: skip


def _distances(norms: Results) -> Plot:
    x = [METHODS.index(d.settings["method"]) + 1 for d in norms]
    names = {"least": "interpolant of least norm", "nearest": "interpolant nearest to the start"}
    lines = [
        points(f"distance to the {name}", x, [max(v, 1e-17) for v in norms.all(key)], colour)
        for (key, name), colour in zip(names.items(), ("poprisk", "adamw"), strict=True)
    ]
    methods = ", ".join(f"{i} {method}" for i, method in enumerate(METHODS, 1))
    text = f"{methods}. A point for each data set. From 0 both interpolants are the same one."
    return Plot("Where a linear model ends", "method", "relative distance", lines, text, log_y=True)
