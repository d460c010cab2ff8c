"""Networks that kernels and gradient statistics are measured on."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk_lab.tasks.nets import mlp


class BenchCase(NamedTuple):
    """One network with inputs of one size.

    Attributes:
        kind: ``"mlp"``, ``"cnn"`` or ``"transformer"``.
        examples: number of inputs.
        width: hidden units, channels, or model dimension.
        depth: hidden layers, residual blocks, or transformer layers.
        length: positions of a sequence; ignored by the others.
        outputs: of the network.
    """

    kind: str
    examples: int
    width: int
    depth: int = 2
    length: int = 64
    outputs: int = 10

    def build(self) -> tuple[nn.Module, Tensor]:
        """A model in eval mode and its inputs."""
        torch.manual_seed(0)
        if self.kind == "mlp":
            hidden = [self.width] * self.depth
            return mlp(784, *hidden, self.outputs), torch.randn(self.examples, 784)
        if self.kind == "cnn":
            cnn = ResidualCNN(self.width, self.depth, self.outputs).eval()
            return cnn, torch.randn(self.examples, 3, 32, 32)
        model = SmallTransformer(self.width, self.depth, self.length, self.outputs).eval()
        return model, torch.randint(0, SmallTransformer.tokens, (self.examples, self.length))

    def label(self) -> str:
        """The case in a few words."""
        length = f", {self.length} positions" if self.kind == "transformer" else ""
        outputs = "" if self.outputs == 10 else f", {self.outputs} outputs"
        size = f"width {self.width}, depth {self.depth}{length}{outputs}"
        return f"{self.kind}, {size}, n={self.examples}"


@final
class ResidualCNN(nn.Module):
    """Residual blocks with group normalization on 3 × 32 × 32 pictures."""

    def __init__(self, width: int, depth: int, outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(4, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(4, width),
            )
            for _ in range(depth)
        )
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, outputs)."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(F.relu(self.down(x)).mean((2, 3)))


@final
class SmallTransformer(nn.Module):
    """Encoder layers on sequences of tokens, averaged over positions."""

    tokens = 64

    def __init__(self, width: int, depth: int, length: int, outputs: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, length) token numbers to (n, outputs)."""
        return self.head(self.layers(self.embedding(x) + self.position).mean(1))
