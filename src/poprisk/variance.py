r"""Estimators of the variance of the batch-mean gradient, :math:`\Sigma_B/(b-1)`.

An estimator watches the gradients through the moments that Adam keeps anyway and reports
``raw`` tensors with a ``scale``: :math:`\hat s` = ``scale · raw``. Its ``inflation`` says by what
factor :math:`\hat s` exceeds the variance of one batch mean in expectation, for i.i.d. batches; the
calibrated threshold divides by it. Nothing here divides by b-1: the variance of the batch *mean*
is what is estimated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from poprisk.gate import TensorList, momentum_noise, scaled


class Clock(NamedTuple):
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

    @abstractmethod
    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, clock: Clock
    ) -> None:
        """Update the state in place; ``exp_avgs`` does not contain ``grads`` yet."""

    @abstractmethod
    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        clock: Clock,
    ) -> tuple[TensorList, float]:
        """Return ``raw`` and ``scale``; the moments contain the present gradients."""

    def scale(self, clock: Clock) -> float:
        """The ``scale`` of :meth:`read`, without reading."""
        return 1.0

    @abstractmethod
    def inflation(self, clock: Clock) -> float:
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
    """

    state_keys = ("grad_mean_var",)

    def __init__(self, rho: float = 0.99, *, paper: bool = False) -> None:
        self.rho = rho
        self.paper = paper

    def observes(self, t: int) -> bool:
        return self.paper or t > 1

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, clock: Clock
    ) -> None:
        if clock.captured:
            self._observe_captured_(variances, grads, exp_avgs, clock)
        elif clock.observations > 0:
            d = list(torch._foreach_sub(grads, exp_avgs, alpha=self.centre(clock)))
            torch._foreach_mul_(d, d)
            torch._foreach_lerp_(variances, d, 1 - self.rho)

    def _observe_captured_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, clock: Clock
    ) -> None:
        weight = (clock.observations > 0).double() * (1 - self.rho)
        d = list(torch._foreach_sub(grads, scaled(exp_avgs, self.centre(clock))))
        torch._foreach_mul_(d, d)
        torch._foreach_lerp_(variances, d, [weight.to(x.dtype) for x in d])

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        clock: Clock,
    ) -> tuple[TensorList, float]:
        return variances, self.scale(clock)

    def centre(self, clock: Clock) -> float:
        r"""The factor on :math:`m_{t-1}` in the deviation: its bias correction, or 1."""
        if self.paper:
            return 1.0
        before = clock.t - 1
        return 1 / (1 - clock.beta1 ** (before.clamp_min(1) if clock.captured else before))

    def scale(self, clock: Clock) -> float:
        k = clock.observations
        return 1 / (1 - self.rho ** (k.clamp_min(1) if clock.captured else k))

    def inflation(self, clock: Clock) -> float:
        found = 1 + momentum_noise(clock.t, clock.beta1)
        return _where(clock.observations > 0, found)


@final
class SecondMoment(VarianceEstimator):
    r"""Estimate from Adam's own moments, no extra state: :math:`(\hat v - \hat m^2)_+`.

    :math:`E[\hat v - \hat m^2] = (1 - r_t)\,\Sigma_B/(b-1)` for a constant mean gradient; a mean
    that changes within the memory of ``beta2`` adds to it, and so does the cut at zero where the
    mean is larger than the noise. Where the cut gives zero the gate is open: at ``z=2`` 6% of
    pure noise pass, 16% with betas (0.5, 0.99).
    """

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, clock: Clock
    ) -> None:
        return

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        clock: Clock,
    ) -> tuple[TensorList, float]:
        raw = scaled(exp_avg_sqs, 1 / (1 - clock.beta2**clock.t))
        add_scaled_squares_(raw, exp_avgs, -(clock.mean_scale**2))
        torch._foreach_clamp_min_(raw, 0.0)
        return raw, 1.0

    def inflation(self, clock: Clock) -> float:
        return _where(clock.t > 1, 1 - momentum_noise(clock.t, clock.beta1))


@final
class DataParallel(VarianceEstimator):
    r"""Running average of the variance that processes disagree on (:mod:`poprisk.dataparallel`).

    :math:`E[\hat s] = \Sigma_B/(b-1)`. The optimizer puts each observation into the average.
    """

    state_keys = ("grad_mean_var",)

    def __init__(self, rho: float = 0.99) -> None:
        self.rho = rho

    def observe_(
        self, variances: TensorList, grads: TensorList, exp_avgs: TensorList, clock: Clock
    ) -> None:
        return

    def read(
        self,
        variances: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        clock: Clock,
    ) -> tuple[TensorList, float]:
        return variances, self.scale(clock)

    def scale(self, clock: Clock) -> float:
        return 1 / (1 - self.rho**clock.observations)

    def inflation(self, clock: Clock) -> float:
        return 1.0


def _where(known: Any, value: Any) -> Any:
    """``value`` where it is known, else 0; numbers, or tensors where steps are captured."""
    if isinstance(known, Tensor):
        return torch.where(known, value, 0.0)
    return value if known else 0.0


def add_scaled_squares_(x: TensorList, y: TensorList, scale: float | Tensor) -> None:
    """Add ``scale * y²`` to ``x`` in place."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(x, scaled(list(torch._foreach_mul(y, y)), scale))
    else:
        torch._foreach_addcmul_(x, y, y, scale)


ESTIMATORS = ("ema", "second-moment", "data-parallel")


def make_estimator(name: str, *, rho: float, paper: bool) -> VarianceEstimator:
    """The estimator called ``name``; see :data:`ESTIMATORS`."""
    if name == "second-moment":
        return SecondMoment()
    if name == "data-parallel":
        return DataParallel(rho)
    return Ema(rho, paper=paper)
