"""Noisy problems whose true risk is known: for studies of the risk estimates.

Every problem is trained for many epochs, past the point where memorizing begins. The true risk is
that of fresh inputs with labels as noisy as in training, the expectation over label noise exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import PopRiskAdamW, TwinRisk
from poprisk.losses import binary_cross_entropy, cross_entropy, squared_error
from poprisk.risk.grouped import grouped_error
from poprisk_lab.tasks.digits import cnn, split_digits
from poprisk_lab.tasks.nets import mlp

FRESH = 4_000
QUICK_EPOCHS = 2
"""Of a quick form."""


class NoisyData(NamedTuple):
    """A training set, and what outputs on fresh inputs cost.

    Attributes:
        x: inputs (n, ...).
        y: targets (n, ...).
        fresh: inputs (m, ...) that nothing is trained on.
        costs: from outputs on them to each one's loss (m,): its expectation over label noise where
            the noise is known, the loss of the target that came with it in measured data.
        groups: ids of dependent training examples, (n,); None: all independent.
        fresh_groups: the same of the fresh inputs, (m,); no group is in both.
    """

    x: Tensor
    y: Tensor
    fresh: Tensor
    costs: Callable[[Tensor], Tensor]
    groups: Tensor | None = None
    fresh_groups: Tensor | None = None

    def risk(self, outputs: Tensor) -> float:
        """The true risk of outputs on ``fresh``."""
        return self.costs(outputs).mean().item()

    def risk_error(self, outputs: Tensor) -> float:
        """Its standard error: how far the mean over other fresh inputs would lie from it."""
        costs = self.costs(outputs).double()
        return grouped_error(costs - costs.mean(), self.fresh_groups) / len(costs)


MakeOptimizer = Callable[[nn.Module, int, int], Optimizer]
"""From a model, the number of examples and the batch size to an optimizer."""


class TrainingProblem(NamedTuple):
    """One way of training on noisy labels."""

    data: Callable[[int], NoisyData]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: MakeOptimizer
    epochs: int
    batch_size: int
    needs: tuple[str, ...] = ()
    """Packages that the data come from."""

    def twin(self, n: int, seed: int) -> TwinRisk:
        """A twin of it with n examples; weights are drawn by torch's generator."""
        return TwinRisk(
            self.model,
            lambda m: self.optimizer(m, n, self.batch_size),
            self.loss,
            dataset_size=n,
            seed=seed,
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_costs(clean: Tensor, noise: float, classes: int) -> Callable[[Tensor], Tensor]:
    """Expected cross-entropies (m,) where a share of the labels is another class, all alike."""

    def costs(u: Tensor) -> Tensor:
        cost = -u.log_softmax(1)
        own = cost.gather(1, clean.unsqueeze(1)).squeeze(1)
        return (1 - noise) * own + noise / (classes - 1) * (cost.sum(1) - own)

    return costs


def binary_costs(right: Tensor, noise: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Expected logistic losses (m,) of labels (m, 1) flipped with this probability, one or (m,)."""

    def costs(u: Tensor) -> Tensor:
        kept, flipped = (binary_cross_entropy(u, y) for y in (right, 1 - right))
        return (1 - noise) * kept + noise * flipped

    return costs


def number_costs(clean: Tensor, noise: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Expected squared errors (m,) at noise of this standard deviation, one for all or (m,)."""
    return lambda u: squared_error(u, clean) + 0.5 * noise**2


def ridges(seed: int, *, n: int, dimensions: int, directions: int = 3) -> NoisyData:
    """A sum of sines along a few directions; noise of standard deviation 0.7."""
    g = _generator(seed)
    w = torch.randn(dimensions, directions, generator=g) / math.sqrt(dimensions)
    x = torch.randn(n + FRESH, dimensions, generator=g)
    clean = 0.8 * torch.sin(2 * x @ w).sum(1, keepdim=True)
    y = clean + 0.7 * torch.randn(len(x), 1, generator=g)
    return NoisyData(x[:n], y[:n], x[n:], number_costs(clean[n:], 0.7))


def digits(seed: int, *, noise: float) -> NoisyData:
    """1,000 handwritten digits with symmetric label noise; the rest are fresh."""
    (x, y), (fresh, right), _ = split_digits(seed, noise)
    return NoisyData(x, y, fresh, class_costs(right, noise, 10))


def parabola(seed: int, *, n: int = 1000, dimensions: int = 20, noise: float = 0.2) -> NoisyData:
    """Two classes on either side of a parabola, a fifth of the labels flipped."""
    g = _generator(seed)
    x = torch.randn(n + FRESH, dimensions, generator=g)
    p = x @ (torch.randn(dimensions, 2, generator=g) / math.sqrt(dimensions))
    clean = (2 * p[:, :1] + p[:, 1:].square() > 1).float()
    y = torch.where(torch.rand(len(x), 1, generator=g) < noise, 1 - clean, clean)
    return NoisyData(x[:n], y[:n], x[n:], binary_costs(clean[n:], noise))


def repeats(seed: int, *, n: int, numbers: bool, noise: float) -> NoisyData:
    """Sequences of eight symbols: how often does the first one come back?"""
    g = _generator(seed)
    x = torch.randint(6, (n + FRESH, 8), generator=g)
    count = (x[:, 1:] == x[:, :1]).sum(1)
    if numbers:
        clean = count.unsqueeze(1) - 1.2
        y = clean + noise * torch.randn(len(x), 1, generator=g)
        return NoisyData(x[:n], y[:n], x[n:], number_costs(clean[n:], noise))
    clean = count.clamp(max=3)
    other = (clean + torch.randint(1, 4, (len(x),), generator=g)) % 4
    y = torch.where(torch.rand(len(x), generator=g) < noise, other, clean)
    return NoisyData(x[:n], y[:n], x[n:], class_costs(clean[n:], noise, 4))


class Transformer(nn.Module):
    """One pre-norm block of width 32 on sequences of eight symbols, mean-pooled."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(6, 32)
        self.places = nn.Parameter(0.2 * torch.randn(8, 32))
        self.block = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From symbols (b, 8) to outputs (b, c)."""
        return self.head(self.block(self.symbols(x) + self.places).mean(1))


def sgd(lr: float, momentum: float = 0.0) -> MakeOptimizer:
    """SGD."""
    return lambda m, n, b: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum)


def adamw(lr: float, decay: float = 0.01) -> MakeOptimizer:
    """AdamW."""
    return lambda m, n, b: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=decay)


