r"""Leave-one-out path response: what a recorded run would have been without each example.

Along the realized path the displacement :math:`d_i` of the weights by deleting example i follows
the optimizer's own step, which is linear in its gradients (:mod:`poprisk.optim.step`):

.. math:: \hat g_i = \tfrac1n\sum_{j\ne i} S_j \nabla^2_w\ell_j\, d_i
          - \tfrac1n S_i\nabla_w\ell_i + \lambda d_i,\quad
          m_i \leftarrow a m_i + c \odot \hat g_i,\quad
          d_i \leftarrow d_i - \gamma\,\eta M \odot (p\, m_i + q\, \hat g_i) - \delta d_i

with the sampling S of the step, its own term removed from the curvature. ``"gauss-newton"``
takes :math:`J_j^\top B_jJ_j` for the Hessian of an example (exact where outputs are linear in the
weights, biased low where features adapt to the labels), ``"hessian"`` the full one (Flow-ALO,
iterative approximate cross-validation: blows up in strongly overfit nonconvex runs). [LG, Thm G.10,
Cor. G.13; Luo, Ren, Barber 2023; the discrete form is ours].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from poprisk import _validate as checks
from poprisk import losses as of_outputs
from poprisk._renamed import renamed_arguments, renamed_attributes
from poprisk.path import NotAnalysable, Run
from poprisk.path.checks import check_uncut
from poprisk.path.recursion import Recursion
from poprisk.path.run import check_answers
from poprisk.printing import short_html, short_repr
from poprisk.randomness import generator_of
from poprisk.risk import inputs
from poprisk.risk.estimate import DegreesOfFreedom, TwinOutputs, measure_dof
from poprisk.risk.grouped import grouped_error
from poprisk.risk.local_losses import NO_CURVATURE, bend_of, is_bent, local_loss_of

FORMS = ("gauss-newton", "hessian")
CHUNK = 64
"""Deletions that are propagated at a time."""
BLOWN_UP = 3.0
"""Largest ratio of the estimate to the training loss that is believed."""


@renamed_attributes(freedom="dof", freedom_error="dof_error")
class LooRisk(NamedTuple):
    """Leave-one-out estimate of a recorded run.

    Attributes:
        value: mean loss of the deleted examples.
        standard_error: over deletions.
        valid: whether the value may be believed.
        reason: why not.
        cost: time it took over that of the run's own training; NaN where a run does not say.
        dof: degrees of freedom per output by the same form, for one random probe.
        dof_error: its standard error.
        outputs: left-out outputs of the examples at ``index``, (k, ...) in the model's shape.
        index: which examples were deleted, (k,).
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    cost: float
    dof: float
    dof_error: float
    outputs: Tensor
    index: Tensor

    __repr__ = short_repr
    _repr_html_ = short_html


