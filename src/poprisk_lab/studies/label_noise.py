"""What label noise that is fitted does to queries: by the operators of the path, and measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from poprisk.path import split_gradient
from poprisk.path.channel import Channel, Spectrum
from poprisk.path.operators import PathOperators
from poprisk_lab.plots import rounded, short
from poprisk_lab.studies.claim import Metrics
from poprisk_lab.studies.descent import (
    CleanSplit,
    Fit,
    linear,
    mean_square,
    predicted,
)

TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6)
Start = Callable[[], nn.Module]
"""Makes the model before training, each time the same."""


def excess(
    fit: Fit, start: Start, data: CleanSplit, std: float, *, pairs: int, generator: torch.Generator
) -> Metrics:
    """Predicted and measured excess test error of fitting label noise.

    Args:
        fit: how the model is fitted.
        start: the model.
        data: with clean targets.
        std: of normal label noise.
        pairs: of noise drawn anew, each trained from the same start.
        generator: draws it.
    """
    model, noisy = start(), start()
    calm = fit.follow(model, data, data.clean)
    base, gain = predicted(model, data.query), calm.noise_gain()
    noises = std * torch.randn(len(data.x), pairs, generator=generator, dtype=torch.float64)
    noises = torch.cat([noises, -noises], 1)  # in pairs, so that what is odd in the noise cancels
    outputs = redrawn(fit, start, data, noises)
    clean_error = mean_square(base - data.target)
    errors = (outputs - data.target).square().mean(0)
    return {
        "noise": std**2,
        "excess": short(float(errors.mean()) - clean_error),
        "clean_error": short(clean_error),
        "predicted": short(std**2 * gain.path),
        "frozen": short(std**2 * gain.frozen),
        "clean_closure": short(max(calm.closure)),
        "clean_steps": len(calm.run),
        "draw": short(mean_square(outputs[:, :1] - base)),
        **by_path(fit.follow(noisy, data, data.clean + noises[:, :1]), data.clean),
    }


def redrawn(fit: Fit, start: Start, data: CleanSplit, noises: Tensor) -> Tensor:
    """Query outputs (m, k) after training on clean targets plus each of the noises (n, k)."""
    first = start()
    if isinstance(first, nn.Linear):  # its outputs do not know of each other: all at once
        models, targets = [linear(data.x.shape[1], noises.shape[1])], [data.clean + noises]
    else:
        models = [start() for _ in range(noises.shape[1])]
        targets = [data.clean + e for e in noises.split(1, dim=1)]
    for model, y in zip(models, targets, strict=True):
        fit.train(model, (data.x, y), like=first)
    return torch.cat([predicted(model, data.query) for model in models], 1)


def by_path(ops: PathOperators, clean: Tensor) -> Metrics:
    """What the operators of a run on noisy labels say.

    Args:
        ops: of the run.
        clean: training targets without noise.

    Returns:
        ``harmful``: mean square of the harmful noise; ``reservoir`` and ``unseen``: share of the
        noise outside the channels of W and of G; ``dissipation`` and ``gains``: their spectra.
    """
    cells = ops.four_cells(clean)
    u, target = ops.integrals.snapshots[0].train_outputs, ops.run.problem.train[1].flatten()
    last = ops.integrals.snapshots[-1].train_outputs
    noise = split_gradient(ops.run, clean, ops.run.weights[0])[1].flatten()
    assert cells.error is not None  # the queries have targets
    eigenvalues, gains = ops.spectrum.eigenvalues, Spectrum.of(ops.G.T @ ops.G)
    return {
        "steps": len(ops.run),
        "residual": short(float((last - target).norm() / (u - target).norm())),
        "closure": short(max(ops.closure)),
        "drift": short(max(value for _, value in ops.kernel_drift())),
        "harmful": short(mean_square(cells.cells.harmful_noise)),
        "terms": {k: short(v) for k, v in cells.error.terms.items()},
        "reservoir": {f"{t:g}": outside(ops.channel(t), noise) for t in TOLERANCES},
        "unseen": {f"{t:g}": outside(gains.channel(t), noise) for t in TOLERANCES},
        "dissipation": rounded((eigenvalues / eigenvalues[0]).tolist()),
        "gains": rounded((gains.eigenvalues / gains.eigenvalues[0]).tolist()),
    }


def outside(channel: Channel, g: Tensor) -> float:
    """Share of the squared norm that lies outside a channel, to six digits."""
    return abs(round(1 - channel.share(g), 6))
