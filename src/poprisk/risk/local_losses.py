r"""The local model of a loss: from how an output follows its own label to one that cannot see it.

Deleting example i removes :math:`\nabla\ell_i` from what balances its outputs. If all other
examples pull them back quadratically, with gain A, the outputs without the example are

.. math:: u_i^{loo} = u_i + A\,\nabla\ell_i(u_i),\qquad
          H_i = \partial u_i/\partial t_i = (A^{-1} + B_i)^{-1},\quad B_i = \nabla^2\ell_i(u_i),

where t perturbs the loss, :math:`\ell_i(u) - t\cdot u` (for squared error, cross-entropy and its
binary form: a perturbed label). The twin measures the effective degrees of freedom per output,
:math:`\varphi = \tfrac1N\sum_i \mathrm{tr}(B_i H_i) \in [0, 1)`; the gain is the one that explains
it. For squared error :math:`\varphi = h` and :math:`u^{loo} = u - h\,(y - u^{loo})`: generalized
cross-validation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from poprisk.protocols import PerExampleLoss
from poprisk.risk.inputs import check_output_losses

DENSE_LIMIT = 128
"""Outputs per example up to which a loss may couple them in any way it likes."""
TOLERANCE = 1e-6
SMALLEST_GAIN, LARGEST_GAIN = 1e-12, 1e9
PRECISION, HALVINGS = 1e-14, 60
"""Of the logarithm of a gain, and how often its interval is at least halved for that."""
NORMALIZED = 1e-4
"""Largest logarithm of the sum of an example's probabilities, if its outputs are their logs."""
SHIFTS = (1.0, -1.0, 30.0, -30.0)
"""Relative to an output's size: where else a loss is looked at to see that it is always zero."""
NOT_TWICE = ("not implemented", "differentiate twice")
"""Autograd's words for a derivative that has no derivative."""


class LocalLoss(ABC):
    """What a loss is, locally, at the outputs of n examples, float64 throughout.

    Attributes:
        gradient: derivative of each example's loss by its outputs, (n, c).
        shift_invariant: whether adding a constant to all outputs of an example changes nothing.
    """

    shift_invariant: bool = False

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    @property
    def dimensions(self) -> int:
        """Outputs per example that the loss can tell apart."""
        return self.gradient.shape[1] - int(self.shift_invariant)

    @abstractmethod
    def curvature(self, v: Tensor) -> Tensor:
        """The products :math:`B_i v_i` for v of shape (n, c)."""

    @abstractmethod
    def dof(self, gain: float) -> float:
        r""":math:`\varphi(A)`, the mean of :math:`\mathrm{tr}\,B_i(A^{-1}+B_i)^{-1}` per output."""

    def gain(self, dof: float) -> float:
        """The gain A whose :meth:`dof` is the measured one: Ridders' method on its logarithm.

        Nothing is fitted by outputs that do not follow their labels: 0 for ``dof`` ≤ 0. The
        largest gain stands for all that no gain explains.
        """
        if not dof > 0:
            return 0.0
        low, high = math.log(SMALLEST_GAIN), math.log(LARGEST_GAIN)
        below, above = (self.dof(math.exp(t)) - dof for t in (low, high))
        if not below < 0 <= above:
            return LARGEST_GAIN if above < 0 else SMALLEST_GAIN
        found = math.inf
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            centre = self.dof(math.exp(middle)) - dof
            # Where an exponential through the three points is zero: always between the ends.
            last, found = (
                found,
                middle - (middle - low) * centre / math.hypot(centre, math.sqrt(-below * above)),
            )
            value = self.dof(math.exp(found)) - dof
            if value == 0 or abs(found - last) < PRECISION:
                break
            points = [(low, below), (middle, centre), (found, value), (high, above)]
            low, below = max(point for point in points if point[1] < 0)
            high, above = min(point for point in points if point[1] >= 0)
        return math.exp(found)

    def leave_one_out(self, outputs: Tensor, gain: float) -> Tensor:
        """Outputs (n, c) as they would be had each example not been trained on."""
        return outputs + gain * self.gradient


@final
class Separate(LocalLoss):
    """A loss that is a sum over outputs (squared error, binary cross-entropy, Huber, Poisson).

    Args:
        gradient: (n, c).
        diagonal: second derivatives, (n, c); negative ones count as zero.
    """

    def __init__(self, gradient: Tensor, diagonal: Tensor) -> None:
        super().__init__(gradient)
        self.diagonal = diagonal.clamp_min(0.0)

    def curvature(self, v: Tensor) -> Tensor:
        return self.diagonal * v

    def dof(self, gain: float) -> float:
        scaled = gain * self.diagonal
        return float((scaled / (1 + scaled)).mean())


