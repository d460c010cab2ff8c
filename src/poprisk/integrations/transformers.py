"""``transformers.Trainer`` (and TRL's, which are Trainers): the optimizer and a monitor.

Example::

    args = TrainingArguments(learning_rate=1e-4, ...)
    trainer = Trainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=poprisk_optimizer(args, len(data)),
        callbacks=[TrainerRiskCallback(loss, sinks=["run.jsonl"])],
    )

TRL's ``SFTTrainer`` and ``RewardTrainer`` take the same arguments; for its others, and with
adapters, see :func:`poprisk.integrations.trl.set_optimizer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk._renamed import renamed_names
from poprisk._validate import check_callable, check_positive
from poprisk.monitor import Condition, Quantity, RiskMonitor
from poprisk.monitor.alerts import check_conditions
from poprisk.monitor.quantities import check_quantities
from poprisk.monitor.sinks import as_sinks
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.protocols import PerExampleLoss


def poprisk_optimizer(
    args: TrainingArguments, dataset_size: int | None, **settings: Any
) -> tuple[type[PopRiskAdamW], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train with :class:`PopRiskAdamW`.

    Learning rate, betas and eps come from the arguments, weight decay from the Trainer's groups,
    the effective batch from batch size × accumulation × processes. The last step of an epoch may
    have fewer examples, which is not told to the gate: its variance is an average over steps;
    ``dataloader_drop_last=True`` leaves that step out.

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


def check_trains(model: nn.Module, optimizer: Any) -> None:
    """Raise ValueError if an optimizer holds no parameter of the model that is trained."""
    if optimizer is None:  # made later, as by DeepSpeed
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and id(p) in held for p in model.parameters()):
        raise ValueError(
            "the optimizer holds none of the parameters that are trained, as one made before "
            "peft_config put adapters on does; leave out optimizers=, and give the trainer "
            "optimizer_cls_and_kwargs=poprisk_optimizer(...), or call set_optimizer(trainer)."
        )


@final
class TrainerRiskCallback(TrainerCallback):
    """A :class:`poprisk.RiskMonitor` on a Trainer; measures before the optimizer steps.

    Loss and signal are of the batches that the model's own loss was trained on. A trainer that
    makes another loss of the logits (``DPOTrainer``, ``compute_loss_func``, label smoothing) trains
    on something that ``loss`` does not say: they are left out then, and that is said.

    Args:
        loss: one value an example, from logits (b, ...) and labels (b, ...).
        every: optimizer steps between measurements.
        quantities: as for the monitor.
        sinks: as for the monitor.
        labels: under which name the model's inputs hold the labels.
        conditions: as for the monitor.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Any = (),
        labels: str = "labels",
        conditions: Iterable[Condition] | None = None,
    ) -> None:
        check_callable("loss", loss)
        check_positive("every", every)
        check_quantities(quantities or ())
        self.loss, self.every, self.labels = loss, every, labels
        self.quantities, self.sinks = quantities, as_sinks(sinks)
        self.conditions = None if conditions is None else check_conditions(conditions)
        self.monitor: RiskMonitor | None = None
        self._parts: list[dict[str, Any]] = []
        self._own = 0
        self._hook: Any = None
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch what the model is called with, and whether its own loss is trained.

        Raises:
            ValueError: if the optimizer holds no parameter that is trained.
        """
        model = kwargs["model"]
        check_trains(model, kwargs.get("optimizer"))
        self._hook = model.register_forward_hook(self._note, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is time, on the batches since the last step."""
        parts: list[dict[str, Any]] = list(self._parts)
        own = self._own
        self._parts.clear()
        self._own = 0
        if state.global_step % self.every:
            return
        if not parts:
            self._say_once(f"the model is called without an input named {self.labels!r}")
        elif own < len(parts):
            self._say_once(
                "the trainer makes another loss than the model's own of its outputs (as DPOTrainer "
                "does)"
            )
            parts.clear()
        try:
            self._measure(parts, state.global_step, kwargs)
        except Exception as error:
            self._say_once(f"{error}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()

    def _measure(self, parts: list[dict[str, Any]], step: int, trainer: Mapping[str, Any]) -> None:
        if self.monitor is None:
            self.monitor = RiskMonitor(
                trainer["model"],
                self.loss,
                trainer["optimizer"],
                quantities=self.quantities,
                sinks=self.sinks,
                forward=self._logits,
                conditions=self.conditions,
            )
        self.monitor.measure([(part, part[self.labels]) for part in parts], step=step)

    def _say_once(self, reason: str) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                f"TrainerRiskCallback measures no loss and no signal: {reason}. Pass labels= with "
                "the name of the input that holds the labels; a loss over pairs of examples is not "
                "supported.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _note(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        if not model.training or self.labels not in kwargs:
            return
        self._parts.append(kwargs)
        found = outputs if isinstance(outputs, dict) else {}
        for name, trained in (("loss", self._trained), ("log_probs", self._likelihood)):
            value = found.get(name)
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(trained)

    def _trained(self, grad: Tensor) -> None:
        self._own += 1

    def _likelihood(self, grad: Tensor) -> None:
        """TRL's likelihoods of tokens: their negative mean is trained if all have one gradient."""
        weights = -grad[grad != 0]
        equal = weights.numel() > 0 and float(weights.min()) >= 0.99 * float(weights.max()) > 0
        self._own += equal

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits; what makes a model give its loss instead is left out."""
        dropped = (self.labels, "num_items_in_batch", "fused_lm_head")  # the last is TRL's
        return model(**{k: v for k, v in batch.items() if k not in dropped}).logits


__getattr__ = renamed_names(__name__, RiskCallback="TrainerRiskCallback")
