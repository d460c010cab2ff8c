"""Numbers that say how good outputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from poprisk.printing import short_repr


class Metric(NamedTuple):
    """A number that says how good outputs are.

    Attributes:
        name: as shown in tables.
        function: from outputs and targets of a whole data set to a float.
        higher_is_better: whether more is better.
        percent: whether tables show it in percent and differences in points.
        by_class: whether outputs (n, classes, ...) are scored against class indices (n, ...).
    """

    name: str
    function: Callable[[Tensor, Tensor], float]
    higher_is_better: bool = True
    percent: bool = False
    by_class: bool = False

    __repr__ = short_repr


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows of ``outputs`` (n, c, ...) whose largest entry is at ``targets`` (n, ...).

    Labels that are no class (-100, or another ``ignore_index`` outside of 0..c-1) stand for none:
    they count neither as right nor as wrong. NaN if there is no other.
    """
    scores, labels = _labelled("accuracy", outputs, targets)
    return (scores.argmax(1) == labels).double().mean().item()


def balanced_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the share of each that is predicted right.

    Labels that are no class are left out.
    """
    scores, labels = _labelled("balanced accuracy", outputs, targets)
    occurring = labels.unique().tolist()
    return _of_sklearn("recall_score", labels, scores.argmax(1), labels=occurring, average="macro")


def macro_f1(outputs: Tensor, targets: Tensor) -> float:
    """Mean over classes of the harmonic mean of precision and recall.

    Over classes that occur or are predicted; one that never is right counts 0. Labels that are no
    class are left out.
    """
    scores, labels = _labelled("f1", outputs, targets)
    return _of_sklearn("f1_score", labels, scores.argmax(1), average="macro", zero_division=0)


def auc(outputs: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve of class scores; for several classes the mean of one against rest.

    Unweighted, over the classes that occur; the scores are the outputs' softmax. Labels that are
    no class are left out; NaN if fewer than two classes occur.
    """
    scores, labels = _labelled("auc", outputs, targets)
    chances, occurring = scores.double().softmax(1), labels.unique()
    if len(occurring) < 2:
        return float("nan")
    if scores.shape[1] == 2:
        return _of_sklearn("roc_auc_score", labels, chances[:, 1])
    areas = [_of_sklearn("roc_auc_score", labels == c, chances[:, int(c)]) for c in occurring]
    return sum(areas) / len(areas)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> float:
    """Mean of the squared difference; both of one shape, NaN targets are masked."""
    if outputs.shape != targets.shape:
        raise ValueError(
            f"mse needs outputs and targets of one shape, but got {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}; torch would compare all with all."
        )
    return (outputs - targets)[~targets.isnan()].double().square().mean().item()


METRICS = {
    "accuracy": Metric("accuracy", accuracy, percent=True, by_class=True),
    "balanced accuracy": Metric(
        "balanced accuracy", balanced_accuracy, percent=True, by_class=True
    ),
    "f1": Metric("macro F1", macro_f1, by_class=True),
    "auc": Metric("ROC AUC", auc, by_class=True),
    "mse": Metric("mean squared error", mean_squared_error, higher_is_better=False),
}


def _labelled(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores (m, c) and class indices (m,) of what has a label."""
    if outputs.ndim < 2 or outputs[:, 0].shape != targets.shape:
        raise ValueError(
            f"{name} needs outputs of shape (n, classes) and targets of shape (n,), but got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}; give another metric=Metric(...)."
        )
    labelled = (targets >= 0) & (targets < outputs.shape[1])
    return outputs.movedim(1, -1)[labelled], targets[labelled]


def _of_sklearn(function: str, true: Tensor, predicted: Tensor, **settings: Any) -> float:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(
            "this metric needs scikit-learn: pip install 'poprisk[lab]', or give a "
            "metric=Metric(...) of your own."
        ) from error
    given = (t.detach().cpu().numpy() for t in (true, predicted))
    return float(getattr(metrics, function)(*given, **settings))
