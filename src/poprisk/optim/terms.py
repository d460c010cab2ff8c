r"""The gradients of a loss's terms, as backward passes add them up.

What the optimizer needs of them beside their sum is :math:`h = \sum_k \sqrt{\rho_k}\, g_k`
(:mod:`poprisk.optim.sizes`). A term's gradient is what its backward pass leaves in ``.grad`` when
it finds nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from poprisk.dtensor import processes
from poprisk.optim.gradient_probe import GradientProbe
from poprisk.optim.state import check_dense
from poprisk.optim.update import state_dtype
from poprisk.per_sample.visible import check_whole

HOW = 'compute each by "with optimizer.term(name): loss.backward()", and nothing outside'


@final
class TermGradients:
    """What the terms of one step have shown so far; one for each optimizer."""

    def __init__(self) -> None:
        self.open: str | None = None
        self._seen: dict[Tensor, GradientProbe] = {}
        self._weighted: dict[Tensor, Tensor] = {}

    def reset(self) -> None:
        """Start a new step.

        Raises:
            RuntimeError: within a term.
        """
        self.check_closed("zero_grad()")
        self._seen.clear()
        self._weighted.clear()

    def check_closed(self, what: str) -> None:
        """Raise RuntimeError within a term."""
        if self.open is not None:
            raise RuntimeError(
                f"{what} was called within optimizer.term({self.open!r}), where only a backward "
                "pass belongs; call it outside."
            )

    @contextmanager
    def term(self, name: str, charges: Mapping[Tensor, float]) -> Iterator[None]:
        """Whatever ``.grad`` gains within is the gradient of this term; it is added to the rest.

        Args:
            name: of the term.
            charges: what is charged of its variance, for each parameter that is told of terms.

        Raises:
            RuntimeError: if gradients are of something else; ``.grad`` is then as before, as it is
                if the block raises an error.
        """
        self.check_closed(f"optimizer.term({name!r})")
        _check_seen_whole(charges)
        self._restart_if_cleared()
        for p in charges:
            self._check_untouched(p)
        before = {p: p.grad for p in charges}
        self.open = name
        try:
            for p in charges:
                p.grad = None
            yield
            check_dense([p.grad for p in charges if p.grad is not None])
        except BaseException:
            for p, grad in before.items():
                p.grad = grad
            raise
        finally:
            self.open = None
        for p, grad in before.items():
            self._add(p, grad, charges[p])

    @torch.no_grad()
    def _add(self, p: Tensor, before: Tensor | None, charge: float) -> None:
        own = p.grad
        if own is None:
            p.grad = before
            return
        if charge > 0:
            share = own.detach().to(state_dtype(p)) * charge**0.5
            self._weighted[p] = self._weighted[p].add_(share) if p in self._weighted else share
        total = own if before is None else before.add_(own)
        p.grad = total
        self._seen[p] = GradientProbe.of(total)

    @torch.no_grad()
    def weighted(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The vector h of these parameters; a factor since (clipping, unscaling) counts.

        Raises:
            RuntimeError: unless their gradients are the sum of the terms', up to a factor.
        """
        if missing := sum(p not in self._seen for p in params):
            raise RuntimeError(
                f"{missing} of {len(params)} gradients of this step are not of a term of the loss, "
                f"which batch_size and dataset_size by term need: {HOW}."
            )
        factors = {p: self._seen[p].factor(p.grad) for p in params if p.grad is not None}
        return {
            p: self._weighted[p] * factor
            if p in self._weighted
            else torch.zeros_like(p, dtype=state_dtype(p))
            for p, factor in factors.items()
        }

    def _restart_if_cleared(self) -> None:
        """A step that was given up leaves its terms behind; its gradients are gone."""
        grads = [p.grad for p in self._seen if p.grad is not None]
        if len(grads) < len(self._seen) or not any(bool(grad.any()) for grad in grads):
            self.reset()

    def _check_untouched(self, p: Tensor) -> None:
        """Raise RuntimeError if ``.grad`` holds something that is of no term of this step."""
        if p.grad is None:
            return
        if p not in self._seen:
            if bool(p.grad.any()):
                raise RuntimeError(
                    "gradients are left from before this step's first term, or are of no term: "
                    f"call optimizer.zero_grad() after each step, and {HOW}."
                )
        elif not self._seen[p].holds(p.grad):
            raise RuntimeError(
                "gradients were changed between two terms of a step: clip or unscale them once, "
                f"after the last term, and {HOW}."
            )


def _check_seen_whole(params: Mapping[Tensor, float]) -> None:
    """Raise where what a backward pass leaves is not the gradient of one term alone."""
    if processes() > 1:
        raise RuntimeError(
            "optimizer.term() sees gradients of one process alone, but there are "
            f"{processes()}: give batch_size and dataset_size as one number for all terms."
        )
    named = {str(i): p for i, p in enumerate(params)}
    check_whole(named, "what a term adds to its gradient is not seen whole")
    if any(p._post_accumulate_grad_hooks for p in params):
        raise RuntimeError(
            "a parameter has a hook by register_post_accumulate_grad_hook(), which may step or "
            "change gradients within the backward pass of a term: remove it, or give batch_size "
            "and dataset_size as one number for all terms."
        )
