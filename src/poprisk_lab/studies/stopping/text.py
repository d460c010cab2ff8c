"""Windows of the standard library's own text, and a small causal transformer that reads them.

The next character of a window is its own label, so that risk is that of windows of other texts.
Which kind of text a window is from is known, and labelled with known noise.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk.losses import cross_entropy
from poprisk.randomness import RandomState, generator_of
from poprisk_lab.studies.risk.problems import FRESH, NoisyData, class_costs
from poprisk_lab.studies.stopping.drawn import other_classes
from poprisk_lab.tasks.preferences import texts

LETTERS = " abcdefghijklmnopqrstuvwxyz0.,:;'\"()[]{}_-=#*/<>@"
"""Characters told apart: of digits one, of all others one more."""
SYMBOLS = len(LETTERS) + 1
SYMBOL_OF = torch.tensor(
    [LETTERS.find("0" if chr(i).isdigit() else chr(i)) % SYMBOLS for i in range(128)]
)
"""The symbol of each character of ASCII."""
CONTEXT, WINDOW = 16, 24
"""Characters that the next one is told from, and of a window whose kind is told."""
PACKAGES = (
    "asyncio collections concurrent ctypes curses dbm email html http importlib json logging "
    "multiprocessing sqlite3 unittest urllib wsgiref xml xmlrpc zoneinfo"
).split()
"""Parts of the standard library whose texts no model is pre-trained on."""
KINDS = ("docstring", "comment", "code")
WIDTH, BLOCKS = 32, 2
PRETRAINING, PRETRAINING_BATCH = 400, 64
"""Steps, and windows of each."""


class Windows:
    """Texts of which windows are drawn, one text as likely as another.

    Args:
        said: the texts; those shorter than a window are left out.
        length: characters of a window.
    """

    def __init__(self, said: Sequence[str], length: int) -> None:
        encoded = [encode(text) for text in said]
        kept = [i for i, text in enumerate(encoded) if len(text) >= length]
        self.ids = torch.tensor(kept)
        sizes = torch.tensor([len(encoded[i]) for i in kept])
        self.symbols, self.length = torch.cat([encoded[i] for i in kept]), length
        self.begin, self.starts = sizes.cumsum(0) - sizes, sizes - length + 1

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows (count, length), and the positions of their texts in the sequence (count,)."""
        text = torch.randint(len(self.ids), (count,), generator=g)
        within = (torch.rand(count, generator=g, dtype=torch.float64) * self.starts[text]).long()
        place = (self.begin[text] + within).unsqueeze(1) + torch.arange(self.length)
        return self.symbols[place], self.ids[text]


def encode(text: str) -> Tensor:
    """Symbols (t,): letters in lower case, digits alike, white space of any length as one.

    Example:
        >>> encode("A  42").tolist()
        [1, 0, 27, 27]
    """
    kept = " ".join(text.lower().split()).encode("ascii", "replace")
    return SYMBOL_OF[torch.from_numpy(np.frombuffer(kept, np.uint8).astype(np.int64))]


@cache  # parsing takes seconds
def pages() -> list[str]:
    """Python's topics and the docstrings of its single modules."""
    return list(texts())


