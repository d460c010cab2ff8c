"""What the path operators are worth and what they cost: python benchmarks/path.py PART OUT.json.

PART: closure, cells, regression, drift, cost, cost-whole, matrix-free, or online. Results are
merged into OUT.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import poprisk
from poprisk import CellTracer, PopRiskAdamW, path_operators, record, trace_cells
from poprisk.path.drift import Recipe, interval, movement, slope, sweep
from poprisk_lab.tasks import load_task

SEEDS = (0, 1, 2)
N = 1024


def toy(n: int, m: int, c: int, *, classes: bool, seed: int) -> tuple[Any, Any]:
    """Noisy targets of three inputs; query points are other points."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + m, 3, generator=g, dtype=torch.float64)
    noise = 0.3 * torch.randn(n + m, c, generator=g, dtype=torch.float64)
    y = torch.stack([(2 * x[:, 0]).sin(), x[:, 1] * x[:, 2]], 1)[:, :c] + noise
    if classes:
        y = (y[:, 0] > 0).long()
    return (x[:n], y[:n]), (x[n:], y[n:])


def mlp(sizes: list[int], activation: type[nn.Module] = nn.Tanh, scale: float = 1.0) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


def index_batches(n: int, b: int | None, steps: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    if b is None:
        return [torch.arange(n)] * steps
    return [torch.randperm(n, generator=g)[:b] for _ in range(steps)]


def closure() -> list[dict[str, Any]]:
    """Closure, kernel drift and coupling of 300 steps."""
    S, A = torch.optim.SGD, torch.optim.AdamW
    cases: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("squared error, full batch, SGD 0.1", lambda p: S(p, lr=0.1), {}),
        ("squared error, minibatch, SGD 0.1", lambda p: S(p, lr=0.1), {"b": 8}),
        ("squared error, targets x3, small start, SGD 0.05", lambda p: S(p, lr=0.05),
         {"scale": 0.2, "target": 3.0}),
        ("cross-entropy, minibatch, SGD 0.2", lambda p: S(p, lr=0.2), {"b": 8, "classes": True}),
        ("cross-entropy, minibatch, SGD 0.5", lambda p: S(p, lr=0.5), {"b": 8, "classes": True}),
        ("cross-entropy, minibatch, SGD 0.5, 5 points", lambda p: S(p, lr=0.5),
         {"b": 8, "classes": True, "quadrature": "gauss5"}),
        ("cross-entropy, minibatch, AdamW 0.01, decay 0.1",
         lambda p: A(p, lr=0.01, weight_decay=0.1), {"b": 8, "classes": True}),
        ("cross-entropy, minibatch, PopRiskAdamW 0.01, decay 0.1",
         lambda p: PopRiskAdamW(p, lr=0.01, weight_decay=0.1, batch_size=8, dataset_size=24),
         {"b": 8, "classes": True}),
        ("squared error, minibatch, ReLU, SGD 0.05", lambda p: S(p, lr=0.05),
         {"b": 8, "act": nn.ReLU}),
        ("squared error, minibatch, ReLU, SGD 0.05, refined", lambda p: S(p, lr=0.05),
         {"b": 8, "act": nn.ReLU, "refine": 1e-4}),
    ]  # fmt: skip
    return [_close(name, seed, build, **kw) for name, build, kw in cases for seed in SEEDS]


