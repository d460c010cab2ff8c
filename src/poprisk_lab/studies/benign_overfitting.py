r"""Benign overfitting: what label noise that is fitted to the end does to a query.

Isotropic label noise of variance σ² adds :math:`\sigma^2\|G\|_F^2/(n^2 m)` to the test error, in
the linear case at interpolation :math:`\sigma^2\sum_j \|J_Q v_j\|^2/\sigma_j^2/m` (SVD of
:math:`J_S`). [LG, Cor. H.4, Fig. 1]. Measured on label noise drawn anew, against a network
trained on clean labels from the same start.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from poprisk.intervals import Interval, t_interval
from poprisk_lab.plots import Line, Plot, Table, points, short, tabulate
from poprisk_lab.results import Key, TrialResult
from poprisk_lab.studies import criteria, descent, label_noise
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import at_least, at_most, controls, point
from poprisk_lab.studies.descent import CleanSplit, Fit, predicted
from poprisk_lab.tasks.interpolation import inputs_of

NOISE, FLIPPED, EXAMPLES, QUERIES = 0.5, 0.2, 30, 100
PAIRS = 200
"""Of noise for a linear model, which is trained on all of them at once."""
SOFT, SHOWN = "0.01", ("0.1", "0.01", "1e-06")


class Setting(NamedTuple):
    """A problem, what learns it, and how it is fitted.

    Attributes:
        colour: of its lines.
        tail: weak directions of the inputs; 0: isotropic inputs.
        inputs: dimension of isotropic inputs.
        width: of a tanh network; 0: a linear model.
        fit: how it is fitted.
    """

    colour: str
    tail: int
    inputs: int
    width: int
    fit: Fit

    def start(self, inputs: int, seed: int) -> nn.Module:
        """The model before training; a network's weights are smaller for isotropic inputs."""
        if not self.width:
            return descent.linear(inputs)
        return descent.two_layer(inputs, self.width, (0.2 if self.tail else 0.5, 0.2), seed)


SETTINGS = {
    "linear, long tail": Setting("poprisk", 600, 0, 0, Fit(1e-5, 0.9, 1.0)),
    "linear, isotropic": Setting("adamw", 0, 33, 0, Fit(1e-5, 0.97, 1.0)),
    "network, long tail": Setting("shuffled", 400, 0, 8, Fit(1e-2, 0.9, 0.5)),
    "network, isotropic": Setting("paper", 0, 5, 16, Fit(1e-2, 0.95, 0.5)),
    "logistic, long tail": Setting("peer", 600, 0, 0, Fit(0.0, 0.9, 1.0, 150)),
}
LINEAR, NETWORKS, LOGISTIC = [*SETTINGS][:2], [*SETTINGS][2:4], [*SETTINGS][4]
BENIGN = (LINEAR[0], NETWORKS[0], LOGISTIC)


def trials(quick: bool) -> list[Trial]:
    """Every setting on every seed."""
    seeds, network = (2, 2) if quick else (6, 8)
    found = list[Trial]()
    for name, setting in SETTINGS.items():
        pairs = network if setting.width else PAIRS
        below = max(setting.fit.below, 1e-2) if quick else setting.fit.below
        given = {"setting": name, "pairs": pairs, "below": below}
        slug = name.replace(", ", "-").replace(" ", "-")
        found += [Trial(f"{slug}-{s}", {**given, "seed": s}) for s in range(seeds)]
    return found


def make(setting: Setting, seed: int, *, classes: bool) -> tuple[CleanSplit, label_noise.Start]:
    """Data of the setting, and the model at its start."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    x = inputs_of(EXAMPLES + QUERIES, generator, tail=setting.tail, isotropic=setting.inputs)
    clean = x[:, :1] - x[:, 1:2]
    if classes:
        clean = (clean > 0).double()
    elif setting.width:
        clean = 1.5 * torch.tanh(clean)
    return CleanSplit.split(x, clean, EXAMPLES), partial(setting.start, x.shape[1], seed)


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One setting on one seed."""
    name, seed = settings["setting"], settings["seed"]
    setting = SETTINGS[name]
    setting = setting._replace(fit=setting.fit._replace(below=settings["below"]))
    generator = torch.Generator().manual_seed(2_000 + seed)
    if name == LOGISTIC:
        return _classes(setting, seed, generator)
    data, start = make(setting, seed, classes=False)
    pairs = settings["pairs"]
    return label_noise.excess(setting.fit, start, data, NOISE, pairs=pairs, generator=generator)


def _classes(setting: Setting, seed: int, generator: torch.Generator) -> Metrics:
    """Logistic regression until wrong labels are fitted too."""
    data, start = make(setting, seed, classes=True)
    wrong = torch.rand(data.clean.shape, generator=generator) < FLIPPED
    y, model = torch.where(wrong, 1 - data.clean, data.clean), start()
    ops = setting.fit.follow(model, data, y, loss="binary_cross_entropy")
    right = (predicted(model, data.query) > 0) == (data.target > 0.5)
    fitted = (predicted(model, data.x) > 0) == (y > 0.5)
    return {
        "fitted": short(float(fitted.double().mean())),
        "accuracy": short(float(right.double().mean())),
        **label_noise.by_path(ops, data.clean),
    }


