r"""The share of pairs that are the wrong way round, from margins of pairs not trained on yet.

A margin is the score of the side that is said to be better minus the other's. Where the pair was
not trained on, which side is said to be better does not move the scores: margins of flipped pairs
are distributed as those of right ones with the other sign. How often a margin is positive, given
its size, then tells the share :math:`\varepsilon` of flipped pairs,

.. math:: P(m > 0 \mid |m|) = \varepsilon + (1 - 2\varepsilon)\,\sigma(k|m|)

whose limit for large margins is :math:`1-\varepsilon`; exact for normal margins [ours; in
psychophysics, a psychometric curve with a rate of lapses]. Where margins are not large enough
to come near that limit, the share cannot be told from a lack of knowledge, and the result says so.
It also says so where the curve is no match: what a run learns from pairs that are sorted, the
flipped ones first, gives the others margins of the wrong sign.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from poprisk.audit.noise import Floats
from poprisk.audit.rate import Rate

SHARES: Floats = np.linspace(0.0, 0.495, 100)
"""Shares of flipped pairs that are weighed against each other; each is as likely beforehand."""
SHARPNESS: Floats = np.geomspace(0.05, 20.0, 60)
"""Values of k, for margins in units of their median size; likewise."""
BINS = 256
"""Groups of margins of about one size, which are looked at together."""
MOST_SPREAD = 0.075
"""Standard error from which the share is not told: half of what it is without any pair."""
GROUPS = 8
"""Groups of margins by size, in which the curve is held against how often they are positive."""
MISFIT = 16.8
"""Chi square of the groups from which the curve is no match: 1 in 100 by chance, of 8 - 2."""
OFF = 0.03
"""Distance, root mean square over the groups, up to which it is a match whatever their size.

It is part of the error: in margins of real runs the curve is no more exact than that.
"""
FEWEST = 50
"""Pairs from which on there is an estimate."""


def flip_rate(margins: Any) -> Rate:
    """The share of flipped pairs: mean of its posterior, and its spread with the curve's own error.

    Args:
        margins: scores of the sides said to be better minus the others', (n,), of pairs before
            they were trained on: held out, from cross-fitting, or of a first epoch. What is 0 or
            not finite is left out.

    Example:
        >>> rate = flip_rate(np.where(np.arange(500) % 10, 5.0, -5.0) * np.linspace(1, 2, 500))
        >>> round(rate.value, 2), rate.valid
        (0.1, True)
    """
    m = np.asarray(margins, np.float64).ravel()
    m = m[np.isfinite(m) & (m != 0)]
    if len(m) < FEWEST:
        few = f"{len(m)} pairs have a margin, and it takes {FEWEST} to tell the share of flips"
        return Rate(math.nan, math.nan, False, few)
    size, won, lost = _binned(m)
    known = 1 / (1 + np.exp(-SHARPNESS[:, None] * size))  # chance that a right pair is won
    e = SHARES[:, None, None]
    p = e + (1 - 2 * e) * known
    # Of no flips and a curve that is steep, 1 - p rounds to 0.
    fit = np.log(p) @ won + np.log(np.maximum(1 - p, np.finfo(np.float64).tiny)) @ lost
    weight = np.exp(fit - fit.max()).sum(1)
    weight /= weight.sum()
    mean = float(weight @ SHARES)
    spread = math.sqrt(float(weight @ (SHARES - mean) ** 2))
    vague = (
        f"margins of {len(m)} pairs leave a standard error of {spread:.2f}: the run does not know "
        "even the clearest pairs well enough; take more pairs, or train longer"
        if spread > MOST_SPREAD
        else _misfit(won, lost, p.reshape(-1, p.shape[-1])[fit.argmax()])
    )
    return Rate(mean, math.hypot(spread, OFF), not vague, vague)


def _misfit(won: Floats, lost: Floats, p: Floats) -> str:
    """Why the likeliest curve, p in each bin, is no match; empty if it is one."""
    bins = np.array_split(np.stack([won, won + lost, p * (won + lost)]), GROUPS, axis=1)
    positive, n, expected = np.stack([some.sum(1) for some in bins], 1)
    off, told = (positive - expected) / n, expected / n
    chi = float((off**2 * n / np.maximum(told * (1 - told), 1 / n)).sum())
    distance = math.sqrt(float((off**2).mean()))
    if chi <= MISFIT or distance <= OFF:
        return ""
    return (
        f"margins do not have the signs that flips give them: {distance:.2f} away on average, of "
        "groups of one size. Did the pairs come in an order of chance, or the flipped ones first? "
        "Leave out the suspects instead, or give flip_rate margins of pairs held out"
    )


def _binned(m: Floats) -> tuple[Floats, Floats, Floats]:
    """Sizes of margins, in units of their median, and how many are positive and negative."""
    size = np.abs(m)
    order = np.argsort(size, kind="stable")
    groups = np.array_split(order, min(BINS, len(m)))
    won = np.array([float((m[g] > 0).sum()) for g in groups])
    lost = np.array([float((m[g] < 0).sum()) for g in groups])
    return np.array([size[g].mean() for g in groups]) / np.median(size), won, lost
