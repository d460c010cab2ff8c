"""Twin stopping against hindsight and a held-out fifth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from poprisk import RiskEstimate, stopping_point
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.studies.risk.problems import (
    PROBLEMS,
    QUICK_EPOCHS,
    NoisyData,
    TrainingProblem,
    mean,
    problem_of,
    slug,
)
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial

SEEDS = range(30, 35)
"""Not those that the limits of validity were chosen on (0-4 and 10-14)."""
EVALUATIONS = 40
BAD, GOOD = 0.25, 0.15


def true_risk(model: nn.Module, data: NoisyData) -> float:
    """Risk of a model on the fresh inputs."""
    model.eval()
    with torch.no_grad():
        risk = data.risk(model(data.fresh))
    model.train()
    return risk


def epochs(
    problem: TrainingProblem, n: int, seed: int
) -> Iterator[tuple[bool, list[torch.Tensor]]]:
    """The batches of each epoch, and whether to evaluate before it."""
    every = max(1, problem.epochs // EVALUATIONS)
    for epoch in range(problem.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(9973 * seed + epoch))
        batches = [b for b in order.split(problem.batch_size) if len(b) > 1]
        yield epoch % every == 0, batches


def with_twin(
    problem: TrainingProblem, data: NoisyData, seed: int
) -> tuple[list[RiskEstimate], list[float]]:
    """Estimates along a run, and the true risks at the same times."""
    n = len(data.y)
    torch.manual_seed(seed)
    twin = problem.twin(n, seed)
    estimates, risks = [twin.estimate(data.x, data.y)], [true_risk(twin.model, data)]
    for evaluate, batches in epochs(problem, n, seed):
        if evaluate:
            estimates.append(twin.estimate(data.x, data.y))
            risks.append(true_risk(twin.model, data))
        for index in batches:
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(data.x[index]), data.y[index]).mean().backward()
                run.optimizer.step()
    estimates.append(twin.estimate(data.x, data.y))
    return estimates[1:], [*risks, true_risk(twin.model, data)][1:]


def held_out(problem: TrainingProblem, data: NoisyData, seed: int) -> float:
    """The true risk where the loss on a held-out fifth of the training set is least."""
    n = len(data.y) * 4 // 5
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    kept, fifth = order[:n], order[n:]
    x, y = data.x[kept], data.y[kept]
    torch.manual_seed(seed)
    model = problem.model()
    b = min(problem.batch_size, n)
    optimizer = problem.optimizer(model, n, b)
    seen: list[tuple[float, float]] = []

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            loss = problem.loss(model(data.x[fifth]), data.y[fifth]).mean().item()
        seen.append((loss, true_risk(model, data)))

    for due, batches in epochs(problem, n, seed):
        if due:
            evaluate()
        for index in batches:
            optimizer.zero_grad()
            problem.loss(model(x[index]), y[index]).mean().backward()
            optimizer.step()
    evaluate()
    return min(seen)[1]


def trials(quick: bool) -> list[Trial]:
    """Every problem on every seed; the quick form: two problems, two epochs."""
    if quick:
        names = ("ridges, MLP, AdamW", "digits 40%, MLP, AdamW")
        return [
            Trial(slug(name), {"problem": name, "seed": 0, "epochs": QUICK_EPOCHS})
            for name in names
        ]
    return [
        Trial(f"{slug(name)}-{seed}", {"problem": name, "seed": seed})
        for seed in SEEDS
        for name in PROBLEMS
    ]


def run(settings: Settings, _: Workspace) -> Metrics:
    """One problem on one seed."""
    problem, seed = problem_of(settings), settings["seed"]
    data = problem.data(seed)
    estimates, risks = with_twin(problem, data, seed)
    return {
        "risks": risks,
        "estimates": [e.value for e in estimates],
        "errors": [e.standard_error for e in estimates],
        "valid": [e.valid for e in estimates],
        "freedom": [e.dof for e in estimates],
        "train": [e.train_loss for e in estimates],
        "cost": 1 + estimates[-1].cost,
        "stop": list(stopping_point(estimates)[:3]),
        "held_out": held_out(problem, data, seed),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Regrets, level errors up to the best point, and how the flag fares."""
    regrets, rivals, levels = list[float](), list[float](), list[float]()
    flags = list[tuple[float, bool]]()
    for row in rows:
        risks, best = row["risks"], min(row["risks"])
        regrets.append(risks[row["stop"][0]] / best - 1)
        rivals.append(row["held_out"] / best - 1)
        errors = [abs(e / r - 1) for e, r in zip(row["estimates"], risks, strict=True)]
        before = errors[: risks.index(best) + 1]
        levels.append(sum(before) / len(before))
        flags += zip(errors, row["valid"], strict=True)
    bad = [valid for error, valid in flags if not error <= BAD]
    good = [valid for error, valid in flags if error < GOOD]
    return {
        "runs": len(rows),
        "regret": mean(regrets),
        "regret of a held-out fifth": mean(rivals),
        "level error up to the best point": mean(levels),
        "estimates with error above 25%": len(bad),
        "flag off there": mean([not v for v in bad]),
        "estimates with error below 15%": len(good),
        "flag on there": mean(good),
        "cost": mean([row["cost"] for row in rows]),
    }


def report(done: Results) -> dict[str, Any]:
    """Over all runs, and problem by problem."""
    return {
        "seeds": sorted({d.settings["seed"] for d in done}),
        "all": summary([d.metrics for d in done]),
        "problems": {
            name: summary([d.metrics for d in done.where(problem=name)])
            for name in dict.fromkeys(d.settings["problem"] for d in done)
        },
    }


STUDY = Study("risk-stopping", trials, run, report)
