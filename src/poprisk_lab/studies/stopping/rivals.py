r"""Rules that say where a run is to stop, each from its paper, all watching the same run.

A rule sees the run at *looks*: from those so far it says whether to stop at the last one. At a look
the weights stand still while one pass is made over the training set, in minibatches of the size
that training has; what a paper averages over steps is averaged over that pass. A rule that never
speaks ends at the end. All but the held-out ones see every example and train once.

With per-example gradients :math:`g_i` of b examples, their mean :math:`\mu` and their sample
variance :math:`\hat\Sigma` (one number a parameter), the statistic of the first three rules is

.. math:: T_b = b\sum_k \mu_k^2/\hat\Sigma_k

over the D parameters whose gradients differ between examples; that of a network that has nothing
left to learn is about D, whatever the unit of the loss.

Left out: REML stopping (Yao, Wang, Lin, Liu and Liu 2026, arXiv:2605.27991), of which only the
abstract could be read. It is of squared error under gradient flow with a kernel that stands still,
which one of the problems comes near.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poprisk.evaluation import evaluating
from poprisk.jacobian import recording
from poprisk.per_sample import Moments, capture
from poprisk.protocols import PerExampleLoss

FOLDS = 5
AT_ONCE = 500
"""Examples whose gradients are taken at once, for speed alone."""
ROUNDING = 1e-6
"""Share of the squared gradients below which a variance is that of rounding."""
FREEZE, GRACE = 0.9, 0.3
"""GradES: share of a matrix's largest gradient below which it is frozen, and share of the run
before which nothing is. The first is ours; the other is the default of the authors' package."""
SLOPE = 0.0005
"""Relative decrease of the training loss per epoch that is too little. Like FREEZE the best of a
grid on seed 0 of seven earlier problems, by the true risk: a help that a user has not."""


class RivalLook(NamedTuple):
    """What rules see of a run at one moment.

    Attributes:
        epoch: epochs trained.
        share: of the run that is over.
        loss: mean training loss, in evaluation mode.
        evidence: :math:`1 - T_b/D` of a minibatch, mean over those of a pass.
        signal: :math:`T_n` of the whole training set.
        coordinates: its D.
        sizes: mean size of an element of each matrix's minibatch gradient, mean over a pass.
    """

    epoch: int
    share: float
    loss: float
    evidence: float
    signal: float
    coordinates: int
    sizes: dict[str, float]


