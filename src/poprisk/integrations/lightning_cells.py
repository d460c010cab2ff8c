"""How much label noise gets through in a Lightning run, while it trains.

Example::

    loader = DataLoader(TensorDataset(x, noisy, torch.arange(len(x))), batch_size=64, shuffle=True)
    callback = LightningCellCallback(
        "cross_entropy", train=(x, noisy), clean_targets=clean, query=x_test
    )
    trainer = lightning.Trainer(callbacks=[callback], ...)
    trainer.fit(module, loader)
    callback.trace().without_noise()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from poprisk.integrations.cells import CellFollower, Labelled, check_plain
from poprisk.integrations.lightning_twin import check_one_optimizer, three
from poprisk.monitor.steps import innermost
from poprisk.protocols import PerExampleLoss


@final
class LightningCellCallback(CellFollower, Callback):
    """Signal and label noise in the outputs of a module, in lockstep with its training.

    The module is trained as it would be alone (see :class:`poprisk.CellTracer`). Outputs are those
    of its ``forward`` of one tensor, and ``training_step`` returns the mean of ``loss``. For one
    optimizer and automatic optimization, in single or double precision, without clipping; what
    cannot be followed is refused.

    Args:
        loss: one value an example, from outputs (b, ...) and targets, or the name of one.
        train: inputs and targets of the training set, in the order of its positions.
        clean_targets: training targets without the label noise.
        query: inputs, or inputs and targets, of the points to predict.
        split: from a batch to inputs, targets and positions of its examples; by default a tuple
            of these three.
        settings: ``parts``, ``every``, ``quadrature``, ``points``, ``max_memory`` and ``rule``, as
            for :class:`poprisk.CellTracer`.
    """

    def __init__(
        self,
        loss: str | PerExampleLoss,
        *,
        train: Labelled,
        clean_targets: Tensor,
        query: Tensor | Labelled | None = None,
        split: Callable[[Any], tuple[Any, Tensor, Tensor]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(loss, train, clean_targets, query, **settings)
        self.split = split or three
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tracer.

        Raises:
            ValueError: if it cannot follow this training.
        """
        check_one_optimizer(trainer, pl_module, "CellTracer")
        check_plain(
            {
                f"precision={trainer.precision!r}": trainer.precision not in ("32-true", "64-true"),
                "gradient_clip_val": bool(trainer.gradient_clip_val),
            }
        )
        self._step = trainer.global_step
        self._begin(pl_module, innermost(trainer.optimizers[0]), pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which examples the batch is of."""
        self._told.append(self.split(batch)[2].cpu())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Follow the step, if this batch was the last of it."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._stepped()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the cells to the end."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Follow no more."""
        self._finish(exception)