def _close(
    name: str,
    seed: int,
    build: Callable[..., Any],
    *,
    b: int | None = None,
    classes: bool = False,
    activation: type[nn.Module] = nn.Tanh,
    refine: float | None = None,
    scale: float = 1.0,
    target: float = 1.0,
    quadrature: str = "gauss3",
) -> dict[str, Any]:
    train, query = toy(24, 16, 2 if classes else 1, classes=classes, seed=seed)
    if not classes:
        train, query = ((x, target * y) for x, y in (train, query))
    torch.manual_seed(seed)
    net = mlp([3, 16, 2 if classes else 1], activation, scale)
    loss = "cross_entropy" if classes else "squared_error"
    batches = index_batches(24, b, 300, seed)
    run = record(net, loss, build(net.parameters()), batches, query, train=train)
    ops = path_operators(run, quadrature, refine=refine)
    coupling = ops.coupling()
    account = ops.accounting
    return {
        "case": name,
        "seed": seed,
        **ops.closure._asdict(),
        "kernel_drift": max(d for _, d in ops.kernel_drift()),
        "coupling_error": coupling.prediction.error,
        "coupling_correlation": coupling.prediction.correlation,
        "frozen_error": coupling.frozen.error,
        "frozen_correlation": coupling.frozen.correlation,
        "loss_drop": account.measured,
        "accounted": account.accounted,
        "quadratic": account.quadratic,
        "smallest_eigenvalue": float(ops.spectrum.eigenvalues[-1] / ops.spectrum.eigenvalues[0]),
    }


def cells() -> list[dict[str, Any]]:
    """Digits, 40% wrong labels: AdamW and the gate, three seeds, matrix-free."""
    rows = []
    for seed in SEEDS:
        task = load_task("digits", seed=seed, hidden=64)
        for gated in (False, True):
            torch.manual_seed(seed)
            model = task.model()
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            if gated:
                optimizer = PopRiskAdamW(
                    model.parameters(), lr=1e-3, batch_size=64, dataset_size=1000
                )
            g = torch.Generator().manual_seed(seed)
            batches = [b for _ in range(80) for b in torch.randperm(1000, generator=g).split(64)]
            run = record(model, task.loss, optimizer, batches, task.test, train=task.train)
            assert task.clean is not None
            trace = trace_cells(run, task.clean, every=4, points=9)
            for i, part in enumerate(trace.parts):
                y = task.test[1]
                rows.append({
                    "optimizer": type(optimizer).__name__,
                    "seed": seed,
                    "epoch": part.step / 16,
                    "accuracy": (trace.outputs(i).argmax(1) == y).double().mean().item(),
                    "without_noise": (trace.without_noise(i).argmax(1) == y).double().mean().item(),
                    "signal": part.signal.square().mean().sqrt().item(),
                    "noise": part.noise.square().mean().sqrt().item(),
                    "closure": trace.closure._asdict(),
                })  # fmt: skip
    return rows


def regression() -> list[dict[str, Any]]:
    """A noisy regression: the test error as bias, harmful noise and their cross term, over time."""
    rows = []
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(160, 5, generator=g, dtype=torch.float64)
        clean = (2 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:3]
        y = clean + torch.randn(160, 1, generator=g, dtype=torch.float64)
        for gated in (False, True):
            torch.manual_seed(seed)
            net = mlp([5, 48, 1])
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
            if gated:
                optimizer = PopRiskAdamW(net.parameters(), lr=3e-3, batch_size=15, dataset_size=60)
            batches = index_batches(60, 15, 800, seed)
            query, train = (x[60:], clean[60:]), (x[:60], y[:60])
            run = record(net, "squared_error", optimizer, batches, query, train=train)
            ops = path_operators(run, snapshots=9)
            error = ops.four_cells(clean[:60]).error
            assert error is not None
            moments = ops.cells_over_time(clean[:60])
            rows.append({
                "optimizer": type(optimizer).__name__,
                "seed": seed,
                "closure": ops.closure._asdict(),
                "terms": error.terms,
                "sum": sum(error.terms.values()),
                "measured": error.measured,
                "steps": [m.step for m in moments],
                "harmful_noise": [m.cells.harmful_noise.square().mean().item() for m in moments],
                "test_error": [
                    (m.outputs - clean[60:, 0]).square().mean().item() for m in moments
                ],
            })  # fmt: skip
    return rows


