"""From the trials on double descent to criteria, sentences, a table and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import Curve, Done, Findings, Picture, Plot, by_seed, where
from poprisk_lab.studies.judge import Criterion, point, ratio, written

FEATURES, NETWORK = "random features", "network"
THRESHOLD = {FEATURES: 30, NETWORK: 5}
"""The size with as many weights as training examples, or one more."""


def sizes_of(done: Sequence[Done], model: str) -> list[int]:
    """The capacities that were tried, ascending."""
    return sorted({d.settings["size"] for d in where(done, model=model)})


def curve_of(done: Sequence[Done], model: str, seed: int, key: str) -> list[float]:
    """A figure over capacity on one seed."""
    trials = where(done, model=model, seed=seed)
    return [d.found[key] for d in sorted(trials, key=lambda d: d.settings["size"])]


def seeds_of(done: Sequence[Done], model: str) -> list[int]:
    """The seeds, ascending."""
    return sorted({d.settings["seed"] for d in where(done, model=model)})


def over_seeds(
    done: Sequence[Done], model: str, figure: Callable[[list[float], list[float]], float]
) -> Interval:
    """A figure of the curves of test error and noise gain, over the seeds."""
    return t_interval(
        [
            figure(curve_of(done, model, seed, "test"), curve_of(done, model, seed, "gain"))
            for seed in seeds_of(done, model)
        ]
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 if one of them does not vary."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return float(spearmanr(a, b).statistic)


def between_peaks(done: Sequence[Done], model: str) -> Interval:
    """By which factor of weights the peaks of test error and noise gain lie apart; at least 1."""
    weights = curve_of(done, model, seeds_of(done, model)[0], "weights")

    def apart(test: list[float], gain: list[float]) -> float:
        return abs(math.log(weights[_peak(test)] / weights[_peak(gain)]))

    return over_seeds(done, model, apart).mapped(math.exp)


def _peak(curve: Sequence[float]) -> int:
    return max(range(len(curve)), key=lambda i: curve[i])


def rise(done: Sequence[Done], model: str, key: str) -> Interval:
    """A figure at the threshold over that at the largest capacity."""
    largest = sizes_of(done, model)[-1]
    at = by_seed(done, key, model=model, size=THRESHOLD[model])
    return ratio(at, by_seed(done, key, model=model, size=largest))


def harmful_share(done: Sequence[Done], model: str) -> Interval:
    """Share of the test error at the threshold that is harmful noise."""
    trials = where(done, model=model, size=THRESHOLD[model])
    return t_interval([d.found["terms"]["harmful noise"] / d.found["test"] for d in trials])


def judge(done: Sequence[Done]) -> Findings:
    """Criteria and facts; the bounds were fixed before the full run."""
    criteria = [c for model in THRESHOLD for c in _criteria(done, model)]
    rises = {model: rise(done, model, "test") for model in THRESHOLD}
    apart = {model: between_peaks(done, model) for model in THRESHOLD}
    ours = "; ".join(
        f"{model}: test error at the threshold {written(rises[model])} times that of the largest, "
        f"peaks a factor of {written(apart[model])} in weights apart"
        for model in THRESHOLD
    )
    controls = "; ".join(
        f"{model}: on clean labels the rise is {written(rise(done, model, 'clean_test'))}, after a "
        f"tenth of the steps {written(rise(done, model, 'early_test'))}"
        for model in THRESHOLD
    )
    controlled = [c for model in THRESHOLD for c in _controls(done, model)]
    closure = Criterion(
        "worst closure error of any run",
        point(max(d.found["closure"] for d in done)),
        needed=1e-2,
        at_most=True,
        decides=False,
    )
    sentences = [s for model in THRESHOLD for s in _sentences(done, model)]
    return Findings([*criteria, *controlled, closure], ours, controls, sentences, _table(done))


def _criteria(done: Sequence[Done], model: str) -> list[Criterion]:
    return [
        Criterion(
            f"test error, threshold over largest ({model})",
            rise(done, model, "test"),
            needed=1.5,
        ),
        Criterion(
            f"weights between the peaks, a factor of ({model})",
            between_peaks(done, model),
            needed=2.0,
            at_most=True,
        ),
        Criterion(
            f"rank correlation of error and gain ({model})",
            over_seeds(done, model, rank_correlation),
            needed=0.5,
        ),
        Criterion(
            f"harmful noise in the error at the threshold ({model})",
            harmful_share(done, model),
            needed=0.5,
            percent=True,
        ),
    ]


def _controls(done: Sequence[Done], model: str) -> list[Criterion]:
    early = ratio(
        by_seed(done, "early_gain", model=model, size=THRESHOLD[model]),
        by_seed(done, "gain", model=model, size=THRESHOLD[model]),
    )
    return [
        Criterion(
            f"clean labels: error, threshold over largest ({model})",
            rise(done, model, "clean_test"),
            needed=1.5,
            at_most=True,
            decides=False,
        ),
        Criterion(
            f"gain at the threshold, early over end ({model})",
            early,
            needed=0.5,
            at_most=True,
            decides=False,
        ),
    ]


def _sentences(done: Sequence[Done], model: str) -> list[str]:
    trials = where(done, model=model, size=THRESHOLD[model])
    terms = {
        name: t_interval([d.found["terms"][name] for d in trials])
        for name in ("bias", "harmful noise", "bias × harmful noise")
    }
    largest = where(done, model=model, size=sizes_of(done, model)[-1])
    drift = t_interval([d.found["drift"] for d in largest])
    parts = ", ".join(f"{name} {written(value)}" for name, value in terms.items())
    return [
        f"{model.capitalize()}: the test error at the threshold is {parts}.",
        f"{model.capitalize()}: the kernel of the largest model changes by {written(drift)} times "
        "its norm.",
    ]


def _table(done: Sequence[Done]) -> list[list[str]]:
    keys = {
        "weights": "weights",
        "training": "training error",
        "test": "test error",
        "gain": "noise gain",
        "frozen": "frozen kernel",
        "clean_test": "clean labels",
        "early_test": "after a tenth",
    }
    rows = [["model", "size", *keys.values(), "bias", "harmful noise", "cross"]]
    for model in THRESHOLD:
        for size in sizes_of(done, model):
            trials = where(done, model=model, size=size)
            cells = [written(t_interval([d.found[k] for d in trials])) for k in keys]
            terms = [
                written(t_interval([d.found["terms"][name] for d in trials]))
                for name in ("bias", "harmful noise", "bias × harmful noise")
            ]
            rows.append([model, str(size), *cells, *terms])
    return rows


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Test error and noise gain over capacity, and what the test error is made of."""
    return [plot for model in THRESHOLD for plot in (_together(done, model), _parts(done, model))]


