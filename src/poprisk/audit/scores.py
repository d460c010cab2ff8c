r"""Which labels disagree with predictions: margins, a threshold, suggestions; arrays of numpy."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from poprisk.audit.noise import ROUNDS, Floats, Integers, confusion_counts, noise_matrix, unmix
from poprisk.printing import short_repr

BLOCK = 1 << 16
"""Examples that are scored at once, so that temporary arrays stay small."""
NUMBERS = 1 << 22
"""Probabilities that are, at most."""
LEAST = 1e-6
"""Probability below which predictions are not told apart."""
DOUBT = 0.25
"""How far from disagreements to what the noise matrix expects the number of suspects lies."""
TIE = 1e-9
"""Difference of margins that rounding may make."""
LIMIT = 3.0
"""Residual, in standard deviations of the noise, from which a number is suspect."""
BEYOND = 2 * NormalDist().cdf(-LIMIT)
"""Share of normal noise beyond it."""
NORMAL_MAD = 1.482602218505602
"""Standard deviation of a normal variable over its median absolute deviation."""


def normalized_margin(probabilities: Floats, labels: Integers) -> Floats:
    r""":math:`\hat p(y)-\max_{j\ne y}\hat p(j)`, (n,), from -1 to 1.

    Args:
        probabilities: (n, c).
        labels: given, (n,).

    Example:
        >>> normalized_margin(np.array([[0.75, 0.25, 0.0]]), np.array([1]))
        array([-0.5])
    """
    return _margin_and_rival(probabilities, labels)[0]


def posterior_margin(probabilities: Floats, labels: Integers, matrix: Floats) -> Floats:
    r"""Log posterior odds of the given label against the best other one, (n,).

    .. math:: \log \pi(y)T_{yy} - \max_{j\ne y}\log \pi(j)T_{jy}

    with :math:`\pi` the predictions from which :func:`poprisk.audit.noise.unmix` took the noise.

    Args:
        probabilities: predicted for given labels, (n, c).
        labels: given, (n,).
        matrix: :math:`T_{jy}=P(\text{given }y\mid\text{true }j)`, (c, c).
    """
    log = _log_posterior(unmix(_clipped(probabilities), matrix), labels, matrix)
    return _margin_and_rival(log, labels)[0]


@final
class NoiseModel(NamedTuple):
    r"""How given labels come from true ones, and the margin from which a label is suspect.

    The ranking is by the posterior margin. A run's own predictions are less sure than they are
    right, so that posterior odds of one are the wrong place to cut. Disagreements
    :math:`\arg\max\pi_i\ne y_i` count the run's own errors among the wrong labels; the matrix,
    which comes from the surer predictions, expects too few. As many labels are suspect as lie
    between the two, :data:`DOUBT` of the way. Without a matrix the ranking is by the normalized
    margin, and suspect is what disagrees.

    Attributes:
        matrix: :math:`T`, (c, c), or None.
        threshold: margin below which a label is suspect.
        unsuspected: least margin of a label that is not.
        disagreement: share of labels that are not the most probable ones.
        expected: share of wrong labels that the matrix alone would make; NaN without one.
    """

    matrix: Floats | None
    threshold: float
    unsuspected: float
    disagreement: float
    expected: float

    __repr__ = short_repr

    def margin(self, probabilities: Any, labels: Integers) -> tuple[Floats, Integers]:
        """Margins above the threshold, (n,), and for each the best other label, (n,).

        Args:
            probabilities: (n, c), an array or a tensor of any floating-point type.
            labels: (n,).
        """
        found = [self._raw(p, y) for p, y in _blocks(probabilities, labels)]
        if not found:
            return np.zeros(0), np.zeros(0, np.int64)
        margin, rival = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return margin - self.threshold, rival

    def catches(self, probabilities: Any, labels: Integers) -> NDArray[np.bool_]:
        """Whether labels that were not scored would be suspect among those that were, (n,).

        One that is not the most probable raises the number of suspects: it is among them unless its
        margin is above that of a label that is not.

        Args:
            probabilities: (n, c).
            labels: (n,).
        """
        margin = self.margin(probabilities, labels)[0]
        disagree = self.likeliest(probabilities) != labels
        return (margin < 0) | (disagree & (margin + self.threshold < self.unsuspected))

    def quality(self, margin: Floats) -> Floats:
        """Margins on a scale from 0 to 1, (n,); suspect is what lies below 0.5."""
        if self.matrix is None:
            return (1 + margin) / 2
        return 1 / (1 + np.exp(-np.clip(margin, -500, 500)))

    def likeliest(self, probabilities: Any) -> Integers:
        """The most probable label where none is given, (n,)."""
        found = [p.argmax(1) for p in self._clean(probabilities)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _clean(self, probabilities: Any) -> Iterator[Floats]:
        for p, _ in _blocks(probabilities, None):
            yield p if self.matrix is None else unmix(_clipped(p), self.matrix)

    def _raw(self, p: Floats, y: Integers) -> tuple[Floats, Integers]:
        if self.matrix is None:
            return _margin_and_rival(p, y)
        pi = unmix(_clipped(p), self.matrix)
        return _margin_and_rival(_log_posterior(pi, y, self.matrix), y)


def fit_noise(
    probabilities: Any, labels: Integers, *, structure: bool = True, symmetric: bool = False
) -> NoiseModel:
    """Estimate the noise of labels from predictions for them, and where to cut.

    Args:
        probabilities: (n, c), an array or a tensor of any floating-point type.
        labels: given, (n,).
        structure: False leaves the noise matrix out.
        symmetric: whether all classes have one error rate and no pattern.
    """
    plain = NoiseModel(None, 0.0, 0.0, 0.0, np.nan)
    if not structure:
        return plain._replace(disagreement=_share(plain.likeliest(probabilities) != labels))
    model = plain
    matrix = noise_matrix(_counts(model, probabilities, labels), symmetric=symmetric)
    for _ in range(ROUNDS):
        model = plain._replace(matrix=matrix)
        matrix = noise_matrix(_counts(model, probabilities, labels), symmetric=symmetric)
    model = plain._replace(matrix=matrix)
    sums = sum((p.sum(0) for p in model._clean(probabilities)), np.zeros(len(matrix)))
    disagree = model.likeliest(probabilities) != labels
    margin = model.margin(probabilities, labels)[0]
    expected = float((1 - matrix.diagonal()) @ sums / max(sums.sum(), 1e-300))
    ordered = np.sort(margin)
    suspects = _between(ordered, len(margin) * ((1 - DOUBT) * _share(disagree) + DOUBT * expected))
    return model._replace(
        threshold=_cut(ordered, suspects),
        unsuspected=float(ordered[suspects]) if suspects < len(ordered) else np.inf,
        disagreement=_share(disagree),
        expected=expected,
    )


def _counts(model: NoiseModel, probabilities: Any, labels: Integers) -> Floats:
    """Counts of the surer predictions, from O(n) numbers: which class, and how sure."""
    sure = [(p.argmax(1), p.max(1)) for p in model._clean(probabilities)]
    predicted, confidence = (np.concatenate(part) for part in zip(*sure, strict=True))
    return confusion_counts(predicted, confidence, labels, classes=probabilities.shape[1])


def _between(ordered: Floats, suspects: float) -> int:
    """The nearest number of suspects that does not separate equal margins."""
    count = round(suspects)
    if count in (0, len(ordered)):
        return count
    left = int(np.searchsorted(ordered, ordered[count] - TIE, "left"))
    right = int(np.searchsorted(ordered, ordered[count] + TIE, "right"))
    if left == count:
        return count
    return left if suspects - left < right - suspects else right


def _cut(ordered: Floats, suspects: int) -> float:
    """The middle between the last of the suspects and the first that is none."""
    if suspects == 0:
        return min(0.0, float(ordered[0]) - 1)
    if suspects == len(ordered):
        return max(0.0, float(ordered[-1]) + 1)
    return float(ordered[suspects - 1] + ordered[suspects]) / 2


@final
class ResidualModel(NamedTuple):
    r"""The noise of numbers, and the residual from which a target is suspect.

    .. math:: r = \max_k |y_k-u_k|/\sigma_k,\qquad \sigma_k = 1.48\;\mathrm{median}_i
              \big|y_{ik}-u_{ik}\big|

    The largest of many residuals is large by chance: the limit is the one beyond which as many
    examples of normal noise lie as there are beyond three standard deviations of one number.

    Attributes:
        sigma: standard deviation of the noise, (k,).
    """

    sigma: Floats

    __repr__ = short_repr

    @property
    def limit(self) -> float:
        """Largest residual, in units of the noise, from which an example is suspect."""
        k = len(self.sigma)
        return LIMIT if k == 1 else -NormalDist().inv_cdf((1 - (1 - BEYOND) ** (1 / k)) / 2)

    def residuals(self, predictions: Floats, targets: Floats) -> Floats:
        """Absolute residuals in units of the noise, (n, k).

        Args:
            predictions: (n, k).
            targets: (n, k).
        """
        size = np.abs(targets - predictions)
        return np.divide(
            size, self.sigma, out=np.where(size > 0, np.inf, 0.0), where=self.sigma > 0
        )

    def margin(self, predictions: Floats, targets: Floats) -> Floats:
        """The limit minus the largest residual, (n,): below 0 is suspect.

        Args:
            predictions: (n, k).
            targets: (n, k).
        """
        return self.limit - self.residuals(predictions, targets).max(1)

    def quality(self, margin: Floats) -> Floats:
        """Margins on a scale from 0 to 1, (n,); suspect is what lies below 0.5."""
        return 1 / (1 + ((self.limit - margin) / self.limit) ** 2)


def fit_residuals(predictions: Floats, targets: Floats) -> ResidualModel:
    """The noise of targets (n, k) around predictions (n, k).

    Example:
        >>> fit_residuals(np.zeros((3, 1)), np.array([[1.0], [-1.0], [9.0]])).sigma.round(2)
        array([1.48])
    """
    return ResidualModel(NORMAL_MAD * np.median(np.abs(targets - predictions), axis=0))


def ranking(margin: Floats) -> Integers:
    """Places (n,), 0 for the least margin; equal ones in the order of the data."""
    rank = np.empty(len(margin), np.int64)
    rank[np.argsort(margin, kind="stable")] = np.arange(len(margin))
    return rank


def _margin_and_rival(scores: Floats, labels: Integers) -> tuple[Floats, Integers]:
    rows = np.arange(len(labels))
    own = scores[rows, labels]
    others = scores.copy()
    others[rows, labels] = -np.inf
    rival = others.argmax(1)
    return own - others[rows, rival], rival


def _log_posterior(pi: Floats, labels: Integers, matrix: Floats) -> Floats:
    # Expectation-maximization takes impossible classes to 0, whose logarithm would leave a NaN.
    return np.log(np.maximum(pi, np.finfo(np.float64).tiny)) + np.log(matrix[:, labels].T)


def _clipped(p: Floats) -> Floats:
    p = np.maximum(p, LEAST)
    return p / p.sum(1, keepdims=True)


def _blocks(
    probabilities: Any, labels: Integers | None
) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
    size = max(1, min(BLOCK, NUMBERS // probabilities.shape[1]))
    for start in range(0, len(probabilities), size):
        rows = slice(start, start + size)
        given = np.zeros(0, np.int64) if labels is None else labels[rows]
        yield np.asarray(probabilities[rows], np.float64), given


def _share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean()) if len(mask) else float("nan")
