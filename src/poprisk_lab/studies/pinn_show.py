"""The table and the plots of the claim of the differential equation."""

from __future__ import annotations

from collections.abc import Sequence

from poprisk.intervals import Interval, t_interval
from poprisk_lab.studies.claim import Curve, Done, Picture, Plot
from poprisk_lab.studies.curves import mean_curve
from poprisk_lab.studies.judge import written
from poprisk_lab.studies.optimizers import Contestant, of_arm
from poprisk_lab.studies.pinn_field import (
    DECAY,
    MAIN,
    NOISES,
    at_noise,
    pair,
    rivals,
    slowness,
    steps_of,
    typical,
)
from poprisk_lab.studies.pinn_runs import GOAL, STREAM


def table(done: Sequence[Done]) -> list[list[str]]:
    """Every contestant: steps to the goal, and its error."""
    header = [
        "Noise and optimizer",
        f"Steps to {GOAL:g}",
        "Reached by",
        "Error at the end",
        "Least",
    ]
    rows = [
        [
            f"{noise:g}: {c.label}",
            f"{typical(steps_of(c)):,.0f}" if steps_of(c).censored < len(c.found) else "—",
            f"{len(c.found) - steps_of(c).censored} of {len(c.found)}",
            written(t_interval(list(c.values("final").values()))),
            f"{c.mean('best'):.3f}",
        ]
        for noise in NOISES
        for c in sorted(at_noise(done, noise), key=slowness)
    ]
    return [header, *rows]


def show(done: Sequence[Done]) -> list[Plot | Picture]:
    """Errors along training, steps by learning rate, and both figures by noise."""
    main = at_noise(done, MAIN)
    return [_along(main), _by_rate(main), _by_noise(done)]


def _along(main: Sequence[Contestant]) -> Plot:
    paper, auto, stream = pair(main, "snr", "soft"), pair(main, "auto"), pair(main, STREAM)
    controls = [rival for _, _, rival in rivals(main)]
    shown = [
        ("AdamW, fastest", paper.fast_adamw, "solid"),
        ("AdamW, best end", paper.end_adamw, "dash"),
        ("Algorithm 1, fastest", paper.fast, "solid"),
        ("Algorithm 1, best end", paper.end, "dash"),
        ("defaults", auto.end, "solid"),
        ("defaults, stream", stream.end, "dash"),
        ("RMS-matched", controls[1], "dot"),
        ("shuffled", controls[2], "dot"),
    ]
    first = {c.label: name for name, c, _ in reversed(shown)}
    return Plot(
        f"Error along training, noise {MAIN:g}",
        "step",
        "relative error",
        [_line(name, c, dash) for name, c, dash in shown if first[c.label] == name],
        f"The goal is {GOAL:g}. Fastest: {paper.fast_adamw.label}; {paper.fast.label}. Best end: "
        f"{paper.end_adamw.label}; {paper.end.label}. Bands: 95% intervals over seeds.",
    )


def _line(name: str, contestant: Contestant, dash: str) -> Curve:
    rows = list(contestant.values("errors").values())
    at = next(iter(contestant.found.values()))["at"]
    return mean_curve(name, at, rows, contestant.colour, dash=dash)


def _by_rate(main: Sequence[Contestant]) -> Plot:
    shown = {
        "AdamW": (of_arm(main, "adamw", weight_decay=DECAY), "solid"),
        "snr mask": (of_arm(main, "snr"), "solid"),
        "soft mask": (of_arm(main, "soft"), "dash"),
        "RMS-matched": (of_arm(main, "matched"), "dot"),
        "shuffled": (of_arm(main, "shuffled-snr"), "dot"),
    }
    curves = [
        Curve(
            name,
            [c.lr for c in group],
            [typical(steps_of(c)) for c in group],
            group[0].colour,
            dash,
        )
        for name, (group, dash) in shown.items()
    ]
    return Plot(
        f"Steps to {GOAL:g} by learning rate, noise {MAIN:g}",
        "learning rate",
        "steps",
        curves,
        "Geometric means over seeds; runs that did not get there count with the steps they had.",
        log_x=True,
        log_y=True,
    )


def _by_noise(done: Sequence[Done]) -> Plot:
    found = [pair(at_noise(done, noise), "snr") for noise in NOISES]
    return Plot(
        "The snr mask against the best tuned AdamW, by noise",
        "standard deviation of the noise",
        "ratio",
        [
            _band("times fewer steps", [p.speed_up_where_both for p in found], "paper", "solid"),
            _band("share of AdamW's error", [p.error for p in found], "other", "dash"),
        ],
        "Above 1 for steps and below 1 for the error is better. Steps over the seeds where both "
        f"sides reached {GOAL:g}: {', '.join(str(len(p.shared)) for p in found)} of "
        f"{len(found[0].fast.found)}. Bands: 95% intervals over seeds.",
    )


def _band(name: str, intervals: list[Interval], colour: str, dash: str) -> Curve:
    mean, low, high = (list(ends) for ends in zip(*(i[:3] for i in intervals), strict=True))
    return Curve(name, NOISES, mean, colour, dash, low, high)
