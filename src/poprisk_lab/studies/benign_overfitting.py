r"""Benign overfitting: what label noise that is fitted to the end does to a query.

Isotropic label noise of variance σ² adds :math:`\sigma^2\|G\|_F^2/(n^2 m)` to the test error, in
the linear case at interpolation :math:`\sigma^2\sum_j \|J_Q v_j\|^2/\sigma_j^2/m` (SVD of
:math:`J_S`). [LG, Cor. H.4, Fig. 1]. Measured on label noise drawn anew, against a network
trained on clean labels from the same start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poprisk.intervals import Interval, t_interval
from poprisk.path import split_gradient
from poprisk.path.channel import Channel, Spectrum
from poprisk.path.operators import PathOperators
from poprisk_lab.plots import Line, Picture, Plot, Table, points, tabulate
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
from poprisk_lab.studies.criteria import at_least, at_most, controls, point, ratio
from poprisk_lab.studies.descent import (
    Data,
    descent,
    linear,
    mean_square,
    operators,
    predicted,
    recorded,
    short,
    shorts,
    train,
    two_layer,
)
from poprisk_lab.tasks.interpolation import long_tail

LINEAR = ("linear, long tail", "linear, isotropic")
NETWORKS = ("network, long tail", "network, isotropic")
LOGISTIC = "logistic, long tail"
BENIGN = (LINEAR[0], NETWORKS[0], LOGISTIC)
COLOURS = {
    LINEAR[0]: "poprisk",
    LINEAR[1]: "adamw",
    NETWORKS[0]: "shuffled",
    NETWORKS[1]: "paper",
    LOGISTIC: "peer",
}
SOFT = "0.01"


NOISE = 0.5
FLIPPED = 0.2
EXAMPLES = 30
QUERIES = 100
PAIRS = 200
"""Of noise for a linear model, which is trained on all of them at once."""
TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6)


class Setting(NamedTuple):
    """A problem and how it is trained.

    Attributes:
        tail: weak directions of the inputs; 0: isotropic inputs.
        inputs: dimension of isotropic inputs.
        width: of a tanh network; 0: a linear model.
        below: relative residual at which training ends: interpolation.
        momentum: of gradient descent.
        fraction: of the :func:`poprisk_lab.studies.descent.stable_rate`.
        limit: of steps.
    """

    tail: int
    inputs: int
    width: int
    below: float
    momentum: float
    fraction: float
    limit: int = 4_000


SETTINGS = {
    "linear, long tail": Setting(600, 0, 0, 1e-5, 0.9, 1.0),
    "linear, isotropic": Setting(0, 33, 0, 1e-5, 0.97, 1.0),
    "network, long tail": Setting(400, 0, 8, 1e-2, 0.9, 0.5),
    "network, isotropic": Setting(0, 5, 16, 1e-2, 0.95, 0.5),
    "logistic, long tail": Setting(600, 0, 0, 0.0, 0.9, 1.0, 150),
}
SCALES = {True: (0.2, 0.2), False: (0.5, 0.2)}
"""Scales of the network's start, for a long tail and for isotropic inputs."""


def trials(quick: bool) -> list[Trial]:
    """Every setting on every seed."""
    seeds, network = (2, 2) if quick else (6, 8)
    found = list[Trial]()
    for name, setting in SETTINGS.items():
        given = {
            "setting": name,
            "pairs": network if setting.width else PAIRS,
            "below": max(setting.below, 1e-2) if quick else setting.below,
        }
        short_name = name.replace(", ", "-").replace(" ", "-")
        found += [Trial(f"{short_name}-{s}", {**given, "seed": s}) for s in range(seeds)]
    return found


def make(setting: Setting, seed: int, *, classes: bool) -> tuple[Data, Callable[[], nn.Module]]:
    """Data of the setting, and the model at its start."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    total = EXAMPLES + QUERIES
    if setting.tail:
        x = long_tail(total, setting.tail, generator)
    else:
        x = torch.randn(total, setting.inputs, generator=generator, dtype=torch.float64)
    clean = x[:, :1] - x[:, 1:2]
    if classes:
        clean = (clean > 0).double()
    elif setting.width:
        clean = 1.5 * torch.tanh(clean)
    width, inputs = setting.width, x.shape[1]
    scales = SCALES[bool(setting.tail)]
    model = (lambda: two_layer(inputs, width, scales, seed)) if width else (lambda: linear(inputs))
    return Data.split(x, clean, EXAMPLES), model


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One setting on one seed."""
    name, seed = settings["setting"], settings["seed"]
    setting = SETTINGS[name]._replace(below=settings["below"])
    generator = torch.Generator().manual_seed(2_000 + seed)
    if name.startswith("logistic"):
        return _classes(setting, seed, generator)
    return _regression(setting, seed, settings["pairs"], generator)


