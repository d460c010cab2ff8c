"""From the settings of a parameter group to what one step takes: numbers, estimator and gate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from poprisk._validate import check_choice, check_number, plain
from poprisk.dtensor import GlobalMeans, ShardLayout
from poprisk.optim.balance import Balance
from poprisk.optim.gate import (
    ALPHAS,
    MASKS_,
    Charges,
    Gate,
    local_means,
    momentum_noise,
    threshold,
    threshold_at,
)
from poprisk.optim.matrices import rotated_sides
from poprisk.optim.sizes import by_term, charges_by_term, check_sizes, first_sizes, plain_sizes
from poprisk.optim.update import AdamSettings
from poprisk.optim.variance import ESTIMATORS, StepCounts, VarianceEstimator, make_estimator

MODES = ("auto", "paper")

NUMBERS = (
    "eps",
    "weight_decay",
    "coordinate_weight_decay",
    "rho",
    "alpha",
    "z",
    "softness",
    "q_min",
)
OF_BASES = ("slack", "coordinate_z", "factor_decay")
"""Further numbers, of :class:`poprisk.PopRiskSOAP`."""
CHOICES_OF_BASES = ("factors", "max_dim", "refresh_every", "coordinate_weight_decay")
PLAIN_DECAY = 0.01
"""The most that a weight decay which was chosen for matrices takes of what keeps its coordinates:
biases and gains, which are usually left undecayed, and linear models of one output."""
SIZES = ("batch_size", "dataset_size")

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
        charges: of each term of the loss, where they differ (:mod:`poprisk.optim.sizes`).
    """

    settings: dict[str, Any]
    estimator: VarianceEstimator | None
    charges: dict[str, float]

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The estimator's entries in a parameter's state."""
        return self.estimator.state_keys if self.estimator else ()

    def in_coordinates(self, p: Tensor) -> CompiledGroup:
        """For a parameter that has no basis, or none yet: the gate is that of PopRiskAdamW."""
        if "coordinate_z" not in self.settings:
            return self
        own = {"z": self.settings["coordinate_z"], "slack": 0.0}
        own["weight_decay"] = decay_of(self.settings, p)
        return self._replace(settings={**self.settings, **own})

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
        batch_size, dataset_size = first_sizes(s)
        if paper and alpha == "auto":
            alpha = "fresh" if dataset_size is None and not self.charges else "finite"
        elif not paper and not counts.captured and inflation == 0:
            return None
        how: dict[str, Any] = {"inflation": inflation, "z": s["z"]}
        how["noise_ratio"] = momentum_noise(counts.t, counts.beta1)
        sizes: dict[str, Any] = {"batch_size": batch_size, "dataset_size": dataset_size}
        least, charges = threshold(alpha, **sizes, **how), None
        if self.charges:
            least, whole = (threshold_at(finite, alpha, **how) for finite in (0.0, 1.0))
            ratios = self.charges.values()
            balance = self._balance(counts, inflation) if alpha == "auto" else None
            charges = Charges(whole - least, min(ratios), max(ratios), balance)
        return Gate(
            mask=s["mask"] if callable(s["mask"]) else MASKS_[s["mask"]],
            alpha=least,
            softness=s["softness"],
            eps=s["eps"] if paper else 0.0,
            q_min=s["q_min"],
            per_tensor=s["reduction"] == "per_tensor",
            slack=s.get("slack", 0.0),
            opened=inflation == 0 if counts.captured and not paper else None,
            pool=local_means if layout is None else GlobalMeans(layout),
            charges=charges,
        )

    def _balance(self, counts: StepCounts, inflation: float) -> Balance:
        """The noise of both averages; that of h begins with the observations."""
        own = counts._replace(t=counts.observations + 1)
        kept, kept_terms = (momentum_noise(c.t, c.beta1) / inflation for c in (counts, own))
        return Balance(kept, kept_terms, own.mean_scale, max(self.charges.values()))


def decay_of(group: Mapping[str, Any], p: Tensor) -> float:
    """The weight decay of one parameter of a group; of PopRiskSOAP less where none is rotated."""
    decay = float(group["weight_decay"])
    if "max_dim" not in group or any(rotated_sides(p, group["max_dim"])):
        return decay
    own = group.get("coordinate_weight_decay")
    return min(decay, PLAIN_DECAY) if own is None else float(own)


def compiled(group: Mapping[str, Any]) -> CompiledGroup:
    """A group's settings with Python numbers for numpy's and for tensors of one element."""
    numbers = {key: plain(group[key]) for key in _numbers_in(group)}
    betas = tuple(map(plain, group["betas"]))
    sizes = {key: plain_sizes(group[key]) for key in SIZES}
    settings: dict[str, Any] = {**group, **numbers, **sizes, "betas": betas}
    charges = charges_by_term(settings)
    how = {"rho": settings["rho"], "paper": settings["mode"] == "paper", "terms": bool(charges)}
    gated = make_estimator(settings["variance"], **how)
    return CompiledGroup(settings, gated if settings["gate"] else None, charges)


def _numbers_in(group: Mapping[str, Any]) -> list[str]:
    """Which settings of a group are numbers, but for its learning rate and sizes."""
    return [key for key in (*NUMBERS, *OF_BASES) if key in group]


def make_plain_(group: dict[str, Any]) -> None:
    """Replace numpy's numbers in a group, which ``torch.load(weights_only=True)`` would refuse.

    Tensors stay the user's own, except where steps are captured, which must not look into them.
    """
    captured = bool(group["capturable"])
    group.update({key: plain_sizes(group[key]) for key in SIZES})
    for key in ("lr", *_numbers_in(group)):
        if not isinstance(group[key], Tensor) or (captured and key != "lr"):
            group[key] = plain(group[key])
    if captured or not any(isinstance(beta, Tensor) for beta in group["betas"]):
        group["betas"] = tuple(map(plain, group["betas"]))


def tell_differences(
    name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Warn where settings of the gate or of bases that a load takes up differ from the present."""
    found = dict.fromkeys(
        f"{key}={theirs[key]!r} (was {mine[key]!r})"
        for mine, theirs in pairs
        for key in ("beta1", *GATE_SETTINGS, *OF_BASES, *CHOICES_OF_BASES)
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
        whole = group["dataset_size"]
        sizes = whole.values() if isinstance(whole, Mapping) else [whole]
        if alpha == "finite" and None in sizes:
            raise ValueError('alpha="finite" is b/(n-b) and needs batch_size and dataset_size.')
    check_sizes(*(plain(group[key]) for key in SIZES))
    _check_terms(group)
    if group["variance"] == "second-moment" and beta1 == 0:
        raise ValueError(
            'variance="second-moment" is v̂ - m̂² and needs betas[0] > 0, but got 0; use '
            'variance="ema".'
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


def _check_terms(group: Mapping[str, Any]) -> None:
    """Refuse what the gate cannot do for a loss of several terms (TypeError, ValueError)."""
    if group["variance"] != "ema" and by_term(group):
        raise ValueError(
            f"variance={group['variance']!r} was given with batch_size and dataset_size by term, "
            'which variance="ema" measures alone; use that, or one number for all terms.'
        )
    if not charges_by_term(group):
        return
    if callable(group["mask"]):
        raise TypeError(
            "terms of a loss that are charged differently need a mask by name, but got a function, "
            "which takes one threshold for all coordinates."
        )
    for name in ("fused", "capturable"):
        if group.get(name):
            raise ValueError(
                f"{name}=True cannot take terms of a loss that are charged differently: gradients "
                "of terms are told to the optimizer outside of the step; leave it out."
            )


def check_by_name(group: Mapping[str, Any]) -> None:
    """Refuse a mask that the native kernel is to evaluate and cannot (TypeError)."""
    if group["fused"] and callable(group["mask"]):
        raise TypeError(
            "fused=True needs a mask by name, but got a function, which the native kernel cannot "
            "call; use foreach=True."
        )
