r"""Estimators of the variance of the batch-mean gradient, :math:`\Sigma_B/(b-1)`.

An estimator watches the gradients through the moments that Adam keeps anyway and reports
``raw`` tensors with a ``scale``: :math:`\hat s` = ``scale · raw``. Its ``inflation`` says by what
factor :math:`\hat s` exceeds the variance of one batch mean in expectation, for i.i.d. batches; the
calibrated threshold divides by it. Nothing here divides by b-1: the variance of the batch *mean*
is what is estimated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch

from poprisk.gate import TensorList, momentum_noise


class Clock(NamedTuple):
    """Counters and decay rates of one step.

    Attributes:
        t: gradients seen by the momentum, the present one included (≥ 1).
        observations: updates of the variance state, the present one included (≥ 0).
        beta1: decay of the average gradient.
        beta2: decay of the average squared gradient.
    """

    t: int
    observations: int
    beta1: float
    beta2: float

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
        if clock.observations == 0:
            return
        d = list(torch._foreach_sub(grads, exp_avgs, alpha=self.centre(clock)))
        torch._foreach_mul_(d, d)
        torch._foreach_lerp_(variances, d, 1 - self.rho)

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
        return 1.0 if self.paper else 1 / (1 - clock.beta1 ** (clock.t - 1))

    def scale(self, clock: Clock) -> float:
        return 1 / (1 - self.rho**clock.observations)

    def inflation(self, clock: Clock) -> float:
        if clock.observations == 0:
            return 0.0
        return 1 + momentum_noise(clock.t, clock.beta1)


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
        raw = list(torch._foreach_mul(exp_avg_sqs, 1 / (1 - clock.beta2**clock.t)))
        torch._foreach_addcmul_(raw, exp_avgs, exp_avgs, -(clock.mean_scale**2))
        torch._foreach_clamp_min_(raw, 0.0)
        return raw, 1.0

    def inflation(self, clock: Clock) -> float:
        return 1 - momentum_noise(clock.t, clock.beta1) if clock.t > 1 else 0.0


ESTIMATORS = ("ema", "second-moment")


def make_estimator(name: str, *, rho: float, paper: bool) -> VarianceEstimator:
    """The estimator called ``name``; see :data:`ESTIMATORS`."""
    if name == "second-moment":
        return SecondMoment()
    return Ema(rho, paper=paper)
