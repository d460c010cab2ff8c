"""Arithmetic modulo a prime, the data of grokking: a part of the table is seen, the rest is asked.

[P]: A. Power et al., *Grokking: Generalization beyond overfitting on small algorithmic datasets*,
arXiv:2201.02177.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk._validate import check_choice, check_number, check_positive
from poprisk.losses import cross_entropy
from poprisk.task import Pair, Task


class FeedForward(nn.Module):
    """A pre-norm feed-forward layer with its residual connection, (b, width) to (b, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        """What goes on: the stream and what the layer adds to it."""
        return stream + self.down(F.relu(self.up(self.norm(stream))))


class ModularTransformer(nn.Module):
    r"""One pre-norm Transformer block on ``x_1 … x_k =``, read at the equals sign.

    Only what the answer depends on is computed: one query (that of the equals sign), and keys and
    values once for each pair of a number and a place instead of once an example. The function is
    that of an ordinary block without a causal mask.

    Args:
        p: how many numbers there are; the outputs are their logits (b, p).
        operands: k, the length of an input (b, k) of int64 numbers.
        width: of the residual stream.
        heads: of the attention.
        hidden: units of a feed-forward layer.
        layers: feed-forward layers after the attention; 1 in an ordinary block.
        scale: of the initial weights, in units of ``1/√width``.
    """

    def __init__(
        self,
        p: int,
        *,
        operands: int = 2,
        width: int = 128,
        heads: int = 4,
        hidden: int = 256,
        layers: int = 1,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        self.p, self.operands, self.heads = p, operands, heads
        spread = scale / width**0.5
        self.numbers = nn.Parameter(torch.randn(p, width) * spread)
        self.equals = nn.Parameter(torch.randn(width) * spread)
        self.places = nn.Parameter(torch.randn(operands + 1, width) * spread)
        self.before_attention = nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(*(FeedForward(width, hidden) for _ in range(layers)))
        self.before_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, p, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, p) of the results of ``x`` (b, k)."""
        last = self.equals + self.places[-1]
        own = self.before_attention(last)
        seen = self.before_attention(self.numbers + self.places[:-1].unsqueeze(1))  # (k, p, width)
        table = torch.cat([seen.flatten(0, 1), own.unsqueeze(0)])  # (k·p + 1, width)
        query, keys, values = self._heads(own, table)
        scores = (keys * query).sum(2) / query.shape[1] ** 0.5  # (k·p + 1, heads)
        rows = x + self.p * torch.arange(self.operands, device=x.device)
        rows = torch.cat([rows, torch.full_like(rows[:, :1], self.operands * self.p)], 1)
        weights = F.embedding(rows, scores).softmax(1).unsqueeze(3)  # (b, k + 1, heads, 1)
        attended = weights * F.embedding(rows, values.flatten(1)).unflatten(2, (self.heads, -1))
        return self._answer(last + self.mix(attended.sum(1).flatten(1)))

    def per_example(self, x: Tensor) -> Tensor:
        """The same logits, computed from all tokens of each example.

        Slower, and what :meth:`PopRiskAdamW.backward` needs: the gradient of an example is known
        only where its part of the computation is its own.
        """
        equals = self.equals.expand(len(x), 1, -1)
        stream = torch.cat([F.embedding(x, self.numbers), equals], 1) + self.places
        normed = self.before_attention(stream)
        query, keys, values = self._heads(normed[:, -1:], normed)
        weights = ((keys * query).sum(3) / query.shape[3] ** 0.5).softmax(1)
        attended = (weights.unsqueeze(3) * values).sum(1).flatten(1)
        return self._answer(stream[:, -1] + self.mix(attended))

    def _heads(self, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``asking``, keys and values of ``asked``: (…, width) to (…, heads, size)."""
        parts = self.query(asking), self.key(asked), self.value(asked)
        query, keys, values = (t.unflatten(-1, (self.heads, -1)) for t in parts)
        return query, keys, values

    def _answer(self, last: Tensor) -> Tensor:
        return self.out(self.before_out(self.mlp(last)))


def division_table(p: int) -> Pair:
    r"""All pairs (a, b) with b ≠ 0, and :math:`a b^{-1} \bmod p`."""
    pairs = torch.tensor(list(itertools.product(range(p), range(1, p))))
    inverse = torch.tensor([0, *(pow(b, -1, p) for b in range(1, p))])
    return pairs, pairs[:, 0] * inverse[pairs[:, 1]] % p


def two_step_table(p: int) -> Pair:
    r"""All triples (a, b, c), and :math:`(a b + c) \bmod p`."""
    triples = torch.tensor(list(itertools.product(range(p), repeat=3)))
    return triples, (triples[:, 0] * triples[:, 1] + triples[:, 2]) % p


TABLES = {"division": division_table, "two-step": two_step_table}


def split_table(kind: str, p: int, fraction: float, seed: int) -> tuple[Pair, Pair]:
    """A random ``fraction`` of a table for training, and the rest.

    Raises:
        ValueError: for an unknown table, or a fraction that leaves nothing to train on or to ask.
    """
    check_choice("kind", kind, TABLES)
    check_number("fraction", fraction, low=0.0, high=1.0)
    x, y = TABLES[kind](p)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    n = round(fraction * len(y))
    check_positive("training examples", n)
    check_positive("test examples", len(y) - n)
    seen, asked = order[:n], order[n:]
    return (x[seen], y[seen]), (x[asked], y[asked])


def modular_division(seed: int = 0, *, p: int = 97, fraction: float = 0.25) -> Task:
    """a·b⁻¹ mod p, a quarter of the table for training, the rest for testing: grokking."""
    train, test = split_table("division", p, fraction, seed)
    return Task(
        name="grokking",
        model=lambda: ModularTransformer(p),
        loss=cross_entropy,
        train=train,
        test=test,
        epochs=600,
        batch_size=min(512, len(train[1]) - 1),
        description=f"division modulo {p}, {fraction:.0%} of the table, small Transformer",
    )
