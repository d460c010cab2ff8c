"""From predictions and labels to what is wrong, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poprisk._validate import check_number
from poprisk.audit.flips import flip_rate
from poprisk.audit.items import Items
from poprisk.audit.looks import Look
from poprisk.audit.noise import error_pattern
from poprisk.audit.planted import Planted
from poprisk.audit.rate import Rate, share_of
from poprisk.audit.result import AuditResult
from poprisk.audit.scores import (
    LIMIT,
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
LEAST_OF_CLASS = 0.2
"""Share of a class's labels that predictions give back, below which the class is not known."""
MOST_UNKNOWN = 0.5
"""Share of suspects, of classes that are not known, from which a result is not believed."""
MOST_OF_LABELS = 0.2
"""The same for the several labels of an example."""
LEAST_RECALL = 0.5
"""Recall on planted labels below which a list misses too much."""
ORDER = 0.05
"""Difference in wrong preferences between the two orders of a pair that is more than chance."""
BETWEEN = 0.0428
"""Share of normal noise between two and three standard deviations."""
HEAVY = 1.5
"""Multiple of it from which the tail of the noise may be among the suspects."""

SATURATED = 1 - 2**-11
"""Agreement with a label that half precision does not tell from 1."""

SHOWN = 3
"""Labels or classes that a reason names."""

MATRICES = 6
"""How many arrays of its size it takes to estimate a noise matrix."""
MOST_CLASSES = 10_000
"""Classes up to which a result counts which is given as which."""
BLOCK = 1 << 22
"""Probabilities that are looked at at once."""

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
    in_sample: bool = True,
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
        in_sample: whether labels were trained on: what was not cannot have been memorized, however
            few are planted.
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
        or _misses_much(recall, items.kind)
        or (uncertified if memorization is None else memorization.reason if in_sample else "")
    )
    share = found.wrong_share()
    doubted = reason or share.reason
    share = share._replace(valid=not doubted, reason=doubted)
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
        planted=0 if planted is None else int(planted.changed.sum()),
        flip_rate=_flips(items, audited, known, in_sample=in_sample),
    )


def _flips(items: Items, audited: Audited, known: Mask, *, in_sample: bool) -> Rate | None:
    """Share of flipped pairs, from what was predicted of them before they were trained on."""
    if items.kind != "preferences":
        return None
    if not in_sample:
        p = audited.predictions.double().numpy()[known]
        agreement = normalized_margin(p, items.labels.numpy()[known])
    elif 1 in audited.history_looks:
        # In a first pass a pair is seen before it is trained on, planted or not.
        agreement = audited.history[:, audited.history_looks.index(1)].double().numpy()[known]
    else:
        missing = "no first pass over the pairs, before they were trained on, was noted"
        return Rate(math.nan, math.nan, False, missing)
    # Of logits u it is tanh(u/2); half precision takes large ones to 1.
    return flip_rate(2 * np.arctanh(np.clip(agreement, -SATURATED, SATURATED)))


def look_at(
    items: Items, predictions: Tensor, rows: Tensor, memorization: Rate | None, *, number: int
) -> Look:
    """What the predictions of some items are like."""
    agreement = confidence = math.nan
    if items.classes is not None:
        given = items.labelled[rows]
        predicted, most = _likeliest(predictions, rows)
        right = (predicted == items.labels[rows])[given]
        agreement, confidence = float(right.double().mean()), float(most.mean())
    return Look(number, len(rows), agreement, confidence, memorization, True)


def margins_of(items: Items, predictions: Tensor, rows: Tensor) -> Tensor:
    """How well the labels of some items agree with predictions, (m,); NaN without a label.

    For numbers minus the largest residual.
    """
    if items.classes is None:
        return -(items.labels[rows] - predictions[rows].double()).abs().amax(1)
    margin = [
        normalized_margin(
            predictions[part].double().numpy(), items.labels[part].clamp_min(0).numpy()
        )
        for part in _parts(rows, items.width)
    ]
    return torch.from_numpy(np.concatenate(margin)).masked_fill(~items.labelled[rows], math.nan)