@renamed_arguments(group_ids="groups")
@torch.inference_mode(False)  # what it makes on the way is differentiated
def loo_risk(
    run: Run,
    *,
    form: str = "gauss-newton",
    subset: int | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
) -> LooRisk:
    """Estimate population risk by deleting every example of a run, or every group.

    A step of SGD, with momentum, Nesterov and decay, is followed exactly. The preconditioner of
    Adam, AdamW, RMSprop and the gate is held as it was in the run; what a deletion would change in
    it is left out, and the estimate flagged.

    Args:
        run: from :func:`poprisk.record` or a :class:`poprisk.Recorder`, every step recorded; in
            double precision for exact results.
        form: ``"gauss-newton"`` or ``"hessian"``.
        subset: how many examples to delete, drawn at random; None: all.
        groups: ids of dependent examples, (n,), which are deleted together.
        seed: of the subset and of the probe.

    Raises:
        TypeError: if ``run`` is no recorded run.
        NotAnalysable: if it cannot be followed without an example, or its files are gone.
        ValueError: if another argument is bad.

    Example:
        >>> from poprisk import record
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x = torch.tensor([[1.0], [2.0], [3.0]]).double()
        >>> run = record(net, "squared_error", sgd, [torch.arange(3)] * 200, train=(x, x + 1))
        >>> loo_risk(run).outputs.flatten()  # by the least squares of the other two
        tensor([1.3846, 2.8000, 4.8000], dtype=torch.float64)
    """
    began = time.perf_counter()
    checks.check_choice("form", form, FORMS)
    check_answers(run)
    instead = "use poprisk.TwinRisk, which trains as the model is trained."
    check_uncut(run.problem, "leave-one-out along the path", instead)
    n = run.problem.n
    generator = generator_of(seed, "leave one out")
    index = inputs.check_subset(subset, n, groups, generator)
    ids = None if groups is None else inputs.check_groups(groups, n)
    deleted = torch.eye(n, dtype=torch.bool)[index]
    if ids is not None:
        deleted = ids == torch.arange(int(ids.max()) + 1).unsqueeze(1)
    path = _Path(run, form)
    left_out = path.without(deleted)[index]
    train, losses = path.losses(path.final), path.losses(left_out, index)
    value = float(losses.mean())
    reason = _objection(value, float(train.mean()), run)
    if not reason and path.bent(left_out, index):
        reason = NO_CURVATURE
    dof = path.dof(generator)
    return LooRisk(
        value=value,
        standard_error=grouped_error(losses - value, ids) / len(losses),
        valid=not reason,
        reason=reason,
        cost=run.trainings(time.perf_counter() - began),
        dof=dof.dof,
        dof_error=dof.dof_error,
        outputs=path.problem.shaped(left_out),
        index=index,
    )


def _objection(value: float, train: float, run: Run) -> str:
    if not math.isfinite(value):
        return "the response blew up"
    if value > BLOWN_UP * train > 0:
        return f"the estimate is {value / train:.1f} times the training loss"
    if run.preconditioned:
        return f"the preconditioner of {run.optimizer} is held as it was with all examples"
    return ""


