"""What attribution through a run costs: python benchmarks/attribution.py OUT [CASE].

MLPs on pixels of digits with noise, and causal transformers on the bytes of the standard library
(next-byte loss, mean over a sequence), of 0.1 to 10 million weights; SGD with momentum and AdamW.
Processor time of `replay` and of `attribute` (all examples, the mean loss of eight
queries, no check) over that of a plain loop before and after; peaks in MiB beside what the process
had. One thread; each measurement in a process of its own, so that OUT can be gone on with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import CONTEXT, GPT, text
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poprisk import attribute, replay
from poprisk_lab.runner import environment
from poprisk_lab.store import write_json

STEPS = {"0.1M": 256, "1M": 64, "10M": 16}
QUERIES = 8
EXAMPLES, BATCHES = {"mlp": 1024, "gpt": 64}, {"mlp": 256, "gpt": 16}
MLPS = {"0.1M": 272, "1M": 965, "10M": 3120}
"""Widths of two hidden layers."""
GPTS = {"0.1M": (48, 2), "1M": (128, 5), "10M": (384, 5)}
"""Widths and blocks."""
CASES = [
    f"{kind}-{size}-{optimizer}"
    for size in GPTS
    for kind in ("mlp", "gpt")
    for optimizer in ("SGD", "AdamW")
]


def next_byte_loss(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u.transpose(1, 2), y, reduction="none").mean(1)


def digits_loss(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def problem(kind: str, size: str) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """Model, inputs, targets and loss."""
    torch.manual_seed(0)
    n = EXAMPLES[kind] + QUERIES
    if kind == "gpt":
        width, layers = GPTS[size]
        data = text()
        rows = torch.stack([data[i * 997 : i * 997 + CONTEXT + 1] for i in range(n)])
        return GPT(width, layers), rows[:, :-1], rows[:, 1:], next_byte_loss
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images / 16).float()[:n]
    width = MLPS[size]
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    return net, x, torch.tensor(digits)[:n], digits_loss


def peak() -> float:
    """MiB of this program."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


def measured(case: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    kind, size, name = case.split("-")
    model, x, y, loss = problem(kind, size)
    n, batch, steps = EXAMPLES[kind], BATCHES[kind], STEPS[size]
    g = torch.Generator().manual_seed(1)
    batches = [torch.randint(n, (batch,), generator=g) for _ in range(steps)]
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def plain() -> float:
        model.load_state_dict(start)
        optimizer, began = optimizer_of(name, model), time.process_time()
        for index in batches:
            optimizer.zero_grad()
            loss(model(x[index]), y[index]).mean().backward()
            optimizer.step()
        return time.process_time() - began

    before = peak()
    plain()
    times, trained = [plain()], peak() - before
    model.load_state_dict(start)
    train, query = (x[:n], y[:n]), (x[n:], y[n:])
    began = time.process_time()
    run = replay(model, loss, optimizer_of(name, model), batches, query, train=train)
    replayed = time.process_time() - began
    began = time.process_time()
    attribute(run, check=0)
    spent = time.process_time() - began
    times.append(plain())
    each = sum(times) / len(times)
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": batch,
        "training_seconds": times,
        "replay_trainings": replayed / each,
        "attribute_trainings": spent / each,
        "training_peak": trained,
        "peak": peak() - before,
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if len(sys.argv) > 2:
        write_json(
            out, {**found, "environment": environment(1), sys.argv[2]: measured(sys.argv[2])}
        )
    else:
        for case in CASES:
            if case not in found:
                subprocess.run([sys.executable, __file__, str(out), case], check=True)
