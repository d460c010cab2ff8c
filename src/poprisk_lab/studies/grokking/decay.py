"""The gate with its weight decay gated as well: a control, for what decay does behind the gate."""

from __future__ import annotations

from typing import Any, final

import torch
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.replay import last_mask


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
            mask = last_mask(p, self.optimizer.state[p], group)
            p.sub_(float(group["lr"]) * self.weight_decay * mask * start)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict)
        self.param_groups = self.optimizer.param_groups
