"""From the trials on implicit bias to criteria, sentences, a table and plots."""

from __future__ import annotations

from collections.abc import Sequence

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import Curve, Done, Findings, Picture, Plot, where
from poprisk_lab.studies.double_judge import rank_correlation
from poprisk_lab.studies.judge import Criterion, point, written

__all__ = ["judge", "rank_correlation", "show"]

LINEAR, NETWORK = "linear", "network"
MODELS = (LINEAR, NETWORK)
DESCENT, MOMENTUM, MINIBATCH = "gradient descent", "momentum", "minibatches"
ELSEWHERE, ADAM = "another start", "Adam"
METHODS = (DESCENT, MOMENTUM, MINIBATCH, ELSEWHERE, ADAM)
FROM_ZERO = (DESCENT, MOMENTUM, MINIBATCH)
ROUND_OFF = 1e-8


def order(done: Sequence[Done], model: str, directions: str = "W") -> Interval:
    """Rank correlation of eigenvalue and half-time, over the seeds."""
    trials = where(done, part="order", model=model)
    return t_interval([d.found["correlation"][directions] for d in trials])


def worst(done: Sequence[Done], key: str, methods: Sequence[str]) -> Interval:
    """The largest figure of any run with these methods."""
    return point(max(d.found[key] for m in methods for d in where(done, part="norm", method=m)))


def least(done: Sequence[Done], method: str) -> Interval:
    """Distance to the interpolant of least norm, over the seeds."""
    return t_interval([d.found["least"] for d in where(done, part="norm", method=method)])


def judge(done: Sequence[Done]) -> Findings:
    """Criteria and facts; the bounds were fixed before the full run."""
    straight, bent = order(done, LINEAR), order(done, NETWORK)
    zero = worst(done, "least", FROM_ZERO)
    criteria = [
        Criterion(
            "rank correlation of eigenvalue and half-time (linear)",
            straight,
            needed=0.9,
        ),
        Criterion(
            "rank correlation of eigenvalue and half-time (network)",
            bent,
            needed=0.7,
        ),
        Criterion(
            "from 0: distance to the interpolant of least norm",
            zero,
            needed=ROUND_OFF,
            at_most=True,
        ),
        Criterion(
            "from another start: distance to the nearest interpolant",
            worst(done, "nearest", (ELSEWHERE,)),
            needed=ROUND_OFF,
            at_most=True,
        ),
        Criterion(
            "from 0: query outputs against the frozen kernel's",
            worst(done, "frozen", (DESCENT,)),
            needed=ROUND_OFF,
            at_most=True,
        ),
        *_controls(done),
    ]
    ours = (
        f"rank correlation {written(straight)} (linear), {written(bent)} (network); distance to "
        f"the minimum-norm interpolant {written(zero)}"
    )
    controls = (
        f"Adam ends {written(least(done, ADAM))} of its norm away, descent from another start "
        f"{written(least(done, ELSEWHERE))}; ordered by the first kernel the network's rank "
        f"correlation is {written(order(done, NETWORK, 'first kernel'))}, along random directions "
        f"{written(order(done, NETWORK, 'random'))}"
    )
    return Findings(criteria, ours, controls, _sentences(done), _table(done))


def _controls(done: Sequence[Done]) -> list[Criterion]:
    closures = [d.found["closure"] for d in done if "closure" in d.found]
    return [
        Criterion(
            "Adam: distance to the interpolant of least norm",
            least(done, ADAM),
            needed=0.1,
            decides=False,
        ),
        Criterion(
            "from another start: distance to that of least norm",
            least(done, ELSEWHERE),
            needed=0.1,
            decides=False,
        ),
        Criterion(
            "rank correlation by early W (network)",
            order(done, NETWORK, "early W"),
            needed=0.5,
            decides=False,
        ),
        Criterion(
            "rank correlation along random directions (network)",
            order(done, NETWORK, "random"),
            needed=0.5,
            at_most=True,
            decides=False,
        ),
        Criterion(
            "worst closure error of any run",
            point(max(closures)),
            needed=1e-2,
            at_most=True,
            decides=False,
        ),
    ]


