"""What an audit trains, by rule where it is not said, and the directory of its record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from poprisk.task import Task
from poprisk_lab.audit.examples import AuditExamples, AuditInputError
from poprisk_lab.audit.nets import TrainingRecipe, recipe_for
from poprisk_lab.runner import cores
from poprisk_lab.store import FORMAT, Config, Kind, Row, Store
from poprisk_lab.study import Trial

FIT = "fit"
PLANT = 0.05
LARGE_IMAGE = 4096
"""Numbers of an image above which several threads are worth their waiting for each other."""


def _is_row(row: Row) -> bool:
    return row["event"] == "end" or isinstance(row["epoch"], int)


def _differences(found: Config, wanted: Config) -> list[str]:
    """What decides the numbers and differs; how files are called and read does not."""
    names = list[str]()
    if found["data"] != wanted["data"]:
        names.append("the data")
    for section in ("recipe", "audit"):
        ours, theirs = wanted[section], found[section]
        keys = [*ours, *(key for key in theirs if key not in ours)]
        names += [k for k in keys if k != "source" and ours.get(k) != theirs.get(k)]
    return names


def _read_as_now(found: Config, wanted: Config) -> Config:
    audit = {**found["audit"], "source": wanted["audit"]["source"]}
    return {**found, "audit": audit, "read": wanted.get("read")}


AUDIT = Kind(
    frozenset({"audit", "data", "recipe"}),
    _is_row,
    _differences,
    extend=_read_as_now,
    anew="choose another directory (--out) or start over (--fresh)",
    results=frozenset({"report.html", "suspects.csv", "labels.csv", "evidence.json"}),
)
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
        folds: trainings on parts of the data, of whose rest the predictions are; 0: one training
            on all of them.
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
    folds: int = 0

    def __str__(self) -> str:
        if not self.folds:
            return str(self.recipe)
        part = f"{self.folds - 1}/{self.folds} of the labels"
        return f"{self.recipe}; {self.folds} times, on {part} each"

    @property
    def trials(self) -> list[Trial]:
        """The trainings."""
        if not self.folds:
            return [Trial(FIT, {}, keeps=True, label="the training")]
        return [
            Trial(f"fold-{k + 1}", {"fold": k}, keeps=True, label=f"the training of fold {k + 1}")
            for k in range(self.folds)
        ]

    def config(
        self, examples: AuditExamples, source: str, read: Mapping[str, Any] | None = None
    ) -> Config:
        """What ``config.json`` holds: what decides the numbers.

        Args:
            examples: what is audited.
            source: as it was called.
            read: how to read it again, which decides nothing.
        """
        decides = asdict(self)
        # Without folds as versions before wrote it, so that their directories go on.
        for name in ("recipe", "device", "threads", "directory", *(["folds"] * (not self.folds))):
            del decides[name]
        return {
            "format": FORMAT,
            "audit": {"source": source, **decides},
            "data": fingerprint(examples),
            "recipe": self.recipe._asdict(),
            "read": None if read is None else dict(read),
        }


def plan_of(store: Store) -> AuditPlan:
    """The plan of a directory, as far as it decides the numbers.

    Raises:
        RunDirectoryError: if it holds none.
    """
    config = store.config()
    decides = {name: value for name, value in config["audit"].items() if name != "source"}
    recipe = TrainingRecipe(**config["recipe"])
    return AuditPlan(recipe, **decides, device="cpu", threads=1, directory=store.path)


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
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()[:16]


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
    folds: int = 0,
) -> AuditPlan:
    """What is trained on the examples, by rule where it is not said.

    Only large images take more than one thread: those of small ones wait for each other. Of a task,
    which ``task_name`` makes again where it is trained, it is the network, for as long as it says.

    Raises:
        AuditInputError: if there are too few labels to plant any, or numbers that are classes.
    """
    n = int(examples.labelled.sum())
    if plant and not round(plant * n):
        raise AuditInputError(
            f"--plant {plant:g} of {n} labels makes none; give more, or 0 to plant none."
        )
    if plant and not examples.classes and len(examples.targets[examples.labelled].unique()) < 3:
        raise AuditInputError(
            "the labels hold fewer than three different numbers, which stand for classes and to "
            "which no noise can be added: audit them as classes, or plant none by --plant 0."
        )
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
        folds,
    )
