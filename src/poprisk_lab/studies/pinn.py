"""The claim that the gate reaches the solution of a noisy differential equation in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from poprisk.intervals import Interval
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.plots import Plot, Table, interval_line, metric_line
from poprisk_lab.studies import criteria, optimizers
from poprisk_lab.studies.claim import Metrics, Plots, Report, Results, Trial, Workspace
from poprisk_lab.studies.criteria import Criterion, at_least, at_most, controls, survival_line
from poprisk_lab.studies.optimizers import Contestant, fastest, least, of_arm, steps_by_rate
from poprisk_lab.tasks import convection as task
from poprisk_lab.tasks import deepxde_convection

GOAL = 0.40
"""The relative error that is to be reached."""
DEEPXDE, STREAM = "deepxde", "stream"
NOISES, MAIN, PAPER_SPEED_UP = (0.5, 1.0, 2.0), 1.0, 2.4
ADAMW_RATES, DECAY, ADAMW_DECAYS = (3e-4, 1e-3, 3e-3, 1e-2), 0.01, (0.01, 1.0)
SNR_RATES, RATES = (3e-3, 1e-2, 3e-2), (3e-3, 1e-2)


def trials(quick: bool) -> list[Trial]:
    """Every optimizer at the main noise, AdamW and Algorithm 1 at the others, one by DeepXDE."""
    size: dict[str, Any] = {"steps": 2000, "every": 25, "keep": 2, "seeds": [0, 1, 2, 3, 4]}
    if quick:
        size = {"steps": 100, "every": 25, "keep": 1, "seeds": [0, 1]}
    found = list[Trial]()
    for noise in NOISES:
        for arm, lr, decay in _arms(noise, quick=quick):
            matched = arm == "snr" and noise == MAIN
            given = {"arm": arm, "lr": lr, "weight_decay": decay, "noise": noise, **size}
            name = f"{arm}-lr{lr:g}-wd{decay:g}-noise{noise:g}"
            found.append(Trial(name, {**given, "matched": matched}))
    through = {"arm": DEEPXDE, "lr": 1e-2, "weight_decay": DECAY, "noise": MAIN, "matched": False}
    return [*found, Trial(DEEPXDE, {**through, **size, "seeds": [0]}, needs=(DEEPXDE,))]


def _arms(noise: float, *, quick: bool) -> list[tuple[str, float, float]]:
    main, rates = noise == MAIN, RATES[-1:] if quick else RATES
    grid = rates if quick else ADAMW_RATES
    found = [("adamw", lr, d) for d in (ADAMW_DECAYS if main else [DECAY]) for lr in grid]
    found += [("snr", lr, DECAY) for lr in (rates if quick else SNR_RATES)]
    if main:
        others = ("soft", "auto", STREAM, "shuffled-snr")
        found += [(arm, lr, DECAY) for arm in others for lr in rates]
    return found


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train the networks of all seeds with one optimizer; errors and steps to the goal by seed."""
    arm, seeds = settings["arm"], settings["seeds"]
    if arm == DEEPXDE:
        size = {key: settings[key] for key in ("noise", "steps", "every")}
        make = partial(_optimizer, settings, "snr")
        curves = [deepxde_convection.train(seed, make, **size) for seed in seeds]
        return {"runs": [optimizers.error_metrics(settings, curve, goal=GOAL) for curve in curves]}
    train = partial(_train, settings)
    return optimizers.train_with_control(train, arm, matched=settings["matched"])


def _train(
    settings: dict[str, Any], arm: str, trace: UpdateTrace | None, step: optimizers.Step
) -> list[Metrics]:
    seeds = settings["seeds"]
    data = [task.convection(seed, noise=settings["noise"]) for seed in seeds]
    networks = [task.network(seed) for seed in seeds]
    optimizer = _optimizer(settings, arm, nn.ModuleList(networks), trace)
    x, y = torch.stack([d.x for d in data]), torch.stack([d.y for d in data])
    errors: list[list[float]] = []
    batches = task.batches(seeds, x.shape[1])
    for k, (index, inside) in zip(range(1, settings["steps"] + 1), batches, strict=False):
        optimizer.zero_grad()
        task.physics_loss(networks, x.gather(1, index), y.gather(1, index), inside).backward()
        step(optimizer)
        if k % settings["every"] == 0:
            errors.append(task.relative_errors(networks, data[0]))
    curves = zip(*errors, strict=True)
    return [optimizers.error_metrics(settings, curve, goal=GOAL) for curve in curves]