def _regression(setting: Setting, seed: int, pairs: int, generator: torch.Generator) -> Found:
    """Predicted and measured excess test error of fitting label noise."""
    data, make_model = make(setting, seed, classes=False)
    size = {"below": setting.below, "limit": setting.limit}
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    calm = operators(recorded(model, optimizer, data, data.clean, **size))
    base = predicted(model, data.query)
    noises = NOISE * torch.randn(EXAMPLES, pairs, generator=generator, dtype=torch.float64)
    noises = torch.cat([noises, -noises], 1)  # in pairs, so that what is odd in the noise cancels
    outputs = _redrawn(setting, data, make_model, noises)
    errors = (outputs - data.target).square().mean(0)
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    noisy = operators(recorded(model, optimizer, data, data.clean + noises[:, :1], **size))
    return {
        "noise": NOISE**2,
        "excess": short(float(errors.mean()) - mean_square(base - data.target)),
        "clean_error": short(mean_square(base - data.target)),
        "predicted": short(NOISE**2 * calm.noise_gain().path),
        "frozen": short(NOISE**2 * calm.noise_gain().frozen),
        "clean_closure": short(max(calm.closure)),
        "clean_steps": len(calm.run),
        "draw": short(mean_square(outputs[:, :1] - base)),
        **_one_run(noisy, data.clean),
    }


def _redrawn(
    setting: Setting, data: Data, make_model: Callable[[], nn.Module], noises: Tensor
) -> Tensor:
    """Query outputs (m, k) after training on clean targets plus each of the noises (n, k)."""
    if not setting.width:  # outputs of a linear model do not know of each other: all at once
        models, targets = [linear(data.x.shape[1], noises.shape[1])], [data.clean + noises]
    else:
        models = [make_model() for _ in range(noises.shape[1])]
        targets = [data.clean + e for e in noises.split(1, dim=1)]
    first = make_model()
    for model, y in zip(models, targets, strict=True):
        optimizer = descent(first, data.x, setting.fraction, setting.momentum, of=model)
        train(model, optimizer, (data.x, y), below=setting.below, limit=setting.limit)
    return torch.cat([predicted(model, data.query) for model in models], 1)


def _classes(setting: Setting, seed: int, generator: torch.Generator) -> Found:
    """Logistic regression until wrong labels are fitted too."""
    data, make_model = make(setting, seed, classes=True)
    wrong = torch.rand(data.clean.shape, generator=generator) < FLIPPED
    y = torch.where(wrong, 1 - data.clean, data.clean)
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    loss = "binary_cross_entropy"
    done = operators(recorded(model, optimizer, data, y, limit=setting.limit, loss=loss))
    right = (predicted(model, data.query) > 0) == (data.target > 0.5)
    fitted = (predicted(model, data.x) > 0) == (y > 0.5)
    return {
        "fitted": short(float(fitted.double().mean())),
        "accuracy": short(float(right.double().mean())),
        **_one_run(done, data.clean),
    }


def _one_run(ops: PathOperators, clean: Tensor) -> Found:
    """What the operators of a run on noisy labels say."""
    cells = ops.four_cells(clean)
    u, target = ops.integrals.snapshots[0].train_outputs, ops.run.problem.train[1].flatten()
    last = ops.integrals.snapshots[-1].train_outputs
    noise = split_gradient(ops.run, clean, ops.run.weights[0])[1].flatten()
    assert cells.error is not None  # the queries have targets
    eigenvalues = ops.spectrum.eigenvalues
    gains = Spectrum.of(ops.G.T @ ops.G)
    return {
        "steps": len(ops.run),
        "residual": short(float((last - target).norm() / (u - target).norm())),
        "closure": short(max(ops.closure)),
        "drift": short(max(value for _, value in ops.kernel_drift())),
        "harmful": short(mean_square(cells.cells.harmful_noise)),
        "terms": {k: short(v) for k, v in cells.error.terms.items()},
        "reservoir": {f"{t:g}": _outside(ops.channel(t), noise) for t in TOLERANCES},
        "unseen": {f"{t:g}": _outside(gains.channel(t), noise) for t in TOLERANCES},
        "dissipation": shorts(eigenvalues / eigenvalues[0]),
        "gains": shorts(gains.eigenvalues / gains.eigenvalues[0]),
    }


