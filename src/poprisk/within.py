r"""The variance of the batch-mean gradient from within one batch.

A batch of b examples is seen in J parts of :math:`b_j` examples, whose gradients add up,
:math:`g = \sum_j \delta_j`; part j alone estimates g by :math:`\delta_j b / b_j`. Then

.. math:: \frac{b \sum_j \delta_j^2 / b_j - g^2}{J - 1}

is an unbiased estimate of the variance of g for independent examples [ours]. Parts of one example
give :math:`\Sigma_B/(b-1)` exactly; accumulation steps or ranks are larger parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from poprisk.checks import examples as checks
from poprisk.factors import capture
from poprisk.factors.moments import not_negative, squared

SCALED_TOLERANCE = 1e-2
"""Relative deviation from a common factor, beyond rounding, at which gradients count as changed."""


class _Seen(NamedTuple):
    """A gradient as the last part left it."""

    grad: Tensor
    version: int
    copy: Tensor


@final
class BatchParts:
    """What the parts of one batch have shown so far; one for each optimizer.

    Args:
        params: the optimizer's parameters, by name or position.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.reset()

    def reset(self) -> None:
        """Start a new batch."""
        self.examples = 0
        self.parts = 0
        self._squares: dict[Tensor, Tensor] = {}
        self._seen: dict[Tensor, _Seen] = {}

    def backward(self, losses: Tensor, weight: float) -> None:
        """Add ``weight`` times the mean gradient to ``.grad``, and note each example's share.

        Args:
            losses: (b,), one per example.
            weight: share of these examples in the batch.

        Raises:
            TypeError, ValueError: if the losses are not one per example, for at least two.
        """
        checks.check_losses(losses)
        self._restart_if_cleared()
        factors = capture(losses, self.params)
        moments = factors.moments()
        scale = weight / len(losses)
        for name in factors.terms:
            p = self.params[name]
            self._check_untouched(p)
            share = moments.sums[name].mul_(scale).to(p.dtype)
            if p.grad is None:
                p.grad = share
            else:
                p.grad.add_(share)
            self._note(p, moments.squares[name].mul_(scale * scale))
        self.examples += len(losses)
        self.parts += len(losses)

    @torch.no_grad()
    def part(self, size: int) -> None:
        """Note what the last backward pass added to ``.grad``, for ``size`` examples.

        Raises:
            RuntimeError: if there was no or more than one backward pass since the last part.
        """
        self._restart_if_cleared()
        for p in self.params.values():
            if p.grad is None:
                continue
            seen = self._seen.get(p)
            if seen is not None:
                checks.check_one_backward(p.grad is seen.grad, p.grad._version - seen.version)
            share = p.grad if seen is None else p.grad - seen.copy
            self._note(p, squared(share).div_(size))
        self.examples += size
        self.parts += 1

    def check(self, params: Iterable[Tensor]) -> None:
        """Raise RuntimeError unless gradients are the sum of at least two parts, up to a factor."""
        checks.check_parts(self.parts)
        for p in params:
            if p.grad is not None:
                checks.check_seen(p in self._seen)
                self._factor(p)

    @torch.no_grad()
    def mean_var(self, params: list[Tensor]) -> list[Tensor]:
        """The variance of each gradient; a factor since (clipping by norm, unscaling) counts."""
        return [self._mean_var(p) for p in params]

    def _mean_var(self, p: Tensor) -> Tensor:
        factor = self._factor(p)
        total = self._squares[p] * (self.examples * factor**2)
        return not_negative((total - squared(self._grad(p))) / (self.parts - 1))

    def _factor(self, p: Tensor) -> float:
        seen, grad = self._seen[p], self._grad(p)
        unchanged = grad is seen.grad and grad._version == seen.version
        return 1.0 if unchanged else _common_factor(grad, seen.copy)

    @staticmethod
    def _grad(p: Tensor) -> Tensor:
        return cast(Tensor, p.grad)

    def _note(self, p: Tensor, squares: Tensor) -> None:
        grad = self._grad(p)
        if p in self._squares:
            self._squares[p] += squares
            copy = self._seen[p].copy.copy_(grad)
        else:
            self._squares[p] = squares
            copy = grad.clone()
        self._seen[p] = _Seen(grad, grad._version, copy)

    def _check_untouched(self, p: Tensor) -> None:
        """Raise RuntimeError if ``.grad`` holds something that is no part of this batch."""
        if p.grad is None:
            return
        seen = self._seen.get(p)
        if seen is None:
            checks.check_fresh(not bool(p.grad.any()))
        else:
            checks.check_same_grad(p.grad is seen.grad and p.grad._version == seen.version)

    def _restart_if_cleared(self) -> None:
        """A batch whose step was skipped leaves its parts behind; its gradients are gone."""
        if any(p.grad is None for p in self._seen):
            self.reset()


def _common_factor(after: Tensor, before: Tensor) -> float:
    """The number that a gradient was multiplied by.

    Raises:
        RuntimeError: if not all of it was multiplied by the same.
    """
    now, then = after.double().flatten(), before.double().flatten()
    norm = float(torch.linalg.vector_norm(then))
    factor = float(torch.linalg.vector_norm(now)) / norm if norm > 0 else 1.0
    rest = float(torch.linalg.vector_norm(now - factor * then))
    checks.check_only_scaled(rest <= SCALED_TOLERANCE * factor * norm)
    return factor
