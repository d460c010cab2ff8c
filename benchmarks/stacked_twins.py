"""A model and its twin in turn, against both stacked: python benchmarks/stacked_twins.py

The stacked step is ``torch.func.functional_call`` under ``vmap`` over parameters of twice the size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer

from poprisk.losses import cross_entropy, squared_error
from poprisk_lab.studies.risk.problems import Transformer
from poprisk_lab.tasks.digits import cnn
from poprisk_lab.tasks.nets import mlp

Step = Callable[[], object]
REPEATS, STEPS = 15, 10

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "MLP 8-128-1": (lambda: mlp(8, 128, 1, activation=nn.Tanh), (8,), 500, 1),
    "MLP 10-64-64-1": (lambda: mlp(10, 64, 64, 1), (10,), 40, 1),
    "MLP 64-128-128-10": (lambda: mlp(64, 128, 128, 10), (64,), 64, 10),
    "MLP 64-512-512-10": (lambda: mlp(64, 512, 512, 10), (64,), 64, 10),
    "MLP 16-32-32-32-32-32-4": (lambda: mlp(16, 32, 32, 32, 32, 32, 4), (16,), 32, 4),
    "CNN": (cnn, (64,), 64, 10),
    "transformer": (lambda: Transformer(4), (8,), 64, 4),
}
"""Model, shape of an input, batch size, outputs."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter] | list[Tensor]], Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
}


def batch(shape: tuple[int, ...], b: int, outputs: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(6, (b, *shape)) if shape == (8,) and outputs == 4 else torch.randn(b, *shape)
    return x, torch.randn(b, 1) if outputs == 1 else torch.randint(outputs, (b,))


def steps(case: str, optimizer: str) -> dict[str, Step]:
    """One training step of the model, of two in turn, and of two stacked."""
    make, shape, b, outputs = CASES[case]
    build, loss = OPTIMIZERS[optimizer], squared_error if outputs == 1 else cross_entropy
    x, y = batch(shape, b, outputs)
    models = [make() for _ in range(2)]
    optimizers = [build(list(m.parameters())) for m in models]
    perturbation = 0.3 * torch.randn(2, b, outputs)
    base = make()
    weights, buffers = stack_module_state(models)
    both = build(list(weights.values()))

    def one(i: int) -> None:
        optimizers[i].zero_grad()
        u = models[i](x)
        (loss(u, y) - (perturbation[i] * u).sum(1)).mean().backward()
        optimizers[i].step()

    def tilted(w: dict[str, Tensor], rest: dict[str, Tensor], t: Tensor) -> Tensor:
        u = functional_call(base, (w, rest), (x,))
        return (loss(u, y) - (t * u).sum(1)).mean()

    def stacked() -> None:
        both.zero_grad()
        vmap(tilted)(weights, buffers, perturbation).sum().backward()
        both.step()

    return {"one": lambda: one(0), "two": lambda: (one(0), one(1)), "stacked": stacked}


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        for optimizer in OPTIMIZERS:
            found = steps(case, optimizer)
            seconds: dict[str, list[float]] = {name: [] for name in found}
            for _ in range(REPEATS + 1):
                for name, step in found.items():
                    began = time.perf_counter()
                    for _ in range(STEPS):
                        step()
                    seconds[name].append((time.perf_counter() - began) / STEPS)
            ms = {name: 1e3 * statistics.median(s[1:]) for name, s in seconds.items()}
            ratio = ms["stacked"] / ms["two"]
            times = ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items())
            print(f"{case:24} {optimizer:6} {times}; stacked/two {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
