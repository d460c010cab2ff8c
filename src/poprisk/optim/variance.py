r"""Estimators of the variance of the batch-mean gradient, :math:`\Sigma_B/(b-1)`.

An estimator watches the gradients through the moments that Adam keeps anyway and reports
``raw`` tensors with a ``scale``: :math:`\hat s` = ``scale · raw``. Its ``inflation`` says by what
factor :math:`\hat s` exceeds the variance of one batch mean in expectation, for i.i.d. batches; the
calibrated threshold divides by it. Nothing here divides by b-1: the variance of the batch *mean*
is what is estimated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from poprisk._validate import (
    check_losses,
    check_no_batch_statistics,
    check_range,
    check_separate,
    check_type,
    first_line,
    shapes_hint,
)
from poprisk.evaluation import evaluating, outputs_of
from poprisk.jacobian import (
    Inputs,
    ParameterSelection,
    as_inputs,
    call,
    close,
    inner,
    length,
    recording,
    split,
    take,
    trainable,
)
from poprisk.optim.gate import TensorList, momentum_noise, scaled
from poprisk.optim.sizes import TERM_KEYS
from poprisk.per_sample import Moments, capture
from poprisk.per_sample.checks import check_numbers, check_one_device, check_part
from poprisk.protocols import PerExampleLoss


class StepCounts(NamedTuple):
    """Counters and decay rates of one step.

    Attributes:
        t: gradients seen by the momentum, the present one included (≥ 1).
        observations: updates of the variance state, the present one included (≥ 0).
        beta1: decay of the average gradient.
        beta2: decay of the average squared gradient.
    """

    t: Any
    observations: Any
    beta1: float
    beta2: float

    @property
    def captured(self) -> bool:
        """Whether the counters are 0-d float64 tensors, so that no step depends on a number."""
        return isinstance(self.t, Tensor)

    @property
    def mean_scale(self) -> float:
        r""":math:`1/(1-\beta_1^t)`, the bias correction of the average gradient."""
        return 1 / (1 - self.beta1**self.t)


class VarianceEstimator(ABC):
    """What an optimizer needs from an estimator; instances hold settings, never state."""

    state_keys: tuple[str, ...] = ()

    def observes(self, t: int) -> bool:
        """Whether the gradient of step ``t`` (≥ 1) can be observed."""
        return True

    def start(self, t: int) -> int:
        """After which step observations begin, where state is made after ``t`` (≥ 0) steps."""
        return t if self.observes(t + 1) else t + 1

    @abstractmethod
    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, counts: StepCounts
    ) -> None:
        """Update the state in place; ``exp_avgs`` does not contain ``grads`` yet."""

    @abstractmethod
    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        counts: StepCounts,
    ) -> tuple[TensorList, float]:
        """Return ``raw`` and ``scale``; the moments contain the present gradients."""

    def scale(self, counts: StepCounts) -> float:
        """The ``scale`` of :meth:`read`, without reading."""
        return 1.0

    @abstractmethod
    def inflation(self, counts: StepCounts) -> float:
        r"""Expected :math:`\hat s` over the variance of one batch mean; 0: no estimate yet."""


@final
class Ema(VarianceEstimator):
    r"""Temporal estimate with one extra state vector [LG, Eq. 240-245].

    .. math:: s_t = \rho s_{t-1} + (1-\rho)(g_t - \hat m_{t-1})^2,\qquad
              \hat s_t = s_t/(1-\rho^{k})

    with k updates so far. The mean is bias-corrected and the first step, which has none, is
    left out. In the long run :math:`E[\hat s] = (1 + r_t)\,\Sigma_B/(b-1)`; early deviations,
    from shorter averages, make it larger: by 33% at step 2, 18% at step 10, 5% at step 50, for
    the default decays. ``paper=True`` is the literal form: centred on the raw
    :math:`m_{t-1}`, first step included.

    Args:
        rho: decay of the average, in [0, 1).
        paper: use the literal form of Algorithm 1.
        terms: keep the state for terms of the loss that are charged differently, too
            (:mod:`poprisk.optim.sizes`).
    """

    state_keys = ("grad_mean_var",)

    def __init__(self, rho: float, *, paper: bool = False, terms: bool = False) -> None:
        self.rho = rho
        self.paper = paper
        self.terms = terms
        if terms:
            self.state_keys = (*Ema.state_keys, *TERM_KEYS)

    def observes(self, t: int) -> bool:
        return self.paper or t > 1

    def start(self, t: int) -> int:
        # The average gradient may be old where this begins, that of the terms is not.
        return t if self.paper else max(t, 1) if not self.terms else t + 1

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, counts: StepCounts
    ) -> None:
        if counts.captured:
            self._observe_captured_(variances, grads, exp_avgs, counts)
        elif counts.observations > 0:
            d = list(torch._foreach_sub(grads, exp_avgs, alpha=self.centre(counts)))
            torch._foreach_mul_(d, d)
            torch._foreach_lerp_(variances, d, 1 - self.rho)

    def _observe_captured_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, counts: StepCounts
    ) -> None:
        weight = (counts.observations > 0).double() * (1 - self.rho)
        d = list(torch._foreach_sub(grads, scaled(exp_avgs, self.centre(counts))))
        torch._foreach_mul_(d, d)
        torch._foreach_lerp_(variances, d, [weight.to(x.dtype) for x in d])

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        counts: StepCounts,
    ) -> tuple[TensorList, float]:
        return variances, self.scale(counts)

    def centre(self, counts: StepCounts) -> float:
        r"""The factor on :math:`m_{t-1}` in the deviation: its bias correction, or 1."""
        if self.paper:
            return 1.0
        before = counts.t - 1
        return 1 / (1 - counts.beta1 ** (before.clamp_min(1) if counts.captured else before))

    def scale(self, counts: StepCounts) -> float:
        k = counts.observations
        return 1 / (1 - self.rho ** (k.clamp_min(1) if counts.captured else k))

    def inflation(self, counts: StepCounts) -> float:
        found = 1 + momentum_noise(counts.t, counts.beta1)
        return where_known(counts.observations > 0, found)


@final
class SecondMoment(VarianceEstimator):
    r"""Estimate from Adam's own moments, no extra state: :math:`(\hat v - \hat m^2)_+`.

    :math:`E[\hat v - \hat m^2] = (1 - r_t)\,\Sigma_B/(b-1)` for a constant mean gradient; a mean
    that changes within the memory of ``beta2`` adds to it, and so does the cut at zero where the
    mean is larger than the noise. Where the cut gives zero the gate is open: at ``z=2`` 6% of
    pure noise pass, 16% with betas (0.5, 0.99).
    """

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, counts: StepCounts
    ) -> None:
        return

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        counts: StepCounts,
    ) -> tuple[TensorList, float]:
        raw = scaled(exp_avg_sqs, 1 / (1 - counts.beta2**counts.t))
        add_scaled_squares_(raw, exp_avgs, -(counts.mean_scale**2))
        torch._foreach_clamp_min_(raw, 0.0)
        return raw, 1.0

    def inflation(self, counts: StepCounts) -> float:
        return where_known(counts.t > 1, 1 - momentum_noise(counts.t, counts.beta1))


@final
class Precomputed(VarianceEstimator):
    r"""Average of variances that were found without comparing steps [ours].

    .. math:: s_t = \rho s_{t-1} + (1-\rho)\,\mathrm{var}_t,\qquad \hat s_t = s_t/(1-\rho^{k})

    Within each batch (:mod:`poprisk.optim.batch_variance`) or between processes
    (:mod:`poprisk.optim.rank_variance`); the optimizer puts each into the average. Unbiased for any
    course of the mean gradient. With :math:`\rho = \beta_1^2` the weights are the squares of those
    of :math:`\hat m`, so that :math:`r_t \hat s_t` estimates the variance of :math:`\hat m_t`
    itself, whatever the noise does.

    Args:
        rho: decay of the average, in [0, 1); None: :math:`\beta_1^2`.
    """

    state_keys = ("grad_mean_var",)

    def __init__(self, rho: float | None) -> None:
        self.rho = rho

    def decay(self, beta1: float) -> float:
        """The decay of the average."""
        return beta1**2 if self.rho is None else self.rho

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, counts: StepCounts
    ) -> None:
        return

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        counts: StepCounts,
    ) -> tuple[TensorList, float]:
        return variances, self.scale(counts)

    def scale(self, counts: StepCounts) -> float:
        return 1 / (1 - self.decay(counts.beta1) ** counts.observations)

    def inflation(self, counts: StepCounts) -> float:
        return 1.0


def where_known(known: Any, value: Any) -> Any:
    """``value`` where it is known, else 0; numbers, or tensors where steps are captured."""
    if isinstance(known, Tensor):
        return torch.where(known, value, known.new_zeros((), dtype=torch.float64))
    return value if known else 0.0


def add_scaled_squares_(x: TensorList, y: TensorList, scale: float | Tensor) -> None:
    """Add ``scale * y²`` to ``x`` in place."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(x, scaled(list(torch._foreach_mul(y, y)), scale))
    else:
        torch._foreach_addcmul_(x, y, y, scale)


