r"""From the outputs of a model and its twins to an estimate of population risk.

A twin trained on perturbed losses :math:`\ell_i(u) - \delta z_i\cdot u`, z random signs, so that

.. math:: \varphi = \frac{\sum_i (B_iz_i)\cdot(u_i'-u_i)}{\delta\sum_i|z_i|^2}

estimates the degrees of freedom per output (Hutchinson). :mod:`poprisk.risk.local_losses` turns
them into leave-one-out outputs; the estimate is the mean of their losses.

That takes a loss for quadratic over what the twin moved. Where it is not (absolute error,
quantiles, hinge: no curvature but at kinks, which a second derivative does not see) the response of
the gradients stands for :math:`B_iH_i`, unless both give the same φ and the curvature the smaller
A: it weighs the examples that still pull, and not those of a cross-entropy that move far because
nothing holds them. From :math:`A^{-1}du + d\nabla\ell = dt` follows without any second derivative

.. math:: A = \frac{h}{1-\varphi},\qquad
          h = \frac{\sum_i z_i\cdot(u_i'-u_i)}{\delta\sum_i|z_i|^2},\quad
          \varphi = \frac{\sum_i z_i\cdot(\nabla\ell_i(u_i')-\nabla\ell_i(u_i))}
                         {\delta\sum_i|z_i|^2}.

For absolute error this φ is the share of labels that are fitted exactly. Ours; both ways give the
same numbers for squared error.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk._renamed import renamed_attributes
from poprisk.printing import described, short_html, short_repr
from poprisk.protocols import PerExampleLoss
from poprisk.risk.grouped import (
    PAIRED,
    TINY,
    Intraclass,
    grouped_error,
    intraclass,
    left_out_together,
    sizes_of,
)
from poprisk.risk.local_losses import (
    BENT,
    LARGEST_GAIN,
    Bend,
    LocalLoss,
    bend_of,
    gradient_of,
    ignored_examples,
    is_bent,
    local_loss_of,
    on_logits,
)

MAX_UNCERTAINTY = 0.2
"""Largest share of the estimate by which one standard error of the response may raise it."""


class _Limits(NamedTuple):
    """Up to where an estimate is believed.

    Attributes:
        correction: ratio of the estimate to the training loss.
        dof: share of the outputs' freedom that is used up.
    """

    correction: float
    dof: float


LEVEL, ORDER = _Limits(2.4, 0.5), _Limits(3.0, 0.5)
"""Up to where the level of an estimate is believed, and the order of those of a run."""
CALM_LEVEL, CALM_ORDER = _Limits(4.0, 0.6), _Limits(5.0, 0.6)
"""Likewise where training carries no differences away."""
MAX_EXPANSION = 1.1
"""Largest :attr:`Response.expansion` of such a training."""
FEW_EXAMPLES = 0.2
"""Largest standard error of the mean loss, as a share of the estimate."""
MOST_USED = 0.95
"""Largest share of the freedom for which a gain is computed; it is flagged far below."""
SEPARABLE = 0.995
"""Share of fitted labels from which on a classification has no finite best fit."""
FAR = 50.0
"""Relative to an output's size: where a loss that falls without end has no slope left."""
MANY_SIZES = 24
"""Different sizes of groups up to which each has its gain found."""
SPREAD = 1.15
"""Mean of a squared normal number over its mean absolute deviation from its median."""


