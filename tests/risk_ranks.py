"""What every process of test_risk_distributed.py does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gloo import WORLD, joined
from poprisk import Canaries, Lockstep, Recorder, TwinRisk, fresh_batch_risk, loo_risk

N, BATCH = 64, 16


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64)
    return x, x.sum(1, keepdim=True) + torch.randn(N, 1, generator=g, dtype=torch.float64)


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def twin(make: Callable[[], nn.Module], share: slice, **settings: Any) -> TwinRisk:
    """A twin trained on this process's share of each batch, measured twice on the way."""
    found = TwinRisk(make, sgd, squared, dataset_size=N, **settings)
    x, y = data()
    for epoch in range(3):
        g = torch.Generator().manual_seed(epoch)
        for batch in torch.randperm(N, generator=g).split(BATCH):
            index = batch[share]
            for run in found.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
        found.estimate(x, y)
    return found


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def data_parallel() -> dict[str, float]:
    """A twin under DDP against one of a single process that sees the whole batches."""
    x, y = data()
    # Its size is that of the first batch, whose halves say it a little differently.
    ours = twin(lambda: DistributedDataParallel(build()), slice(dist.get_rank(), None, WORLD))
    alone = twin(build, slice(None), delta=0.3)
    scale = torch.tensor([ours._scale[0], alone._scale[0]])  # pyrefly: ignore[unsupported-operation]
    alone = twin(build, slice(None), delta=0.3 * float(scale[0] / scale[1]))
    found, expected = ours.estimate(x, y), alone.estimate(x, y)
    others = [torch.zeros_like(weights(ours.replicas[1].model)) for _ in range(WORLD)]
    dist.all_gather(others, weights(ours.replicas[1].model))
    pairs = zip(ours.replicas, alone.replicas, strict=True)
    return {
        "weights": max(float((weights(a.model) - weights(b.model)).abs().max()) for a, b in pairs),
        "apart": float((others[0] - others[1]).abs().max()),
        "value": abs(found.value - expected.value),
        "dof": abs(found.dof - expected.dof),
        "error": abs(found.standard_error - expected.standard_error),
    }


def sharded() -> nn.Module:
    model = build()
    fully_shard(model)
    return model


def own_parts(model: nn.Module) -> list[Tensor]:
    """This process's part of every parameter."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def refused() -> dict[str, str]:
    """Messages of what does not go, and whether anything moved."""
    x, y = data()
    messages = {}
    for name, make in (("DDP", lambda: DistributedDataParallel(build())), ("FSDP", sharded)):
        model = make()
        opt = sgd(model)
        calls: dict[str, Callable[[], Any]] = {
            "fresh": lambda m=model, o=opt: fresh_batch_risk(m, squared, x, y, o, fresh=True),
        }
        if name == "FSDP":
            calls["twin"] = lambda m=model: TwinRisk(lambda: m, sgd, squared, dataset_size=N)
        for what, call in calls.items():
            before = [p.clone() for p in own_parts(model)]
            try:
                call()
                messages[f"{what} {name}"] = "accepted"
            except Exception as error:
                messages[f"{what} {name}"] = f"{type(error).__name__}: {error}"
            if not all(map(torch.equal, before, own_parts(model))):
                messages[f"{what} {name}"] = "moved"
    return messages


def local() -> dict[str, list[float]]:
    """What is the same on every process: canaries, and a leave-one-out response of a record."""
    x, y = data()
    canaries = Canaries(torch.arange(N) % 3, fraction=0.5)
    model = build()
    opt = sgd(model)
    with Recorder(model, squared, opt, train=(x, y)) as recorder:
        for index in torch.arange(N).split(BATCH):
            opt.zero_grad()
            squared(model(x[index]), y[index]).mean().backward()
            opt.step()
            recorder.step(index)
    return {
        "canaries": [*canaries.index.tolist(), *canaries.targets.tolist()],
        "loo": [loo_risk(recorder.run).value],
    }


def main(rank: int, folder: Path) -> None:
    """What one process does; its findings go into ``folder``."""
    with joined(rank, folder):
        results = {"ddp": data_parallel(), "refused": refused(), "local": local()}
        (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


def follow(rank: int, folder: Path) -> None:
    """What one process hears that lets a twin follow a model under DDP."""
    with joined(rank, folder):
        model = DistributedDataParallel(build())
        try:
            Lockstep(model, sgd(model), squared, dataset_size=N)
            message = "accepted"
        except ValueError as error:
            message = f"{error}"
        (folder / f"followed {rank}.json").write_text(json.dumps(message), encoding="utf-8")
