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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast, final

import torch
from torch import Tensor

from poprisk.dtensor import processes
from poprisk.optim.gradient_probe import GradientProbe
from poprisk.optim.kronecker import Rotation
from poprisk.optim.state import check_dense
from poprisk.optim.variance import GivenVariances, check_batch_losses
from poprisk.per_sample import Factors, capture, shaped
from poprisk.per_sample.graph import leaves_of
from poprisk.per_sample.moments import energy, moments, not_negative, squared, squares_of, total
from poprisk.per_sample.terms import Term
from poprisk.per_sample.visible import check_whole

LEFT_OVER = (
    "gradients are left from before this batch; call optimizer.zero_grad() before "
    "optimizer.backward(losses), and use no other backward pass with it."
)


class Bases(Protocol):
    """In which basis each parameter's variance is wanted, of an optimizer that keeps some."""

    def check_kept(self) -> None:
        """Raise RuntimeError if a basis is not the one in which parts of this batch were noted."""
        ...

    def seen(self, p: Tensor, terms: list[Term], share: float) -> None:
        """Take up the shares of the examples in the mean gradient; ``share`` is one example's."""
        ...

    def rotation(self, p: Tensor) -> Rotation | None:
        """The basis of a parameter; None: its coordinates."""
        ...

    def rotates(self, p: Tensor) -> bool:
        """Whether a parameter gets a basis, if it has none yet."""
        ...

    def turned(self, p: Tensor) -> Tensor:
        """The present gradient in that basis."""
        ...

    def restart(self) -> None:
        """Forget the shares: a new batch starts."""
        ...


class Turned(NamedTuple):
    """A gradient in a basis, from the factors of its examples.

    Attributes:
        grad: it. Of the variance, which rounds as it does, it is the mean.
        for_step: whether a step takes it; else one turns the gradient, which is the same work with
            and without a gate.
    """

    grad: Tensor
    for_step: bool

    def plus(self, other: Turned) -> Turned:
        """The sum of the gradients of two parts."""
        return Turned(self.grad + other.grad, self.for_step and other.for_step)


class _Share(NamedTuple):
    """What some examples add to one parameter's gradient.

    Attributes:
        grad: their share, autograd's own.
        squares: sum of the squares of each example's, in the parameter's basis; None: not wanted.
        turned: the share in that basis; None where it was not turned.
    """

    grad: Tensor
    squares: Tensor | None
    turned: Turned | None = None


@dataclass
class _Noted:
    """What is known of one parameter's gradient.

    Attributes:
        squares: sum of the squared shares, each divided by its number of examples; None: not
            wanted when the batch began.
        turned: the gradient in its basis, where shares gave it.
        grad: the tensor that held the gradient after the last part.
        version: of that tensor.
        probe: of what it held then.
        copy: all of them, where the next part is a difference.
    """

    squares: Tensor | None
    grad: Tensor
    version: int
    probe: GradientProbe
    copy: Tensor | None
    turned: Turned | None = None

    def holds(self, grad: Tensor) -> bool:
        """Whether a gradient is the one that was noted, unchanged."""
        same = grad is self.grad and grad._version == self.version
        return same and self.probe.holds(grad)  # a write through ``.data`` raises no version


