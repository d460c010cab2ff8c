"""What a gate costs on clean text: python benchmarks/clean_text.py OUT.json.

A causal transformer (width 96, two layers) on the bytes of the standard library, one pass over
windows that are drawn once each, so that there is nothing to gate; loss on held-out windows at the
end, by optimizer and learning rate. Resumable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_optimizer as peers
import torch
from gpt import CONTEXT, GPT, text
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json

SEEDS, RATES = (0, 1), (4e-4, 1e-3, 3e-3)
STEPS, BATCH, HELD_OUT = 400, 16, 256
LOOP: dict[str, Any] = {"factors": "gradient", "variance": "ema"}
BUILD: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda model, lr: AdamW(model.parameters(), lr=lr),
    "PopRiskAdamW": lambda model, lr: PopRiskAdamW(model, lr=lr, batch_size=BATCH),
    "SOAP": lambda model, lr: peers.SOAP(model.parameters(), lr=lr, max_precondition_dim=512),
    "basis alone": lambda model, lr: PopRiskSOAP(model, lr=lr, gate=False, max_dim=512, **LOOP),
    "PopRiskSOAP": lambda model, lr: PopRiskSOAP(
        model, lr=lr, batch_size=BATCH, max_dim=512, **LOOP
    ),
}


def windows(seed: int) -> tuple[Tensor, Tensor]:
    """Those to train on, in order, and those held out: none overlaps another."""
    rows = text()[: -(len(text()) % (CONTEXT + 1))].view(-1, CONTEXT + 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[HELD_OUT : HELD_OUT + STEPS * BATCH]], rows[order[:HELD_OUT]]


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean over positions, in nats a byte."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(name: str, lr: float, seed: int) -> float:
    """The loss on held-out windows after one pass."""
    torch.manual_seed(seed)
    model = GPT(width=96, layers=2)
    optimizer = BUILD[name](model, lr)
    rows, held_out = windows(seed)
    for batch in rows.split(BATCH):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(model, held_out))


def main(out: Path) -> None:
    """What is left."""
    torch.set_num_threads(1)
    found: dict[str, float] = json.loads(out.read_text("utf-8"))["losses"] if out.exists() else {}
    for seed, lr, name in product(SEEDS, RATES, BUILD):
        key = f"{name} | {lr:g} | {seed}"
        if key not in found:
            found[key] = train(name, lr, seed)
            print(key, found[key], flush=True)
            write_json(out, {"environment": environment(0), "losses": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
