"""Built-in tasks, a user's own, and every way in which a task can be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

import tiny
from poprisk.task import METRICS, Metric, Task
from poprisk_lab.tasks import BUILT_IN, TaskError, load_task
from poprisk_lab.tasks.digits import flip_labels
from poprisk_lab.tasks.interpolation import (
    NOISE_STD,
    SPIKES,
    TAIL_ENERGY,
    long_tail,
    random_relu,
)

DIGITS = ("digits", "digits-cnn", "digits-clean")
LINEAR = {"sparse-regression": 5, "dense-regression": 200}


def rows_of(x: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def outputs_that_predict(classes: Tensor, count: int) -> Tensor:
    return F.one_hot(classes, count).float()


def worst_error(outputs: Tensor, targets: Tensor) -> float:
    return (outputs - targets).abs().max().item()


def first_column_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of outputs (n, 1) for targets (n,)."""
    return (outputs[:, 0] - targets).square()


def mean_first_column_error(outputs: Tensor, targets: Tensor) -> float:
    return first_column_error(outputs, targets).mean().item()


def same_data(a: Task, b: Task) -> bool:
    pairs = zip((*a.train, *a.test), (*b.train, *b.test), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# --- built-in tasks -------------------------------------------------------------------------------


def test_a_long_tail_has_the_energy_of_the_spikes_however_long_it_is() -> None:
    for tail in (50, 1_000):
        x = long_tail(2_000, tail, torch.Generator().manual_seed(0))
        spikes, rest = x[:, :SPIKES].square().sum(1).mean(), x[:, SPIKES:].square().sum(1).mean()
        assert float(spikes) == pytest.approx(SPIKES, rel=0.1)
        assert float(rest) == pytest.approx(TAIL_ENERGY, rel=0.1)


def test_random_features_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(2, dtype=torch.float64)
    V = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (V / 2**0.5).clamp_min(0) / 3**0.5
    torch.testing.assert_close(random_relu(x, 3, generator), expected)


@pytest.mark.parametrize("name", ["long-tail-regression", "random-features"])
def test_the_noise_of_interpolation_tasks_is_known(name: str) -> None:
    task = load_task(name, seed=0)
    assert task.clean is not None
    noise = task.train[1] - task.clean
    assert float(noise.std()) == pytest.approx(NOISE_STD, rel=0.25)
    assert task.model()(task.test[0]).shape == task.test[1].shape


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_task_is_its_seed(name: str) -> None:
    first, again, other = (load_task(name, seed=s) for s in (3, 3, 4))
    assert first.name == name
    assert same_data(first, again)
    assert not torch.equal(first.train[0], other.train[0])
    assert not torch.equal(first.train[1], other.train[1])


@pytest.mark.parametrize("name", BUILT_IN)
def test_training_and_test_examples_are_different_ones(name: str) -> None:
    task = load_task(name, seed=0)
    in_both = rows_of(task.train[0]) & rows_of(task.test[0])
    assert in_both == set()


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_all_of_scikit_learn_s(name: str) -> None:
    task = load_task(name, seed=0)
    data = cast(Any, load_digits())
    assert task.train[0].shape == (1000, 64)
    assert task.test[0].shape == (797, 64)
    own = torch.cat([task.train[0], task.test[0]])
    assert rows_of(own) == rows_of(torch.tensor(data.data / 16.0, dtype=torch.float32))
    assert task.clean is not None
    labels = torch.cat([task.clean, task.test[1]])
    assert labels.bincount().tolist() == torch.tensor(data.target).bincount().tolist()


@pytest.mark.parametrize("name", ["digits", "digits-cnn"])
@pytest.mark.parametrize("seed", [0, 7])
def test_exactly_two_fifths_of_the_digits_are_labelled_wrong(name: str, seed: int) -> None:
    task = load_task(name, seed=seed)
    assert task.clean is not None
    assert int((task.train[1] != task.clean).sum()) == 400


def test_the_share_of_wrong_digits_is_a_setting() -> None:
    task = load_task("digits", seed=0, noise=0.2)
    assert task.clean is not None
    assert int((task.train[1] != task.clean).sum()) == 200


def test_clean_digits_are_clean() -> None:
    task = load_task("digits-clean", seed=0)
    assert task.clean is not None
    assert torch.equal(task.train[1], task.clean)
    assert task.memorized(outputs_that_predict(task.clean, 10)) is None


def test_wrong_labels_are_spread_over_the_nine_other_classes() -> None:
    labels = torch.full((9000,), 4)
    noisy = flip_labels(labels, 1.0, torch.Generator().manual_seed(0))
    counts = noisy.bincount(minlength=10)
    assert counts[4] == 0
    others = counts[torch.arange(10) != 4].double()
    assert bool((others.sub(1000).abs() < 5 * 1000**0.5).all())
    assert torch.equal(labels, torch.full((9000,), 4))


@pytest.mark.parametrize(("name", "features"), LINEAR.items())
def test_linear_tasks_are_linear_with_the_stated_signal(name: str, features: int) -> None:
    task = load_task(name, seed=1)
    x = torch.cat([task.train[0], task.test[0]]).double()
    y = torch.cat([task.train[1], task.test[1]]).double()
    assert task.train[0].shape == (100, 200)
    assert task.test[0].shape == (2000, 200)
    w = torch.linalg.lstsq(x, y).solution
    residual = (y - x @ w).std() * (2100 / 1900) ** 0.5
    assert residual == pytest.approx(1.5, rel=0.05)
    noise_in_w = 200 * 1.5**2 / (2100 - 200)
    assert w.square().sum() - noise_in_w == pytest.approx(20.0, rel=0.05)
    assert task.clean is not None
    true = torch.linalg.lstsq(x[:100], task.clean.double()).solution
    assert (x[:100] @ true - task.clean).abs().max() < 1e-4
    large = int((w.abs() > 0.3).sum())
    assert large <= 5 if features == 5 else large > 50


@pytest.mark.parametrize("name", LINEAR)
def test_linear_tasks_know_their_noise(name: str) -> None:
    task = load_task(name, seed=2)
    assert task.clean is not None
    noise = task.train[1] - task.clean
    assert noise.std().item() == pytest.approx(1.5, rel=0.25)
    assert task.clean.var().item() == pytest.approx(20.0, rel=0.5)


def test_diabetes_is_standardized_on_its_training_rows_only() -> None:
    task = load_task("diabetes", seed=0)
    (x, y), (x_test, y_test) = task.train, task.test
    assert (len(x), len(x_test)) == (300, 142)
    for part in (x, y):
        assert part.mean(0).abs().max() < 1e-5
        assert (part.std(0) - 1).abs().max() < 1e-5
    assert x_test.mean(0).abs().max() > 0.02
    assert y_test.mean().abs() > 1e-3
    _, progression = load_diabetes(return_X_y=True, scaled=False)
    raw = torch.tensor(progression).sort().values
    own = torch.cat([y, y_test]).flatten().double().sort().values
    slope = (raw[-1] - raw[0]) / (own[-1] - own[0])
    assert ((own - own[0]) * slope + raw[0] - raw).abs().max() < 1e-2


@pytest.mark.parametrize("name", BUILT_IN)
def test_targets_and_outputs_have_one_shape_or_are_classes(name: str) -> None:
    task = load_task(name, seed=0)
    outputs = task.model().eval()(task.test[0][:3])
    if task.classification:  # of each layer where layers learn by themselves
        layers = (2,) if "-forward" in name else ()
        assert outputs.shape == (3, int(task.train[1].max()) + 1, *layers)
    else:
        assert outputs.shape == task.test[1][:3].shape


# --- metrics and memorization ---------------------------------------------------------------------


def test_accuracy_by_hand() -> None:
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0], [0.0, 0.5]])
    assert METRICS["accuracy"].function(outputs, torch.tensor([0, 1, 1, 1])) == 0.75