def _outside(channel: Channel, g: Tensor) -> float:
    """Share of the squared norm that lies outside a channel, to six digits."""
    return abs(round(1 - channel.share(g), 6))


def factor(done: Sequence[Done], a: str, b: str, settings: Sequence[str]) -> Interval:
    r"""By which factor two positive figures differ, in the setting where they differ most.

    The interval is of the geometric mean over seeds of :math:`e^{|\log(a/b)|} \ge 1`.
    """
    found = []
    for name in settings:
        logs = [math.log(_apart(d.found[a], d.found[b])) for d in where(done, setting=name)]
        found.append(t_interval(logs).mapped(math.exp))
    return max(found, key=lambda interval: interval.mean)


def mean_ratio(done: Sequence[Done], a: str, b: str, settings: Sequence[str]) -> Interval:
    """By which factor the geometric mean of a / b differs from 1, in the worst setting."""
    found = []
    for name in settings:
        r = ratio(_positive(by_seed(done, a, setting=name)), by_seed(done, b, setting=name))
        found.append(_folded(r))
    return max(found, key=lambda interval: interval.mean)


def _apart(a: float, b: float) -> float:
    return max(a / b, b / a)


def _positive(values: dict[int, float]) -> dict[int, float]:
    """A measured excess can come out below 0; then it counts as next to nothing."""
    return {seed: max(v, 1e-9) for seed, v in values.items()}


def _folded(r: Interval) -> Interval:
    """An interval of a ratio as one of the factor, whichever way: ends in order, at least 1."""
    ends = sorted(max(v, 1 / v) for v in (r.low, r.high)) if r.low == r.low else [r.low, r.high]
    low = 1.0 if r.low <= 1 <= r.high else ends[0]
    values = tuple(max(v, 1 / v) for v in r.values)
    return Interval(max(r.mean, 1 / r.mean), low, ends[1], values)


def relative(done: Sequence[Done], setting: str, key: str = "excess") -> Interval:
    """An excess test error over the variance of the label noise."""
    return t_interval([d.found[key] / d.found["noise"] for d in where(done, setting=setting)])


def largest_share(done: Sequence[Done], key: str, tol: str) -> Interval:
    """Share of the noise's squared output gradient outside a channel, in the best benign case."""
    shares = [t_interval([d.found[key][tol] for d in where(done, setting=name)]) for name in BENIGN]
    return max(shares, key=lambda interval: interval.mean)


def worst(done: Sequence[Done], key: str, settings: Sequence[str] = ()) -> Interval:
    """The largest figure of any run with these settings, or of any at all."""
    among = [d for d in done if not settings or d.settings["setting"] in settings]
    return point(max(d.found[key] for d in among))


def judge(done: Sequence[Done]) -> Findings:
    """The bounds were fixed before the full run."""
    exact = max(
        _apart(d.found["predicted"], d.found["frozen"]) - 1
        for d in done
        if d.settings["setting"] in LINEAR
    )
    decided = [
        at_most("noise gain against the frozen formula, relative (linear)", point(exact), 1e-3),
        at_most("excess error is the formula's, up to a factor of (linear)",
                mean_ratio(done, "excess", "predicted", LINEAR), 1.25),
        at_most("excess error is the noise gain's, up to a factor of (network)",
                mean_ratio(done, "excess", "predicted", NETWORKS), 1.25),
        at_most("harmful noise is what it did, up to a factor of (network)",
                factor(done, "draw", "harmful", NETWORKS), 1.25),
        at_most("benign: excess error over σ² (linear, long tail)",
                relative(done, LINEAR[0]), 0.25),
        at_most("benign: excess error over σ² (network, long tail)",
                relative(done, NETWORKS[0]), 0.5),
        at_least("harmful: excess error over σ² (linear, isotropic)",
                 relative(done, LINEAR[1]), 1.0),
        at_least(f"share of the noise in the soft reservoir of W (best benign, tolerance {SOFT})",
                 largest_share(done, "reservoir", SOFT), 0.5, percent=True),
    ]  # fmt: skip
    beside = [
        at_least("harmful: excess error over σ² (network, isotropic)",
                 relative(done, NETWORKS[1]), 0.5),
        at_least("share of the noise where G is soft (best benign, tolerance 0.1)",
                 largest_share(done, "unseen", "0.1"), 0.5, percent=True),
        at_most("worst closure error of any run", worst(done, "closure"), 1e-2),
        at_most("worst relative residual: noise is fitted",
                worst(done, "residual", (*LINEAR, *NETWORKS)), 1e-2),
    ]  # fmt: skip
    return Findings([*decided, *controls(*beside)], _table(done), main=5)


