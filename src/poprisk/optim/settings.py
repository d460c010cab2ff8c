"""From the settings of a parameter group to its variance estimator and gate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from poprisk import _validate as checks
from poprisk.dtensor import GlobalMeans, Layout
from poprisk.optim.gate import ALPHAS, MASKS_, Gate, local_means, momentum_noise, threshold
from poprisk.optim.variance import ESTIMATORS, Clock, VarianceEstimator, make_estimator

MODES = ("auto", "paper")

NUMBERS = ("eps", "weight_decay", "rho", "alpha", "z", "softness", "batch_size", "dataset_size")
NUMBERS = (*NUMBERS, "q_min")

GATE_SETTINGS = (
    *("gate", "variance", "mode", "rho", "mask", "alpha", "z", "softness"),
    *("batch_size", "dataset_size", "reduction", "q_min"),
)


def plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with Python numbers for numpy's and for tensors of one element.

    The learning rate may stay a tensor: schedulers write to it, and captured steps read it there.
    """
    numbers = {key: checks.plain(group[key]) for key in NUMBERS}
    return {**group, **numbers, "betas": tuple(map(checks.plain, group["betas"]))}


def make_plain_(group: dict[str, Any]) -> None:
    """Replace numpy's numbers in a group, which ``torch.load(weights_only=True)`` would refuse.

    Tensors stay the user's own, except where steps are captured, which must not look into them.
    """
    captured = bool(group["capturable"])
    for key in ("lr", *NUMBERS):
        if not isinstance(group[key], Tensor) or (captured and key != "lr"):
            group[key] = checks.plain(group[key])
    if captured or not any(isinstance(beta, Tensor) for beta in group["betas"]):
        group["betas"] = tuple(map(checks.plain, group["betas"]))


def tell_differences(
    name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Warn where settings of the gate that a load takes up differ from the present ones."""
    found = dict.fromkeys(
        f"{key}={theirs[key]!r} (was {mine[key]!r})"
        for mine, theirs in pairs
        for key in ("beta1", *GATE_SETTINGS)
        if key in mine and key in theirs and _differ(mine[key], theirs[key])
    )
    if found:
        warnings.warn(
            f"{name} goes on with the settings that the state was saved under: {', '.join(found)}.",
            RuntimeWarning,
            stacklevel=4,
        )


def _differ(mine: Any, theirs: Any) -> bool:
    """Whether two values of a setting differ; of functions, which may be copies, their types."""
    if callable(mine) and callable(theirs):
        return type(mine) is not type(theirs) or getattr(mine, "__name__", "") != getattr(
            theirs, "__name__", ""
        )
    return bool(checks.plain(mine) != checks.plain(theirs))


def check_gate_settings(group: Mapping[str, Any]) -> None:
    """Refuse bad settings of the gate (TypeError, ValueError)."""
    beta1, _ = checks.check_betas(group["betas"])
    checks.check_number("rho", group["rho"], low=0.0, high=1.0, include_high=False)
    checks.check_number("z", group["z"], low=0.0)
    checks.check_number("softness", group["softness"], low=0.0)
    checks.check_number("q_min", group["q_min"], low=0.0, high=1.0)
    if not callable(group["mask"]):
        checks.check_choice("mask", group["mask"], MASKS_)
    checks.check_choice("mode", group["mode"], MODES)
    checks.check_choice("variance", group["variance"], ESTIMATORS)
    if group["reduction"] is not None:
        checks.check_choice("reduction", group["reduction"], ("per_tensor",))
    checks.check_alpha(group["alpha"], ALPHAS, group["dataset_size"])
    checks.check_batch(group["batch_size"], group["dataset_size"])
    checks.check_second_moment(group["variance"], beta1)


def check_optimizer_settings(group: Mapping[str, Any]) -> None:
    """Refuse bad settings of AdamW or of the gate (TypeError, ValueError)."""
    checks.check_number("lr", group["lr"], low=0.0)
    checks.check_number("eps", group["eps"], low=0.0)
    checks.check_number("weight_decay", group["weight_decay"], low=0.0)
    check_gate_settings(group)
    checks.check_captured_variance(group["variance"], capturable=group["capturable"])
    checks.check_fused(
        fused=group["fused"],
        foreach=group["foreach"],
        mask=group["mask"],
        capturable=group["capturable"],
    )


def estimator_of(group: Mapping[str, Any]) -> VarianceEstimator | None:
    """The variance estimator of a group; None if the group is not gated."""
    if not group["gate"]:
        return None
    return make_estimator(group["variance"], rho=group["rho"], paper=group["mode"] == "paper")


def gate_of(
    group: Mapping[str, Any],
    clock: Clock,
    estimator: VarianceEstimator | None,
    layout: Layout | None = None,
) -> Gate | None:
    """The gate of one step, None where it is not gated; averages go over all of a DTensor."""
    if estimator is None:
        return None
    alpha, paper = group["alpha"], group["mode"] == "paper"
    inflation: Any = estimator.inflation(clock)
    if paper and alpha == "auto":
        alpha = "fresh" if group["dataset_size"] is None else "finite"
    elif not paper and not clock.captured and inflation == 0:
        return None
    return Gate(
        mask=group["mask"] if callable(group["mask"]) else MASKS_[group["mask"]],
        alpha=threshold(
            alpha,
            noise_ratio=momentum_noise(clock.t, clock.beta1),
            inflation=inflation,
            z=group["z"],
            batch_size=group["batch_size"],
            dataset_size=group["dataset_size"],
        ),
        softness=group["softness"],
        eps=group["eps"] if paper else 0.0,
        q_min=group["q_min"],
        per_tensor=group["reduction"] == "per_tensor",
        opened=inflation == 0 if clock.captured and not paper else None,
        pool=local_means if layout is None else GlobalMeans(layout),
    )
