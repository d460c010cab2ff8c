"""Which classes and which modules memorize the labels that were planted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from poprisk.audit import Auditor, AuditResult, Rate
from poprisk.audit.planted import Planted
from poprisk.evaluation import evaluating
from poprisk_lab.audit.training import Training

GROUPS = 8
"""Parts of the planted labels, between which a figure of a module varies by chance."""
FEWEST = 2 * GROUPS
"""Planted labels below which modules are not told apart."""
MOST_PARAMETERS = 4_000_000
"""Of a network whose modules are told apart: a gradient is kept for each part."""
MOST = 512
"""Planted labels that modules are judged by."""
FEWEST_OF_CLASS = 10
"""Planted labels below which nothing is said of a class."""


def by_class(auditor: Auditor, result: AuditResult) -> dict[int, Rate]:
    """Memorization of the planted labels, by the class that was given before.

    Of classes with fewer than ``FEWEST_OF_CLASS`` of them nothing is said.
    """
    planted = auditor.planted
    if planted is None or planted.classes is None:
        return {}
    seen = torch.from_numpy(result.rank >= 0)
    values = planted.repeated(torch.from_numpy(result.predictions), seen)
    counted = planted.changed & seen[planted.index]
    found = dict[int, Rate]()
    for k in range(planted.classes):
        mine = values[counted & (planted.original == k)]
        if len(mine) >= FEWEST_OF_CLASS:
            found[k] = Rate(float(mine.mean()), float(mine.std()) / math.sqrt(len(mine)))
    return found


class ModuleShare(NamedTuple):
    """What a module has added to the memorization of planted labels.

    Attributes:
        name: of the module in the network.
        kind: its class.
        shape: of its weight.
        value: memorization that its own steps have added.
        standard_error: of it, from planted label to planted label.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    value: float
    standard_error: float


@final
class ModuleShares:
    r"""Splits the change of memorization along a training over the modules.

    .. math:: \Delta_m = \sum_e \tfrac12\big\langle \nabla_m M(\theta_e)+\nabla_m M(\theta_{e+1}),
              \theta_{e+1,m}-\theta_{e,m}\big\rangle

    with M the memorization of planted labels in evaluation mode and :math:`\theta_e` the weights
    after e epochs [ours]: the sum over modules is the change of M up to the error of the trapezoid
    rule, which :meth:`found` tells. It costs a gradient over at most ``MOST`` planted labels an
    epoch, of two classes over as many that stayed, too.

    Args:
        training: whose network is watched.
        auditor: whose planted labels.
    """

    def __init__(self, training: Training, auditor: Auditor) -> None:
        self.training = training
        self.modules = {
            name: [p for p in module.parameters(recurse=False) if p.requires_grad]
            for name, module in training.model.named_modules()
        }
        self.modules = {name: own for name, own in self.modules.items() if own}
        self.groups = self._groups(auditor)
        self.shares = torch.zeros(len(self.groups), len(self.modules), dtype=torch.float64)
        self.first = self.last = torch.zeros(len(self.groups), dtype=torch.float64)
        self.weights, self.gradients = list[Tensor](), list[list[Tensor | None]]()

    def _groups(self, auditor: Auditor) -> list[tuple[Tensor, Planted]]:
        """Parts of the planted labels, with the examples that they are measured on."""
        size = sum(p.numel() for own in self.modules.values() for p in own)
        if (planted := auditor.planted) is None or size > MOST_PARAMETERS:
            return []
        generator = torch.Generator().manual_seed(0)
        index = planted.index[planted.changed]
        index = index[torch.randperm(len(index), generator=generator)[:MOST]]
        if len(index) < FEWEST:
            return []
        stayed = auditor.items.labelled.clone()
        stayed[planted.index] = False
        others = stayed.nonzero().squeeze(1)
        others = others[torch.randperm(len(others), generator=generator)[: len(index)]]
        others = others if planted.classes == 2 else others[:0]
        parts = [torch.cat([index[g::GROUPS], others[g::GROUPS]]) for g in range(GROUPS)]
        return [(rows, planted.among(rows)) for rows in parts]

    def note(self) -> None:
        """Take in the weights as they are now, before the first epoch and after each."""
        if not self.groups:
            return
        own = [p for params in self.modules.values() for p in params]
        weights = [p.detach().clone() for p in own]
        with evaluating(self.training.model), torch.enable_grad():
            values = [self._memorization(*group) for group in self.groups]
            gradients = [torch.autograd.grad(v, own, allow_unused=True) for v in values]
        self.last = torch.stack(values).detach().double()
        if not self.weights:
            self.first = self.last
        else:
            for g in range(GROUPS):
                self.shares[g] += self._added(self.gradients[g], gradients[g], weights)
        self.weights = weights
        self.gradients = [list[Tensor | None](found) for found in gradients]

    def _memorization(self, rows: Tensor, planted: Planted) -> Tensor:
        training = self.training
        outputs = training.scale.restored(training.model(training.inputs[rows])).cpu()
        found = outputs[:, None] if planted.classes is None else outputs.float().softmax(1)
        seen = torch.ones(len(rows), dtype=torch.bool)
        return planted.repeated(found, seen).mean()

    def _added(
        self,
        old: Sequence[Tensor | None],
        new: Sequence[Tensor | None],
        weights: Sequence[Tensor],
    ) -> Tensor:
        """What the steps of each module have added since the last time, (modules,)."""
        parts = [
            0.0 if a is None or b is None else float(((a + b) / 2 * (now - before)).sum())
            for a, b, before, now in zip(old, new, self.weights, weights, strict=True)
        ]
        ends = [0, *accumulate(len(params) for params in self.modules.values())]
        return torch.tensor([sum(parts[i:j]) for i, j in pairwise(ends)], dtype=torch.float64)

    def found(self) -> dict[str, Any] | None:
        """In JSON values: the shares, and the change of memorization that they add up to."""
        if not self.groups:
            return None
        sizes = torch.tensor([float(len(planted.index)) for _, planted in self.groups]).double()
        sizes /= sizes.sum()
        mean = (sizes @ self.shares).tolist()
        error = (self.shares.std(0) / math.sqrt(GROUPS)).tolist()
        rows = zip(self.modules.items(), mean, error, strict=True)
        kinds = {
            name: type(module).__name__ for name, module in self.training.model.named_modules()
        }
        return {
            "planted": sum(len(planted.index) for _, planted in self.groups),
            "change": float(sizes @ (self.last - self.first)),
            "shares": [
                ModuleShare(name, kinds[name], tuple(params[0].shape), value, se)._asdict()
                for (name, params), value, se in rows
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """For a training that is resumed."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit."""
        for name in STATE:
            setattr(self, name, state[name])
        device = next(self.training.model.parameters()).device  # not that of a checkpoint
        self.weights = [w.to(device) for w in self.weights]
        self.gradients = [
            [None if g is None else g.to(device) for g in of] for of in self.gradients
        ]


STATE = ("shares", "first", "last", "weights", "gradients")
"""What :class:`ModuleShares` keeps from epoch to epoch."""
