"""DPO with a twin: whether its risk, from the noisy training pairs alone, tells when to stop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import RiskEstimate, TwinRisk, stopping_point
from poprisk.randomness import generator_of
from poprisk_lab.plots import short
from poprisk_lab.results import Metrics
from poprisk_lab.studies.dpo.measures import BETA, Drawn, Model, pair_likelihoods, rewards
from poprisk_lab.studies.dpo.training import BATCH, CLIP, EPOCHS

EVERY = 20
"""Steps from one look to the next."""


class PairMargins(nn.Module):
    """Margins of training pairs as they are given: (b,) positions to (b, 1).

    Args:
        policy: a causal language model.
        drawn: the pairs.
        wrong: which of those for training are flipped, (n,).
    """

    def __init__(self, policy: Any, drawn: Drawn, wrong: Tensor) -> None:
        super().__init__()
        self.policy = policy
        n = len(wrong)
        sides = torch.stack([wrong.long(), 1 - wrong.long()])  # chosen, rejected
        self.register_buffer("ids", drawn.ids[sides, torch.arange(n)])
        self.register_buffer("reference", drawn.reference[sides, torch.arange(n)])

    def forward(self, index: Tensor) -> Tensor:
        ids, reference = self.ids[:, index], self.reference[:, index]
        found = pair_likelihoods(self.policy, ids.flatten(0, 1)).unflatten(0, (2, len(index)))
        moved = BETA * (found - reference)
        return (moved[0] - moved[1])[:, None]


def preference_loss(margins: Tensor, chosen: Tensor) -> Tensor:
    """DPO's loss of margins (b, 1), for each pair; ``chosen`` is 1, or -1 for the other answer."""
    return -F.logsigmoid(margins * chosen).squeeze(1)


def stop_by_twin(
    model: Model, drawn: Drawn, wrong: Tensor, rate: float, *, lr: float, seed: int
) -> Metrics:
    """AdamW as TRL runs it, and its twin; accuracy and noisy risk on held-out pairs beside it.

    Args:
        model: the reference.
        drawn: the pairs.
        wrong: which training pairs are flipped, (n,).
        rate: share of flipped pairs, for the true risk.
        lr: learning rate.
        seed: of order and twin.
    """
    n = len(wrong)
    torch.manual_seed(seed)
    twin = TwinRisk(
        lambda: PairMargins(model.fresh(), drawn, wrong),
        lambda m: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0),
        preference_loss,
        dataset_size=n,
        seed=seed,
    )
    everything, first = torch.arange(n), torch.ones(n, 1)
    estimates, found = list[RiskEstimate](), list[Metrics]()
    order = generator_of(seed, "order of pairs")
    step = 0
    for _ in range(EPOCHS):
        for index in torch.randperm(n, generator=order).split(BATCH):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(index), first[index]).mean().backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
                run.optimizer.step()
            step += 1
            if step % EVERY == 0:
                estimates.append(twin.estimate(everything, first))
                found.append(_true(twin.model.policy, drawn, rate) | {"at": step})
    stop = stopping_point(estimates)
    accuracy = [row["accuracy"] for row in found]
    risk = [row["risk"] for row in found]
    return {
        "at": [row["at"] for row in found],
        "accuracies": accuracy,
        "risks": risk,
        "estimates": [short(e.value) for e in estimates],
        "errors": [short(e.standard_error) for e in estimates],
        "valid": [e.valid for e in estimates],
        "stop": stop.index,
        "believed": stop.valid,
        "accuracy": accuracy[stop.index],
        "end": accuracy[-1],
        "best": max(accuracy),
        "regret": short(risk[stop.index] / min(risk) - 1),
        "regret_of_the_end": short(risk[-1] / min(risk) - 1),
    }


def _true(policy: Any, drawn: Drawn, rate: float) -> Metrics:
    """Accuracy on clean held-out pairs, and the risk of pairs flipped at that rate."""
    policy.eval()
    part = slice(drawn.training, drawn.training + drawn.held_out)
    better, worse = rewards(policy, drawn, part)
    d = (better - worse)[:, None]
    right, flipped = (float(preference_loss(d, torch.full_like(d, s)).mean()) for s in (1.0, -1.0))
    policy.train()
    accuracy = float((better > worse).double().mean())
    return {"accuracy": accuracy, "risk": short((1 - rate) * right + rate * flipped)}