@final
class Softmax(LocalLoss):
    r"""Cross-entropy of logits, :math:`B_i = w_i(\mathrm{diag}\,p_i - p_ip_i^\top)`.

    Args:
        gradient: (n, c).
        p: class probabilities, (n, c).
        weight: of each example, (n, 1).
    """

    shift_invariant = True

    def __init__(self, gradient: Tensor, p: Tensor, weight: Tensor) -> None:
        super().__init__(gradient)
        self.p, self.weight = p, weight.clamp_min(0.0)

    def curvature(self, v: Tensor) -> Tensor:
        pv = self.p * v
        return self.weight * (pv - self.p * pv.sum(1, keepdim=True))

    def dof(self, gain: float) -> float:
        scaled = gain * self.weight * self.p
        s = scaled / (1 + scaled)  # Sherman-Morrison: tr = Σs - Σs²/Σs
        total = s.sum(1)
        trace = total - s.square().sum(1) / total.clamp_min(1e-300)
        return float(trace.mean()) / self.dimensions


@final
class Coupled(LocalLoss):
    """Any other loss of few outputs, by its full second derivative.

    Args:
        gradient: (n, c).
        hessian: (n, c, c); its negative eigenvalues count as zero.
    """

    def __init__(self, gradient: Tensor, hessian: Tensor, *, shift_invariant: bool) -> None:
        super().__init__(gradient)
        self.shift_invariant = shift_invariant
        values, self.vectors = torch.linalg.eigh(hessian)
        self.values = values.clamp_min(0.0)

    def curvature(self, v: Tensor) -> Tensor:
        inner = self.values.unsqueeze(2) * (self.vectors.mT @ v.unsqueeze(2))
        return (self.vectors @ inner).squeeze(2)

    def dof(self, gain: float) -> float:
        scaled = gain * self.values
        return float((scaled / (1 + scaled)).sum(1).mean()) / self.dimensions


@final
class Unknown(LocalLoss):
    """A loss whose second derivative autograd does not have, such as ``multi_margin_loss``.

    Its curvature counts as zero; what it is stands in the response of its gradients alone.

    Args:
        gradient: (n, c).
    """

    def __init__(self, gradient: Tensor, *, shift_invariant: bool) -> None:
        super().__init__(gradient)
        self.shift_invariant = shift_invariant

    def curvature(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)

    def dof(self, gain: float) -> float:
        return 0.0


