"""The gate in a Kronecker basis and its rivals, by a protocol: python benchmarks/bases.py OUT.json.

docs/notebook/bases.md says what is tried, on which seeds, and how one setting of each optimizer is
chosen; it was written before the first run. ``first`` trains every setting on the choosing seed,
``second`` the best two of each optimizer on two more, after which one is named; ``judge`` and
``regressions`` train on other seeds. OUT keeps what is done; repeated, the command goes on, and
``--share i/k`` takes every k-th run into a file of its own. ``bases_report.py`` puts them together
and says what came out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest import mock

import torch
from advise_tasks import labels
from bases_peers import BUILD
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.evaluation import evaluating
from poprisk.optim import kronecker
from poprisk.task import Task
from poprisk.task.batches import split_batches
from poprisk_lab.arms import backward_mean
from poprisk_lab.controls import ShuffledMask, UpdateTrace, decayed, rms
from poprisk_lab.fit import score, seed_all
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json
from poprisk_lab.tasks import BUILT_IN
from poprisk_lab.tasks.digits import digits, digits_cnn

LEVELS = (0.0, 0.2, 0.4, 0.6)
CHOOSING = {"first": (710,), "second": (711, 712)}
CHOOSING_LEVELS = (0.0, 0.4)
NEAR = 0.03
"""How far behind its optimizer's best, on the first choosing seed, a setting is judged."""
KEPT = 2
"""Settings of each optimizer that the second part of the choice looks at."""
JUDGING = (720, 721, 722, 723, 724, 725)


def _signals(seed: int, *, noise: float) -> Task:
    task = labels(seed, data="mnist1d", noise=noise)
    object.__setattr__(task, "epochs", 40)
    return task


TASKS = {
    "digits": digits,
    "digits-cnn": digits_cnn,
    "mnist1d": _signals,
    "docstrings": partial(labels, data="docstrings"),
}
REGRESSIONS = ("sparse-regression", "dense-regression", "long-tail-regression", "diabetes")
"""Judged beside them, with the same settings; nothing is chosen there."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
DECAYS = (0.01, 1.0)


def _grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(values, one, strict=True)) for one in product(*values.values())]


GATED = """
    4e-4 1.25 0.25, 8e-4 1.25 0.25, 4e-4 1.75 0.25, 8e-4 1.75 0.25,
    8e-4 1.75 0.1, 1.6e-3 1.75 0.25, 1.6e-3 2.5 0.1, 8e-4 2.5 0.25
