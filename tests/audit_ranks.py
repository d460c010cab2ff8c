"""What every process of test_audit_gather.py does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gloo import WORLD, joined
from poprisk import Auditor

N, C = 80, 3


def given() -> Tensor:
    y = torch.arange(N) % C
    y[[3, 40]] = (y[[3, 40]] + 1) % C
    return y


def outputs_at(epoch: int) -> Tensor:
    g = torch.Generator().manual_seed(epoch)
    return 5 * F.one_hot(torch.arange(N) % C, C) + torch.randn(N, C, generator=g)


def feed(auditor: Auditor, epoch: int, batches: Iterable[Iterable[int]]) -> None:
    for batch in batches:
        index = torch.tensor(list(batch))
        auditor.update(index, outputs_at(epoch)[index], auditor.targets[index])


def main(rank: int, folder: Path) -> None:
    with joined(rank, folder):
        auditor = Auditor(given())
        for epoch in range(3):
            share = range((rank + epoch) % WORLD, N, WORLD)
            feed(auditor, epoch, [share[:20], share[20:]])
            auditor.end_look()
        result = auditor.result()
        found = {
            "margin": result.margin.tolist(),
            "suspects": result.suspects().tolist(),
            "recall": result.recall and result.recall.value,
            "looks": len(result.looks),
        }
        (folder / f"{rank}.json").write_text(json.dumps(found))