@final
class BatchParts:
    """What the parts of one batch have shown so far; one for each optimizer.

    Args:
        params: the optimizer's parameters, by name or position.
        bases: where the variance is to be; None: coordinates of the parameters.

    Attributes:
        params: may be set anew before a batch; so may
        wanted: those whose variance will be asked for. Of others no squares are formed.
    """

    def __init__(self, params: Mapping[str, Tensor], bases: Bases | None = None) -> None:
        self.params = params
        self.wanted: Collection[Tensor] = set(params.values())
        self.bases = bases
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
        if self.bases is not None:
            self.bases.restart()

    def backward(self, losses: Tensor, weight: float, batch_size: int | None = None) -> None:
        """Add ``weight`` times the mean gradient to ``.grad``, and note each example's share.

        The gradient is autograd's own, hooks included; the squares come from the graph. Where the
        shares do not add up to that gradient, ``.grad`` stays as it was.

        Args:
            losses: (b,), one per example.
            weight: share of these examples in the batch.
            batch_size: examples of a whole step, if it is known.

        Raises:
            TypeError, ValueError: if the losses are not one per example, for at least two, or more
                than ``batch_size``, or if gradients take a way that the graph does not show.
            RuntimeError: if ``.grad`` holds something that is no part of this batch, or something
                outside the graph changes gradients.
        """
        check_batch_losses(losses)
        self.restart_if_cleared()
        share, before = weight / len(losses), self._share
        if before is not None and not math.isclose(share, before, rel_tol=1e-6):
            raise ValueError(
                "weight must give every example of a step the same share: the number of losses "
                "over the batch size, also for a smaller last part."
            )
        _check_step_size(self.examples + len(losses), len(losses) / weight, batch_size)
        values = losses * share
        leaves = [*leaves_of(values), *self.params.values()]
        if any(p._post_accumulate_grad_hooks for p in leaves):
            raise RuntimeError(
                "a parameter has a hook by register_post_accumulate_grad_hook(), which may step or "
                "change gradients within the backward pass; optimizer.backward(losses) cannot see "
                'what it does: remove it, or use another variance than "exact".'
            )
        with _set_aside(leaves):
            factors = capture(values, self.params, accumulate=True)
            found = _shares(factors, self.bases, self.wanted)
        for p in found:
            self._check_untouched(p)
        if self.bases is not None:
            self.bases.check_kept()
            for name, terms in factors.terms.items():
                self.bases.seen(self.params[name], terms, share)
        self._share = share
        for p, share_of in found.items():
            if p.grad is None:
                p.grad = share_of.grad
            else:
                p.grad.add_(share_of.grad)
            self._note(p, share_of.squares, turned=share_of.turned)
        self.examples += len(losses)
        self.parts += len(losses)

    @torch.no_grad()
    def part(self, size: int, batch_size: int | None = None) -> None:
        """Note what the last backward pass added to ``.grad``, for ``size`` examples.

        Raises:
            ValueError: if there are more examples than ``batch_size``, that of a whole step.
            RuntimeError: if there was no or more than one backward pass since the last part.
        """
        self.restart_if_cleared()
        _check_step_size(self.examples + size, size, batch_size)
        check_whole(self.params, "what one part of a batch adds to its gradient is not seen whole")
        changes = [self._changes(p) for p in self.params.values() if p.grad is not None]
        if not any(changes):
            raise RuntimeError(
                "there was no backward pass since the last part; call optimizer.microbatch(size) "
                "once after each."
            )
        for p in self.params.values():
            if p.grad is None:
                continue
            noted, share = self._noted.get(p), p.grad
            if noted is not None and noted.copy is not None:
                share = p.grad - noted.copy
            self._note(p, squared(share).div_(size), p.grad.clone())
        self.examples += size
        self.parts += 1

    def saw(self, p: Tensor) -> bool:
        """Whether a parameter's gradient is of the parts of this batch."""
        return p in self._noted

    def variances(self, params: Sequence[Tensor]) -> GivenVariances:
        """The variance of each gradient; a factor since (clipping by norm, unscaling) counts.

        Raises:
            RuntimeError: unless gradients are the sum of at least two parts, up to a factor.
        """
        if self.parts < 2:
            raise RuntimeError(
                f'variance="exact" or "microbatch" saw {self.parts} part(s) of the batch and needs '
                'two: for "exact" call optimizer.backward(losses), with one loss per example, in '
                'place of losses.mean().backward(); for "microbatch" call '
                "optimizer.microbatch(size) after each backward pass of an accumulated step. In a "
                'loop that has one loss use variance="ema".'
            )
        idle = {p for p in params if p not in self._noted and not bool(_grad(p).any())}
        params = [p for p in params if p not in idle]
        if not all(p in self._noted for p in params):
            raise RuntimeError(
                "a parameter has a gradient from elsewhere: compute all gradients by "
                'optimizer.backward(losses) for variance="exact", and call '
                'optimizer.microbatch(size) after each backward pass for "microbatch".'
            )
        if any(self._noted[p].squares is None for p in params):
            raise RuntimeError(
                "the variance of a parameter is asked for that was not when its gradient was "
                "noted: its group was given a gate, or another variance, since; call "
                "optimizer.zero_grad(), and optimizer.backward(losses) again."
            )
        factors = {p: self.factor(p) for p in params}
        found = {p: partial(self._variance, p, factor) for p, factor in factors.items()}
        # Of what this batch does not reach: zero_grad(set_to_none=False) leaves a zero.
        return found | {p: partial(squared, _grad(p)) for p in idle}

    @torch.no_grad()
    def _variance(self, p: Tensor, factor: float) -> Tensor:
        squares = cast(Tensor, self._noted[p].squares) * (self.examples * factor**2)
        grad = self.turned(p, factor)
        if grad is None:
            grad = self.bases.turned(p) if self.bases is not None else _grad(p)
        return not_negative((squares - squared(grad)) / (self.parts - 1))

    def factor(self, p: Tensor) -> float:
        """What the gradient was multiplied by since it was noted.

        Raises:
            RuntimeError: if that is not one number.
        """
        noted, grad = self._noted[p], _grad(p)
        # Not by version: GradScaler and writes through ``.data`` leave it as it was.
        return noted.probe.factor(grad)

    def _changes(self, p: Tensor) -> int:
        """Backward passes, 0 or 1, that added to ``.grad`` since the last part.

        Raises:
            RuntimeError: if there were more, or gradients of the last step are still in there.
        """
        grad, noted = _grad(p), self._noted.get(p)
        if noted is None:
            if self._used.get(p) == (weakref.ref(grad), grad._version):
                raise RuntimeError(LEFT_OVER)
            return 1
        same, changes = grad is noted.grad, grad._version - noted.version
        if not same or changes > 1:
            wrapped = (
                " A wrapper that averages gradients over processes writes them, too: under "
                'DistributedDataParallel use variance="data-parallel" with observe_ranks(model, '
                "optimizer)."
            )
            raise RuntimeError(
                "call optimizer.microbatch(size) once after each backward pass, and "
                "optimizer.zero_grad() between steps: the gradients were "
                f"{f'changed {changes} times' if same else 'replaced by other tensors'} since the "
                f"last call.{wrapped if processes() > 1 else ''}"
            )
        return changes

    def turned(self, p: Tensor, factor: float, *, for_step: bool = False) -> Tensor | None:
        """The gradient in its basis as the shares gave it, times what it was multiplied by since.

        That is ``factor``, of :meth:`factor`. None where they gave none, or none for a step, or
        where more than rounding and a factor has changed since, so that the gradient itself must
        be turned.
        """
        noted, grad = self._noted.get(p), _grad(p)
        if noted is None or noted.turned is None or (for_step and not noted.turned.for_step):
            return None
        if not noted.probe.holds_times(factor, grad):
            return None
        return noted.turned.grad if factor == 1 else noted.turned.grad * factor

    def _note(
        self,
        p: Tensor,
        squares: Tensor | None,
        copy: Tensor | None = None,
        turned: Turned | None = None,
    ) -> None:
        grad, before = _grad(p), self._noted.get(p)
        if before is not None:
            old = before.squares
            squares = None if squares is None or old is None else squares.add_(old)
            last = before.turned
            turned = None if turned is None or last is None else turned.plus(last)
        probe = GradientProbe.of(grad)
        self._noted[p] = _Noted(squares, grad, grad._version, probe, copy, turned)

    def _check_untouched(self, p: Tensor) -> None:
        """Raise RuntimeError if ``.grad`` holds something that is no part of this batch."""
        if p.grad is None:
            return
        noted = self._noted.get(p)
        if noted is None and bool(p.grad.any()):
            raise RuntimeError(LEFT_OVER)
        if noted is not None and not noted.holds(p.grad):
            raise RuntimeError(
                "gradients were changed between two parts of a batch; clip or unscale them once, "
                "after the last part, and call optimizer.zero_grad() between steps."
            )

    def restart_if_cleared(self) -> None:
        """A batch whose step was skipped leaves its parts behind; its gradients are gone."""
        if any(p.grad is None for p in self._noted):
            self.reset()