"""
"""Learning rate, z and slack."""
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "rotated gate": [
        dict(zip(("lr", "z", "slack"), map(float, one.split()), strict=True))
        | {"weight_decay": 0.01}
        for one in GATED.split(",")
    ],
    "basis alone": _grid(lr=(1e-4, 2e-4, 5e-4, 1e-3), weight_decay=DECAYS),
    "coordinate gate": _grid(lr=(3e-4, 1e-3, 2e-3, 4e-3), z=(1.5, 2.0)),
    "AdamW": _grid(lr=RATES, weight_decay=DECAYS),
    "SOAP": _grid(lr=RATES, weight_decay=DECAYS),
    "Muon": _grid(lr=RATES, weight_decay=DECAYS),
    "Muon-NSR": _grid(lr=RATES, noise=("ratio", "variance")),
    "Magma": _grid(lr=RATES, weight_decay=DECAYS),
    "Ano": _grid(lr=(3e-5, 1e-4, 3e-4, 1e-3), weight_decay=DECAYS),
    "schedule-free AdamW": _grid(lr=(3e-4, 1e-3, 3e-3, 1e-2), weight_decay=DECAYS),
}
"""Eight of each optimizer."""


def _raised(setting: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """A setting with more weight decay, at its learning rate and at twice it."""
    return [{**setting, "lr": k * setting["lr"], "weight_decay": decay} for k in (1, 2)]


RAISED = {
    "rotated gate": (1, 1.0),
    "basis alone": (5, 3.0),
    "coordinate gate": (4, 1.0),
    "AdamW": (3, 3.0),
    "SOAP": (2, 3.0),
    "Muon": (5, 3.0),
    "Muon-NSR": (3, 1.0),
    "Magma": (5, 3.0),
    "Ano": (3, 3.0),
    "schedule-free AdamW": (3, 3.0),
}
"""The best of the eight, and the next weight decay of 0.01, 1 and 3 not yet tried at its rate."""
for _name, (_best, _decay) in RAISED.items():
    SETTINGS[_name] += _raised(SETTINGS[_name][_best], _decay)
TO_BEAT = ("AdamW", "basis alone")
CONTROLS = ("shuffled mask", "random rotation", "RMS-matched")
"""Of the rotated gate at its chosen setting; the last: the basis alone at the size of its steps."""


class Cell(NamedTuple):
    """One run.

    Attributes:
        optimizer: a key of :data:`SETTINGS`, or one of :data:`CONTROLS`.
        setting: its position there.
        task: a key of :data:`TASKS`, or one of :data:`REGRESSIONS`.
        noise: share of wrong training labels, 0 of a regression.
        seed: of data, initial weights and order of examples.
    """

    optimizer: str
    setting: int
    task: str
    noise: float
    seed: int


Results = dict[Cell, float]
"""Final accuracy on right labels, of a regression the test error."""


def train(cell: Cell) -> float:
    """What the task's metric says of the test set in the end."""
    if cell.task in REGRESSIONS:
        task = BUILT_IN[cell.task](cell.seed)
    else:
        task = TASKS[cell.task](cell.seed, noise=cell.noise)
    if cell.optimizer in SETTINGS:
        setting = SETTINGS[cell.optimizer][cell.setting]
        return _trained(task, cell.seed, partial(BUILD[cell.optimizer], **setting))
    setting = SETTINGS["rotated gate"][cell.setting]
    if cell.optimizer == "shuffled mask":
        build = partial(BUILD["rotated gate"], mask=ShuffledMask("soft"), **setting)
        return _trained(task, cell.seed, build)
    if cell.optimizer == "random rotation":
        with random_rotations(cell.seed):
            return _trained(task, cell.seed, partial(BUILD["rotated gate"], **setting))
    trace = UpdateTrace()
    _trained(task, cell.seed, partial(BUILD["rotated gate"], **setting), trace.record_step)
    same = {key: setting[key] for key in ("lr", "weight_decay")}
    alone = partial(BUILD["basis alone"], **same)
    return _trained(task, cell.seed, alone, partial(_step_of_sizes, iter(trace.rms)))


@torch.no_grad()
def _step_of_sizes(sizes: Iterator[list[float]], optimizer: Optimizer) -> None:
    """A step whose part beside weight decay has these root mean squares, tensor by tensor."""
    (group,), starts = optimizer.param_groups, decayed(optimizer)
    optimizer.step()
    for p, start, size in zip(group["params"], starts, next(sizes), strict=True):
        moved = p - start
        p.copy_(start + moved * (size / float(rms(moved).clamp_min(1e-30))))


def _trained(
    task: Task,
    seed: int,
    build: Callable[..., Optimizer],
    step: Callable[[Optimizer], None] | None = None,
) -> float:
    seed_all(seed)
    model, (x, y) = task.new_model(), task.train
    optimizer = build(model, {"batch_size": task.batch_size, "dataset_size": len(y)})
    for epoch in range(task.epochs):
        seed_all(1_000_003 * (seed + 1) + epoch)
        for rows in split_batches(torch.randperm(len(y)), task.batch_size):
            losses = task.loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            backward_mean(optimizer, losses)
            optimizer.step() if step is None else step(optimizer)
    return _score(task, model, optimizer)


