r"""From the outputs of a model and its twins to an estimate of population risk.

A twin trained on the tilted losses :math:`\ell_i(u) - \delta z_i\cdot u`, z random signs, so that

.. math:: \varphi = \frac{\sum_i (B_iz_i)\cdot(u_i'-u_i)}{\delta\sum_i|z_i|^2}

estimates the degrees of freedom per output (Hutchinson). :mod:`poprisk.risk.links` turns them into
leave-one-out outputs; the estimate is the mean of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.printing import described, short_repr
from poprisk.risk.links import Link, PerExampleLoss, link_of

MAX_UNCERTAINTY = 0.2
"""Largest share of the estimate by which one standard error of the response may raise it."""
MAX_FREEDOM = 0.5
"""Largest share of the outputs' freedom that may be used up."""
MAX_CORRECTION = 2.4
"""Largest ratio of the estimate to the training loss for which its level is believed."""
MAX_COMPARABLE = 3.0
"""Largest such ratio for which it still orders the estimates of a run."""
FEW_EXAMPLES = 0.2
"""Largest standard error of the mean loss, as a share of the estimate."""


@dataclass(frozen=True, eq=False)
class RiskEstimate:
    """Expected loss on fresh examples with labels as noisy as the training set's.

    Attributes:
        value: the estimate, in units of the loss.
        standard_error: of the value, from groups of examples.
        valid: whether the value may be believed.
        reason: why not; empty if valid.
        comparable: whether it still tells where in a run, or for which arm, risk is less; it is
            wider than ``valid``.
        cost: time of all runs over the time of the model's own.
        train_loss: mean loss on the training examples as fitted.
        response: mean change of an output per change of its own label, h.
        freedom: effective degrees of freedom per output, φ; equal to h for squared error.
        freedom_error: standard error of φ.
        accuracy: share of labels that leave-one-out outputs predict; None unless classes.
        outputs: leave-one-out outputs, shape of the model's, float64.
        losses: their losses, (n,), float64.
        parts: degrees of freedom of each part of the examples; one unless parts were asked for.
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    comparable: bool
    cost: float
    train_loss: float
    response: float
    freedom: float
    freedom_error: float
    accuracy: float | None
    outputs: Tensor
    losses: Tensor
    parts: tuple[Freedom, ...] = ()

    def __repr__(self) -> str:
        shown = f"value={self.value:.4g}, standard_error={self.standard_error:.2g}"
        return described("RiskEstimate", shown, valid=self.valid, reason=self.reason)


class TwinOutputs(NamedTuple):
    """What one twin put out, and the tilt it was trained with; both (n, ...)."""

    outputs: Tensor
    tilt: Tensor

    __repr__ = short_repr


class Freedom(NamedTuple):
    """Measured degrees of freedom per output, their standard error, and the plain response."""

    value: float
    error: float
    response: float

    __repr__ = short_repr


def estimate_risk(
    loss: PerExampleLoss,
    outputs: Tensor,
    targets: Tensor,
    twins: Sequence[TwinOutputs],
    *,
    groups: Tensor | None = None,
    parts: Tensor | None = None,
    cost: float = math.nan,
    doubt: str = "",
) -> RiskEstimate:
    """Estimate the risk from outputs on the training set; see :class:`RiskEstimate`.

    Args:
        loss: one value an example.
        outputs: of the model, (n, ...).
        targets: (n, ...).
        twins: one or more.
        groups: ids of groups of dependent examples, 0..G-1, (n,); None: all independent.
        parts: ids 0..K-1 of examples that share one response, (n,); None: all of them do.
        cost: passed on.
        doubt: a reason known beforehand why the estimate is not valid.
    """
    u, in_double = outputs.double(), _in_double(loss, outputs, targets)
    y = _double(targets) if in_double else targets

    def scored(v: Tensor) -> Tensor:
        return loss(v if in_double else v.to(outputs.dtype), y).detach().double()

    if not all(bool(t.isfinite().all()) for t in (outputs, *(twin.outputs for twin in twins))):
        return _failed(u, scored(u), cost, "outputs are not finite")
    smooth = loss if in_double else _cast(loss, outputs.dtype)
    link = link_of(smooth, u, y)
    found = measure_freedom(link, u, twins, groups)
    shared = [Part(slice(None), link, found)]
    if parts is not None:
        shared = measure_parts(smooth, u, y, twins, parts, whole=found, groups=groups)
    left_out = _left_out(u, shared)
    losses = scored(left_out)
    value = float(losses.mean())
    upper, lower = (float(scored(_left_out(u, shared, errors=e)).mean()) for e in (1.0, -1.0))
    sampling = grouped_error(losses - value, groups) / len(losses)
    train_loss = float(scored(u).mean())
    judged = (value, upper, train_loss, found.value, sampling)
    reason = doubt or _objection(*judged, limit=MAX_CORRECTION)
    return RiskEstimate(
        value=value,
        standard_error=math.hypot(sampling, 0.5 * (upper - lower)),
        valid=not reason,
        reason=reason,
        comparable=not (doubt or _objection(*judged, limit=MAX_COMPARABLE)),
        cost=cost,
        train_loss=train_loss,
        response=found.response,
        freedom=found.value,
        freedom_error=found.error,
        accuracy=_accuracy(link, left_out, targets),
        outputs=left_out,
        losses=losses,
        parts=tuple(part.freedom for part in shared),
    )


class Part(NamedTuple):
    """Examples that share one response: which, the link of their losses, and what was measured."""

    rows: Tensor | slice
    link: Link
    freedom: Freedom


def _left_out(u: Tensor, parts: Sequence[Part], *, errors: float = 0.0) -> Tensor:
    """Leave-one-out outputs, every part's freedom raised by so many of its standard errors."""
    flat = u.reshape(len(u), -1)
    found = flat.clone()
    for rows, link, freedom in parts:
        found[rows] = link.leave_one_out(flat[rows], freedom.value + errors * freedom.error)
    return found.reshape(u.shape)


