"""Canaries: a few labels drawn at random show how much of the label noise is memorized."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from poprisk._validate import check_number
from poprisk.printing import described, short_html, short_repr
from poprisk.randomness import generator_of
from poprisk.risk.inputs import check_index


class Memorization(NamedTuple):
    """How much of the canaries a model has memorized.

    Attributes:
        value: 0: none, as expected of a model that never saw them; 1: all, with certainty.
        standard_error: from canary to canary.
        valid: whether there are enough canaries to tell.
        reason: why not.
        cost: 0 trainings: outputs are there.
        sacrificed: share of the training labels given up.
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    cost: float
    sacrificed: float

    __repr__ = short_repr
    _repr_html_ = short_html


class ErrorBound(NamedTuple):
    """Bound on the classification error on fresh examples with labels like the others'.

    Attributes:
        value: holds with the probability asked for; above 1 it says nothing.
        expected: without the allowance for the finite number of canaries.
        standard_error: of ``expected``.
        valid: whether ``value`` is below 1.
        reason: why not.
        cost: 0 trainings: outputs are there.
        sacrificed: share of the training labels given up.
    """

    value: float
    expected: float
    standard_error: float
    valid: bool
    reason: str
    cost: float
    sacrificed: float

    __repr__ = short_repr
    _repr_html_ = short_html


