"""The monitor's gradient statistics, naively: one gradient an example, coordinate by coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import permutations

import torch
from torch import Tensor, nn


def example_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Gradients (b, P) of all parameters, one backward pass an example."""
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).double()


def signal(rows: Tensor) -> dict[str, float]:
    r"""Signal and noise of gradients (b, P), b ≥ 4, coordinate by coordinate and tuple by tuple.

    The variance of S is unbiased but for the two terms being cut off at zero: means of products of
    inner products over pairs, triples and quadruples of different examples.
    """
    b = len(rows)
    square = noise = 0.0
    for column in rows.T.tolist():
        mean = sum(column) / b
        square += mean**2
        noise += sum((g - mean) ** 2 for g in column) / b / (b - 1)
    signal, size = square - noise, noise + abs(square - noise)
    k = (rows @ rows.T).tolist()
    own = [k[i][i] for i in range(b)]
    mean_own = sum(own) / b
    pair = _mean(k[i][j] ** 2 for i, j in permutations(range(b), 2))
    triple = _mean(k[i][j] * k[i][m] for i, j, m in permutations(range(b), 3))
    quadruple = _mean(k[i][j] * k[m][n] for i, j, m, n in permutations(range(b), 4))
    whole = max(pair - quadruple, 0.0)
    single = min(max(triple - quadruple, 0.0), whole / 2)
    across = 2 * (whole - 2 * single) / (b * (b - 1))
    own_variance = sum((n - mean_own) ** 2 for n in own) / b / (b - 1)
    with_own = _mean(k[i][j] * own[i] for i, j in permutations(range(b), 2))
    covariance = 2 * (with_own - signal * mean_own) / b

    def error(by_signal: float, by_own: float) -> float:
        alone = by_signal**2 * 4 * single / b + by_own**2 * own_variance
        alone += 2 * by_signal * by_own * covariance
        return math.sqrt(max(alone, 0.0) + by_signal**2 * across)

    inverse = signal / (b * noise)
    apart = 2 * error(mean_own / (b * noise) ** 2, -signal / (b * noise) ** 2)
    return {
        "share": signal / size,
        "share_error": error(mean_own / b / size**2, -signal / b / size**2),
        "snr": square / noise,
        "noise_scale": _reciprocal(inverse),
        "noise_scale_low": _reciprocal(inverse + apart),
        "noise_scale_high": _reciprocal(inverse - apart),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _reciprocal(value: float) -> float:
    return 1 / value if value > 0 else math.inf
