"""The training of an audit: its network, its loss, its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk.audit.scores import NORMAL_MAD
from poprisk.evaluation import evaluating, outputs_of
from poprisk.task.batches import split_batches
from poprisk_lab.audit.nets import build
from poprisk_lab.audit.plan import AuditPlan
from poprisk_lab.tasks import load_task

PREDICTED = 4096
"""Examples of one forward pass without a gradient."""
Tell = Callable[[Tensor, Tensor], None]
"""Takes the positions of a batch and its outputs."""


@final
class Training:
    """The network of a plan, trained on some of the examples.

    Args:
        plan: what to train, and how.
        inputs: of all examples.
        targets: of all examples, as they were given.
        trained: likewise, as they are trained on.
        rows: the examples to train on.
    """

    def __init__(
        self, plan: AuditPlan, inputs: Tensor, targets: Tensor, trained: Tensor, rows: Tensor
    ) -> None:
        self.plan, self.rows = plan, rows
        self.inputs, self.trained = inputs.to(plan.device), trained.to(plan.device)
        self.model = _network(plan, self.inputs)
        self.scale = TargetScale.of(targets[rows], plan.kind)
        self.optimizer = PopRiskAdamW(
            self.model,
            lr=plan.recipe.lr,
            batch_size=plan.recipe.batch_size,
            dataset_size=len(rows),
        )

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters())

    def epoch(self, number: int, tell: Tell = lambda index, outputs: None) -> float:
        """Train for one epoch, telling of every batch; the mean loss."""
        self.model.train()
        generator = torch.Generator().manual_seed(1_000_003 * self.plan.seed + number)
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        total = 0.0
        for index in batches(order, self.plan.recipe.batch_size):
            outputs = self.model(self.inputs[index])
            loss = self.scale.loss(outputs, self.trained[index]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            tell(index, outputs)
            total += float(loss.detach()) * len(index)
        return total / len(self.rows)

    def predict(self, rows: Tensor, tell: Tell) -> None:
        """Outputs for examples, in evaluation mode; none of no examples."""
        with evaluating(self.model):
            for index in rows.split(PREDICTED) if len(rows) else ():
                tell(index, outputs_of(self.model, self.inputs[index]))

    def state_dict(self) -> dict[str, Any]:
        """For a training that is resumed."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def batches(order: Tensor, size: int) -> Sequence[Tensor]:
    """An order in batches; a last one of less than half a batch joins the one before it."""
    return split_batches(order, size, least=-(-size // 2))


def _network(plan: AuditPlan, inputs: Tensor) -> nn.Module:
    if plan.task:
        torch.manual_seed(plan.seed)
        return load_task(plan.task, seed=plan.seed).new_model(plan.device)
    return build(plan.recipe, inputs, plan.outputs, plan.seed).to(plan.device)


@dataclass(frozen=True)
class TargetScale:
    """What the network predicts: logits, or numbers of mean 0 and size 1."""

    kind: str
    mean: float = 0.0
    size: float = 1.0

    @classmethod
    def of(cls, targets: Tensor, kind: str) -> TargetScale:
        """From the median and its absolute deviation, which wrong numbers hardly move."""
        if kind == "classes":
            return cls(kind)
        known = targets[~targets.isnan()]
        middle = float(known.median())
        spread = NORMAL_MAD * float((known - middle).abs().median())
        return cls(kind, middle, spread or float(known.std()) or 1.0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example."""
        if self.kind == "classes":
            return F.cross_entropy(outputs, targets, reduction="none")
        wanted = ((targets - self.mean) / self.size).to(outputs.dtype)
        return F.smooth_l1_loss(outputs.squeeze(1), wanted, reduction="none")

    def restored(self, outputs: Tensor) -> Tensor:
        """Predictions in the units of the targets."""
        if self.kind == "classes":
            return outputs
        return outputs.squeeze(1) * self.size + self.mean
