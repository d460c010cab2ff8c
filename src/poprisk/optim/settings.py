"""From the settings of a parameter group to what one step takes: numbers, estimator and gate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from poprisk._validate import check_choice, check_number, plain
from poprisk.dtensor import GlobalMeans, ShardLayout
from poprisk.optim.gate import ALPHAS, MASKS_, Gate, local_means, momentum_noise, threshold
from poprisk.optim.update import AdamSettings
from poprisk.optim.variance import ESTIMATORS, StepCounts, VarianceEstimator, make_estimator

MODES = ("auto", "paper")

NUMBERS = ("eps", "weight_decay", "rho", "alpha", "z", "softness", "batch_size", "dataset_size")
NUMBERS = (*NUMBERS, "q_min")

GATE_SETTINGS = (
    *("gate", "variance", "mode", "rho", "mask", "alpha", "z", "softness"),
    *("batch_size", "dataset_size", "reduction", "q_min"),
)


class CompiledGroup(NamedTuple):
    """A parameter group as one step takes it; made by :func:`compiled`.

    Attributes:
        settings: of the group, with Python numbers; the learning rate may stay a tensor, which
            schedulers write to and captured steps read.
        estimator: of the variance; None: the group is not gated.
    """

    settings: dict[str, Any]
    estimator: VarianceEstimator | None

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The estimator's entries in a parameter's state."""
        return self.estimator.state_keys if self.estimator else ()

    def counts(self, t: Any, observations: Any) -> StepCounts:
        """Counters with the decay rates of the group."""
        return StepCounts(t, observations, *self.settings["betas"])

    def adam(self, counts: StepCounts) -> AdamSettings:
        """The settings of AdamW itself."""
        lr, decay = self.settings["lr"], self.settings["weight_decay"]
        lr = lr if counts.captured else float(lr)
        return AdamSettings(lr, counts.beta1, counts.beta2, self.settings["eps"], decay)

    def gate(self, counts: StepCounts, layout: ShardLayout | None = None) -> Gate | None:
        """The gate of one step, None where it is ungated; averages go over all of a DTensor."""
        if self.estimator is None:
            return None
        s = self.settings
        inflation: Any = self.estimator.inflation(counts)
        alpha, paper = s["alpha"], s["mode"] == "paper"
        if paper and alpha == "auto":
            alpha = "fresh" if s["dataset_size"] is None else "finite"
        elif not paper and not counts.captured and inflation == 0:
            return None
        return Gate(
            mask=s["mask"] if callable(s["mask"]) else MASKS_[s["mask"]],
            alpha=threshold(
                alpha,
                noise_ratio=momentum_noise(counts.t, counts.beta1),
                inflation=inflation,
                z=s["z"],
                batch_size=s["batch_size"],
                dataset_size=s["dataset_size"],
            ),
            softness=s["softness"],
            eps=s["eps"] if paper else 0.0,
            q_min=s["q_min"],
            per_tensor=s["reduction"] == "per_tensor",
            slack=s.get("slack", 0.0),
            opened=inflation == 0 if counts.captured and not paper else None,
            pool=local_means if layout is None else GlobalMeans(layout),
        )


def compiled(group: Mapping[str, Any]) -> CompiledGroup:
    """A group's settings with Python numbers for numpy's and for tensors of one element."""
    numbers = {key: plain(group[key]) for key in NUMBERS}
    betas = tuple(map(plain, group["betas"]))
    settings: dict[str, Any] = {**group, **numbers, "betas": betas}
    paper = settings["mode"] == "paper"
    gated = make_estimator(settings["variance"], rho=settings["rho"], paper=paper)
    return CompiledGroup(settings, gated if settings["gate"] else None)


