"""Small models of all sorts, for c outputs; as a rule each row belongs to one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from zoo import Function


@dataclass(frozen=True)
class Kind:
    """A sort of model.

    Attributes:
        make: from the number of outputs.
        inputs: shape of an example's inputs.
        tokens: whether inputs are integers below 6.
        random: whether outputs in training mode are.
        mixes: whether examples see each other in training mode.
    """

    make: Callable[[int], nn.Module]
    inputs: tuple[int, ...] = (4,)
    tokens: bool = False
    random: bool = False
    mixes: bool = False


def mlp(activation: Callable[[], nn.Module], *more: Callable[[], nn.Module]) -> Kind:
    """A hidden layer of 6 with an activation and other layers behind it."""
    return Kind(
        lambda c: nn.Sequential(
            nn.Linear(4, 6), activation(), *(layer() for layer in more), nn.Linear(6, c)
        )
    )


class Running(nn.Module):
    """A running average in a buffer and a counter in an attribute, both written in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        average: Any = self.average
        average.lerp_(x.detach().mean(0).to(average.dtype) if len(x) else average, 0.1)
        return x


def attention(c: int) -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return Function(lambda m, x: m.head(m.block(x).mean(1)), block=block, head=nn.Linear(4, c))


def recurrent(c: int) -> nn.Module:
    return Function(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(4, 3, batch_first=True),
        head=nn.Linear(3, c),
    )


def embedding(c: int, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4, **options), nn.Flatten(), nn.Linear(12, c))


def tied(c: int) -> nn.Module:
    return Function(
        lambda m, x: m.head(torch.tanh(torch.tanh(x @ m.w) @ m.w.T)),
        w=nn.Parameter(torch.randn(4, 5)),
        head=nn.Linear(4, c),
    )


def force(c: int) -> nn.Module:
    """The derivative of an energy by the inputs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        position = x if x.requires_grad else x.detach().requires_grad_()
        energy = m.energy(position).square().sum()
        (field,) = torch.autograd.grad(energy, position, create_graph=True)
        return field[:, :c]

    return Function(forward, energy=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))


def checkpointed(*, reentrant: bool) -> Kind:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.head(checkpoint(m.body, h, use_reentrant=reentrant))

    return Kind(
        lambda c: Function(
            forward,
            first=nn.Linear(4, 5),
            body=nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Tanh()),
            head=nn.Linear(5, c),
        )
    )


def normalized(c: int) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, c))


def half_frozen(c: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, c))
    model[0].requires_grad_(False)
    return model


def masked(c: int) -> nn.Module:
    """A hook on a parameter freezes its first row."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, c))
    mask = torch.ones(6, 1)
    mask[0] = 0
    weight: Any = model[0].weight

    def hook(g: Tensor) -> Tensor:
        return g * mask.to(g.dtype)

    weight.register_hook(hook)
    return model


def two_outputs(m: Any, x: Tensor) -> Any:
    return m.a(x), m.b(x)


def complex_weights(c: int) -> nn.Module:
    return Function(
        lambda m, x: ((x + 0j) @ m.w.to(torch.promote_types(x.dtype, torch.complex64))).abs(),
        w=nn.Parameter(torch.randn(4, c, dtype=torch.complex64)),
    )


ORDINARY: dict[str, Kind] = {
    "linear": Kind(lambda c: nn.Linear(4, c)),
    "MLP, tanh": mlp(nn.Tanh),
    "MLP, ReLU": mlp(nn.ReLU),
    "MLP, GELU": mlp(nn.GELU),
    "MLP, SiLU": mlp(nn.SiLU),
    "MLP, ELU": mlp(nn.ELU),
    "MLP, PReLU": mlp(nn.PReLU),
    "layer norm": mlp(nn.Tanh, lambda: nn.LayerNorm(6)),
    "group norm": mlp(nn.Tanh, lambda: nn.GroupNorm(2, 6)),
    "batch norm": replace(mlp(nn.Tanh, lambda: nn.BatchNorm1d(6)), mixes=True),
    "dropout": replace(mlp(nn.Tanh, lambda: nn.Dropout(0.5)), random=True),
    "running buffer": mlp(nn.Tanh, Running),
    "convolution": Kind(
        lambda c: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, c)
        ),
        (1, 5, 5),
    ),
    "LSTM": Kind(recurrent, (3, 4)),
    "attention": Kind(attention, (3, 4)),
    "embedding": Kind(embedding, (3,), tokens=True),
    "embedding of bounded norm": Kind(lambda c: embedding(c, max_norm=0.5), (3,), tokens=True),
    "sparse embedding": Kind(lambda c: embedding(c, sparse=True), (3,), tokens=True),
    "weights used twice": Kind(tied),
    "force field": Kind(force),
    "checkpoint": checkpointed(reentrant=False),
    "reentrant checkpoint": checkpointed(reentrant=True),
    "weight norm": Kind(normalized),
    "half frozen": Kind(half_frozen),
    "masked by a hook": Kind(masked),
    "complex weights": Kind(complex_weights),
}
"""Models that somebody might train, by name."""

ODD: dict[str, Kind] = {
    "no parameter": Kind(lambda c: nn.Sequential(nn.Tanh(), nn.Flatten())),
    "two outputs": Kind(lambda c: Function(two_outputs, a=nn.Linear(4, c), b=nn.Linear(4, c))),
    "examples last": Kind(lambda c: Function(lambda m, x: m.a(x).T, a=nn.Linear(4, c))),
    "classes as outputs": Kind(
        lambda c: Function(lambda m, x: m.a(x).argmax(1, keepdim=True), a=nn.Linear(4, c))
    ),
    "under no_grad": Kind(
        lambda c: Function(torch.no_grad()(lambda m, x: m.a(x)), a=nn.Linear(4, c))
    ),
    "examples see each other": Kind(
        lambda c: Function(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(4, c))
    ),
    "NaN": Kind(lambda c: Function(lambda m, x: m.a(x) * float("nan"), a=nn.Linear(4, c))),
}
"""Models that cannot be analysed, or not as they are."""

KINDS = {**ORDINARY, **ODD}


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision; complex weights stay complex."""
    found = model.to(dtype) if not any(p.is_complex() for p in model.parameters()) else model
    if dtype == torch.float64:
        for p in found.parameters():
            p.data = p.data.to(torch.complex128) if p.is_complex() else p.data
    return found


def activation_is_smooth(name: str) -> bool:
    """Whether the outputs are a smooth function of the weights."""
    return name not in ("MLP, ReLU", "MLP, PReLU", "embedding of bounded norm")
