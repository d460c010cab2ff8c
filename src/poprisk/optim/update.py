r"""One gated AdamW update as a pure function of tensors.

The loop path calls :func:`gated_adamw_` with one tensor at a time, the foreach path with many;
nothing else differs. Elementwise work on the CPU goes chunk by chunk, so that the temporaries of
one chunk stay in cache.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.optim.gate import Gate, TensorList, scaled
from poprisk.optim.variance import StepCounts, VarianceEstimator

CHUNK = 131_072
"""Elements of a piece of a large tensor on the CPU: its temporaries stay in cache, and it is still
worth splitting over threads."""

BLOCK = 65_536
"""Elements of small tensors worked on together on the CPU."""


LOW_PRECISION = (torch.float16, torch.bfloat16)


class AdamSettings(NamedTuple):
    """What AdamW itself needs, as numbers."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class TensorLists(NamedTuple):
    """Parallel lists of real tensors of one dtype on one device.

    ``variances`` is empty for an estimator without state; what follows it, unless terms of the loss
    are charged differently (:mod:`poprisk.optim.sizes`): the average of h, the averaged squares of
    its deviations, and h.
    """

    params: TensorList
    grads: TensorList
    exp_avgs: TensorList
    exp_avg_sqs: TensorList
    variances: TensorList
    term_avgs: TensorList = []  # noqa: RUF012 (fields of a tuple; nobody appends to them)
    term_vars: TensorList = []  # noqa: RUF012
    term_grads: TensorList = []  # noqa: RUF012

    def subset(self, indices: list[int]) -> TensorLists:
        """The tensors at ``indices`` of every list."""
        return TensorLists(*([column[i] for i in indices] if column else [] for column in self))


def cache_blocks(lists: TensorLists, update_: Callable[[TensorLists], None]) -> None:
    """Apply an elementwise update piece by piece.

    A tensor of over :data:`CHUNK` elements is cut into views if its memory layout has them; of the
    others, as many as fit into :data:`BLOCK` go together.
    """
    block: list[int] = []
    size = 0
    for i, numel in enumerate(w.numel() for w in lists.params):
        if numel > CHUNK:
            for piece in pieces(lists.subset([i])):
                update_(piece)
            continue
        if block and size + numel > BLOCK:
            update_(lists.subset(block))
            block.clear()
            size = 0
        block.append(i)
        size += numel
    if block:
        update_(lists.subset(block))


def pieces(lists: TensorLists) -> list[TensorLists]:
    """The one tensor of ``lists`` in views of at most :data:`CHUNK` elements."""
    if not all(t.is_contiguous() for column in lists for t in column):
        return [lists]
    columns = [column[0].view(-1).split(CHUNK) if column else () for column in lists]
    return [
        TensorLists(*([column[j]] if column else [] for column in columns))
        for j in range(len(columns[0]))
    ]


def gated_adamw_(
    lists: TensorLists,
    *,
    settings: AdamSettings,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
) -> None:
    r"""Update parameters and moments in place (Algorithm 1 of [LG], calibration ours).

    .. math::
        s &\leftarrow \text{estimator}(g, m), \quad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        w &\leftarrow (1 - \eta\lambda) w - \eta\, q \odot \hat m / (\sqrt{\hat v} + \varepsilon)

    The variance is updated before the mean, which must not contain the gradient it is compared
    with. Weight decay is decoupled and not gated. With ``gate=None`` every operation, and its
    order, is that of ``torch.optim.AdamW``; with ``estimator=None`` no variance is kept.
    """
    w, g, m, v, s, term_avgs, term_vars, term_grads = lists
    if estimator is not None:
        estimator.observe_(s, g, m, counts)
        if term_grads:
            observe_terms_(estimator, term_avgs, term_vars, term_grads, counts)
    decay_(w, settings)
    torch._foreach_lerp_(m, g, 1 - settings.beta1)
    torch._foreach_mul_(v, _number(settings.beta2, v[0]))
    torch._foreach_addcmul_(v, g, g, 1 - settings.beta2)

    step = m
    if gate is not None and estimator is not None:
        q = masks(lists, counts, estimator, gate)
        if gate.per_tensor:
            step = list(torch._foreach_mul(m, q))
        else:
            torch._foreach_mul_(q, m)
            step = q
    denom = adam_denominator(v, counts, settings.eps)
    rate = settings.lr / (1 - counts.beta1**counts.t)
    if isinstance(rate, Tensor):
        torch._foreach_addcdiv_(w, scaled(step, -rate), denom)
    else:
        torch._foreach_addcdiv_(w, step, denom, -rate)


