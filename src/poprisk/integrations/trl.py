r"""TRL's trainers: the optimizer, and for ``DPOTrainer`` an audit and a monitor of preferences.

Example::

    auditor = Auditor(torch.ones(len(pairs), dtype=torch.long), kind="preferences")
    trainer = DPOTrainer(
        model, reference, args, train_dataset=audited_dataset(pairs, auditor), ...
    )
    set_optimizer(trainer)
    watch_preferences(trainer, auditor, sinks=["run.jsonl"])
    trainer.train()
    found = auditor.result().add_to(pairs)

The implicit reward of an answer y to a prompt x is, for policy :math:`\pi` and reference
:math:`\pi_0` (Rafailov et al., 2023),

.. math:: r(x, y) = \beta \log \frac{\pi(y \mid x)}{\pi_0(y \mid x)}
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk._validate import check_number, check_positive, check_type
from poprisk.audit import Auditor, AuditResult
from poprisk.dtensor import processes
from poprisk.integrations.transformers import check_trains, poprisk_optimizer
from poprisk.integrations.transformers_audit import (
    INDEX,
    check_swapped,
    of_first,
    resume_audit,
    save_audit,
    with_index,
)
from poprisk.monitor.sinks import Row, as_sinks

FALL = 1.0
"""Mean reward of chosen answers, below zero, from which their fall is told; a convention."""
DRIFT = 2.0
"""Mean size of the rewards from which drift is told; a convention."""


def set_optimizer(trainer: Any, **settings: Any) -> None:
    """Let a trainer of TRL make a :class:`poprisk.PopRiskAdamW` when its training begins.

    It is made after adapters (``peft_config``) have been put on the model and examples that are too
    long been dropped, so that parameters and ``dataset_size`` are those that are trained. Learning
    rate, betas, eps, weight decay, and the batch (examples or pairs a step, over accumulation
    and processes; the last step of an epoch may have fewer) are those of the trainer's arguments.

    Args:
        trainer: ``DPOTrainer``, ``KTOTrainer``, ``RewardTrainer``, ``SFTTrainer`` or another
            ``transformers.Trainer``, before its ``train()``.
        settings: of the optimizer, in place of these.

    Raises:
        TypeError, ValueError: if the trainer has an optimizer or no training set, or for a bad
            setting; nothing is changed then.
    """
    if trainer.optimizer is not None:
        raise ValueError(
            f"{type(trainer).__name__} has an optimizer already; leave out optimizers=, and call "
            "set_optimizer() before train()."
        )
    if trainer.train_dataset is None:
        raise ValueError(f"{type(trainer).__name__} has no train_dataset.")
    sized = hasattr(trainer.train_dataset, "__len__")
    size = len(trainer.train_dataset) if sized else None
    made, found = poprisk_optimizer(trainer.args, size, **settings)
    made([nn.Parameter(torch.zeros(1))], **found)  # a bad setting is refused here, not in train()
    trainer.optimizer_cls_and_kwargs = made, found


def watch_preferences(
    trainer: Any,
    auditor: Auditor | None = None,
    *,
    every: int = 50,
    sinks: Any = (),
    fall: float = FALL,
    drift: float = DRIFT,
) -> PreferenceCallback:
    """Audit and monitor the pairs of a ``DPOTrainer`` as they are trained on.

    Rewards are those of the trainer's own passes: nothing is computed twice. For an audit the
    trainer's collator and its ``args.remove_unused_columns`` are changed such that positions
    come through.

    Args:
        trainer: before its ``train()``.
        auditor: of ``kind="preferences"``, all targets 1 before planting; the trainer's
            data set comes from
            :func:`poprisk.integrations.transformers_audit.audited_dataset`. None only monitors.
        every: optimizer steps of a row of the monitor.
        sinks: where rows go, as for :class:`poprisk.RiskMonitor`.
        fall: warn once the chosen answers' mean reward over a row is below minus this.
        drift: warn once the mean size of all rewards is above this.

    Returns:
        The callback, which has been added to the trainer.

    Raises:
        TypeError, ValueError: for a bad argument; nothing is changed then.
    """
    check_dpo(trainer)
    callback = PreferenceCallback(
        trainer, auditor, every=every, sinks=sinks, fall=fall, drift=drift
    )
    if auditor is not None:
        _check_audited(trainer.train_dataset, auditor)
        trainer.args.remove_unused_columns = False
        trainer.data_collator = with_index(trainer.data_collator)
    trainer.compute_loss = callback.around(trainer.compute_loss)
    trainer.add_callback(callback)
    return callback


def check_dpo(trainer: Any) -> None:
    """Raise TypeError or ValueError unless a trainer has pairs with implicit rewards."""
    if not hasattr(trainer, "compute_ref_log_probs") or not hasattr(trainer, "ld_alpha"):
        raise TypeError(
            f"trainer must be a DPOTrainer of TRL, but got {type(trainer).__name__}: only pairs "
            "have a margin. KTOTrainer's labels of single answers are not audited; for "
            "RewardTrainer use TrainerAuditCallback."
        )
    if trainer.ld_alpha is not None:
        raise ValueError(
            f"ld_alpha={trainer.ld_alpha} weighs tokens by their place, which implicit rewards do "
            "not; leave it out."
        )


def robust_settings(result: AuditResult) -> dict[str, Any]:
    """What ``DPOConfig`` takes for a second run on the same pairs, after an audited first one.

    TRL's robust loss (Chowdhury et al., 2024), told the share of flipped pairs that the first run
    estimates; its loss over flips of chance is an unbiased estimate of that over right pairs.

    Args:
        result: of an auditor of preferences. Where it cannot tell the share, that is a
            RuntimeWarning, and its mean is taken, which then lies towards 1/4.

    Raises:
        ValueError: if it has no estimate.

    Example::

        second = DPOConfig(**settings, **robust_settings(auditor.result()))
    """
    check_type("result", result, AuditResult, "what Auditor.result() returned")
    rate = result.flip_rate
    if rate is None:
        raise ValueError(f"result must be of preferences, but is of {result.kind}.")
    if math.isnan(rate.value):
        raise ValueError(f"the share of flipped pairs is not known: {rate.reason}.")
    if not rate.valid:
        warnings.warn(
            f"the share of flipped pairs, {rate.value:.2f}, is hardly known: {rate.reason}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"loss_type": ["robust"], "label_smoothing": rate.value}


def _check_audited(dataset: Any, auditor: Auditor) -> None:
    check_type("auditor", auditor, Auditor, "a poprisk.Auditor")
    if auditor.items.kind != "preferences":
        raise ValueError(f"auditor must be of preferences, but is of {auditor.items.kind}.")
    check_swapped(dataset, auditor)


@final
class PreferenceCallback(TrainerCallback):
    r"""Implicit rewards of a ``DPOTrainer``'s pairs; made by :func:`watch_preferences`.

    A row holds, over the pairs since the last one, as they are trained on (planted ones swapped):
    ``reward/chosen`` and ``reward/rejected``, their means; ``reward/margin``, the mean difference;
    ``reward/accuracy``, the share of pairs with a positive one; ``reward/drift``, the mean of
    :math:`|r|`; ``pairs/suspect``, the share of pairs that are suspect after the last whole
    look of the audit (NaN before); and ``alarm/chosen`` and ``alarm/drift``, 1 where a threshold
    is passed. A look of the audit is an epoch; its state is saved with the Trainer's checkpoints.

    Attributes:
        rows: step and numbers of each row.
    """

    def __init__(
        self,
        trainer: Any,
        auditor: Auditor | None,
        *,
        every: int,
        sinks: Any,
        fall: float,
        drift: float,
    ) -> None:
        check_positive("every", every)
        self.fall = check_number("fall", fall, low=0.0)
        self.drift = check_number("drift", drift, low=0.0, include_low=False)
        self.auditor, self.every, self.sinks = auditor, every, as_sinks(sinks)
        self.rows: list[tuple[int, Row]] = []
        self._trainer = trainer
        self._suspect = math.nan
        self._sums: Tensor | None = None
        self._passes: dict[bool, Tensor] = {}
        self._hooks: list[Any] = []
        self._told: set[str] = set()

    def around(self, compute_loss: Any) -> Any:
        """A trainer's ``compute_loss`` that also takes the rewards of training pairs."""

        def compute(model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            index = inputs.get(INDEX)
            inputs = {k: v for k, v in inputs.items() if k != INDEX}  # no model knows it
            self._passes.clear()
            loss = compute_loss(model, inputs, *args, **kwargs)
            if model.training and self._hooks:
                self._take(index, *self._rewards(inputs))
            return loss

        return compute

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch policy and reference; take up what was found before a checkpoint.

        Raises:
            ValueError: if the optimizer holds no parameter that is trained.
        """
        check_trains(kwargs["model"], kwargs["optimizer"])
        if state.global_step and self.auditor is not None:
            resume_audit(self.auditor, args, state)
        models = [self._trainer.model, self._trainer.ref_model]
        self._hooks = [m.register_forward_hook(self._note) for m in models if m is not None]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write a row, if it is time."""
        if state.global_step % self.every == 0:
            self._write(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch is a look."""
        if self.auditor is not None:
            found = self.auditor.result()
            self._suspect = float(found.suspect[found.rank >= 0].mean())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was found so far beside the checkpoint."""
        if self.auditor is not None:
            save_audit(self.auditor, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is left, and stop watching."""
        self._write(state.global_step)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, model: nn.Module, args: Any, outputs: Any) -> None:
        """Keep likelihoods of tokens; the policy's have a gradient, the reference's do not."""
        found = getattr(outputs, "log_probs", None)
        if isinstance(found, Tensor):
            self._passes[found.requires_grad] = found.detach()

    def _rewards(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Implicit rewards of chosen and rejected answers, (b,) each."""
        if True not in self._passes:
            raise ValueError(
                "the model gave no log_probs of tokens, as it does since TRL 1.16; update TRL."
            )
        # The last positions are those of real tokens: adapters may put virtual ones before.
        length = inputs["completion_mask"].shape[1] - 1
        policy = self._passes[True][:, -length:].float().sum(1)
        if "ref_chosen_logps" in inputs:
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            reference = self._passes[False][:, -length:].float().sum(1)
        rewards = self._trainer.beta * (policy - reference.float())
        self._passes.clear()
        chosen, rejected = rewards.chunk(2)
        return chosen, rejected

    def _take(self, index: Tensor | None, chosen: Tensor, rejected: Tensor) -> None:
        if self.auditor is not None:
            if index is None:
                raise ValueError(f"a training batch has no {INDEX!r}; was the collator replaced?")
            index = index.cpu()
            targets = self.auditor.targets[index]
            first = of_first(torch.cat([chosen, rejected]), targets)
            self.auditor.update(index, first, targets)
        won = (chosen > rejected).float()
        size = (chosen.abs() + rejected.abs()) / 2
        columns = torch.stack([chosen, rejected, won, size, torch.ones_like(won)])
        sums = columns.sum(1)
        self._sums = sums if self._sums is None else self._sums + sums

    def _write(self, step: int) -> None:
        if self._sums is None:
            return
        if processes() > 1:
            torch.distributed.all_reduce(self._sums)
        *sums, pairs = self._sums.tolist()
        self._sums = None
        chosen, rejected, won, size = (value / pairs for value in sums)
        row = {
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
            "reward/accuracy": won,
            "reward/drift": size,
            "pairs/suspect": self._suspect,
            "alarm/chosen": float(chosen < -self.fall),
            "alarm/drift": float(size > self.drift),
        }
        self.rows.append((step, row))
        self._alarm(step, row)
        if self._trainer.is_world_process_zero():
            for sink in self.sinks:
                sink(step, row)

    def _alarm(self, step: int, row: Row) -> None:
        chosen, drift = row["reward/chosen"], row["reward/drift"]
        for name, said in (
            (
                "alarm/chosen",
                f"chosen answers lose likelihood: mean reward {chosen:.2g}, fall={self.fall:g}",
            ),
            (
                "alarm/drift",
                f"the policy drifts from its reference: mean size of rewards "
                f"{drift:.2g}, drift={self.drift:g}",
            ),
        ):
            if row[name] and name not in self._told:
                self._told.add(name)
                warnings.warn(f"at step {step} {said}.", RuntimeWarning, stacklevel=4)