GivenVariances = dict[Tensor, Callable[[], Tensor]]
"""By parameter, what computes the variance of its gradient when its turn comes."""

WITHIN_BATCH = ("exact", "microbatch")
ESTIMATORS = ("ema", *WITHIN_BATCH, "data-parallel", "second-moment")


def make_estimator(name: str, *, rho: float, paper: bool, terms: bool = False) -> VarianceEstimator:
    """The estimator called ``name``; see :data:`ESTIMATORS`. ``terms``: as for :class:`Ema`."""
    if name == "second-moment":
        return SecondMoment()
    if name == "ema":
        return Ema(rho, paper=paper, terms=terms)
    return Precomputed(None if name == "exact" else rho)


def grad_mean_var(
    model: nn.Module,
    loss: PerExampleLoss,
    batch: tuple[Any, Any],
    *,
    params: ParameterSelection = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    r"""The exact variance of the batch-mean gradient, for each parameter.

    .. math:: \frac{\Sigma_B}{b-1} = \frac{1}{b(b-1)} \sum_i (g_i - \mu)^2

    with per-example gradients :math:`g_i` and their mean :math:`\mu`. Subtracted from
    :math:`\mu^2` it gives an unbiased estimate of the squared population gradient [LG, Thm 6.5].
    Dropout counts as part of the noise. Nothing is written to ``.grad``.

    Args:
        model: the module; batch normalization in eval mode.
        loss: (outputs, targets) to one value per example, (b,).
        batch: inputs (a tensor, a tuple for ``model(*x)`` or a dict for ``model(**x)``) and targets
            (a tensor), b ≥ 2 examples.
        params: names of the parameters that count, or a function of name and parameter.
        chunk: examples per pass, ≥ 2, or a few more; None: all at once.

    Returns:
        By name, tensors of the parameters' shapes.

    Raises:
        TypeError, ValueError: if the loss is not one value per example that depends on this
            example alone, or not finite; if lengths differ, there is only one example, no
            trainable parameter, or a batch normalization in train mode; or if gradients take a way
            that the graph does not show: sharded parameters, hooks on parameters, reentrant
            checkpointing. Wrappers (DistributedDataParallel, torch.compile) are looked through;
            the variance is that of this process's batch.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> losses = lambda out, y: (out * y).squeeze(1)
        >>> batch = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])
        >>> grad_mean_var(model, losses, batch)["weight"]
        tensor([[1.]])
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"batch must be a pair (inputs, targets), but got {type(batch).__name__}.")
    inputs, targets = batch
    named = trainable(model, params)
    model = inner(model)
    check_no_batch_statistics(model)
    x = as_inputs("batch inputs", inputs)
    b = length(x)
    check_type("the targets", targets, Tensor, "a tensor")
    if targets.ndim == 0 or len(targets) != b:
        raise ValueError(f"there are {b} examples but targets of shape {tuple(targets.shape)}.")
    check_one_device(pytree.tree_leaves((x, targets)), named)
    if chunk is not None:
        check_range("chunk", chunk, 2)
    _check_unmixed(model, loss, x, targets)
    total: Moments | None = None
    # Around all chunks: each draws random numbers of its own.
    with recording(), evaluating(model, eval_mode=False, backward_hooks=True):
        for rows in split(b, max(1, b // (chunk or b))):
            outputs, losses = _losses(model, loss, take(x, rows), targets[rows])
            size = rows.stop - rows.start
            check_batch_losses(losses, size, hint=shapes_hint(outputs, targets[rows]))
            check_numbers("losses", losses, start=rows.start)
            if isinstance(outputs, Tensor) and outputs.shape[:1] == losses.shape and size > 3:
                check_separate(loss, outputs, targets[rows], losses)
            found = capture(losses, named).moments()
            total = found if total is None else total.plus(found)
    assert total is not None
    return total.mean_var(b)


TRIED = 8
"""Examples whose losses are compared with those in another order and company."""


def _losses(model: nn.Module, loss: PerExampleLoss, x: Inputs, y: Tensor) -> tuple[Any, Any]:
    """Outputs of a model and their losses.

    Raises:
        TypeError: for outputs of a form that the loss does not take.
    """
    outputs = call(model, x)
    try:
        return outputs, loss(outputs, y)
    except (TypeError, AttributeError) as error:
        if isinstance(outputs, Tensor):
            raise
        raise TypeError(
            f"the model returned {type(outputs).__name__}, on which loss failed "
            f"({first_line(error)}); let loss take what counts of it, as in lambda out, y: "
            "loss(out[0], y) or loss(out.logits, y)."
        ) from error


def check_batch_losses(losses: Any, examples: int | None = None, *, hint: str = "") -> None:
    """Raise unless losses are one differentiable value per example, for at least two."""
    check_type("the losses", losses, Tensor, "a tensor")
    check_losses(losses, examples, hint=hint)
    if len(losses) < 2:
        raise ValueError(
            f"a variance between examples needs at least two of them, but got {len(losses)}."
        )
    if not losses.requires_grad:
        raise ValueError(
            "the losses depend on no trainable parameter: all are frozen, or they were computed "
            "under torch.no_grad()."
        )


def _check_unmixed(model: nn.Module, loss: PerExampleLoss, x: Inputs, targets: Tensor) -> None:
    """Raise ValueError if model or loss, in evaluation mode, look across the batch.

    What draws at random in evaluation mode, too, cannot be compared and is let through.
    """
    count, hint = min(TRIED, length(x)), ""

    def losses(rows: list[int]) -> Tensor:
        def of_loss(model: nn.Module, some: Inputs) -> Tensor:
            nonlocal hint
            outputs, found = _losses(model, loss, some, targets[rows])
            hint = shapes_hint(outputs, targets[rows])
            return found

        try:
            found = outputs_of(model, take(x, rows), of_loss)
        except (RuntimeError, IndexError) as error:
            if rows != list(range(length(x))):
                check_part(len(rows), length(x), error)
            raise
        check_type("the losses", found, Tensor, "a tensor")
        return check_losses(found, len(rows), hint=hint)

    with evaluating(model):
        whole = losses(list(range(count)))
        for rows in ([0, 0], list(range(count))[::-1]):
            part = losses(rows)
            same = close(part, whole[rows])
            if not same and close(part, losses(rows)):
                raise ValueError(
                    "the loss of an example changes with the others of its batch: the model or "
                    "loss looks across the batch (contrast, normalization, division by a number of "
                    "the batch's), so there are no per-example gradients. Each loss must depend on "
                    f"its own example alone.{hint}"
                )
