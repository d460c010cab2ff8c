r"""Exact statistics of the per-example gradients behind one step, pooled over parts and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poprisk.checks import risk as inputs
from poprisk.checks.examples import check_separate
from poprisk.evaluation import Forward
from poprisk.factors import capture
from poprisk.update import CHUNK

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]


class ModuleSignal(NamedTuple):
    r"""Sums over the coordinates of one module.

    Attributes:
        mean_square: :math:`\sum\mu^2`.
        variance: :math:`\sum\Sigma_B/(b-1)`, what the batch mean has of noise.
        passed: :math:`\sum(\mu^2-\Sigma_B/(b-1))_+`.
    """

    mean_square: float
    variance: float
    passed: float


class Statistics:
    """Loss, number of examples, and sums and squares of their gradients by parameter.

    Args:
        params: by name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.checked = False
        self.clear()

    def clear(self) -> None:
        """Forget all examples."""
        self.examples, self.loss = 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def add(
        self, model: nn.Module, loss: PerExampleLoss, forward: Forward, x: Any, y: Tensor
    ) -> None:
        """Add the examples of a batch, at the present weights."""
        with torch.enable_grad():
            outputs = forward(model, x)
            losses = inputs.check_losses(loss(outputs, y), outputs)
            if not self.checked:
                check_separate(loss, outputs, y, losses)
                self.checked = True
            moments = capture(losses, self.params).moments()
        self.examples += len(losses)
        self.loss += float(losses.detach().double().sum())
        for mine, theirs in ((self.sums, moments.sums), (self.squares, moments.squares)):
            for name, value in theirs.items():
                mine[name] = mine[name] + value if name in mine else value

    def pooled(self) -> Statistics:
        """The sum over all ranks; takes part in the collective even if it has nothing to add."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        device = next(iter(self.params.values())).device
        counts = torch.tensor([self.examples, self.loss], dtype=torch.float64)
        found = Statistics(self.params)
        total = _summed(counts.to(device, torch.float32)).tolist()
        found.examples, found.loss = round(total[0]), total[1]
        for mine, theirs in ((self.sums, found.sums), (self.squares, found.squares)):
            for name, param in self.params.items():
                value = mine.get(name, torch.full_like(param, math.nan))
                theirs[name] = _summed(value.detach().clone())
        return found

    def signals(self) -> dict[str, ModuleSignal]:
        r"""The sums by module (a parameter's name without its last part).

        With S and Q the sums over examples of gradients and of their squares,
        :math:`\mu^2-\Sigma_B/(b-1)` is the U-statistic :math:`(S^2-Q)/(b(b-1))`.
        """
        rows: dict[str, Tensor] = {}
        for name, total in self.sums.items():
            module = name.rpartition(".")[0] or name
            row = _square_sums(total.flatten(), self.squares[name].flatten(), self.examples)
            rows[module] = rows[module] + row if module in rows else row
        pairs = self.examples * (self.examples - 1)
        found = {}
        for module, row in rows.items():
            square, spread, passed = row.tolist()
            variance = max(spread / pairs, 0.0)
            found[module] = ModuleSignal(square / self.examples**2, variance, passed / pairs)
        return found


def _square_sums(total: Tensor, squares: Tensor, examples: int) -> Tensor:
    """Sums of S², Q-S²/b and (S²-Q)₊ over the coordinates of one parameter, float64.

    Differences are taken coordinate by coordinate: sums would lose a small variance.
    """
    rows = []
    for s, q in zip(total.split(CHUNK), squares.split(CHUNK), strict=True):
        spread = torch.addcmul(q, s, s, value=-1 / examples)
        signal = torch.addcmul(q, s, s, value=-1).clamp_max_(0)
        rows.append(torch.stack([s.dot(s), spread.sum(), -signal.sum()]))
    return torch.stack(rows).sum(0, dtype=torch.float64)


def _summed(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value