@final
class Canaries:
    r"""Replace a known small fraction of labels at random, and see how many of them are fitted.

    Class labels are drawn anew, uniformly over all classes; numbers get noise of random sign. A
    model that has not memorized predicts a canary's label by chance only. Examples without a label
    (``ignore_index``, or a NaN among an example's numbers) become no canaries and do not count.

    Args:
        targets: training labels: (n,) integers of any width or booleans, or (n, ...) numbers.
        fraction: share of the labelled ones to replace.
        classes: number of classes; counted if left out, where each occurs.
        spread: for numbers, size of the noise in standard deviations of the targets, of each of
            an example's numbers its own.
        seed: of the choice and of the labels.
        ignore_index: the class label that stands for none, as in torch's losses.

    Attributes:
        targets: the labels to train on; a copy.
        index: positions of the canaries, in order.

    Raises:
        TypeError, ValueError: for a bad argument, if no label would be replaced, or if classes come
            as floating-point numbers (zeros and ones, signs, probabilities).

    Example:
        >>> canaries = Canaries(torch.arange(1000) % 10)
        >>> len(canaries.index)
        20
    """

    def __init__(
        self,
        targets: Tensor,
        *,
        fraction: float = 0.02,
        classes: int | None = None,
        spread: float = 1.0,
        seed: int = 0,
        ignore_index: int = -100,
    ) -> None:
        check_number("fraction", fraction, low=0.0, high=1.0, include_low=False)
        check_number("spread", spread, low=0.0, include_low=False)
        _check_labels(targets)
        self.labelled = _labelled(targets, ignore_index)
        known = self.labelled.nonzero().squeeze(1)
        count = round(fraction * len(known))
        if not 1 <= count < len(known):
            raise ValueError(
                f"fraction={fraction} of {len(known)} labels makes {count} canaries; choose one "
                "that makes at least one and leaves some labels as they are."
            )
        generator = generator_of(seed, "canaries")
        order = torch.randperm(len(known), generator=generator)[:count]
        self.index = known[order.sort().values.to(known.device)]
        # In 64 bits: torch indexes and compares few of the narrower kinds.
        numbers = targets if targets.is_floating_point() else targets.long()
        original = numbers[self.index]
        self.classes: int | None = None
        if targets.is_floating_point():
            size = spread * _deviation(targets[known]).to(targets.device, targets.dtype)
            shape = (count, *targets.shape[1:])
            signs = 2 * torch.randint(2, shape, generator=generator) - 1
            drawn = original + size * signs.to(targets.device, targets.dtype)
        else:
            self.classes = _classes(numbers[known], classes, targets.dtype)
            drawn = torch.randint(self.classes, (count,), generator=generator).to(original)
        self.original = original.to(targets.dtype)
        self.targets = numbers.index_copy(0, self.index, drawn).to(targets.dtype)

    def __repr__(self) -> str:
        kind = "numbers" if self.classes is None else f"{self.classes} classes"
        return described("Canaries", f"{len(self.index):,} of {len(self.targets):,} labels", kind)

    def relabel(self, targets: Tensor, index: Tensor) -> Tensor:
        """The labels to train on for a batch of a data set that is read piece by piece.

        Args:
            targets: its own labels, (b, ...).
            index: positions of its examples, (b,).
        """
        index = check_index(index, len(self.targets)).to(self.targets.device)
        chosen = torch.isin(index, self.index).to(targets.device)
        chosen = chosen.reshape(-1, *[1] * (targets.ndim - 1))
        return torch.where(chosen, self.targets[index].to(targets), targets)

    def memorization(self, outputs: Tensor) -> Memorization:
        r"""How much of the canaries' labels the outputs reproduce.

        Classes: the probability of the planted label z beyond that of other labels as wrong,
        :math:`p_z - (1-p_z-p_o)/(k-2)`, where o is the label it replaced and canaries with z = o
        are left out (ours). Which wrong label is planted is chance, so the mean is 0 for a model
        that never saw them. With two classes there is no other wrong label, and it is
        :math:`2p_z-1` over all canaries. Numbers: the coefficient of the outputs' deviation from
        the original targets on the noise.

        Args:
            outputs: of the model on the whole training set (n, ...) or on the canaries alone;
                for classes logits (..., k).

        Raises:
            ValueError: for outputs of another number of examples, or probabilities.
        """
        u = self._on_canaries(outputs)
        if self.classes is not None:
            values = self._label_contrast(u, self.classes)
        else:
            drawn, original = self.targets[self.index], self.original
            noise = (drawn - original).double().flatten(1 if original.ndim > 1 else 0)
            follow = (u.reshape_as(original) - original).double().reshape_as(noise)
            product = noise * follow / noise.square().mean(0)
            values = product.mean(1) if product.ndim > 1 else product
        value = float(values.mean()) if len(values) else math.nan
        error = _standard_error(values)
        few = f"{len(values)} canaries leave a standard error of {error:.2f}" if error > 0.2 else ""
        few = "too few canaries to tell" if len(values) < 2 else few
        return Memorization(value, error, not few, few, 0.0, self._sacrificed)

    def error_bound(self, outputs: Tensor, *, confidence: float = 0.95) -> ErrorBound:
        r"""Bound on the error on fresh examples, from how badly the canaries are fitted.

        .. math:: \mathcal E \le \hat{\mathcal E}_S + (k-1)\Big(1 - \tfrac{k}{k-1}
                  \hat{\mathcal E}_{\tilde S}\Big) + c\,\sqrt{\frac{\log(4/\delta)}{2m}},\qquad
                  c = 2k + \sqrt k + \frac{m}{n\sqrt k}

        [Garg et al. 2021, RATT, Thm 3], for m canaries and n other examples; proved for empirical
        risk minimization, and for gradient descent under their assumption that canaries are not
        fitted worse than unseen random labels. With few canaries or many classes it is vacuous:
        see ``valid``.

        Args:
            outputs: of the model on the whole training set, (n + m, k).
            confidence: probability with which the bound holds, :math:`1-\delta`.

        Raises:
            ValueError: if targets are numbers.
        """
        k = self.classes
        if k is None:
            raise ValueError(
                "the bound is for classes, but the targets are numbers; use memorization()."
            )
        if outputs.ndim != 2 or len(outputs) != len(self.targets):
            raise ValueError(
                f"outputs must be those of the whole training set, ({len(self.targets)}, {k}), but "
                f"got {tuple(outputs.shape)}."
            )
        check_number("confidence", confidence, low=0.0, high=1.0, include_high=False)
        wrong = (outputs.argmax(1) != self.targets.to(outputs.device, torch.long)).double()
        others = self.labelled.to(wrong.device, copy=True)
        others[self.index.to(wrong.device)] = False
        fitted, planted = wrong[others], wrong[self.index.to(wrong.device)]
        m, n = len(planted), max(len(fitted), 1)
        expected = float(fitted.mean()) + (k - 1) - k * float(planted.mean())
        c = 2 * k + math.sqrt(k) + m / (n * math.sqrt(k))
        value = expected + c * math.sqrt(math.log(4 / (1 - confidence)) / (2 * m))
        error = math.hypot(_standard_error(fitted), k * _standard_error(planted))
        reason = "" if value < 1 else f"vacuous: {m} canaries are too few for {k} classes"
        return ErrorBound(value, expected, error, not reason, reason, 0.0, self._sacrificed)

    def _label_contrast(self, logits: Tensor, k: int) -> Tensor:
        """The planted label's probability against that of other wrong labels, by canary."""
        shape = tuple(logits.shape)
        if logits.ndim != 2 or shape[1] != k:
            raise ValueError(f"outputs must be logits of shape (m, {k}), but got {shape}.")
        sums = logits.double().sum(1)
        if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            raise ValueError(
                "outputs must be logits, but got probabilities: each row is not negative and sums "
                "to 1; pass their logarithms."
            )
        p = logits.double().softmax(1)
        planted = self.targets[self.index].to(p.device, torch.long)
        original = self.original.to(p.device, torch.long)
        own = p.gather(1, planted[:, None]).squeeze(1)
        if k == 2:
            return 2 * own - 1
        replaced = p.gather(1, original[:, None]).squeeze(1)
        return (own - (1 - own - replaced) / (k - 2))[planted != original]

    @property
    def _sacrificed(self) -> float:
        """Share of the training labels that is given up."""
        return len(self.index) / int(self.labelled.sum())

    def _on_canaries(self, outputs: Tensor) -> Tensor:
        found, canaries, n = len(outputs), len(self.index), len(self.targets)
        if found not in (canaries, n):
            raise ValueError(
                f"outputs must be those of the {canaries} canaries (in the order of .index) or of "
                f"all {n} training examples, but got {found} rows."
            )
        whole = found == n
        return outputs[self.index.to(outputs.device)] if whole else outputs


