"""PRM's update as published, one tensor at a time: what the gate costs when written plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


@final
class PublishedUpdate(Optimizer):
    r"""Algorithm 1 of [LG] with the snr mask, the default of its authors, in eager operations.

    Not for training: it has the cold start and the threshold that ``mode="auto"`` mends. Written
    from the paper's equations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rho: float = 0.99,
        softness: float = 1.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "rho": rho, "softness": softness})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; closures are not supported."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self.state[p], group)
        return None


def _update(w: Tensor, g: Tensor, state: dict[str, Any], c: dict[str, Any]) -> None:
    if not state:
        state.update({key: torch.zeros_like(w) for key in ("m", "v", "s")}, t=0)
    state["t"] += 1
    m, v, s, t = state["m"], state["v"], state["s"], state["t"]
    beta1, beta2 = c["betas"]
    d = g - m
    s.mul_(c["rho"]).addcmul_(d, d, value=1 - c["rho"])
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    m_hat, v_hat, s_hat = m / (1 - beta1**t), v / (1 - beta2**t), s / (1 - c["rho"] ** t)
    square = m_hat.square()
    q = square / (square + c["softness"] * s_hat + c["eps"])
    w.mul_(1 - c["lr"] * c["weight_decay"])
    w.sub_(c["lr"] * q * m_hat / (v_hat.sqrt() + c["eps"]))
