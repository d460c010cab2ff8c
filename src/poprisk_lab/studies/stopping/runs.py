"""One trial: a run with its twin that all rules watch, then five trainings on four fifths each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk import RiskEstimate, stopping_point
from poprisk.randomness import generator_of
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.plots import rounded, short
from poprisk_lab.results import Metrics
from poprisk_lab.studies.risk.problems import NoisyData, TrainingProblem
from poprisk_lab.studies.risk.stopping import true_risk
from poprisk_lab.studies.stopping.problems import OLD, PROBLEMS
from poprisk_lab.studies.stopping.rivals import FOLDS, RULES, RivalLook, look_at, parts_of

LOOKS = 40
BAD, GOOD = 0.25, 0.15
"""Relative errors of an estimate from which on it must be flagged, and up to which it must not."""
END, FIFTH, REFITTED, FOLDED = "the end", "held-out fifth", "held-out fifth, refitted", "5 folds"


def problem_of(settings: dict[str, Any]) -> TrainingProblem:
    """The problem that settings name, with other epochs if they say so."""
    problem = {**OLD, **PROBLEMS}[settings["problem"]]
    return problem._replace(epochs=settings.get("epochs", problem.epochs))


def one(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """One problem on one seed: the run, the folds, and where each rule stops."""
    torch.set_num_threads(1)
    problem, seed = problem_of(settings), settings["seed"]
    data = problem.data(seed)
    done: Metrics = workspace.load() or {"folds": []}
    if "run" not in done:
        done["run"] = with_twin(problem, data, seed)
        workspace.save(lambda: done)
    parts = parts_of(len(data.y), data.groups, generator=generator_of(seed, "folds"))
    while (fold := len(done["folds"])) < FOLDS:
        done["folds"].append(held_out(problem, data, parts == fold, seed))
        workspace.save(lambda: done)
    return figures(done["run"], done["folds"])


def look_epochs(epochs: int) -> list[int]:
    """After which epochs there is a look: about 40, the last epoch among them.

    Example:
        >>> look_epochs(5), len(look_epochs(120)), look_epochs(50)[-2:]
        ([1, 2, 3, 4, 5], 40, [49, 50])
    """
    every = max(1, epochs // LOOKS)
    return sorted({*range(every, epochs + 1, every), epochs})


def epochs_of(problem: TrainingProblem, n: int, seed: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Each epoch's number and batches; a last one of a single example is left out."""
    order = generator_of(seed, "order of examples")
    for epoch in range(1, problem.epochs + 1):
        batches = torch.randperm(n, generator=order).split(problem.batch_size)
        yield epoch, [index for index in batches if len(index) > 1]


def start(seed: int) -> None:
    """Seed what initial weights and dropout are drawn from: alike for all trainings of a trial."""
    torch.manual_seed(generator_of(seed, "weights").initial_seed())


def with_twin(problem: TrainingProblem, data: NoisyData, seed: int) -> Metrics:
    """Train with a twin; at each look its estimate, the true risk, and what the rules see."""
    n = len(data.y)
    start(seed)
    twin = problem.twin(n, seed)
    mixed = torch.randperm(n, generator=generator_of(seed, "batches of looks"))
    x, y = data.x[mixed], data.y[mixed]
    at, estimates = look_epochs(problem.epochs), list[RiskEstimate]()
    risks, looks = list[float](), list[Metrics]()
    for epoch, batches in epochs_of(problem, n, seed):
        for index in batches:
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(data.x[index]), data.y[index]).mean().backward()
                run.optimizer.step()
        if epoch in at:
            estimates.append(twin.estimate(data.x, data.y, groups=data.groups))
            risks.append(true_risk(twin.model, data))
            look = look_at(
                twin.model,
                problem.loss,
                x,
                y,
                batch_size=problem.batch_size,
                epoch=epoch,
                share=epoch / problem.epochs,
                train_loss=estimates[-1].train_loss,
            )
            looks.append(look._asdict())
    stop = stopping_point(estimates)
    return {
        "looks": looks,
        "risks": risks,
        "estimates": [e.value for e in estimates],
        "errors": [e.standard_error for e in estimates],
        "valid": [e.valid for e in estimates],
        "comparable": [e.comparable for e in estimates],
        "stop": [stop.index, stop.low, stop.high],
        "believed": stop.valid,
        "cost": 1 + estimates[-1].cost,
        "draw": float(torch.rand((), generator=generator_of(seed, "credibility"))),
    }


