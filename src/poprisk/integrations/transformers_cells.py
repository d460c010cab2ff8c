"""How much label noise gets through in a run of ``transformers.Trainer``, while it trains.

Example::

    data = data.add_column("index", range(len(data)))
    args = TrainingArguments(remove_unused_columns=False, max_grad_norm=0.0, ...)
    callback = TrainerCellCallback(
        "cross_entropy", train=(input_ids, labels), clean_targets=clean, query=test_ids
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    callback.trace().without_noise()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk.integrations.cells import CellFollower, Labelled, check_plain
from poprisk.integrations.transformers import check_trains
from poprisk.integrations.transformers_audit import INDEX, check_keeps_positions
from poprisk.integrations.transformers_twin import unwatched, without_index
from poprisk.monitor.steps import innermost
from poprisk.protocols import PerExampleLoss
from poprisk.risk.lockstep import logits_of

Forward = Callable[[nn.Module, Tensor], Any]


@final
class TrainerCellCallback(CellFollower, TrainerCallback):
    """Signal and label noise in the outputs of a Trainer's model, in lockstep with its training.

    The Trainer trains as it would alone (see :class:`poprisk.CellTracer`). For heads with one label
    an example, on one process, in single or double precision, without dropout and clipping.
    Gradients may be accumulated where the Trainer averages them, which it leaves to some models
    that do not. What cannot be followed is refused.

    Args:
        loss: one value an example, from logits (b, ...) and labels, or the name of one: what the
            Trainer's loss is the mean of.
        train: inputs, one tensor, and labels of the training set, in the order of ``index``.
        clean_targets: training labels without the noise.
        query: inputs, or inputs and labels, of the points to predict.
        forward: from the model and such inputs to what it returns; by default
            ``model(input_ids=x)``.
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
        forward: Forward | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(loss, train, clean_targets, query, **settings)
        self.forward: Forward = forward or _of_tokens
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the tracer.

        Raises:
            ValueError: if it cannot follow this training.
        """
        model: nn.Module = kwargs["model"]
        optimizer: Any = innermost(kwargs["optimizer"])
        check_keeps_positions(args)
        check_plain(
            {
                "fp16": args.fp16,
                "bf16": args.bf16,
                "torch_compile": args.torch_compile,
                "fsdp": bool(args.fsdp),
                "deepspeed": bool(args.deepspeed),
                "several GPUs in one process": args.n_gpu > 1,
                f"max_grad_norm={args.max_grad_norm}": bool(args.max_grad_norm),
            }
        )
        check_trains(model, optimizer)
        with unwatched(model):
            self._begin(_Logits(model, self.forward), optimizer, args.device)
        self._hooks = [
            model.register_forward_pre_hook(without_index, with_kwargs=True),
            model.register_forward_pre_hook(self._tell, with_kwargs=True, prepend=True),
        ]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow the step."""
        self._stepped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the cells to the end."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._finish()

    def _tell(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which examples a training batch is of."""
        if not model.training or not torch.is_grad_enabled():
            return
        index = kwargs.get(INDEX)
        if index is None:
            raise ValueError(
                f"a training batch has no {INDEX!r}: give the data set a column of that name with "
                "the positions 0, 1, ... of its examples, and where the collator drops it set "
                "trainer.data_collator = with_index(trainer.data_collator)."
            )
        self._told.append(index.cpu())


class _Logits(nn.Module):
    """The logits of a model as a function of one tensor."""

    def __init__(self, model: nn.Module, call: Forward) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.call(self.model, x))


def _of_tokens(model: nn.Module, x: Tensor) -> Any:
    return model(input_ids=x)
