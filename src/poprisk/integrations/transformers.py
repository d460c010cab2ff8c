"""``transformers.Trainer`` (and TRL's, which are Trainers): the optimizer and a monitor.

Example::

    args = TrainingArguments(learning_rate=1e-4, ...)
    trainer = Trainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=poprisk_optimizer(args, len(data)),
        callbacks=[RiskCallback(loss, sinks=["run.jsonl"])],
    )

TRL's ``SFTTrainer`` and ``RewardTrainer`` take the same arguments, ``DPOTrainer`` an optimizer::

    make, settings = poprisk_optimizer(args, len(data))
    DPOTrainer(model, ..., optimizers=(make(model, **settings), None))
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk.monitor import Quantity, RiskMonitor
from poprisk.monitor.statistics import PerExampleLoss
from poprisk.optimizer import PopRiskAdamW


def poprisk_optimizer(
    args: TrainingArguments, dataset_size: int | None, **settings: Any
) -> tuple[type[PopRiskAdamW], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train with :class:`PopRiskAdamW`.

    Learning rate, betas and eps come from the arguments, weight decay from the Trainer's groups,
    the effective batch from batch size × accumulation × processes.

    Args:
        args: of the Trainer.
        dataset_size: training examples; None for a stream.
        settings: of the optimizer, in place of these.
    """
    found = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "dataset_size": dataset_size,
    }
    return PopRiskAdamW, found | settings


@final
class RiskCallback(TrainerCallback):
    """A :class:`poprisk.RiskMonitor` on a Trainer; measures before the optimizer steps.

    Args:
        loss: one value an example, from logits (b, ...) and labels (b, ...).
        every: optimizer steps between measurements.
        quantities: as for the monitor.
        sinks: as for the monitor.
        labels: under which name the model's inputs hold the labels.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Sequence[Any] = (),
        labels: str = "labels",
    ) -> None:
        self.loss, self.every, self.labels = loss, every, labels
        self.quantities, self.sinks = quantities, sinks
        self.monitor: RiskMonitor | None = None
        self._parts: list[dict[str, Any]] = []
        self._hook: Any = None
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch what the model is called with."""
        model = kwargs["model"]
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is time, on the batches since the last step."""
        parts = list(self._parts)
        self._parts.clear()
        if state.global_step % self.every:
            return
        if not parts:
            self._say_once()
            return
        if self.monitor is None:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            self.monitor = RiskMonitor(
                kwargs["model"],
                self.loss,
                optimizer,
                quantities=self.quantities,
                sinks=self.sinks,
                forward=self._logits,
            )
        batches = [(part, part[self.labels]) for part in parts]
        self.monitor.measure(batches, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self._hook.remove()

    def _say_once(self) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                f"RiskCallback measures nothing: the model is called without an input named "
                f"{self.labels!r}. Pass labels= with the name of the input that holds the labels; "
                "a loss over pairs of examples is not supported.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and self.labels in kwargs:
            self._parts.append(kwargs)

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits; what makes a model give its loss instead is left out."""
        dropped = (self.labels, "num_items_in_batch", "fused_lm_head")  # the last is TRL's
        return model(**{k: v for k, v in batch.items() if k not in dropped}).logits