def held_out(problem: TrainingProblem, data: NoisyData, out: Tensor, seed: int) -> Metrics:
    """Train without some examples; at each look their summed loss, and the true risk.

    Args:
        problem: how.
        data: all of it.
        out: which examples are held out, (n,), boolean.
        seed: of order and weights.
    """
    x, y = data.x[~out], data.y[~out]
    b = min(problem.batch_size, len(y))
    problem = problem._replace(batch_size=b)
    start(seed)
    model = problem.model()
    optimizer = problem.optimizer(model, len(y), b)
    at, losses, risks = look_epochs(problem.epochs), list[float](), list[float]()
    for epoch, batches in epochs_of(problem, len(y), seed):
        for index in batches:
            optimizer.zero_grad()
            problem.loss(model(x[index]), y[index]).mean().backward()
            optimizer.step()
        if epoch in at:
            model.eval()
            with torch.no_grad():
                losses.append(problem.loss(model(data.x[out]), data.y[out]).sum().item())
            model.train()
            risks.append(true_risk(model, data))
    return {"losses": losses, "risks": risks, "examples": int(out.sum()), "all": len(out)}


class Choice(NamedTuple):
    """Where a rule stops.

    Attributes:
        at: position among the looks.
        risk: the true risk of the model that is kept.
        cost: of finding and training it, in trainings on all examples.
    """

    at: int
    risk: float
    cost: float


def least(curve: Sequence[float]) -> int:
    """Position of the least value; of no value that is not a number."""
    return min(range(len(curve)), key=lambda i: curve[i] if curve[i] == curve[i] else float("inf"))


def choices(run: Metrics, folds: Sequence[Metrics]) -> dict[str, Choice]:
    """What each rival chooses.

    Costs count passes over the training set: rules are not credited for stopping a run whose end
    nobody needs, a refitted model is trained up to its length. A refit on all examples, from the
    same weights in the same order, is the run itself up to there.
    """
    risks, looks = run["risks"], [RivalLook(**look) for look in run["looks"]]
    last = len(risks) - 1
    found = {END: Choice(last, risks[last], 1.0)}
    for name, rule in RULES.items():
        at = rule.rule(looks, run["draw"])
        at = last if at is None else at
        extra = len(looks) / looks[-1].epoch if rule.passes else 0.0
        found[name] = Choice(at, risks[at], 1 + extra)
    cost = [1 - fold["examples"] / fold["all"] for fold in folds]
    at = least(folds[0]["losses"])
    found[FIFTH] = Choice(at, folds[0]["risks"][at], cost[0])
    found[REFITTED] = Choice(at, risks[at], cost[0] + looks[at].share)
    at = least([sum(losses) for losses in zip(*(f["losses"] for f in folds), strict=True)])
    found[FOLDED] = Choice(at, risks[at], sum(cost) + looks[at].share)
    return found


def figures(run: Metrics, folds: Sequence[Metrics]) -> Metrics:
    """What a trial puts on record: the curve, the choices, and how good both are."""
    risks, looks = run["risks"], [RivalLook(**look) for look in run["looks"]]
    index, low, high = run["stop"]
    best = least(risks)

    def regret(risk: float) -> float:
        return short(risk / risks[best] - 1)

    errors = [abs(e / r - 1) for e, r in zip(run["estimates"], risks, strict=True)]
    believed = [e for e, valid in zip(errors, run["valid"], strict=True) if valid]
    shares = [look.share for look in looks]
    curves = {key: rounded(run[key]) for key in ("risks", "estimates", "errors")}
    return {
        "epochs": [look.epoch for look in looks],
        **curves,
        "train": rounded(look.loss for look in looks),
        "valid": run["valid"],
        "comparable": run["comparable"],
        "best": best,
        "stop": index,
        "low": low,
        "high": high,
        "believed": run["believed"],
        "cost": short(run["cost"]),
        "regret": regret(risks[index]),
        "covered": float(low <= best <= high),
        "width": short(shares[high] - shares[low]),
        "level": short(fmean(believed)) if believed else None,
        "off": _share(run["valid"], errors, lambda error: not error <= BAD, expected=False),
        "on": _share(run["valid"], errors, lambda error: error < GOOD, expected=True),
        "rivals": {
            name: {"at": c.at, "regret": regret(c.risk), "cost": short(c.cost)}
            for name, c in choices(run, folds).items()
        },
    }


def _share(
    flags: Sequence[bool], errors: Sequence[float], of: Callable[[float], bool], *, expected: bool
) -> list[int]:
    """How many flags of some estimates are as expected, and how many estimates these are."""
    found = [flag is expected for flag, error in zip(flags, errors, strict=True) if of(error)]
    return [sum(found), len(found)]
