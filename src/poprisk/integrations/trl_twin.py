r"""Population loss of a run of TRL's ``DPOTrainer``, and when to stop it, without other pairs.

Example::

    args = DPOConfig(precompute_ref_log_probs=True, ...)
    trainer = DPOTrainer(model, None, args, train_dataset=pairs, processing_class=tokenizer)
    callback = follow_preferences(trainer, stop=True)
    trainer.train()
    print(callback.curve.point)

A pair has no label that could be pushed: the twin is trained without a part of the pairs, in
lockstep, and those tell the loss on pairs that are new (:mod:`poprisk.risk.left_out`). That loss is
DPO's (Rafailov et al., 2023), of pairs that are as noisy as those for training,

.. math:: \ell = -\log\sigma(\beta(r - r_0)),\qquad
          r = \log\frac{\pi(y_w \mid x)}{\pi(y_l \mid x)},

with :math:`r_0` the same under the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk.integrations.transformers_audit import INDEX, with_index
from poprisk.integrations.transformers_twin import TrainerFollower
from poprisk.integrations.trl import check_dpo
from poprisk.losses import direct_preference
from poprisk.risk.curve import PATIENCE
from poprisk.risk.left_out import parts_left_out

SHARE = 0.2
"""Of the pairs, that a twin is trained without."""
NO_INPUTS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""What a batch of ``DPOTrainer`` holds that its model does not take."""


def follow_preferences(
    trainer: Any,
    *,
    every: int | None = None,
    stop: bool = False,
    patience: int = PATIENCE,
    keep_best: bool = False,
    leave_out: float = SHARE,
    probes: int = 1,
    seed: int = 0,
    sinks: Any = (),
) -> PreferenceTwinCallback:
    """Let a twin follow a ``DPOTrainer``, to tell the loss on new pairs and when to stop.

    The trainer trains as it would alone, the twin after each of its steps (see
    :class:`poprisk.Lockstep`): another training of the same length for each probe. Its collator,
    its data set and ``args.remove_unused_columns`` are changed such that positions come through.

    Args:
        trainer: before its ``train()``, on one process, with DPO's own loss and reference
            log-probabilities that were computed beforehand.
        every: optimizer steps between estimates; an epoch if left out.
        stop: as for :class:`poprisk.integrations.transformers_twin.TrainerTwinCallback`.
        patience: likewise.
        keep_best: likewise.
        leave_out: share of the pairs that a twin is trained without.
        probes: twins; those of different ones have nothing in common.
        seed: of which they are.
        sinks: where estimates go too, as for :class:`poprisk.RiskMonitor`.

    Returns:
        The callback, which has been added to the trainer.

    Raises:
        TypeError, ValueError: for a bad argument, or a trainer that cannot be followed; nothing is
            changed then.
    """
    check_dpo(trainer)
    callback = PreferenceTwinCallback(
        trainer,
        every=every,
        stop=stop,
        patience=patience,
        keep_best=keep_best,
        leave_out=leave_out,
        probes=probes,
        seed=seed,
        sinks=sinks,
    )
    # A bad share is refused here, not in train().
    parts_left_out(leave_out, len(trainer.train_dataset), probes=probes, seed=seed)
    if INDEX not in trainer.train_dataset.column_names:
        positions = list(range(len(trainer.train_dataset)))
        trainer.train_dataset = trainer.train_dataset.add_column(INDEX, positions)
    trainer.args.remove_unused_columns = False
    trainer.data_collator = with_index(trainer.data_collator)
    trainer.add_callback(callback)
    return callback


@final
class PreferenceTwinCallback(TrainerFollower):
    """A twin in lockstep with a ``DPOTrainer``; made by :func:`follow_preferences`.

    Estimates are entries of the trainer's ``state.log_history`` (``twin/risk``,
    ``twin/standard_error``, ``twin/valid``). The twin's state is saved with the trainer's
    checkpoints, and a resumed run goes on with the same curve.

    Attributes:
        curve: the estimates so far.
    """

    def __init__(self, trainer: Any, **settings: Any) -> None:
        super().__init__(partial(direct_preference, beta=trainer.beta), **settings)
        self._trainer, self._compute_loss = trainer, trainer.compute_loss
        self._check(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the twin, or take up that of a checkpoint.

        Raises:
            ValueError: if it cannot follow this training.
        """
        dataset = kwargs["train_dataloader"].dataset
        self._begin(
            args,
            kwargs,
            dataset_size=max(dataset[INDEX]) + 1,
            outputs=_log_ratios,
            forward=_of_pairs,
        )
        self._resume(args, state)
        if self._trainer.compute_loss != self._told:  # as a training that failed leaves it
            self._compute_loss = self._trainer.compute_loss
        self._trainer.compute_loss = self._told

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow no more, and go back to the best weights if they are to be kept."""
        self._trainer.compute_loss = self._compute_loss
        super().on_train_end(args, state, control, **kwargs)

    def _told(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's ``compute_loss``, before which the twin is told the pairs."""
        if model.training and torch.is_grad_enabled():
            assert self._lockstep is not None
            if INDEX not in inputs:
                raise ValueError(f"a training batch has no {INDEX!r}; was the collator replaced?")
            self._lockstep.batch(inputs[INDEX].cpu(), _reference(inputs))
        return self._compute_loss(model, inputs, *args, **kwargs)

    def _inputs_and_targets(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        return batch, _reference(batch)

    def _check(self, trainer: Any) -> None:
        """Raise ValueError for settings of a ``DPOTrainer`` that a twin cannot follow."""
        args = trainer.args
        self._refuse(args)
        refused = {
            f"loss_type={list(trainer.loss_types)}": list(trainer.loss_types) != ["sigmoid"],
            f"f_divergence_type={trainer.f_divergence_type!r}": (
                trainer.f_divergence_type != "reverse_kl"
            ),
            "use_weighting": bool(trainer.use_weighting),
            "a loss of a router": bool(trainer.aux_loss_enabled),
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"a twin of a DPOTrainer follows DPO's own loss, but here is {name}; for "
                    "another one use poprisk.TwinRisk(leave_out=0.2) in a loop of your own."
                )
        if not trainer.precompute_ref_logps:
            raise ValueError(
                "a twin takes reference log-probabilities that were computed beforehand; set "
                "precompute_ref_log_probs=True in DPOConfig."
            )


def _reference(batch: Mapping[str, Any]) -> Tensor:
    """The reference's log-ratio of chosen to rejected answers, (b,)."""
    return batch["ref_chosen_logps"] - batch["ref_rejected_logps"]


def _log_ratios(found: Any) -> Tensor:
    """The policy's, from what a model with TRL's fused head returns; 0 at tokens of the prompt."""
    log_probs = getattr(found, "log_probs", None)
    if not isinstance(log_probs, Tensor):
        raise ValueError(
            "the model gave no log_probs of tokens, as it does since TRL 1.16; update TRL."
        )
    chosen, rejected = log_probs.sum(1).chunk(2)
    return chosen - rejected


def _of_pairs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The same for a batch of the trainer's collator, as ``DPOTrainer`` calls its model."""
    inputs = {k: v for k, v in batch.items() if k not in NO_INPUTS}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return _log_ratios(model(**inputs, labels=labels, use_cache=False, fused_lm_head=True))
