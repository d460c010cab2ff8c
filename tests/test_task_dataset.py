"""Data sets are read while a task trains on them: batch by batch, anew each time, by index."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import tiny
from poprisk import Canaries, Task
from poprisk.task.batches import DROPPED, batch_sizes, last_batch, split_batches
from poprisk.task.data import DatasetInputs, select
from poprisk_lab.arms import default_arms
from poprisk_lab.compared import compare
from poprisk_lab.comparison import Comparison
from poprisk_lab.fit import ArmRun
from poprisk_lab.tasks import TaskError

X, Y = tiny.tiny().train
N = len(Y)
ARMS = {arm.name: arm for arm in default_arms(full=False)}
KINDS = ("poprisk", "adamw-lr0.001-wd0.01", "stopped-lr0.001-wd0.01")


class Files(Dataset[tuple[Tensor, int]]):
    """Examples as they would lie on a disk: made anew for each reading, which is counted."""

    def __init__(self, *, noise: float = 0.0, targets: Tensor = Y) -> None:
        self.noise, self.targets = noise, targets
        self.read = list[int]()
        self.alive = list[weakref.ref[Tensor]]()
        self.most = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = X[index] + (self.noise * torch.randn(4) if self.noise else 0)
        self.read.append(index)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(x)]
        self.most = max(self.most, len(self.alive))
        return x, int(self.targets[index])


def task_of(train: Any, **more: Any) -> Task:
    return replace(tiny.tiny(), train=train, **more)


def trained(task: Task, arm: str = "poprisk", **more: Any) -> tuple[ArmRun, list[dict[str, Any]]]:
    run = ArmRun(task, ARMS[arm], 0, **more)
    return run, [*run.rows()]


def weights(run: ArmRun) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", KINDS)
def test_it_trains_as_the_same_data_in_memory(arm: str) -> None:
    (mine, rows), (other, expected) = trained(task_of(Files()), arm), trained(tiny.tiny(), arm)
    assert torch.equal(weights(mine), weights(other))
    for row, same in zip(rows, expected, strict=True):
        assert measured(row) == pytest.approx(measured(same), rel=1e-5)


def measured(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"}


def test_no_more_than_a_batch_is_held() -> None:
    files, test = Files(), Files()
    task = task_of(files, test=test, clean=None)
    for arm in KINDS:
        trained(task, arm)
    compare(task, seeds=1, epochs=1, arms=KINDS, progress=False)
    assert 0 < files.most <= tiny.BATCH
    assert 0 < test.most <= tiny.BATCH


def test_each_epoch_reads_each_example_once_more() -> None:
    files = Files()
    run = ArmRun(task_of(files), ARMS["poprisk"], 0)
    files.read.clear()
    run._train_epoch()
    assert sorted(files.read) == list(range(N))
    assert files.read != list(range(N))
    order, files.read = files.read, list[int]()
    run._train_epoch()
    assert sorted(files.read) == sorted(order)
    assert files.read != order


def test_a_twin_sees_the_reading_that_the_model_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(noise=1.0)
    run = ArmRun(task_of(files), ARMS["poprisk"], 0, with_twin=True)
    files.read.clear()
    run._train_epoch()
    assert sorted(files.read) == list(range(N))
    batches, held, read = list[weakref.ref[Tensor]](), list[int](), DatasetInputs.read

    def counted(self: DatasetInputs, index: Tensor) -> tuple[Tensor, Tensor]:
        held.append(sum(ref() is not None for ref in batches))
        x, y = read(self, index)
        batches.append(weakref.ref(x))
        return x, y

    monkeypatch.setattr(DatasetInputs, "read", counted)
    assert run.evaluate()["estimate"]["value"] > 0
    assert len(held) >= 2 * N // tiny.BATCH
    assert max(held) <= 2  # the one in use, and the one that is read after it


def test_augmentation_differs_from_reading_to_reading_and_repeats_with_the_seed() -> None:
    x = task_of(Files(noise=1.0)).train[0]
    assert not torch.equal(x[:], x[:])
    (first, rows), (again, same) = (trained(task_of(Files(noise=1.0))) for _ in range(2))
    assert torch.equal(weights(first), weights(again))
    assert [r.get("train_loss") for r in rows] == [r.get("train_loss") for r in same]
    still, _ = trained(task_of(Files()))
    assert not torch.equal(weights(first), weights(still))


def test_a_stopped_training_goes_on_with_the_same_augmentation() -> None:
    whole, _ = trained(task_of(Files(noise=1.0)))
    half = ArmRun(task_of(Files(noise=1.0)), ARMS["poprisk"], 0)
    half._train_epoch()
    state = half._state()
    torch.randn(7)  # another process draws what it will
    rest = ArmRun(task_of(Files(noise=1.0)), ARMS["poprisk"], 0)
    rest.model.load_state_dict(state["model"])
    rest.optimizer.load_state_dict(state["optimizer"])
    rest.progress.epoch = 1
    assert [row["epoch"] for row in rest.rows()] == [2, 3, 4, 4]
    assert torch.equal(weights(rest), weights(whole))


def test_making_the_task_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    task_of(Files(noise=1.0))
    assert torch.equal(torch.rand(2), expected)


# --- targets --------------------------------------------------------------------------------------


def test_planted_labels_and_known_noise_go_by_index() -> None:
    planted = Canaries(Y, seed=0, fraction=0.25)
    task = task_of((Files(), planted.targets), clean=Y)
    assert torch.equal(task.train[1], planted.targets)
    run = ArmRun(task, ARMS["stopped-lr0.001-wd0.01"], 0)
    for part in (run.data, run.held_out):
        inputs, targets = part
        rows = [int((x == X).all(1).nonzero()) for x in inputs[:]]
        assert torch.equal(targets, planted.targets[rows])
    outputs = nn.functional.one_hot(planted.targets, 2).float()
    assert task.memorized(outputs) == 1.0


class Counting(Files):
    """Its label is how often the example was read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return X[index], int(self.read.count(index) > 1)


