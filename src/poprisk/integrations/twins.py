"""What the callbacks with a twin share, whatever trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from poprisk._validate import check_callable, check_positive
from poprisk.monitor.sinks import as_sinks
from poprisk.protocols import PerExampleLoss
from poprisk.risk.curve import RiskCurve
from poprisk.risk.lockstep import Lockstep


class TwinFollower:
    """A twin's curve: when it is estimated, where that goes, and what ends with training.

    Args:
        loss: one value an example.
        every: optimizer steps between estimates; an epoch if None.
        stop: whether training ends once the best moment is past.
        patience: of ``stop``.
        keep_best: whether the model ends with the weights of its best moment.
        sinks: where estimates go too.
        settings: of the twin.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int | None,
        stop: bool,
        patience: int,
        keep_best: bool,
        sinks: Any,
        **settings: Any,
    ) -> None:
        check_callable("loss", loss)
        if every is not None:
            check_positive("every", every)
        self.loss, self.every, self.stop = loss, every, stop
        self.curve = RiskCurve(patience=patience, keep_best=keep_best)
        self.sinks = as_sinks(sinks)
        self._settings = settings
        self._lockstep: Lockstep | None = None
        self._loader: DataLoader[Any] | None = None

    def _estimate(
        self, step: int, batches: Iterable[tuple[Any, Tensor, Tensor]], model: nn.Module
    ) -> dict[str, float]:
        """Add an estimate from the training set to the curve; its row."""
        assert self._lockstep is not None
        self.curve.add(step, self._lockstep.twin.estimate_batches(batches), model)
        return self.curve.row()

    def _send(self, step: int, row: dict[str, float]) -> bool:
        """Give a row to the sinks; whether training is to end."""
        for sink in self.sinks:
            sink(step, row)
        return self.stop and self.curve.past

    def _unfollow(self) -> None:
        if self._lockstep is not None:
            self._lockstep.remove()

    def _finish(self, model: nn.Module) -> None:
        """Follow no more, and go back to the best weights if they are to be kept."""
        self._unfollow()
        if self.curve.keep_best:
            self.curve.restore_best(model)
