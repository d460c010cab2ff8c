r"""Leave-one-out path response: what a recorded run would have been without each example.

Along the realized path the displacement :math:`d_i` of the weights by deleting example i follows

.. math:: m_i \leftarrow \mu m_i + \sum_{j\ne i} s_j \nabla^2_w\ell_j\, d_i - s_i\nabla_w\ell_i
          + \lambda d_i,\qquad d_i \leftarrow d_i - \eta m_i

with s the step's weights of examples, its own term removed from the curvature. ``"gauss-newton"``
takes :math:`J_j^\top B_jJ_j` for the Hessian of an example (exact where outputs are linear in the
weights, biased low where features adapt to the labels), ``"hessian"`` the full one (Flow-ALO,
iterative approximate cross-validation: blows up in strongly overfit nonconvex runs). [LG, Thm G.10,
Cor. G.13; Luo, Ren, Barber 2023; the discrete form is ours].
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from poprisk import checks
from poprisk.checks import risk as inputs
from poprisk.risk.estimate import TwinOutputs, grouped_error, measure_freedom
from poprisk.risk.links import PerExampleLoss, link_of

FORMS = ("gauss-newton", "hessian")
CHUNK = 64
"""Deletions that are propagated at a time."""
BLOWN_UP = 3.0
"""Largest ratio of the estimate to the training loss that is believed."""

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A run of SGD: what it was trained on, and its path.

    Args:
        model: its outputs are (b, c).
        loss: one value an example; a step descends its mean over the batch.
        x: training inputs (n, ...).
        y: training targets (n, ...).
        weights: flat weights before each step and at the end, K+1 of (P,), in the order of
            ``model.parameters()``.
        batches: indices of the examples of each step, K.
        lr: learning rate of each step, K.
        momentum: of ``torch.optim.SGD``.
        weight_decay: likewise.
    """

    model: nn.Module
    loss: PerExampleLoss
    x: Tensor
    y: Tensor
    weights: Sequence[Tensor]
    batches: Sequence[Tensor]
    lr: Sequence[float]
    momentum: float = 0.0
    weight_decay: float = 0.0


