"""The networks that tasks, studies and measurements have in common."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    """Fully connected layers of these widths, made in their order, inputs first.

    Args:
        widths: of inputs, hidden layers and outputs.
        activation: after every hidden layer.
        dropout: after every activation; 0: none.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers[: -2 if dropout else -1])
