"""Generalization while the kernel changes, against what it predicts at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import Claim, Curve, Done, Findings, Picture, Plot, Trial, by_seed
from poprisk_lab.studies.curves import mean_curve
from poprisk_lab.studies.feature_runs import BATCH, NOISE, PROBLEMS, UNITS, M, N, run
from poprisk_lab.studies.judge import Criterion, ratio, written

LEARNT = ("product", "wave", "sum")
"""Targets of few among many directions, which a net at the start does not favour."""
DIGITS = "digits"
SEEDS = range(6)
CLEARLY = 0.8


def trials(quick: bool) -> list[Trial]:
    """One problem on one seed."""
    problems, seeds, steps = [*PROBLEMS], SEEDS, 1000
    if quick:
        problems, seeds, steps = ["product", DIGITS], range(2), 150
    return [
        Trial(
            f"{problem}-{seed}",
            {"problem": problem, "seed": seed, "steps": steps},
            ("sklearn",) if problem == DIGITS else (),
        )
        for problem in problems
        for seed in seeds
    ]


def _there(done: Sequence[Done], among: Sequence[str] = LEARNT) -> list[str]:
    found = {d.settings["problem"] for d in done}
    return [problem for problem in among if problem in found]


def _compared(done: Sequence[Done], problem: str, a: str, b: str) -> Interval:
    return ratio(by_seed(done, a, problem=problem), by_seed(done, b, problem=problem))


def _extreme(done: Sequence[Done], key: str, how: Any) -> Interval:
    """The largest or smallest figure of the problems, seed by seed."""
    columns = [by_seed(done, key, problem=problem) for problem in _there(done)]
    return t_interval([how(c[seed] for c in columns) for seed in columns[0]])


def _pooled(done: Sequence[Done], a: str, b: str) -> Interval:
    """The ratio of two figures, a geometric mean over problems and seeds, paired over seeds."""
    columns = [by_seed(done, key, problem=p) for p in _there(done) for key in (a, b)]
    pairs = list(zip(columns[::2], columns[1::2], strict=True))
    logs = [sum(math.log(x[s] / y[s]) for x, y in pairs) / len(pairs) for s in columns[0]]
    return t_interval(logs).mapped(math.exp)


def judge(done: Sequence[Done]) -> Findings:
    """Much better than the kernel at the start, drift of 1 and more, movement accounted for."""
    problems = _there(done)
    errors = {p: _compared(done, p, "error", "frozen") for p in _there(done, [*PROBLEMS])}
    drift, closure = _extreme(done, "end", min), _extreme(done, "closure", max)
    criteria = [
        *(
            Criterion(f"{PROBLEMS[p].label}: test error over that of the kernel at the start",
                      errors[p], CLEARLY, at_most=True)
            for p in problems
        ),
        Criterion("kernel drift at the end, least of these problems", drift, 1.0),
        Criterion("test movement that the path operators miss, relative, worst of them", closure,
                  0.02, at_most=True),
        Criterion("test error of the kernel at the end over that of the kernel at the start, mean",
                  _pooled(done, "end_kernel", "frozen"), CLEARLY, at_most=True, decides=False),
    ]  # fmt: skip
    if DIGITS in errors:
        criteria.append(
            Criterion(f"{PROBLEMS[DIGITS].label}: test error over that of the kernel at the start",
                      errors[DIGITS], 1.0, at_most=True, decides=False)
        )  # fmt: skip
    return Findings(
        criteria,
        ours=f"test error {written(_pooled(done, 'error', 'frozen'))} times that of the kernel at "
        f"the start, at drift {written(drift)} and more; the path operators miss "
        f"{written(closure, percent=True)} of the test movement",
        controls=_controls(errors),
        sentences=_sentences(done),
        table=_table(done),
    )


def _controls(errors: dict[str, Interval]) -> str:
    text = "the kernel at the start has its best ridge by the test set"
    if DIGITS in errors:
        text += f"; digits, odd against even: {written(errors[DIGITS])} times its error"
    return text


def _sentences(done: Sequence[Done]) -> list[str]:
    found = []
    for problem in _there(done, [*PROBLEMS]):
        gap = _compared(done, problem, "error", "frozen")
        word = "too few seeds to tell" if gap.few else "no clear difference"
        if gap.high < 1:
            word = "the net is better"
        if gap.low > 1:
            word = "the kernel at the start is better"
        values = {k: _mean(done, problem, k) for k in ("nothing", "frozen", "error", "end_kernel")}
        found.append(
            f"{PROBLEMS[problem].label}: test error {values['error']:.3g} at the end of training, "
            f"{values['frozen']:.3g} with the kernel at the start, {values['end_kernel']:.3g} with "
            f"the kernel at the end, {values['nothing']:.3g} for the mean of the labels: {word}."
        )
    found.append(
        "The kernel regressions take the best ridge, and the outputs of the net or zero as their "
        "start, by the test set; the net is taken as it ends. The operators know the path, so "
        "they account for the test outputs; they do not forecast them."
    )
    return found


def _mean(done: Sequence[Done], problem: str, key: str) -> float:
    return t_interval([*by_seed(done, key, problem=problem).values()]).mean


COLUMNS = {
    "test error": "error",
    "without the noise that got through": "without_noise",
    "kernel at the start": "frozen",
    "kernel at the end": "end_kernel",
    "mean of the labels": "nothing",
    "drift at the end": "end",
    "movement missed": "closure",
}


def _table(done: Sequence[Done]) -> list[list[str]]:
    rows = [["problem", *COLUMNS]]
    for problem in _there(done, [*PROBLEMS]):
        cells = [
            written(t_interval([*by_seed(done, key, problem=problem).values()]))
            for key in COLUMNS.values()
        ]
        rows.append([PROBLEMS[problem].label, *cells])
    return rows


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Test error over the runs beside the frozen kernel's, drift, and alignment."""
    found = list[Plot | Picture]()
    for problem in _there(done, [*PROBLEMS]):
        found.append(
            Plot(f"Test error: {PROBLEMS[problem].label}", "step", "mean squared error",
                 _errors(done, problem),
                 "Mean over seeds with 95% intervals. The lines of the kernels have their best "
                 "ridge by the test set.")
        )  # fmt: skip
    for title, key, y, about in (
        ("Kernel drift", "drift", "‖K - K₀‖ / ‖K₀‖", "Spectral norms."),
        ("Alignment of kernel and target", "alignment", "yᵀKy / (‖K‖ ‖y‖²)",
         "Centred; at 1 the kernel would hold nothing but the target."),
    ):  # fmt: skip
        curves = []
        for i, problem in enumerate(_there(done, [*PROBLEMS])):
            runs = [d.found for d in done if d.settings["problem"] == problem]
            rows = [r[key] for r in runs]
            label, colour = PROBLEMS[problem].label, f"module-{i + 1}"
            curves.append(mean_curve(label, runs[0]["steps"], rows, colour))
        found.append(Plot(title, "step", y, curves, about))
    return found


