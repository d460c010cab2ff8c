r"""Finding wrong labels, naively: one example and one entry at a time, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def normalized_margin(p: Row, y: int) -> float:
    r""":math:`\hat p(y)-\max_{j\ne y}\hat p(j)`."""
    return p[y] - max(v for j, v in enumerate(p) if j != y)


def clipped(p: Row) -> list[float]:
    """Probabilities of at least 1e-6."""
    found = [max(v, 1e-6) for v in p]
    return [v / sum(found) for v in found]


def median(values: Sequence[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def noise_matrix(rows: Sequence[Row], labels: Sequence[int]) -> list[list[float]]:
    r""":math:`T_{jy}`: counted over the surer rows, shrunk, a fifth of an even spread mixed in."""
    c = len(rows[0])
    least = min(0.7, median([max(p) for p in rows]))
    counts = [[0.0] * c for _ in range(c)]
    for p, y in zip(rows, labels, strict=True):
        if max(p) >= least:
            counts[list(p).index(max(p))][y] += 1
    n = [sum(row) for row in counts]
    off = [n[j] - counts[j][j] for j in range(c)]
    pooled = (sum(off) + 0.5) / (sum(n) + 1)
    of_rates = sum(
        (off[j] - pooled * n[j]) ** 2 / (pooled * (1 - pooled) * n[j]) for j in range(c) if n[j]
    )
    common = min(1.0, (c - 1) / of_rates) if of_rates > 0 else 1.0
    of_spreads = sum(
        (counts[j][y] - off[j] / (c - 1)) ** 2 / (off[j] / (c - 1))
        for j in range(c)
        for y in range(c)
        if y != j and off[j]
    )
    freedom = (c - 2) * sum(o > 0 for o in off)
    alike = min(1.0, freedom / of_spreads) if of_spreads > 0 else 1.0
    matrix = []
    for j in range(c):
        rate = common * pooled + (1 - common) * (off[j] + 1) / (n[j] + 1 / pooled)
        row = []
        for y in range(c):
            if y == j:
                row.append(1 - rate)
                continue
            even = 1 / (c - 1)
            seen = counts[j][y] / off[j] if off[j] else even
            row.append(rate * (0.8 * (alike * even + (1 - alike) * seen) + 0.2 * even))
        matrix.append(row)
    return matrix


def unmixed(q: Row, matrix: Sequence[Row], steps: int = 20) -> list[float]:
    r""":math:`\pi` with :math:`q\approx\pi T`, by expectation-maximization from q."""
    c, pi = len(q), list(q)
    for _ in range(steps):
        mixed = [sum(pi[j] * matrix[j][y] for j in range(c)) for y in range(c)]
        pi = [pi[j] * sum(q[y] / mixed[y] * matrix[j][y] for y in range(c)) for j in range(c)]
    return [v / sum(pi) for v in pi]


def log_posterior_margin(pi: Row, matrix: Sequence[Row], y: int) -> float:
    r""":math:`\log\pi(y)T_{yy}-\max_{j\ne y}\log\pi(j)T_{jy}`."""
    terms = [
        math.log(max(v, 2.2250738585072014e-308)) + math.log(row[y])
        for v, row in zip(pi, matrix, strict=True)
    ]
    return terms[y] - max(t for j, t in enumerate(terms) if j != y)


def noise_aware(rows: Sequence[Row], labels: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Posterior margins, and which are suspect: the least ones.

    As many as three quarters of those that disagree and a quarter of what the matrix expects.
    """
    q = [clipped(p) for p in rows]
    matrix = noise_matrix(rows, labels)
    for _ in range(3):
        matrix = noise_matrix([unmixed(p, matrix) for p in q], labels)
    pi = [unmixed(p, matrix) for p in q]
    margins = [log_posterior_margin(p, matrix, y) for p, y in zip(pi, labels, strict=True)]
    disagree = sum(p.index(max(p)) != y for p, y in zip(pi, labels, strict=True))
    expected = sum(p[j] * (1 - matrix[j][j]) for p in pi for j in range(len(p)))
    ranked = sorted(range(len(margins)), key=lambda i: margins[i])
    worst = ranked[: round(0.75 * disagree + 0.25 * expected)]
    return margins, [i in worst for i in range(len(margins))]


def contrast(p: Row, planted: int, original: int) -> float:
    """Probability of a planted label beyond that of the other wrong ones."""
    others = [v for j, v in enumerate(p) if j not in (planted, original)]
    return p[planted] - sum(others) / len(others)


def averaged(looks: Sequence[Row], numbers: Sequence[int]) -> list[float]:
    """Mean of predictions over looks, weighed by their numbers."""
    rows = list(zip(looks, numbers, strict=True))
    return [sum(k * look[j] for look, k in rows) / sum(numbers) for j in range(len(looks[0]))]
