"""A monitor for Lightning; the optimizer needs nothing: return it from ``configure_optimizers``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from poprisk._renamed import renamed_names
from poprisk._validate import check_callable, check_positive
from poprisk.evaluation import Forward
from poprisk.monitor import Condition, Quantity, RiskMonitor
from poprisk.monitor.alerts import check_conditions
from poprisk.monitor.quantities import check_quantities
from poprisk.monitor.sinks import as_sinks
from poprisk.monitor.steps import innermost
from poprisk.protocols import PerExampleLoss

Split = Callable[[Any], tuple[Any, Tensor]]


@final
class LightningRiskCallback(Callback):
    """A :class:`poprisk.RiskMonitor` on a Lightning Trainer; measures before the optimizer steps.

    Numbers are logged by the module too, under their names, if ``log`` is set. Of several
    optimizers the first that steps is watched: a row is of the batches that had a backward pass
    since its last step, and steps are its own.

    Args:
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        every: optimizer steps between measurements.
        quantities: as for the monitor.
        sinks: as for the monitor.
        split: from a batch to inputs and targets; by default a pair.
        forward: as for the monitor; the module's ``forward`` by default.
        log: whether to hand the numbers to Lightning's loggers.
        conditions: as for the monitor.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Any = (),
        split: Split | None = None,
        forward: Forward | None = None,
        log: bool = False,
        conditions: Iterable[Condition] | None = None,
    ) -> None:
        check_callable("loss", loss)
        check_positive("every", every)
        check_quantities(quantities or ())
        self.loss, self.every, self.split = loss, every, split or _pair
        self.quantities, self.sinks = quantities, as_sinks(sinks)
        self.conditions = None if conditions is None else check_conditions(conditions)
        self.forward, self.log = forward, log
        self.monitor: RiskMonitor | None = None
        self._batch: tuple[Any] | None = None
        self._parts: list[Any] = []
        self._watched: Any = None
        self._steps: int | None = None
        self._said = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._steps = state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the trainer is."""
        if self._steps is None:
            self._steps = trainer.global_step
        self._watched = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the batch at hand."""
        self._batch = (batch,)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the batch until the optimizer steps: it is a part of the gradient."""
        self._parts.extend(self._batch or ())
        self._batch = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, if it is time, on the batches since the last step."""
        optimizer = innermost(optimizer)
        if self._watched is None:
            self._watched = optimizer
        if self._watched is not optimizer:
            return
        parts, step = list(self._parts), self._steps or 0
        self._parts.clear()
        self._steps = step + 1
        if step % self.every or not parts:
            return
        try:
            row = self._measure(pl_module, optimizer, parts, step)
            if self.log:
                pl_module.log_dict(row)
        except Exception as error:
            if not self._said:
                self._said = True
                warnings.warn(
                    f"LightningRiskCallback cannot measure: {error}. Training goes on.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _measure(
        self, model: LightningModule, optimizer: Optimizer, parts: list[Any], step: int
    ) -> dict[str, float]:
        if self.monitor is None:
            self.monitor = RiskMonitor(
                model,
                self.loss,
                optimizer,
                quantities=self.quantities,
                sinks=self.sinks,
                forward=self.forward,
                conditions=self.conditions,
            )
        return self.monitor.measure(map(self.split, parts), step=step)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    x, y = batch
    return x, y


__getattr__ = renamed_names(__name__, RiskCallback="LightningRiskCallback")
