"""An audit as a study: one training, or K on parts of the data, whose predictions are judged."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk import Canaries
from poprisk.audit import Auditor, AuditResult, Rate, audit
from poprisk.audit.items import items_of
from poprisk.audit.trained import fold_of
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.memorized import ModuleShares, by_class
from poprisk_lab.audit.plan import FIT, AuditPlan
from poprisk_lab.audit.training import Training
from poprisk_lab.checkpoint import Workspace, load_checkpoint
from poprisk_lab.runner import OnRow, run_trials
from poprisk_lab.store import Row, RunDirectoryError, Store, end_of
from poprisk_lab.study import Settings
from poprisk_lab.work import torch_threads


class Judgement(NamedTuple):
    """What an audit has found.

    Attributes:
        result: of the labels.
        epochs: a row an epoch: of several trainings their means.
        classes: memorization of the planted labels by class; empty with folds.
        modules: what :meth:`ModuleShares.found` says of them; None with folds.
    """

    result: AuditResult
    epochs: list[Row]
    classes: dict[int, Rate]
    modules: dict[str, Any] | None


def run_audit(examples: AuditExamples, plan: AuditPlan, store: Store, on_row: OnRow) -> Judgement:
    """Train, or go on with it, and judge the labels.

    Args:
        examples: what is audited.
        plan: how.
        store: of a directory that has been created for the plan.
        on_row: told of every epoch.

    Raises:
        TrainingError, RunDirectoryError: as :func:`poprisk_lab.runner.run_trials`.
    """
    run = partial(fit_fold if plan.folds else fit, plan, examples.inputs, examples.targets)
    with torch_threads(plan.threads):  # in this process: another one would hold the data again
        run_trials(plan.trials, run, store, workers=0, on_row=on_row)
    return read_audit(plan, examples.targets, store)


def read_audit(plan: AuditPlan, targets: Tensor, store: Store) -> Judgement:
    """Judge the labels by trainings that have ended, as :func:`run_audit`.

    Raises:
        RunDirectoryError: if one has not, or another version judged by other settings.
    """
    names = [trial.name for trial in plan.trials]
    rows, products = store.rows(names), [store.product(name) for name in names]
    ended = sum(end_of(rows[name]) is not None for name in names)
    if ended < len(names) or None in products:
        raise RunDirectoryError(
            f"{store.path} holds {ended} of {len(names)} trainings; repeat its poprisk audit "
            "command to go on."
        )
    kept = [load_checkpoint(product) for product in products if product is not None]
    classes, modules = dict[int, Rate](), None
    if plan.folds:
        result = _judged_folds(plan, targets, kept)
    else:
        auditor = make_auditor(plan, targets)
        try:
            auditor.load_state_dict(kept[0]["auditor"])
        except ValueError as error:
            raise RunDirectoryError(
                f"{store.path} is of another version ({str(error).rstrip('.')}); repeat its "
                "poprisk audit command with --fresh."
            ) from error
        result = auditor.result()
        classes = by_class(auditor, result)
        modules = (end_of(rows[FIT]) or {}).get("modules")
    by_epoch: dict[int, dict[str, Row]] = {}
    for name in names:
        for row in rows[name]:
            if row["event"] == "epoch":
                by_epoch.setdefault(row["epoch"], {})[name] = row
    epochs = [_mean_row([*by_epoch[epoch].values()]) for epoch in sorted(by_epoch)]
    return Judgement(result, epochs, classes, modules)


def _mean_row(rows: Sequence[Row]) -> Row:
    """One epoch of several trainings."""
    means = {
        key: None if rows[0][key] is None else statistics.mean(row[key] for row in rows)
        for key in ("loss", "agreement", "memorization")
    }
    return {**rows[0], **means}


def make_auditor(plan: AuditPlan, targets: Tensor) -> Auditor:
    """The auditor of a plan, labels planted."""
    return Auditor(
        targets,
        kind=plan.kind,
        plant=plan.plant,
        classes=_classes(plan),
        structure=plan.structure,
        seed=plan.seed,
    )


def _classes(plan: AuditPlan) -> int | None:
    return plan.outputs if plan.kind == "classes" else None


def fit(
    plan: AuditPlan, inputs: Tensor, targets: Tensor, settings: Settings, workspace: Workspace
) -> Iterator[Row]:
    """Train the network of a plan and let an auditor look on; a row an epoch."""
    auditor = make_auditor(plan, targets)
    labelled = auditor.items.labelled
    known, rest = (mask.nonzero().squeeze(1) for mask in (labelled, ~labelled))
    training = Training(plan, inputs, targets, auditor.targets, known)
    modules = ModuleShares(training, auditor)
    first = 0
    if (state := workspace.load()) is not None:
        try:
            training.load_state_dict(state)
            auditor.load_state_dict(state["auditor"])
            modules.load_state_dict(state["modules"])
            first = state["epoch"]
        except Exception as error:
            raise workspace.damaged(error) from error

    def tell(index: Tensor, outputs: Tensor) -> None:
        auditor.update(index, training.scale.restored(outputs), auditor.targets[index])

    if first == 0:
        modules.note()
    for epoch in range(first, plan.recipe.epochs):
        loss = training.epoch(epoch, tell)
        training.predict(rest, tell)
        auditor.end_look()
        modules.note()
        yield {"event": "epoch", "epoch": epoch + 1, "loss": loss, **_told(auditor)}
        workspace.save(
            lambda done=epoch + 1: {
                **training.state_dict(),
                "auditor": auditor.state_dict(),
                "modules": modules.state_dict(),
                "epoch": done,
            }
        )
    workspace.keep({"auditor": auditor.state_dict(), "model": training.model.state_dict()})
    yield {
        "event": "end",
        "planted": 0 if auditor.planted is None else int(auditor.planted.changed.sum()),
        "skipped_steps": training.optimizer.skipped_steps,
        "parameters": training.parameters,
        "modules": modules.found(),
    }


def fit_fold(
    plan: AuditPlan, inputs: Tensor, targets: Tensor, settings: Settings, workspace: Workspace
) -> Iterator[Row]:
    """Train without one fold, and predict it after every epoch; a row an epoch.

    As along one training, the average over epochs gives the l-th a weight of l.
    """
    items = items_of(targets, kind=plan.kind, classes=_classes(plan))
    canaries = _canaries(plan, targets)
    trained = targets if canaries is None else canaries.targets
    mine = fold_of(items, plan.folds, plan.seed) == settings["fold"]
    outside = mine.nonzero().squeeze(1)
    inside = (items.labelled & ~mine).nonzero().squeeze(1)
    training = Training(plan, inputs, targets, trained, inside)
    average, first = torch.zeros(len(outside), plan.outputs), 0
    if (state := workspace.load()) is not None:
        try:
            training.load_state_dict(state)
            average, first = state["average"], state["epoch"]
        except Exception as error:
            raise workspace.damaged(error) from error
    for epoch in range(first, plan.recipe.epochs):
        loss = training.epoch(epoch)
        parts = list[Tensor]()
        training.predict(outside, lambda _, outputs, parts=parts: parts.append(outputs.cpu()))
        found = training.scale.restored(torch.cat(parts)).float()
        found = found.softmax(1) if plan.kind == "classes" else found[:, None]
        average.add_(found - average, alpha=2 / (epoch + 2))
        agreement = None
        if plan.kind == "classes":
            right = (found.argmax(1) == targets[outside])[items.labelled[outside]]
            agreement = float(right.double().mean())
        row = {"loss": loss, "agreement": agreement, "memorization": None}
        yield {"event": "epoch", "epoch": epoch + 1, **row}
        workspace.save(
            lambda done=epoch + 1: {**training.state_dict(), "average": average, "epoch": done}
        )
    workspace.keep({"rows": outside, "average": average})
    planted = 0 if canaries is None else int((canaries.targets != targets)[canaries.index].sum())
    yield {
        "event": "end",
        "planted": planted,
        "skipped_steps": training.optimizer.skipped_steps,
        "parameters": training.parameters,
    }


def _canaries(plan: AuditPlan, targets: Tensor) -> Canaries | None:
    if not plan.plant:
        return None
    return Canaries(targets, fraction=plan.plant, classes=_classes(plan), seed=plan.seed)


def _judged_folds(
    plan: AuditPlan, targets: Tensor, kept: Sequence[Mapping[str, Tensor]]
) -> AuditResult:
    """Labels by predictions of trainings that did not see them."""
    predictions = torch.zeros(len(targets), plan.outputs)
    for fold in kept:
        predictions[fold["rows"]] = fold["average"]

    def trained(rows: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return predictions.__getitem__  # of trainings that have ended

    return audit(
        trained,
        torch.arange(len(targets)),
        _canaries(plan, targets) or targets,
        kind=plan.kind,
        folds=plan.folds,
        classes=_classes(plan),
        structure=plan.structure,
        seed=plan.seed,
        probabilities=True,
    )


def _told(auditor: Auditor) -> Row:
    look = auditor.looks[-1]
    memorization = None if look.memorization is None else look.memorization.value
    return {
        "agreement": None if auditor.items.classes is None else look.agreement,
        "memorization": memorization,
    }
