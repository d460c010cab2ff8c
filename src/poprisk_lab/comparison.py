"""Arms × seeds of a task as a study: what is compared, what the record says of it, its trials."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poprisk.randomness import RandomState
from poprisk.task import Task, module_kinds
from poprisk.task.batches import last_batch
from poprisk.task.data import DatasetInputs
from poprisk_lab.arms import Arm, settings_used
from poprisk_lab.checkpoint import Workspace, load_checkpoint
from poprisk_lab.fit import ArmRun, seed_all
from poprisk_lab.pool import Pool
from poprisk_lab.results import RunData, read_run
from poprisk_lab.runner import check_device, environment, run_trials
from poprisk_lab.store import FORMAT, Config, Kind, Row, Store
from poprisk_lab.study import Settings, Trial
from poprisk_lab.tasks import Source, TaskError, load_task, source_name
from poprisk_lab.tasks.sources import task_sources

FEWEST = 5
"""Training examples of which a fifth can be held out."""
TOL = 1e-3
"""Relative difference of initial losses that rounding on another processor may make."""
NEW = {("optimizers",), *(("task", key) for key in ("model", "modules", "sources", "start"))}
"""Entries that records of earlier versions lack."""
HASHED = {
    "task.data": "the data or the task's file",
    "task.model": "the layers or shapes of the model",
}
"""Hashes, and what a difference in them means."""


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Args:
        task: name of a built-in task, ``path/to/file.py:function``, a function, or a task.
        arms: unique names; an arm comes after the one it follows.
        seeds: of the task's data, the initial weights and the order of examples.
        settings: arguments of the task's function.
        epochs: in place of the task's own.
        full: whether these are all arms.
        device: where to train.
        workers: processes, each with one thread; 0: this process.
        twin: whether to estimate the risk of every arm that can have a twin.
    """

    task: Source
    arms: list[Arm]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    full: bool = False
    device: str = "cpu"
    workers: int = 1
    twin: bool = False

    def __post_init__(self) -> None:
        before: set[str] = set()
        for arm in self.arms:
            if arm.follows is not None and arm.follows not in before:
                raise ValueError(f"arm {arm.name} must come after {arm.follows}, which it follows.")
            before.add(arm.name)

    @property
    def source(self) -> str:
        """How messages and the record call the task."""
        return source_name(self.task)

    def is_followed(self, arm: Arm) -> bool:
        """Whether another arm repeats the update sizes of this one."""
        return any(other.follows == arm.name for other in self.arms)

    def make_task(self, seed: int) -> Task:
        """The task with the data of one seed."""
        if "seed" in self.settings:
            raise TaskError("seed is no setting of a task; --seeds says how many are run.")
        task = load_task(self.task, seed=seed, **self.settings)
        if self.epochs is not None:
            object.__setattr__(task, "epochs", self.epochs)
        return task

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says; two runs that differ in the seeds alone are one run.

        On the way, every arm takes a step or two of the first seed.

        Raises:
            TaskError: if the task or one of its arms fails, or differs from call to call.
            ValueError: if the device cannot be used.
        """
        check_device(self.device)
        seed = self.seeds[0]
        task, again = self.make_task(seed), self.make_task(seed)
        data, start = fingerprint(self.task, task), self._start(task, seed)
        if data != fingerprint(self.task, again):
            raise TaskError(
                f"task {self.source} gives other data each time it is made with the same seed; "
                "draw all of it from torch.Generator().manual_seed(seed), and what differs from "
                "reading to reading from the global generators."
            )
        if not alike(start, other := self._start(again, seed)):
            raise TaskError(
                f"the model of task {self.source} starts from other weights each time it is made "
                f"with the same seed (loss {start['train_loss']:.4g}, then "
                f"{other['train_loss']:.4g}); draw them from torch's, numpy's or Python's global "
                "generator."
            )
        model = task.new_model()
        return {
            "format": FORMAT,
            "poprisk": metadata.version("poprisk"),
            "task": {
                **describe_task(self.source, task),
                "settings": self.settings,
                "epochs": task.epochs,
                "batch_size": task.batch_size,
                **({"last_batch": rule} if (rule := self._last_batch(task)) else {}),
                "parameters": sum(p.numel() for p in model.parameters()),
                "data": data,
                "modules": module_kinds(model),
                "model": structure_of(model),
                "sources": _sources(self.task),
                "start": start,
                "noise_known": task.noise_known,
            },
            "arms": [arm.as_json() for arm in self.arms],
            "optimizers": self._try_arms(task, seed),
            "seeds": self.seeds,
            "full": self.full,
            "device": self.device,
            **({"twin": True} if self.twin else {}),
        }

    def try_seed(self, seed: int) -> None:
        """Make the task of a seed, and measure it once with the fifth that it holds out.

        Raises:
            TaskError: if that fails.
        """
        task = self.make_task(seed)
        arm = next((arm for arm in self.arms if arm.held_out), self.arms[0])
        with self._trial(arm, seed):
            ArmRun(task, arm, seed, trace=[], device=self.device).evaluate()

    def _start(self, task: Task, seed: int) -> dict[str, float]:
        """Losses before training; they tell models and losses apart that a text does not."""
        with self._trial(self.arms[0], seed):
            row = ArmRun(task, self.arms[0], seed, trace=[], device=self.device).evaluate()
        return {key: row[key] for key in ("train_loss", "test_loss")}

    def _try_arms(self, task: Task, seed: int) -> dict[str, dict[str, Any]]:
        """Let every arm take a step, and measure one of each kind; return settings by arm."""
        n = len(task.train[1])
        if n < FEWEST and any(arm.held_out for arm in self.arms):
            raise TaskError(
                f"task {self.source} has {n} training examples; early stopping holds out a fifth "
                f"of them, so there must be at least {FEWEST}."
            )
        found: dict[str, dict[str, Any]] = {}
        measured = {(False, False)}
        for arm in self.arms:
            twin = self.twin and arm.can_have_twin
            kind = (arm.held_out, twin)
            with self._trial(arm, seed):
                run = ArmRun(
                    task,
                    arm,
                    seed,
                    trace=[],
                    record=self.is_followed(arm),
                    device=self.device,
                    with_twin=twin,
                )
                found[arm.name] = settings_used(run.optimizer)
                run.try_out()
                if kind not in measured:
                    run.evaluate()
            measured.add(kind)
        return found

    @contextmanager
    def _trial(self, arm: Arm, seed: int) -> Iterator[None]:
        """Name the arm whose trial fails inside; the random numbers stay as they are."""
        with RandomState.kept():
            try:
                yield
            except Exception as error:
                what = f"task {self.source} cannot be trained by {arm.label} (seed {seed})"
                raise TaskError.of(what, error) from error

    def _last_batch(self, task: Task) -> str:
        n = len(task.train[1])
        kept = {n - n // 5 if arm.held_out else n for arm in self.arms}
        rules = (last_batch(k, task.batch_size, drop_last=task.drop_last) for k in kept)
        return next(filter(None, rules), "")


def describe_task(source: str, task: Task) -> dict[str, Any]:
    """A task as pages and records name it."""
    metric = task.scored_by
    return {
        "name": task.name,
        "source": source,
        "description": task.description,
        "metric": {
            "name": metric.name,
            "higher_is_better": metric.higher_is_better,
            "percent": metric.percent,
        },
        "classification": task.classification,
        "train_examples": len(task.train[1]),
        "test_examples": len(task.test[1]),
    }


def alike(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether losses before training are those of one model, on whatever processor."""
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=TOL) for k in a)