def _errors(done: Sequence[Done], problem: str) -> list[Curve]:
    runs = [d.found for d in done if d.settings["problem"] == problem]
    steps = runs[0]["error_steps"]
    ends = [steps[0], steps[-1]]
    return [
        mean_curve("net", steps, [r["errors"] for r in runs], "poprisk"),
        mean_curve("kernel at the start", ends, [[r["frozen"]] * 2 for r in runs], "adamw"),
        mean_curve("kernel at the end", ends, [[r["end_kernel"]] * 2 for r in runs], "paper",
                   dash="dash"),
    ]  # fmt: skip


CLAIM = Claim(
    name="feature-learning",
    title="Generalization while the kernel changes",
    statement="A net generalizes where the kernel it starts with does not, its kernel changing by "
    "more than its own size, and the operators of the path account for its test outputs.",
    source="§3 and Thm 5.1",
    paper="",
    published=["the theory is not to assume a frozen kernel; its experiment is not known to us"],
    ours=[
        f"{N} training examples with label noise {NOISE}, {M} clean test points, one hidden layer "
        f"of {UNITS} tanh units in PyTorch's initialization, 1,000 steps, batches of {BATCH}",
        "x₁x₂ and √2 sin 2x₁ and x₁x₂ + max(x₃, 0) of 16 to 20 Gaussian inputs; AdamW, SGD and "
        "PopRiskAdamW on its defaults",
        "the digits, odd against even, as a control: there the kernel at the start is good",
        "the net as it ends, kernel regression with the best ridge by the test set; six seeds",
        f"clearly better is {CLEARLY:g} times the error or less; a drift of 1 is the kernel's size",
        "operators matrix-free, all outputs moved once per pass over the data",
    ],
    trials=trials,
    run=run,
    judge=judge,
    show=show,
)
