"""The claim that the gate reaches the solution of a noisy differential equation in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from poprisk.intervals import Interval
from poprisk_lab.plots import Plot, Table, interval_line, metric_line
from poprisk_lab.studies import criteria, optimizers
from poprisk_lab.studies.claim import Plots, Report, Results
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, survival_line
from poprisk_lab.studies.optimizers import Contestant, fastest, least, of_arm, steps_by_rate
from poprisk_lab.studies.pinn.runs import (
    DEEPXDE,
    FIXED_POINTS,
    GOAL,
    LBFGS,
    MAIN,
    NOISES,
    PILOT_RATE,
    SOAP,
    STREAM,
    TERMS,
    run,
    trials,
)

__all__ = ["DEEPXDE", "FIXED_POINTS", "GOAL", "PILOT_RATE", "judge", "run", "show", "trials"]

PAPER_SPEED_UP = 2.4
NO_WORSE = 1.05
"""As a share of AdamW's error at the same learning rate: the whole interval at most this."""


def share(a: Contestant, b: Contestant) -> Interval:
    """The error of ``a`` at the end as a share of that of ``b``, paired over seeds."""
    return criteria.ratio(a.values("final"), b.values("final"))


def at_noise(results: Results, noise: float) -> list[Contestant]:
    """The contestants at a noise, the run through DeepXDE left out."""
    return optimizers.contestants(
        d for d in results.where(noise=noise) if d.settings["arm"] != DEEPXDE
    )


def piloted(among: Sequence[Contestant], arm: str) -> Contestant:
    """The defaults at a learning rate that was chosen before, on other seeds."""
    return min(of_arm(among, arm), key=lambda c: abs(c.lr - PILOT_RATE))


def snr_and_rivals(main: Sequence[Contestant]) -> tuple[Contestant, dict[str, Contestant]]:
    """The snr mask at the best learning rate at which all controls were run, and they."""
    best = least([c for c in main if len(optimizers.rivals_of(c, main)) == 3], "snr")
    return best, optimizers.rivals_of(best, main)


def judge(results: Results) -> Report:
    """Fewer steps to the goal than AdamW with its learning rate tuned, as the paper has it."""
    main = at_noise(results, MAIN)
    faster = fastest(main, "snr", "soft").times_faster(fastest(main, "adamw"))
    name = f"Algorithm 1: times fewer steps to a relative error of {GOAL:g} than AdamW, lr tuned"
    decided = at_least(name, faster, 1.0)._replace(claimed=PAPER_SPEED_UP)
    return Report([decided, *controls(*_beside(results, main))], _table(results))


def _beside(results: Results, main: Sequence[Contestant]) -> Iterator[Criterion]:
    snr, rivals = snr_and_rivals(main)
    best, adamw = least(main, "snr", "soft"), least(main, "adamw")
    yield at_most("ours: Algorithm 1's error at the end, as a share of AdamW's, lr tuned",
                  share(best, adamw), 1.0)  # fmt: skip
    mask = f"snr mask, lr {snr.lr:g}"
    for name, rival in rivals.items():
        yield at_least(f"{mask}: times fewer steps than {name}", snr.times_faster(rival), 1.0)
        yield at_most(f"{mask}: error at the end, as a share of {name}", share(snr, rival), 1.0)
    for noise in (n for n in NOISES if n != MAIN):
        faster, smaller = _speed_and_error(at_noise(results, noise), "snr")
        yield at_least(f"noise {noise:g}, snr mask: times fewer steps than AdamW", faster, 1.0)
        yield at_most(f"noise {noise:g}, snr mask: share of AdamW's error", smaller, 1.0)
    for arm, name in ((TERMS, "sizes by term"), (STREAM, "as a stream"), ("auto", "as one term")):
        yield from _no_worse(results, arm, f"defaults, {name}")
    yield from _against_rivals(main)


def _no_worse(results: Results, arm: str, name: str) -> Iterator[Criterion]:
    for noise in NOISES:
        among = at_noise(results, noise)
        for own in of_arm(among, arm):
            (adamw,) = of_arm(among, "adamw", lr=own.lr)
            what = f"noise {noise:g}, {name}, lr {own.lr:g}: share of AdamW's error at that rate"
            yield at_most(what, share(own, adamw), NO_WORSE)


def _against_rivals(main: Sequence[Contestant]) -> Iterator[Criterion]:
    """Those that networks of equations are trained by now, each at its best learning rate."""
    terms, stream = piloted(main, TERMS), piloted(main, STREAM)
    sides = {
        "Algorithm 1": (fastest(main, "snr", "soft"), least(main, "snr", "soft")),
        "defaults, sizes by term": (terms, terms),
        "defaults, as a stream": (stream, stream),
    }
    for name, (quick, good) in sides.items():
        for arm in ("adamw", SOAP, LBFGS):
            if arm == "adamw" and name == "Algorithm 1":
                continue
            rival = "the best AdamW" if arm == "adamw" else optimizers.ARMS[arm].label
            faster = quick.times_faster(fastest(main, arm))
            yield at_least(f"{name}: times fewer steps than {rival}", faster, 1.0)
            yield at_most(
                f"{name}: share of the error of {rival}", share(good, least(main, arm)), 1
            )


