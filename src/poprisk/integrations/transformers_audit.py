"""Find wrong labels or preferences in ``transformers.Trainer``, and TRL's ``RewardTrainer``.

For ``DPOTrainer`` see :func:`poprisk.integrations.trl.watch_preferences`.

Example::

    auditor = Auditor(torch.tensor(data["labels"]))
    args = TrainingArguments(remove_unused_columns=False, ...)
    trainer = Trainer(
        model, args, train_dataset=audited_dataset(data, auditor),
        callbacks=[TrainerAuditCallback(auditor)],
    )
    trainer.train()
    auditor.result().to_csv("labels.csv")

A collator that drops what it does not know, as those of TRL, is wrapped::

    trainer.data_collator = with_index(trainer.data_collator)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poprisk._validate import check_type
from poprisk.audit import Auditor
from poprisk.dtensor import processes
from poprisk.integrations.transformers import check_trains

INDEX = "index"
"""Name of the column, and of the model's input, that says which example is which."""

SWAPPED = "swapped"
"""Name of the column that says whether the sides of a pair were swapped in planting."""


def audited_dataset(
    dataset: Any,
    auditor: Auditor,
    *,
    labels: str = "labels",
    sides: tuple[str, str] = ("chosen", "rejected"),
) -> Any:
    """A ``datasets.Dataset`` with the labels to train on and the position of each example.

    Of pairs also with the column :data:`SWAPPED`, which tells whose planting it is.

    Args:
        dataset: the examples, in the order of the auditor's targets.
        auditor: of them.
        labels: column of the labels.
        sides: columns of the two sides of a pair, the better one first where its target is 1;
            they are swapped where it is 0.

    Raises:
        ValueError: if the data set has another length.
    """
    if len(dataset) != len(auditor.targets):
        raise ValueError(
            f"dataset has {len(dataset)} examples, but the auditor {len(auditor.targets)} targets."
        )
    if auditor.items.kind == "preferences":
        swapped, (first, second) = auditor.targets == 0, sides

        def swap(row: Mapping[str, Any], i: int) -> dict[str, Any]:
            a, b = (second, first) if swapped[i] else (first, second)
            return {first: row[a], second: row[b]}

        dataset = dataset.map(swap, with_indices=True).add_column(SWAPPED, swapped.tolist())
    else:
        rows = auditor.targets.tolist()
        if auditor.items.kind == "tokens":  # rows keep the lengths that they had
            lengths = map(len, dataset[labels])
            rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        dataset = dataset.remove_columns(labels).add_column(labels, rows)
    return dataset.add_column(INDEX, list(range(len(dataset))))


def check_swapped(dataset: Any, auditor: Auditor) -> None:
    """Raise ValueError if a data set of pairs was not planted by this auditor."""
    if not {INDEX, SWAPPED} <= set(getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            f"the trainer's data set has no columns {INDEX!r} and {SWAPPED!r}: make it by "
            "audited_dataset(pairs, auditor) before the trainer."
        )
    index = torch.tensor(dataset[INDEX][:])
    if int(index.max()) >= len(auditor.targets):
        raise ValueError(
            f"the trainer's data set has a pair at position {int(index.max())}, but the auditor "
            f"{len(auditor.targets)} targets."
        )
    other = torch.tensor(dataset[SWAPPED][:]) != (auditor.targets[index] == 0)
    if bool(other.any()):
        raise ValueError(
            f"{int(other.sum())} pairs of the trainer's data set are swapped in planting by "
            "another auditor, or not by this one: use the auditor that audited_dataset() had."
        )