def gate(lr: float, decay: float = 0.01, mask: str = "soft") -> MakeOptimizer:
    """PopRiskAdamW."""
    return lambda m, n, b: PopRiskAdamW(
        m, lr=lr, weight_decay=decay, mask=mask, batch_size=b, dataset_size=n
    )


PROBLEMS: dict[str, TrainingProblem] = {
    "ridges, MLP, GD": TrainingProblem(
        partial(ridges, n=500, dimensions=8), lambda: mlp(8, 128, 1, activation=nn.Tanh),
        squared_error, sgd(0.1), 3000, 500),
    "ridges, deep MLP, SGD with momentum": TrainingProblem(
        partial(ridges, n=800, dimensions=8), lambda: mlp(8, 64, 64, 1),
        squared_error, sgd(0.02, 0.9), 100, 50),
    "ridges, MLP, AdamW": TrainingProblem(
        partial(ridges, n=600, dimensions=10), lambda: mlp(10, 128, 1),
        squared_error, adamw(3e-3), 120, 40),
    "ridges, deep MLP, PopRiskAdamW": TrainingProblem(
        partial(ridges, n=800, dimensions=10, directions=2), lambda: mlp(10, 64, 64, 1),
        squared_error, gate(3e-3), 80, 40),
    "digits 40%, MLP, AdamW": TrainingProblem(
        partial(digits, noise=0.4), lambda: mlp(64, 128, 128, 10),
        cross_entropy, adamw(1e-3), 50, 64),
    "digits 40%, CNN, SGD with momentum": TrainingProblem(
        partial(digits, noise=0.4), partial(cnn, 16, (64, 10)),
        cross_entropy, sgd(0.03, 0.9), 40, 64),
    "digits 40%, MLP, PopRiskAdamW": TrainingProblem(
        partial(digits, noise=0.4), lambda: mlp(64, 128, 128, 10),
        cross_entropy, gate(1e-3), 60, 64),
    "digits 20%, MLP with dropout, AdamW": TrainingProblem(
        partial(digits, noise=0.2), lambda: mlp(64, 128, 128, 10, dropout=0.2),
        cross_entropy, adamw(1e-3), 60, 64),
    "digits 20%, CNN, AdamW": TrainingProblem(
        partial(digits, noise=0.2), partial(cnn, 16, (64, 10)),
        cross_entropy, adamw(1e-3), 40, 64),
    "parabola 20%, MLP, SGD with momentum": TrainingProblem(
        parabola, lambda: mlp(20, 64, 64, 1), binary_cross_entropy, sgd(0.03, 0.9), 40, 50),
    "repeats 25%, transformer, AdamW": TrainingProblem(
        partial(repeats, n=1000, numbers=False, noise=0.25), lambda: Transformer(4),
        cross_entropy, adamw(2e-3), 40, 64),
    "repeats, transformer regression, AdamW": TrainingProblem(
        partial(repeats, n=800, numbers=True, noise=0.8), lambda: Transformer(1),
        squared_error, adamw(2e-3), 50, 50),
}  # fmt: skip


def problem_of(settings: dict[str, Any]) -> TrainingProblem:
    """The problem that a trial's settings name, with other epochs if they say so."""
    problem = PROBLEMS[settings["problem"]]
    return problem._replace(epochs=settings.get("epochs", problem.epochs))


def slug(name: str) -> str:
    """A name as part of a file's."""
    return "".join(c if c.isalnum() else "-" for c in name)


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None