def _table(done: Sequence[Done]) -> Table:
    def over_noise(key: str) -> Callable[[Done], float | None]:
        return lambda d: d.found[key] / d.found["noise"] if "noise" in d.found else None

    figures = {"steps": "steps", "kernel drift": "drift", "closure error": "closure"}
    figures |= {"labels fitted": "fitted", "queries right": "accuracy"}
    shares = {f"in reservoir at {t}": ("reservoir", t) for t in ("0.1", "0.01", "1e-06")}
    shares |= {"where G is soft (0.1)": ("unseen", "0.1")}
    return tabulate(
        "setting",
        {name: where(done, setting=name) for name in COLOURS},
        {name: figure(key) for name, key in figures.items()}
        | {f"{key} / σ²": over_noise(key) for key in ("excess", "predicted", "frozen")}
        | {name: figure(*at) for name, at in shares.items()},
        percent=[*shares, "labels fitted", "queries right"],
        about="For squared error W = (n/2)(I - PᵀP) in continuous time: a direction lies in the "
        "reservoir of W only as far as it was not fitted, so noise that was interpolated is not "
        "there; where it does no harm, the query transfer G is small on it.",
    )


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Measured against predicted, and where W and G are soft."""
    return [
        _agreement(done),
        _profile(done, "dissipation", "Eigenvalues of W at interpolation"),
        _profile(done, "gains", "Squared singular values of the query transfer G"),
    ]


def _agreement(done: Sequence[Done]) -> Plot:
    lines, ends = list[Line](), list[float]()
    for name in (*LINEAR, *NETWORKS):
        rows = [d.found for d in where(done, setting=name) if d.found["excess"] > 0]
        x = [r["predicted"] for r in rows]
        lines.append(points(name, x, [r["excess"] for r in rows], COLOURS[name]))
        ends += x
    equal = [min(ends) / 2, max(ends) * 2]
    lines.append(Line("equal", equal, equal, "other", "dot"))
    return Plot(
        "Excess test error, predicted and measured", "predicted", "measured", lines,
        "Excess is σ² times the noise gain by prediction, and comes from noise drawn anew when "
        "measured; a point for each data set. On the line the path operators of the run on clean "
        "labels say exactly what label noise will do.",
        log_x=True, log_y=True,
    )  # fmt: skip


def _profile(done: Sequence[Done], key: str, title: str) -> Plot:
    lines = []
    for name, colour in COLOURS.items():
        columns = zip(*(d.found[key] for d in where(done, setting=name)), strict=True)
        mean = [max(t_interval(column).mean, 1e-12) for column in columns]
        lines.append(Line(name, range(1, len(mean) + 1), mean, colour))
    about = "Means over the data sets. A soft direction lies far below 1."
    return Plot(title, "direction", "over the largest", lines, about, log_y=True)


CLAIM = Claim(
    name="benign-overfitting",
    title="Benign overfitting",
    statement=(
        "A network that fits label noise to the end can still predict well: the test error it "
        "adds is the harmful-noise term of the path operators, and benign noise lies in the "
        "reservoir, where no query sees it."
    ),
    source="Fig. 1, Cor. H.4 (frozen kernel)",
    paper="",
    published=["The paper's settings for this claim are not known."],
    ours=[
        f"n = {EXAMPLES} training examples, {QUERIES} queries with clean targets, label noise of "
        f"variance {NOISE**2}; wrong labels {FLIPPED:.0%} in the logistic setting.",
        "Long tail: 2 strong directions and 400 to 600 weak ones that share the variance 2 (benign "
        "by Bartlett et al. 2020). Isotropic: 33 inputs for the linear model, 5 for the network.",
        "Full-batch gradient descent with momentum until the residual is 1e-5 (linear) or 1e-2 "
        "(network) of that at the start; 150 steps in the logistic setting.",
        "Excess test error: mean over noise drawn in pairs ±e, each trained from the same start, "
        "minus the error of the network trained on clean labels.",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