def with_index(
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """A collator that keeps the positions of the examples beside what it makes of the rest."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ours = (INDEX, SWAPPED)
        rest = [{k: v for k, v in example.items() if k not in ours} for example in examples]
        if not all(INDEX in example for example in examples):  # an evaluation set
            return collator(rest)
        return {**collator(rest), INDEX: torch.tensor([int(e[INDEX]) for e in examples])}

    return collate


@final
class TrainerAuditCallback(TrainerCallback):
    """Tells a :class:`poprisk.Auditor` what a Trainer's model puts out on its training batches.

    Its state is saved with the Trainer's checkpoints, one file a process, and found again when
    training is resumed.

    Args:
        auditor: of the training set, which comes from :func:`audited_dataset`.
        labels: under which name the model's inputs hold the labels.
    """

    def __init__(self, auditor: Auditor, *, labels: str = "labels") -> None:
        check_type("auditor", auditor, Auditor, "a poprisk.Auditor")
        self.auditor, self.labels = auditor, labels
        self._index: Tensor | None = None
        self._targets: Tensor | None = None
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the model; take up what was found before a checkpoint.

        Raises:
            ValueError: if something keeps the audit from what is trained.
        """
        check_keeps_positions(args)
        model: nn.Module = kwargs["model"]
        kind = self.auditor.items.kind
        if kind == "preferences" and writes_texts(model):
            raise ValueError(
                f"{type(model).__name__} writes texts, as models of DPOTrainer do, but an auditor "
                "of preferences takes one reward for each side, as those of RewardTrainer give; "
                "for DPOTrainer use poprisk.integrations.trl.watch_preferences()."
            )
        if kind != "tokens" and writes_texts(model):
            raise ValueError(
                f"{type(model).__name__} writes texts, and an auditor of {kind} takes one output "
                "for each example: labels of whole answers, as KTOTrainer's, are not audited. Give "
                "DPOTrainer pairs, or train a classifier of answers."
            )
        check_trains(model, kwargs.get("optimizer"))
        if self.auditor.items.kind == "preferences":
            check_swapped(kwargs["train_dataloader"].dataset, self.auditor)
        if state.global_step:
            resume_audit(self.auditor, args, state)
        self._hooks = [
            model.register_forward_pre_hook(self._take_index, with_kwargs=True),
            model.register_forward_hook(self._note, with_kwargs=True),
        ]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch is a look."""
        self.auditor.end_look()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was found so far beside the checkpoint."""
        save_audit(self.auditor, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _take_index(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep the positions from the model, which does not know them."""
        self._index = kwargs.get(INDEX)
        self._targets = kwargs.get(self.labels)
        if self._index is None and model.training:
            raise ValueError(
                f"a training batch has no {INDEX!r}: make the data set by audited_dataset(), and "
                "where the collator drops it set trainer.data_collator = with_index("
                "trainer.data_collator)."
            )
        return args, {k: v for k, v in kwargs.items() if k != INDEX}

    def _note(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        if not model.training or self._index is None:
            return
        index = self._index.cpu()
        if self.auditor.items.kind == "preferences":
            targets = self.auditor.targets[index]
            self.auditor.update(index, of_first(outputs.logits, targets), targets)
        elif self._targets is None:
            raise ValueError(f"the model is called without an input named {self.labels!r}.")
        else:
            self.auditor.update(index, outputs.logits, self._targets)


def save_audit(auditor: Auditor, args: TrainingArguments, state: TrainerState) -> None:
    """Save what was found so far beside the Trainer's checkpoint, one file a process."""
    file = _file(args, state)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(auditor.state_dict(), file)


def resume_audit(auditor: Auditor, args: TrainingArguments, state: TrainerState) -> None:
    """Take up what was found before the checkpoint; warn if it holds none."""
    file = _file(args, state)
    if file.exists():
        auditor.load_state_dict(torch.load(file, weights_only=True))
    else:
        warnings.warn(
            f"the audit begins anew: there is no {file} of the run that is resumed. Pairs were "
            "trained on before, so that no flip_rate of this run is to be believed.",
            RuntimeWarning,
            stacklevel=4,
        )


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    rank = torch.distributed.get_rank() if processes() > 1 else 0
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / f"auditor-{rank}.pt"


def writes_texts(model: nn.Module) -> bool:
    """Whether a model gives probabilities of words."""
    find = getattr(model, "get_output_embeddings", None)
    return find is not None and find() is not None


def of_first(rewards: Tensor, targets: Tensor) -> Tensor:
    """Reward of the first side minus the second's; the batch holds chosen ones, then rejected."""
    if rewards.numel() != 2 * len(targets):
        raise ValueError(
            f"logits {tuple(rewards.shape)} are not one reward for each side of {len(targets)} "
            "pairs, as RewardTrainer's are."
        )
    chosen, rejected = rewards.detach().float().flatten().cpu().chunk(2)
    return torch.where(targets == 1, chosen - rejected, rejected - chosen)


def check_keeps_positions(args: TrainingArguments) -> None:
    """Raise ValueError for a Trainer that drops the column of positions."""
    if args.remove_unused_columns:
        raise ValueError(
            "the Trainer drops the column of positions; set remove_unused_columns=False in its "
            "arguments, and remove the columns that the model does not take."
        )
