"""One run of TRL's ``DPOTrainer`` on pairs of which some are flipped."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk import Auditor
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.plots import short
from poprisk_lab.results import Metrics
from poprisk_lab.studies.dpo import losses
from poprisk_lab.studies.dpo.measures import BETA, Drawn, Model, measured
from poprisk_lab.studies.optimizers import make_optimizer
from poprisk_lab.tasks.preferences import tokenizer_of

BATCH, EPOCHS, CLIP = 16, 4, 1.0
IPO_BETA = 1.0
"""IPO's own: its differences are means over tokens."""
LOOKS = 5
"""Times that a run is looked at, the last time at its end."""
LISTS = {"accuracy": "accuracies", "drift": "drifts", "chosen": "chosens"}
"""What is found at every look, and under which name as a list."""


class Way(NamedTuple):
    """One way of training.

    Attributes:
        arm: of :data:`poprisk_lab.studies.optimizers.ARMS`.
        lr: learning rate.
        loss: ``dpo``, ``robust``, ``ipo``, ``hinge``, ``dr-dpo`` or ``re-po``.
        rate: share of flipped pairs that ``robust`` is told.
        adapters: whether LoRA's are trained in place of the weights.
    """

    arm: str
    lr: float
    loss: str = "dpo"
    rate: float = 0.0
    adapters: bool = False


class PolicyRun(NamedTuple):
    """A finished run.

    Attributes:
        policy: trained.
        metrics: found along it.
        estimate: share of flipped pairs that its loss estimates; None if it estimates none.
    """

    policy: Any
    metrics: Metrics
    estimate: float | None


def train(
    model: Model,
    drawn: Drawn,
    way: Way,
    wrong: Tensor,
    *,
    seed: int,
    keep: Tensor | None = None,
    auditor: Auditor | None = None,
    trace: UpdateTrace | None = None,
    matched: bool = False,
    look: bool = True,
) -> PolicyRun:
    """Train by TRL, and look at held-out pairs on the way.

    Args:
        model: the reference.
        drawn: the pairs.
        way: of training.
        wrong: which training pairs are flipped, (n,).
        seed: of the order of pairs.
        keep: positions of the training pairs to train on; all if left out.
        auditor: looks on; its planted pairs are swapped once more.
        trace: takes the sizes of updates, or gives them where ``matched``.
        matched: whether ``trace`` gives them.
        look: whether to measure on held-out pairs.
    """
    policy = model.fresh()
    kept = torch.arange(drawn.training) if keep is None else keep
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(policy, model, drawn, way, wrong, kept, folder, seed, auditor)
        policy = trainer.model
        trainer.optimizer = _optimizer(policy, way, len(kept), seed, trace if matched else None)
        steps = EPOCHS * -(-len(kept) // BATCH)
        watch = _watch(drawn, [round(steps * k / LOOKS) for k in range(1, LOOKS + 1)], policy)
        if look:
            trainer.add_callback(watch)
        handles = trace.follow(trainer.optimizer) if trace is not None and not matched else []
        trainer.train()
        for handle in handles:
            handle.remove()
    loss = trainer.pair_loss
    estimate = 1 - loss.reliability if isinstance(loss, losses.RePo) else None
    return PolicyRun(policy.eval(), watch.found, estimate)


def _trainer(
    policy: Any,
    model: Model,
    drawn: Drawn,
    way: Way,
    wrong: Tensor,
    kept: Tensor,
    folder: str,
    seed: int,
    auditor: Auditor | None,
) -> Any:
    import datasets
    from transformers import PrinterCallback
    from trl import DPOConfig

    from poprisk.integrations.transformers_audit import audited_dataset
    from poprisk.integrations.trl import watch_preferences

    own = {"dr-dpo": losses.dr_dpo, "re-po": losses.RePo()}.get(way.loss)
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=way.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        beta=IPO_BETA if way.loss == "ipo" else BETA,
        loss_type=[way.loss if way.loss in ("robust", "ipo", "hinge") else "sigmoid"],
        label_smoothing=way.rate,
        precompute_ref_log_probs=True,
        max_length=drawn.ids.shape[2] + 8,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list(rows_of(drawn, wrong, kept))
    if auditor is not None:
        data = audited_dataset(data, auditor)
    trainer = losses.trainer_class()(
        policy,
        None,
        args,
        train_dataset=data,
        processing_class=tokenizer_of(model.tokenizer),
        peft_config=_adapters() if way.adapters else None,
    )
    if len(trainer.train_dataset) != len(kept):
        raise RuntimeError(f"TRL dropped {len(kept) - len(trainer.train_dataset)} pairs.")
    trainer.remove_callback(PrinterCallback)  # it prints the end of each run
    trainer.pair_loss = own
    if auditor is not None:
        watch_preferences(trainer, auditor, every=10**9, fall=1e9, drift=1e9)
    return trainer


def rows_of(drawn: Drawn, wrong: Tensor, kept: Tensor) -> list[dict[str, str]]:
    """TRL's rows of some training pairs, the worse answer chosen where a pair is flipped."""
    sides = drawn.better, drawn.worse
    return [
        {
            "prompt": drawn.prompts[i],
            "chosen": sides[bool(wrong[i])][i],
            "rejected": sides[not wrong[i]][i],
        }
        for i in kept.tolist()
    ]


def _adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _optimizer(policy: Any, way: Way, pairs: int, seed: int, trace: UpdateTrace | None) -> Any:
    torch.manual_seed(seed)  # of what a shuffled mask draws
    return make_optimizer(
        "matched" if trace is not None else way.arm,
        torch.nn.ParameterList([p for p in policy.parameters() if p.requires_grad]),
        {"lr": way.lr, "weight_decay": 0.0},
        batch_size=BATCH,
        dataset_size=pairs,
        trace=trace,
    )


def _watch(drawn: Drawn, steps: Sequence[int], policy: Any) -> Any:
    """A callback that measures at these steps; what it finds stands in ``found``."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.found: Metrics = {"at": [], "accuracies": [], "drifts": [], "chosens": []}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in steps:
                policy.eval()
                now = measured(policy, drawn)
                policy.train()
                self.found["at"].append(state.global_step)
                for key, value in now.items():
                    self.found[LISTS[key]].append(short(value))

    return Watch()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of datasets and of TRL, and what they warn of on a CPU."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
        if bars:
            datasets.enable_progress_bars()