def measure_parts(
    loss: PerExampleLoss,
    outputs: Tensor,
    targets: Tensor,
    twins: Sequence[TwinOutputs],
    parts: Tensor,
    *,
    whole: Freedom,
    groups: Tensor | None = None,
) -> list[Part]:
    r"""The response of each part of the examples, drawn towards that of all by its own noise.

    A part is measured with fewer signs, so with more error :math:`\epsilon_k`. Its freedom is
    :math:`\varphi + w_k(\varphi_k-\varphi)` with :math:`w_k=\tau^2/(\tau^2+\epsilon_k^2)`, where
    :math:`\tau^2` is what the parts differ by beyond their errors (empirical Bayes).

    Args:
        loss: one value an example.
        outputs: (n, ...), float64.
        targets: (n, ...).
        twins: the perturbed runs.
        parts: ids 0..K-1, (n,).
        whole: freedom of all examples.
        groups: as in :func:`estimate_risk`.
    """
    found: list[Part] = []
    for k in range(int(parts.max()) + 1):
        rows = (parts == k).nonzero().squeeze(1)
        link = link_of(loss, outputs[rows], targets[rows])
        mine = [TwinOutputs(t.outputs[rows], t.tilt[rows]) for t in twins]
        own = None if groups is None else torch.unique(groups[rows], return_inverse=True)[1]
        found.append(Part(rows, link, measure_freedom(link, outputs[rows], mine, own)))
    noise = sum(p.freedom.error**2 for p in found) / len(found)
    spread = sum((p.freedom.value - whole.value) ** 2 for p in found) / len(found)
    real = max(spread - noise, 0.0)
    return [p._replace(freedom=_drawn(p.freedom, whole, real)) for p in found]


def _drawn(own: Freedom, whole: Freedom, real: float) -> Freedom:
    w = real / (real + own.error**2) if real > 0 else 0.0
    value = whole.value + w * (own.value - whole.value)
    return Freedom(value, math.hypot(w * own.error, (1 - w) * whole.error), own.response)


