"""From predictions and labels to what is wrong, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poprisk.audit.items import Items
from poprisk.audit.looks import Look
from poprisk.audit.planted import Planted
from poprisk.audit.rate import Rate, share_of
from poprisk.audit.result import AuditResult
from poprisk.audit.scores import (
    NORMAL_MAD,
    NoiseModel,
    fit_noise,
    fit_residuals,
    normalized_margin,
    ranking,
)

UNSURE = 0.45
"""Mean confidence, and agreement with labels, below which predictions know too little."""
UNSURE_OF_TWO = 0.65
"""The same for two classes, of which guessing knows half."""
UNEXPLAINED = 0.9
"""Spread of residuals over that of targets from which predictions know too little."""
MOST_UNSEEN = 0.05
"""Share of labels without a prediction from which a result is not believed."""

Mask = NDArray[np.bool_]


@final
@dataclass(frozen=True)
class Audited:
    """Predictions that are to be judged.

    Attributes:
        predictions: (N, width): probabilities of classes, or numbers.
        seen: for which items there is one, (N,).
        history: margins of items by look, (N, H).
        history_looks: numbers of these looks.
        looks: what all looks were like.
        not_finite: predictions that were left out because they were NaN or Inf.
    """

    predictions: Tensor
    seen: Tensor
    history: Tensor
    history_looks: tuple[int, ...] = ()
    looks: tuple[Look, ...] = ()
    not_finite: int = 0


def judge(
    items: Items,
    audited: Audited,
    planted: Planted | None,
    *,
    structure: bool,
    limit: float,
    uncertified: str,
    cost: float = 0.0,
    doubt: str = "",
) -> AuditResult:
    """Score every label by the predictions.

    Args:
        items: with the labels as they were before any were planted.
        audited: the predictions.
        planted: labels that were planted in training.
        structure: False leaves the noise matrix out.
        limit: memorization from which predictions are not believed.
        uncertified: why nothing is planted speaks against the result; empty if it does not.
        cost: trainings beyond the audited one.
        doubt: why predictions are not to be believed.
    """
    known = (audited.seen & items.labelled).numpy()
    if not known.any():
        raise ValueError("there is no labelled example with a prediction that is finite.")
    if items.classes is None:
        found: _Numbers | _Classes = _Numbers(items, audited, known)
    else:
        found = _Classes(items, audited, known, structure=structure)
    margin = np.full(len(known), np.nan)
    margin[known] = found.margin
    rank = np.full(len(known), -1)
    rank[known] = ranking(found.margin)
    quality = np.full(len(known), np.nan)
    quality[known] = found.quality
    recall = memorization = None
    if planted is not None:
        recall = found.recall(planted)
        memorization = planted.memorization(audited.predictions, audited.seen)
    reason = (
        doubt
        or _uncertain(known, items, audited)
        or _memorized(memorization, limit)
        or found.unsure()
        or (uncertified if memorization is None else memorization.reason)
    )
    share = found.wrong_share()._replace(valid=not reason, reason=reason)
    believed = [look.number for look in audited.looks if look.believed]
    return AuditResult(
        kind=items.kind,
        example=items.example.numpy(),
        position=items.position.numpy(),
        labels=(items.labels if items.classes else items.labels.double()).numpy(),
        labelled=items.labelled.numpy(),
        predictions=audited.predictions.float().numpy(),
        quality=quality,
        margin=margin,
        rank=rank,
        suggested=found.suggested,
        suspect=known & (np.nan_to_num(margin) < 0),
        history=audited.history.numpy(),
        history_looks=audited.history_looks,
        noise_matrix=found.noise_matrix(),
        wrong_share=share,
        recall=recall,
        memorization=memorization,
        looks=audited.looks,
        look=believed[-1] if believed else 0,
        valid=not reason,
        reason=reason,
        cost=cost,
    )


def look_at(
    items: Items, predictions: Tensor, rows: Tensor, memorization: Rate | None, *, number: int
) -> Look:
    """What the predictions of some items are like."""
    agreement = confidence = math.nan
    if items.classes is not None:
        p = predictions[rows].float()
        given = items.labelled[rows]
        right = (p.argmax(1) == items.labels[rows])[given]
        agreement, confidence = float(right.double().mean()), float(p.max(1).values.mean())
    return Look(number, len(rows), agreement, confidence, memorization, True)


def margins_of(items: Items, predictions: Tensor, rows: Tensor) -> Tensor:
    """How well the labels of some items agree with predictions, (m,); NaN without a label.

    For numbers minus the largest residual.
    """
    p, labels = predictions[rows], items.labels[rows]
    if items.classes is None:
        return -(labels - p.double()).abs().amax(1)
    margin = normalized_margin(p.double().numpy(), labels.clamp_min(0).numpy())
    return torch.from_numpy(margin).masked_fill(~items.labelled[rows], math.nan)


@final
class _Classes:
    """Labels that are classes; several labels an example have a noise each."""

    def __init__(self, items: Items, audited: Audited, known: Mask, *, structure: bool) -> None:
        self.items, self.known, self.structure = items, known, structure
        self.p = audited.predictions
        self.labels = items.labels.numpy()
        self.seen = audited.seen.numpy()
        several = items.kind == "multilabel"
        self.group = items.position.numpy() if several else np.zeros(len(known), np.int64)
        self.models: dict[int, NoiseModel] = {}
        margin = np.full(len(known), np.nan)
        quality = np.full(len(known), np.nan)
        self.suggested = self.labels.copy()
        for g, rows in self._groups(known):
            model = fit_noise(
                self.p[rows],
                self.labels[rows],
                structure=structure,
                symmetric=items.kind == "preferences",
            )
            self.models[g] = model
            margin[rows], rival = model.margin(self.p[rows], self.labels[rows])
            quality[rows] = model.quality(margin[rows])
            self.suggested[rows] = np.where(margin[rows] < 0, rival, self.labels[rows])
        for g, rows in self._groups(self.seen & ~items.labelled.numpy()):
            if g in self.models:
                self.suggested[rows] = self.models[g].likeliest(self.p[rows])
        self.margin, self.quality = margin[known], quality[known]

    def _groups(self, mask: Mask) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for g in np.unique(self.group[mask]):
            yield int(g), np.flatnonzero(mask & (self.group == g))

    def recall(self, planted: Planted) -> Rate:
        """Of planted labels, weighed by how often the noise matrix makes such an error.

        They are planted at random; what is wrong by a pattern is found more often where it follows
        it, and less where it does not. Where the label that was replaced was wrong, the planted one
        may be right: the share of these that the audit itself expects is taken off the cases.
        """
        index, labels = planted.index.numpy(), planted.labels.numpy()
        original = planted.original.numpy()
        wrong = planted.changed.numpy() & self.seen[index]
        found, weights = np.zeros(len(index), np.bool_), np.ones(len(index))
        right = np.zeros(len(index))
        for g, model in self.models.items():
            rows = np.flatnonzero(wrong & (self.group[index] == g))
            found[rows] = model.catches(self.p[index[rows]], labels[rows])
            if model.matrix is not None:
                spread = model.matrix / (1 - model.matrix.diagonal())[:, None]
                weights[rows] = spread[original[rows], labels[rows]]
            right[rows] = self._true_of_given(g)[original[rows], labels[rows]]
        raw, weights = share_of(found[wrong], weights[wrong]), weights[wrong]
        if not raw.valid:
            return raw
        cases = 1 - float(weights @ right[wrong] / weights.sum())
        if not cases > 0.5:
            return raw._replace(valid=False, reason="most planted labels may be right by chance")
        return raw._replace(
            value=min(1.0, raw.value / cases), standard_error=raw.standard_error / cases
        )

    def _true_of_given(self, group: int) -> NDArray[np.float64]:
        """Share of the labels given as o that are z after correction, (c, c)."""
        counts = self._counts(group)
        return (counts / np.maximum(counts.sum(0), 1)).T

    def _counts(self, group: int) -> NDArray[np.float64]:
        """How often a label is j after correction and was given as y, (c, c)."""
        c = self.items.classes or 0
        rows = self.known & (self.group == group)
        counts = np.zeros((c, c))
        np.add.at(counts, (self.suggested[rows], self.labels[rows]), 1.0)
        return counts

    def wrong_share(self) -> Rate:
        n = len(self.margin)
        found = share_of(self.margin < 0)
        gap = 0.0
        if self.structure:
            for g, model in self.models.items():
                part = float((self.known & (self.group == g)).sum()) / n
                gap += part * abs(model.disagreement - model.expected)
        # What is found and what the matrix expects err on different sides: half their difference.
        return found._replace(standard_error=math.hypot(found.standard_error, gap / 2))

    def noise_matrix(self) -> NDArray[np.float64]:
        """Counted after correction: how often true class j was given as y."""
        matrices = []
        for g in range(max(self.models) + 1):
            counts = self._counts(g)
            sums = counts.sum(1, keepdims=True)
            matrices.append(np.where(sums > 0, counts / np.maximum(sums, 1), np.eye(len(counts))))
        return np.stack(matrices) if self.items.kind == "multilabel" else matrices[0]

    def unsure(self) -> str:
        p = self.p[torch.from_numpy(self.known)].float()
        confidence = float(p.max(1).values.mean())
        agreement = float((p.argmax(1).numpy() == self.labels[self.known]).mean())
        least = UNSURE_OF_TWO if self.items.classes == 2 else UNSURE
        if min(confidence, agreement) >= least:
            return ""
        return (
            f"unsure: predictions have a mean confidence of {confidence:.0%} and agree with "
            f"{agreement:.0%} of the labels, and either is below {least:.0%}: they know little of "
            "the data. Train longer, or consider audit(..., folds=5)"
        )


@final
class _Numbers:
    """Targets that are numbers."""

    def __init__(self, items: Items, audited: Audited, known: Mask) -> None:
        self.p = audited.predictions.double().numpy()
        self.labels, self.seen, self.known = items.labels.numpy(), audited.seen.numpy(), known
        self.model = fit_residuals(self.p[known], self.labels[known])
        self.margin = self.model.margin(self.p[known], self.labels[known])
        self.quality = self.model.quality(self.margin)
        self.suggested = np.where(self.seen[:, None], self.p, self.labels)
        fine = np.flatnonzero(known)[self.margin >= 0]
        self.suggested[fine] = self.labels[fine]

    def recall(self, planted: Planted) -> Rate:
        index = planted.index.numpy()
        rows = self.seen[index]
        margin = self.model.margin(self.p[index[rows]], planted.labels.numpy()[rows])
        return share_of(margin < 0)

    def wrong_share(self) -> Rate:
        return share_of(self.margin < 0)

    def noise_matrix(self) -> None:
        return None

    def unsure(self) -> str:
        y = self.labels[self.known]
        spread = NORMAL_MAD * np.median(np.abs(y - np.median(y, axis=0)), axis=0)
        if bool((self.model.sigma < UNEXPLAINED * spread).any()) or not spread.any():
            return ""
        return (
            "unsure: residuals spread as the targets do, so that predictions explain little; "
            "consider audit(..., folds=5)"
        )


def _uncertain(known: Mask, items: Items, audited: Audited) -> str:
    unseen = int(items.labelled.sum()) - int(known.sum())
    if unseen > MOST_UNSEEN * int(items.labelled.sum()):
        lost = f", {audited.not_finite} were NaN or Inf" if audited.not_finite else ""
        return f"{unseen} of {int(items.labelled.sum())} labels have no believed prediction{lost}"
    return ""


def _memorized(memorization: Rate | None, limit: float) -> str:
    if memorization is None or not memorization.value > limit:
        return ""
    return (
        f"memorization of the planted labels is {memorization.value:.2f}, above {limit}: "
        "predictions repeat labels; train for less time or at a lower rate"
    )
