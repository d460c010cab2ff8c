"""Controls: what a gated run is compared with to tell the gate from a smaller step.

``ShuffledMask`` keeps the values of the mask and destroys where they sit; ``RmsMatched`` takes
the ungated update at the RMS that the gated run had at the same step. A gate that does no more
than cut the step size ties with them.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from poprisk.optim.gate import MASKS_, Mask, TensorList
from poprisk.optim.settings import decay_of
from poprisk.optim.wrapper import rewrite_step


@final
class ShuffledMask:
    """A mask whose values are permuted at random over each tensor, anew at every step.

    Args:
        mask: name of the mask to shuffle; permutations come from torch's global generator.
    """

    def __init__(self, mask: str) -> None:
        self.name = mask
        self.mask: Mask = MASKS_[mask]

    def __repr__(self) -> str:
        return f"shuffled {self.name}"

    def __call__(
        self,
        mean_sq: TensorList,
        var: TensorList,
        *,
        alpha: float,
        softness: float,
        eps: float,
        var_scale: float,
    ) -> TensorList:
        """The permuted masks of a list of tensors."""
        q = self.mask(mean_sq, var, alpha=alpha, softness=softness, eps=eps, var_scale=var_scale)
        return [self._permute(x) for x in q]

    def _permute(self, q: Tensor) -> Tensor:
        return q.flatten()[torch.randperm(q.numel(), device=q.device)].view_as(q)


class UpdateTrace:
    """RMS of the update of each tensor at each step, decoupled weight decay left out.

    Attributes:
        rms: one list of floats a step, one entry a tensor, in the optimizer's order.
    """

    def __init__(self, rms: list[list[float]] | None = None) -> None:
        self.rms = rms if rms is not None else []

    def record_step(self, optimizer: Optimizer) -> None:
        """Let ``optimizer`` take its step and record the RMS of what it did."""
        starts = decayed(optimizer)
        optimizer.step()
        self._record(optimizer, starts)

    def follow(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Record every step that another, a Trainer say, lets ``optimizer`` take from now on.

        Returns:
            Handles whose ``remove()`` ends it.
        """
        starts: TensorList = []

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            starts[:] = decayed(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._record(optimizer, starts)

        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def _record(self, optimizer: Optimizer, starts: TensorList) -> None:
        params = [p for g in optimizer.param_groups for p in g["params"]]
        moved = torch.stack([rms(p.detach() - s) for p, s in zip(params, starts, strict=True)])
        self.rms.append(moved.tolist())


def decayed(optimizer: Optimizer) -> TensorList:
    """What decoupled weight decay alone would make of the parameters."""
    return [
        p.detach() * (1 - float(g["lr"]) * decay_of(g, p))
        for g in optimizer.param_groups
        for p in g["params"]
    ]


def rms(t: Tensor) -> Tensor:
    """Root mean square of all entries, float64."""
    return t.double().square().mean().sqrt()


@final
class RmsMatched(Optimizer):
    """An optimizer whose update of each tensor is scaled to a recorded RMS, step by step.

    Args:
        optimizer: takes the step whose direction is used.
        trace: RMS of each tensor's update at each step; once it is used up, updates are zero.
    """

    def __init__(self, optimizer: Optimizer, trace: UpdateTrace) -> None:
        self.optimizer = optimizer
        self.trace = trace
        self.steps = 0
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("optimizer", "trace", "steps")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Perform one step."""
        params = [p for g in self.param_groups for p in g["params"]]
        recorded = (
            self.trace.rms[self.steps] if self.steps < len(self.trace.rms) else [0.0] * len(params)
        )
        target = {id(p): value for p, value in zip(params, recorded, strict=True)}

        def rescale(p: Tensor, update: Tensor) -> Tensor:
            size = rms(update)
            return update * (target[id(p)] / size if size > 0 else size)

        rewrite_step(self.optimizer, rescale)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and the position in the trace."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        self.steps = state_dict["steps"]
