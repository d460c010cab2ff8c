r"""Benign overfitting: what label noise that is fitted to the end does to a query.

Isotropic label noise of variance σ² adds :math:`\sigma^2\|G\|_F^2/(n^2 m)` to the test error, in
the linear case at interpolation :math:`\sigma^2\sum_j \|J_Q v_j\|^2/\sigma_j^2/m` (SVD of
:math:`J_S`). [LG, Cor. H.4, Fig. 1]. Measured on label noise drawn anew, against a network
trained on clean labels from the same start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poprisk.path import split_gradient
from poprisk.path.channel import Channel, Spectrum
from poprisk.path.operators import PathOperators
from poprisk_lab.studies import benign_judge as judging
from poprisk_lab.studies.claim import Claim, Found, Trial, Workspace
from poprisk_lab.studies.descent import (
    Data,
    descent,
    linear,
    mean_square,
    operators,
    predicted,
    recorded,
    short,
    shorts,
    train,
    two_layer,
)
from poprisk_lab.tasks.interpolation import long_tail

NOISE = 0.5
FLIPPED = 0.2
EXAMPLES = 30
QUERIES = 100
PAIRS = 200
"""Of noise for a linear model, which is trained on all of them at once."""
TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6)


class Setting(NamedTuple):
    """A problem and how it is trained.

    Attributes:
        tail: weak directions of the inputs; 0: isotropic inputs.
        inputs: dimension of isotropic inputs.
        width: of a tanh network; 0: a linear model.
        below: relative residual at which training ends: interpolation.
        momentum: of gradient descent.
        fraction: of the :func:`poprisk_lab.studies.descent.stable_rate`.
        limit: of steps.
    """

    tail: int
    inputs: int
    width: int
    below: float
    momentum: float
    fraction: float
    limit: int = 4_000


SETTINGS = {
    "linear, long tail": Setting(600, 0, 0, 1e-5, 0.9, 1.0),
    "linear, isotropic": Setting(0, 33, 0, 1e-5, 0.97, 1.0),
    "network, long tail": Setting(400, 0, 8, 1e-2, 0.9, 0.5),
    "network, isotropic": Setting(0, 5, 16, 1e-2, 0.95, 0.5),
    "logistic, long tail": Setting(600, 0, 0, 0.0, 0.9, 1.0, 150),
}
SCALES = {True: (0.2, 0.2), False: (0.5, 0.2)}
"""Scales of the network's start, for a long tail and for isotropic inputs."""


def trials(quick: bool) -> list[Trial]:
    """Every setting on every seed."""
    seeds, network = (2, 2) if quick else (6, 8)
    found = list[Trial]()
    for name, setting in SETTINGS.items():
        given = {
            "setting": name,
            "pairs": network if setting.width else PAIRS,
            "below": max(setting.below, 1e-2) if quick else setting.below,
        }
        short_name = name.replace(", ", "-").replace(" ", "-")
        found += [Trial(f"{short_name}-{s}", {**given, "seed": s}) for s in range(seeds)]
    return found


