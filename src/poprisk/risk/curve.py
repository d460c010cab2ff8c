"""The estimates of one run as they come, its best moment so far, and when that is past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, final

from torch import Tensor, nn

from poprisk._validate import check_positive, check_type
from poprisk.printing import described
from poprisk.risk.choose import StoppingPoint, stopping_point
from poprisk.risk.estimate import DegreesOfFreedom, RiskEstimate

PATIENCE = 3
"""Estimates in a row that are worse than the best one, after which that one is past."""
OLD_GROUPS = "it is of an earlier version, which did not leave groups out together"


@final
class RiskCurve:
    """Estimates along a run, and the weights of its best moment.

    Args:
        patience: estimates in a row for which the best moment is past once each of them is worse
            than the best by more than 1.5 standard errors of the difference, or comparable no more.
        keep_best: whether to keep the model's weights (and buffers) of the best moment, in the
            host's memory.

    Attributes:
        estimates: in the order of training.
        steps: of the optimizer, at which they were made.
    """

    def __init__(self, *, patience: int = PATIENCE, keep_best: bool = False) -> None:
        check_positive("patience", patience)
        self.patience, self.keep_best = patience, keep_best
        self.estimates: list[RiskEstimate] = []
        self.steps: list[int] = []
        self._weights: dict[int, dict[str, Tensor]] = {}

    def __repr__(self) -> str:
        return described("RiskCurve", estimates=len(self.estimates), past=self.past)

    def add(self, step: int, estimate: RiskEstimate, model: nn.Module) -> None:
        """Take up an estimate of a model as it is now.

        Args:
            step: of the optimizer.
            estimate: of the same training examples as those before.
            model: whose weights are kept if they are the best so far.
        """
        self.estimates.append(estimate)
        self.steps.append(step)
        point, last = self.point, len(self.estimates) - 1
        if self.keep_best and point is not None and point.valid and point.index == last:
            kept = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
            self._weights = {last: kept}

    @property
    def point(self) -> StoppingPoint | None:
        """The best moment so far; None before the first estimate."""
        return stopping_point(self.estimates) if self.estimates else None

    @property
    def past(self) -> bool:
        """Whether the best moment is past, by the rule of ``patience``."""
        point = self.point
        if point is None or not point.valid:
            return False
        return len(self.estimates) - 1 - point.high >= self.patience

    def restore_best(self, model: nn.Module) -> bool:
        """Give the model the weights of the best moment.

        Returns:
            Whether there are any: not without a comparable estimate.
        """
        point = self.point
        if point is None or not point.valid or point.index not in self._weights:
            return False
        model.load_state_dict(self._weights[point.index])
        return True

    def row(self) -> dict[str, float]:
        """The last estimate as numbers to log."""
        last = self.estimates[-1]
        return {
            "twin/risk": last.value,
            "twin/standard_error": last.standard_error,
            "twin/valid": float(last.valid),
            "twin/comparable": float(last.comparable),
            "twin/train_loss": last.train_loss,
        }

    def state_dict(self) -> dict[str, Any]:
        """All estimates and the weights kept, as tensors and plain values."""
        return {
            "estimates": [_plain(estimate) for estimate in self.estimates],
            "steps": list(self.steps),
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            TypeError, ValueError: if it is no such state.
        """
        check_type("state_dict", state_dict, Mapping, "a dict")
        missing = {"estimates", "steps", "weights"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict is not a RiskCurve's: it has no {sorted(missing)}.")
        self.estimates = [_estimate(values) for values in state_dict["estimates"]]
        self.steps = list(state_dict["steps"])
        self._weights = dict(state_dict["weights"])


def _plain(estimate: RiskEstimate) -> dict[str, Any]:
    values = {field.name: getattr(estimate, field.name) for field in fields(estimate)}
    return {**values, "parts": [tuple(part) for part in estimate.parts]}


def _estimate(values: Mapping[str, Any]) -> RiskEstimate:
    found: dict[str, Any] = dict(values)
    found["parts"] = tuple(DegreesOfFreedom(*part) for part in values["parts"])
    if values["groups"] is not None and "intraclass" not in values:
        found |= {"valid": False, "comparable": False, "reason": OLD_GROUPS}
    return RiskEstimate(**found)