@contextmanager
def random_rotations(seed: int) -> Iterator[None]:
    """Bases that have nothing to do with the gradients, and stay."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(factor: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(factor.shape, generator=generator))[0]

    def kept(_: Tensor, basis: Tensor) -> Tensor:
        return basis

    with mock.patch.multiple(kronecker, _eigenvectors=drawn, _iterated=kept):
        yield


@torch.no_grad()
def _score(task: Task, model: nn.Module, optimizer: Optimizer) -> float:
    """On the test set, at the averaged weights where an optimizer keeps some."""
    averaged = getattr(optimizer, "eval", None)
    if averaged is not None:
        averaged()
    with evaluating(model):
        return score(task, model(task.test[0]), task.test[1])


def first_choice() -> Iterator[Cell]:
    """Every setting on the first choosing seed."""
    for name, noise, task in product(SETTINGS, CHOOSING_LEVELS, TASKS):
        for setting in range(len(SETTINGS[name])):
            for seed in CHOOSING["first"]:
                yield Cell(name, setting, task, noise, seed)


def second_choice(done: Results) -> Iterator[Cell]:
    """The best settings of each optimizer on more seeds."""
    for name in SETTINGS:
        for setting in ranked(done, name)[:KEPT]:
            for task, noise, seed in product(TASKS, CHOOSING_LEVELS, CHOOSING["second"]):
                yield Cell(name, setting, task, noise, seed)


def ranked(done: Results, name: str) -> list[int]:
    """Settings by falling mean accuracy on the first choosing seed."""
    of = {s: _mean(done, name, s, CHOOSING["first"]) for s in range(len(SETTINGS[name]))}
    return sorted(of, key=lambda s: -of[s])


def chosen(done: Results) -> dict[str, int]:
    """One setting of each optimizer: the best mean over all choosing seeds, of those kept."""
    seeds = CHOOSING["first"] + CHOOSING["second"]
    return {
        name: max(ranked(done, name)[:KEPT], key=lambda s, name=name: _mean(done, name, s, seeds))
        for name in SETTINGS
    }


def _mean(done: Results, name: str, setting: int, seeds: Sequence[int]) -> float:
    cells = product(TASKS, CHOOSING_LEVELS, seeds)
    return mean(done[Cell(name, setting, task, noise, seed)] for task, noise, seed in cells)


def judged(done: Results) -> Iterator[Cell]:
    """On the judging seeds, in the order of how much hangs on it.

    The chosen setting of the gate, and every near one of the two to beat; then the chosen ones of
    the others and the controls, on half of the seeds; and on the other half.
    """
    picked = chosen(done)
    whole = [(name, s) for name in TO_BEAT for s in near(done, name)]
    yield from _cells([("rotated gate", picked["rotated gate"]), *whole], JUDGING)
    yield from _cells([("basis alone", 0)], JUDGING, LEVELS[-1:])  # the slowest, for hindsight
    others = [(name, picked[name]) for name in SETTINGS if name not in (*TO_BEAT, "rotated gate")]
    controls = [(name, picked["rotated gate"]) for name in CONTROLS]
    for seeds in (JUDGING[:3], JUDGING[3:]):
        yield from _cells([*controls, *others], seeds)


def regressions(done: Results) -> Iterator[Cell]:
    """Every setting of AdamW, and the chosen ones of the gate in both bases."""
    picked = chosen(done)
    gates = [(name, picked[name]) for name in ("rotated gate", "coordinate gate")]
    adamw = [("AdamW", s) for s in range(len(SETTINGS["AdamW"]))]
    for seed, task, (name, s) in product(JUDGING, REGRESSIONS, [*gates, *adamw]):
        yield Cell(name, s, task, 0.0, seed)


def near(done: Results, name: str) -> list[int]:
    """Settings that are not far behind the best of their optimizer on the first choosing seed."""
    first, *rest = ranked(done, name)
    least = _mean(done, name, first, CHOOSING["first"]) - NEAR
    return [first, *(s for s in rest if _mean(done, name, s, CHOOSING["first"]) >= least)]


def _cells(
    settings: list[tuple[str, int]], seeds: Sequence[int], levels: Sequence[float] = LEVELS
) -> Iterator[Cell]:
    for seed, noise, task, (name, setting) in product(seeds, levels, TASKS, settings):
        yield Cell(name, setting, task, noise, seed)


STAGES: dict[str, Callable[[Results], Iterator[Cell]]] = {
    "first": lambda _: first_choice(),
    "second": second_choice,
    "judge": judged,
    "regressions": regressions,
}


def read(out: Path) -> Results:
    """What is done."""
    rows = json.loads(out.read_text("utf-8"))["results"] if out.exists() else []
    return {Cell(*row[:-1]): row[-1] for row in rows}


def main(out: Path, stage: str, share: str, minutes: float) -> None:
    """Do what is left of a stage, as far as the time goes."""
    torch.set_num_threads(1)
    until, (part, parts) = time.monotonic() + 60 * minutes, map(int, share.split("/"))
    own = out.with_suffix(f".{part}-of-{parts}{out.suffix}") if parts > 1 else out
    done = read(out) | read(own)
    for i, cell in enumerate(STAGES[stage](done)):
        if i % parts != part - 1 or cell in done or time.monotonic() > until:
            continue
        done[cell] = train(cell)
        rows = [[*c, found] for c, found in done.items()]
        write_json(own, {"environment": environment(0), "settings": SETTINGS, "results": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--share", default="1/1", help="which of how many parts; each its own file")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after")
    given = parser.parse_args()
    main(given.out, given.stage, given.share, given.minutes)
