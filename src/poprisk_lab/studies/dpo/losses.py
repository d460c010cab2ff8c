r"""Losses of preferences that TRL does not have, and its trainer with any of them.

A pair's margin is :math:`d = \beta \log\frac{\pi(y_w \mid x)}{\pi_0(y_w \mid x)} -
\beta \log\frac{\pi(y_l \mid x)}{\pi_0(y_l \mid x)}` for the chosen answer y_w and the rejected y_l;
DPO's loss of it is :math:`-\log \sigma(d)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

PairLoss = Callable[[Tensor], Tensor]
"""The loss of a batch from its margins (b,)."""


def dr_dpo(margins: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Dr. DPO (Wu et al., arXiv:2407.07880): pairs of large loss count less.

    .. math:: -\beta' \log \frac1b \sum_i \exp(-\ell_i/\beta'), \quad \ell_i = -\log \sigma(d_i)

    Args:
        margins: (b,).
        temperature: β'; 1 in the paper.
    """
    losses = -F.logsigmoid(margins)
    kept = torch.logsumexp(-losses / temperature, 0) - math.log(len(margins))
    return -temperature * kept


@final
class RePo:
    r"""RE-PO, at first RPO-EM (Cao et al., arXiv:2509.24159), for DPO's loss and one annotator.

    Each label is right with a probability w that the margin says, and the reliability η is a
    moving average of the w:

    .. math::
        w_i = \frac{\eta\,\sigma(d_i)}{\eta\,\sigma(d_i) + (1-\eta)\,\sigma(-d_i)}, \qquad
        \ell_i = -w_i \log \sigma(d_i) - (1-w_i) \log \sigma(-d_i), \qquad
        \eta \leftarrow (1-a)\,\eta + a\,\bar w

    Args:
        reliability: η at the start.
        rate: a.

    Attributes:
        reliability: η now; 1 - η is the estimated share of flipped pairs.
    """

    def __init__(self, reliability: float = 0.9, rate: float = 0.1) -> None:
        self.reliability, self.rate = reliability, rate

    def __call__(self, margins: Tensor) -> Tensor:
        """The loss of a batch, after which η has moved."""
        right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
        odds = math.log(self.reliability / (1 - self.reliability)) + margins.detach()
        w = odds.sigmoid()  # for σ(d)/σ(-d) = exp d
        self.reliability += self.rate * (float(w.mean()) - self.reliability)
        return -(w * right + (1 - w) * wrong).mean()


def trainer_class() -> Any:
    """TRL's ``DPOTrainer``, which takes a loss of margins in its attribute ``pair_loss``."""
    from trl import DPOTrainer

    class PairLossTrainer(DPOTrainer):
        pair_loss: PairLoss | None = None

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.pair_loss is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            answers = inputs["completion_mask"] == 1
            found = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=inputs["input_ids"].masked_fill(~answers, -100),
                use_cache=False,
                fused_lm_head=True,
            )
            chosen, rejected = found.log_probs.sum(1).chunk(2)
            reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
            return self.pair_loss(self.beta * (chosen - rejected - reference))

    return PairLossTrainer