def test_labels_that_change_are_refused() -> None:
    with pytest.raises(ValueError, match="train gives other targets when its examples are read ag"):
        task_of(Counting(), clean=None)


# --- loaders --------------------------------------------------------------------------------------


def padded(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch one column wider than its rows, with labels as a collator makes them."""
    x = torch.stack([x for x, _ in rows])
    return torch.cat([x, x.new_zeros(len(rows), 1)], 1), torch.tensor([y for _, y in rows])


def test_a_loader_s_batches_are_those_of_the_training() -> None:
    files = Files()
    loader = DataLoader(files, batch_size=7, collate_fn=padded, drop_last=True, shuffle=True)
    task = Task(
        "padded",
        lambda: nn.Linear(5, 2),
        tiny.cross_entropy,
        loader,
        DataLoader(Files(), batch_size=3, collate_fn=padded),
        epochs=2,
    )
    assert (task.batch_size, task.drop_last) == (7, True)
    run = ArmRun(task, ARMS["poprisk"], 0)
    files.read.clear()
    run._train_epoch()
    assert len({*files.read}) == len(files.read) == 35
    assert files.most <= 7
    assert run.progress.step == 5
    smaller = replace(task, batch_size=4)
    assert smaller.batch_size == smaller.train[0].batch_size == 4
    record = Comparison(task, [ARMS["poprisk"]], [0]).config()["task"]
    assert record["last_batch"] == DROPPED


class Sentences(Files):
    """Rows of one to five numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index].repeat(2)[: 1 + index % 5], int(Y[index])


def longest(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    x = nn.utils.rnn.pad_sequence([x for x, _ in rows], batch_first=True)
    return x, torch.tensor([y for _, y in rows])


class Summed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.sum(1, keepdim=True))


def test_batches_may_be_padded_to_their_own_longest_row() -> None:
    loader = DataLoader(Sentences(), batch_size=4, collate_fn=longest)
    task = Task("long", lambda: Summed(1, 2), tiny.cross_entropy, loader, loader, epochs=1)
    widths = {part.shape[1] for part in task.train[0].batches()}
    assert widths == {4, 5}
    assert trained(task)[1][-1]["final_metric"] >= 0
    with pytest.raises(ValueError, match=r"inputs of one shape, but train\[0\] has \(1,\) and tr"):
        task_of(Sentences(), clean=None)


def test_a_loader_of_tensors_is_in_memory() -> None:
    task = task_of(DataLoader(TensorDataset(X, Y), batch_size=6, drop_last=True), batch_size=None)
    assert task.train[0] is X
    assert (task.batch_size, task.drop_last) == (6, True)