@renamed_attributes(freedom="dof", freedom_error="dof_error")
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
        cost: time of the twins over the time of the model itself.
        train_loss: mean loss on the training examples as fitted.
        response: mean change of an output per change of its own label, h.
        dof: effective degrees of freedom per output, φ; equal to h for squared error.
        dof_error: standard error of φ.
        accuracy: share of labels that leave-one-out outputs predict; None unless classes.
        outputs: leave-one-out outputs, with groups those without the whole group, shape of the
            model's, float64.
        losses: their losses, (n,), float64; 0 for examples that have none.
        parts: degrees of freedom of each part of the examples; one unless parts were asked for.
        influence: how much the twins' answer at each example adds to the error of the value,
            (probes, n), with groups (2·probes, n), float64; the response's share of
            ``standard_error`` is the error of its sums. Estimates along a run share most of it.
        groups: ids of dependent examples that were left out together, (n,), or None.
        signs: which signs the twins were pushed by; estimates of other signs share no error.
        counted: which examples have a loss, (n,), boolean; None: all of them.
        intraclass: correlation of the responses of a group, κ; 0 without groups.

    Means, errors and accuracy are over the examples that have a loss. Others (unlabelled by
    ``ignore_index``, masked, of weight zero: those whose loss is 0 whatever the outputs) count
    neither as right nor as wrong, as in torch's own mean with an ``ignore_index``.
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    comparable: bool
    cost: float
    train_loss: float
    response: float
    dof: float
    dof_error: float
    accuracy: float | None
    outputs: Tensor
    losses: Tensor
    parts: tuple[DegreesOfFreedom, ...] = ()
    influence: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    groups: Tensor | None = None
    signs: int = 0
    counted: Tensor | None = None
    intraclass: float = 0.0

    def __repr__(self) -> str:
        shown = f"value={self.value:.4g}, standard_error={self.standard_error:.2g}"
        return described("RiskEstimate", shown, valid=self.valid, reason=self.reason)

    _repr_html_ = short_html


Gains = tuple[float, float, float]
ALONE: Gains = (0.0, 0.0, 0.0)


@renamed_attributes(tilt="perturbation")
class TwinOutputs(NamedTuple):
    """What one twin put out, and the perturbation it was trained with; both (n, ...)."""

    outputs: Tensor
    perturbation: Tensor

    __repr__ = short_repr


