"""Audit with what is at hand after training: a model, a twin, outputs, or a way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from poprisk._validate import check_callable, check_number, check_range
from poprisk.audit.auditor import MAX_MEMORY, MEMORIZED, UNPLANTED
from poprisk.audit.items import Items
from poprisk.audit.judge import Audited, check_memory, judge, look_at
from poprisk.audit.planted import Labels, planted_labels
from poprisk.audit.result import AuditResult
from poprisk.evaluation import Forward, call, evaluating, outputs_of
from poprisk.losses import IGNORED
from poprisk.randomness import generator_of
from poprisk.risk.inputs import check_index
from poprisk.risk.twin import TwinRisk


class Outputs(NamedTuple):
    """Outputs for examples, and how they were made.

    Attributes:
        parts: index (b,) and outputs (b, ...) of each batch.
        trainings: beyond the audited one.
        in_sample: whether the examples' own labels were trained on.
        doubt: why they are not to be believed.
    """

    parts: list[tuple[Tensor, Tensor]]
    trainings: float
    in_sample: bool
    doubt: str = ""


def audit(
    source: Any,
    x: Any,
    y: Any,
    *,
    kind: str = "classes",
    folds: int | None = None,
    classes: int | None = None,
    structure: bool = True,
    limit: float = MEMORIZED,
    seed: int = 0,
    probabilities: bool = False,
    ignore_index: int = IGNORED,
    forward: Forward | None = None,
    batch_size: int = 1024,
    max_memory: float = MAX_MEMORY,
) -> AuditResult:
    r"""Find wrong labels with a trained model, or by training on parts of the data.

    Args:
        source: a model, which was trained on these labels; a :class:`poprisk.TwinRisk`, whose
            leave-one-out outputs are used; outputs (n, ...), x being None; or with ``folds`` a
            function from training inputs and targets to a model or function of inputs.
        x: inputs (n, ...), indexable by a slice; or a ``DataLoader`` that does not shuffle, or
            whose batches end with the positions of their examples.
        y: all training labels, as for :class:`poprisk.Auditor`; or the :class:`poprisk.Canaries`
            made of them whose targets were trained on. Only these can certify a model's own
            outputs.
        kind: as for :class:`poprisk.Auditor`.
        folds: train that many times, each without a part of the examples, which the outputs are of:
            for hard data, where a run on everything knows too little to be sure.
        classes: number of classes; counted if left out.
        structure: False leaves the noise matrix out.
        limit: memorization from which a model's own outputs are not believed.
        seed: of the folds.
        probabilities: whether outputs are probabilities; logits by default.
        ignore_index: the label that stands for none.
        forward: from a model and an input batch to outputs; ``model(x)`` if left out.
        batch_size: examples per forward pass.
        max_memory: bytes that predictions may take, and likewise the noise matrix.

    Raises:
        TypeError, ValueError: for a bad argument, or data that do not fit each other.

    Example:
        >>> outputs = 9.0 * torch.eye(4)[torch.arange(100) % 4]
        >>> labels = (torch.arange(100) % 4).index_fill(0, torch.tensor([7]), 0)
        >>> audit(outputs, None, labels).suspects()
        array([7])
    """
    check_number("limit", limit, low=0.0, include_low=False)
    check_range("batch_size", batch_size, 1)
    labels = planted_labels(y, kind=kind, classes=classes, ignore_index=ignore_index)
    kept = 4 * len(labels.items.labels) * labels.items.width
    check_memory(kept, labels.items.classes, structure=structure, max_memory=max_memory)
    if folds is not None:
        found = _out_of_fold(source, x, labels, folds=folds, seed=seed, forward=forward)
    elif isinstance(source, TwinRisk):
        found = _left_out(source, x, labels.targets, batch_size)
    elif isinstance(source, nn.Module):
        with evaluating(source):
            parts = list(_outputs(source, x, len(labels.targets), forward or call, batch_size))
        found = Outputs(parts, 0.0, True)
    elif isinstance(source, Tensor):
        found = Outputs([(torch.arange(len(labels.targets)), source)], 0.0, True)
    else:
        raise TypeError(
            "source must be a module, a TwinRisk or a tensor of outputs, or with folds a function, "
            f"but got {type(source).__name__}."
        )
    predictions, seen, bad = _read(labels, found, probabilities=probabilities)
    return judge(
        labels.items,
        _audited(labels, predictions, seen, bad),
        labels.planted,
        structure=structure,
        # Predictions that did not see a label cannot have memorized it.
        limit=limit if found.in_sample else float("inf"),
        uncertified=UNPLANTED if found.in_sample else "",
        in_sample=found.in_sample,
        cost=found.trainings,
        doubt=found.doubt,
    )


def _read(labels: Labels, found: Outputs, *, probabilities: bool) -> tuple[Tensor, Tensor, int]:
    items = labels.items
    predictions = torch.zeros(len(items.labels), items.width)
    seen = torch.zeros(len(items.labels), dtype=torch.bool)
    bad = 0
    for index, outputs in found.parts:
        index = check_index(index, len(labels.targets))
        rows, p = items.read(
            index,
            outputs,
            labels.targets[index.cpu()],
            labels.targets,
            probabilities=probabilities,
        )
        finite = p.isfinite().all(1)
        bad += int((~finite).sum())
        predictions[rows[finite]] = p[finite]
        seen[rows[finite]] = True
    return predictions, seen, bad


def _audited(labels: Labels, predictions: Tensor, seen: Tensor, bad: int) -> Audited:
    memorization = None
    if labels.planted is not None:
        memorization = labels.planted.memorization(predictions, seen)
    look = look_at(labels.items, predictions, seen.nonzero().squeeze(1), memorization, number=1)
    history = torch.zeros(len(seen), 0, dtype=torch.float16)
    return Audited(predictions, seen, history, (), (look,), bad)


def _outputs(
    model: nn.Module, x: Any, n: int, forward: Forward, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Index and outputs of each batch."""
    if not isinstance(x, DataLoader):
        if len(x) != n:
            raise ValueError(f"x has {len(x)} examples, but y has {n}.")
        for start in range(0, n, batch_size):
            index = torch.arange(start, min(start + batch_size, n))
            yield index, outputs_of(model, x[start : start + batch_size], forward)
        return
    ordered = isinstance(x.sampler, SequentialSampler)
    start, seen = 0, torch.zeros(n, dtype=torch.bool)
    for batch in x:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                "batches of the DataLoader must be tuples (inputs, targets) or (inputs, ..., "
                f"positions of the examples), but one is a {type(batch).__name__}."
            )
        if len(batch) < 3 and not ordered:
            raise ValueError(
                "the DataLoader shuffles, and its batches do not say which examples they hold: "
                "pass one with shuffle=False, or data from Auditor.dataset()."
            )
        index = batch[-1] if len(batch) > 2 else torch.arange(start, start + len(batch[1]))
        start += len(batch[1])
        index = check_index(index, n).cpu()
        if bool(seen[index].any()) or len(index.unique()) < len(index):
            raise ValueError(
                "the last part of the DataLoader's batches must be the positions of their "
                "examples, but some come again."
            )
        seen[index] = True
        yield index, outputs_of(model, batch[0], forward)


