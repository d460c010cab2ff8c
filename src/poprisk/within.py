r"""The variance of the batch-mean gradient from within one batch.

A batch of b examples is seen in J parts of :math:`b_j` examples, whose gradients add up,
:math:`g = \sum_j \delta_j`; part j alone estimates g by :math:`\delta_j b / b_j`. Then

.. math:: \frac{b \sum_j \delta_j^2 / b_j - g^2}{J - 1}

is an unbiased estimate of the variance of g for independent examples [ours]. Parts of one example
give :math:`\Sigma_B/(b-1)` exactly; accumulation steps or ranks are larger parts.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast, final

import torch
from torch import Tensor

from poprisk.checks import examples as checks
from poprisk.factors import capture
from poprisk.factors.moments import not_negative, squared
from poprisk.variance import GivenVariances

SCALED_TOLERANCE = 1e-2
"""Relative deviation from a common factor, beyond rounding, at which gradients count as changed."""

PROBE = 4096
"""Entries of a gradient, roughly, in which changes before the step are looked for."""


@dataclass
class _Noted:
    """What is known of one parameter's gradient.

    Attributes:
        squares: sum of the squared shares, each divided by its number of examples.
        grad: the tensor that held the gradient after the last part.
        version: of that tensor.
        probe: some of its entries then.
        whole: whether these are all; where a selection would hold zeros only.
        copy: all of them, where the next part is a difference.
    """

    squares: Tensor
    grad: Tensor
    version: int
    probe: Tensor
    whole: bool
    copy: Tensor | None

    def holds(self, grad: Tensor) -> bool:
        """Whether a gradient is the one that was noted, unchanged."""
        return grad is self.grad and grad._version == self.version


@final
class BatchParts:
    """What the parts of one batch have shown so far; one for each optimizer.

    Args:
        params: the optimizer's parameters, by name or position.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self._noted: dict[Tensor, _Noted] = {}
        self._used: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}
        self._restart()

    def reset(self) -> None:
        """Start a new batch after gradients were cleared."""
        self._restart()
        self._used.clear()

    def use(self) -> None:
        """Start a new batch after a step; gradients are still to be cleared."""
        grads = {p: p.grad for p in self._noted if p.grad is not None}
        self._used = {p: (weakref.ref(g), g._version + 1) for p, g in grads.items()}
        self._restart()

    def _restart(self) -> None:
        self.examples = 0
        self.parts = 0
        self._share: float | None = None
        self._noted.clear()

    def backward(self, losses: Tensor, weight: float) -> None:
        """Add ``weight`` times the mean gradient to ``.grad``, and note each example's share.

        Args:
            losses: (b,), one per example.
            weight: share of these examples in the batch.

        Raises:
            TypeError, ValueError: if the losses are not one per example, for at least two.
            RuntimeError: if ``.grad`` holds something that is no part of this batch.
        """
        checks.check_losses(losses)
        self._restart_if_cleared()
        share, before = weight / len(losses), self._share
        checks.check_same_share(before is None or math.isclose(share, before, rel_tol=1e-6))
        self._share = share
        factors = capture(losses * share, self.params)
        for name in factors.terms:
            self._check_untouched(self.params[name])
        for name, sums, squares in factors.each_moments():
            p = self.params[name]
            if p.grad is None:
                p.grad = sums.to(p.dtype)
            else:
                p.grad.add_(sums)
            self._note(p, squares)
        self.examples += len(losses)
        self.parts += len(losses)

    @torch.no_grad()
    def part(self, size: int) -> None:
        """Note what the last backward pass added to ``.grad``, for ``size`` examples.

        Raises:
            RuntimeError: if there was no or more than one backward pass since the last part.
        """
        self._restart_if_cleared()
        changes = [self._changes(p) for p in self.params.values() if p.grad is not None]
        checks.check_some_backward(any(changes))
        for p in self.params.values():
            if p.grad is None:
                continue
            noted, share = self._noted.get(p), p.grad
            if noted is not None and noted.copy is not None:
                share = p.grad - noted.copy
            self._note(p, squared(share).div_(size), p.grad.clone())
        self.examples += size
        self.parts += 1

    def variances(self, params: Sequence[Tensor]) -> GivenVariances:
        """The variance of each gradient; a factor since (clipping by norm, unscaling) counts.

        Raises:
            RuntimeError: unless gradients are the sum of at least two parts, up to a factor.
        """
        checks.check_parts(self.parts)
        checks.check_seen(all(p in self._noted for p in params))
        factors = {p: self._factor(p) for p in params}
        return {p: partial(self._variance, p, factor) for p, factor in factors.items()}

    @torch.no_grad()
    def _variance(self, p: Tensor, factor: float) -> Tensor:
        total = self._noted[p].squares * (self.examples * factor**2)
        return not_negative((total - squared(_grad(p))) / (self.parts - 1))

    def _factor(self, p: Tensor) -> float:
        noted, grad = self._noted[p], _grad(p)
        # Not by version: GradScaler and writes through ``.data`` leave it as it was.
        return _common_factor(_probe(grad, whole=noted.whole), noted.probe)

    def _changes(self, p: Tensor) -> int:
        """Backward passes, 0 or 1, that added to ``.grad`` since the last part.

        Raises:
            RuntimeError: if there were more, or gradients of the last step are still in there.
        """
        grad, noted = _grad(p), self._noted.get(p)
        if noted is None:
            checks.check_fresh(self._used.get(p) != (weakref.ref(grad), grad._version))
            return 1
        checks.check_one_backward(grad is noted.grad, grad._version - noted.version)
        return grad._version - noted.version

    def _note(self, p: Tensor, squares: Tensor, copy: Tensor | None = None) -> None:
        grad = _grad(p)
        if p in self._noted:
            squares = squares.add_(self._noted[p].squares)
        probe = _probe(grad)
        whole = not bool(probe.any())
        if whole:
            probe = _probe(grad, whole=True)
        self._noted[p] = _Noted(squares, grad, grad._version, probe, whole, copy)

    def _check_untouched(self, p: Tensor) -> None:
        """Raise RuntimeError if ``.grad`` holds something that is no part of this batch."""
        if p.grad is None:
            return
        noted = self._noted.get(p)
        if noted is None:
            checks.check_fresh(not bool(p.grad.any()))
        else:
            checks.check_same_grad(noted.holds(p.grad))

    def _restart_if_cleared(self) -> None:
        """A batch whose step was skipped leaves its parts behind; its gradients are gone."""
        if any(p.grad is None for p in self._noted):
            self.reset()


def _grad(p: Tensor) -> Tensor:
    return cast(Tensor, p.grad)


def _probe(grad: Tensor, *, whole: bool = False) -> Tensor:
    """A copy of some thousands of entries, or of all."""
    flat = grad.flatten()
    return flat[:: 1 if whole else max(1, flat.numel() // PROBE)].clone()


def _common_factor(after: Tensor, before: Tensor) -> float:
    """The number that a gradient was multiplied by.

    Raises:
        RuntimeError: if not all of it was multiplied by the same.
    """
    if torch.equal(after, before):
        return 1.0
    then, now = (torch.view_as_real(x) if x.is_complex() else x for x in (before, after))
    then, now = then.double(), now.double()
    norm = float(torch.linalg.vector_norm(then))
    factor = float(torch.linalg.vector_norm(now)) / norm if norm > 0 else 1.0
    rest = float(torch.linalg.vector_norm(now - factor * then))
    checks.check_only_scaled(rest <= SCALED_TOLERANCE * factor * norm)
    return factor