def fingerprint(source: Source, task: Task) -> str:
    """Tells tasks of one name apart: a hash of the data and of the task's file or function."""
    digest = hashlib.sha256()
    clean = () if task.clean is None else (task.clean,)
    for values in map(_sample, (*task.train, *task.test, *clean)):
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(_text(source))
    return digest.hexdigest()[:16]


def _sample(values: Tensor | DatasetInputs) -> Tensor:
    """All of a tensor; of a data set that is read, which may be large, some rows."""
    if isinstance(values, Tensor):
        return values
    seed_all(0)
    n = len(values)
    return values[torch.linspace(0, n - 1, min(n, values.batch_size)).long()]


def _text(source: Any) -> bytes:
    """A task's file, or the text of its function as far as there is one."""
    if isinstance(source, str):
        path, colon, _ = source.rpartition(":")
        return Path(path).read_bytes() if colon else b""
    try:
        return inspect.getsource(source).encode()
    except (OSError, TypeError):  # typed at a prompt, or no function: data and model tell it apart
        return b""


def structure_of(model: torch.nn.Module) -> str:
    """A hash of what a model is made of: its text, and the shapes of its state."""
    text = [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))]
    state = [*model.named_parameters(), *model.named_buffers()]
    text += [f"{name} {t.dtype} {tuple(t.shape)} {t.requires_grad}" for name, t in state]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _sources(source: Source) -> dict[str, str]:
    path, colon, _ = source.rpartition(":") if isinstance(source, str) else ("", "", "")
    return task_sources(Path(path)) if colon else {}