@renamed_attributes(value="dof", error="dof_error")
class DegreesOfFreedom(NamedTuple):
    """Measured degrees of freedom per output, their standard error, and the plain response."""

    dof: float
    dof_error: float
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
        groups: ids of groups of dependent examples, 0..G-1, (n,): left-out outputs are those
            without the whole group, so that the estimate is for examples of new groups; None: all
            are independent.
        parts: ids 0..K-1 of examples that share one response, (n,); None: all of them do.
        cost: passed on.
        doubt: a reason known beforehand why the estimate is not valid.
    """
    in_double = _in_double(loss, outputs, targets)
    u, y = outputs.double(), _double(targets) if in_double else targets
    smooth = on_logits(loss if in_double else _cast(loss, outputs.dtype), u)
    losses = _scored(smooth, u, y)
    if not all(bool(t.isfinite().all()) for t in (outputs, *(twin.outputs for twin in twins))):
        return _failed(u, losses, cost, "outputs are not finite")
    some = (~ignored_examples(smooth, u, y)).nonzero().squeeze(1)
    if not len(some):
        return _failed(u, losses, cost, "no example has a loss: all are masked or of weight zero")
    given, u, y = u, u[some], y[some]
    pushed = _rows(twins, some)
    own = _of(groups, some)
    found = _respond(smooth, u, y, pushed, own)
    shared = [ResponsePart(slice(None), found.local_loss, found.dof, found.gains)]
    if parts is not None:
        ids = _of(parts, some)
        shared = (
            _parts_by_gradients(smooth, u, y, pushed, ids, whole=found, groups=own)
            if found.by_gradients
            else measure_parts(smooth, u, y, pushed, ids, whole=found.dof, groups=own)
        )
    together, *bounds = [None] if own is None else _together(found, pushed, u, own)
    left_out = _left_out(u, shared, together)
    mine = _scored(smooth, left_out, y)
    upper, under = (
        float(_scored(smooth, _left_out(u, shared, together, errors=e), y).mean()) for e in (1, -1)
    )
    value, fitted = float(mine.mean()), losses[some]
    sampling = grouped_error(mine - value, own) / len(mine)
    slope, influence = 0.5 * (upper - under), _of_unit_error(found.influence, own)
    rows, raised = [slope * influence], upper - value
    if together is not None:
        more, less = (float(_scored(smooth, _left_out(u, shared, t), y).mean()) for t in bounds)
        rows += [0.5 * (more - less) * _of_unit_error(together.common.deviations, own)]
        raised = math.hypot(raised, more - value)
    response = math.hypot(*(grouped_error(row, own) for row in torch.cat(rows)))
    endless = _fitted_without_end(smooth, found.local_loss, u, y)
    used = found.dof.dof if together is None else max(found.dof.dof, together.dof)
    count = len(mine) if own is None else int(own.max()) + 1
    judged = _Judged(value, value + raised, fitted, used, sampling, endless, count)
    level, order = LEVEL, ORDER
    if found.expansion <= MAX_EXPANSION:
        level, order = CALM_LEVEL, CALM_ORDER
    reason = doubt or judged.objection(level) or judged.uncertain()
    return RiskEstimate(
        value=value,
        standard_error=math.hypot(sampling, response),
        valid=not reason,
        reason=reason,
        comparable=not (doubt or judged.objection(order)),
        cost=cost,
        train_loss=float(fitted.mean()),
        response=found.dof.response,
        dof=found.dof.dof,
        dof_error=found.dof.dof_error,
        accuracy=_accuracy(smooth, found.local_loss, left_out, y),
        outputs=given.index_copy(0, some, left_out),
        losses=torch.zeros_like(losses).index_copy(0, some, mine),
        parts=tuple(part.dof for part in shared),
        influence=_spread_out(torch.cat(rows), some, len(given)),
        groups=groups,
        intraclass=0.0 if together is None else together.common.correlation,
        signs=_signature(twins),
        counted=torch.zeros(len(given), dtype=torch.bool).index_fill(0, some, True),
    )


def _signature(twins: Sequence[TwinOutputs]) -> int:
    """A number that two sets of twins share if they were pushed by the same signs."""
    return zlib.crc32(b"".join((t.perturbation > 0).cpu().numpy().tobytes() for t in twins))


class Response(NamedTuple):
    r"""How examples answer that share one gain.

    Attributes:
        local_loss: of their losses.
        dof: measured.
        gains: that explain it: less one standard error, as measured, and more by one.
        influence: of each example's answer on the error, (probes, n), in any unit.
        by_gradients: whether the gradients' response stood for the curvature's.
        expansion: what moved, as the gradients see it, over what the pushes account for,
            :math:`\sum\Delta u\cdot\Delta\nabla\ell/\sum t\cdot\Delta u`; at most 1 where
            outputs minimize their losses beside anything convex (firmly nonexpansive), more where
            training carries small differences away.
    """

    local_loss: LocalLoss
    dof: DegreesOfFreedom
    gains: Gains
    influence: Tensor
    by_gradients: bool
    expansion: float

    def ratio(self, times: float) -> float:
        """The gain of a response so many times as large, over that of this one."""
        dof = self.dof.dof
        if times == 1:
            return 1.0
        if self.by_gradients:
            return times * (1 - min(dof, MOST_USED)) / max(1 - times * dof, 1 - MOST_USED)
        gain = self.gains[1]
        return self.local_loss.gain(min(times * dof, MOST_USED)) / gain if gain else 1.0


class ResponsePart(NamedTuple):
    """Examples that share one response: which, the model of their losses, what was measured."""

    rows: Tensor | slice
    local_loss: LocalLoss
    dof: DegreesOfFreedom
    gains: Gains


class _Together(NamedTuple):
    """How examples of one group answer together.

    Attributes:
        common: what the responses of a group have in common.
        groups: ids, (n,).
        within: ratio of the gain of what a group's examples differ by to that of one alone.
        between: likewise of what they have in common, (n,).
        dof: degrees of freedom per output of what the largest group has in common.
    """

    common: Intraclass
    groups: Tensor
    within: float
    between: Tensor
    dof: float

    def moved(self, moves: Tensor) -> Tensor:
        """How outputs (n, c) move without their group, from how they do without themselves."""
        return left_out_together(moves, self.groups, self.within, self.between.to(moves))


def _together(
    found: Response, twins: Sequence[TwinOutputs], u: Tensor, groups: Tensor
) -> list[_Together]:
    """As measured, with a correlation higher by one standard error, and lower."""
    answers = list[tuple[Tensor, Tensor]]()
    for twin in twins:
        push, moved = _pushed_and_moved(u, twin)
        answers.append((push, moved if found.by_gradients else found.local_loss.curvature(moved)))
    common = intraclass(answers, groups)
    sizes, which = sizes_of(groups).unique(return_inverse=True)
    k, error = common.correlation, common.error
    return [
        _Together(
            common,
            groups,
            found.ratio(1 - end),
            _by_size(lambda m, end=end: found.ratio(1 + (m - 1) * end), sizes)[which],
            found.dof.dof * (1 + (int(sizes[-1]) - 1) * end),
        )
        for end in (k, min(k + error, 1.0), max(k - error, 0.0))
    ]


def _by_size(ratio: Callable[[float], float], sizes: Tensor) -> Tensor:
    """Ratios of groups of ascending sizes; of many sizes, some, and lines in logarithms."""
    if len(sizes) > MANY_SIZES:
        some = sizes[torch.linspace(0, len(sizes) - 1, MANY_SIZES).long()]
        known = _by_size(ratio, some).clamp_min(TINY).log()
        x, at = sizes.double().log(), some.double().log()
        right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
        share = (x - at[right - 1]) / (at[right] - at[right - 1])
        return (known[right - 1] + share * (known[right] - known[right - 1])).exp()
    return torch.tensor(
        [ratio(m) for m in sizes.tolist()], dtype=torch.float64, device=sizes.device
    )


def _left_out(
    u: Tensor, parts: Sequence[ResponsePart], together: _Together | None, *, errors: int = 0
) -> Tensor:
    """Left-out outputs, every part's response raised by so many of its standard errors."""
    flat = u.reshape(len(u), -1)
    found = flat.clone()
    for rows, local_loss, _, gains in parts:
        found[rows] = local_loss.leave_one_out(flat[rows], gains[1 + errors])
    if together is not None:
        found = flat + together.moved(found - flat)
    return found.reshape(u.shape)


