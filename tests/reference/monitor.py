"""The monitor's gradient statistics, naively: one gradient an example, coordinate by coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import permutations

import torch
from torch import Tensor, nn


def example_gradients(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    params: list[nn.Parameter] | None = None,
) -> Tensor:
    """Gradients (b, P) of all parameters or of those given, one backward pass an example."""
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1]).sum()
        grads = torch.autograd.grad(value, params or list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).double()


def signal(*steps: Tensor, batch: int | None = None) -> dict[str, float]:
    r"""Signal and noise of the gradients (b, P), b ≥ 4, of steps, coordinate by coordinate.

    Args:
        steps: per-example gradients of each.
        batch: examples behind each step; b if left out.
    """
    found = [_step(rows, batch or len(rows)) for rows in steps]
    k = len(found)
    norm, noise, trace = (sum(f[name] for f in found) / k for name in ("S", "V", "T"))
    size = noise + abs(norm)

    def error(weights: list[tuple[float, float]]) -> float:
        return (
            math.sqrt(sum(_variance(f, a, c) for f, (a, c) in zip(found, weights, strict=True))) / k
        )

    def mean_share(s: float) -> float:
        under_errors = s + error([(1, 0)] * k) * z
        return float((under_errors / (noise + under_errors.abs()) * density).sum() / density.sum())

    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = (-z.square() / 2).exp()
    # Derivatives by the norm, of the share and of the mean share under errors.
    nudge = 1e-4 * size
    slope = (mean_share(norm + nudge) - mean_share(norm - nudge)) / (2 * nudge)
    more = max(1.0, 2 - slope * size**2 / noise)
    apart = 2 * error([(trace + norm, norm)] * k) / trace**2
    low, high = norm / trace - apart, norm / trace + apart
    return {
        "share": 2 * norm / size - mean_share(norm),
        "share_error": more
        * error([(noise + norm / f["B"], norm / f["B"]) for f in found])
        / size**2,
        "share_low": low * trace / (noise + abs(low * trace)),
        "share_high": high * trace / (noise + abs(high * trace)),
        "snr": 1 + norm / noise,
        "noise_scale": _reciprocal(norm / trace),
        "noise_scale_low": _reciprocal(high),
        "noise_scale_high": _reciprocal(low),
    }


def _step(rows: Tensor, batch: int) -> dict[str, float]:
    """S, T and V of one step with their variances: means over tuples of different examples.

    The variance of S is unbiased but for the two terms being cut off at zero.
    """
    b = len(rows)
    square = trace = 0.0
    for column in rows.T.tolist():
        mean = sum(column) / b
        square += mean**2
        trace += sum((g - mean) ** 2 for g in column) / (b - 1)
    norm = square - trace / b
    k = (rows @ rows.T).tolist()
    own = [k[i][i] for i in range(b)]
    mean_own = sum(own) / b
    pair = _mean(k[i][j] ** 2 for i, j in permutations(range(b), 2))
    triple = _mean(k[i][j] * k[i][m] for i, j, m in permutations(range(b), 3))
    quadruple = _mean(k[i][j] * k[m][n] for i, j, m, n in permutations(range(b), 4))
    whole = max(pair - quadruple, 0.0)
    single = min(max(triple - quadruple, 0.0), whole / 2)
    with_own = _mean(k[i][j] * own[i] for i, j in permutations(range(b), 2))
    return {
        "S": norm,
        "T": trace,
        "V": trace / batch,
        "B": batch,
        "along": 4 * single / b,
        "across": 2 * (whole - 2 * single) / (b * (b - 1)),
        "own": sum((n - mean_own) ** 2 for n in own) / b / (b - 1),
        "covariance": 2 * (with_own - norm * mean_own) / b,
    }


def _variance(step: dict[str, float], a: float, c: float) -> float:
    alone = a**2 * step["along"] + c**2 * step["own"] - 2 * a * c * step["covariance"]
    return max(alone, 0.0) + a**2 * step["across"]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _reciprocal(value: float) -> float:
    return 1 / value if value > 0 else math.inf