def make(setting: Setting, seed: int, *, classes: bool) -> tuple[Data, Callable[[], nn.Module]]:
    """Data of the setting, and the model at its start."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    total = EXAMPLES + QUERIES
    if setting.tail:
        x = long_tail(total, setting.tail, generator)
    else:
        x = torch.randn(total, setting.inputs, generator=generator, dtype=torch.float64)
    clean = x[:, :1] - x[:, 1:2]
    if classes:
        clean = (clean > 0).double()
    elif setting.width:
        clean = 1.5 * torch.tanh(clean)
    width, inputs = setting.width, x.shape[1]
    scales = SCALES[bool(setting.tail)]
    model = (lambda: two_layer(inputs, width, scales, seed)) if width else (lambda: linear(inputs))
    return Data.split(x, clean, EXAMPLES), model


def run(settings: dict[str, Any], workspace: Workspace) -> Found:
    """One setting on one seed."""
    name, seed = settings["setting"], settings["seed"]
    setting = SETTINGS[name]._replace(below=settings["below"])
    generator = torch.Generator().manual_seed(2_000 + seed)
    if name.startswith("logistic"):
        return _classes(setting, seed, generator)
    return _regression(setting, seed, settings["pairs"], generator)


def _regression(setting: Setting, seed: int, pairs: int, generator: torch.Generator) -> Found:
    """Predicted and measured excess test error of fitting label noise."""
    data, make_model = make(setting, seed, classes=False)
    size = {"below": setting.below, "limit": setting.limit}
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    calm = operators(recorded(model, optimizer, data, data.clean, **size))
    base = predicted(model, data.query)
    noises = NOISE * torch.randn(EXAMPLES, pairs, generator=generator, dtype=torch.float64)
    noises = torch.cat([noises, -noises], 1)  # in pairs, so that what is odd in the noise cancels
    outputs = _redrawn(setting, data, make_model, noises)
    errors = (outputs - data.target).square().mean(0)
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    noisy = operators(recorded(model, optimizer, data, data.clean + noises[:, :1], **size))
    return {
        "noise": NOISE**2,
        "excess": short(float(errors.mean()) - mean_square(base - data.target)),
        "clean_error": short(mean_square(base - data.target)),
        "predicted": short(NOISE**2 * calm.noise_gain().path),
        "frozen": short(NOISE**2 * calm.noise_gain().frozen),
        "clean_closure": short(max(calm.closure)),
        "clean_steps": len(calm.run),
        "draw": short(mean_square(outputs[:, :1] - base)),
        **_one_run(noisy, data.clean),
    }


def _redrawn(
    setting: Setting, data: Data, make_model: Callable[[], nn.Module], noises: Tensor
) -> Tensor:
    """Query outputs (m, k) after training on clean targets plus each of the noises (n, k)."""
    if not setting.width:  # outputs of a linear model do not know of each other: all at once
        models, targets = [linear(data.x.shape[1], noises.shape[1])], [data.clean + noises]
    else:
        models = [make_model() for _ in range(noises.shape[1])]
        targets = [data.clean + e for e in noises.split(1, dim=1)]
    first = make_model()
    for model, y in zip(models, targets, strict=True):
        optimizer = descent(first, data.x, setting.fraction, setting.momentum, of=model)
        train(model, optimizer, (data.x, y), below=setting.below, limit=setting.limit)
    return torch.cat([predicted(model, data.query) for model in models], 1)


def _classes(setting: Setting, seed: int, generator: torch.Generator) -> Found:
    """Logistic regression until wrong labels are fitted too."""
    data, make_model = make(setting, seed, classes=True)
    wrong = torch.rand(data.clean.shape, generator=generator) < FLIPPED
    y = torch.where(wrong, 1 - data.clean, data.clean)
    model = make_model()
    optimizer = descent(model, data.x, setting.fraction, setting.momentum)
    loss = "binary_cross_entropy"
    done = operators(recorded(model, optimizer, data, y, limit=setting.limit, loss=loss))
    right = (predicted(model, data.query) > 0) == (data.target > 0.5)
    fitted = (predicted(model, data.x) > 0) == (y > 0.5)
    return {
        "fitted": short(float(fitted.double().mean())),
        "accuracy": short(float(right.double().mean())),
        **_one_run(done, data.clean),
    }


def _one_run(ops: PathOperators, clean: Tensor) -> Found:
    """What the operators of a run on noisy labels say."""
    cells = ops.four_cells(clean)
    u, target = ops.integrals.snapshots[0].train_outputs, ops.run.problem.train[1].flatten()
    last = ops.integrals.snapshots[-1].train_outputs
    noise = split_gradient(ops.run, clean, ops.run.weights[0])[1].flatten()
    assert cells.error is not None  # the queries have targets
    eigenvalues = ops.spectrum.eigenvalues
    gains = Spectrum.of(ops.G.T @ ops.G)
    return {
        "steps": len(ops.run),
        "residual": short(float((last - target).norm() / (u - target).norm())),
        "closure": short(max(ops.closure)),
        "drift": short(max(value for _, value in ops.kernel_drift())),
        "harmful": short(mean_square(cells.cells.harmful_noise)),
        "terms": {k: short(v) for k, v in cells.error.terms.items()},
        "reservoir": {f"{t:g}": _outside(ops.channel(t), noise) for t in TOLERANCES},
        "unseen": {f"{t:g}": _outside(gains.channel(t), noise) for t in TOLERANCES},
        "dissipation": shorts(eigenvalues / eigenvalues[0]),
        "gains": shorts(gains.eigenvalues / gains.eigenvalues[0]),
    }


def _outside(channel: Channel, g: Tensor) -> float:
    """Share of the squared norm that lies outside a channel, to six digits."""
    return abs(round(1 - channel.share(g), 6))


CLAIM = Claim(
    name="benign-overfitting",
    title="Benign overfitting",
    statement=(
        "A network that fits label noise to the end can still predict well: the test error it "
        "adds is the harmful-noise term of the path operators, and benign noise lies in the "
        "reservoir, where no query sees it."
    ),
    source="Fig. 1, Cor. H.4 (frozen kernel)",
    paper="",
    published=["The paper's settings for this claim are not known."],
    ours=[
        f"n = {EXAMPLES} training examples, {QUERIES} queries with clean targets, label noise of "
        f"variance {NOISE**2}; wrong labels {FLIPPED:.0%} in the logistic setting.",
        "Long tail: 2 strong directions and 400 to 600 weak ones that share the variance 2 (benign "
        "by Bartlett et al. 2020). Isotropic: 33 inputs for the linear model, 5 for the network.",
        "Full-batch gradient descent with momentum until the residual is 1e-5 (linear) or 1e-2 "
        "(network) of that at the start; 150 steps in the logistic setting.",
        "Excess test error: mean over noise drawn in pairs ±e, each trained from the same start, "
        "minus the error of the network trained on clean labels.",
    ],
    trials=trials,
    run=run,
    judge=judging.judge,
    show=judging.show,
)
