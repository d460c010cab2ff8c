r"""The estimate of the twins, naively: one example, one twin, one group after the other; float64.

A twin trained on labels pushed by t moves the outputs by :math:`\Delta`. With :math:`B_i` the
Hessian of example i's loss at its outputs and :math:`|t|^2` summed over all examples,

.. math:: \varphi = \frac{\sum_i t_i\cdot B_i\Delta_i}{|t|^2},\qquad
          \varphi = \frac1N\sum_i\mathrm{tr}\,B_i(A^{-1}+B_i)^{-1}

gives the gain A, and :math:`u_i + A\nabla\ell_i(u_i)` the outputs without example i. Where losses
bend over what moved, the gradients' own change stands for :math:`B\Delta`:
:math:`\varphi=\sum t\cdot\Delta g/|t|^2` and :math:`A=h/(1-\varphi)` with
:math:`h=\sum t\cdot\Delta/|t|^2`. THEORY §6. Without a whole group of m examples, what its moves
have in common has the gain of :math:`\varphi(1+(m-1)\kappa)`, what they differ by that of
:math:`\varphi(1-\kappa)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from reference.risk import Loss, gradient, hessian

Twin = tuple[Tensor, Tensor]
"""Outputs of a twin and the push it was trained with, (n, c)."""


class Gain(NamedTuple):
    """Less one standard error, as measured, and more by one."""

    low: float
    middle: float
    high: float


class Measured(NamedTuple):
    """Of some of the examples: φ, its error, the gains, and what each answer adds, (k, n)."""

    dof: float
    error: float
    gain: Gain
    answers: list[list[float]]


class Common(NamedTuple):
    """Intraclass correlation of the response, its error, and each example's part in that."""

    correlation: float
    error: float
    apart: list[list[float]]


class Estimate(NamedTuple):
    value: float
    standard_error: float
    dof: float
    dof_error: float
    outputs: Tensor
    losses: Tensor
    influence: Tensor
    part_dofs: list[float]


