"""Small recorded runs for the tests of path, channel and drift."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import PopRiskAdamW, gated
from poprisk.path import Run, record
from samplers import randn

N, M = 14, 9
Build = Callable[[Iterable[Any]], Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.05),
    "dampening": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8, dampening=0.3),
    "Nesterov": lambda ps: torch.optim.SGD(
        ps, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.05
    ),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "AMSGrad": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.005, weight_decay=0.1),
    "centred RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.001, momentum=0.8, centered=True),
    "gated SGD": lambda ps: gated(torch.optim.SGD(ps, lr=0.05, momentum=0.9), batch_size=5),
    "gated AdamW": lambda ps: gated(torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1)),
}
for _mask in ("soft", "hard", "snr"):
    OPTIMIZERS[f"PopRiskAdamW {_mask}"] = lambda ps, mask=_mask: PopRiskAdamW(
        ps, lr=0.01, weight_decay=0.1, mask=mask, batch_size=5, dataset_size=N
    )

LOSSES: dict[str, Any] = {
    "squared_error": "squared_error",
    "cross_entropy": "cross_entropy",
    "binary_cross_entropy": "binary_cross_entropy",
    "log cosh": lambda u, y: (u - y).cosh().log().sum(1),
}


def data(kind: str = "squared_error", *, n: int = N, c: int = 2) -> tuple[Any, Any, Tensor]:
    """Training set, query set and clean training targets."""
    x = randn(n + M, 3, seed=7)
    clean = torch.stack([(2 * x[:, 0]).sin(), x[:, 1] * x[:, 2]], 1)[:, :c]
    y = clean + 0.3 * randn(n + M, c, seed=8)
    if kind == "cross_entropy":
        clean = (clean[:, 0] > 0).long()
        y = clean.clone()
        y[: n // 4] = 1 - y[: n // 4]
    elif kind == "binary_cross_entropy":
        clean, y = clean.sigmoid(), y.sigmoid()
    return (x[:n], y[:n]), (x[n:], y[n:]), clean[:n]


def network(c: int = 2, *, hidden: int = 6, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """One hidden layer, float64, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, hidden), activation(), nn.Linear(hidden, c))
    return net.double()


def batches(steps: int, *, n: int = N, b: int | None = 5, seed: int = 0) -> list[Tensor]:
    """Index batches; all examples for ``b=None``."""
    generator = torch.Generator().manual_seed(seed)
    if b is None:
        return [torch.arange(n)] * steps
    return [torch.randperm(n, generator=generator)[:b] for _ in range(steps)]


def recorded(
    optimizer: str | Build = "SGD",
    loss: str = "squared_error",
    *,
    steps: int = 16,
    b: int | None = 5,
    hidden: int = 6,
    activation: type[nn.Module] = nn.Tanh,
    n: int = N,
    c: int = 2,
    **settings: Any,
) -> Run:
    """A run of the small network."""
    train, query, _ = data(loss, n=n, c=c)
    net = network(c, hidden=hidden, activation=activation)
    build = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return record(
        net,
        LOSSES[loss],
        build(net.parameters()),
        batches(steps, n=n, b=b),
        query,
        train=train,
        **settings,
    )
