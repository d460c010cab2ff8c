"""A monitor for Lightning; the optimizer needs nothing: return it from ``configure_optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from poprisk.evaluation import Forward
from poprisk.monitor import Quantity, RiskMonitor
from poprisk.monitor.statistics import PerExampleLoss

Split = Callable[[Any], tuple[Any, Tensor]]


@final
class RiskCallback(Callback):
    """A :class:`poprisk.RiskMonitor` on a Lightning Trainer; measures before the optimizer steps.

    Numbers are logged by the module too, under their names, if ``log`` is set.

    Args:
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        every: optimizer steps between measurements.
        quantities: as for the monitor.
        sinks: as for the monitor.
        split: from a batch to inputs and targets; by default a pair.
        forward: as for the monitor; the module's ``forward`` by default.
        log: whether to hand the numbers to Lightning's loggers.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Sequence[Any] = (),
        split: Split | None = None,
        forward: Forward | None = None,
        log: bool = False,
    ) -> None:
        self.loss, self.every, self.split = loss, every, split or _pair
        self.quantities, self.sinks, self.forward, self.log = quantities, sinks, forward, log
        self.monitor: RiskMonitor | None = None
        self._parts: list[Any] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until the optimizer steps."""
        self._parts.append(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, if it is time, on the batches since the last step."""
        parts = list(self._parts)
        self._parts.clear()
        if trainer.global_step % self.every or not parts:
            return
        if self.monitor is None:
            self.monitor = RiskMonitor(
                pl_module,
                self.loss,
                optimizer,
                quantities=self.quantities,
                sinks=self.sinks,
                forward=self.forward,
            )
        row = self.monitor.measure(map(self.split, parts), step=trainer.global_step)
        if self.log:
            pl_module.log_dict(row)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    x, y = batch
    return x, y
