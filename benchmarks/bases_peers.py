"""The optimizers of ``benchmarks/bases.py``, each from a model, its sizes and a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_optimizer as peers
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk_lab.arms import muon_groups

Sizes = Mapping[str, int]
LARGEST = 512
"""The largest side that is rotated, alike for all that rotate."""
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


class VarianceAdaptedMuon(peers.Muon):
    r"""Muon of the momentum over its noise, before it is made orthogonal.

    With the gradient's variance :math:`\Gamma` around the average before it,
    :math:`\tilde M / \sqrt{\tilde M^2 + \gamma \hat\Gamma}` (``ratio``, Muon-NSR) or
    :math:`\tilde M / \sqrt{\hat\Gamma}` (``variance``, Muon-VS) takes the place of Nesterov's
    momentum. Source: Li, Fan and Li, arXiv:2601.14603.

    Args:
        groups: of :func:`poprisk_lab.arms.muon_groups`, without momentum: the average is kept here.
        noise: which of the two.
        beta: decay of the average.
        gamma: of the ratio.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, noise: str, beta: float = 0.95, gamma: float = 10.0
    ) -> None:
        super().__init__(groups, nesterov=False)
        self.noise, self.beta, self.gamma = noise, beta, gamma
        self.averages: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Muon's step with the adapted momentum handed in as the gradient."""
        self.taken += 1
        kept: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            if group["use_muon"]:
                for p in group["params"]:
                    kept[p] = p.grad
                    p.grad = self._adapted(p, p.grad)
        found = super().step(closure)
        for p, grad in kept.items():
            p.grad = grad
        return found

    def _adapted(self, p: Tensor, grad: Tensor) -> Tensor:
        beta = self.beta
        m, gamma = self.averages.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
        gamma.mul_(beta).add_((m - grad).square(), alpha=beta * (1 - beta))
        m.lerp_(grad, 1 - beta)
        correction = 1 - beta**self.taken
        ahead = grad + beta / (1 - beta) * m / correction
        variance = gamma / correction
        of = ahead.square() + self.gamma * variance if self.noise == "ratio" else variance
        return ahead / (of + 1e-8).sqrt()


def _adapted_muon(
    model: nn.Module, _: Sizes, *, noise: str, lr: float, weight_decay: float = 0.01
) -> Optimizer:
    groups = muon_groups(model, momentum=0.0, lr=lr, weight_decay=weight_decay, **ADAM)
    return VarianceAdaptedMuon(groups, noise=noise)


def _free(model: nn.Module, _: Sizes, **setting: Any) -> Optimizer:
    optimizer = peers.ScheduleFreeAdamW(model.parameters(), **setting)
    optimizer.train()
    return optimizer


BUILD: dict[str, Callable[..., Optimizer]] = {
    "rotated gate": lambda model, sizes, **s: PopRiskSOAP(model, max_dim=LARGEST, **sizes, **s),
    "basis alone": lambda model, sizes, **s: PopRiskSOAP(
        model, gate=False, max_dim=LARGEST, **sizes, **s
    ),
    "coordinate gate": lambda model, sizes, **s: PopRiskAdamW(model, **sizes, **s),
    "AdamW": lambda model, _, **s: AdamW(model.parameters(), **s),
    "SOAP": lambda model, _, **s: peers.SOAP(model.parameters(), max_precondition_dim=LARGEST, **s),
    "Muon": lambda model, _, **s: peers.Muon(muon_groups(model, **ADAM, **s)),
    "Muon-NSR": _adapted_muon,
    "Magma": lambda model, _, **s: peers.Magma(AdamW(model.parameters(), **s)),
    "Ano": lambda model, _, **s: peers.Ano(model.parameters(), **s),
    "schedule-free AdamW": _free,
}
