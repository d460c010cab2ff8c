"""Population risk of a run of ``transformers.Trainer``, and when to stop it, without other data.

Example::

    data = data.add_column("index", range(len(data)))
    args = TrainingArguments(remove_unused_columns=False, ...)
    callback = TrainerTwinCallback(torch.nn.CrossEntropyLoss(reduction="none"), stop=True)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    print(callback.curve.point)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk.integrations.transformers import check_trains
from poprisk.integrations.transformers_audit import INDEX, check_keeps_positions, writes_texts
from poprisk.integrations.twins import TwinFollower
from poprisk.monitor.steps import innermost
from poprisk.protocols import PerExampleLoss
from poprisk.risk.curve import PATIENCE
from poprisk.risk.lockstep import Lockstep, logits_of


class TrainerFollower(TwinFollower, TrainerCallback):
    """What twins of a Trainer's runs share: when they are estimated, saved and left.

    Args:
        loss: one value an example.
        settings: as for :class:`poprisk.integrations.twins.TwinFollower`.
    """

    def __init__(self, loss: PerExampleLoss, **settings: Any) -> None:
        super().__init__(loss, **settings)
        self._hooks: list[Any] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Estimate, if it is time, before a checkpoint of this step is saved."""
        if self.every is None:
            if not float(state.epoch or 0.5).is_integer():
                return
        elif state.global_step % self.every:
            return
        row = self._estimate(state.global_step, self._batches(args.device), kwargs["model"])
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **row})
        if self._send(state.global_step, row):
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save twin and curve beside the checkpoint."""
        assert self._lockstep is not None
        file = _file(args, state)
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {"lockstep": self._lockstep.state_dict(), "curve": self.curve.state_dict()}
        torch.save(found, file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow no more, and go back to the best weights if they are to be kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._finish(kwargs["model"])

    def _begin(self, args: TrainingArguments, kwargs: Mapping[str, Any], **settings: Any) -> None:
        """Make the twin of a Trainer's model, which is told positions that it does not know.

        Args:
            args: of the Trainer.
            kwargs: what the Trainer tells when its training begins.
            settings: of the :class:`poprisk.Lockstep`.
        """
        model: nn.Module = kwargs["model"]
        optimizer: Any = innermost(kwargs["optimizer"])
        check_trains(model, optimizer)
        loader = kwargs["train_dataloader"]
        self._loader = DataLoader(
            loader.dataset, batch_size=args.eval_batch_size, collate_fn=loader.collate_fn
        )
        self._hooks = [model.register_forward_pre_hook(without_index, with_kwargs=True)]
        with unwatched(model):
            self._lockstep = Lockstep(
                model,
                optimizer,
                self.loss,
                clip=_clipping(args.max_grad_norm),
                **settings,
                **self._settings,
            )

    def _batches(self, device: torch.device) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """The training set: inputs, targets and positions."""
        assert self._loader is not None
        for batch in self._loader:
            x = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            index = x.pop(INDEX)
            yield *self._inputs_and_targets(x), index

    def _inputs_and_targets(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """What the model is asked, and what the loss takes."""
        raise NotImplementedError

    def _refuse(self, args: TrainingArguments) -> None:
        """Raise ValueError for settings of a Trainer that no twin can follow."""
        refused = {
            "fp16": args.fp16,
            "torch_compile": args.torch_compile,
            "fsdp": bool(args.fsdp),
            "deepspeed": bool(args.deepspeed),
            "several GPUs in one process": args.n_gpu > 1,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"a twin does not follow training with {name}; train in single precision or "
                    "bf16, uncompiled, on one device."
                )
        if self.curve.keep_best and args.load_best_model_at_end:
            raise ValueError(
                "keep_best and the Trainer's load_best_model_at_end both choose the weights at the "
                "end; leave one out."
            )

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Take up the twin of a checkpoint, if training goes on from one."""
        if not state.global_step:
            return
        file = _file(args, state)
        if not file.exists():
            raise ValueError(
                f"there is no {file} of the run that is resumed: a twin that begins now would not "
                "show what was learned before; start anew, or leave the callback out."
            )
        assert self._lockstep is not None
        found = torch.load(file, map_location="cpu", weights_only=True)
        self._lockstep.load_state_dict(found["lockstep"])
        self.curve.load_state_dict(found["curve"])