@pytest.mark.parametrize(("n", "size"), [(40, 8), (41, 8), (47, 8), (5, 8), (8, 8), (9, 1)])
def test_drop_last_leaves_out_a_batch_that_is_not_full(n: int, size: int) -> None:
    batches = split_batches(torch.arange(n), size, drop_last=True)
    assert [*map(len, batches)] == ([size] * (n // size) or [n])
    assert batch_sizes(n, size, drop_last=True) == [min(n, size)]
    assert last_batch(n, size, drop_last=True) == (DROPPED if n > size and n % size else "")


def test_a_task_s_own_drop_last_holds_for_tensors() -> None:
    run = ArmRun(replace(tiny.tiny(), batch_size=9, drop_last=True), ARMS["poprisk"], 0)
    run._train_epoch()
    assert run.progress.step == 4


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(Files())  # type: ignore[arg-type]


class Sized(Stream):
    def __len__(self) -> int:
        return N


class Uneven(Files):
    """Targets of another shape from the ninth example on."""

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:  # type: ignore[override]
        return X[index], [0] if index < 8 else [0, 1]


LOADER = "train must be a loader that goes through all examples, batch_size at a time, but has "
ITERABLE = "train must be a map-style data set, whose examples have an index, but {} is iterable"

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a stream": (Stream, TypeError, ITERABLE.format("Stream")),
    "a stream with a length": (Sized, TypeError, ITERABLE.format("Sized")),
    "a loader of a stream": (
        lambda: DataLoader(Stream(), batch_size=4),
        TypeError,
        ITERABLE.format("Stream"),
    ),
    "weights": (
        lambda: DataLoader(Files(), 4, sampler=WeightedRandomSampler([1.0] * N, N)),
        ValueError,
        f"{LOADER}a WeightedRandomSampler; give the data set, or a Subset of it, and batch_size",
    ),
    "a part": (
        lambda: DataLoader(Files(), 4, sampler=SubsetRandomSampler(range(9))),
        ValueError,
        f"{LOADER}a SubsetRandomSampler",
    ),
    "with replacement": (
        lambda: DataLoader(Files(), 4, sampler=RandomSampler(Files(), replacement=True)),
        ValueError,
        f"{LOADER}a sampler that repeats examples or leaves some out",
    ),
    "fewer": (
        lambda: DataLoader(Files(), 4, sampler=RandomSampler(Files(), num_samples=8)),
        ValueError,
        f"{LOADER}a sampler that repeats",
    ),
    "no batches": (lambda: DataLoader(Files(), None), ValueError, f"{LOADER}no batch_size"),
    "targets of another length": (
        lambda: (Files(), Y[:7]),
        ValueError,
        "train has 40 inputs but 7 targets; they must match",
    ),
    "targets of several shapes": (
        Uneven,
        ValueError,
        r"train must hold targets of one shape, but has \[\(1,\), \(2,\)\]; pad or crop",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_index_or_no_batches_is_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        task_of(make(), clean=None)


def test_a_missing_value_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = X.clone()
    damaged[33, 1] = np.nan
    monkeypatch.setitem(globals(), "X", damaged)
    with pytest.raises(ValueError, match="train inputs hold NaN or Inf"):
        task_of(Files())


# --- the record -----------------------------------------------------------------------------------


def comparison(files: Callable[[], Any]) -> Comparison:
    return Comparison(lambda seed=0: task_of(files()), [ARMS["poprisk"]], [0])


def test_the_record_knows_the_data_that_it_reads() -> None:
    config = comparison(lambda: Files(noise=1.0)).config()
    assert config == comparison(lambda: Files(noise=1.0)).config()
    other = comparison(lambda: Files(noise=2.0)).config()
    assert config["task"]["data"] != other["task"]["data"]


class Unseeded(Files):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x + float(np.random.default_rng().normal()), y


def test_augmentation_that_no_seed_repeats_is_refused() -> None:
    with pytest.raises(TaskError, match="what differs from reading to reading from the global"):
        comparison(Unseeded).config()


def test_a_part_of_a_data_set_is_read_too() -> None:
    files = Files()
    x, y = task_of(Subset(files, range(5, 25)), clean=None).train
    assert isinstance(x, DatasetInputs)
    assert torch.equal(x[:], X[5:25])
    assert torch.equal(y, Y[5:25])
    part = select(select(x, torch.tensor([3, 7])), torch.tensor([1]))
    assert torch.equal(part[:], X[12:13])