def relative(trial: TrialResult, key: str = "excess") -> float | None:
    """An excess test error over the variance of the label noise; None without such noise."""
    return trial.metrics[key] / trial.metrics["noise"] if "noise" in trial.metrics else None


def judge(results: Results) -> Report:
    """The bounds were fixed before the full run."""
    groups = {name: results.where(setting=name) for name in SETTINGS}
    linear, networks = ([groups[n] for n in names] for names in (LINEAR, NETWORKS))
    pairs = [(d.metrics["predicted"], d.metrics["frozen"]) for some in linear for d in some]
    exact = max(max(a / b, b / a) - 1 for a, b in pairs)
    fitted = Results(d for d in results if d.settings["setting"] != LOGISTIC)

    def excess(name: str) -> Interval:
        return t_interval(v for d in groups[name] if (v := relative(d)) is not None)

    def best_share(key: str, tol: str) -> Interval:
        """Outside a channel, of the noise's squared output gradient, in the best benign case."""
        return max((groups[n].mean((key, tol)) for n in BENIGN), key=lambda found: found.mean)

    decided = [
        at_most("noise gain against the frozen formula, relative (linear)", point(exact), 1e-3),
        at_most("excess error is the formula's, up to a factor of (linear)",
                criteria.worst_ratio(linear, "excess", "predicted"), 1.25),
        at_most("excess error is the noise gain's, up to a factor of (network)",
                criteria.worst_ratio(networks, "excess", "predicted"), 1.25),
        at_most("harmful noise is what it did, up to a factor of (network)",
                criteria.worst_factor(networks, "draw", "harmful"), 1.25),
        at_most("benign: excess error over σ² (linear, long tail)", excess(LINEAR[0]), 0.25),
        at_most("benign: excess error over σ² (network, long tail)", excess(NETWORKS[0]), 0.5),
        at_least("harmful: excess error over σ² (linear, isotropic)", excess(LINEAR[1]), 1.0),
        at_least(f"share of the noise in the soft reservoir of W (best benign, tolerance {SOFT})",
                 best_share("reservoir", SOFT), 0.5, percent=True),
    ]  # fmt: skip
    beside = [
        at_least("harmful: excess error over σ² (network, isotropic)", excess(NETWORKS[1]), 0.5),
        at_least("share of the noise where G is soft (best benign, tolerance 0.1)",
                 best_share("unseen", "0.1"), 0.5, percent=True),
        at_most("worst closure error of any run", results.largest("closure"), 1e-2),
        at_most("worst relative residual: noise is fitted", fitted.largest("residual"), 1e-2),
    ]  # fmt: skip
    return Report([*decided, *controls(*beside)], _table(groups), main=5)


def _table(groups: dict[str, Results]) -> Table:
    figures: dict[str, Key] = {"steps": "steps", "kernel drift": "drift"}
    figures |= {"closure error": "closure", "labels fitted": "fitted", "queries right": "accuracy"}
    shares: dict[str, Key] = {f"in reservoir at {t}": ("reservoir", t) for t in SHOWN}
    shares |= {"where G is soft (0.1)": ("unseen", "0.1")}
    return tabulate(
        "setting",
        groups,
        figures
        | {f"{key} / σ²": partial(relative, key=key) for key in ("excess", "predicted", "frozen")}
        | shares,
        percent=[*shares, "labels fitted", "queries right"],
        about="For squared error W = (n/2)(I - PᵀP) in continuous time: a direction lies in the "
        "reservoir of W only as far as it was not fitted, so noise that was interpolated is not "
        "there; where it does no harm, the query transfer G is small on it.",
    )


def show(results: Results) -> Plots:
    """Measured against predicted, and where W and G are soft."""
    return [
        _agreement(results),
        _profile(results, "dissipation", "Eigenvalues of W at interpolation"),
        _profile(results, "gains", "Squared singular values of the query transfer G"),
    ]


def _agreement(results: Results) -> Plot:
    lines, ends = list[Line](), list[float]()
    for name in (*LINEAR, *NETWORKS):
        some = Results(d for d in results.where(setting=name) if d.metrics["excess"] > 0)
        x = some.all("predicted")
        lines.append(points(name, x, some.all("excess"), SETTINGS[name].colour))
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


def _profile(results: Results, key: str, title: str) -> Plot:
    lines = []
    for name, setting in SETTINGS.items():
        columns = zip(*results.where(setting=name).all(key), strict=True)
        mean = [max(t_interval(column).mean, 1e-12) for column in columns]
        lines.append(Line(name, range(1, len(mean) + 1), mean, setting.colour))
    about = "Means over the data sets. A soft direction lies far below 1."
    return Plot(title, "direction", "over the largest", lines, about, log_y=True)
