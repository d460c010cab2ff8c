"""The reference and the pairs of a seed, and what is measured of a policy with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk_lab.checkpoint import load_checkpoint
from poprisk_lab.plots import short
from poprisk_lab.results import Metrics
from poprisk_lab.tasks.preferences import (
    PROMPT,
    REWARDS,
    answer,
    flipped,
    language_model,
    tokenizer_of,
)

BETA = 0.1
SAMPLED = 200
"""Held-out prompts that are answered at the end."""
SIDES = ("better", "worse")
CHUNK = 64
"""Answers of one forward pass without a gradient."""


class Drawn(NamedTuple):
    """The pairs of a seed, the better answer first.

    Attributes:
        prompts: texts, of all pairs; the first ones are for training.
        better: answers with the larger reward.
        worse: the others.
        ids: tokens of prompt and answer, and the end, (2, n, t): better, worse.
        reference: log-likelihoods of the answers under the reference, (2, n).
        training: how many pairs are for training.
        held_out: how many thereafter are held out and clean; the rest may choose by noisy pairs.
    """

    prompts: list[str]
    better: list[str]
    worse: list[str]
    ids: Tensor
    reference: Tensor
    training: int
    held_out: int


class Model(NamedTuple):
    """The pre-trained model: what makes it anew, its tokenizer, and its text."""

    width: int
    layers: int
    weights: dict[str, Tensor]
    tokenizer: str
    tokens: Tensor

    def fresh(self) -> Any:
        """The reference, to be trained on."""
        return language_model(self.width, self.layers, self.weights)


def load_model(settings: dict[str, Any], path: Any) -> Model:
    """The model that a trial of pre-training has kept."""
    kept = load_checkpoint(path)
    size = (settings["width"], settings["layers"])
    return Model(*size, kept["weights"], kept["tokenizer"], kept["tokens"])


def likelihoods(model: Any, ids: Tensor) -> Tensor:
    """Log-likelihood of each answer with its end, given its prompt, (n,).

    Args:
        model: a causal language model.
        ids: tokens (n, t), of which the first :data:`PROMPT` are the prompt's.
    """
    with torch.no_grad():
        found = [pair_likelihoods(model, rows) for rows in ids.split(CHUNK)]
    return torch.cat(found)


def pair_likelihoods(model: Any, rows: Tensor) -> Tensor:
    """The same in one pass, with a gradient."""
    logits = model(rows[:, :-1], use_cache=False).logits[:, PROMPT - 1 :]
    said = rows[:, PROMPT:, None]
    return (logits.gather(2, said)[..., 0] - logits.logsumexp(2)).sum(1)


def divergence(model: Any, reference: Any, ids: Tensor) -> float:
    """KL divergence of the policy from the reference over an answer, in nats.

    The mean over answers that the policy sampled, exact at each token.

    Args:
        model: the policy.
        reference: likewise.
        ids: prompts with the policy's answers (n, t).
    """
    sums = list[Tensor]()
    with torch.no_grad():
        for rows in ids.split(CHUNK):
            p, q = (
                m(rows[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].log_softmax(2)
                for m in (model, reference)
            )
            sums.append((p.exp() * (p - q)).sum((1, 2)))
    return float(torch.cat(sums).mean())


def measured(policy: Any, drawn: Drawn) -> Metrics:
    """Accuracy, drift and chosen reward on clean held-out pairs, and accuracy on the noisy ones.

    Returns:
        ``accuracy``: share of held-out pairs whose better answer has the larger implicit reward;
        ``drift``: mean size of the implicit rewards of both answers; ``chosen``: mean reward of the
        better ones.
    """
    part = slice(drawn.training, drawn.training + drawn.held_out)
    better, worse = rewards(policy, drawn, part)
    return {
        "accuracy": float((better > worse).double().mean()),
        "drift": short(float((better.abs() + worse.abs()).mean() / 2)),
        "chosen": short(float(better.mean())),
    }


def rewards(policy: Any, drawn: Drawn, part: slice) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the better and the worse answers of some pairs, (m,) each."""
    found = [
        BETA * (likelihoods(policy, drawn.ids[side, part]) - drawn.reference[side, part])
        for side in range(len(SIDES))
    ]
    return found[0], found[1]


def margins_given(policy: Any, drawn: Drawn, wrong: Tensor) -> Tensor:
    """Margins of the training pairs as given, the worse answer chosen where flipped, (n,)."""
    better, worse = rewards(policy, drawn, slice(0, drawn.training))
    return torch.where(wrong, worse - better, better - worse)


def at_the_end(
    policy: Any, model: Model, drawn: Drawn, reward: str, wrong: Tensor, rate: float, *, seed: int
) -> Metrics:
    """What is measured once: noisy held-out pairs, flipped pairs fitted and found, samples.

    Args:
        policy: trained.
        model: the reference.
        drawn: the pairs.
        reward: one of :data:`poprisk_lab.tasks.preferences.REWARDS`.
        wrong: which training pairs are flipped (n,).
        rate: share of the noisy held-out pairs that is flipped.
        seed: of their flips and of the samples.
    """
    start = drawn.training + drawn.held_out
    better, worse = rewards(policy, drawn, slice(start, None))
    noisy = flipped(len(better), rate, seed=seed + 1)
    margins = margins_given(policy, drawn, wrong)
    return {
        "noisy": float(((better > worse) ^ noisy).double().mean()),
        "fitted": float((margins[wrong] > 0).double().mean()) if wrong.any() else None,
        **found_by(-margins, wrong),
        **_samples(policy, model, drawn, reward, seed),
    }


def found_by(suspicion: Tensor, wrong: Tensor) -> Metrics:
    """AUROC and average precision of a ranking of pairs; None where none is flipped.

    Args:
        suspicion: large for pairs that look flipped (n,).
        wrong: which are (n,).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if not wrong.any():
        return {"auroc": None, "ap": None}
    return {
        "auroc": float(roc_auc_score(wrong, suspicion)),
        "ap": float(average_precision_score(wrong, suspicion)),
    }


def _samples(policy: Any, model: Model, drawn: Drawn, reward: str, seed: int) -> Metrics:
    part = slice(drawn.training, drawn.training + min(SAMPLED, drawn.held_out))
    prompts = drawn.ids[0, part, :PROMPT]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = answer(policy, prompts)
    said = tokenizer_of(model.tokenizer).batch_decode(answers)
    rule = REWARDS[reward].of
    kl = divergence(policy, model.fresh().eval(), torch.cat([prompts, answers], 1))
    return {"kl": short(kl), "reward": short(sum(map(rule, said)) / len(said))}