def drift() -> list[dict[str, Any]]:
    """Exponents where batches are i.i.d. and the gradient persists, and where not.

    Fixed before looking: 24 replicates, 64 steps, 95% intervals of the jackknife. The mean gradient
    persists as long as learning rate x steps is small, so the rate is lowered in three steps;
    ``known_drift`` is the power of the full-batch part alone, which has no noise to hide its bend.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=g)
    y = x[:, :1].sin() + 0.5 * torch.randn(256, 1, generator=g)
    recipe = Recipe(
        lambda: nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1)),
        "squared_error",
        (x, y),
        torch.randn(40, 4, generator=g),
        lr=5e-4,
        steps=64,
    )
    cases = {
        "i.i.d. batches, lr 1e-4": recipe._replace(lr=1e-4),
        "i.i.d. batches, lr 5e-4": recipe,
        "i.i.d. batches, lr 2e-3": recipe._replace(lr=2e-3),
        "i.i.d. batches, to convergence, lr 0.2": recipe._replace(lr=0.2),
        "shuffled passes, lr 5e-4": recipe._replace(replace=False),
    }
    rows = []
    for name, case in cases.items():
        swept = (4, 8, 16, 32) if case.replace and case.lr == 5e-4 else (8,)
        sizes = (32, 64, 128, 256) if len(swept) > 1 else None
        laws = sweep(case, batch_sizes=swept, seeds=range(24))
        known = [movement(case.run(8, 256, seed)) for seed in range(4)]
        powers = [slope(m.times, m.drift.norm(dim=1).tolist()) for m in known]
        if sizes is not None:
            short = case._replace(lr=0.01, steps=8)
            laws = laws._replace(noise=sweep(short, sizes=sizes, seeds=range(12)).noise)
        rows.append({"case": name, **laws._asdict(), "known_drift": interval(powers)})
    return rows


def cost() -> list[dict[str, Any]]:
    """Seconds of the dense operators, by n, P, steps and batch."""
    rows = [_cost(n, 136, None, steps=8) for n in (75, 150, 300)]
    rows += [_cost(300, hidden, None, steps=8) for hidden in (64, 92)]
    rows += [_cost(300, 136, None, steps=steps) for steps in (4, 16)]
    return [*rows, _cost(300, 136, 30, steps=8)]


def cost_whole() -> list[dict[str, Any]]:
    """Dense operators of 300 examples, 20,000 weights and 500 steps."""
    return [_cost(300, 136, None, steps=500)]


def _cost(n: int, hidden: int, b: int | None, *, steps: int) -> dict[str, Any]:
    train, query = toy(n, 100, 1, classes=False, seed=0)
    torch.manual_seed(0)
    net = mlp([3, hidden, hidden, 1])
    sgd = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    run = record(net, "squared_error", sgd, index_batches(n, b, steps, 0), query, train=train)
    ops = path_operators(run, snapshots=2)
    start, busy = time.perf_counter(), time.process_time()
    worst = ops.closure.worst
    return {
        "n": n,
        "m": 100,
        "P": run.problem.size,
        "batch": b or n,
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - busy,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "closure": worst,
    }


class Transformer(nn.Module):
    """About a million weights."""

    def __init__(
        self, vocabulary: int = 64, width: int = 128, layers: int = 5, classes: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).mean(1))


def matrix_free() -> list[dict[str, Any]]:
    """Four cells of a transformer, against the training steps themselves."""
    rows = []
    for kind in ("SGD", "AdamW"):
        for b in (32, 128):
            torch.manual_seed(0)
            net = Transformer()
            tokens = torch.randint(64, (128, 16))
            clean = tokens[:, 0] % 4
            noisy = clean.clone()
            noisy[:50] = (noisy[:50] + 1) % 4
            build = getattr(torch.optim, kind)
            optimizer = build(net.parameters(), lr=3e-4 if kind == "AdamW" else 0.05)
            steps = 16
            batches = [torch.randperm(128)[:b] for _ in range(steps)]
            start = time.process_time()
            for batch in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(tokens[batch]), noisy[batch]).backward()
                optimizer.step()
            training = time.process_time() - start
            query = tokens[torch.randperm(128)[:32]].flip(1)
            run = record(net, "cross_entropy", optimizer, batches, query, train=(tokens, noisy))
            start = time.process_time()
            trace = trace_cells(run, clean, points=2)
            spent = time.process_time() - start
            rows.append({
                "optimizer": kind,
                "P": run.problem.size,
                "n": 128,
                "batch": b,
                "steps": steps,
                "training_processor_seconds": training,
                "trace_processor_seconds": spent,
                "ratio": spent / training,
                "closure": trace.closure._asdict(),
            })  # fmt: skip
    return rows


def online() -> list[dict[str, Any]]:
    """Cells in lockstep with training: time over that of the training alone, and memory."""
    cases = [("noise", 1), ("noise", 2), ("all", 1)]
    sizes = [(48, 4, cases), (144, 4, cases), (256, 6, cases[:1])]
    rows = []
    for width, layers, some in sizes:
        for kind in ("SGD", "AdamW"):
            for parts, passes in some:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    rows.append(fresh.submit(_online, width, layers, kind, parts, passes).result())
                print(rows[-1], flush=True)
    return rows


def _online(width: int, layers: int, kind: str, parts: str, passes: int) -> dict[str, Any]:
    """Passes over 1,024 texts of 16 tokens, a fifth of them with a wrong label, in batches of 64.

    Two copies train in turns, one of them followed, and the quickest turns count: whatever else
    runs on the machine slows down both. In a process of its own, for its peak of memory.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, clean = torch.randint(64, (N + 64, 16)), torch.randint(10, (N,))
    noisy = clean.clone()
    noisy[: N // 5] = (noisy[: N // 5] + 1) % 10
    turns = [[b for _ in range(passes) for b in torch.randperm(N).split(64)] for _ in range(3)]

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = Transformer(width=width, layers=layers, classes=10)
        build = getattr(torch.optim, kind)
        return net, build(net.parameters(), lr=3e-4 if kind == "AdamW" else 0.05)

    def turn(
        net: nn.Module, optimizer: torch.optim.Optimizer, k: int, tracer: CellTracer | None = None
    ) -> float:
        start = time.process_time()
        for batch in turns[k]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(tokens[batch]), noisy[batch]).backward()
            optimizer.step()
            if tracer is not None:
                tracer.step(batch)
        return time.process_time() - start

    def peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    alone, (net, optimizer) = made(), made()
    plain, followed = [turn(*alone, 0)], list[float]()
    before = peak()
    tracer = CellTracer(
        net, "cross_entropy", optimizer, train=(tokens[:N], noisy), clean_targets=clean,
        query=tokens[N:], parts=parts, every=N // 64 * passes,
    )  # fmt: skip
    with tracer:
        for k in range(len(turns)):
            followed.append(turn(net, optimizer, k, tracer))
            if k:
                plain.append(turn(*alone, k))
    after, weights = peak(), tracer._problem.size
    assert all(map(torch.equal, alone[0].parameters(), net.parameters()))
    return {
        "optimizer": kind,
        "P": weights,
        "parts": parts,
        "passes": passes,
        "training_processor_seconds": min(plain),
        "trainings": min(followed) / min(plain) - 1,
        "peak_bytes_alone": before,
        "peak_bytes": after,
        "copies_of_the_weights": (after - before) / (4 * weights),
        "closure": tracer.trace().closure._asdict(),
    }


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "closure": closure,
    "cells": cells,
    "regression": regression,
    "drift": drift,
    "cost": cost,
    "cost-whole": cost_whole,
    "matrix-free": matrix_free,
    "online": online,
}


def main(part: str, out: Path) -> None:
    """Run one part and merge its rows into a JSON file."""
    start = time.perf_counter()
    rows = PARTS[part]()
    found = json.loads(out.read_text()) if out.exists() else {}
    found[part] = {
        "rows": rows,
        "seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
        "environment": {
            "poprisk": poprisk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