def make_plain_(group: dict[str, Any]) -> None:
    """Replace numpy's numbers in a group, which ``torch.load(weights_only=True)`` would refuse.

    Tensors stay the user's own, except where steps are captured, which must not look into them.
    """
    captured = bool(group["capturable"])
    for key in ("lr", *NUMBERS):
        if not isinstance(group[key], Tensor) or (captured and key != "lr"):
            group[key] = plain(group[key])
    if captured or not any(isinstance(beta, Tensor) for beta in group["betas"]):
        group["betas"] = tuple(map(plain, group["betas"]))


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
    return bool(plain(mine) != plain(theirs))


def check_gate_settings(group: Mapping[str, Any]) -> None:
    """Refuse bad settings of the gate (TypeError, ValueError)."""
    betas, alpha = group["betas"], group["alpha"]
    if not isinstance(betas, (tuple, list, np.ndarray)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair such as (0.9, 0.999), but got {betas!r}.")
    beta1, _ = (
        check_number(f"betas[{i}]", beta, low=0.0, high=1.0, include_high=False)
        for i, beta in enumerate(betas)
    )
    check_number("rho", group["rho"], low=0.0, high=1.0, include_high=False)
    check_number("z", group["z"], low=0.0)
    check_number("softness", group["softness"], low=0.0)
    check_number("q_min", group["q_min"], low=0.0, high=1.0)
    if not callable(group["mask"]):
        check_choice("mask", group["mask"], MASKS_)
    check_choice("mode", group["mode"], MODES)
    check_choice("variance", group["variance"], ESTIMATORS)
    if group["reduction"] is not None:
        check_choice("reduction", group["reduction"], ("per_tensor",))
    if not isinstance(alpha, str):
        check_number("alpha", alpha, low=0.0)
    else:
        check_choice("alpha", alpha, ALPHAS)
        if alpha == "finite" and group["dataset_size"] is None:
            raise ValueError('alpha="finite" is b/(n-b) and needs batch_size and dataset_size.')
    _check_sizes(plain(group["batch_size"]), plain(group["dataset_size"]))
    if group["variance"] == "second-moment" and beta1 == 0:
        raise ValueError(
            'variance="second-moment" is v̂ - m̂² and needs betas[0] > 0, but got 0; use '
            'variance="ema".'
        )


def _check_sizes(batch_size: Any, dataset_size: Any) -> None:
    for name, value in (("batch_size", batch_size), ("dataset_size", dataset_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{name} must be an integer or None, but got {value!r} ({type(value).__name__})."
            )
        if value <= 0:
            raise ValueError(f"{name} must be positive, but got {value}.")
    if dataset_size is None:
        return
    if batch_size is None:
        raise ValueError(
            f"dataset_size={dataset_size} was given without batch_size; pass the number of "
            "examples behind one step (batch × accumulation steps × processes)."
        )
    if batch_size >= dataset_size:
        raise ValueError(
            f"batch_size={batch_size} must be smaller than dataset_size={dataset_size}: a "
            "full batch has no sampling noise to estimate. Pass dataset_size=None to ignore the "
            "finite size, or give alpha as a number."
        )


def check_optimizer_settings(group: Mapping[str, Any]) -> None:
    """Refuse bad settings of AdamW or of the gate (TypeError, ValueError)."""
    check_number("lr", group["lr"], low=0.0)
    check_number("eps", group["eps"], low=0.0)
    check_number("weight_decay", group["weight_decay"], low=0.0)
    check_gate_settings(group)
    variance, captured, fused = group["variance"], group["capturable"], group["fused"]
    if captured and variance not in ("ema", "second-moment"):
        raise ValueError(
            f"variance={variance!r} cannot be captured: it is told to the optimizer outside of "
            'the step; use capturable=False or variance="ema".'
        )
    if fused and group["foreach"]:
        raise ValueError("fused=True and foreach=True were both given; choose one of them.")
    check_by_name(group)


def check_by_name(group: Mapping[str, Any]) -> None:
    """Refuse a mask that the native kernel is to evaluate and cannot (TypeError)."""
    if group["fused"] and callable(group["mask"]):
        raise TypeError(
            "fused=True needs a mask by name, but got a function, which the native kernel cannot "
            "call; use foreach=True."
        )