def local_loss_of(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> LocalLoss:
    """Find the local model of a loss from its derivatives at the outputs.

    Args:
        loss: from outputs (n, ...) and targets (n, ...) to one value an example, (n,).
        outputs: (n, ...), float64; log-probabilities count as the logits they are.
        targets: as the loss takes them.

    Raises:
        ValueError: if the loss does not give one differentiable value an example, or couples more
            than :data:`DENSE_LIMIT` outputs in another way than softmax.
    """
    loss = on_logits(loss, outputs)
    u, g = _differentiated(loss, outputs, targets, twice=True)
    gradient, c = g.detach(), g.shape[1]

    def product(v: Tensor) -> Tensor:
        return _derivative(g, u, v)

    v = _directions(u, seed=0)
    try:
        along, other = product(v), product(_directions(u, seed=1))
    except RuntimeError as error:
        if not any(words in str(error) for words in NOT_TWICE):
            raise
        return Unknown(gradient, shift_invariant=is_shift_invariant(gradient))
    softmax = _softmax(gradient, u.detach(), v, along) if outputs.ndim == 2 and c > 1 else None
    if softmax is not None:
        return softmax
    diagonal = along / v
    if _close(diagonal * _directions(u, seed=1), other):
        return Separate(gradient, diagonal)
    if c > DENSE_LIMIT:
        raise ValueError(
            f"loss couples all {c} outputs of an example in a way that is not softmax; that is "
            f"supported up to {DENSE_LIMIT} outputs. For sequences, let each token be an example: "
            "outputs (tokens, classes) and an index per token."
        )
    columns = [product(torch.eye(c, dtype=u.dtype)[j].expand_as(u)) for j in range(c)]
    hessian = torch.stack(columns, dim=2)
    return Coupled(
        gradient, 0.5 * (hessian + hessian.mT), shift_invariant=is_shift_invariant(gradient)
    )


def gradient_of(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Derivative of each example's loss by its outputs (n, ...), (n, c)."""
    return _differentiated(loss, outputs, targets, twice=False)[1]


class Bend(NamedTuple):
    """How far gradients change otherwise than the curvature says, both norms.

    Attributes:
        change: of the gradients.
        open: of what of it the curvature leaves open.
    """

    change: float
    open: float


NO_CURVATURE = (
    "the loss is not quadratic over what moves: its curvature (zero but at kinks?) does not tell "
    "how its gradients change, and a linear response goes by nothing else"
)
BENT = 0.5
"""Share of the gradients' change from which on a loss is not quadratic over what moved."""


def bend_of(
    loss: PerExampleLoss, local_loss: LocalLoss, outputs: Tensor, targets: Tensor, moved: Tensor
) -> Bend:
    """How far a loss is from quadratic between outputs (n, ...) and these moved by (n, c)."""
    there = gradient_of(loss, outputs + moved.reshape(outputs.shape), targets).double()
    turned = there - local_loss.gradient
    change = float(turned.norm())
    # Outputs that move while no gradient does have no curvature to be judged by.
    gap = turned - local_loss.curvature(moved) if change > 0 else moved
    return Bend(change, float(gap.norm()))


def is_bent(bends: Sequence[Bend]) -> bool:
    """Whether the curvature leaves more open than :data:`BENT` of what the gradients did."""
    gap, change = math.hypot(*(b.open for b in bends)), math.hypot(*(b.change for b in bends))
    return gap > BENT * change


def on_logits(loss: PerExampleLoss, outputs: Tensor) -> PerExampleLoss:
    r"""The loss as one of logits, where a model puts out log-probabilities; else the loss itself.

    A negative log-likelihood of log-probabilities is linear in them: all of its curvature lies in
    the normalization, which the model does. Log-probabilities are logits, those whose normalization
    changes nothing, so that :math:`\ell\circ\mathrm{logsoftmax}` has the same values there.

    Args:
        loss: from outputs (n, c, ...) and targets.
        outputs: (n, c, ...), classes in the second dimension.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return loss
    total = outputs.detach().double().logsumexp(1)
    if not bool((total.abs() < NORMALIZED).all()):
        return loss
    return lambda u, y: loss(u.log_softmax(1), y)


def ignored_examples(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Which examples have no loss whatever their outputs (n,): unlabelled, masked, of weight zero.

    A loss that is zero at the outputs only, such as the hinge beyond its margin, is one.

    Args:
        loss: one value an example.
        outputs: (n, ...).
        targets: as the loss takes them.
    """
    u = outputs.detach()
    found = loss(u, targets).detach() == 0
    for shift in SHIFTS:
        if not bool(found.any()):
            break
        moved = u + shift * (1 + u.abs()) * _directions(u, seed=2)
        found &= loss(moved, targets).detach() == 0
    return found


def _differentiated(
    loss: PerExampleLoss, outputs: Tensor, targets: Tensor, *, twice: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (n, c) that require gradients, and the derivative of the losses by them."""
    u = outputs.detach().reshape(len(outputs), -1).requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        value = check_output_losses(loss(u.reshape(outputs.shape), targets), u, targets)
        (g,) = torch.autograd.grad(value.sum(), u, create_graph=twice)
    return u, g


def is_shift_invariant(gradient: Tensor) -> bool:
    """Whether the gradient (n, c) of every example sums to zero over its outputs, c > 1."""
    if gradient.shape[1] < 2:
        return False
    size = gradient.abs().sum()
    return bool(size > 0) and bool(gradient.sum(1).abs().sum() <= 1e-4 * size)


def _softmax(gradient: Tensor, u: Tensor, v: Tensor, along: Tensor) -> Softmax | None:
    """The softmax model if the second derivative along v is its own, up to a weight an example."""
    unit = Softmax(gradient, u.softmax(1), torch.ones_like(u[:, :1]))
    expected = unit.curvature(v)
    inner = (v * expected).sum(1, keepdim=True)
    weight = (v * along).sum(1, keepdim=True) / inner.clamp_min(1e-300)
    found = Softmax(gradient, unit.p, weight)
    return found if _close(found.curvature(v), along) and is_shift_invariant(gradient) else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().sum() <= TOLERANCE * (a.abs().sum() + b.abs().sum()))


def _directions(u: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.rand(u.shape, generator=generator, dtype=u.dtype) + 0.5
    return v.to(u.device)


def _derivative(g: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The derivative of g along v; zero where g does not depend on u."""
    if not g.requires_grad:
        return torch.zeros_like(u)
    (found,) = torch.autograd.grad(
        g, u, grad_outputs=v.contiguous(), retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(u) if found is None else found.detach()