def _sentences(done: Sequence[Done]) -> list[str]:
    drift = t_interval([d.found["drift"] for d in where(done, part="order", model=NETWORK)])
    by = {name: order(done, NETWORK, name) for name in ("W", "early W", "first kernel", "random")}
    coupling = worst(done, "coupling", (DESCENT,))
    adam = t_interval([d.found["norm"] for d in where(done, part="norm", method=ADAM)])
    return [
        f"The network's kernel changes by {written(drift)} times its norm. Its rank correlation is "
        + ", ".join(f"{written(value)} by {name}" for name, value in by.items())
        + ".",
        "For squared error an eigenvalue of W says how much of its direction was gone by the end "
        "(W = (n/2)(I - PᵀP) in continuous time): W of the whole run explains the order and "
        "does not predict it; W of the first tenth (early W) is a prediction.",
        f"The coupling of the linear run is the frozen kernel's to {written(coupling)}.",
        f"Adam's interpolant has {written(adam)} times the least norm; the part of a step that "
        "leaves the span of the inputs is round-off for descent, whatever its batches "
        f"({written(worst(done, 'outside', FROM_ZERO))}), and "
        f"{written(worst(done, 'outside', (ADAM,)))} of Adam's displacement.",
    ]


def _table(done: Sequence[Done]) -> list[list[str]]:
    rows = [["part", "of", "figure", "value", "worst closure"]]
    for model in MODELS:
        trials = where(done, part="order", model=model)
        closure = f"{max(d.found['closure'] for d in trials):.1e}"
        for name in trials[0].found["correlation"]:
            count = t_interval([d.found["directions"][name] for d in trials])
            rows.append(
                [
                    "order",
                    model,
                    f"rank correlation by {name}, {written(count)} directions",
                    written(order(done, model, name)),
                    closure,
                ]
            )
        never = t_interval([d.found["never"] for d in trials])
        rows.append(["order", model, "directions never half learned", written(never), closure])
    for method in METHODS:
        trials = where(done, part="norm", method=method)
        closures = [d.found["closure"] for d in trials if "closure" in d.found]
        closure = f"{max(closures):.1e}" if closures else ""
        for key, words in _DISTANCES.items():
            value = f"{max(d.found[key] for d in trials):.1e}"
            rows.append(["interpolant", method, words, value, closure])
    return rows


_DISTANCES = {
    "residual": "largest relative residual",
    "least": "largest distance to the interpolant of least norm",
    "nearest": "largest distance to the interpolant nearest to the start",
    "outside": "largest share of the displacement outside the span of the inputs",
}


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Half-times over the rank of the eigenvalue, residuals over time, distances."""
    return [_half_times(done), *(_decay(done, model) for model in MODELS), _distances(done)]


def _half_times(done: Sequence[Done]) -> Plot:
    curves = []
    for model, colour in zip(MODELS, ("poprisk", "adamw"), strict=True):
        trials = where(done, part="order", model=model)
        x = [i + 1 for d in trials for i in range(len(d.found["half_times"]))]
        y = [max(t, 0.5) for d in trials for t in d.found["half_times"]]
        curves.append(Curve(model, x, y, colour, points=True))
    return Plot(
        "When half of a direction's residual is gone",
        "rank of W's eigenvalue",
        "step",
        curves,
        "A point for each direction with something to learn, of all data sets. The uppermost are "
        "those that were not half learned by the end.",
        log_y=True,
    )


def _decay(done: Sequence[Done], model: str) -> Plot:
    trial = where(done, part="order", model=model)[0].found
    curves = [
        Curve(f"direction {rank}", trial["moments"], values, f"module-{colour}")
        for colour, (rank, values) in enumerate(
            zip((1, 3, 6, 11, 21), trial["decay"], strict=True), start=1
        )
    ]
    return Plot(
        f"Residual along directions of W: {model}, first data set",
        "step",
        "relative residual",
        [c._replace(y=[max(v, 1e-12) for v in c.y]) for c in curves],
        "Directions by the rank of their eigenvalue of W. A residual that was small at the start "
        "can grow, where others leak into it.",
        log_y=True,
    )


def _distances(done: Sequence[Done]) -> Plot:
    curves = []
    for key, name, colour in (
        ("least", "interpolant of least norm", "poprisk"),
        ("nearest", "interpolant nearest to the start", "adamw"),
    ):
        points = [
            (i + 1, max(d.found[key], 1e-17))
            for i, method in enumerate(METHODS)
            for d in where(done, part="norm", method=method)
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        curves.append(Curve(f"distance to the {name}", x, y, colour, points=True))
    methods = ", ".join(f"{i + 1} {method}" for i, method in enumerate(METHODS))
    return Plot(
        "Where a linear model ends",
        "method",
        "relative distance",
        curves,
        f"{methods}. A point for each data set. From 0 both interpolants are the same one.",
        log_y=True,
    )
