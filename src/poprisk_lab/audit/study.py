"""An audit as a study: one training, or K on parts of the data, whose predictions are judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk.audit import Auditor, AuditResult
from poprisk.audit.scores import NORMAL_MAD
from poprisk.evaluation import evaluating, outputs_of
from poprisk.task import Task
from poprisk.task.batches import split_batches
from poprisk_lab.audit.examples import AuditExamples, AuditInputError
from poprisk_lab.audit.nets import TrainingRecipe, build, recipe_for
from poprisk_lab.checkpoint import Workspace, load_checkpoint, save_checkpoint
from poprisk_lab.runner import OnRow, cores, run_trials
from poprisk_lab.store import FORMAT, Kind, Row, Store
from poprisk_lab.study import Settings, Trial
from poprisk_lab.tasks import load_task

FIT = "fit"
PLANT = 0.05
LARGE_IMAGE = 4096
"""Numbers of an image above which several threads are worth their waiting for each other."""


def _is_row(row: Row) -> bool:
    return row["event"] == "end" or isinstance(row["epoch"], int)


AUDIT = Kind(frozenset({"audit", "data", "recipe"}), _is_row)
"""The run directories of audits."""


@dataclass(frozen=True)
class AuditPlan:
    """What decides the numbers of an audit besides its data.

    Attributes:
        recipe: network and training.
        kind: ``classes`` or ``regression``.
        outputs: of the network.
        plant: share of labels planted wrong; 0 for none.
        seed: of weights, order and planted labels.
        structure: whether a noise matrix is estimated.
        task: the task whose network is used, as the command line takes it; empty for our own.
        settings: of the task's function.
        device: where to train.
        threads: of torch.
        directory: of the run.
    """

    recipe: TrainingRecipe
    kind: str
    outputs: int
    plant: float
    seed: int
    structure: bool
    task: str
    device: str
    threads: int
    directory: Path

    def config(self, examples: AuditExamples, source: str) -> dict[str, Any]:
        """What ``config.json`` holds: what decides the numbers."""
        decides = asdict(self)
        for name in ("recipe", "device", "threads", "directory"):
            del decides[name]
        return {
            "format": FORMAT,
            "audit": {"source": source, **decides},
            "data": fingerprint(examples),
            "recipe": self.recipe._asdict(),
        }


def fingerprint(examples: AuditExamples) -> dict[str, Any]:
    """Sizes and hashes of what is audited."""
    return {
        "examples": len(examples.targets),
        "labelled": int(examples.labelled.sum()),
        "shape": list(examples.inputs.shape[1:]),
        "classes": list(examples.classes),
        "inputs": _hash(examples.inputs),
        "targets": _hash(examples.targets),
    }


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def plan_for(
    examples: AuditExamples,
    directory: Path,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    plant: float = PLANT,
    seed: int = 0,
    structure: bool = True,
    task: Task | None = None,
    task_name: str = "",
    device: str = "cpu",
    threads: int | None = None,
) -> AuditPlan:
    """What is trained on the examples, by rule where it is not said.

    Only large images take more than one thread: those of small ones wait for each other. Of a task,
    which ``task_name`` makes again where it is trained, it is the network, for as long as it says.
    """
    n = int(examples.labelled.sum())
    recipe = recipe_for(n, tuple(examples.inputs.shape[1:]), epochs)
    if task is not None:
        recipe = TrainingRecipe(
            f"the network of {task_name}", 0, epochs or task.epochs, task.batch_size, recipe.lr
        )
    if lr is not None:
        recipe = recipe._replace(lr=lr)
    large = examples.inputs.ndim == 4 and examples.inputs[0].numel() > LARGE_IMAGE
    return AuditPlan(
        recipe,
        "classes" if examples.classes else "regression",
        len(examples.classes) or 1,
        plant,
        seed,
        structure,
        task_name,
        device,
        threads or (cores() if large else 1),
        directory,
    )


def run_audit(
    examples: AuditExamples, plan: AuditPlan, store: Store, on_row: OnRow
) -> tuple[AuditResult, list[Row]]:
    """Train, or go on with it, and judge the labels.

    Args:
        examples: what is audited.
        plan: how.
        store: of a directory that has been created for the plan.
        on_row: told of every epoch.

    Returns:
        What was found, and a row an epoch.

    Raises:
        TrainingError, RunDirectoryError: as :func:`poprisk_lab.runner.run_trials`.
    """
    data = plan.directory / "data.safetensors"
    if not data.exists():
        save_checkpoint(data, {"inputs": examples.inputs, "targets": examples.targets})
    trial = Trial(FIT, {}, keeps=True, label="the training")
    run_trials([trial], partial(fit, plan), store, workers=1, on_row=on_row)
    auditor = make_auditor(plan, examples.targets)
    product = store.product(FIT)
    if product is None:
        raise RuntimeError(f"{store.path} holds no product of its training.")
    auditor.load_state_dict(load_checkpoint(product)["auditor"])
    by_epoch = {row["epoch"]: row for row in store.rows([FIT])[FIT] if row["event"] == "epoch"}
    return auditor.result(), [by_epoch[epoch] for epoch in sorted(by_epoch)]


def make_auditor(plan: AuditPlan, targets: Tensor) -> Auditor:
    """The auditor of a plan, labels planted.

    Raises:
        AuditInputError: if there are too few labels to plant any.
    """
    try:
        return Auditor(
            targets,
            kind=plan.kind,
            plant=plan.plant,
            classes=plan.outputs if plan.kind == "classes" else None,
            structure=plan.structure,
            seed=plan.seed,
        )
    except ValueError as error:
        raise AuditInputError(str(error)) from error


def fit(plan: AuditPlan, settings: Settings, workspace: Workspace) -> Iterator[Row]:
    """Train the network of a plan and let an auditor look on; a row an epoch."""
    torch.set_num_threads(plan.threads)
    data = load_checkpoint(plan.directory / "data.safetensors")
    inputs, targets = data["inputs"].to(plan.device), data["targets"]
    auditor = make_auditor(plan, targets)
    model = _network(plan, inputs)
    scale = TargetScale.of(targets, plan.kind)
    trained = auditor.targets.to(plan.device)
    labelled = auditor.items.labelled
    known, rest = (mask.nonzero().squeeze(1) for mask in (labelled, ~labelled))
    recipe = plan.recipe
    optimizer = PopRiskAdamW(
        model, lr=recipe.lr, batch_size=recipe.batch_size, dataset_size=len(known)
    )
    first = 0
    if (state := workspace.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        auditor.load_state_dict(state["auditor"])
        first = state["epoch"]
    for epoch in range(first, recipe.epochs):
        model.train()
        generator = torch.Generator().manual_seed(1_000_003 * plan.seed + epoch)
        order = known[torch.randperm(len(known), generator=generator)]
        total = 0.0
        for index in batches(order, recipe.batch_size):
            outputs = model(inputs[index])
            loss = scale.loss(outputs, trained[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            auditor.update(index, scale.restored(outputs), auditor.targets[index])
            total += float(loss.detach()) * len(index)
        if len(rest):
            with evaluating(model):
                for index in rest.split(4096):
                    found = outputs_of(model, inputs[index])
                    auditor.update(index, scale.restored(found), auditor.targets[index])
        auditor.end_look()
        yield {"event": "epoch", "epoch": epoch + 1, "loss": total / len(known), **_told(auditor)}
        workspace.save(
            lambda done=epoch + 1: {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "auditor": auditor.state_dict(),
                "epoch": done,
            }
        )
    workspace.keep({"auditor": auditor.state_dict(), "model": model.state_dict()})
    planted = 0 if auditor.planted is None else int(auditor.planted.changed.sum())
    yield {"event": "end", "planted": planted, "skipped_steps": optimizer.skipped_steps}


def batches(order: Tensor, size: int) -> Sequence[Tensor]:
    """An order in batches; a last one of less than half a batch joins the one before it."""
    return split_batches(order, size, least=-(-size // 2))


def _told(auditor: Auditor) -> Row:
    look = auditor.looks[-1]
    memorization = None if look.memorization is None else look.memorization.value
    return {
        "agreement": None if auditor.items.classes is None else look.agreement,
        "memorization": memorization,
    }


def _network(plan: AuditPlan, inputs: Tensor) -> nn.Module:
    if plan.task:
        torch.manual_seed(plan.seed)
        return load_task(plan.task, seed=plan.seed).new_model(plan.device)
    return build(plan.recipe, inputs, plan.outputs, plan.seed).to(plan.device)


@dataclass(frozen=True)
class TargetScale:
    """What the network predicts: logits, or numbers of mean 0 and size 1."""

    kind: str
    mean: float = 0.0
    size: float = 1.0

    @classmethod
    def of(cls, targets: Tensor, kind: str) -> TargetScale:
        """From the median and its absolute deviation, which wrong numbers hardly move."""
        if kind == "classes":
            return cls(kind)
        known = targets[~targets.isnan()]
        middle = float(known.median())
        spread = NORMAL_MAD * float((known - middle).abs().median())
        return cls(kind, middle, spread or float(known.std()) or 1.0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example."""
        if self.kind == "classes":
            return F.cross_entropy(outputs, targets, reduction="none")
        wanted = ((targets - self.mean) / self.size).to(outputs.dtype)
        return F.smooth_l1_loss(outputs.squeeze(1), wanted, reduction="none")

    def restored(self, outputs: Tensor) -> Tensor:
        """Predictions in the units of the targets."""
        if self.kind == "classes":
            return outputs
        return outputs.squeeze(1) * self.size + self.mean