def error_of_sum(values: Sequence[float], groups: Sequence[int]) -> float:
    """Standard error of a sum of values whose groups are independent and of mean zero."""
    sums: dict[int, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value
    g = len(sums)
    return math.sqrt(sum(s * s for s in sums.values()) * g / max(g - 1, 1))


def dof_of(hessians: Sequence[Tensor], gain: float, dimensions: int) -> float:
    """φ by a gain."""
    total = 0.0
    for b in hessians:
        eye = torch.eye(len(b), dtype=b.dtype)
        total += float((b @ torch.linalg.inv(eye / gain + b)).trace())
    return total / (len(hessians) * dimensions)


def gain_of(hessians: Sequence[Tensor], dof: float, dimensions: int) -> float:
    """The gain of a φ."""
    if dof <= 0:
        return 0.0

    def above(t: float) -> float:
        return dof_of(hessians, math.exp(t), dimensions) - dof

    return math.exp(float(brentq(above, math.log(1e-12), math.log(1e9), xtol=1e-14)))  # pyrefly: ignore


def measure(
    loss: Loss,
    u: Tensor,
    y: Tensor,
    twins: Sequence[Twin],
    groups: Sequence[int],
    *,
    bent: bool,
    dimensions: int,
) -> Measured:
    """φ and the gain of examples that share them."""
    n = len(u)
    hessians = [hessian(loss, u[i], y[i]) for i in range(n)]
    at = [gradient(loss, u[i], y[i]) for i in range(n)]
    size, moved, follows, turned = (list[list[float]]() for _ in range(4))
    for outputs, push in twins:
        size.append([float(push[i] @ push[i]) for i in range(n)])
        moved.append([float(push[i] @ (outputs[i] - u[i])) for i in range(n)])
        follows.append([float(push[i] @ hessians[i] @ (outputs[i] - u[i])) for i in range(n)])
        turned.append(
            [float(push[i] @ (gradient(loss, outputs[i], y[i]) - at[i])) for i in range(n)]
        )
    totals = [sum(s) for s in size]
    k, everything = len(twins), sum(totals)
    if not bent:
        own = [sum(f) / t for f, t in zip(follows, totals, strict=True)]
        dof = sum(own) / k
        errors = [
            math.sqrt(1.6)
            * error_of_sum([follows[j][i] - own[j] * size[j][i] for i in range(n)], groups)
            / totals[j]
            for j in range(k)
        ]
        error = math.sqrt(sum(e * e for e in errors)) / k
        gain = Gain(*(gain_of(hessians, dof + e * error, dimensions) for e in (-1, 0, 1)))
        answers = [[follows[j][i] - dof * size[j][i] for i in range(n)] for j in range(k)]
        return Measured(dof, error, gain, answers)
    h = sum(map(sum, moved)) / everything
    dof = sum(map(sum, turned)) / everything
    middle = h / (1 - dof)
    # d(h / (1 - φ)) = dh / (1 - φ) + h dφ / (1 - φ)²
    answers = [
        [
            math.sqrt(1.6)
            / everything
            * (
                (moved[j][i] - h * size[j][i]) / (1 - dof)
                + h * (turned[j][i] - dof * size[j][i]) / (1 - dof) ** 2
            )
            for i in range(n)
        ]
        for j in range(k)
    ]
    spread = [
        [math.sqrt(1.6) * (turned[j][i] - dof * size[j][i]) / everything for i in range(n)]
        for j in range(k)
    ]
    gain_error = math.sqrt(sum(error_of_sum(row, groups) ** 2 for row in answers))
    error = math.sqrt(sum(error_of_sum(row, groups) ** 2 for row in spread))
    gain = Gain(max(middle - gain_error, 0.0), max(middle, 0.0), max(middle + gain_error, 0.0))
    return Measured(dof, error, gain, answers)


def drawn(
    value: float, error: float, whole: float, whole_error: float, real: float
) -> tuple[float, float]:
    """What a part measured, drawn towards all by as much as its error explains."""
    w = real / (real + error**2) if real > 0 else 0.0
    return whole + w * (value - whole), math.hypot(w * error, (1 - w) * whole_error)


def estimate(
    loss: Loss,
    u: Tensor,
    y: Tensor,
    twins: Sequence[Twin],
    *,
    groups: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    bent: bool = False,
    dimensions: int,
) -> Estimate:
    """The estimate of :func:`poprisk.risk.estimate.estimate_risk`, all examples with a loss."""
    n = len(u)
    independent = list(range(n)) if groups is None else list(groups)
    whole = measure(loss, u, y, twins, independent, bent=bent, dimensions=dimensions)
    gains = [whole.gain] * n
    part_dofs = [whole.dof]
    if parts is not None:
        found = {}
        for part in sorted(set(parts)):
            rows = [i for i in range(n) if parts[i] == part]
            mine = [(outputs[rows], push[rows]) for outputs, push in twins]
            own = [independent[i] for i in rows]
            found[part] = (
                rows,
                measure(loss, u[rows], y[rows], mine, own, bent=bent, dimensions=dimensions),
            )
        halves = [0.5 * (m.gain.high - m.gain.low) for _, m in found.values()]
        values = [m.gain.middle if bent else m.dof for _, m in found.values()]
        errors = halves if bent else [m.error for _, m in found.values()]
        centre = whole.gain.middle if bent else whole.dof
        around = 0.5 * (whole.gain.high - whole.gain.low) if bent else whole.error
        noise = sum(e * e for e in errors) / len(found)
        real = max(sum((v - centre) ** 2 for v in values) / len(found) - noise, 0.0)
        part_dofs = []
        for (rows, m), value, error in zip(found.values(), values, errors, strict=True):
            middle, half = drawn(value, error, centre, around, real)
            if bent:
                gain = Gain(max(middle - half, 0.0), max(middle, 0.0), middle + half)
                part_dofs.append(m.dof)
            else:
                hessians = [hessian(loss, u[i], y[i]) for i in rows]
                gain = Gain(*(gain_of(hessians, middle + e * half, dimensions) for e in (-1, 0, 1)))
                part_dofs.append(middle)
            for i in rows:
                gains[i] = gain

    def scored(k: int, correlation: float | None) -> tuple[list[Tensor], list[float]]:
        """Left-out outputs by the low, middle or high gain, and their losses."""
        moves = [gains[i][k] * gradient(loss, u[i], y[i]) for i in range(n)]
        if correlation is not None:
            moves = without_groups(moves, independent, correlation, ratio)
        left = [u[i] + moves[i] for i in range(n)]
        return left, [float(loss(v[None], y[i][None]).sum()) for i, v in enumerate(left)]

    def ratio(times: float) -> float:
        if bent:
            return times * (1 - whole.dof) / max(1 - times * whole.dof, 0.05)
        hessians = [hessian(loss, u[i], y[i]) for i in range(n)]
        return gain_of(hessians, min(times * whole.dof, 0.95), dimensions) / whole.gain.middle

    shared = None if groups is None else common(loss, u, y, twins, groups, bent=bent)
    correlation = None if shared is None else shared.correlation
    outputs, losses = scored(1, correlation)
    value = sum(losses) / n
    sampling = error_of_sum([v - value for v in losses], independent) / n
    response = 0.5 * (sum(scored(2, correlation)[1]) - sum(scored(0, correlation)[1])) / n
    rows = [(response, whole.answers)]
    if shared is not None:
        ends = (
            min(shared.correlation + shared.error, 1.0),
            max(shared.correlation - shared.error, 0.0),
        )
        more, less = (sum(scored(1, end)[1]) / n for end in ends)
        rows.append((0.5 * (more - less), shared.apart))
    influence = list[Tensor]()
    for slope, answers in rows:
        size = math.hypot(*(error_of_sum(row, independent) for row in answers))
        influence.append(slope * torch.tensor(answers, dtype=torch.float64) / size)
    return Estimate(
        value,
        math.hypot(sampling, *(slope for slope, _ in rows)),
        whole.dof,
        whole.error,
        torch.stack(outputs),
        torch.tensor(losses, dtype=torch.float64),
        torch.cat(influence),
        part_dofs,
    )


def common(
    loss: Loss, u: Tensor, y: Tensor, twins: Sequence[Twin], groups: Sequence[int], *, bent: bool
) -> Common:
    """What the responses of a group have in common."""
    members = {g: [i for i in range(len(u)) if groups[i] == g] for g in sorted(set(groups))}
    size = along = together = reach = 0.0
    kept = list[dict[int, tuple[float, float]]]()
    for outputs, push in twins:
        moved = outputs - u
        if not bent:
            moved = torch.stack([hessian(loss, u[i], y[i]) @ moved[i] for i in range(len(u))])
        size += float((push * push).sum())
        along += float((push * moved).sum())
        kept.append({})
        for g, rows in members.items():
            t, d = push[rows].sum(0), moved[rows].sum(0)
            kept[-1][g] = float(t @ d), float(t @ t)
    phi = along / size
    for sums in kept:
        for g, (answer, square) in sums.items():
            together += answer - phi * square
            reach += phi * (len(members[g]) - 1) * square
    k = together / reach
    apart = [
        {g: a - phi * (1 + (len(members[g]) - 1) * k) * t for g, (a, t) in sums.items()}
        for sums in kept
    ]
    count = len(members)
    squares = sum(v * v for sums in apart for v in sums.values())
    error = math.sqrt(1.6 * squares * count / (count - 1)) / reach
    spread = [[sums[g] / len(members[g]) for g in groups] for sums in apart]
    return Common(min(max(k, 0.0), 1.0), error, spread)


def without_groups(
    moves: Sequence[Tensor],
    groups: Sequence[int],
    correlation: float,
    ratio: Callable[[float], float],
) -> list[Tensor]:
    """Moves without the whole group from those without one example."""
    found = list[Tensor]()
    for i, move in enumerate(moves):
        rows = [j for j in range(len(moves)) if groups[j] == groups[i]]
        mean = sum((moves[j] for j in rows), torch.zeros_like(move)) / len(rows)
        within, between = ratio(1 - correlation), ratio(1 + (len(rows) - 1) * correlation)
        found.append(within * (move - mean) + between * mean)
    return found