def measure_freedom(
    link: Link, outputs: Tensor, twins: Sequence[TwinOutputs], groups: Tensor | None = None
) -> Freedom:
    r"""Hutchinson's estimate of :math:`\tfrac1N\sum_i\mathrm{tr}(B_iH_i)`, from the twins.

    Its error is that of independent groups times √2: an off-diagonal entry of a symmetric response
    enters with both of its examples.

    Args:
        link: of the loss at ``outputs``.
        outputs: (n, ...), float64.
        twins: the perturbed runs.
        groups: as in :func:`estimate_risk`.
    """
    found = [_one_freedom(link, outputs, twin, groups) for twin in twins]
    k = len(found)
    return Freedom(
        sum(f.value for f in found) / k,
        math.sqrt(sum(f.error**2 for f in found)) / k,
        sum(f.response for f in found) / k,
    )


def _one_freedom(link: Link, outputs: Tensor, twin: TwinOutputs, groups: Tensor | None) -> Freedom:
    t = twin.tilt.double().reshape(len(outputs), -1)
    moved = (twin.outputs.double() - outputs).reshape_as(t)
    size = t.square().sum(1)
    total = float(size.sum())
    follows = (link.curvature(t) * moved).sum(1)
    value = float(follows.sum()) / total
    error = math.sqrt(2) * grouped_error(follows - value * size, groups) / total
    return Freedom(value, error, _label_scale(link) * float((t * moved).sum()) / total)


def grouped_error(deviations: Tensor, groups: Tensor | None) -> float:
    """Standard error of the sum of deviations (n,) whose groups are independent."""
    if groups is not None:
        sums = torch.zeros(int(groups.max()) + 1, dtype=deviations.dtype, device=deviations.device)
        deviations = sums.index_add(0, groups, deviations)
    n = len(deviations)
    return float(deviations.square().sum().sqrt()) * math.sqrt(n / max(n - 1, 1))


def _label_scale(link: Link) -> float:
    """How a tilt enters a squared error's label: its constant curvature; 1 for other losses."""
    diagonal = getattr(link, "diagonal", None)
    if diagonal is None or not float(diagonal.max()) > 0:
        return 1.0
    spread = float(diagonal.max() - diagonal.min())
    return float(diagonal.mean()) if spread <= 1e-9 * float(diagonal.max()) else 1.0


def _objection(
    value: float, upper: float, train: float, freedom: float, sampling: float, *, limit: float
) -> str:
    """Why an estimate is not to be believed; empty if nothing speaks against it."""
    if not math.isfinite(value) or not math.isfinite(upper):
        return "the estimate is not finite"
    size = abs(value)
    if freedom > MAX_FREEDOM:
        return f"deep interpolation: {freedom:.0%} of the outputs' freedom is used up"
    if value > limit * train > 0:
        return f"deep interpolation: the estimate is {value / train:.1f} times the training loss"
    if upper - value > MAX_UNCERTAINTY * size:
        return (
            f"the twin's response is uncertain: one standard error changes the estimate by "
            f"{(upper - value) / size:.0%}; use more probes or a larger delta"
        )
    if sampling > FEW_EXAMPLES * size:
        return f"too few examples: their losses alone leave {sampling / size:.0%} uncertainty"
    return ""


def _accuracy(link: Link, left_out: Tensor, targets: Tensor) -> float | None:
    """Share of right classes; None where targets are not classes."""
    if link.gauge and left_out.ndim == 2:
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        return float((left_out.argmax(1) == classes).double().mean())
    binary = targets.shape == left_out.shape and bool(((targets == 0) | (targets == 1)).all())
    return float(((left_out > 0) == (targets > 0.5)).double().mean()) if binary else None


def _failed(u: Tensor, losses: Tensor, cost: float, reason: str) -> RiskEstimate:
    nan = math.nan
    train = float(losses.mean())
    return RiskEstimate(
        nan, nan, False, reason, False, cost, train, nan, nan, nan, None, u, losses * nan
    )


def _double(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _in_double(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss takes float64; one that holds float32 weights does not."""
    try:
        loss(outputs[:1].double(), _double(targets[:1]))
    except RuntimeError:
        return False
    return True


def _cast(loss: PerExampleLoss, dtype: torch.dtype) -> PerExampleLoss:
    def cast(u: Tensor, y: Tensor) -> Tensor:
        return loss(u.to(dtype), y).double()

    return cast
