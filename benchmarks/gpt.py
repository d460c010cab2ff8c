"""A small GPT on the text of the Python standard library: one process, DDP and FSDP2 compared.

Compiled model, bfloat16 autocast, gradient accumulation and clipping, a learning-rate schedule and
the fused step. All runs see the same micro-batches, so that they differ by the order of sums alone.

    python benchmarks/gpt.py --steps 60 --out benchmarks/results/gpt.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from poprisk import PopRiskAdamW

VOCABULARY, CONTEXT, MICRO_BATCH, MICRO_BATCHES = 256, 64, 4, 4
MODES = ("single", "ddp", "fsdp")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """About a million parameters at width 128 and five layers."""

    def __init__(self, width: int = 128, layers: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).clone()  # FSDP2 warns about views


def text() -> Tensor:
    """The bytes of the standard library's top-level modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.tensor(list(b"".join(f.read_bytes() for f in files)[:2_000_000]))


def micro_batches(data: Tensor, step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(
        len(data) - CONTEXT - 1, (MICRO_BATCHES, MICRO_BATCH), generator=generator
    )
    rows = data[starts[..., None] + torch.arange(CONTEXT + 1)]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def prepared(mode: str, backend: str, **size: int) -> tuple[nn.Module, nn.Module]:
    """The model that trains, and the bare one."""
    torch.manual_seed(0)
    model = GPT(**size)
    if mode == "fsdp":
        for block in model.blocks:
            block.compile(backend=backend)
            fully_shard(block)
        fully_shard(model)
        return model, model
    model.compile(backend=backend)
    return (DistributedDataParallel(model), model) if mode == "ddp" else (model, model)


def synchronize(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over processes."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(wanted)  # pyrefly: ignore


def train(mode: str, steps: int, backend: str, **size: int) -> dict[str, Any]:
    """Train on this process's share; return losses over the whole batch and the final weights."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if mode != "single" else (0, 1)
    data = text()
    model, bare = prepared(mode, backend, **size)
    batch = MICRO_BATCH * MICRO_BATCHES
    opt = PopRiskAdamW(
        bare, lr=1e-3, batch_size=batch, dataset_size=len(data) // CONTEXT, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, 1e-3, total_steps=steps, cycle_momentum=False
    )
    losses = []
    for step in range(steps):
        mine = micro_batches(data, step)[rank::world]
        total = torch.zeros(())
        for i, (x, y) in enumerate(mine):
            synchronize(model, i == len(mine) - 1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten()) / len(mine)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in bare.parameters()]
    flat = torch.cat([w.detach().flatten() for w in weights])
    gates = {name: s.update_ratio for name, s in opt.gate_stats(bare).items()}
    return {"losses": losses, "weights": flat, "gates": gates}


def run(mode: str, steps: int, backend: str, folder: Path) -> dict[str, Any]:
    """Train in as many processes as the mode needs."""
    output = folder / f"{mode}.pt"
    world = 1 if mode == "single" else 2
    command = [sys.executable, __file__, "--worker", mode, "--steps", str(steps)]
    command += [
        "--backend",
        backend,
        "--out",
        str(output),
        "--store",
        str(folder / f"{mode}.store"),
    ]
    workers = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"{mode} failed")
    return torch.load(output, weights_only=True)


def work(mode: str, rank: int, steps: int, backend: str, out: str, store: str, **size: int) -> None:
    """Be one process of a mode; the first writes what it found."""
    torch.set_num_threads(1)
    if mode != "single":
        meeting = dist.FileStore(store, 2)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2)
    result = train(mode, steps, backend, **size)
    if rank == 0:
        torch.save(result, out)
    if mode != "single":
        dist.barrier()  # the first to leave would take the store from the other
        dist.destroy_process_group()


def compared(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far the runs on two processes are from the run on one."""
    one = results["single"]
    return {
        mode: {
            "loss_first": r["losses"][0],
            "loss_last": r["losses"][-1],
            "largest_relative_loss_difference": max(
                abs(a - b) / b for a, b in zip(r["losses"], one["losses"], strict=True)
            ),
            "relative_weight_difference": float(
                (r["weights"] - one["weights"]).norm() / one["weights"].norm()
            ),
        }
        for mode, r in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(
            options.worker,
            options.rank,
            options.steps,
            options.backend,
            options.out,
            options.store,
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {mode: run(mode, options.steps, options.backend, Path(folder)) for mode in MODES}
    result = {
        "parameters": len(results["single"]["weights"]),
        "steps": options.steps,
        "backend": options.backend,
        "runs": compared(results),
    }
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": "not measured",
    }
    content = json.dumps({"environment": environment, **result}, indent=2)
    print(content)
    if options.out is not None:
        options.out.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
