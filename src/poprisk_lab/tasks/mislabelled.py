"""Data that packages ship, with labels made wrong in four ways, and rows with right ones for tests.

Digits as numbers and as pictures, two tables that were measured and one that is drawn, docstrings
of the standard library, and signals of ``mnist1d``.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poprisk._validate import check_choice, check_number

Integers = NDArray[np.int64]
Arrays = tuple[NDArray[Any], Integers]
"""Inputs (n, ...) and classes (n,)."""

WEAK_SHARE = 0.1
"""Share of the examples that the weak model of instance-dependent noise learns from."""
PACKAGES = "asyncio email importlib logging multiprocessing turtle.py unittest xml".split()
"""Parts of the standard library whose docstrings are told apart."""
DOCSTRINGS, WORDS, FEATURES = 150, 6, 1_000


class Mislabelled(NamedTuple):
    """Training data of which some labels are wrong, and test data with right ones.

    Attributes:
        x: inputs (n, ...), float32, or pictures (n, 1, height, width) uint8.
        given: labels to train on (n,), int64.
        true: right ones (n,).
        x_test: as ``x``.
        y_test: right labels.
        classes: how many.
    """

    x: Tensor
    given: Tensor
    true: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def wrong(self) -> Tensor:
        """Which labels are wrong, (n,) boolean."""
        return self.given != self.true


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.data / 16, data.target


def _pictures() -> Arrays:
    x, y = _digits()
    return (16 * x).astype(np.uint8).reshape(-1, 1, 8, 8), y


def _measured(name: str) -> Arrays:
    """A table that scikit-learn ships."""
    from sklearn import datasets

    data: Any = getattr(datasets, f"load_{name}")()
    return _standardized(data.data, data.target)


def _drawn() -> Arrays:
    from sklearn.datasets import make_classification

    return _standardized(*make_classification(
        2_500, n_features=20, n_informative=10, n_redundant=4, n_classes=5, class_sep=1.5,
        flip_y=0.0, random_state=0,
    ))  # fmt: skip


@cache  # parsing takes seconds
def _docstrings() -> Arrays:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, y = list[str](), list[int]()
    for label, package in enumerate(PACKAGES):
        found = list(dict.fromkeys(docstrings(package)))[:DOCSTRINGS]
        texts += found
        y += [label] * len(found)
    words = TfidfVectorizer(max_features=FEATURES, sublinear_tf=True, stop_words="english")
    # Rows of length one are small numbers: brought to a mean square of about one.
    counts: Any = words.fit_transform(texts)
    return counts.toarray() * FEATURES**0.5, np.array(y)


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of six words and more in a file or package of the standard library."""
    path = Path(sysconfig.get_paths()["stdlib"]) / package
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield from (text for text in found if text and len(text.split()) >= WORDS)


@cache
def _signals() -> Arrays:
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())
    return np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]])


def _standardized(x: NDArray[Any], y: Integers) -> Arrays:
    return (x - x.mean(0)) / x.std(0), y


class _Source(NamedTuple):
    load: Callable[[], Arrays]
    training: int


SOURCES = {
    "digits": _Source(_digits, 1_000),
    "pictures": _Source(_pictures, 500),
    "cancer": _Source(partial(_measured, "breast_cancer"), 400),
    "wine": _Source(partial(_measured, "wine"), 120),
    "drawn": _Source(_drawn, 1_500),
    "docstrings": _Source(_docstrings, 800),
    "mnist1d": _Source(_signals, 2_000),
}
"""The data by name, and how many rows of each are for training."""
NOISES = ("random", "pairs", "weak")


def mislabelled(data: str, noise: str, rate: float, *, seed: int) -> Mislabelled:
    """Draw training rows and make some of their labels wrong.

    Args:
        data: one of :data:`SOURCES`; ``mnist1d`` needs the package of that name.
        noise: ``random``: another class, all alike; ``pairs``: the class after it, and of two
            classes only the second into the first; ``weak``: where a model that has learned little
            is likely to err, and what it then says.
        rate: share of the labels, of ``pairs`` of two classes that of the second one's.
        seed: of the rows and the noise.

    Raises:
        TypeError, ValueError: for a bad argument.
    """
    check_choice("data", data, tuple(SOURCES))
    check_choice("noise", noise, NOISES)
    check_number("rate", rate, low=0.0, high=1.0)
    rng = np.random.default_rng(seed)
    inputs, labels = SOURCES[data].load()
    order = rng.permutation(len(labels))
    train, test = np.split(order, [SOURCES[data].training])
    y, classes = labels[train].astype(np.int64), int(labels.max()) + 1
    if noise == "weak":
        wrong, other = where_a_weak_model_errs(inputs[train], y, rate, rng)
    else:
        may = np.flatnonzero(y == 1) if noise == "pairs" and classes == 2 else np.arange(len(y))
        wrong = rng.choice(may, round(rate * len(may)), replace=False)
        step = rng.integers(1, classes, len(wrong)) if noise == "random" else 1
        other = (y[wrong] + step) % classes
    given = y.copy()
    given[wrong] = other
    x = torch.from_numpy(inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32))
    return Mislabelled(
        x[train],
        torch.from_numpy(given),
        torch.from_numpy(y),
        x[test],
        torch.from_numpy(labels[test].astype(np.int64)),
        classes,
    )


def where_a_weak_model_errs(
    x: NDArray[Any], y: Integers, rate: float, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    """Which labels become wrong, ``round(rate·n)`` of them, and what they become.

    The model is a logistic regression on a tenth of the rows. A label is drawn in proportion to the
    probability of the likeliest wrong class, which it becomes.

    Args:
        x: inputs (n, ...).
        y: right labels (n,).
        rate: share that becomes wrong.
        rng: draws the rows and the labels.
    """
    from sklearn.linear_model import LogisticRegression

    flat = x.reshape(len(x), -1).astype(np.float64)
    flat = flat / max(1e-12, float(flat.std()))
    # Three rows of each class, so that it knows them all.
    few = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:3] for c in np.unique(y)])
    few = np.union1d(few, rng.permutation(len(y))[: round(WEAK_SHARE * len(y))])
    model = LogisticRegression(C=0.1, max_iter=300).fit(flat[few], y[few])
    p = model.predict_proba(flat)
    p[np.arange(len(y)), np.searchsorted(model.classes_, y)] = 0.0
    likeliest = p.max(1)
    wrong = rng.choice(len(y), round(rate * len(y)), replace=False, p=likeliest / likeliest.sum())
    return wrong, model.classes_[p[wrong].argmax(1)].astype(np.int64)