def _optimizer(
    settings: dict[str, Any], arm: str, model: nn.Module, trace: UpdateTrace | None = None
) -> torch.optim.Optimizer:
    """An optimizer of all networks: it treats every tensor by itself, hence every seed."""
    n = None if arm == STREAM else task.POINTS
    sizes: dict[str, Any] = {"batch_size": task.BATCH, "dataset_size": n}
    return optimizers.make_optimizer(arm, model, settings, **sizes, trace=trace)


def share(a: Contestant, b: Contestant) -> Interval:
    """The error of ``a`` at the end as a share of that of ``b``, paired over seeds."""
    return criteria.ratio(a.values("final"), b.values("final"))


def at_noise(results: Results, noise: float) -> list[Contestant]:
    """The contestants at a noise, the run through DeepXDE left out."""
    return optimizers.contestants(
        d for d in results.where(noise=noise) if d.settings["arm"] != DEEPXDE
    )


def snr_and_rivals(main: Sequence[Contestant]) -> tuple[Contestant, dict[str, Contestant]]:
    """The snr mask at the best learning rate at which all controls were run, and they."""
    best = least([c for c in main if len(optimizers.rivals_of(c, main)) == 3], "snr")
    return best, optimizers.rivals_of(best, main)


def judge(results: Results) -> Report:
    """Fewer steps to the goal and a smaller error at the end than the best tuned AdamW."""
    main = at_noise(results, MAIN)
    decided = _against_adamw("Algorithm 1", main, "snr", "soft")
    decided[0] = decided[0]._replace(claimed=PAPER_SPEED_UP)
    return Report([*decided, *controls(*_beside(results, main))], _table(results))


def _beside(results: Results, main: Sequence[Contestant]) -> Iterator[Criterion]:
    snr, rivals = snr_and_rivals(main)
    mask = f"snr mask, lr {snr.lr:g}"
    for name, rival in rivals.items():
        yield at_least(f"{mask}: times fewer steps than {name}", snr.times_faster(rival), 1.0)
        yield at_most(f"{mask}: error at the end, as a share of {name}", share(snr, rival), 1.0)
    yield from _against_adamw("PopRiskAdamW's defaults", main, "auto")
    yield from _against_adamw("defaults, as for a stream", main, STREAM)
    for noise in (n for n in NOISES if n != MAIN):
        yield from _against_adamw(f"noise {noise:g}, snr mask", at_noise(results, noise), "snr")


def _against_adamw(name: str, among: Sequence[Contestant], *arms: str) -> list[Criterion]:
    steps = f"times fewer steps to a relative error of {GOAL:g} than the best tuned AdamW"
    error = "error at the end, as a share of the best tuned AdamW's"
    faster, smaller = _speed_and_error(among, *arms)
    return [at_least(f"{name}: {steps}", faster, 1.0), at_most(f"{name}: {error}", smaller, 1.0)]


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
        "defaults": (least(main, "auto"), "solid"),
        "defaults, stream": (least(main, STREAM), "dash"),
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
        steps_by_rate("AdamW", of_arm(main, "adamw", weight_decay=DECAY)),
        steps_by_rate("snr mask", of_arm(main, "snr")),
        steps_by_rate("soft mask", of_arm(main, "soft"), dash="dash"),
        steps_by_rate("RMS-matched", of_arm(main, "matched"), dash="dot"),
        steps_by_rate("shuffled", of_arm(main, "shuffled-snr"), dash="dot"),
    ]
    return Plot(f"Steps to {GOAL:g} by learning rate, noise {MAIN:g}", "learning rate", "steps",
                lines, "Means over seeds up to the last step of the runs (Kaplan and Meier).",
                log_x=True, log_y=True)  # fmt: skip
