r"""The adaptation gap: how much more a network follows its labels than its path alone explains.

Along the path it took, training answers linearly to labels pushed by t: the outputs move by
:math:`D t / n` (:mod:`poprisk.path`), with every Jacobian and preconditioner as it was. A twin
trained on pushed labels answers with all that adapts to them. Of what a twin measures as

.. math:: \varphi = \frac1N\sum_i\mathrm{tr}\,B_i\frac{\partial u_i}{\partial t_i}

the path explains :math:`\tfrac1{nN}\mathrm{tr}\,BD` (weight decay, which D leaves aside, acting on
what the push moved); the rest is the adaptation of features, and of the optimizer's second moments
and mask. For squared error :math:`B = I`, h in place of φ. Ours.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.path import Closure, Run
from poprisk.path.follow import follow_all
from poprisk.path.run import check_answers
from poprisk.printing import short_html, short_repr
from poprisk.risk import inputs
from poprisk.risk.estimate import DegreesOfFreedom, TwinOutputs, measure_dof
from poprisk.risk.local_losses import NO_CURVATURE, bend_of, is_bent, local_loss_of
from poprisk.risk.twin import TwinRisk


class AdaptationGap(NamedTuple):
    r"""What follows a network's labels beyond the response of its path.

    Attributes:
        value: ``twin`` minus ``path``.
        standard_error: of the value. Both are measured with the same pushes, whose noise mostly
            cancels, so it is far below that of either.
        twin: degrees of freedom per output as the twins answer, all adaptation included.
        path: the same with the path held as it was, :math:`\mathrm{tr}(BD)/(nN)`.
        closure: how far the path's identities are off.
        valid: whether the loss has the curvature that both are measured by.
        reason: why not.
        cost: in trainings: the twins, and following the path.
    """

    value: float
    standard_error: float
    twin: DegreesOfFreedom
    path: DegreesOfFreedom
    closure: Closure
    valid: bool = True
    reason: str = ""
    cost: float = math.nan

    __repr__ = short_repr
    _repr_html_ = short_html


def adaptation_gap(
    run: Run, twin: TwinRisk, *, groups: Tensor | None = None, quadrature: str = "gauss3"
) -> AdaptationGap:
    r"""Compare a twin's response with that of the path its model took.

    In a model that is linear in its weights, trained by SGD on squared error, the gap is zero. A
    finite push also bends a loss that is not quadratic: take ``TwinRisk(delta=...)`` small there.

    Args:
        run: of ``twin.model``: ``with Recorder(twin.model, loss, twin.optimizer, train=(x, y))``
            around the loop, ``recorder.step(index)`` after each ``for run in twin.runs(index)``.
        twin: after the last step of the run.
        groups: ids of dependent examples, (n,), for the error.
        quadrature: of the path; see :func:`poprisk.path_operators`.

    Raises:
        TypeError, NotAnalysable: if the run does not say how its steps answer, or its files are
            gone.
        ValueError: if it is no record of the twin's model.

    Example:
        >>> from poprisk import Recorder
        >>> x, y = torch.randn(40, 3), torch.randn(40, 1)
        >>> loss = lambda u, y: (u - y).square().sum(1) / 2
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
        >>> twin = TwinRisk(lambda: torch.nn.Linear(3, 1), sgd, loss, dataset_size=40)
        >>> with Recorder(twin.model, loss, twin.optimizer, train=(x, y)) as recorder:
        ...     for index in torch.arange(40).split(10):
        ...         for run in twin.runs(index):
        ...             run.optimizer.zero_grad()
        ...             run.loss(run.model(x[index]), y[index]).mean().backward()
        ...             run.optimizer.step()
        ...         recorder.step(index)
        >>> round(adaptation_gap(recorder.run, twin).value, 5) + 0
        0.0
    """
    began = time.perf_counter()
    check_answers(run)
    x, y = run.problem.train
    named = dict(twin.model.named_parameters())
    now = [named[k].detach().cpu().reshape(-1) for k in run.problem.names if k in named]
    if not now or not torch.equal(torch.cat(now), run.weights[len(run)]):
        raise ValueError(
            f"the run ({run.steps} steps) does not end with the weights of the twin's model (after "
            f"{twin.steps} batches): wrap the whole loop in Recorder(twin.model, loss, "
            "twin.optimizer, train=(x, y)), and call this before either is trained on."
        )
    ids = None if groups is None else inputs.check_groups(groups, len(y))
    outputs, _, twins = twin.outputs([(x, y, torch.arange(len(y)))])
    u = outputs.double()
    inputs.check_transformable(run.problem.to(run.weights.dtype), run.weights[0])
    probes = torch.stack([t.perturbation.flatten(1) for t in twins], -1) / len(y)
    applied, closure = follow_all(run, probes, quadrature=quadrature, decaying=True)
    along = applied.train.double().unbind(-1)
    pairs = [
        (t.outputs.double() - u, d.reshape(u.shape), t.perturbation)
        for t, d in zip(twins, along, strict=True)
    ]
    targets = y.double() if y.is_floating_point() else y
    local_loss = local_loss_of(twin.loss, u, targets)
    bends = [bend_of(twin.loss, local_loss, u, targets, moved.flatten(1)) for moved, _, _ in pairs]
    reason = NO_CURVATURE if is_bent(bends) else ""
    gap, full, path = (
        measure_dof(local_loss, u, [TwinOutputs(u + moved, z) for moved, z in found], ids)
        for found in (
            [(moved - d, z) for moved, d, z in pairs],
            [(moved, z) for moved, _, z in pairs],
            [(d, z) for _, d, z in pairs],
        )
    )
    return AdaptationGap(
        gap.dof,
        gap.dof_error,
        full,
        path,
        closure,
        not reason,
        reason,
        twin.cost + run.trainings(time.perf_counter() - began),
    )
