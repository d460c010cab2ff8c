"""From the trials on benign overfitting to criteria, sentences, a table and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import Curve, Done, Findings, Picture, Plot, by_seed, where
from poprisk_lab.studies.judge import Criterion, point, ratio, written

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


def relative(done: Sequence[Done], setting: str) -> Interval:
    """Measured excess test error over the variance of the label noise."""
    return t_interval([d.found["excess"] / d.found["noise"] for d in where(done, setting=setting)])


def reservoir(done: Sequence[Done], key: str = "reservoir", tol: str = SOFT) -> dict[str, Interval]:
    """Share of the noise's squared output gradient in the reservoir, by benign setting."""
    return {
        name: t_interval([d.found[key][tol] for d in where(done, setting=name)]) for name in BENIGN
    }


def judge(done: Sequence[Done]) -> Findings:
    """Criteria and facts; the bounds were fixed before the full run."""
    shares = reservoir(done)
    largest = max(shares.values(), key=lambda interval: interval.mean)
    harm = {name: relative(done, name) for name in (*LINEAR, *NETWORKS)}
    linear = mean_ratio(done, "excess", "predicted", LINEAR)
    network = mean_ratio(done, "excess", "predicted", NETWORKS)
    exact = max(_apart(d.found["predicted"], d.found["frozen"]) - 1 for d in _of(done, LINEAR))
    criteria = [
        Criterion(
            "noise gain against the frozen formula, relative (linear)",
            point(exact),
            needed=1e-3,
            at_most=True,
        ),
        Criterion(
            "excess error is the formula's, up to a factor of (linear)",
            linear,
            needed=1.25,
            at_most=True,
        ),
        Criterion(
            "excess error is the noise gain's, up to a factor of (network)",
            network,
            needed=1.25,
            at_most=True,
        ),
        Criterion(
            "harmful noise is what it did, up to a factor of (network)",
            factor(done, "draw", "harmful", NETWORKS),
            needed=1.25,
            at_most=True,
        ),
        Criterion(
            "benign: excess error over σ² (linear, long tail)",
            harm[LINEAR[0]],
            needed=0.25,
            at_most=True,
        ),
        Criterion(
            "benign: excess error over σ² (network, long tail)",
            harm[NETWORKS[0]],
            needed=0.5,
            at_most=True,
        ),
        Criterion(
            "harmful: excess error over σ² (linear, isotropic)",
            harm[LINEAR[1]],
            needed=1.0,
        ),
        Criterion(
            f"share of the noise in the soft reservoir of W (best benign, tolerance {SOFT})",
            largest,
            needed=0.5,
            percent=True,
        ),
        *_controls(done, harm),
    ]
    ours = (
        f"excess error over prediction: a factor of {written(linear)} (linear), "
        f"{written(network)} (network); {written(largest, percent=True)} of the noise in the "
        "reservoir"
    )
    controls = (
        f"isotropic inputs: excess {written(harm[LINEAR[1]])} times the noise's variance "
        f"(linear), {written(harm[NETWORKS[1]])} (network), against {written(harm[LINEAR[0]])} and "
        f"{written(harm[NETWORKS[0]])} with a long tail"
    )
    return Findings(criteria, ours, controls, _sentences(done, harm, largest), _table(done, harm))


def _of(done: Sequence[Done], settings: Sequence[str]) -> list[Done]:
    return [d for d in done if d.settings["setting"] in settings]


def _controls(done: Sequence[Done], harm: dict[str, Interval]) -> list[Criterion]:
    unseen = max(reservoir(done, "unseen", "0.1").values(), key=lambda interval: interval.mean)
    return [
        Criterion(
            "harmful: excess error over σ² (network, isotropic)",
            harm[NETWORKS[1]],
            needed=0.5,
            decides=False,
        ),
        Criterion(
            "share of the noise where G is soft (best benign, tolerance 0.1)",
            unseen,
            needed=0.5,
            decides=False,
            percent=True,
        ),
        Criterion(
            "worst closure error of any run",
            point(max(d.found["closure"] for d in done)),
            needed=1e-2,
            at_most=True,
            decides=False,
        ),
        Criterion(
            "worst relative residual: noise is fitted",
            point(max(d.found["residual"] for d in _of(done, (*LINEAR, *NETWORKS)))),
            needed=1e-2,
            at_most=True,
            decides=False,
        ),
    ]