def _check_step_size(examples: int, implied: float, batch_size: int | None) -> None:
    """Raise ValueError if a step has more examples than its optimizer was told.

    Args:
        examples: seen in this step so far.
        implied: size of the whole by the weight of the last part; weights may be rounded.
        batch_size: the setting; of all processes, so more than those seen here is no contradiction.
    """
    if batch_size is not None and (examples > batch_size or implied > 1.05 * batch_size):
        raise ValueError(
            f"batch_size={batch_size}, but this step has {max(examples, round(implied))} examples; "
            "set batch_size to the examples behind one step (batch × accumulation steps × "
            "processes), and weight to a part's share of them."
        )


_HOOKED = (
    "a hook on {} (register_hook) changes its gradient, whose examples' shares are needed in "
    "another basis, which the hook does not know; remove it, or take this parameter into a group "
    "with max_dim=0."
)


@contextmanager
def _set_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Leaves without gradients, which are put back afterwards."""
    grads = {p: p.grad for p in leaves}
    try:
        for p in grads:
            p.grad = None
        yield
    finally:
        for p, grad in grads.items():
            p.grad = grad


def _rotated(tensor: Tensor, rotation: Rotation | None) -> Tensor:
    return tensor if rotation is None else rotation.forward(tensor)


class _Sums(NamedTuple):
    """Sums over the shares of one parameter.

    Attributes:
        grad: of the shares, in coordinates.
        size: of rounding in it, the sum of squares of what was added up.
        squares: of the shares' squares, in a basis; None: not wanted.
        turned: of the shares in that basis; None where they were not turned.
    """

    grad: Tensor
    size: Tensor
    squares: Tensor | None
    turned: Turned | None


def _sums(terms: list[Term], p: Tensor, rotation: Rotation | None, *, squares: bool) -> _Sums:
    if rotation is None:
        if not squares:
            return _Sums(shaped(total(terms), p), energy(terms), None, None)
        sums, found = moments(terms)
        found = shaped(found, p)
        return _Sums(shaped(sums, p), _real(found).sum(), found, None)
    cheaper, sums = rotation.is_cheaper_on(terms, p.shape), total(terms).reshape(p.shape)
    if not (squares or cheaper):
        return _Sums(sums, energy(terms), None, None)
    rotated = rotation.terms(terms, p.shape)
    turned = Turned(total(rotated).reshape(p.shape), cheaper)
    if not squares:
        return _Sums(sums, energy(terms), None, turned)
    found = squares_of(rotated).reshape(p.shape)
    return _Sums(sums, found.sum(), found, turned)


@torch.no_grad()
def _shares(
    factors: Factors, bases: Bases | None, wanted: Collection[Tensor]
) -> dict[Tensor, _Share]:
    """What autograd has put into ``.grad``, and what the factors tell of the examples' shares.

    Raises:
        RuntimeError: if a gradient is not the sum of the shares. Rounding is compared with the
            largest gradient of the model: some are zero but for rounding, such as that of the bias
            of the keys in attention.
    """
    found: dict[Tensor, _Share] = {}
    gaps: dict[str, tuple[Tensor, Tensor]] = {}
    for name, terms in factors.terms.items():
        p = factors.params[name]
        rotation = bases.rotation(p) if bases is not None else None
        sums = _sums(terms, p, rotation, squares=p in wanted)
        squares = sums.squares
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        check_dense([grad])
        gap, size = _gap(grad, sums.grad, sums.size)
        if p._backward_hooks and bool(gap > _tolerance(p) * size):
            if bases is not None and bases.rotates(p):
                raise RuntimeError(_HOOKED.format(_described(name, p)))
            if squares is not None:
                squares = _behind_hook(name, grad, sums.grad, squares)
        else:
            gaps[name] = gap, size
        # What a hook changes within the tolerance counts: the gradient itself is turned then.
        found[p] = _Share(grad, squares, None if p._backward_hooks else sums.turned)
    for name, p in factors.params.items():
        if p not in found and p.grad is not None:
            if bool(p.grad.any()):
                raise _unseen(name, p)
            rotation = bases.rotation(p) if bases is not None else None
            squares = squared(_rotated(p.grad, rotation)) if p in wanted else None
            found[p] = _Share(p.grad, squares)
    sizes = _numbers([size for _, size in gaps.values()])
    largest = max(filter(math.isfinite, sizes), default=0.0)
    for name, gap, size in zip(gaps, _numbers([g for g, _ in gaps.values()]), sizes, strict=True):
        p = factors.params[name]
        small = gap <= _tolerance(p) * size + _rounding(p, halved=factors.halved) * largest
        if not small and bool(found[p].grad.to_dense().isfinite().all()):
            raise _unseen(name, p)
    return found


def _numbers(scalars: list[Tensor]) -> list[float]:
    """The values of tensors of one element, of one device, after waiting for it once."""
    return torch.stack([s.double() for s in scalars]).tolist() if scalars else []


def _gap(grad: Tensor, sums: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of a gradient from the sum of shares, and the size to compare it with."""
    now, then = _real(grad.to_dense()).to(_real(sums).dtype), _real(sums)
    size = torch.linalg.vector_norm(then) + energy.sqrt()
    return torch.linalg.vector_norm(now - then), size