def _line(
    done: Sequence[Done], model: str, name: str, figure: Callable[[Done], float], colour: str
) -> Curve:
    """A figure over the number of weights: geometric means with their bands."""
    x, bands = list[float](), list[Interval]()
    for size in sizes_of(done, model):
        trials = where(done, model=model, size=size)
        x.append(trials[0].found["weights"])
        logs = t_interval([math.log(max(figure(d), 1e-12)) for d in trials])
        bands.append(logs.mapped(math.exp))
    low, high = [b.low for b in bands], [b.high for b in bands]
    return Curve(name, x, [b.mean for b in bands], colour, low=low, high=high)


def _together(done: Sequence[Done], model: str) -> Plot:
    return Plot(
        f"Test error and noise gain: {model}",
        "weights (30 training examples)",
        "error, or gain",
        [
            _line(done, model, "test error", lambda d: d.found["test"], "poprisk"),
            _line(done, model, "noise gain", lambda d: d.found["gain"], "adamw"),
            _line(done, model, "clean labels", lambda d: d.found["clean_test"], "peer"),
            _line(done, model, "after a tenth of the steps", _early, "shuffled"),
        ],
        "Geometric means over data sets with 95% bands. The claim is that the first two peak "
        "together; the others are the test error of controls.",
        log_x=True,
        log_y=True,
    )


def _early(d: Done) -> float:
    return d.found["early_test"]


def _parts(done: Sequence[Done], model: str) -> Plot:
    return Plot(
        f"What the test error is made of: {model}",
        "weights (30 training examples)",
        "mean squared error",
        [
            _line(done, model, "test error", lambda d: d.found["test"], "poprisk"),
            _line(
                done, model, "harmful noise", lambda d: d.found["terms"]["harmful noise"], "adamw"
            ),
            _line(done, model, "bias", lambda d: d.found["terms"]["bias"], "peer"),
        ],
        "The four cells of each run; the cross term of bias and noise, which has either sign, is "
        "in the table.",
        log_x=True,
        log_y=True,
    )
