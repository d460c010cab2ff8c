"""Ways to find wrong labels: a run's own predictions, and those of models that did not see them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poprisk import Auditor, Canaries, audit
from poprisk.audit import AuditResult
from poprisk_lab.arms import Arm, build_optimizer
from poprisk_lab.audit.nets import TrainingRecipe, build
from poprisk_lab.audit.training import batches
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.tasks.mislabelled import Mislabelled

Mask = NDArray[np.bool_]

ADAMW = Arm("adamw", "AdamW", "adamw", "adamw", {"lr": 1e-3, "weight_decay": 0.01})
RUNS: dict[str, Arm] = {
    "gate": Arm("gate", "PopRiskAdamW", "poprisk", "poprisk"),
    "adamw": ADAMW,
    "slow": Arm("slow", "slow AdamW", "adamw", "adamw", {"lr": 3e-4, "weight_decay": 1.0}),
    "shuffled": Arm("shuffled", "shuffled mask", "shuffled", "shuffled"),
}
"""Optimizers whose runs are audited."""
FOLD_RATES = (1e-3, 3e-4)
"""Learning rates among which each fold picks, by the loss on what it holds out."""
HELD_OUT, PATIENCE = 0.2, 10
PLANT, ANY = 0.05, 1e9
"""Share of labels planted wrong in a run, and the memorization that lets every look count."""
SETS = {"f1": "prune_by_noise_rate", "f1_argmax": "predicted_neq_given"}
"""Cleanlab's default filter, and its simplest one, by the key of their F1."""


def trained(
    x: Tensor,
    labels: Tensor,
    classes: int,
    arm: Arm,
    recipe: TrainingRecipe,
    *,
    seed: int,
    auditors: Sequence[Auditor] = (),
) -> nn.Module:
    """A network trained to the end, with auditors looking on.

    Args:
        x: inputs (n, ...).
        labels: to train on (n,).
        classes: how many there are.
        arm: its optimizer.
        recipe: network and training.
        seed: of weights and order.
        auditors: whose targets are the labels.
    """
    model = build(recipe, x, classes, seed)
    optimizer = build_optimizer(arm, model, batch_size=recipe.batch_size, dataset_size=len(x))
    for _ in _epochs(model, optimizer, (x, labels), recipe, seed=seed, auditors=auditors):
        pass
    return model


def _epochs(
    model: nn.Module,
    optimizer: Optimizer,
    data: tuple[Tensor, Tensor],
    recipe: TrainingRecipe,
    *,
    seed: int,
    auditors: Sequence[Auditor] = (),
) -> Iterator[int]:
    """Train, auditors looking on, and say after each epoch how many are done."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, recipe.epochs + 1):
        for index in batches(torch.randperm(len(x), generator=generator), recipe.batch_size):
            outputs = model(x[index])
            for auditor in auditors:
                auditor.update(index, outputs, y[index])
            optimizer.zero_grad()
            F.cross_entropy(outputs, y[index]).backward()
            optimizer.step()
        yield epoch


class StoppedEarly:
    """Trains AdamW on given labels, rate and epochs picked by the loss on a part held out.

    Then it trains anew on everything, so that nothing is lost by holding out.

    Args:
        classes: how many there are.
        recipe: network and training.
        seed: of weights, order and what is held out.

    Attributes:
        seen: examples that were passed through in training, over all calls.
    """

    def __init__(self, classes: int, recipe: TrainingRecipe, *, seed: int) -> None:
        self.classes, self.recipe, self.seed = classes, recipe, seed
        self.seen = 0

    def __call__(self, x: Tensor, y: Tensor) -> nn.Module:
        """The model for (x, y)."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        held, rest = order.split([round(HELD_OUT * len(x)), len(x) - round(HELD_OUT * len(x))])
        found = [(*self._least(x, y, held, rest, lr), lr) for lr in FOLD_RATES]
        _, epochs, lr = min(found)
        model = build(self.recipe, x, self.classes, self.seed)
        for _ in self._trained(model, x, y, lr, epochs):
            self.seen += len(x)
        return model

    def _least(
        self, x: Tensor, y: Tensor, held: Tensor, rest: Tensor, lr: float
    ) -> tuple[float, int]:
        """The least loss on what is held out, and after how many epochs it was reached."""
        model = build(self.recipe, x, self.classes, self.seed)
        best, at = math.inf, 0
        for epoch in self._trained(model, x[rest], y[rest], lr, self.recipe.epochs):
            self.seen += len(rest)
            with torch.no_grad():  # the nets of an audit are the same in training and evaluation
                loss = float(F.cross_entropy(model(x[held]), y[held]))
            if loss < best:
                best, at = loss, epoch
            if epoch - at >= PATIENCE:
                break
        return best, at

    def _trained(
        self, model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int
    ) -> Iterator[int]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
        recipe = self.recipe._replace(epochs=epochs)
        return _epochs(model, optimizer, (x, y), recipe, seed=self.seed)


def out_of_fold(
    data: Mislabelled, recipe: TrainingRecipe, *, folds: int, seed: int
) -> tuple[AuditResult, float]:
    """Our score on predictions for each part by a model of the others, and what they took.

    The second is in trainings: passes over the data, relative to one whole run of the recipe.
    """
    train = StoppedEarly(data.classes, recipe, seed=seed)
    found = audit(train, data.x, data.given, folds=folds, classes=data.classes, seed=seed)
    return found, train.seen / (recipe.epochs * len(data.x))