def _speed_and_error(among: Sequence[Contestant], *arms: str) -> tuple[Interval, Interval]:
    """The best of these arms against the best AdamW, for both by the true solution."""
    faster = fastest(among, *arms).times_faster(fastest(among, "adamw"))
    return faster, share(least(among, *arms), least(among, "adamw"))


def _table(results: Results) -> Table:
    """Every contestant: steps to the goal, and its error."""
    found, rivals = dict[str, Results](), dict[str, Results]()
    for noise in NOISES:
        there = sorted(at_noise(results, noise), key=lambda c: c.slowness)
        found |= {f"{noise:g}: {c.label}": c.runs for c in there}
        adamw = fastest(there, "adamw").runs
        rivals |= {f"{noise:g}: {c.label}": adamw for c in there}
    for trial in results.where(arm=DEEPXDE):
        found[f"{MAIN:g}: through DeepXDE, snr mask"] = optimizers.contestants([trial])[0].runs
    return criteria.steps_table(
        "noise and optimizer",
        found,
        rivals.get,
        {"error at the end": "final", "least error": "best"},
        steps="steps",
        keep_all=True,
        about=f"The goal is a relative error of {GOAL:g}; runs that did not reach it are censored. "
        "The log-rank test is against the fastest AdamW at that noise. Through DeepXDE: one seed.",
    )


def show(results: Results) -> Plots:
    """Errors along training, who reached the goal when, steps by learning rate, both by noise."""
    main = at_noise(results, MAIN)
    _, rivals = snr_and_rivals(main)
    shown = {
        "AdamW, fastest": (fastest(main, "adamw"), "solid"),
        "AdamW, best end": (least(main, "adamw"), "dash"),
        "Algorithm 1, fastest": (fastest(main, "snr", "soft"), "solid"),
        "Algorithm 1, best end": (least(main, "snr", "soft"), "dash"),
        "defaults, sizes by term": (piloted(main, TERMS), "solid"),
        "defaults, stream": (piloted(main, STREAM), "dash"),
        "SOAP": (least(main, SOAP), "solid"),
        "AdamW, L-BFGS": (least(main, LBFGS), "dash"),
        "RMS-matched": (rivals["AdamW at its update sizes"], "dot"),
        "shuffled": (rivals["its own mask shuffled"], "dot"),
    }
    first = {c.label: name for name, (c, _) in reversed(shown.items())}
    once = {name: (c, dash) for name, (c, dash) in shown.items() if first[c.label] == name}
    along = [metric_line(n, c.runs, "at", "errors", c.colour, dash=d) for n, (c, d) in once.items()]
    waiting = [survival_line(n, c.steps, c.colour, dash=d) for n, (c, d) in once.items()]
    settings = "; ".join(f"{name}: {c.label}" for name, (c, _) in list(once.items())[:4])
    pairs = [_speed_and_error(at_noise(results, noise), "snr") for noise in NOISES]
    speed, error = zip(*pairs, strict=True)
    return [
        Plot(f"Error along training, noise {MAIN:g}", "step", "relative error", along,
             f"The goal is {GOAL:g}. {settings}. Bands: 95% intervals over seeds."),
        Plot(f"Not yet at {GOAL:g}, noise {MAIN:g}", "step", "share of seeds", waiting,
             "Kaplan and Meier: the share of seeds that have not reached the goal yet."),
        _by_rate(main),
        Plot("The snr mask against the best tuned AdamW, by noise",
             "standard deviation of the noise", "ratio",
             [interval_line("times fewer steps", NOISES, speed, "paper"),
              interval_line("share of AdamW's error", NOISES, error, "other", dash="dash")],
             "Above 1 for steps and below 1 for the error is better. Steps up to the common "
             "horizon. Bands: 95% intervals over seeds."),
    ]  # fmt: skip


def _by_rate(main: Sequence[Contestant]) -> Plot:
    lines = [
        steps_by_rate("AdamW", of_arm(main, "adamw")),
        steps_by_rate("snr mask", of_arm(main, "snr")),
        steps_by_rate("soft mask", of_arm(main, "soft"), dash="dash"),
        steps_by_rate("RMS-matched", of_arm(main, "matched"), dash="dot"),
        steps_by_rate("shuffled", of_arm(main, "shuffled-snr"), dash="dot"),
    ]
    return Plot(f"Steps to {GOAL:g} by learning rate, noise {MAIN:g}", "learning rate", "steps",
                lines, "Means over seeds up to the last step of the runs (Kaplan and Meier).",
                log_x=True, log_y=True)  # fmt: skip