def _parts(rows: Tensor, width: int) -> Sequence[Tensor]:
    return rows.split(max(1, BLOCK // width))


def _likeliest(predictions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class of some items, and its probability, without a copy of all."""
    found, most = list[Tensor](), list[Tensor]()
    for part in _parts(rows, predictions.shape[1]):
        p = predictions[part].float()
        found.append(p.argmax(1))
        most.append(p.max(1).values)
    return torch.cat(found), torch.cat(most)


def check_memory(kept: int, classes: int | None, *, structure: bool, max_memory: float) -> None:
    """Raise ValueError if an audit would take too much.

    Args:
        kept: bytes of predictions in memory.
        classes: number of them; None for numbers.
        structure: whether a noise matrix is estimated.
        max_memory: bytes that each of them may take.
    """
    check_number("max_memory", max_memory, low=0.0, include_low=False)
    if kept > max_memory:
        raise ValueError(
            f"predictions take {kept / 2**30:.1f} GiB, but max_memory is "
            f"{max_memory / 2**30:.1f} GiB; keep them in files by directory=, or raise it."
        )
    matrix = MATRICES * 8 * (classes or 0) ** 2
    if structure and matrix > max_memory:
        raise ValueError(
            f"the noise matrix of {classes:,} classes takes {matrix / 2**30:.1f} GiB, but "
            f"max_memory is {max_memory / 2**30:.1f} GiB; pass structure=False, or raise it."
        )


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
        it, and less where it does not. An error starts from the true label, which is taken to be
        what the audit suggests in place of the one that was given. Where that one was wrong, the
        planted one may be right: the share of these that the audit itself expects is taken off the
        cases.
        """
        index, labels = planted.index.numpy(), planted.labels.numpy()
        original, corrected = planted.original.numpy(), self.suggested[index]
        # What predictions repeat is suggested too: no ground to leave it out.
        sources = np.where(corrected == labels, original, corrected)
        wrong = planted.changed.numpy() & self.seen[index]
        found, weights = np.zeros(len(index), np.bool_), np.ones(len(index))
        right = np.zeros(len(index))
        for g, model in self.models.items():
            rows = np.flatnonzero(wrong & (self.group[index] == g))
            found[rows] = model.catches(self.p[index[rows]], labels[rows])
            if model.matrix is not None:
                weights[rows] = error_pattern(model.matrix)[sources[rows], labels[rows]]
            right[rows] = self._true_of_given(g, original[rows], labels[rows])
        raw, weights = share_of(found[wrong], weights[wrong]), weights[wrong]
        if not raw.valid:
            return raw
        cases = 1 - float(weights @ right[wrong] / weights.sum())
        if not cases > 0.5:
            return raw._replace(valid=False, reason="most planted labels may be right by chance")
        return raw._replace(
            value=min(1.0, raw.value / cases), standard_error=raw.standard_error / cases
        )

    def _true_of_given(
        self, group: int, original: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Share of the labels given as o that are z after correction, for some pairs, (m,)."""
        c = self.items.classes or 0
        rows = self.known & (self.group == group)
        given = np.bincount(self.labels[rows], minlength=c)
        pairs, counts = np.unique(self.labels[rows] * c + self.suggested[rows], return_counts=True)
        at = np.minimum(np.searchsorted(pairs, wanted := original * c + labels), len(pairs) - 1)
        return np.where(pairs[at] == wanted, counts[at], 0) / np.maximum(given[original], 1)

    def _counts(self, group: int) -> NDArray[np.float64]:
        """How often a label is j after correction and was given as y, (c, c)."""
        c = self.items.classes or 0
        rows = self.known & (self.group == group)
        counts = np.zeros((c, c))
        np.add.at(counts, (self.suggested[rows], self.labels[rows]), 1.0)
        return counts

    def wrong_share(self) -> Rate:
        n = len(self.margin)
        found = share_of(self.margin < 0, groups=self.items.example.numpy()[self.known])
        gap = 0.0
        if self.structure:
            for g, model in self.models.items():
                part = float((self.known & (self.group == g)).sum()) / n
                gap += part * abs(model.disagreement - model.expected)
        # What is found and what the matrix expects err on different sides: half their difference.
        return found._replace(standard_error=math.hypot(found.standard_error, gap / 2))

    def noise_matrix(self) -> NDArray[np.float64] | None:
        """Counted after correction: how often true class j was given as y."""
        matrices = []
        if (self.items.classes or 0) > MOST_CLASSES:
            return None
        for g in range(max(self.models) + 1):
            counts = self._counts(g)
            sums = counts.sum(1, keepdims=True)
            matrices.append(np.where(sums > 0, counts / np.maximum(sums, 1), np.eye(len(counts))))
        return np.stack(matrices) if self.items.kind == "multilabel" else matrices[0]

    def unsure(self) -> str:
        groups = list(self._groups(self.known))
        found = [(g, rows, self._unsure_of(rows)) for g, rows in groups]
        doubtful = [(g, rows) for g, rows, reason in found if reason]
        if not doubtful:
            return self._by_order() if self.items.kind == "preferences" else ""
        if len(groups) == 1:
            return f"unsure: {found[0][2]}"
        suspect = self._suspect()
        inside = int(sum(suspect[rows].sum() for _, rows in doubtful))
        if inside < MOST_OF_LABELS * suspect.sum() and len(doubtful) < len(groups):
            return ""
        which = ", ".join(str(g) for g, _ in doubtful[:SHOWN])
        more = f" and {len(doubtful) - SHOWN} more" if len(doubtful) > SHOWN else ""
        first = next(reason for _, _, reason in found if reason)
        return (
            f"unsure of label{'s' * (len(doubtful) > 1)} {which}{more}, which {inside} of "
            f"{int(suspect.sum())} suspects are of: {first}"
        )

    def _suspect(self) -> Mask:
        suspect = np.zeros(len(self.known), np.bool_)
        suspect[self.known] = self.margin < 0
        return suspect

    def _unsure_of(self, rows: NDArray[np.int64]) -> str:
        """Why predictions know too little of some items."""
        labels = self.labels[rows]
        predicted, most = _likeliest(self.p, torch.from_numpy(rows))
        given, confidence = predicted.numpy(), float(most.mean())
        agreement = float((given == labels).mean())
        least = UNSURE_OF_TWO if self.items.classes == 2 else UNSURE
        if min(confidence, agreement) < least:
            return (
                f"predictions have a mean confidence of {confidence:.0%} and agree with "
                f"{agreement:.0%} of the labels, and either is below {least:.0%}: they know little "
                "of the data. Train longer, or consider audit(..., folds=5)"
            )
        several = len(np.unique(labels)) > 1
        if several and bool((given == given[0]).all()):
            return (
                f"predictions give class {given[0]} only, so that they tell nothing about labels. "
                "Train longer, or weigh rare classes"
            )
        return "" if self.items.kind == "classes" else self._rare(rows, given == labels)

    def _rare(self, rows: NDArray[np.int64], agrees: Mask) -> str:
        """A few classes can fill the list of suspects because predictions hardly ever give them."""
        labels, suspect = self.labels[rows], self._suspect()[rows]
        count = np.bincount(labels, minlength=self.items.classes or 0)
        share = np.bincount(labels[agrees], minlength=len(count)) / np.maximum(count, 1)
        unknown = (count > 0) & (share < LEAST_OF_CLASS)
        inside = int(suspect[unknown[labels]].sum())
        if inside == 0 or inside < MOST_UNKNOWN * suspect.sum():
            return ""
        classes = np.flatnonzero(unknown)
        named = ", ".join(map(str, classes[:SHOWN]))
        more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
        return (
            f"predictions give back fewer than {LEAST_OF_CLASS:.0%} of the labels of class {named}"
            f"{more}, which {inside} of {int(suspect.sum())} suspects are of: either nearly all of "
            "them are wrong, or the class is not known. Train longer, or weigh rare classes"
        )

    def _by_order(self) -> str:
        """Wrong preferences are as frequent in either order of a pair if the order is chance."""
        labels, suspect = self.labels[self.known], self.margin < 0
        rates = [share_of(suspect[labels == label]) for label in (0, 1)]
        if not all(rate.valid for rate in rates):
            return ""  # one order only
        zero, one = (rate.value for rate in rates)
        error = math.hypot(*(rate.standard_error for rate in rates))
        if abs(one - zero) <= max(ORDER, 3 * error):
            return ""
        return (
            f"unsure: {one:.0%} of the pairs whose first is said to be better are suspect, and "
            f"{zero:.0%} of the others: labels or predictions go by the order of a pair"
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
        margin = self.model.margin(self.p[index[rows]], planted.labels.double().numpy()[rows])
        return share_of(margin < 0)

    def wrong_share(self) -> Rate:
        found = share_of(self.margin < 0)
        r = self.model.residuals(self.p[self.known], self.labels[self.known])
        between = share_of(((r > 2) & (r <= LIMIT)).ravel())
        if between.value - 2 * between.standard_error <= HEAVY * BETWEEN:
            return found
        # Gross errors leave a gap below them; noise with heavy tails does not.
        reason = (
            f"{between.value:.1%} of the residuals lie between two and three standard deviations "
            f"of the noise, of normal noise {BETWEEN:.1%}: suspects may be its tail"
        )
        return found._replace(valid=False, reason=reason)

    def noise_matrix(self) -> None:
        return None

    def unsure(self) -> str:
        y = self.labels[self.known]
        spread = NORMAL_MAD * np.median(np.abs(y - np.median(y, axis=0)), axis=0)
        if bool((self.model.sigma == 0).any()) and bool((self.margin < 0).any()):
            return (
                "unsure: half of the targets are predicted exactly, so that the size of their "
                "noise is unknown and any residual counts"
            )
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


def _misses_much(recall: Rate | None, kind: str) -> str:
    """Whether planted labels are surely missed more often than found; of classes one reads it."""
    if kind == "classes" or recall is None or not recall.valid:
        return ""
    if not recall.value + 2 * recall.standard_error < LEAST_RECALL:
        return ""
    told = f"recall of the planted labels is {recall.value:.2f}: "
    if kind == "regression":
        return f"{told}errors of a standard deviation of the targets are hidden in the noise"
    return f"{told}most wrong labels are missed"
