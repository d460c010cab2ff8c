"""Problems of the claim about stopping, on which nothing of the twin was chosen.

Rates and epochs were set on true risks alone, on seeds 0 to 2, so that a run goes on past its least
risk. Of examples in groups the true risk is that of new groups.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from poprisk.losses import binary_cross_entropy, cross_entropy, squared_error
from poprisk_lab.studies.risk import problems as risk_problems
from poprisk_lab.studies.risk.problems import TrainingProblem, adamw, gate, sgd
from poprisk_lab.studies.stopping.drawn import (
    absolute_error,
    heavy_tails,
    offsets,
    signals,
    unequal,
    uneven_flips,
    uneven_noise,
)
from poprisk_lab.studies.stopping.tables import cancer, countries, diabetes
from poprisk_lab.studies.stopping.text import (
    CONTEXT,
    SYMBOLS,
    Reader,
    adapted,
    kinds,
    next_character,
)
from poprisk_lab.tasks.nets import mlp


def signal_cnn() -> nn.Module:
    """Three convolutions on signals of 40 values."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, 24, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(24, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(24, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 5, 10),
    )


OLD = risk_problems.PROBLEMS
"""Those that the limits of validity were chosen on, with other seeds."""
PROBLEMS: dict[str, TrainingProblem] = {
    "diabetes, deep MLP, SGD with momentum": TrainingProblem(
        partial(diabetes, n=200), lambda: mlp(10, 64, 64, 1),
        squared_error, sgd(0.01, 0.9), 60, 20, ("sklearn",)),
    "breast cancer 20%, MLP, AdamW": TrainingProblem(
        partial(cancer, n=250, noise=0.2), lambda: mlp(30, 64, 64, 1),
        binary_cross_entropy, adamw(1e-3), 60, 25, ("sklearn",)),
    "heavy tails, MLP, AdamW": TrainingProblem(
        partial(heavy_tails, n=400, noise=0.6), lambda: mlp(8, 64, 64, 1),
        absolute_error, adamw(2e-3), 60, 20),
    "uneven noise, tanh MLP, AdamW": TrainingProblem(
        partial(uneven_noise, n=600), lambda: mlp(8, 96, 96, 1, activation=nn.Tanh),
        squared_error, adamw(3e-3), 60, 30),
    "countries, MLP, AdamW": TrainingProblem(
        partial(countries, training=70), lambda: mlp(8, 64, 64, 1),
        squared_error, adamw(1e-3), 40, 64, ("plotly", "pandas")),
    "kinds of text 20%, LoRA, AdamW": TrainingProblem(
        partial(kinds, n=1200, noise=0.2), partial(adapted, rank=4),
        cross_entropy, adamw(2e-3), 20, 40),
    "groups with offsets, deep MLP, SGD with momentum": TrainingProblem(
        partial(offsets, n=1500, size=10, shared=0.6, own=0.4), lambda: mlp(10, 96, 96, 1),
        squared_error, sgd(0.03, 0.9), 60, 50),
    "mnist1d 25%, CNN, SGD with momentum": TrainingProblem(
        partial(signals, n=2000, noise=0.25), signal_cnn,
        cross_entropy, sgd(0.02, 0.9), 50, 64, ("mnist1d",)),
    "unequal classes 10%, MLP, PopRiskAdamW": TrainingProblem(
        partial(unequal, n=3000, noise=0.1), lambda: mlp(12, 128, 128, 3),
        cross_entropy, gate(3e-3), 60, 100),
    "next character, transformer, AdamW": TrainingProblem(
        partial(next_character, n=5000),
        partial(Reader, SYMBOLS, length=CONTEXT, width=32, blocks=1),
        cross_entropy, adamw(5e-3), 20, 100),
    "uneven flips, MLP, AdamW": TrainingProblem(
        partial(uneven_flips, n=20_000), lambda: mlp(20, 128, 128, 1),
        binary_cross_entropy, adamw(2e-3), 20, 200),
}  # fmt: skip
