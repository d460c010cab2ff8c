r"""The estimate of twins that were trained without examples, naively; float64.

Of each twin the mean loss on what it was trained without, by a straight line through the model's
own losses there (least squares by hand), read at the mean of the model's losses on all examples.
The error of the mean of the :math:`\psi_i`, one example after the other; what the line leaves of an
example is what one leaves that was fitted without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def estimate(
    losses: Sequence[float], twins: Sequence[Sequence[float]], out: Sequence[Sequence[bool]]
) -> tuple[float, float, list[float]]:
    """Value, standard error and the ψ of each example."""
    n = len(losses)
    everyone = sum(losses) / n
    sums = [0.0] * n
    for twin, part in zip(twins, out, strict=True):
        rows = [i for i in range(n) if part[i]]
        x = sum(losses[i] for i in rows) / len(rows)
        y = sum(twin[i] for i in rows) / len(rows)
        across = sum((losses[i] - x) * (twin[i] - y) for i in rows)
        square = sum((losses[i] - x) ** 2 for i in rows)
        slope = across / square if square else 0.0
        left = {i: twin[i] - without(i, rows, losses, twin) for i in rows}
        mean = sum(left.values()) / len(rows)
        for i in range(n):
            deviation = slope * (losses[i] - everyone)
            if part[i]:
                deviation += n / len(rows) * (left[i] - mean)
            sums[i] += y + slope * (everyone - x) + 1.25 * deviation
    values = [s / len(twins) for s in sums]
    value = sum(values) / n
    return value, math.sqrt(sum((v - value) ** 2 for v in values) / (n - 1) / n), values


def without(i: int, rows: Sequence[int], losses: Sequence[float], twin: Sequence[float]) -> float:
    """What a line through all rows but i says at i."""
    rest = [j for j in rows if j != i]
    x, y = (sum(v[j] for j in rest) / len(rest) for v in (losses, twin))
    square = sum((losses[j] - x) ** 2 for j in rest)
    slope = sum((losses[j] - x) * (twin[j] - y) for j in rest) / square if square else 0.0
    return y + slope * (losses[i] - x)