class LooRisk(NamedTuple):
    """Leave-one-out estimate of a recorded run.

    Attributes:
        value: mean loss of the deleted examples.
        standard_error: over deletions.
        valid: whether the value may be believed.
        reason: why not.
        cost: seconds.
        freedom: degrees of freedom per output by the same form, for one random probe; what a twin
            measures beyond it is the adaptation of features.
        outputs: left-out outputs of the examples at ``index``, (k, c).
        index: which examples were deleted, (k,).
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    cost: float
    freedom: float
    outputs: Tensor
    index: Tensor


def loo_risk(
    run: RecordedRun,
    *,
    form: str = "gauss-newton",
    subset: int | None = None,
    group_ids: Tensor | None = None,
    seed: int = 0,
) -> LooRisk:
    """Estimate population risk by deleting every example of a run, or every group.

    Args:
        run: see :class:`RecordedRun`; in evaluation mode, in double precision for exact results.
        form: ``"gauss-newton"`` or ``"hessian"``.
        subset: how many examples to delete, drawn at random; None: all.
        group_ids: (n,), to delete examples together that depend on each other.
        seed: of the subset and of the probe.

    Raises:
        ValueError, TypeError: if the record is incomplete or an argument is bad.
    """
    began = time.perf_counter()
    checks.check_choice("form", form, FORMS)
    inputs.check_recorded(run)
    n = len(run.y)
    generator = torch.Generator().manual_seed(seed)
    index = inputs.check_subset(subset, n, group_ids, generator)
    deleted = torch.eye(n, dtype=torch.bool)[index]
    if group_ids is not None:
        ids = inputs.check_groups(group_ids, n)
        deleted = torch.stack([ids == g for g in range(int(ids.max()) + 1)])
    _prepare_forward_mode()
    path = _Path(run, form)
    left_out = torch.empty_like(path.final)
    for rows in deleted.split(CHUNK):
        moved = path.outputs_moved(path.displacements(rows, torch.zeros_like(path.final)))
        for row, change in zip(rows, moved, strict=True):
            left_out[row] = path.final[row] + change[row]
    outputs = left_out[index]
    losses = run.loss(outputs, run.y[index]).detach().double()
    value, train = float(losses.mean()), float(run.loss(path.final, run.y).detach().mean())
    groups = None if group_ids is None else inputs.check_groups(group_ids, n)
    error = grouped_error(losses - value, groups) / len(losses)
    reason = _objection(value, train)
    freedom = path.freedom(generator)
    cost = time.perf_counter() - began
    return LooRisk(value, error, not reason, reason, cost, freedom, outputs, index)


def _objection(value: float, train: float) -> str:
    if not math.isfinite(value):
        return "the response blew up"
    if value > BLOWN_UP * train > 0:
        return f"the estimate is {value / train:.1f} times the training loss"
    return ""


class _Path:
    """Propagates displacements of the weights along a run."""

    def __init__(self, run: RecordedRun, form: str) -> None:
        self.run, self.form = run, form
        named = dict(run.model.named_parameters())
        self.names = list(named)
        self.shapes = [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        with torch.no_grad():
            self.final = self.outputs(run.weights[-1], run.x)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs (b, c) at flat weights."""
        parts = zip(self.names, w.split(self.sizes), self.shapes, strict=True)
        return functional_call(self.run.model, {k: p.view(s) for k, p, s in parts}, (x,))

    def displacements(self, deleted: Tensor, tilt: Tensor) -> Tensor:
        """Displacements (G, P) at the end, by deletions (G, n) or a tilt of all losses (n, c)."""
        run = self.run
        d = run.weights[0].new_zeros(len(deleted), sum(self.sizes))
        m = torch.zeros_like(d)
        for w, batch, lr in zip(run.weights, run.batches, run.lr, strict=False):
            change = self._gradient_change(w, batch, deleted[:, batch], tilt[batch], d)
            m = run.momentum * m + change + run.weight_decay * d
            d = d - lr * m
        return d

    def outputs_moved(self, d: Tensor) -> Tensor:
        """Changes (G, n, c) of the final outputs, to first order."""

        def f(w: Tensor) -> Tensor:
            return self.outputs(w, self.run.x)

        return _along(f, self.run.weights[-1], d)

    def freedom(self, generator: torch.Generator) -> float:
        """Degrees of freedom per output, by Hutchinson's estimate with one probe."""
        link = link_of(self.run.loss, self.final, self.run.y)
        z = 2.0 * torch.randint(2, self.final.shape, generator=generator).to(self.final) - 1
        z = z - z.mean(1, keepdim=True) if link.gauge else z
        nothing = torch.zeros(1, len(z), dtype=torch.bool)
        moved = self.outputs_moved(self.displacements(nothing, z))[0]
        return measure_freedom(link, self.final, [TwinOutputs(self.final + moved, z)]).value

    def _gradient_change(
        self, w: Tensor, batch: Tensor, deleted: Tensor, tilt: Tensor, d: Tensor
    ) -> Tensor:
        """Change (G, P) of the step's gradient by deletions (G, b) and displacements so far."""
        x, y, b = self.run.x[batch], self.run.y[batch], len(batch)

        def f(v: Tensor) -> Tensor:
            return self.outputs(v, x)

        def total(u: Tensor, kept: Tensor) -> Tensor:
            return (kept * self.run.loss(u, y)).sum() / b

        u, back = vjp(f, w)[:2]
        own = grad(total)(u, torch.ones_like(u[:, 0]))
        kept = (~deleted).to(u)
        source = own * deleted.unsqueeze(2) + tilt / b

        def one(direction: Tensor, k: Tensor, from_own: Tensor) -> Tensor:
            if self.form == "hessian":

                def weighted(v: Tensor) -> Tensor:
                    return total(f(v), k)

                def slope(v: Tensor) -> Tensor:
                    return grad(weighted)(v)

                return jvp(slope, (w,), (direction,))[1] - back(from_own)[0]
            moved = jvp(f, (w,), (direction,))[1]
            curved = jvp(grad(total), (u, k), (moved, torch.zeros_like(k)))[1]
            return back(curved - from_own)[0]

        return vmap(one)(d, kept, source).detach()


def _along(f: Map, w: Tensor, directions: Tensor) -> Tensor:
    """Derivatives of f at w along each of the directions (G, P)."""

    def one(direction: Tensor) -> Tensor:
        return jvp(f, (w,), (direction,))[1]

    return vmap(one)(directions).detach()


@functools.cache
def _prepare_forward_mode() -> None:
    """Let torch load what forward-mode derivatives need, without its own deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))