def differences(found: Config, wanted: Config) -> list[str]:
    """What in two configurations makes them different runs: where, and both values.

    Seeds do not; nor do initial losses within rounding, what a record of an earlier version does
    not say, and settings that torch's or other libraries' optimizers have in one version only.
    """
    return [*_differences(_by_name(found), _by_name(wanted), ())]


def with_more_seeds(found: Config, wanted: Config) -> Config:
    """The first configuration with the seeds of the second added."""
    more = [seed for seed in wanted["seeds"] if seed not in found["seeds"]]
    return {**found, "seeds": [*found["seeds"], *more]}


def _by_name(config: Config) -> Config:
    """A configuration whose arms have names for places, and which has no seeds."""
    arms = config["arms"] if isinstance(config["arms"], list) else []
    return {
        **{key: value for key, value in config.items() if key != "seeds"},
        "arms": {arm["name"]: arm for arm in arms},
    }


def _differences(found: Any, wanted: Any, at: tuple[str, ...]) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            here = (*at, key)
            if key in found and key in wanted:
                yield from _differences(found[key], wanted[key], here)
            elif not _may_lack(here, found, wanted):
                yield _said(here, found.get(key), wanted.get(key))
    elif not _equal(found, wanted, at):
        yield _said(at, found, wanted)


def _may_lack(at: tuple[str, ...], found: Config, wanted: Config) -> bool:
    """Whether one of two configurations may do without what stands at a place."""
    if at in NEW and at[-1] not in found:
        return True
    if at[0] != "optimizers" or len(at) < 3:
        return False
    return not {"PopRiskAdamW"} & {str(c.get("class")).rpartition(".")[2] for c in (found, wanted)}


def _equal(found: Any, wanted: Any, at: tuple[str, ...]) -> bool:
    if at[:2] == ("task", "start"):
        return math.isclose(found, wanted, rel_tol=TOL)
    return json.dumps(found) == json.dumps(wanted)


def _said(at: tuple[str, ...], found: Any, wanted: Any) -> str:
    """A difference in a few words; hashes and what is long go unquoted."""
    place = ".".join(at)
    if at[:2] == ("task", "sources") and len(at) == 3:
        return f"the source of module {at[2]}"
    if place in HASHED:
        return f"{place}: {HASHED[place]}"
    values = [f"{v:.6g}" if isinstance(v, float) else json.dumps(v) for v in (found, wanted)]
    return place if max(map(len, values)) > 40 else f"{place}: {values[0]} there, {values[1]} now"


def _is_row(row: Row) -> bool:
    known = row["event"] in ("start", "epoch", "end") and isinstance(row["arm"], str)
    return known and {type(row["seed"]), type(row["epoch"])} == {int}