def _sentences(done: Sequence[Done], harm: dict[str, Interval], largest: Interval) -> list[str]:
    logistic = where(done, setting=LOGISTIC)
    fitted = t_interval([d.found["fitted"] for d in logistic])
    accuracy = t_interval([d.found["accuracy"] for d in logistic])
    drift = t_interval([d.found["drift"] for d in where(done, setting=NETWORKS[0])])
    flat = min(d.found["dissipation"][-1] for d in _of(done, LINEAR))
    found = [
        f"With a long tail, fitting noise of variance σ² adds {written(harm[LINEAR[0]])} σ² to the "
        f"test error of the linear model and {written(harm[NETWORKS[0]])} σ² to the network's; "
        f"with isotropic inputs {written(harm[LINEAR[1]])} σ² and {written(harm[NETWORKS[1]])} σ².",
        f"The network's kernel changes by {written(drift)} times its norm (long tail).",
        f"Logistic regression fits {written(fitted, percent=True)} of the labels, wrong ones "
        f"included, and is right on {written(accuracy, percent=True)} of the queries.",
        f"The smallest eigenvalue of W is at least {flat:.2g} of the largest in every linear run: "
        "for squared error W = (n/2)(I - PᵀP) in continuous time, so that a direction lies in the "
        "reservoir only as far as it was not fitted.",
    ]
    if largest.high < 0.5:
        found.append(
            "So noise that was interpolated is not in the reservoir of W. Where it does no harm, "
            "it is because the query transfer G is small on it, not because W is."
        )
    return found


def _table(done: Sequence[Done], harm: dict[str, Interval]) -> list[list[str]]:
    rows = [
        ["setting", "steps", "kernel drift", "excess / σ²", "predicted / σ²", "frozen / σ²"]
        + [f"in reservoir at {t}" for t in ("0.1", "0.01", "1e-06")]
        + ["where G is soft (0.1)", "worst closure"]
    ]
    for name in COLOURS:
        trials = where(done, setting=name)
        cells = [name, *(written(t_interval([d.found[k] for d in trials])) for k in _PLAIN)]
        if name in harm:
            cells.append(written(harm[name]))
            cells += [
                written(t_interval([d.found[k] / d.found["noise"] for d in trials]))
                for k in ("predicted", "frozen")
            ]
        else:
            cells += ["", "", ""]
        shares = [d.found["reservoir"] for d in trials]
        cells += [
            written(t_interval([s[t] for s in shares]), percent=True)
            for t in ("0.1", "0.01", "1e-06")
        ]
        soft = t_interval([d.found["unseen"]["0.1"] for d in trials])
        cells += [written(soft, percent=True), f"{max(d.found['closure'] for d in trials):.1e}"]
        rows.append(cells)
    return rows


_PLAIN = ("steps", "drift")


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Measured against predicted, and where W and G are soft."""
    return [
        _agreement(done),
        _profile(done, "dissipation", "Eigenvalues of W at interpolation"),
        _profile(done, "gains", "Squared singular values of the query transfer G"),
    ]


def _agreement(done: Sequence[Done]) -> Plot:
    curves, ends = list[Curve](), list[float]()
    for name in (*LINEAR, *NETWORKS):
        rows = [d.found for d in where(done, setting=name) if d.found["excess"] > 0]
        x = [r["predicted"] for r in rows]
        curves.append(Curve(name, x, [r["excess"] for r in rows], COLOURS[name], points=True))
        ends += x
    line = [min(ends) / 2, max(ends) * 2]
    curves.append(Curve("equal", line, line, "other", "dot"))
    return Plot(
        "Excess test error, predicted and measured",
        "predicted",
        "measured",
        curves,
        "Excess is σ² times the noise gain by prediction, and comes from noise drawn anew when "
        "measured; a point for each data set. On the line the path operators of the run on clean "
        "labels say exactly what label noise will do.",
        log_x=True,
        log_y=True,
    )


def _profile(done: Sequence[Done], key: str, title: str) -> Plot:
    curves = []
    for name, colour in COLOURS.items():
        rows = [d.found[key] for d in where(done, setting=name)]
        bands = [t_interval([r[i] for r in rows]) for i in range(len(rows[0]))]
        curves.append(
            Curve(
                name,
                list(range(1, len(bands) + 1)),
                [max(b.mean, 1e-12) for b in bands],
                colour,
            )
        )
    return Plot(
        title,
        "direction",
        "over the largest",
        curves,
        "Means over the data sets. A soft direction lies far below 1.",
        log_y=True,
    )
