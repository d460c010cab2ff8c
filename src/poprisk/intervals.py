"""Means over seeds with their intervals, for every table, sentence and plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Seeds from which on there is an interval: with two, Student's t is 12.7 standard errors of a
spread that is itself a guess."""
ALIKE = 6
"""Seeds that all differ the same way from which on that is no chance, whatever their spread:
2 · 0.5⁶ is below 5%."""


class Interval(NamedTuple):
    """A mean over seeds with its 95% confidence interval (Student's t).

    Attributes:
        mean: over the seeds.
        low: end of the interval; NaN for fewer than :data:`MIN_SEEDS` seeds.
        high: the other.
        values: what the seeds gave; empty for a figure that is none of theirs.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def few(self) -> bool:
        """Whether there is none for want of seeds."""
        return 0 < len(self.values) < MIN_SEEDS

    @property
    def alike(self) -> bool:
        """Whether the seeds gave the same, up to rounding: their spread says nothing then."""
        if len(self.values) < 2:
            return False
        size = max(map(abs, self.values))
        return max(self.values) - min(self.values) <= 1e-9 * size

    @property
    def sign(self) -> int:
        """1 or -1 if it lies clearly above or below zero, 0 if that may be chance or is unknown."""
        if not self.known or self.low <= 0 <= self.high:
            return 0
        if self.alike and len(self.values) < ALIKE:
            return 0
        return 1 if self.low > 0 else -1

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """Through an increasing function, such as ``math.exp`` back from logarithms."""
        mean, low, high = map(function, self[:3])
        return Interval(mean, low, high, tuple(map(function, self.values)))

    def clipped(self, low: float, high: float) -> Interval:
        """With its ends inside of what the quantity can be."""
        if not low <= self.mean <= high:
            return self
        return self._replace(low=max(self.low, low), high=min(self.high, high))


def t_interval(values: Iterable[float]) -> Interval:
    """Mean and 95% Student-t confidence interval.

    Example:
        >>> t_interval([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0, values=(1.0, 1.0, 1.0))
        >>> t_interval([1.0, 3.0])
        Interval(mean=2.0, low=nan, high=nan, values=(1.0, 3.0))
    """
    found = tuple(values)
    n = len(found)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = sum(found) / n
    if n < MIN_SEEDS:
        return Interval(mean, math.nan, math.nan, found)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in found) / (n - 1))
    half = student_quantile(0.5 + CONFIDENCE / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, found)


@cache
def student_quantile(p: float, df: int) -> float:
    r"""Quantile of Student's t, for whole degrees of freedom.

    Its distribution is a finite sum in :math:`\theta = \arctan(t/\sqrt{df})`, which is bisected.

    Args:
        p: from 0.5 up, below 1.
        df: degrees of freedom, at least 1.

    Example:
        >>> round(student_quantile(0.975, 10), 6)
        2.228139
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _central(theta: float, df: int) -> float:
    """Probability of a value between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    cosine, sine = math.cos(theta), math.sin(theta)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 + df % 2, df, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total
