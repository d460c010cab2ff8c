"""Find wrong labels in a Lightning run.

Example::

    auditor = Auditor(targets)
    loader = DataLoader(auditor.dataset(data), batch_size=64, shuffle=True)  # (x, y, index)
    trainer = lightning.Trainer(callbacks=[LightningAuditCallback(auditor)], ...)
    trainer.fit(module, loader)
    auditor.result().to_csv("labels.csv")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from poprisk._validate import check_type
from poprisk.audit import Auditor

Split = Callable[[Any], tuple[Tensor, Tensor]]


@final
class LightningAuditCallback(Callback):
    """Tells a :class:`poprisk.Auditor` what a module puts out on its training batches.

    Outputs are those of the module's ``forward`` in ``training_step``, or what the step returns as
    ``{"loss": ..., "outputs": ...}``. Its state is saved with Lightning's checkpoints.

    Args:
        auditor: of the training set.
        split: from a batch to targets and positions of its examples; by default the last two of a
            tuple, or ``"labels"`` and ``"index"`` of a dict, as ``Auditor.dataset`` makes them.
    """

    def __init__(self, auditor: Auditor, *, split: Split | None = None) -> None:
        check_type("auditor", auditor, Auditor, "a poprisk.Auditor")
        self.auditor, self.split = auditor, split or _last_two
        self._outputs: Any = None
        self._hook: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return self.auditor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.auditor.load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the module."""
        self._hook = pl_module.register_forward_hook(self._note)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the outputs of another batch."""
        self._outputs = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hand over what was put out for the batch."""
        found = outputs.get("outputs") if isinstance(outputs, Mapping) else None
        found = self._outputs if found is None else found
        if not isinstance(found, Tensor):
            raise ValueError(
                "training_step called no forward() of the module that gives a tensor: return "
                '{"loss": loss, "outputs": outputs} from it.'
            )
        targets, index = self.split(batch)
        self.auditor.update(index, found, targets)
        self._outputs = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is a look."""
        self.auditor.end_look()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if module.training:
            self._outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs


def _last_two(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        return batch["labels"], batch["index"]
    *_, targets, index = batch
    return targets, index