def _left_out(twin: TwinRisk, x: Any, targets: Tensor, batch_size: int) -> Outputs:
    """Leave-one-out outputs, from the response to perturbed labels."""
    if twin.leave_out is not None:
        raise ValueError(
            "a TwinRisk with leave_out pushes no labels and has no leave-one-out outputs; audit by "
            "one that does, or by its model."
        )
    found = twin.estimate(x, targets.to(_device_of(x)), batch_size=batch_size)
    doubt = "" if found.valid else f"the twin's estimate is not valid: {found.reason}"
    index = torch.arange(len(targets))
    return Outputs([(index, found.outputs)], found.cost, False, doubt)


def _device_of(x: Any) -> torch.device:
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _out_of_fold(
    train: Callable[[Any, Tensor], Callable[[Any], Tensor]],
    x: Any,
    labels: Labels,
    *,
    folds: int,
    seed: int,
    forward: Forward | None,
) -> Outputs:
    """Outputs for each part of the examples by a model that was trained on the others."""
    check_callable("source", train)
    n = len(labels.targets)
    check_range("folds", folds, 2, n)
    if len(x) != n:
        raise ValueError(f"x has {len(x)} examples, but y has {n}.")
    part = fold_of(labels.items, folds, seed)
    labelled = torch.zeros(n, dtype=torch.bool)
    labelled[labels.items.example[labels.items.labelled]] = True
    found = []
    for k in range(folds):
        inside = ((part != k) & labelled).nonzero().squeeze(1)
        outside = (part == k).nonzero().squeeze(1)
        model = train(_rows(x, inside), labels.targets[inside].to(_device_of(x)))
        check_callable("what source returns", model)
        if isinstance(model, nn.Module):
            with evaluating(model):
                outputs = outputs_of(model, _rows(x, outside), forward or call)
        else:
            outputs = torch.as_tensor(model(_rows(x, outside)))
        found.append((outside, outputs))
    # Each of k trainings sees (k-1)/k of the data.
    return Outputs(found, float(folds - 1), False)


def fold_of(items: Items, folds: int, seed: int) -> Tensor:
    """Which fold an example is in, (n,): as many of each class as goes."""
    n = len(items.targets)
    order = torch.randperm(n, generator=generator_of(seed, "folds"))
    if items.classes is not None:
        first = torch.full((n,), -1, dtype=torch.long)
        single = items.position == 0
        first[items.example[single]] = items.labels[single]
        order = order[first[order].argsort(stable=True)]
    part = torch.empty(n, dtype=torch.long)
    part[order] = torch.arange(n) % folds
    return part


def _rows(x: Any, index: Tensor) -> Any:
    return x[index.numpy()] if isinstance(x, np.ndarray) else x[index]
