"""The gate with its weight decay gated as well: a control, for what decay does behind the gate."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk.optimizer import PopRiskAdamW
from poprisk.path.rules import Facts, adam


def last_facts(optimizer: Optimizer, p: Tensor, update: Tensor) -> Facts:
    """What a step rule of Adam's kind looks at, after a step of an optimizer with one group.

    The momentum is the one after the step, which these rules do not read.

    Args:
        optimizer: Adam or one of its kind, after the step.
        p: the parameter, its gradient still that of the step.
        update: weights after the step minus weights before it.
    """
    (group,) = optimizer.param_groups
    state = optimizer.state[p]
    assert p.grad is not None
    weight = p.detach() - update
    return Facts(group, state, False, update, p.grad, weight, state["exp_avg"])


@final
class GatedDecay(Optimizer):
    r"""PopRiskAdamW whose mask q also holds back the decay.

    .. math:: w \leftarrow (1-\eta\lambda q) \odot w - \eta\, q \odot u

    Args:
        optimizer: takes the step without decay.
        weight_decay: :math:`\lambda`.
    """

    def __init__(self, optimizer: PopRiskAdamW, weight_decay: float) -> None:
        self.optimizer, self.weight_decay = optimizer, weight_decay
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Perform one step."""
        (group,) = self.param_groups
        starts = [p.clone() for p in group["params"]]
        self.optimizer.step()
        for p, start in zip(group["params"], starts, strict=True):
            mask = last_mask(self.optimizer, p, p - start)
            p.sub_(float(group["lr"]) * self.weight_decay * mask * start)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict)
        self.param_groups = self.optimizer.param_groups


def last_mask(optimizer: PopRiskAdamW, p: Tensor, update: Tensor) -> Tensor:
    """The mask of the last step: its preconditioner over that of Adam."""
    facts = last_facts(optimizer, p, update)
    gated = torch.as_tensor(optimizer.step_rule(p, facts).precondition)
    return gated / adam(facts._replace(group={**facts.group, "amsgrad": False})).precondition