def _check_labels(targets: Any) -> None:
    """Raise unless targets are labels some of which can be replaced by others."""
    if not isinstance(targets, Tensor) or targets.is_complex() or targets.ndim == 0:
        raise TypeError(f"targets must be a tensor of labels, but got {type(targets).__name__}.")
    if not targets.is_floating_point():
        if targets.ndim != 1:
            raise TypeError(
                f"class targets must have shape (n,), but got {tuple(targets.shape)}; flatten "
                "tokens."
            )
        return
    known = targets[~targets.isnan()]
    found = known.unique() if len(known) else known
    if 0 < len(found) <= 2:
        values = " and ".join(f"{v:g}" for v in found.tolist())
        raise ValueError(
            f"targets hold only {values} as {targets.dtype}: class labels, which noise cannot "
            "be added to; pass integer classes 0..classes-1 (n,): targets.long() for zeros and "
            "ones, (targets > 0).long() for signs, or targets.argmax(1) for one-hot rows."
        )
    if _are_distributions(targets):
        raise ValueError(
            f"targets {tuple(targets.shape)} are probabilities (no row has a negative entry, "
            "all sum to one), which they would not be with noise added; pass integer classes "
            "(n,): targets.argmax(1)."
        )


def _deviation(targets: Tensor) -> Tensor:
    """Standard deviation of each number of an example, (...); of all together where one has none.

    Numbers of different scales would drown in noise of one size.
    """
    numbers = targets.double()
    each = numbers.std(0)
    return torch.where(each > 0, each, numbers.std())


def _are_distributions(targets: Tensor) -> bool:
    """Whether every row of (n, c) that is not missing sums to one, c > 1, nothing being below 0."""
    if targets.ndim != 2 or targets.shape[1] < 2:
        return False
    rows = targets[~targets.isnan().any(1)].double()
    sums = rows.sum(1)
    return len(rows) > 0 and bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())


def _classes(targets: Tensor, classes: int | None, dtype: torch.dtype) -> int:
    """The number of classes, counted if not given; at least two, and all labels below it.

    Args:
        targets: labels, (n,), 64 bits.
        classes: given number of them.
        dtype: of the labels as they came, which has to hold the last class.
    """
    low, found = int(targets.min()), int(targets.max()) + 1
    if classes is None and dtype != torch.bool and low >= 0:
        absent = found - len(targets.unique())
        if absent:
            raise ValueError(
                f"{absent} of the labels 0..{found - 1} never occur, so the number of classes "
                f"cannot be counted; pass classes={found} if there are so many, "
                f"ignore_index={found - 1} if that one stands for no label, and begin with 0."
            )
    if classes is None:
        classes = max(found, 2) if dtype == torch.bool else found
    if classes < max(found, 2) or low < 0:
        raise ValueError(
            f"labels must lie in 0..classes-1 with at least two classes, but got "
            f"{low}..{found - 1} and classes={classes}."
        )
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if classes - 1 > largest:
        raise ValueError(f"classes={classes} do not fit into labels of {dtype}; widen them.")
    return classes


def _labelled(targets: Tensor, ignore_index: int) -> Tensor:
    """Which examples have a label, (n,)."""
    if targets.is_floating_point():
        return ~targets.isnan().unsqueeze(1).flatten(1).any(1)
    return targets.long() != ignore_index


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