def _of_unit_error(deviations: Tensor, groups: Tensor | None) -> Tensor:
    """Deviations (probes, n) in units of the standard error of their sum."""
    error = math.hypot(*(grouped_error(row, groups) for row in deviations))
    return deviations / max(error, TINY)


def _pushed_and_moved(outputs: Tensor, twin: TwinOutputs) -> tuple[Tensor, Tensor]:
    """A twin's perturbation, and by how much its outputs differ, both (n, c), float64."""
    push = twin.perturbation.double().reshape(len(outputs), -1)
    return push, (twin.outputs.double() - outputs).reshape_as(push)


def _rows(twins: Sequence[TwinOutputs], rows: Tensor) -> list[TwinOutputs]:
    return [TwinOutputs(t.outputs[rows], t.perturbation[rows]) for t in twins]


def _scored(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    return loss(outputs, targets).detach().double()


def _of(ids: Tensor | None, rows: Tensor) -> Any:
    """Ids 0..K-1 of some of the examples."""
    return None if ids is None else torch.unique(ids[rows], return_inverse=True)[1]


def _spread_out(values: Tensor, some: Tensor, n: int) -> Tensor:
    """Values (k, m) of some of n examples among all, zero at the others."""
    found = torch.zeros(len(values), n, dtype=values.dtype, device=values.device)
    return found.index_copy(1, some, values)


def _respond(
    loss: PerExampleLoss,
    outputs: Tensor,
    targets: Tensor,
    twins: Sequence[TwinOutputs],
    groups: Tensor | None,
) -> Response:
    """The response of examples, from the curvature of their losses or from their gradients."""
    local_loss = local_loss_of(loss, outputs, targets)
    answers = [_answer(loss, local_loss, outputs, targets, twin) for twin in twins]
    dof = measure_dof(local_loss, outputs, twins, groups)
    gains = _curved_gains(local_loss, dof)
    deviations = [a.follows - dof.dof * a.size for a in answers]
    turned = _by_gradients(answers, groups)
    bent = is_bent([a.bend for a in answers]) and not (
        _agree(dof.dof, turned.dof.dof) and gains[1] <= turned.gains[1]
    )
    if bent or gains[1] >= LARGEST_GAIN:
        bent, (dof, gains, deviations) = True, turned
    spent, given = (
        sum(float(row.sum()) for row in rows)
        for rows in ([a.spent for a in answers], [a.moved for a in answers])
    )
    expansion = spent / given if given > 0 else math.inf
    return Response(local_loss, dof, gains, torch.stack(deviations), bent, expansion)


def _agree(curved: float, turned: float) -> bool:
    """Whether the curvature's degrees of freedom are those of the gradients' own response."""
    return turned > 0 and abs(curved - turned) <= BENT * turned


def _curved_gains(local_loss: LocalLoss, dof: DegreesOfFreedom) -> Gains:
    low, middle, high = (local_loss.gain(dof.dof + e * dof.dof_error) for e in (-1, 0, 1))
    return low, middle, high


def _around(gain: float, error: float) -> Gains:
    return max(gain - error, 0.0), max(gain, 0.0), max(gain + error, 0.0)


class _Answer(NamedTuple):
    """What one twin did at each example (n,), and how far its gradients are off the curvature's.

    Attributes:
        size: squared perturbation.
        moved: outputs along it.
        follows: the curvature's gradient change along it.
        turned: the gradients' change along it.
        spent: the gradients' change along what moved.
        bend: how far the loss is from quadratic over what moved.
    """

    size: Tensor
    moved: Tensor
    follows: Tensor
    turned: Tensor
    spent: Tensor
    bend: Bend


def _answer(
    loss: PerExampleLoss, local_loss: LocalLoss, outputs: Tensor, targets: Tensor, twin: TwinOutputs
) -> _Answer:
    t, moved = _pushed_and_moved(outputs, twin)
    turned = gradient_of(loss, twin.outputs.double(), targets).double() - local_loss.gradient
    return _Answer(
        t.square().sum(1),
        (t * moved).sum(1),
        (local_loss.curvature(t) * moved).sum(1),
        (t * turned).sum(1),
        (moved * turned).sum(1),
        bend_of(loss, local_loss, outputs, targets, moved),
    )


class _ByGradients(NamedTuple):
    dof: DegreesOfFreedom
    gains: Gains
    deviations: list[Tensor]


def _by_gradients(answers: Sequence[_Answer], groups: Tensor | None) -> _ByGradients:
    """DegreesOfFreedom, the gains and the examples' deviations, without the curvature."""
    total = sum(float(a.size.sum()) for a in answers)
    h = sum(float(a.moved.sum()) for a in answers) / total
    used = sum(float(a.turned.sum()) for a in answers) / total
    left = max(1 - used, 1 - MOST_USED)
    gain = h / left
    # The total differential of h / (1 - φ), so that errors the two share are counted once.
    deviations = [
        PAIRED * (a.moved + gain * a.turned - (h + gain * used) * a.size) / (left * total)
        for a in answers
    ]
    turned = [PAIRED * (a.turned - used * a.size) / total for a in answers]
    error, used_error = (
        math.hypot(*(grouped_error(d, groups) for d in rows)) for rows in (deviations, turned)
    )
    return _ByGradients(DegreesOfFreedom(used, used_error, h), _around(gain, error), deviations)


def measure_parts(
    loss: PerExampleLoss,
    outputs: Tensor,
    targets: Tensor,
    twins: Sequence[TwinOutputs],
    parts: Tensor,
    *,
    whole: DegreesOfFreedom,
    groups: Tensor | None = None,
) -> list[ResponsePart]:
    r"""The response of each part of the examples, drawn towards that of all by its own noise.

    A part is measured with fewer signs, so with more error :math:`\epsilon_k`. It has
    :math:`\varphi + w_k(\varphi_k-\varphi)` with :math:`w_k=\tau^2/(\tau^2+\epsilon_k^2)`, where
    :math:`\tau^2` is what the parts differ by beyond their errors (empirical Bayes).

    Args:
        loss: one value an example.
        outputs: (n, ...), float64.
        targets: (n, ...).
        twins: the perturbed runs.
        parts: ids 0..K-1, (n,).
        whole: degrees of freedom of all examples.
        groups: as in :func:`estimate_risk`.
    """
    found: list[ResponsePart] = []
    for k in range(int(parts.max()) + 1):
        rows = (parts == k).nonzero().squeeze(1)
        local_loss = local_loss_of(loss, outputs[rows], targets[rows])
        dof = measure_dof(local_loss, outputs[rows], _rows(twins, rows), _of(groups, rows))
        found.append(ResponsePart(rows, local_loss, dof, ALONE))
    noise = sum(p.dof.dof_error**2 for p in found) / len(found)
    spread = sum((p.dof.dof - whole.dof) ** 2 for p in found) / len(found)
    real = max(spread - noise, 0.0)
    drawn = [p._replace(dof=_drawn(p.dof, whole, real)) for p in found]
    return [p._replace(gains=_curved_gains(p.local_loss, p.dof)) for p in drawn]


def _parts_by_gradients(
    loss: PerExampleLoss,
    outputs: Tensor,
    targets: Tensor,
    twins: Sequence[TwinOutputs],
    parts: Tensor,
    *,
    whole: Response,
    groups: Tensor | None,
) -> list[ResponsePart]:
    """As :func:`measure_parts`, of gains where no curvature tells the degrees of freedom."""
    found: list[ResponsePart] = []
    for k in range(int(parts.max()) + 1):
        rows = (parts == k).nonzero().squeeze(1)
        u, y, mine = outputs[rows], targets[rows], _rows(twins, rows)
        local_loss = local_loss_of(loss, u, y)
        own = _by_gradients([_answer(loss, local_loss, u, y, t) for t in mine], _of(groups, rows))
        found.append(ResponsePart(rows, local_loss, own.dof, own.gains))
    errors = [0.5 * (p.gains[2] - p.gains[0]) for p in found]
    middle, error = whole.gains[1], 0.5 * (whole.gains[2] - whole.gains[0])
    noise = sum(e**2 for e in errors) / len(found)
    real = max(sum((p.gains[1] - middle) ** 2 for p in found) / len(found) - noise, 0.0)
    gains = [
        _drawn(DegreesOfFreedom(p.gains[1], e, 0.0), DegreesOfFreedom(middle, error, 0.0), real)
        for p, e in zip(found, errors, strict=True)
    ]
    return [
        p._replace(gains=_around(g.dof, g.dof_error)) for p, g in zip(found, gains, strict=True)
    ]


def _drawn(own: DegreesOfFreedom, whole: DegreesOfFreedom, real: float) -> DegreesOfFreedom:
    w = real / (real + own.dof_error**2) if real > 0 else 0.0
    value = whole.dof + w * (own.dof - whole.dof)
    return DegreesOfFreedom(
        value, math.hypot(w * own.dof_error, (1 - w) * whole.dof_error), own.response
    )


def measure_dof(
    local_loss: LocalLoss,
    outputs: Tensor,
    twins: Sequence[TwinOutputs],
    groups: Tensor | None = None,
) -> DegreesOfFreedom:
    r"""Hutchinson's estimate of :math:`\tfrac1N\sum_i\mathrm{tr}(B_iH_i)`, from the twins.

    Its error is that of independent groups times :data:`PAIRED`: entries of the response that
    mirror each other enter together.

    Args:
        local_loss: of the loss at ``outputs``.
        outputs: (n, ...), float64.
        twins: the perturbed runs.
        groups: as in :func:`estimate_risk`.
    """
    found = [_one_dof(local_loss, outputs, twin, groups) for twin in twins]
    k = len(found)
    return DegreesOfFreedom(
        sum(f.dof for f in found) / k,
        math.sqrt(sum(f.dof_error**2 for f in found)) / k,
        sum(f.response for f in found) / k,
    )


def _one_dof(
    local_loss: LocalLoss, outputs: Tensor, twin: TwinOutputs, groups: Tensor | None
) -> DegreesOfFreedom:
    t, moved = _pushed_and_moved(outputs, twin)
    size = t.square().sum(1)
    total = float(size.sum())
    follows = (local_loss.curvature(t) * moved).sum(1)
    value = float(follows.sum()) / total
    error = PAIRED * grouped_error(follows - value * size, groups) / total
    return DegreesOfFreedom(
        value, error, _label_scale(local_loss) * float((t * moved).sum()) / total
    )


def _label_scale(local_loss: LocalLoss) -> float:
    """How a perturbation enters a label: by a squared error's curvature; 1 for other losses."""
    diagonal = getattr(local_loss, "diagonal", None)
    if diagonal is None or not float(diagonal.max()) > 0:
        return 1.0
    spread = float(diagonal.max() - diagonal.min())
    return float(diagonal.mean()) if spread <= 1e-9 * float(diagonal.max()) else 1.0


class _Judged(NamedTuple):
    """What an estimate is judged by.

    Attributes:
        value: the estimate.
        upper: the same with a response higher by one standard error.
        fitted: losses as trained, (n,).
        dof: share of the outputs' freedom that is used up.
        sampling: standard error of the mean loss.
        endless: share of examples that are fitted although their loss has no minimum.
        count: of examples or groups that are independent.
    """

    value: float
    upper: float
    fitted: Tensor
    dof: float
    sampling: float
    endless: float
    count: int

    def objection(self, limits: _Limits) -> str:
        """Why the estimate is not to be believed, however certain; empty if nothing is known."""
        if not math.isfinite(self.value) or not math.isfinite(self.upper):
            return "the estimate is not finite"
        if self.count < 2:
            return "a single example or group leaves no standard error"
        limit, most = limits
        train = float(self.fitted.mean())
        above, base = self.value - train, _base(self.fitted)
        if self.endless >= SEPARABLE:
            return (
                f"separable: {self.endless:.1%} of the labels are fitted, so that the training "
                "loss falls without end and an output no longer follows its own label"
            )
        if self.dof > most:
            return f"deep interpolation: {self.dof:.0%} of the outputs' freedom is used up"
        if not base > 0:
            return "deep interpolation: no training loss is left"
        if above <= (limit - 1) * base:
            return ""
        if base == train:
            times = self.value / train
            return f"deep interpolation: the estimate is {times:.1f} times the training loss"
        return (
            f"deep interpolation: the estimate lies {above / base:.1f} times the spread of the "
            "training losses above their mean"
        )

    def uncertain(self) -> str:
        """Which error is too large for its level to mean much; empty if none is."""
        size = max(abs(self.value), _base(self.fitted))
        if self.upper - self.value > MAX_UNCERTAINTY * size:
            return (
                f"the twin's response is uncertain: one standard error changes the estimate by "
                f"{(self.upper - self.value) / size:.0%}; use more probes or a larger delta"
            )
        if self.sampling > FEW_EXAMPLES * size:
            share = self.sampling / size
            return f"too few examples: their losses alone leave {share:.0%} uncertainty"
        return ""


def _fitted_without_end(
    loss: PerExampleLoss, local_loss: LocalLoss, outputs: Tensor, targets: Tensor
) -> float:
    """Share of examples on the right side of a loss that falls further and further there.

    Logistic losses and hinges do: their gradients vanish far along the descent. Fitted is an
    example whose gradient pulls up the largest output, or, where outputs are no classes that
    compete, pulls at all of them less than at outputs of zero.
    """
    g, flat = local_loss.gradient, outputs.reshape(len(outputs), -1)
    largest = g.abs().amax(1, keepdim=True)
    step = FAR * (1 + flat.abs().amax(1, keepdim=True)) * g / largest.clamp_min(TINY)
    far = (flat - step).reshape(outputs.shape)
    vanishes = gradient_of(loss, far, targets).double().abs().amax(1) <= 1e-3 * largest[:, 0]
    endless = vanishes & (_scored(loss, far, targets) <= _scored(loss, outputs, targets))
    if local_loss.shift_invariant:
        fitted = (flat.argmax(1) == g.argmin(1)) | (largest[:, 0] == 0)
    else:
        neutral = gradient_of(loss, torch.zeros_like(outputs), targets).double()
        fitted = (g.abs() < neutral.abs()).all(1)
    return float((endless & fitted).double().mean())


def _base(losses: Tensor) -> float:
    """What a correction is compared with: the mean loss, or the spread of losses below zero.

    A log-likelihood of numbers has no zero of its own. Half a squared normal number has a mean of
    :data:`SPREAD` times its mean absolute deviation, so that both are one scale.
    """
    if float(losses.min()) >= 0:
        return float(losses.mean())
    return SPREAD * float((losses - losses.median()).abs().mean())


def _accuracy(
    loss: PerExampleLoss, local_loss: LocalLoss, outputs: Tensor, targets: Tensor
) -> float | None:
    """Share of right classes; None where targets are not classes."""
    if local_loss.shift_invariant and outputs.ndim == 2:
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        return float((outputs.argmax(1) == classes).double().mean())
    if targets.shape != outputs.shape or not bool(((targets == 0) | (targets == 1)).all()):
        return None
    # Squared error on 0/1 labels is least at the label itself, a logistic loss beyond it.
    y = targets.to(outputs)
    at, beyond = _scored(loss, y, targets), _scored(loss, 3 * y - 1, targets)
    boundary = 0.5 if bool((at <= beyond).all()) else 0.0
    return float(((outputs > boundary) == (targets > 0.5)).double().mean())


def _failed(u: Tensor, losses: Tensor, cost: float, reason: str) -> RiskEstimate:
    nan = math.nan
    train = float(losses.mean())
    return RiskEstimate(
        nan,
        nan,
        False,
        reason,
        False,
        cost,
        train,
        nan,
        nan,
        nan,
        None,
        u,
        torch.full_like(losses, nan),
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
