"""What a twin knows of the risk of a rule's own loss, from one run with wrong labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from poprisk import TwinRisk
from poprisk.protocols import PerExampleLoss
from poprisk_lab.arms import DEFAULT_ADAMW
from poprisk_lab.plots import short
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.local_paths import LOSSES
from poprisk_lab.tasks.local_rules import RULES
from poprisk_lab.tasks.mislabelled import mislabelled

EXAMPLES, NOISE, LEFT_OUT, BATCH = 500, 0.2, 0.2, 50
KINDS: dict[str, dict[str, Any]] = {"pushed": {}, "left_out": {"leave_out": LEFT_OUT}}


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
