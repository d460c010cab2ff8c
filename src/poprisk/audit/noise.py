r"""The noise matrix :math:`T_{jy} = P(\text{given } y \mid \text{true } j)`, and its undoing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SURE = 0.7
"""Confidence from which a prediction counts for the matrix; the median where that is less."""
EVEN = 0.2
"""Share of an even spread in the off-diagonal entries of the matrix."""
PRIOR = 1.0
"""Errors that the rate of all classes together is worth in the rate of one class."""
ROUNDS = 3
"""How often the matrix is counted from predictions that it was removed from."""
STEPS = 20
"""Steps of expectation-maximization that remove it."""


def confusion_counts(
    predicted: Integers, confidence: Floats, labels: Integers, *, classes: int
) -> Floats:
    """How often the given label is y where the prediction is j, over its surer part, (c, c).

    Args:
        predicted: most probable class, (n,).
        confidence: its probability, (n,).
        labels: given, (n,).
        classes: c.
    """
    sure = confidence >= min(SURE, float(np.median(confidence)))
    counts = np.zeros((classes, classes))
    np.add.at(counts, (predicted[sure], labels[sure]), 1.0)
    return counts


def noise_matrix(counts: Floats, *, symmetric: bool = False) -> Floats:
    r"""Estimate :math:`T` from counts of predicted against given labels, (c, c).

    The error rates of the classes are drawn towards that of all, :math:`\bar r`, and the spread of
    their errors towards an even one, as much as chance explains how they differ: by
    :math:`\min(1, \nu/X)`, with X the :math:`\chi^2` statistic of all rates,
    :math:`\sum_j (o_j-\bar r n_j)^2/(\bar r(1-\bar r)n_j)`, or of all spreads,
    :math:`\sum_{jy}(N_{jy}-e_j)^2/e_j` with :math:`e_j=o_j/(c-1)`, and :math:`\nu` its degrees of
    freedom (empirical Bayes; :math:`o_j` of :math:`n_j` counts of class j lie off the diagonal).
    :data:`EVEN` of an even spread is mixed in, so that no entry is 0. Ours.

    Args:
        counts: from :func:`confusion_counts`.
        symmetric: whether all classes have one error rate and no pattern, as for the two sides of
            a pair in an order of chance.

    Example:
        >>> noise_matrix(np.array([[90.0, 9.5], [5.0, 94.5]]), symmetric=True).round(3)
        array([[0.925, 0.075],
               [0.075, 0.925]])
    """
    c = len(counts)
    off = counts * (1 - np.eye(c))
    wrong, all_of = off.sum(1), counts.sum(1)
    pooled = (wrong.sum() + 0.5) / (all_of.sum() + 1)
    even = (1 - np.eye(c)) / (c - 1)
    if symmetric:
        return np.diag(np.full(c, 1 - pooled)) + pooled * even
    common = _chance(wrong, pooled * all_of, pooled * (1 - pooled) * all_of, c - 1)
    rate = common * pooled + (1 - common) * (wrong + PRIOR) / (all_of + PRIOR / pooled)
    erring = wrong > 0
    expected = wrong[:, None] * even
    alike = _chance(off, expected, expected, int(erring.sum()) * (c - 2))
    spread = even.copy()
    spread[erring] = alike * even[erring] + (1 - alike) * off[erring] / wrong[erring, None]
    spread = (1 - EVEN) * spread + EVEN * even
    return np.diag(1 - rate) + rate[:, None] * spread


def _chance(counts: Floats, expected: Floats, variance: Floats, dof: int) -> float:
    """How much of the differences between counts and expectations chance explains, 0 to 1."""
    some = variance > 0
    statistic = float(((counts - expected)[some] ** 2 / variance[some]).sum())
    return 1.0 if statistic <= dof else dof / statistic


def error_pattern(matrix: Floats) -> Floats:
    """How the errors of each class are shared out among the others, (c, c).

    Without the even spread that :func:`noise_matrix` mixes in. The diagonal has no meaning.

    Args:
        matrix: from it, (c, c).
    """
    spread = matrix / (1 - matrix.diagonal())[:, None]
    return np.maximum(spread - EVEN / (len(matrix) - 1), 0.0) / (1 - EVEN)


def unmix(probabilities: Floats, matrix: Floats) -> Floats:
    r"""Probabilities :math:`\pi_i` of true classes whose noisy mixture is the predicted one.

    Maximizes :math:`\sum_y q_{iy}\log(\pi_i T)_y` by steps of expectation-maximization from
    :math:`\pi_i = q_i`; stopped early, which keeps what is uncertain so.

    Args:
        probabilities: :math:`q`, predicted for given labels, (n, c).
        matrix: :math:`T`, (c, c).
    """
    found = probabilities
    for _ in range(STEPS):
        mixed = found @ matrix
        ratio = np.divide(probabilities, mixed, out=np.zeros_like(mixed), where=mixed > 0)
        found = found * (ratio @ matrix.T)
    return found / found.sum(1, keepdims=True)
