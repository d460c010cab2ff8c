"""A task takes data as people have them: arrays, frames, data sets, loaders; scores go by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from poprisk import Metric, Task
from poprisk.task import METRICS
from poprisk.task.data import TARGETS, as_data
from samplers import randn

N = 12
X = randn(N, 3).float()
Y = torch.arange(N) % 3

A = {"a": X[:, 0].numpy(), "b": X[:, 1].numpy(), "c": X[:, 2].numpy()}


def as_pair(name: str, data: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets, those of a data set read."""
    found = as_data(name, data)
    return found.inputs if isinstance(found.inputs, Tensor) else found.inputs[:], found.targets


class Dictionaries:
    """A map-style data set whose rows are dictionaries, as those of ``datasets``."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        values = (X[i].tolist(), int(Y[i]), 0)
        return dict(zip(self.columns, values, strict=False))


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.double().numpy(), Y.int().numpy()),
    "arrays of the other byte order": lambda: (
        X.double().numpy().astype(">f8"),
        Y.numpy().astype(">i4"),
    ),
    "arrays with gaps": lambda: (np.repeat(X.numpy(), 2, axis=1)[:, ::2], Y.numpy()),
    "pandas": lambda: (pd.DataFrame(A), pd.Series(Y.numpy())),
    "polars": lambda: (pl.DataFrame(A), pl.Series(Y.numpy())),
    "a data set": lambda: TensorDataset(X, Y),
    "rows of arrays": lambda: [
        (x, y) for x, y in zip(X.double().numpy(), Y.int().numpy(), strict=True)
    ],
    "dictionaries": lambda: Dictionaries("features", "label"),
    "a loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_tensors(form: str) -> None:
    x, y = as_pair("train", FORMS[form]())
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_tensors_stay_as_they_are() -> None:
    x, y = X.double(), Y.to(torch.int32)
    found = as_pair("train", (x, y))
    assert found[0] is x
    assert found[1] is y


def test_numbers_become_the_default_type() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        x, y = as_pair("train", (X.numpy(), pd.Series(X[:, 0].numpy())))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (x.dtype, y.dtype) == (torch.float64, torch.float64)


def test_a_loader_that_shuffles_keeps_pairs_together() -> None:
    x, y = as_pair("train", DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True))
    position = (x[:, None] == X).all(2).int().argmax(1)
    assert position.sort().values.tolist() == list(range(N))
    assert torch.equal(Y[position], y)


STRINGS = pd.DataFrame({"age": [1.0, 2.0], "city": ["Oslo", "Rome"]})

REFUSED: list[tuple[Any, type[Exception], str]] = [
    ((STRINGS, np.zeros(2)), TypeError, "train inputs must hold numbers, but got the columns city"),
    (
        (pl.DataFrame({"u": ["a"], "v": [1]}), np.zeros(1)),
        TypeError,
        "train inputs must hold numbers, but got the columns u; encode them first",
    ),
    (
        (np.zeros((2, 3)), np.array(["cat", "dog"])),
        TypeError,
        "train targets must hold numbers, but got <U3 values",
    ),
    (([1.0], np.zeros(1)), TypeError, "train inputs must be a tensor or an array, but got list"),
    (
        Dictionaries("features", "sex"),
        TypeError,
        rf"train\[0\] must have one column of inputs and one called {', '.join(TARGETS)}, but has "
        "'features', 'sex'; select and rename columns",
    ),
    (Dictionaries("features", "label", "id"), TypeError, "but has 'features', 'label', 'id'"),
    (
        [(X[0], "cat")],
        TypeError,
        r"train\[0\] must hold a tensor or numbers as target, but got str",
    ),
    (
        DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=2),
        ValueError,
        "train inputs must not be empty",
    ),
    ((np.array([[np.nan]]), np.zeros(1)), ValueError, "train inputs hold NaN or Inf"),
    ((X.numpy(), Y.numpy()[:5]), ValueError, "train has 12 inputs but 5 targets"),
]


@pytest.mark.parametrize(("data", "error", "message"), REFUSED)
def test_what_is_no_data_is_refused_by_name(
    data: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        as_pair("train", data)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def test_a_task_is_made_of_frames() -> None:
    frame = (pd.DataFrame(A), pd.Series(Y.numpy()))
    clean = pd.Series((Y.numpy() + 1) % 3)
    task = Task(
        "frames", lambda: nn.Linear(3, 3), loss, frame, frame, "f1", clean=clean, batch_size=4
    )
    assert isinstance(task.clean, Tensor)
    assert task.noise_known
    assert task.memorized(F.one_hot(Y, 3).float()) == 1.0
    assert "12 training" in repr(task)


def test_a_class_metric_needs_labels_that_the_model_knows() -> None:
    with pytest.raises(ValueError, match=r"train\[2\] has label 2, but model gives 2 classes"):
        Task("few", lambda: nn.Linear(3, 2), _clamped, (X, Y), (X, Y), "auc", batch_size=4)


def _clamped(outputs: Tensor, targets: Tensor) -> Tensor:
    return loss(outputs, targets.clamp(max=1))


# --- metrics --------------------------------------------------------------------------------------

SCORES = randn(200, 4, seed=3)
LABELS = torch.multinomial(torch.tensor([0.7, 0.2, 0.1, 0.0]), 200, replacement=True)


def value(name: str, outputs: Tensor, targets: Tensor) -> float:
    return METRICS[name].function(outputs, targets)


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    right = SCORES.argmax(1) == LABELS
    by_class = [right[c == LABELS].double().mean().item() for c in range(3)]
    assert value("balanced accuracy", SCORES, LABELS) == pytest.approx(sum(by_class) / 3)


def test_f1_is_the_mean_over_classes() -> None:
    predicted, labels, scores = SCORES.argmax(1), LABELS, list[float]()
    for c in range(4):  # no label is 3, but some rows are taken for it
        hits = int(((predicted == c) & (c == LABELS)).sum())
        scores.append(2 * hits / (int((predicted == c).sum()) + int((labels == c).sum())))
    assert value("f1", SCORES, LABELS) == pytest.approx(sum(scores) / 4)


def test_auc_is_the_chance_that_a_positive_scores_higher() -> None:
    binary = (LABELS > 0).long()
    margin = SCORES[:, 1] - SCORES[:, 0]
    higher = margin[binary == 1][:, None] > margin[binary == 0]
    assert value("auc", SCORES[:, :2], binary) == pytest.approx(higher.double().mean().item())


def test_auc_of_several_classes_is_that_of_scikit_learn_where_all_occur() -> None:
    present = LABELS < 3
    scores, labels = SCORES[present][:, :3], LABELS[present]
    expected = metrics.roc_auc_score(labels, scores.softmax(1), multi_class="ovr")
    assert value("auc", scores, labels) == pytest.approx(expected, rel=1e-9)


def test_auc_of_one_class_is_undefined() -> None:
    assert np.isnan(value("auc", SCORES, torch.zeros(200, dtype=torch.long)))


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.by_class])
def test_labels_that_are_no_class_are_left_out(name: str) -> None:
    ignored = LABELS.clone()
    ignored[::3] = -100
    kept = ignored >= 0
    expected = value(name, SCORES[kept], LABELS[kept])
    assert value(name, SCORES, ignored) == pytest.approx(expected)
    if name == "accuracy":  # positions of a sequence: classes in the second dimension
        pixels = SCORES.reshape(50, 4, 4).movedim(2, 1)
        assert value(name, pixels, ignored.reshape(50, 4)) == pytest.approx(expected)


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.by_class])
def test_a_class_metric_names_itself_where_shapes_do_not_fit(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs outputs of shape"):
        value(name, SCORES, SCORES)


def test_a_metric_of_ones_own_is_not_by_class() -> None:
    assert not Metric("mine", METRICS["mse"].function).by_class
