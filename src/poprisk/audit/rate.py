"""Shares that an audit estimates, with their errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poprisk.printing import short_html, short_repr


class Rate(NamedTuple):
    """A share, from 0 to 1.

    Attributes:
        value: the estimate.
        standard_error: of it.
        valid: whether it may be believed.
        reason: why not.
        cost: trainings beyond the audited one.
    """

    value: float
    standard_error: float
    valid: bool = True
    reason: str = ""
    cost: float = 0.0

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def interval(self) -> tuple[float, float]:
        """From two standard errors below to two above, within 0 and 1."""
        half = 2 * self.standard_error
        return max(0.0, self.value - half), min(1.0, self.value + half)


def share_of(
    found: NDArray[np.bool_],
    weights: NDArray[np.float64] | None = None,
    *,
    groups: NDArray[np.int64] | None = None,
) -> Rate:
    r"""A share of independent cases; its error is Agresti and Coull's, which is never 0.

    Weighted cases count as :math:`(\sum w)^2/\sum w^2` equal ones (Kish). Cases of one group may
    depend on each other: the error is that from group to group where it is larger.

    Args:
        found: which cases it is the share of, (n,).
        weights: of the cases, (n,).
        groups: ids of groups of cases, (n,).

    Example:
        >>> share_of(np.ones(10, bool))
        Rate(value=1.0, standard_error=0.07979, valid=True, reason='', cost=0.0)
    """
    w = np.ones(len(found)) if weights is None else weights
    if not w.sum() > 0:
        return Rate(math.nan, math.nan, False, "there are no cases")
    value, n = float(w @ found / w.sum()), float(w.sum() ** 2 / (w @ w))
    p = (value * n + 1) / (n + 2)
    error = math.sqrt(p * (1 - p) / (n + 2))
    if groups is None:
        return Rate(value, error)
    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, w * (found - value))
    m = len(sums)
    between = math.sqrt(float(sums @ sums) * m / (m - 1)) / float(w.sum()) if m > 1 else math.inf
    return Rate(value, max(error, between) if m < len(found) else error)
