"""What every process of test_monitor_ranks.py does."""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gloo import WORLD, joined
from poprisk import RiskMonitor
from poprisk.monitor import Loss, Signal, ranks


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, generator=g, dtype=torch.float64)
    return x, torch.randn(16, 2, generator=g, dtype=torch.float64)


def weights(model: nn.Module) -> list[Any]:
    found = []
    for p in model.parameters():
        found.append((p.full_tensor() if hasattr(p, "full_tensor") else p).tolist())  # pyrefly: ignore
    return found


def train(
    wrapped: nn.Module, *, loss: Any = squared, every: int | None = 1, **settings: Any
) -> Any:
    """Four steps of two parts each, on this rank's share."""
    sgd = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    monitor = None
    if every is not None:
        monitor = RiskMonitor(wrapped, loss, sgd, every=every, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(4):
            x, y = (t[dist.get_rank() :: WORLD] for t in batch(step))
            for half in (slice(4), slice(4, None)):
                (squared(wrapped(x[half]), y[half]).mean() / 2).backward()
                if monitor is not None:
                    monitor.step(x[half], y[half])
            sgd.step()
            sgd.zero_grad()
    rows: list[Any] = [] if monitor is None else monitor.rows
    texts = sorted({str(w.message) for w in said if "monitor" in str(w.message)})
    return {"rows": rows, "said": texts, "weights": weights(wrapped)}


def fails_on_one(u: Tensor, y: Tensor) -> Tensor:
    if dist.get_rank() == 1:
        raise KeyError("bad data")
    return squared(u, y)


def uneven() -> Any:
    """The second rank has a batch at every other step only."""
    model = build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, every=1, quantities=[Loss()])
    for step in range(4):
        x, y = batch(step)
        squared(model(x), y).mean().backward()
        if dist.get_rank() == 0 or step % 2:
            monitor.step(x, y)
        sgd.step()
        sgd.zero_grad()
    return {"rows": monitor.rows}


def only_first(folder: Path) -> Any:
    ranks.PATIENCE = timedelta(seconds=2)
    found = train(DistributedDataParallel(build()), every=1 if dist.get_rank() == 0 else None)
    dist.barrier()
    return found


def main(rank: int, folder: Path) -> None:
    """What one process does; its findings go into ``folder``."""
    with joined(rank, folder):
        found = results(rank, folder)
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def results(rank: int, folder: Path) -> dict[str, Any]:
    sinks = [folder / f"{rank}.jsonl"]
    sharded = build()
    fully_shard(sharded)
    plain = build()
    fully_shard(plain)
    return {
        "ddp": train(DistributedDataParallel(build()), sinks=sinks),
        "alone": train(DistributedDataParallel(build()), every=None),
        "told": train(DistributedDataParallel(build()), accumulate=2),
        "fails": train(DistributedDataParallel(build()), loss=fails_on_one),
        "fsdp": train(sharded, quantities=[Loss(), Signal()]),
        "fsdp alone": train(plain, every=None),
        "uneven": uneven(),
        "only first": only_first(folder),
    }