@final
class TrainerTwinCallback(TrainerFollower):
    """A twin in lockstep with a Trainer's model: a curve of its risk, from its training data.

    The Trainer trains as it would alone, the twin after each of its steps (see
    :class:`poprisk.Lockstep`), which is another training of the same length for each probe, and an
    estimate passes over the whole training set. Estimates are entries of the Trainer's
    ``state.log_history`` (``twin/risk``, ``twin/standard_error``, ``twin/valid``). The twin's state
    is saved with the Trainer's checkpoints, and a resumed run goes on with the same curve.

    For heads with one label an example (sequence or image classification, regression), and with
    ``leave_out`` for language models, on one process, in single precision or ``bf16``; what cannot
    be followed is refused when training begins. Put it behind a ``TrainerAuditCallback``, if there
    is one.

    Args:
        loss: one value an example, from logits (b, ...) and labels (b, ...): what the Trainer's
            loss is the mean of.
        every: optimizer steps between estimates; an epoch if left out.
        stop: whether to end training once the best moment is past: the last ``patience`` estimates
            are each worse than the best by more than 1.5 standard errors of the difference, or
            comparable no more.
        patience: of ``stop``.
        keep_best: whether to give the model the weights of :func:`poprisk.stopping_point` when
            training ends.
        labels: under which name the model's inputs hold the labels.
        delta: as for :class:`poprisk.TwinRisk`.
        probes: likewise.
        seed: likewise.
        sinks: where estimates go too, as for :class:`poprisk.RiskMonitor`.
        leave_out: as for :class:`poprisk.TwinRisk`. The loss of a language model is then
            ``partial(poprisk.losses.next_token, reduction="sum")``: a Trainer takes the mean over
            tokens, so that a sequence weighs as many as it has.

    Attributes:
        curve: the estimates so far.
    """

    def __init__(
        self,
        loss: PerExampleLoss,
        *,
        every: int | None = None,
        stop: bool = False,
        patience: int = PATIENCE,
        keep_best: bool = False,
        labels: str = "labels",
        delta: float = 0.3,
        probes: int = 1,
        seed: int = 0,
        sinks: Any = (),
        leave_out: float | None = None,
    ) -> None:
        super().__init__(
            loss,
            every=every,
            stop=stop,
            patience=patience,
            keep_best=keep_best,
            sinks=sinks,
            delta=delta,
            probes=probes,
            seed=seed,
            leave_out=leave_out,
        )
        self.labels = labels

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the twin, or take up that of a checkpoint.

        Raises:
            ValueError: if it cannot follow this training.
        """
        model: nn.Module = kwargs["model"]
        self._check(args, model)
        dataset = kwargs["train_dataloader"].dataset
        self._begin(args, kwargs, dataset_size=dataset, forward=_logits)
        self._hooks.append(
            model.register_forward_pre_hook(self._tell, with_kwargs=True, prepend=True)
        )
        self._resume(args, state)

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        """Raise ValueError for settings of a Trainer that a twin cannot follow."""
        check_keeps_positions(args)
        pushed = self._settings["leave_out"] is None
        if type(args).__module__.partition(".")[0] == "trl" or (pushed and writes_texts(model)):
            raise ValueError(
                f"a twin does not follow {type(model).__name__} with {type(args).__name__}: it "
                "perturbs one label an example, and texts and pairs (SFTTrainer, RewardTrainer "
                "...) have none; for DPOTrainer use poprisk.integrations.trl_twin, for a language "
                "model in a plain Trainer leave_out=0.2."
            )
        self._refuse(args)

    def _tell(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say which examples a training batch is of."""
        if self._lockstep is None or not model.training or not torch.is_grad_enabled():
            return
        index, targets = kwargs.get(INDEX), kwargs.get(self.labels)
        if index is None:
            raise ValueError(
                f"a training batch has no {INDEX!r}: give the data set a column of that name with "
                "the positions 0, 1, ... of its examples, and where the collator drops it set "
                "trainer.data_collator = with_index(trainer.data_collator)."
            )
        if targets is None:
            raise ValueError(
                f"the model is called without an input named {self.labels!r}: pass labels=, and "
                "leave out what keeps labels from the model (label_smoothing_factor, "
                "compute_loss_func), which a twin does not follow."
            )
        self._lockstep.batch(index.cpu(), targets)

    def _inputs_and_targets(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        targets = batch.pop(self.labels)
        return batch, targets


def without_index(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep the positions from the model, which does not know them."""
    return args, {k: v for k, v in kwargs.items() if k != INDEX}


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return logits_of(model(**batch))


def _clipping(max_norm: float | None) -> Any:
    """What the Trainer does to gradients."""
    if not max_norm or max_norm < 0:
        return None

    def clip(model: nn.Module, _: Any) -> None:
        clip_grad_norm_(model.parameters(), max_norm)

    return clip


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Without the hooks of other callbacks, which are no part of the model and not copied."""
    before = [m._forward_pre_hooks for m in model.modules()]
    after = [m._forward_hooks for m in model.modules()]
    kept = [dict(each) for each in (*before, *after)]
    for each in (*before, *after):
        for key, hook in list(each.items()):
            if isinstance(getattr(hook, "__self__", None), TrainerCallback):
                del each[key]
    try:
        yield
    finally:
        for i, (each, old) in enumerate(zip((*before, *after), kept, strict=True)):
            new = {key: hook for key, hook in each.items() if key not in old}
            each.clear()
            each.update({**new, **old} if i < len(before) else {**old, **new})


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "twin.pt"
