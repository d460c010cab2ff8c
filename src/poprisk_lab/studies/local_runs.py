"""One training by a rule: how accurate, how it takes wrong labels, its path, what a twin says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from poprisk import TwinRisk
from poprisk.protocols import PerExampleLoss
from poprisk_lab.arms import DEFAULT_ADAMW, Arm, default_arms
from poprisk_lab.fit import ArmRun
from poprisk_lab.plots import short
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.local_paths import LOSSES, follow_rule, measure, small_digits
from poprisk_lab.tasks.local_rules import RULES, local_task
from poprisk_lab.tasks.mislabelled import mislabelled

FORWARD, MONO, BACK = RULES
RATE = 3e-3
"""The best of two for Forward-Forward, on seeds that nothing is judged by."""
OURS = f"poprisk-lr{RATE:g}"
ADAMW = "adamw-lr{lr:g}-wd{weight_decay:g}"
GRID = tuple(ADAMW.format(lr=lr, weight_decay=0.01) for lr in (1e-3, RATE))
SAME = GRID[-1]
EXAMPLES, NOISE, LEFT_OUT, BATCH = 500, 0.2, 0.2, 50
KINDS: dict[str, dict[str, Any]] = {"pushed": {}, "left_out": {"leave_out": LEFT_OUT}}


def accuracy(settings: dict[str, Any]) -> Metrics:
    """AdamW on right labels, at the rate and for the epochs that were best on other seeds."""
    return _end(_trained(settings, SAME, data=settings["data"]))


def under_noise(settings: dict[str, Any]) -> Metrics:
    """One arm on wrong labels."""
    return _end(_trained(settings, settings["arm"], noise=settings["noise"]))


def _trained(
    settings: dict[str, Any], arm: str, *, data: str = "digits", noise: float = 0.0
) -> ArmRun:
    arms = {a.name: a for a in default_arms(full=True)}
    arms[OURS] = Arm(OURS, "PopRiskAdamW", "poprisk", "poprisk", {"lr": RATE})
    sizes = {key: settings[key] for key in ("rule", "hidden", "epochs")}
    task = local_task(settings["seed"], data=data, noise=noise, **sizes)
    done = ArmRun(task, arms[arm], settings["seed"])
    for _ in done.rows():
        pass
    return done


def _end(done: ArmRun) -> Metrics:
    p = done.progress
    return {"accuracy": p.final_metric, "memorized": p.final_memorized, "best": p.best_metric}


def path(settings: dict[str, Any]) -> Metrics:
    """The operators of a small net, see :mod:`poprisk_lab.studies.local_paths`."""
    rule, seed = settings["rule"], settings["seed"]
    data = small_digits(seed, settings["noise"])
    how = {"optimizer": settings["optimizer"], "steps": settings["steps"]}
    return measure(follow_rule(rule, data, seed=seed, **how), data.clean)


def estimates(settings: dict[str, Any]) -> Metrics:
    """The risk of a rule's own loss, and what two kinds of twin say of it without test data."""
    seed, rule = settings["seed"], RULES[settings["rule"]]
    loss = LOSSES[settings["rule"]]
    drawn = mislabelled("digits", "random", NOISE, seed=seed)
    x, y = drawn.x[:EXAMPLES], drawn.given[:EXAMPLES]
    fresh = torch.cat([drawn.x[EXAMPLES:], drawn.x_test])
    labels = torch.cat([drawn.true[EXAMPLES:], drawn.y_test])
    widths, found = (x.shape[1], *2 * (settings["hidden"],)), Metrics()
    for key, more in KINDS.items():
        torch.manual_seed(seed)
        twin = TwinRisk(
            partial(rule.net, *widths, classes=drawn.classes),
            lambda net: torch.optim.AdamW(net.parameters(), **DEFAULT_ADAMW),
            loss, dataset_size=EXAMPLES, seed=seed, **more,
        )  # fmt: skip
        _train(twin, x, y, epochs=settings["epochs"] // 2, seed=seed)
        with torch.no_grad():
            risk = float(noisy_losses(loss, twin.model(fresh), labels, NOISE).mean())
        estimate = twin.estimate(x, y)
        found[key] = {
            "estimate": short(estimate.value), "error": short(estimate.standard_error),
            "valid": estimate.valid, "reason": estimate.reason, "risk": short(risk),
            "train": short(estimate.train_loss),
        }  # fmt: skip
    return found


def _train(twin: TwinRisk, x: Tensor, y: Tensor, *, epochs: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=g).split(BATCH):
            for replica in twin.runs(index):
                replica.optimizer.zero_grad()
                replica.loss(replica.model(x[index]), y[index]).mean().backward()
                replica.optimizer.step()


def noisy_losses(loss: PerExampleLoss, u: Tensor, labels: Tensor, noise: float) -> Tensor:
    """Expected losses (n,) where a label is another class with chance ``noise``, all alike."""
    each = torch.stack([loss(u, torch.full_like(labels, a)) for a in range(u.shape[1])], 1)
    own = each.gather(1, labels.unsqueeze(1)).squeeze(1)
    return (1 - noise) * own + noise / (u.shape[1] - 1) * (each.sum(1) - own)


CASES = {"accuracy": accuracy, "noise": under_noise, "path": path, "twin": estimates}
"""From the settings of a trial to what it finds, by its case."""
