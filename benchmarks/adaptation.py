"""The adaptation gap of a net that learns features: python benchmarks/adaptation.py [SEEDS]."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from poprisk import Recorder, TwinRisk, adaptation_gap

N, STEPS, LR, NOISE, PROBES = 100, 300, 0.2, 0.5, 4


def squared(u: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (u - y).square().sum(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).double()


def main(seeds: list[int]) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(4, 2, generator=g).double() / 2
        x = torch.randn(N, 4, generator=g).double()
        clean = 0.8 * torch.sin(2 * x @ w).sum(1, keepdim=True)
        y = clean + NOISE * torch.randn(N, 1, generator=g).double()
        torch.manual_seed(seed)
        twin = TwinRisk(
            network,
            lambda m: torch.optim.SGD(m.parameters(), lr=LR),
            squared,
            dataset_size=N,
            probes=PROBES,
        )
        with Recorder(twin.model, squared, twin.optimizer, train=(x, y)) as recorder:
            for _ in range(STEPS):
                for run in twin.runs(range(N)):
                    run.optimizer.zero_grad()
                    run.loss(run.model(x), y).mean().backward()
                    run.optimizer.step()
                recorder.step(torch.arange(N))
        gap = adaptation_gap(recorder.run, twin)
        print(
            f"seed {seed}: gap {gap.value:.4f} ± {gap.standard_error:.4f}, twin "
            f"{gap.twin.value:.4f} ± {gap.twin.error:.4f}, path {gap.path.value:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or list(range(5)))