COMPARISON = Kind(
    frozenset({"task", "arms", "seeds"}),
    _is_row,
    differences,
    with_more_seeds,
    "choose another directory (--out) or start over (--fresh)",
    results=frozenset({"report.html", "evidence.json"}),
)
"""The run directories of comparisons."""


def run_directory(path: Path) -> Store:
    """The run directory of a comparison."""
    return Store(path, COMPARISON)


def as_begun(comparison: Comparison, directory: Store, *, fresh: bool = False) -> Comparison:
    """A comparison of the default arms, without those that its directory was begun without.

    An earlier version had fewer of them, and its run goes on as it was begun.

    Raises:
        RunDirectoryError: if the directory is damaged, or holds something else.
    """
    if fresh or not directory.exists():
        return comparison
    begun = [arm["name"] for arm in directory.config()["arms"]]
    arms = [arm for arm in comparison.arms if arm.name in begun]
    return replace(comparison, arms=arms) if len(arms) == len(begun) else comparison


def begin(comparison: Comparison, directory: Store, *, fresh: bool = False) -> RunData:
    """Try the task with every arm and seed, make the run directory or take it up, and read it.

    Args:
        comparison: what to train.
        directory: where; nothing is changed in it before all has been tried.
        fresh: whether to delete what it holds.

    Raises:
        TaskError: if the task or one of its arms fails.
        ValueError: if the device cannot be used.
        RunDirectoryError: if the directory cannot be used.
    """
    config = comparison.config()
    data = read_run(directory) if directory.exists() and not fresh else None
    for seed in comparison.seeds[1:]:
        if data is None or not all((arm.name, seed) in data.ends for arm in comparison.arms):
            comparison.try_seed(seed)
    directory.create(config, environment(comparison.workers), fresh=fresh)
    return read_run(directory)


def train(
    comparison: Comparison,
    directory: Store,
    on_row: Callable[[Row], None],
    *,
    trials: Sequence[Trial] | None = None,
    pool: Pool[Any] | None = None,
) -> None:
    """Train every arm on every seed that the run directory does not hold yet.

    Args:
        comparison: what to train.
        directory: where.
        on_row: called with each row of the record.
        trials: a part of :func:`trials_of`; all if left out.
        pool: where to train; the comparison's worker processes if left out.

    Raises:
        TrainingError: if a run fails; the others up to then are kept.
        TaskError: if the task fails for a seed.
        RunDirectoryError: if a checkpoint is damaged or a record cannot be written.
    """
    run_trials(
        trials_of(comparison) if trials is None else trials,
        partial(_train, comparison),
        directory,
        workers=comparison.workers if pool is None else pool,
        on_row=lambda _, row: on_row(row),
    )


def trials_of(comparison: Comparison) -> list[Trial]:
    """One an arm and seed; an arm that follows another comes after it."""
    return [
        Trial(
            f"{arm.name}-{seed}",
            {"arm": arm.name, "seed": seed},
            after=(f"{arm.follows}-{seed}",) if arm.follows is not None else (),
            keeps=comparison.is_followed(arm),
            label=f"arm {arm.name}, seed {seed}",
        )
        for seed in comparison.seeds
        for arm in comparison.arms
    ]


def _train(comparison: Comparison, settings: Settings, workspace: Workspace) -> Iterator[Row]:
    arm = next(arm for arm in comparison.arms if arm.name == settings["arm"])
    seed, followed = settings["seed"], comparison.is_followed(arm)
    traces = [load_checkpoint(path)["rms"].tolist() for path in workspace.given.values()]
    run = ArmRun(
        task=comparison.make_task(seed),
        arm=arm,
        seed=seed,
        trace=traces[0] if traces else None,
        record=followed,
        workspace=workspace,
        device=comparison.device,
        with_twin=comparison.twin and arm.can_have_twin,
    )
    run.resume()
    yield {"event": "start", "arm": arm.name, "seed": seed, "epoch": run.progress.epoch}
    for row in run.rows():
        if row["event"] == "end" and followed:
            workspace.keep({"rms": torch.tensor(run.progress.trace, dtype=torch.float64)})
        yield row
