"""The coefficients of one step, which every kernel takes under the same names.

They are numbers, or float64 tensors of one entry per tensor where steps are captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poprisk.optim.fused import native
from poprisk.optim.gate import MASKS_, Gate
from poprisk.optim.update import AdamSettings
from poprisk.optim.variance import Ema, SecondMoment, StepCounts, VarianceEstimator, where_known

COLUMNS = (*native.NUMBERS, "opened")
"""What may differ from tensor to tensor; ``opened``: all passes, there being no estimate yet."""

MASK_NAMES = {mask: name for name, mask in MASKS_.items()}


def step_numbers(
    settings: AdamSettings,
    counts: StepCounts,
    estimator: VarianceEstimator | None,
    gate: Gate | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All coefficients of a step but its sign, and the codes of estimator and mask.

    Args:
        settings: what AdamW needs.
        counts: counters.
        estimator: of the variance; None: not gated.
        gate: None: this step is not gated.
        dtype: of the state.
    """
    numbers = adam_numbers(settings, counts) | variance_numbers(counts, estimator)
    if gate is not None and estimator is not None:
        numbers |= mask_numbers(gate, counts, estimator, dtype)
    return numbers


def adam_numbers(settings: AdamSettings, counts: StepCounts) -> dict[str, Any]:
    """What AdamW itself needs."""
    lr = settings.lr.double() if isinstance(settings.lr, Tensor) else settings.lr
    return {
        "decay": 1 - lr * settings.weight_decay,
        "beta1_weight": 1 - settings.beta1,
        "beta2": settings.beta2,
        "beta2_weight": 1 - settings.beta2,
        "v_correction": (1 - counts.beta2**counts.t) ** 0.5,
        "eps": settings.eps,
        "rate": lr / (1 - counts.beta1**counts.t),
    }


def variance_numbers(counts: StepCounts, estimator: VarianceEstimator | None) -> dict[str, Any]:
    """What a kernel observes, and how it reads the variance."""
    if isinstance(estimator, Ema) and (counts.captured or counts.observations > 0):
        return {
            "estimator": native.ESTIMATORS["ema"],
            "centre": estimator.centre(counts),
            "rho_weight": where_known(counts.observations > 0, 1 - estimator.rho),
        }
    if isinstance(estimator, SecondMoment):
        return {
            "estimator": native.ESTIMATORS["second-moment"],
            "v_scale": 1 / (1 - counts.beta2**counts.t),
            "m_scale_sq": counts.mean_scale**2,
        }
    given = estimator is not None and not isinstance(estimator, Ema)
    return {"estimator": native.ESTIMATORS["given" if given else "unobserved"]}


def mask_numbers(
    gate: Gate, counts: StepCounts, estimator: VarianceEstimator, dtype: torch.dtype
) -> dict[str, Any]:
    """The coefficients of the mask on raw moments, in the order of operations of the masks."""
    name, info = MASK_NAMES[gate.mask], torch.finfo(dtype)
    var_scale = estimator.scale(counts) / counts.mean_scale**2
    alpha = gate.alpha * var_scale * (1 + 8 * info.eps if name == "hard" else 1.0)
    weight = gate.softness * (gate.alpha if name == "snr" else 1.0) * var_scale
    return {
        "mask": native.MASKS[name],
        "alpha": alpha,
        "weight": weight,
        "mask_eps": gate.eps / counts.mean_scale**2,
        "tiny": info.tiny,
        "q_min": gate.q_min,
        **({} if gate.opened is None else {"opened": gate.opened.double()}),
    }