class _Path:
    """Propagates displacements of the weights along a run, in the precision of its weights."""

    def __init__(self, run: Run, form: str) -> None:
        self.run, self.form, self.dtype = run, form, run.weights.dtype
        self.problem = run.problem.to(self.dtype)
        self.x, self.y = self.problem.train
        self.w = run.weights[len(run)]
        inputs.check_transformable(self.problem, self.w)
        self.final = self.problem.J.values(self.w, self.x)
        self.vectorized = True
        flaw = self._flaw()
        if flaw and form == "hessian":
            raise NotAnalysable(
                f"{flaw}; write that part of the model with other operations of torch, or choose "
                'form="gauss-newton".'
            )
        self.vectorized = not flaw

    def losses(self, u: Tensor, index: Tensor | None = None) -> Tensor:
        """Losses (k,) of outputs (k, c) of the examples at ``index``, or of all."""
        y = self.y if index is None else self.y[index]
        return self.problem.loss(self.problem.shaped(u), y).detach().double()

    def bent(self, left_out: Tensor, index: Tensor) -> bool:
        """Whether the loss is not quadratic over what deletions move, up or down."""
        problem = self.run.problem.to(torch.float64)
        u, y = self.final[index].double(), problem.train[1][index]
        local_loss = local_loss_of(problem.loss, problem.shaped(u), y)
        moved = left_out.double() - u
        return is_bent(
            [
                bend_of(problem.loss, local_loss, problem.shaped(u), y, s * moved)
                for s in (1.0, -1.0)
            ]
        )

    def without(self, deleted: Tensor) -> Tensor:
        """Outputs (n, c), each without the deletion (a row of (G, n)) that it is part of."""
        left_out = self.final.clone()
        for rows in deleted.split(CHUNK):
            moved = self.moved(rows, torch.zeros_like(self.final))
            for row, change in zip(rows, moved, strict=True):
                left_out[row] += change[row]
        return left_out

    def dof(self, generator: torch.Generator) -> DegreesOfFreedom:
        """Degrees of freedom per output, by Hutchinson's estimate with one probe."""
        problem = self.run.problem.to(torch.float64)
        u = problem.shaped(self.final.double())
        local_loss = local_loss_of(problem.loss, u, problem.train[1])
        z = 2.0 * torch.randint(2, self.final.shape, generator=generator).to(self.final) - 1
        z = z - z.mean(1, keepdim=True) if local_loss.shift_invariant else z
        moved = self.moved(torch.zeros(1, len(z), dtype=torch.bool), z)[0]
        return measure_dof(local_loss, u, [TwinOutputs(u + problem.shaped(moved), z)])

    def moved(self, deleted: Tensor, perturbation: Tensor) -> Tensor:
        """Changes (G, n, c) of the final outputs, to first order.

        Args:
            deleted: examples of each deletion, (G, n), boolean.
            perturbation: what is subtracted from all output gradients besides, (n, c).
        """
        return self.problem.J.jvp(
            self.w, self.x, self.displacements(deleted, perturbation)
        ).movedim(-1, 0)

    def _flaw(self) -> str:
        """Why changes cannot be had for all deletions at once, tried on the first step; or empty.

        Losses and models may lack what vmap or forward mode take: ``huber_loss``, checkpoints.
        """
        if self.problem.J.no_forward_mode:
            return self.problem.J.no_forward_mode
        n, nothing = self.problem.n, torch.zeros_like(self.w).unsqueeze(1)
        try:
            self._change(0, torch.zeros(1, n, dtype=torch.bool), 0 * self.final, nothing)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return ""

    def displacements(self, deleted: Tensor, perturbation: Tensor) -> Tensor:
        """Displacements (P, G) of the weights at the end; arguments as for :meth:`moved`."""
        d = torch.zeros(len(self.w), len(deleted), dtype=self.dtype)
        recursion = Recursion(torch.zeros_like(d), d)
        for k in range(len(self.run)):
            change = self._change(k, deleted, perturbation, d)
            recursion.step(self.run.rule(k, self.dtype), change)  # moves d
        return d

    def _change(self, k: int, deleted: Tensor, perturbation: Tensor, d: Tensor) -> Tensor:
        """Change (P, G) of the gradient of step k by deletions and displacements so far."""
        interval, w, loss = self.run.intervals[k], self.run.weights[k], self.problem.loss
        x, y = self.x[interval.examples], self.y[interval.examples]
        share = interval.sampling.to(self.dtype).view(-1, 1, 1) / self.problem.n
        gone = deleted[:, interval.examples].T.unsqueeze(1)
        u, pull = self._pullback(w, x)
        shaped = self.problem.shaped(u)
        own = of_outputs.gradient(loss, shaped, y).reshape_as(u).unsqueeze(2)
        source = share * (own * gone + perturbation[interval.examples].unsqueeze(2))
        kept = share * ~gone
        if self.form == "hessian":
            return self._curved(w, x, y, d, kept.squeeze(1)) - pull(source)
        curved = of_outputs.hessian_product(loss, shaped, y, self.problem.J.jvp(w, x, d))
        return pull(kept * curved - source)

    def _pullback(self, w: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs, and the transposed Jacobian of all columns at once, if that is to be had."""
        if not self.vectorized:
            return self.problem.J.pullback(w, x)

        def outputs(v: Tensor) -> Tensor:
            return self.problem.J.outputs(v, x)

        u, back = vjp(outputs, w)[:2]

        def pull(vectors: Tensor) -> Tensor:
            (pulled,) = vmap(back, in_dims=2, out_dims=1)(vectors)
            return pulled.detach()

        return u.detach(), pull

    def _curved(self, w: Tensor, x: Tensor, y: Tensor, d: Tensor, kept: Tensor) -> Tensor:
        """The Hessian of the weighted loss, in the weights, times displacements (P, G)."""

        def total(v: Tensor, weight: Tensor) -> Tensor:
            shaped = self.problem.shaped(self.problem.J.outputs(v, x))
            return (weight * self.problem.loss(shaped, y)).sum()

        def along(direction: Tensor, weight: Tensor) -> Tensor:
            def slope(v: Tensor) -> Tensor:
                return grad(total)(v, weight)

            return jvp(slope, (w,), (direction,))[1]

        return vmap(along, in_dims=1, out_dims=1)(d, kept).detach()