def decay_(w: TensorList, settings: AdamSettings) -> None:
    """Decoupled weight decay, in place."""
    if settings.weight_decay != 0:
        torch._foreach_mul_(w, _number(1 - settings.lr * settings.weight_decay, w[0]))


def masks(
    lists: TensorLists, counts: StepCounts, estimator: VarianceEstimator, gate: Gate
) -> TensorList:
    """The mask of each tensor; the moments contain the present gradients."""
    raw, var_scale = estimator.read(lists.variances, lists.exp_avgs, lists.exp_avg_sqs, counts)
    if gate.slack > 0:
        raw, tolerated = scaled(raw, var_scale), gate.slack / (1 - counts.beta2**counts.t)
        torch._foreach_add_(raw, lists.exp_avg_sqs, alpha=-tolerated)
        torch._foreach_clamp_min_(raw, 0.0)
        var_scale = 1.0
    scales = {"mean_scale": counts.mean_scale, "var_scale": var_scale}
    terms = (lists.term_vars, lists.term_avgs) if gate.charges is not None else ()
    return gate(lists.exp_avgs, raw, *terms, **scales)


def observe_terms_(
    estimator: VarianceEstimator,
    avgs: TensorList,
    variances: TensorList,
    grads: TensorList,
    counts: StepCounts,
) -> None:
    """Update what is known of h, in place: its deviations from its average, and then that."""
    # The average has seen as many as were observed: it may have begun in the middle of a run.
    own = counts._replace(t=counts.observations + 1)
    estimator.observe_(variances, grads, avgs, own)
    torch._foreach_lerp_(avgs, grads, 1 - counts.beta1)


def state_dtype(p: Tensor) -> torch.dtype:
    """The precision of a parameter's state: at least float32."""
    return torch.float32 if p.dtype in LOW_PRECISION else p.dtype


def real_lists(columns: TensorLists, maximize: bool) -> TensorLists:
    """Real float32 or float64 tensors; parameters share memory unless low precision."""
    dtype = state_dtype(columns.params[0])
    lists = [list(column) for column in columns]
    if any(x.dtype != dtype for x in (*columns.params, *columns.grads)):
        lists = [[x.to(dtype) for x in column] for column in lists]
    if dtype.is_complex:
        lists = [[torch.view_as_real(x) for x in column] for column in lists]
    if maximize:
        lists[1] = list(torch._foreach_neg(lists[1]))
    return TensorLists(*lists)


def size_limit(dtype: torch.dtype) -> float:
    """How large a gradient of this dtype may be so that deviations from it can be squared."""
    wide = torch.float32 if dtype in LOW_PRECISION else dtype
    return torch.finfo(wide).max ** 0.5 / 4


def all_finite(grads: TensorList) -> bool:
    """Whether no gradient holds a NaN, an Inf, or a number whose square would overflow.

    One norm per tensor decides almost always; the largest entry decides where a norm is larger
    than an entry may be.
    """
    norms: dict[tuple[torch.device, torch.dtype], TensorList] = defaultdict(list)
    for norm in torch._foreach_norm(grads) if grads else []:
        norms[norm.device, norm.dtype].append(norm)
    if all(_below(torch.stack(n)) for n in norms.values()):
        return True
    return all(_below(g.abs()) for g in grads if g.numel())


def all_small(grads: TensorList) -> Tensor:
    """:func:`all_finite` as a 0-d boolean tensor, without looking at it."""
    small = [(g.abs() <= size_limit(g.dtype)).all() for g in grads]
    return torch.stack(small).all() if small else torch.ones((), dtype=torch.bool)


def _below(sizes: Tensor) -> bool:
    return bool(sizes.max().double() <= size_limit(sizes.dtype))


def _number(value: float | Tensor, like: Tensor) -> float | Tensor:
    """``value`` in the form that a foreach kernel on the device of ``like`` takes fastest."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return value
    return _constant(value, like.dtype)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor, which costs a CPU kernel half of what a Python number does."""
    return torch.tensor(value, dtype=dtype)


def adam_denominator(exp_avg_sqs: TensorList, counts: StepCounts, eps: float) -> TensorList:
    r""":math:`\sqrt{\hat v} + \varepsilon`, newly allocated."""
    denom = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denom, _number((1 - counts.beta2**counts.t) ** 0.5, denom[0]))
    torch._foreach_add_(denom, eps)
    return denom