def _behind_hook(name: str, grad: Tensor, sums: Tensor, squares: Tensor) -> Tensor:
    """Squares of shares behind a hook that sets entries to zero, multiplies by a number, or both.

    Raises:
        RuntimeError: for any other; what it makes of one share is not known.
    """
    now, kept = grad.to_dense(), grad.to_dense() != 0
    then = torch.where(kept, sums, 0)
    factor = _ratio(_real(now), _real(then))
    squares = torch.where(kept, squares * factor**2, 0)
    gap, size = _gap(grad, then * factor, _real(squares).sum())
    if bool(now.isfinite().all()) and not bool(gap <= _tolerance(grad) * size):
        raise RuntimeError(
            f"a hook on {_described(name, grad)} (register_hook) changes its gradient by more than "
            "a factor or zeros at some entries: what it makes of one example, which "
            'variance="exact" needs, is not known; remove it, or use another variance.'
        )
    return squares


def _ratio(now: Tensor, then: Tensor) -> float:
    total = float(then.square().sum())
    return float((now.to(then.dtype) * then).sum()) / total if total > 0 else 0.0


def _unseen(name: str, p: Tensor) -> RuntimeError:
    """The error for a gradient that is not the sum of the shares that the graph shows."""
    cause = (
        "a wrapper such as DistributedDataParallel averages it over processes. Use "
        'variance="data-parallel" with observe_ranks(model, optimizer)'
        if processes() > 1
        else "it takes a way that the graph does not show, such as a backward pass that a custom "
        "autograd.Function runs itself, or a hook on its AccumulateGrad node. Remove that, or use "
        "another variance"
    )
    return RuntimeError(
        f"the gradient that autograd gives for {_described(name, p)} is not the sum of its "
        f'examples\' shares, which variance="exact" needs: {cause}. Nothing was changed.'
    )


def _described(name: str, p: Tensor) -> str:
    group, _, place = name.partition(".")
    return f"parameter {place} of group {group}, of shape {tuple(p.shape)},"


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _tolerance(p: Tensor) -> float:
    """Deviation of a gradient from the sum of its shares, relative to both, that may be rounding.

    Of products in half precision, too, that autocast may have taken.
    """
    return 1e-3 if p.dtype in (torch.float64, torch.complex128) else 2e-2


def _rounding(p: Tensor, *, halved: bool) -> float:
    """The same, relative to the largest gradient of the model.

    Args:
        p: the parameter.
        halved: whether products were taken in half precision.
    """
    if p.dtype in (torch.float64, torch.complex128):
        return 1e-6
    # Products in TensorFloat-32 are taken on other devices than the CPU, or where allowed.
    single = p.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if single and not halved and p.element_size() >= 4 else 1e-2


def _grad(p: Tensor) -> Tensor:
    return cast(Tensor, p.grad)