def test_mean_squared_error_by_hand() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert METRICS["mse"].function(outputs, targets) == 2.5
    assert not METRICS["mse"].higher_is_better


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (1,), (3,)])
def test_mean_squared_error_does_not_compare_all_with_all(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mse needs outputs and targets of one shape, but got"):
        METRICS["mse"].function(torch.zeros(shape), torch.zeros(4))


@pytest.mark.parametrize(("outputs", "targets"), [((4,), (4,)), ((4, 3), (4, 1)), ((4, 3), (3,))])
def test_accuracy_needs_a_score_for_each_class(
    outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"accuracy needs outputs of shape \(n, classes\)"):
        METRICS["accuracy"].function(torch.zeros(outputs), torch.zeros(targets))


def test_accuracy_of_pixels_counts_pixels() -> None:
    outputs = torch.zeros(2, 3, 4, 5)
    outputs[:, 1, :, 0] = 1.0
    targets = torch.zeros(2, 4, 5, dtype=torch.long)
    assert METRICS["accuracy"].function(outputs, targets) == 0.8


def test_memorized_classes_are_the_share_of_wrong_labels_predicted() -> None:
    task = tiny.tiny()
    assert task.clean is not None
    y = task.train[1]
    assert task.memorized(outputs_that_predict(y, 2)) == 1.0
    assert task.memorized(outputs_that_predict(task.clean, 2)) == 0.0
    predicted = task.clean.clone()
    wrong = (y != task.clean).nonzero().flatten()
    predicted[wrong[:3]] = y[wrong[:3]]
    assert task.memorized(outputs_that_predict(predicted, 2)) == 3 / 12
    right = (y == task.clean).nonzero().flatten()
    predicted[right] = 1 - predicted[right]
    assert task.memorized(outputs_that_predict(predicted, 2)) == 3 / 12


def test_memorized_numbers_are_the_share_of_the_noise_fitted() -> None:
    task = tiny.regression()
    assert task.clean is not None
    y, clean = task.train[1], task.clean
    assert task.memorized(y) == pytest.approx(1.0)
    assert task.memorized(clean) == 0.0
    assert task.memorized(clean + 0.25 * (y - clean)) == pytest.approx(0.25, abs=1e-6)
    assert task.memorized(clean - 0.5 * (y - clean)) == pytest.approx(-0.5, abs=1e-6)
    noise = (y - clean).flatten()
    orthogonal = torch.zeros_like(noise)
    orthogonal[0], orthogonal[1] = noise[1], -noise[0]
    assert task.memorized(clean + orthogonal.unsqueeze(1)) == pytest.approx(0.0, abs=1e-6)


def test_memorized_numbers_by_hand() -> None:
    task = replace(
        tiny.regression(),
        train=(torch.zeros(3, 4), torch.tensor([[1.0], [2.0], [3.0]])),
        clean=torch.tensor([[0.0], [2.0], [5.0]]),
        batch_size=2,
    )
    outputs = torch.tensor([[1.0], [9.0], [4.0]])  # noise (1, 0, -2), deviation (1, 7, -1)
    assert task.memorized(outputs) == pytest.approx((1 + 2) / 5)


def test_memorization_compares_example_with_example() -> None:
    """Outputs (n, 1) against targets (n,) would be subtracted all from all."""
    task = tiny.regression()
    x, y = task.train
    assert task.clean is not None
    flat = replace(
        task,
        train=(x, y[:, 0]),
        test=(task.test[0], task.test[1][:, 0]),
        clean=task.clean[:, 0],
        loss=first_column_error,
        metric=Metric("error", mean_first_column_error),
    )
    assert flat.memorized(y) == pytest.approx(1.0)
    assert flat.memorized(task.clean) == pytest.approx(0.0, abs=1e-6)


def test_nothing_is_memorized_where_no_noise_is_known() -> None:
    for task in (tiny.tiny(), tiny.regression()):
        assert replace(task, clean=None).memorized(task.train[1]) is None
        assert replace(task, clean=task.train[1]).memorized(task.train[1]) is None


# --- what a Task takes ----------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, int]]):
    """A data set as torchvision has them: a tensor and a class index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index)), index % 2


def test_a_data_set_of_pairs_is_read_in_order() -> None:
    task = replace(tiny.tiny(), train=Pairs(10), clean=None)
    x, y = task.train
    assert torch.equal(x[:], torch.arange(10.0).unsqueeze(1).expand(10, 4))
    assert torch.equal(y, torch.arange(10) % 2)
    assert task.classification


def test_torch_data_sets_are_taken() -> None:
    x, y = tiny.tiny().train
    whole = replace(tiny.tiny(), train=TensorDataset(x, y))
    assert same_data(whole, tiny.tiny())
    part = replace(tiny.tiny(), train=Subset(TensorDataset(x, y), range(5, 25)), clean=None)
    assert torch.equal(part.train[0][:], x[5:25])


def test_metrics_go_by_name_or_are_given() -> None:
    assert tiny.tiny().scored_by is METRICS["accuracy"]
    worst = Metric("worst error", worst_error, higher_is_better=False)
    assert replace(tiny.regression(), metric=worst).scored_by is worst


@pytest.mark.parametrize("task", [tiny.tiny(), tiny.regression()], ids=["classes", "numbers"])
def test_integers_are_classes(task: Task) -> None:
    assert task.classification == (task.name == "tiny")


NAN = torch.full((40, 4), float("nan"))
BAD_PARTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": 3}, TypeError, "model must be callable, but got 3"),
    ({"loss": None}, TypeError, "loss must be callable, but got None"),
    (
        {"model": lambda: torch.zeros(3)},
        TypeError,
        "model must be a function that returns a torch.nn.Module, but it returned Tensor",
    ),
    (
        {"model": tiny.network()},
        TypeError,
        "model must be a function that returns a torch.nn.Module, but got a Sequential",
    ),
    (
        {"loss": F.cross_entropy},
        ValueError,
        r"loss must give one value per example, shape \(40,\) for 40 examples, but gave \(\); "
        "pass reduction='none'",
    ),
    (
        {"loss": lambda outputs, targets: outputs},
        ValueError,
        r"loss must give one value per example.* but gave \(40, 2\)",
    ),
    (
        {"loss": lambda outputs, targets: 0.5},
        ValueError,
        "loss must give one value per example.* but gave float",
    ),
    (
        {"train": (NAN, torch.zeros(40, dtype=torch.long))},
        ValueError,
        "train inputs hold NaN or Inf; remove or impute",
    ),
    (
        {"test": (torch.zeros(2, 4), torch.tensor([0.0, float("inf")]))},
        ValueError,
        "test targets hold NaN or Inf",
    ),
    (
        {"train": (torch.zeros(40, 4), torch.zeros(39, dtype=torch.long))},
        ValueError,
        "train has 40 inputs but 39 targets; they must match",
    ),
    (
        {"test": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))},
        ValueError,
        r"test inputs must not be empty, but got shape \(0, 4\)",
    ),
    (
        {"train": (torch.zeros(40, 4), torch.tensor(1))},
        ValueError,
        r"train targets must not be empty, but got shape \(\)",
    ),
    (
        {"train": ([[0.0] * 4] * 40, torch.zeros(40))},
        TypeError,
        "train inputs must be a tensor or an array, but got list",
    ),
    (
        {"train": 7},
        TypeError,
        r"train must be a pair \(inputs, targets\) of tensors or a non-empty data set of such "
        "pairs, but got int",
    ),
    ({"test": Pairs(0)}, TypeError, "test must be a pair .* or a non-empty data set"),
    (
        {"train": TensorDataset(torch.zeros(40, 4))},
        TypeError,
        r"train\[0\] must be a pair \(input, target\), but got tuple",
    ),
    (
        {"clean": torch.zeros(40, 1)},
        ValueError,
        r"clean must have the shape of the training targets, \(40,\), but got \(40, 1\)",
    ),
    ({"clean": [0] * 40}, TypeError, "clean must be a tensor or an array, but got list"),
    (
        {"batch_size": 40},
        ValueError,
        "batch_size=40 must be smaller than the number of training examples, 40",
    ),
    ({"batch_size": 41}, ValueError, "batch_size=41 must be smaller"),
    ({"batch_size": 0}, ValueError, "batch_size must be positive, but got 0"),
    ({"batch_size": 8.0}, TypeError, "batch_size must be an integer, but got 8.0"),
    ({"batch_size": "8"}, TypeError, "batch_size must be an integer, but got '8'"),
    ({"epochs": 0}, ValueError, "epochs must be positive, but got 0"),
    ({"epochs": 2.5}, TypeError, "epochs must be an integer, but got 2.5"),
    ({"epochs": True}, TypeError, "epochs must be an integer, but got True"),
    ({"metric": "f2"}, ValueError, "metric must be one of 'accuracy', .*'mse', but got 'f2'"),
]


@pytest.mark.parametrize(("parts", "error", "message"), BAD_PARTS)
def test_a_wrong_part_is_refused_by_name(
    parts: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(tiny.tiny(), **parts)


# --- load_task ------------------------------------------------------------------------------------


@dataclass
class File:
    """A task file with what stands in it."""

    path: Path

    def write(self, text: str) -> str:
        self.path.write_text(text, encoding="utf-8")
        return f"{self.path}:make"


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "mine.py")


def test_a_task_from_a_file_gets_its_seed_and_settings() -> None:
    task = load_task(tiny.source("tiny"), seed=5, epochs=9)
    assert same_data(task, tiny.tiny(5))
    assert task.epochs == 9


def test_a_function_without_a_seed_is_called_without(file: File) -> None:
    name = file.write("import tiny\ndef make():\n    return tiny.tiny(11)\n")
    assert same_data(load_task(name, seed=3), tiny.tiny(11))


def test_a_task_file_may_define_data_classes(file: File) -> None:
    """Annotations that are strings are looked up in the module."""
    name = file.write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport tiny\n"
        "@dataclass\nclass Options:\n    seed: int = 4\n"
        "def make():\n    return tiny.tiny(Options().seed)\n"
    )
    assert same_data(load_task(name, seed=0), tiny.tiny(4))


def test_a_task_file_may_import_what_lies_beside_it(file: File) -> None:
    file.path.with_name("beside_it.py").write_text("SEED = 6\n", encoding="utf-8")
    name = file.write(
        "import tiny\nfrom beside_it import SEED\ndef make():\n    return tiny.tiny(SEED)\n"
    )
    assert same_data(load_task(name, seed=0), tiny.tiny(6))


def refused(name: str, **settings: Any) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(name, seed=0, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def contains(text: str, parts: Iterable[str]) -> bool:
    return all(part in text for part in parts)


@pytest.mark.parametrize("name", ["digit", "", "file"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    text = refused(name)
    assert contains(text, [repr(name), "file.py:function", *BUILT_IN])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"no file {tmp_path / 'gone.py'}" in refused(f"{tmp_path / 'gone.py'}:make")
    assert f"no file {tmp_path}" in refused(f"{tmp_path}:make")


def test_a_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text("1,2\n", encoding="utf-8")
    assert "data.csv is not a Python file" in refused(f"{table}:make")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def make(:\n", ["mine.py failed on import: SyntaxError"]),
        ("import no_such_module\n", ["failed on import", "ModuleNotFoundError", "no_such_module"]),
        ("def other(): ...\n", ["mine.py has no function 'make'"]),
        ("make = 3\n", ["mine.py has no function 'make'"]),
        ("def make(): return 'a task'\n", ["must return a poprisk.Task", "returned str"]),
        ("def make(): pass\n", ["must return a poprisk.Task", "returned NoneType"]),
        ("def make(): return 1 / 0\n", ["mine.py:make failed: ZeroDivisionError: division"]),
        ("def make(data): ...\n", ["mine.py:make failed: TypeError", "'data'"]),
        ("import sys\nsys.exit(0)\n", ["mine.py failed on import: SystemExit"]),
        ("import sys\ndef make(): sys.exit(0)\n", ["mine.py:make failed: SystemExit"]),
    ],
)
def test_a_file_that_gives_no_task_says_why(file: File, text: str, expected: list[str]) -> None:
    assert contains(refused(file.write(text)), expected)


def test_an_unknown_setting_lists_the_known_ones(file: File) -> None:
    text = refused("digits", nois=0.3)
    assert contains(text, ["digits", "'nois'", "it takes noise"])
    assert "it takes none" in refused("diabetes", noise=0.3)
    name = file.write("import tiny\ndef make(seed, a=1, b=2):\n    return tiny.tiny(seed)\n")
    assert "it takes a, b" in refused(name, c=3)


def test_a_setting_may_be_called_name(file: File) -> None:
    name = file.write("import tiny\ndef make(name='x'):\n    return tiny.tiny(len(name))\n")
    assert same_data(load_task(name, seed=0, **{"name": "abc"}), tiny.tiny(3))


def test_a_wrong_part_of_a_user_s_task_is_reported_with_its_message(file: File) -> None:
    name = file.write(
        "import tiny, dataclasses\n"
        "def make():\n    return dataclasses.replace(tiny.tiny(), batch_size=40)\n"
    )
    text = refused(name)
    assert contains(text, ["mine.py:make failed: ValueError: batch_size=40 must be smaller"])