def look_at(
    model: nn.Module,
    loss: PerExampleLoss,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int,
    epoch: int,
    share: float,
    train_loss: float,
) -> RivalLook:
    """What a pass over the training set shows; model and random numbers are as they were after it.

    Args:
        model: in training mode: dropout is part of the noise that training has.
        loss: of outputs and targets, one value an example.
        x: training inputs (n, ...), in any order that does not depend on them.
        y: their targets (n, ...).
        batch_size: of training; that of the pass is the nearest that cuts it into equal parts.
        epoch: epochs trained.
        share: of the run that is over.
        train_loss: mean training loss.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = {name: 0.0 for name, p in named.items() if p.ndim > 1}
    total: Moments | None = None
    evidence = list[float]()
    with recording(), evaluating(model, eval_mode=False, backward_hooks=True):
        for rows, batches in _captured(len(y), batch_size):
            factors = capture(loss(model(x[rows]), y[rows]), named)
            for batch in batches:
                found, b = factors.part(batch).moments(), batch.stop - batch.start
                signal, coordinates = signal_of(found, b)
                evidence.append(1 - signal / coordinates if coordinates else 0.0)
                for name in sizes:
                    sizes[name] += float(found.sums[name].abs().mean()) / b
                total = found if total is None else total.plus(found)
    assert total is not None
    signal, coordinates = signal_of(total, len(y))
    mean = sum(evidence) / len(evidence)
    means = {name: size / len(evidence) for name, size in sizes.items()}
    return RivalLook(epoch, share, train_loss, mean, signal, coordinates, means)


def _captured(examples: int, batch_size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows whose gradients are taken at once, and the minibatches among them."""
    count = max(1, round(examples / batch_size))
    ends = [examples * (i + 1) // count for i in range(count)]
    batches = [slice(*pair) for pair in itertools.pairwise([0, *ends])]
    step = max(1, AT_ONCE // batch_size)
    for i in range(0, count, step):
        some = batches[i : i + step]
        first, last = some[0].start, some[-1].stop
        yield slice(first, last), [slice(s.start - first, s.stop - first) for s in some]


def signal_of(moments: Moments, examples: int) -> tuple[float, int]:
    r""":math:`T_b` and D of b examples, from sums of their gradients and of the squares.

    Parameters whose gradient is the same for all examples, up to rounding, do not count: units that
    are off, symbols that do not occur. (A published implementation adds 1e-5 to all variances.)
    """
    signal, coordinates, b = 0.0, 0, examples
    for name, variance in moments.mean_var(b).items():
        counted = b * (b - 1) * variance > ROUNDING * moments.squares[name]
        mean = moments.sums[name][counted].double() / b
        signal += float((mean.square() / variance[counted].double()).sum())
        coordinates += int(counted.sum())
    return signal, coordinates


Rule = Callable[[Sequence[RivalLook], float], int | None]
"""From all looks, and a number drawn from 0 to 1, to the position of the first that it stops at."""


def _first(looks: Sequence[RivalLook], stops: Callable[[RivalLook], bool]) -> int | None:
    return next((i for i, look in enumerate(looks) if stops(look)), None)


def evidence_of_minibatches(looks: Sequence[RivalLook], draw: float) -> int | None:
    r"""Stop where minibatch gradients are what noise alone would give.

    .. math:: 1 - \frac{b}{D}\sum_k\frac{\mu_k^2}{\hat\Sigma_k} > 0

    Source: Mahsereci, Balles, Lassner and Hennig 2017, arXiv:1703.09580, equation 7, with b the
    batch. Left open and chosen here: the mean over the minibatches of a pass, in place of one that
    is smoothed over steps.
    """
    return _first(looks, lambda look: look.evidence > 0)


def evidence_of_everything(looks: Sequence[RivalLook], draw: float) -> int | None:
    """The same criterion of the whole training set's gradient, as for gradient descent: b = n."""
    return _first(looks, lambda look: look.signal < look.coordinates)


def gradstop(looks: Sequence[RivalLook], draw: float) -> int | None:
    r"""Stop where the weights are as credible as a sample of their posterior would be.

    .. math:: s(\theta) = P\bigl(p(\theta'|D) \le p(\theta|D)\bigr)
              \approx P\bigl(\chi^2_D \ge T_n\bigr) \ge u, \qquad u \sim U(0, 1)

    with the posterior :math:`p \propto e^{-\sum_i\ell_i}`, of whose samples the credibility s is
    uniform. Source: Jamshidi, Seppäläinen, Haitsiukevich, Luu, Björklund and Puolamäki 2025,
    arXiv:2508.19028, of which the abstract and summaries could be read: the posterior from gradient
    statistics, the credibility, the draw. Chosen here: the normal posterior whose precision is the
    sum of squared gradients, so that :math:`\log p` is below its largest value by half of
    :math:`T_n`; and its diagonal, for with more parameters than examples the full matrix gives
    every network the same credibility. The draw makes little difference: s is a step in T.
    """
    from scipy.stats import chi2

    return _first(looks, lambda look: float(chi2.sf(look.signal, look.coordinates)) >= draw)


def grades(looks: Sequence[RivalLook], draw: float) -> int | None:
    r"""Stop where every weight matrix would be frozen.

    .. math:: \|\nabla_W\|_1 < \tau_W \quad\text{at some look from } \alpha T \text{ on}

    Source: Wen, Zeng, Zhou, Liu, Hosseinzadeh, Su and Rawassizadeh 2025, arXiv:2509.01842. They
    freeze each matrix by itself and stop when all are; here nothing is frozen, the run is the one
    that all rules watch. Their τ is one number chosen for each network; here it is a share
    of the matrix's largest gradient so far. All parameters of two dimensions and more are matrices.
    """
    largest, frozen = dict[str, float](), set[str]()
    for i, look in enumerate(looks):
        for name, size in look.sizes.items():
            largest[name] = max(size, largest.get(name, 0.0))
            if look.share >= GRACE and size < FREEZE * largest[name]:
                frozen.add(name)
        if look.sizes and frozen == look.sizes.keys():
            return i
    return None


def slope_of_the_loss(looks: Sequence[RivalLook], draw: float) -> int | None:
    r"""Stop where the training loss falls by less than a share in an epoch.

    .. math:: \frac{L_{k-1}-L_k}{L_{k-1}\,(t_k-t_{k-1})} < s

    with the looks' epochs t. No source of its own; s is :data:`SLOPE`.
    """
    for i in range(1, len(looks)):
        before, now = looks[i - 1], looks[i]
        if before.loss - now.loss < SLOPE * before.loss * (now.epoch - before.epoch):
            return i
    return None


class StoppingRule(NamedTuple):
    """A rule without further training.

    Attributes:
        rule: where it stops.
        passes: whether it takes the gradients of a pass over the training set at every look.
    """

    rule: Rule
    passes: bool = True


RULES: dict[str, StoppingRule] = {
    "evidence of minibatches": StoppingRule(evidence_of_minibatches),
    "evidence of all examples": StoppingRule(evidence_of_everything),
    "GradStop": StoppingRule(gradstop),
    "GradES": StoppingRule(grades, passes=False),
    "slope of the training loss": StoppingRule(slope_of_the_loss, passes=False),
}


def parts_of(examples: int, groups: Tensor | None, *, generator: torch.Generator) -> Tensor:
    """Which of the folds each example is held out in, (n,); groups stay together.

    Example:
        >>> parts = parts_of(10, None, generator=torch.Generator().manual_seed(0))
        >>> parts.bincount().tolist()
        [2, 2, 2, 2, 2]
    """
    ids = torch.arange(examples) if groups is None else groups.unique(return_inverse=True)[1]
    order = torch.randperm(int(ids.max()) + 1, generator=generator)
    return (order % FOLDS)[ids]
