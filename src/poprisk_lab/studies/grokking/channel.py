r"""Whether the target enters the channel before the network generalizes.

At moments of a run the tangent kernel of the outputs, averaged over the classes,
:math:`\Theta_{ij} = \frac1c\sum_o \langle\nabla u_{io}, \nabla u_{jo}\rangle`, is computed at the
weights of that moment. If they stayed, gradient flow would dissipate the residual along its leading
directions and leave the rest: the *channel* is the leading ``rank`` directions, the *reservoir*
what is below. The energy of the centred one-hot targets in the channel, and the test accuracy that
the kernel alone would reach (ridge regression on the targets), are set beside the accuracy of the
network. Ours, after [LG, §3]: the exact operators of a whole run are in :mod:`poprisk.path`, but
a table modulo p has too many outputs for them at the sizes where grokking is seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from poprisk_lab.plots import rounded
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.grokking import runs

PROBES = 6
RIDGE = 1e-3
"""Relative to the largest eigenvalue."""
HALF = 0.5


class Alignment(NamedTuple):
    """What a kernel says about the targets: energy in its channel, test accuracy of its ridge."""

    energy: float
    accuracy: float


def class_kernel(model: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    r"""Unbiased estimate of Θ on ``x``, (n, n), from :data:`PROBES` random signs over the classes.

    For signs v, :math:`E\,\langle\nabla v^T u_i, \nabla v^T u_j\rangle = c\,\Theta_{ij}`.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        c = model(x[:1]).shape[1]
    total = torch.zeros(len(x), len(x))
    for _ in range(PROBES):
        v = 2.0 * torch.randint(2, (c,), generator=generator) - 1

        def output(parameters: dict[str, Tensor], one: Tensor, v: Tensor = v) -> Tensor:
            return functional_call(model, parameters, (one.unsqueeze(0),))[0] @ v

        rows = vmap(grad(output), in_dims=(None, 0), chunk_size=64)(weights, x)
        for part in rows.values():
            flat = part.flatten(1)
            total += flat @ flat.T
    return total / (PROBES * c)


def align(kernel: Tensor, n: int, y: Tensor, answers: Tensor, *, rank: int) -> Alignment:
    """Alignment of a kernel over n training and the test examples with the targets.

    Args:
        kernel: (n + m, n + m).
        n: training examples.
        y: their classes, (n,).
        answers: those of the test examples, (m,).
        rank: directions of the channel.
    """
    c = int(max(y.max(), answers.max())) + 1
    target = F.one_hot(y, c).double()
    target = target - target.mean(0)
    inner = kernel[:n, :n].double()
    values, vectors = torch.linalg.eigh(inner)
    shares = (vectors.T @ target).square().sum(1) / target.square().sum()
    solved = vectors @ ((vectors.T @ target) / (values + RIDGE * values[-1]).unsqueeze(1))
    scores = kernel[n:, :n].double() @ solved
    right = (scores.argmax(1) == answers).double().mean()
    return Alignment(float(shares[-rank:].sum()), float(right))


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train as :func:`runs.run` does, and align the kernel at each measurement.

    Returns a ``curve`` of (step, training accuracy, test accuracy, energy, kernel accuracy), and
    the first steps at which network and kernel have half of the test set right.
    """
    data, model = runs.load(settings), runs.build_model(settings)
    optimizer = runs.build(settings, model, len(data.y))
    n, asked = len(data.y), slice(0, settings["asked"])
    both = torch.cat([data.x, data.asked[asked]])
    source, rows = runs.batches(settings, n, 0), list[list[float]]()
    for step in range(settings["limit"] + 1):
        if step % settings["every"] == 0:
            _, train, _, test = runs.measure(model, data)
            kernel = class_kernel(model, both, torch.Generator().manual_seed(step))
            found = align(kernel, n, data.y, data.answers[asked], rank=settings["rank"])
            rows.append([step, train, test, found.energy, found.accuracy])
            if len(rows) > 2 and min(row[2] for row in rows[-3:]) >= runs.GOAL:
                break
        runs.gradient(model, optimizer, data, next(source))
        optimizer.step()
    network, kernel_first = (runs.first(rows, column, HALF) for column in (2, 4))
    middle = (rows[0][3] + max(row[3] for row in rows)) / 2
    return {
        "network": network,
        "kernel": kernel_first,
        "channel": runs.first(rows, 3, middle) if middle > rows[0][3] else None,
        "chance": settings["rank"] / n,
        "curve": [[int(row[0]), *rounded(row[1:], 4)] for row in rows],
    }
