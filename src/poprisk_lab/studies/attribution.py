"""Linear datamodeling scores of the influence through a run, beside simpler estimates of it.

A run is trained again on random halves of its examples, everything else the same: a half's losses
count twice, so that a step follows their mean. The score is Spearman's correlation, over the
halves, of a query's value with what its influence predicts (Park et al. 2023, arXiv:2303.14186),
the mean over queries. One training a half: it repeats, so that there is no noise to average.

``python -m poprisk_lab.studies.attribution`` runs it and puts it on record.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.attribution import Replay, attribute, replay
from poprisk.intervals import t_interval
from poprisk.losses import cross_entropy, squared_error
from poprisk.randomness import generator_of
from poprisk_lab.checkpoint import load_checkpoint
from poprisk_lab.plots import short
from poprisk_lab.studies.influence_rivals import RIVALS
from poprisk_lab.studies.record import do_study
from poprisk_lab.studies.risk.problems import NoisyData, Transformer, digits, repeats, ridges
from poprisk_lab.study import Metrics, Results, Settings, Study, Trial, Workspace
from poprisk_lab.tasks.nets import mlp

SEEDS = range(540, 545)
SUBSETS, QUICK_SUBSETS = 100, 4
KEPT = 0.5
"""Share of the examples in a subset."""
QUERIES = 20
LEFT_OUT = (1, 10)
"""Examples that are also left out alone, those of largest influence: how many."""


class AttributedTraining(NamedTuple):
    """Data, model and training of one run."""

    data: Callable[[int], NoisyData]
    n: int
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]
    epochs: int
    batch: int


def _sgd(lr: float) -> Callable[[nn.Module], Optimizer]:
    return lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)


def _adamw(lr: float, eps: float = 1e-6) -> Callable[[nn.Module], Optimizer]:
    return lambda m: torch.optim.AdamW(m.parameters(), lr=lr, eps=eps)


SETTINGS: dict[str, AttributedTraining] = {
    f"{name}, {optimizer}": AttributedTraining(data, n, model, loss, make, epochs, batch)
    for name, data, n, model, loss, epochs, batch, makes in (
        ("ridges, MLP", partial(ridges, n=300, dimensions=8), 300, lambda: mlp(8, 64, 1),
         squared_error, 20, 30, (_sgd(0.01), _adamw(1e-3))),
        ("digits 20%, MLP", partial(digits, noise=0.2), 400, lambda: mlp(64, 64, 10),
         cross_entropy, 15, 40, (_sgd(0.02), _adamw(1e-3))),
        ("repeats 25%, transformer", partial(repeats, n=300, numbers=False, noise=0.25), 300,
         lambda: Transformer(4), cross_entropy, 15, 30, (_sgd(0.02), _adamw(5e-4))),
    )
    for optimizer, make in zip(("SGD", "AdamW"), makes, strict=True)
}  # fmt: skip
SETTINGS["digits 20%, MLP, AdamW eps 1e-3"] = SETTINGS["digits 20%, MLP, AdamW"]._replace(
    optimizer=_adamw(1e-3, 1e-3)
)
"""Smoother: pixels that are nearly always blank have second moments near 0, which the step divides
by."""


def trials(quick: bool) -> list[Trial]:
    """Every setting on every seed, then what other packages say; the quick form: few subsets."""
    settings, seeds, subsets = list(SETTINGS), list(SEEDS), SUBSETS
    if quick:
        settings, seeds, subsets = ["ridges, MLP, AdamW"], [0], QUICK_SUBSETS
    found = list[Trial]()
    for seed in seeds:
        for setting in settings:
            name = f"{setting.replace(', ', '-').replace(' ', '-').replace('%', '')}-{seed}"
            own = {"setting": setting, "seed": seed, "subsets": subsets}
            found.append(Trial(name, own, keeps=True))
            found += [
                Trial(f"{name}-{package}", {**own, "rival": rival}, needs=(package,), after=(name,))
                for rival, (package, _) in RIVALS.items()
            ]
    return found


def trained(setting: AttributedTraining, seed: int) -> Replay:
    """The run; its queries are fresh examples with labels of the same noise."""
    data, n = setting.data(seed), setting.n
    x, y = data.x[:n], data.y[:n]
    query = data.x[n : n + QUERIES], data.y[n : n + QUERIES]
    if len(query[0]) < QUERIES:  # all are for training
        query = data.fresh[:QUERIES], setting.data(seed + 1).y[:QUERIES]
    torch.manual_seed(generator_of(seed, "weights").initial_seed())
    model, order = setting.model(), generator_of(seed, "order")
    steps = [torch.randperm(n, generator=order).split(setting.batch) for _ in range(setting.epochs)]
    batches = [batch for epoch in steps for batch in epoch]
    optimizer = setting.optimizer(model)
    return replay(model, setting.loss, optimizer, batches, query, train=(x, y))


def run(settings: Settings, workspace: Workspace) -> Metrics:
    """Scores of each estimate of influence on one run, or that of another package."""
    setting, seed = SETTINGS[settings["setting"]], settings["seed"]
    done = trained(setting, seed)
    subsets = _subsets(setting.n, settings["subsets"], seed)
    if "rival" in settings:
        kept = load_checkpoint(*workspace.given.values())
        torch.manual_seed(generator_of(seed, "rival").initial_seed())
        estimate = RIVALS[settings["rival"]][1](done, setting.loss)
        score = _score(estimate, subsets, kept["values"])
        apart = _distance(estimate, kept["followed"])
        return {"scores": {settings["rival"]: short(score)}, "distance": short(apart)}
    measure = partial(_losses, setting.loss)
    found = attribute(done, measure=measure, check=1 - KEPT, left_out="random", seed=seed)
    estimates = {
        "followed": found.influence,
        "Gauss-Newton": attribute(done, measure=measure, form="gauss-newton", check=0).influence,
        "held": attribute(done, measure=measure, response="held", check=0).influence,
        "gradients at the end": _gradient_products(done, measure),
    }
    with torch.enable_grad():
        values = torch.stack([_value(done, measure, s) for s in subsets])
    workspace.keep({"values": values, "followed": found.influence})
    total, alone = attribute(done, check=LEFT_OUT[-1] / setting.n), attribute(done, check=0)
    return {
        "scores": {name: short(_score(i, subsets, values)) for name, i in estimates.items()},
        "agreement": short(found.agreement),
        "valid": found.valid,
        "cost": short(alone.cost),
        "valid_of_mean": total.valid,
        "left_out": {str(k): _left_out(done, total.influence, float(total.value), k)
                     for k in LEFT_OUT},
    }  # fmt: skip


def _losses(loss: Callable[[Tensor, Tensor], Tensor], u: Tensor, y: Tensor | None) -> Tensor:
    assert y is not None
    return loss(u, y)


def _value(done: Replay, measure: Any, weights: Tensor) -> Tensor:
    """Every query after training with these weights of the losses, (q,)."""
    return measure(_outputs(done, done.trained(weights)), done.problem.query[1]).detach()


def _outputs(done: Replay, w: Tensor) -> Tensor:
    return done.problem.shaped(done.problem.J.values(w, done.problem.query[0]))


def _gradient_products(done: Replay, measure: Any) -> Tensor:
    """Minus the product of a query's gradient with every example's, at the end, (q, n)."""
    problem, w = done.problem, done.final
    x, y = problem.train

    def rows(inputs: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        at = w.clone().requires_grad_()
        values = of(problem.shaped(problem.J.outputs(at, inputs)))
        return torch.stack([torch.autograd.grad(v, at, retain_graph=True)[0] for v in values])

    with torch.enable_grad():
        queries = rows(problem.query[0], lambda u: measure(u, problem.query[1]))
        return -queries @ rows(x, lambda u: problem.loss(u, y)).T


def _subsets(n: int, count: int, seed: int) -> list[Tensor]:
    """Weights of the losses, the same for all that are kept, one on average, (n,) each."""
    generator = generator_of(seed, "subsets")
    found = []
    for _ in range(count):
        weights = torch.zeros(n, dtype=torch.float64)
        weights[torch.randperm(n, generator=generator)[: round(KEPT * n)]] = 1 / KEPT
        found.append(weights)
    return found


def _score(influence: Tensor, subsets: list[Tensor], values: Tensor) -> float:
    """Spearman's correlation over subsets, the mean over queries."""
    from scipy.stats import spearmanr

    predicted = torch.stack(subsets) @ influence.double().T
    pairs = zip(predicted.T.numpy(), values.T.double().numpy(), strict=True)
    return float(np.mean([spearmanr(p, v).statistic for p, v in pairs]))