@cache
def files() -> dict[str, list[str]]:
    """The text of each kind in each file of :data:`PACKAGES`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        (_docstrings(tree), _comments(text), _code(tree))
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
        for text in [file.read_text(encoding="utf-8")]
        for tree in [ast.parse(text)]
    ]
    return dict(zip(KINDS, map(list, zip(*found, strict=True)), strict=True))


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> Iterator[Documented]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node):
            yield node


def _docstrings(tree: ast.Module) -> str:
    return " ".join(ast.get_docstring(node) or "" for node in _documented(tree))


def _comments(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def _code(tree: ast.Module) -> str:
    """Code without comments, which a tree does not have, and docstrings. Changes the tree."""
    for node in _documented(tree):
        node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def next_character(seed: int, *, n: int) -> NoisyData:
    """The character after sixteen others; a group is a text, and fresh windows are of others."""
    train, other = _halves(pages(), seed)
    (x, group), (fresh, fresh_group) = (
        Windows(half, CONTEXT + 1).draw(count, generator_of(seed, stream))
        for half, count, stream in ((train, n, "windows"), (other, FRESH, "fresh"))
    )
    return NoisyData(
        x[:, :-1],
        x[:, -1],
        fresh[:, :-1],
        partial(cross_entropy, targets=fresh[:, -1]),
        _renumbered(group),
        _renumbered(fresh_group),
    )


def kinds(seed: int, *, n: int, noise: float) -> NoisyData:
    """Docstring, comment or code? A group is a file, and fresh windows are of others."""
    halves = [_halves(said, seed) for said in files().values()]  # the same files of each kind
    parts = list[tuple[Tensor, Tensor, Tensor]]()
    for half, (count, stream) in enumerate(((n, "windows"), (FRESH, "fresh"))):
        g = generator_of(seed, stream)
        clean = torch.randint(len(KINDS), (count,), generator=g)
        x, group = torch.empty(count, WINDOW, dtype=torch.int64), torch.empty_like(clean)
        for kind, said in enumerate(halves):
            rows = clean == kind
            x[rows], group[rows] = Windows(said[half], WINDOW).draw(int(rows.sum()), g)
        parts.append((x, clean, _renumbered(group)))
    (x, clean, group), (fresh, right, fresh_group) = parts
    y = other_classes(clean, noise, len(KINDS), seed)
    costs = class_costs(right, noise, len(KINDS))
    return NoisyData(x, y, fresh, costs, group, fresh_group)


def _halves(said: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    order = torch.randperm(len(said), generator=generator_of(seed, "texts")).tolist()
    middle = len(said) // 2
    return [said[i] for i in order[:middle]], [said[i] for i in order[middle:]]


def _renumbered(ids: Tensor) -> Tensor:
    return ids.unique(return_inverse=True)[1]


class Block(nn.Module):
    """Pre-norm causal attention and a layer four times as wide.

    Args:
        width: of the states.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From states (b, t, w) to states."""
        parts = self.attend(self.before(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.between(x))))


class Reader(nn.Module):
    """A causal transformer; its answer is a linear function of the last state.

    Args:
        outputs: how many.
        length: symbols of a window.
        width: of the states.
        blocks: how many.
    """

    def __init__(self, outputs: int, *, length: int, width: int, blocks: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.places = nn.Parameter(0.2 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def states(self, x: Tensor) -> Tensor:
        """Of symbols (b, t), (b, t, w)."""
        return self.norm(self.blocks(self.symbols(x) + self.places))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (b, c)."""
        return self.head(self.states(x)[:, -1])


class LowRank(nn.Module):
    """A frozen layer and a trained product of two thin ones, zero at first (LoRA).

    E. Hu et al., arXiv:2106.09685; no scale and no dropout.

    Args:
        layer: to freeze.
        rank: of the product.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., in) to (..., out)."""
        return self.layer(x) + self.up(self.down(x))


@cache
def pretrained(steps: int = PRETRAINING) -> dict[str, Tensor]:
    """Weights of a reader that has learned the next character of :func:`pages`, for all seeds."""
    windows, g = Windows(pages(), WINDOW + 1), generator_of(0, "pre-training")
    with RandomState.kept():
        torch.manual_seed(0)
        model = Reader(SYMBOLS, length=WINDOW, width=WIDTH, blocks=BLOCKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, _ = windows.draw(PRETRAINING_BATCH, g)
        optimizer.zero_grad()
        F.cross_entropy(
            model.head(model.states(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten()
        ).backward()
        optimizer.step()
        rate.step()
    return model.state_dict()


def adapted(*, rank: int) -> Reader:
    """The pre-trained reader with low-rank adapters in every block, and a new head."""
    model = Reader(SYMBOLS, length=WINDOW, width=WIDTH, blocks=BLOCKS)
    model.load_state_dict(pretrained())
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LowRank(layer, rank))
    model.head = nn.Linear(WIDTH, len(KINDS))
    return model