def cleanlab_scores(found: AuditResult, wrong: Mask) -> tuple[Metrics, Mask]:
    """What cleanlab makes of predictions: ranking by margin, F1 of its sets, the first set.

    Args:
        found: whose predictions and given labels it takes.
        wrong: which labels are (n,).
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import average_precision_score, f1_score

    p, y = found.pred_probs, found.labels
    quality = get_label_quality_scores(y, p, method="normalized_margin")
    sets = {
        key: np.asarray(find_label_issues(y, p, filter_by=name, n_jobs=1))
        for key, name in SETS.items()
    }
    return {
        "ap": float(average_precision_score(wrong, -quality)),
        **{k: float(f1_score(wrong, flags, zero_division=0)) for k, flags in sets.items()},
        "share_error": float(sets["f1"].mean() - wrong.mean()),
    }, sets["f1"]


def scores(found: AuditResult, wrong: Mask) -> Metrics:
    """How well an audit found what is wrong, and how well it knew.

    Args:
        found: the audit.
        wrong: which labels are (n,).

    Returns:
        ``ap``: average precision of the ranking; ``f1`` of the suspects; ``share_error``: estimated
        minus true share of wrong labels; ``recall_error``: recall of planted minus of wrong labels,
        None without any; ``valid``: whether the audit says that it may be believed.
    """
    from sklearn.metrics import average_precision_score, f1_score

    recall = found.recall if found.recall is not None and found.recall.valid else None
    return {
        "ap": float(average_precision_score(wrong, -found.margin)),
        "f1": float(f1_score(wrong, found.suspect, zero_division=0)),
        "share_error": found.wrong_share.value - float(wrong.mean()),
        "recall_error": recall and recall.value - float(found.suspect[wrong].mean()),
        "valid": found.valid,
    }


def accuracy_after(
    data: Mislabelled, recipe: TrainingRecipe, *, keep: Any, labels: Any, seed: int
) -> float:
    """Test accuracy of AdamW, retrained on some of the examples.

    Args:
        data: the test data are right.
        recipe: network and training.
        keep: which examples, (n,) boolean.
        labels: of all examples (n,).
        seed: of weights and order.
    """
    rows = torch.as_tensor(keep)
    y = torch.as_tensor(labels)[rows].long()
    model = trained(data.x[rows], y, data.classes, ADAMW, recipe, seed=seed)
    with torch.no_grad():
        return float((model(data.x_test).argmax(1) == data.y_test).double().mean())


def by_own_predictions(
    data: Mislabelled, recipe: TrainingRecipe, way: str, *, seed: int
) -> Metrics:
    """One run of an optimizer of :data:`RUNS`, audited in several ways.

    Returns:
        ``methods``: their :func:`scores` and ``trainings``; ``accuracy``: of AdamW retrained, after
        the gate without the suspects and with them corrected, after AdamW with all labels and
        without those that are wrong.
    """
    wrong, given = data.wrong.numpy(), data.given
    canaries = Canaries(given, fraction=PLANT, classes=data.classes, seed=seed)
    usual, whole = Auditor(canaries), Auditor(canaries, limit=ANY, structure=False)
    trained(
        data.x,
        usual.targets,
        data.classes,
        RUNS[way],
        recipe,
        seed=seed,
        auditors=(usual, whole),
    )
    found = usual.result()
    methods, accuracy = {way: scores(found, wrong)}, dict[str, float]()
    after = partial(accuracy_after, data, recipe, seed=seed)
    if way == "gate":
        again = partial(audit, x=None, y=canaries, probabilities=True)
        plain = again(torch.from_numpy(found.predictions), structure=False)
        end = again(torch.from_numpy(whole.result(average=False).predictions))
        methods |= {"gate-plain": scores(plain, wrong), "gate-end": scores(end, wrong)}
        accuracy["dropped"] = after(keep=~found.suspect, labels=given)
        accuracy["corrected"] = after(keep=found.labelled, labels=found.suggested)
    if way == "adamw":
        methods["adamw-averaged"] = scores(whole.result(), wrong)
        methods["adamw-end"] = scores(whole.result(average=False), wrong)
        accuracy["nothing"] = after(keep=found.labelled, labels=given)
        accuracy["all wrong ones"] = after(keep=~wrong, labels=given)
    costed = {name: {**m, "trainings": 1.0} for name, m in methods.items()}
    return {"methods": costed, "accuracy": accuracy}


def by_folds(data: Mislabelled, recipe: TrainingRecipe, folds: int, *, seed: int) -> Metrics:
    """Cleanlab's scores and ours on out-of-fold predictions; likewise, its default set dropped."""
    wrong = data.wrong.numpy()
    found, cost = out_of_fold(data, recipe, folds=folds, seed=seed)
    theirs, flagged = cleanlab_scores(found, wrong)
    methods = {f"folds-{folds}": scores(found, wrong), f"cleanlab-{folds}": theirs}
    accuracy = accuracy_after(data, recipe, keep=~flagged, labels=data.given, seed=seed)
    return {
        "methods": {name: {**m, "trainings": cost} for name, m in methods.items()},
        "accuracy": {f"cleanlab-{folds}": accuracy},
    }