def _distance(estimate: Tensor, of: Tensor) -> float:
    """From one estimate, at its best scale, to another, over the size of that."""
    a, b = estimate.double(), of.double()
    return float(((a * b).sum() / a.square().sum() * a - b).norm() / b.norm())


def _left_out(done: Replay, influence: Tensor, value: float, k: int) -> dict[str, float]:
    """Trained without the k most harmful examples: measured and predicted change of the mean."""
    weights = torch.ones(len(influence), dtype=torch.float64)
    worst = influence.topk(k).indices
    weights[worst] = 0.0
    with torch.enable_grad():
        at = done.trained(weights)
    y = done.problem.query[1]
    assert y is not None
    now = float(done.problem.loss(_outputs(done, at), y).mean())
    return {"measured": short(now - value), "predicted": short(-float(influence[worst].sum()))}


def report(done: Results) -> dict[str, Any]:
    """Scores by setting, with intervals over seeds."""
    names = dict.fromkeys(d.settings["setting"] for d in done)
    return {
        "seeds": sorted({d.settings["seed"] for d in done}),
        "subsets": max(d.settings["subsets"] for d in done),
        "settings": {name: _summary([d.metrics for d in done.where(setting=name)])
                     for name in names},
    }  # fmt: skip


def _summary(found: list[Metrics]) -> dict[str, Any]:
    """Of one setting: its trials, and those of other packages as far as there are any."""
    by_name = dict[str, list[float]]()
    for row in found:
        for name, score in row["scores"].items():
            by_name.setdefault(name, []).append(score)
    scores = {name: _interval(values) for name, values in by_name.items()}
    rows = [row for row in found if "valid" in row]
    apart = {
        name: [row["distance"] for row in found if "distance" in row and name in row["scores"]]
        for name in scores
        if name in RIVALS
    }
    return {
        "scores": scores,
        "distance from followed": apart,
        "agreement": [row["agreement"] for row in rows],
        "valid": [row["valid"] for row in rows],
        "cost in trainings": _interval([row["cost"] for row in rows]),
        "left out": {k: [row["left_out"][k] for row in rows] for k in rows[0]["left_out"]},
        "valid of the mean": [row["valid_of_mean"] for row in rows],
    }


def _interval(values: list[float]) -> dict[str, Any]:
    found = t_interval(values)
    return {"mean": short(found.mean), "low": short(found.low), "high": short(found.high)}


STUDY = Study("attribution", trials, run, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    do_study(STUDY, **vars(parser.parse_args()))
