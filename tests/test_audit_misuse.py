"""What a user may do wrong with an audit: a right number, a flag, or one clear refusal."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from poprisk import Auditor, Canaries, audit
from poprisk.audit.gather import merged, part_of
from poprisk.audit.judge import MOST_CLASSES
from poprisk.audit.looks import Predictions, default_dtype, memory_of
from poprisk.audit.scores import fit_noise

N, C = 200, 4


def module(name: str) -> Any:
    """Of the library; the package has a function of its name."""
    return importlib.import_module(f"poprisk.audit.{name}")


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % C


def mixed(n: int = N) -> Tensor:
    return torch.randint(C, (n,), generator=torch.Generator().manual_seed(0))


def logits(y: Tensor, c: int = C) -> Tensor:
    return 6.0 * F.one_hot(y, c)


def feed(auditor: Auditor, outputs: Tensor, *, batch: int = 32, times: int = 1) -> None:
    for index in torch.randperm(N, generator=torch.Generator().manual_seed(0)).split(batch):
        for _ in range(times):
            auditor.update(index, outputs[index], auditor.targets[index])


# --- positions ------------------------------------------------------------------------------------


def test_a_part_of_the_data_that_is_numbered_by_itself_is_refused() -> None:
    y = mixed()
    auditor = Auditor(y)
    part = torch.arange(100, 200)
    with pytest.raises(ValueError, match="not those of the auditor at their index"):
        auditor.update(torch.arange(100), logits(y)[part], auditor.targets[part])
    assert not auditor.predictions.seen.any()


@pytest.mark.parametrize(
    "index",
    [
        [3, 5],
        (3, 5),
        range(3, 7, 2),
        np.array([3, 5], np.uint8),
        torch.tensor([3, 5], dtype=torch.int16),
        torch.tensor([3, 5], dtype=torch.int32),
    ],
)
def test_positions_of_any_integers(index: Any) -> None:
    auditor = Auditor(labels())
    auditor.update(index, logits(labels())[[3, 5]], auditor.targets[[3, 5]])
    assert auditor.predictions.seen.nonzero().squeeze(1).tolist() == [3, 5]


@pytest.mark.parametrize("index", [[-1], [0.0], [True], [[0]], 0, "a", [N], None])
def test_positions_that_are_none_are_refused(index: Any) -> None:
    auditor = Auditor(labels())
    with pytest.raises((TypeError, ValueError), match="index must"):
        auditor.update(index, logits(labels())[:1], auditor.targets[:1])


def test_an_example_that_comes_twice_in_a_batch_counts_once() -> None:
    auditor = Auditor(labels(), plant=0)
    auditor.update([0, 0, 1], logits(torch.tensor([1, 2, 3])), auditor.targets[[0, 0, 1]])
    assert auditor.predictions.passed == 2
    assert auditor.predictions.present[0].argmax() == 2
    auditor.end_look()
    assert auditor.looks[0].items == 2


def test_batches_that_are_evaluated_again_do_not_end_a_look() -> None:
    """As closures do, or a step that looks at the loss before and after."""
    auditor = Auditor(labels())
    feed(auditor, logits(labels()), times=4, batch=20)
    assert [look.items for look in auditor.looks] == [N // 2, N // 2]  # not an eighth
    once = Auditor(labels())
    feed(once, logits(labels()))
    np.testing.assert_array_equal(auditor.result().suspect, once.result().suspect)


def test_samples_with_replacement_end_looks_of_half_of_the_data() -> None:
    auditor = Auditor(labels())
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        index = torch.randint(N, (20,), generator=g)
        auditor.update(index, logits(labels())[index], auditor.targets[index])
    auditor.end_look()
    assert all(look.items >= N // 2 for look in auditor.looks[:-1])
    assert auditor.result().valid


def test_an_empty_batch_is_nothing() -> None:
    for kind, y in (("classes", labels()), ("regression", torch.randn(N, 2))):
        auditor = Auditor(y, kind=kind, plant=0)
        auditor.update([], torch.zeros(0, C if kind == "classes" else 2), auditor.targets[:0])
        assert not auditor.predictions.seen.any()


def test_examples_that_never_come_are_not_judged_and_are_said() -> None:
    auditor = Auditor(labels())
    index = torch.arange(150)
    auditor.update(index, logits(labels())[index], auditor.targets[index])
    result = auditor.result()
    assert np.isnan(result.quality[150:]).all()
    assert not result.suspect[150:].any()
    assert "50 of 200 labels have no believed prediction" in result.reason


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        [0, 1, 2],
        np.arange(9) % 3,
        pd.Series(["cat", "dog", "cat"]),
        np.array(["cat", "dog"]),
        None,
        3,
    ],
)
def test_labels_that_are_no_tensor_are_refused(targets: Any) -> None:
    with pytest.raises(TypeError, match="targets must be a tensor, with numbers in place of names"):
        Auditor(targets)
    with pytest.raises(TypeError, match="targets must be a tensor, with numbers in place of names"):
        audit(torch.zeros(3, 3), None, targets)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integers(dtype: torch.dtype) -> None:
    y = labels().to(dtype)
    auditor = Auditor(y)
    assert auditor.targets.dtype == dtype
    feed(auditor, logits(labels()))
    assert not auditor.result().suspect.any()
    pairs = Auditor(labels() > 1, kind="binary")
    assert pairs.targets.dtype == torch.bool


def test_labels_put_right_in_place_are_other_labels() -> None:
    y = labels()
    for plant in (0.0, 0.1):
        auditor = Auditor(y, plant=plant)
        feed(auditor, logits(labels()))
        auditor.targets[7] = (auditor.targets[7] + 1) % C
        with pytest.raises(ValueError, match="targets of 1 of 1 examples are not those"):
            auditor.update([7], logits(labels())[[7]], auditor.targets[[7]])
    auditor = Auditor(y, plant=0)
    y[7] = 0
    auditor.update([7], logits(labels())[[7]], auditor.targets[[7]])
    assert auditor.result().labels[7] == labels()[7]


def test_planted_labels_that_are_not_trained_on_are_refused() -> None:
    canaries = Canaries(labels(), fraction=0.1)
    auditor = Auditor(canaries)
    with pytest.raises(ValueError, match=r"train on auditor\.targets, which hold the planted"):
        auditor.update(torch.arange(N), logits(labels()), labels())
    swapped = Auditor(mixed() % 2, kind="preferences", plant=0.2)
    with pytest.raises(ValueError, match=r"train on auditor\.targets"):
        swapped.update(torch.arange(N), torch.zeros(N), mixed() % 2)


def test_numbers_that_are_large_and_near_each_other_are_told_apart() -> None:
    """Years, whose planted ones lie within a percent of them."""
    years = 1990 + 10 * torch.randn(N, generator=torch.Generator().manual_seed(0))
    auditor = Auditor(years, kind="regression", plant=0.2)
    with pytest.raises(ValueError, match="are not those of the auditor"):
        auditor.update(torch.arange(N), years, years)
    mean, size = years.mean(), years.std()
    again = (auditor.targets - mean) / size * size + mean  # as a scaled target is undone
    auditor.update(torch.arange(N), years, again)
    small = Auditor(torch.randn(N), kind="regression")
    small.update(torch.arange(N), torch.zeros(N), small.targets.bfloat16())


@pytest.mark.parametrize("soft", [logits(labels()), 0.9 * F.one_hot(labels()) + 0.025])
def test_soft_targets_are_refused(soft: Tensor) -> None:
    auditor = Auditor(labels())
    with pytest.raises(ValueError, match=r"targets must have shape \(200,\) as in training"):
        auditor.update(torch.arange(N), logits(labels()), soft)


def test_a_class_that_never_occurs() -> None:
    auditor = Auditor(labels(), classes=6, plant=0.2)
    feed(auditor, logits(labels(), 6))
    result = auditor.result()
    assert not result.suspect.any()
    assert result.noise_matrix is not None
    assert result.noise_matrix[5].tolist() == [0, 0, 0, 0, 0, 1]
    gap = torch.where(labels() == 2, 5, labels())  # 2 and 4 in the middle
    auditor = Auditor(gap)
    feed(auditor, logits(gap, 6))
    assert not auditor.result().suspect.any()


def test_missing_labels_are_predicted_and_not_planted() -> None:
    y = labels()
    y[::2] = -100
    auditor = Auditor(y, plant=0.4)
    assert (auditor.targets[::2] == -100).all()
    feed(auditor, logits(labels()))
    result = auditor.result()
    np.testing.assert_array_equal(result.suggested[::2], labels()[::2])
    assert int(result.labelled.sum()) == N // 2
    with pytest.raises(ValueError, match=r"labels must lie in 0..3 or be ignore_index, but got -1"):
        Auditor(torch.where(y == -100, -1, y))


@pytest.mark.parametrize(("n", "known"), [(2, 2), (9, 9)])
def test_too_few_labels_to_plant_any_are_said_by_the_arguments_name(n: int, known: int) -> None:
    with pytest.raises(ValueError, match=f"plant=0.05 of {known} labels makes none"):
        Auditor(labels(n))
    auditor = Auditor(labels(n), plant=0)
    auditor.update(torch.arange(n), logits(labels(n), auditor.items.width), auditor.targets)
    assert len(auditor.result()) == n


def test_labels_that_are_all_the_same() -> None:
    y = torch.zeros(N, dtype=torch.long)
    auditor = Auditor(y, plant=0.2)
    outputs = logits(y, 2)
    outputs[3] = torch.tensor([0.0, 6.0])
    feed(auditor, outputs)
    assert auditor.result().suspects().tolist() == [3]
    with pytest.raises(ValueError, match=r"outputs must have shape \(b, 2\), but got \(1, 1\)"):
        auditor.update([0], torch.zeros(1, 1), auditor.targets[:1])


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, C, 1), (N, 1, C), (N, C, 2, 2), (N,), (N, 2 * C)])
def test_outputs_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    auditor = Auditor(labels())
    with pytest.raises(ValueError, match=r"outputs must have shape \(b, 4\), but got"):
        auditor.update(torch.arange(N), torch.zeros(shape), auditor.targets)
    with pytest.raises(TypeError, match="outputs must be a tensor, but got tuple"):
        auditor.update(torch.arange(N), (torch.zeros(N, C),), auditor.targets)  # pyrefly: ignore


def test_probabilities_that_are_passed_for_logits_are_refused() -> None:
    auditor = Auditor(labels())
    for p in (logits(labels()).softmax(1), logits(labels()).half().softmax(1)):
        with pytest.raises(ValueError, match=r"logits, but got probabilities: .*probabilities="):
            auditor.update(torch.arange(N), p, auditor.targets)
    one = Auditor(labels() // 2, kind="binary", plant=0.2)
    one.update(torch.arange(N), 0.1 + 0.8 * (labels() // 2), one.targets)  # a sigmoid's
    assert one.result().reason.startswith("unsure: ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_precision(dtype: torch.dtype) -> None:
    auditor = Auditor(labels())
    outputs = logits(labels()).to(dtype)
    outputs[5, 1] = math.inf  # overflowed
    outputs[6, 1] = -math.inf  # masked
    feed(auditor, outputs)
    result = auditor.result()
    assert auditor.not_finite == 1
    assert np.isnan(result.quality[5])
    assert result.suggested[6] == 2
    assert result.valid


def test_a_run_that_diverged_is_said_to_have() -> None:
    auditor = Auditor(labels())
    feed(auditor, torch.full((N, C), math.nan))
    with pytest.raises(RuntimeError, match="all 200 predictions were NaN or Inf"):
        auditor.result()


def test_large_numbers_are_not_squeezed_into_half_precision() -> None:
    y = 2e5 + 3e4 * torch.randn(N, generator=torch.Generator().manual_seed(0))
    given = y.clone()
    given[4] += 1e6
    auditor = Auditor(given, kind="regression", plant=0.1)
    noise = 1e3 * torch.randn(N, generator=torch.Generator().manual_seed(1))
    feed(auditor, y + noise)
    result = auditor.result()
    assert result.suspects().tolist()[0] == 4
    assert np.isfinite(result.history).all()
    assert result.history[4, 0] == pytest.approx(-1e6, rel=0.01)
    with pytest.raises(ValueError, match="float16 does not hold numbers of any size"):
        Auditor(given, kind="regression", dtype=torch.float16)
    many = (1 << 14, 1 << 13)
    assert default_dtype(*many, numbers=True) == torch.float32
    assert default_dtype(*many, numbers=False) == torch.float16


# --- sizes ----------------------------------------------------------------------------------------


def test_what_would_not_fit_is_refused_before_training() -> None:
    y = torch.arange(200_000) % 100_000
    with pytest.raises(ValueError, match=r"predictions take 111\.\d GiB, but max_memory is 8\.0"):
        Auditor(y)
    with pytest.raises(ValueError, match=r"noise matrix of 100,000 classes takes 447"):
        Auditor(y, max_memory=200 * 2**30)
    with pytest.raises(ValueError, match=r"predictions take 74\.\d GiB"):
        audit(torch.zeros(1, 1), None, y)
    with pytest.raises(ValueError, match="max_memory must lie in"):
        Auditor(labels(), max_memory=0)


def test_what_is_kept_takes_as_much_as_is_said(tmp_path: Path) -> None:
    for dtype, numbers in ((None, False), (torch.float16, False), (None, True)):
        kept = vars(Predictions(500, 7, dtype=dtype, numbers=numbers)).values()
        held = sum(v.numel() * v.element_size() for v in kept if isinstance(v, Tensor))
        assert memory_of(500, 7, dtype, numbers=numbers) == held
    auditor = Auditor(labels(), max_memory=10, structure=False, directory=tmp_path)
    assert auditor.predictions.directory == tmp_path


def test_many_classes_without_a_noise_matrix() -> None:
    n, c = 300, MOST_CLASSES + 1
    y = (torch.arange(n) * 37) % c
    auditor = Auditor(y, classes=c, structure=False, plant=0.2)
    given = y.clone()
    for index in torch.arange(n).split(100):
        auditor.update(index, 3 * logits(given[index], c), auditor.targets[index])
    result = auditor.result()
    assert result.noise_matrix is None
    assert not result.suspect.any()
    assert result.recall is not None
    assert result.recall.value == pytest.approx(1)


def test_scores_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    p, y = torch.randn(N, C, generator=g).softmax(1), labels().numpy()
    whole = fit_noise(p, y)
    monkeypatch.setattr(module("scores"), "NUMBERS", 7 * C)
    monkeypatch.setattr(module("judge"), "BLOCK", 7 * C)
    parts = fit_noise(p, y)
    np.testing.assert_allclose(parts.margin(p, y)[0], whole.margin(p, y)[0], atol=1e-9)
    auditor = Auditor(labels())
    feed(auditor, logits(labels()))
    (look,) = auditor.result().looks
    assert look.confidence == pytest.approx(float(logits(labels()).softmax(1).max(1).values.mean()))


# --- data sets ------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ()


def test_data_sets_that_do_not_say_which_is_which_are_refused() -> None:
    auditor = Auditor(labels())
    with pytest.raises(TypeError, match="dataset must have a length and examples by position, but"):
        auditor.dataset(Stream())
    inputs_only = auditor.dataset(torch.zeros(N, 3))
    with pytest.raises(TypeError, match=r"examples must be tuples .* or dicts, but"):
        _ = inputs_only[0]
    wrapped = auditor.dataset(TensorDataset(torch.arange(N), labels()))
    assert [int(v) for v in wrapped[-1]] == [N - 1, int(auditor.targets[-1]), N - 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(N, 4), "batches of the DataLoader must be tuples .* but one is a Tensor"),
        ([{"x": torch.zeros(4), "y": 0}] * N, "batches of the DataLoader must be tuples .* dict"),
        (TensorDataset(torch.zeros(N, 4)), "batches of the DataLoader must be tuples"),
        (
            TensorDataset(torch.zeros(N, 4), labels(), torch.arange(N) // 20),
            "must be the positions of their examples, but some come again",
        ),
        (
            TensorDataset(torch.zeros(N, 4), labels(), torch.arange(N) % 50),
            "must be the positions of their examples, but some come again",
        ),
        (
            TensorDataset(torch.zeros(N, 4), labels(), torch.rand(N)),
            "index must hold the positions",
        ),
        (TensorDataset(torch.zeros(N + 5, 4), labels(N + 5)), r"index must lie in 0\.\.199"),
    ],
)
def test_loaders_that_do_not_say_which_is_which_are_refused(data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        audit(nn.Linear(4, C), DataLoader(data, 50), labels())


@pytest.mark.parametrize("outputs", [np.zeros((N // 2, C - 1)), np.zeros((1, C))])
def test_folds_whose_outputs_do_not_fit_are_refused(outputs: Any) -> None:
    def trained(x: Tensor, y: Tensor) -> Any:
        def predict(x: Tensor) -> Any:
            return outputs

        return predict

    with pytest.raises(ValueError, match=r"outputs must have shape \(b, 4\)|must be of one batch"):
        audit(trained, torch.zeros(N, 4), labels(), folds=2)


# --- processes ------------------------------------------------------------------------------------


def test_shards_that_overlap_and_are_of_different_size() -> None:
    """As a sampler makes them that repeats examples so that processes get as many."""
    whole, parts = Auditor(mixed()), [Auditor(mixed()) for _ in range(3)]
    shards = [range(0, 90), range(80, 199), [199, 199]]
    feed(whole, logits(mixed()))
    whole.end_look()
    for auditor, shard in zip(parts, shards, strict=True):
        index = torch.as_tensor(shard)
        auditor.update(index, logits(mixed())[index], auditor.targets[index])
        auditor.end_look()
    found = merged([part_of(a.predictions, a.looks, 0) for a in parts], N, C)
    torch.testing.assert_close(found.average, whole.predictions.average)
    assert (found.weight > 0).all()
    (look,) = found.looks
    assert look.memorization is not None  # though one process has no planted label
    assert math.isfinite(look.memorization.value)


def test_processes_keep_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("auditor"), "processes", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        Auditor(labels(), directory=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
