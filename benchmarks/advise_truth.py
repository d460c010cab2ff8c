"""The gate and AdamW's grid on one noise level of a task, five seeds in one tensor.

What `poprisk compare` trains (:mod:`poprisk_lab.fit`: initial weights, order of examples, batches,
optimizers), in a fifth of the calls where the network is fully connected: layers hold the weights
of all seeds, (seeds, inputs, outputs), and every update is by coordinate. Final metrics are those
of `compare` up to rounding; ``tests/test_advise_study.py`` compares them. Other networks are
trained as `compare` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poprisk.task import Task
from poprisk.task.batches import split_batches
from poprisk_lab.arms import Arm, build_optimizer
from poprisk_lab.fit import ArmRun, score, seed_all
from poprisk_lab.tasks import load_task


class Stacked(nn.Module):
    """Fully connected networks of one shape side by side, (seeds, b, ...) to (seeds, b, outputs).

    Args:
        models: linear layers with ReLU between them.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        layers = [[m] if isinstance(m, nn.Linear) else [*m.children()] for m in models]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.kinds = list[str]()
        for same in zip(*layers, strict=True):
            linear = [layer for layer in same if isinstance(layer, nn.Linear)]
            biases = [layer.bias.detach()[None] for layer in linear if layer.bias is not None]
            self.kinds.append(("affine" if biases else "linear") if linear else "relu")
            if linear:
                weights = torch.stack([layer.weight.detach().T for layer in linear])
                self.weights.append(nn.Parameter(weights.contiguous()))
            if biases:
                self.biases.append(nn.Parameter(torch.stack(biases)))

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = iter(self.weights), iter(self.biases)
        for kind in self.kinds:
            if kind == "relu":
                x = x.relu()
            elif kind == "linear":
                x = torch.bmm(x, next(weights))
            else:
                x = torch.baddbmm(next(biases), x, next(weights))
        return x


def is_plain(model: nn.Module) -> bool:
    """Whether a model is a linear layer, or such with ReLU between them."""
    if isinstance(model, nn.Linear):
        return True
    own = isinstance(model, nn.Sequential)
    return own and all(isinstance(layer, (nn.Linear, nn.ReLU)) for layer in model)


def train(
    source: str, settings: dict[str, Any], seeds: Sequence[int], arms: Sequence[Arm]
) -> dict[str, list[float]]:
    """The final test metric of each seed, by arm."""
    tasks = [load_task(source, seed=seed, **settings) for seed in seeds]
    if is_plain(tasks[0].new_model()):
        return train_stacked(tasks, seeds, arms)
    return {
        arm.name: [
            [*ArmRun(task, arm, seed).rows()][-1]["final_metric"]
            for task, seed in zip(tasks, seeds, strict=True)
        ]
        for arm in arms
    }


def train_stacked(
    tasks: Sequence[Task], seeds: Sequence[int], arms: Sequence[Arm]
) -> dict[str, list[float]]:
    """The same for fully connected networks, all seeds at once."""
    first, n = tasks[0], len(tasks[0].train[1])
    models = [_start(task, seed) for task, seed in zip(tasks, seeds, strict=True)]
    runs = list[tuple[str, Stacked, torch.optim.Optimizer]]()
    for arm in arms:
        model = Stacked(models)
        size = min(first.batch_size, n - 1)
        runs.append((arm.name, model, build_optimizer(arm, model, batch_size=size, dataset_size=n)))
    x, y = (torch.stack([task.train[part] for task in tasks]) for part in (0, 1))
    row = torch.arange(len(seeds)).unsqueeze(1)
    for epoch in range(first.epochs):
        order = torch.stack([_order(seed, epoch, n) for seed in seeds])
        for batch in split_batches(torch.arange(n), first.batch_size, drop_last=first.drop_last):
            rows = order[:, batch]
            for _, model, optimizer in runs:
                u = model(x[row, rows])
                losses = first.loss(u.flatten(0, 1), y[row, rows].flatten(0, 1))
                optimizer.zero_grad()
                losses.unflatten(0, rows.shape).mean(1).sum().backward()
                optimizer.step()
    return {name: _final(model, tasks) for name, model, _ in runs}


def _start(task: Task, seed: int) -> nn.Module:
    seed_all(seed)
    return task.new_model()


def _order(seed: int, epoch: int, n: int) -> Tensor:
    seed_all(1_000_003 * (seed + 1) + epoch)  # as poprisk_lab.fit does
    return torch.randperm(n)


@torch.no_grad()
def _final(model: Stacked, tasks: Sequence[Task]) -> list[float]:
    outputs = model(torch.stack([task.test[0] for task in tasks]))
    return [score(task, u, task.test[1]) for task, u in zip(tasks, outputs, strict=True)]
