r"""What is measured of a task before it is trained: gradients at the start, a tenth of AdamW's run.

A fifth of the training examples is held out, with labels as noisy as the others'; the test set is
not looked at. Per-coordinate signal is estimated from the mean gradients of K blocks of examples
(:func:`gradient_signal`), what can be learned early by the loss on the held-out fifth
(:func:`held_out_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poprisk.evaluation import evaluating
from poprisk.linalg import Estimate
from poprisk.randomness import RandomState, generator_of
from poprisk.task import Task, module_kinds
from poprisk.task.batches import split_batches
from poprisk.task.data import Inputs, outputs_over, select
from poprisk_lab.arms import DEFAULT_ADAMW, Arm, build_optimizer
from poprisk_lab.fit import seed_all

BLOCKS = 16
"""K, parts of the examples; half of them choose coordinates, the others judge."""
HALVINGS = 16
"""Random ways to halve them."""
EXAMPLES, COORDINATES = 4_096, 1 << 20
"""Most that gradients are taken of, drawn at random where there are more."""
FEW = 0.01
"""Share of the coordinates that counts as few."""
PART = 0.1
"""Of the task's epochs that are trained."""
FEWEST = 40
"""Training examples below which nothing is measured: blocks of two, a fifth of eight."""
ADAMW = Arm("adamw", "AdamW", "adamw", "adamw", DEFAULT_ADAMW)


class Quotient(NamedTuple):
    """Numerator and denominator, which are added up over seeds."""

    over: float
    under: float


class TaskStatistics(NamedTuple):
    r"""What one seed of a task says.

    Attributes:
        concentration: signal in few coordinates, and in all of them.
        unexplained: smallest held-out loss, and that of the best constant outputs.
        noise_scale: :math:`\operatorname{tr}\Sigma`, and :math:`|\mu|^2`.
        batch_share: b/n.
        weights_per_example: P/n.
        layers: modules with weights of their own.
    """

    concentration: Quotient
    unexplained: Quotient
    noise_scale: Quotient
    batch_share: float
    weights_per_example: float
    layers: int


def measure(task: Task, seed: int) -> TaskStatistics:
    """Measure a task with the data of one seed; random numbers outside are left as they were.

    Raises:
        ValueError: if there are too few examples, or losses that tell nothing.
    """
    n = len(task.train[1])
    if n < FEWEST:
        raise ValueError(
            f"task {task.name} has {n} training examples, too few to say beforehand what they "
            f"hold, which takes {FEWEST}; use compare."
        )
    with RandomState.kept():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        held, kept = order[: n // 5], order[n // 5 :]
        seed_all(seed)
        model = task.new_model()
        few, scale = gradient_signal(task, model, kept[:EXAMPLES], seed)
        base = constant_loss(task, model, held)
        best = held_out_loss(task, model, kept.sort().values, held, seed)
        if not (math.isfinite(best) and math.isfinite(base) and base > 0):
            raise ValueError(
                f"task {task.name} has loss {best:.3g} after a tenth of AdamW's training, and "
                f"{base:.3g} for the best constant outputs; what is learned is told from finite "
                "losses, the latter above 0: use compare."
            )
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = len(module_kinds(model))
    return TaskStatistics(
        few, Quotient(best, base), scale, task.batch_size / n, weights / n, layers
    )


def pooled(quotients: Iterable[Quotient]) -> Estimate:
    """The quotient of the sums over seeds, with its jackknife error; cost: a tenth of a training.

    Example:
        >>> pooled([Quotient(1.0, 2.0), Quotient(3.0, 2.0)])[:2]
        (1.0, 0.5)
    """
    found = list(quotients)
    k, value = len(found), _ratio(found)
    if k < 2:
        return Estimate.of(value, math.nan, PART * k)
    left = [_ratio(found[:i] + found[i + 1 :]) for i in range(k)]
    mean = sum(left) / k
    error = math.sqrt((k - 1) / k * sum((v - mean) ** 2 for v in left))
    return Estimate.of(value, error, PART * k)


def _ratio(found: Sequence[Quotient]) -> float:
    under = sum(q.under for q in found)
    return sum(q.over for q in found) / under if under > 0 else math.nan


def gradient_signal(
    task: Task, model: nn.Module, rows: Tensor, seed: int
) -> tuple[Quotient, Quotient]:
    r"""How concentrated the mean gradient is over coordinates, and its noise scale.

    Of K block means :math:`g_k`, halves A and B, with means :math:`\bar g` and variances v of
    these means between blocks; T(A) the hundredth of the coordinates with the largest
    :math:`|\bar g_{A,j}|`. Choosing on one half and measuring on the other is unbiased in
    numerator and denominator:

    .. math:: \frac{\sum_{j\in T(A)}\bar g_{B,j}^2-v_{B,j}}{\sum_j \bar g_{B,j}^2-v_{B,j}},
              \qquad \frac{m \sum_j \operatorname{Var}_k g_{k,j}}
                          {\tfrac1{K(K-1)}\sum_{k\ne l} g_k\cdot g_l},

    m examples in a block; sums over :data:`HALVINGS` random halves, both ways round. Ours.

    Args:
        task: its loss and training set.
        model: at its initial weights; not changed.
        rows: of the training set in random order, at least two a block.
        seed: of the halves, and of the coordinates where there are too many.
    """
    size = len(rows) // BLOCKS
    generator = generator_of(seed, "advise")
    with evaluating(model):
        g = block_gradients(task, model, rows[: size * BLOCKS].split(size), generator)
    few, whole = split_half_signal(g, generator)
    squared = (g.sum(0).square() - g.square().sum(0)).sum() / (BLOCKS * (BLOCKS - 1))
    return Quotient(few, whole), Quotient(float(size * g.var(0).sum()), float(squared))


def block_gradients(
    task: Task, model: nn.Module, blocks: Iterable[Tensor], generator: torch.Generator
) -> Tensor:
    """The mean gradients of blocks of rows, (K, at most :data:`COORDINATES`), float64.

    The coordinates are all, or drawn at random; complex weights count as two.
    """
    (x, y), params = task.train, [p for p in model.parameters() if p.requires_grad]
    chosen: Tensor | None = None
    found = list[Tensor]()
    for rows in blocks:
        loss = task.loss(model(x[rows]), y[rows]).mean()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        whole = [
            torch.zeros_like(p) if grad is None else grad
            for p, grad in zip(params, grads, strict=True)
        ]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in whole]
        flat = torch.cat([t.flatten() for t in real])
        if chosen is None and len(flat) > COORDINATES:
            chosen = torch.randperm(len(flat), generator=generator)[:COORDINATES]
        found.append((flat if chosen is None else flat[chosen]).double())
    return torch.stack(found)


def split_half_signal(g: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Signal in the coordinates that one half of the blocks chooses, and in all, by the other half.

    Args:
        g: (K, P), K even, float64.
        generator: draws the halves.
    """
    half = len(g) // 2
    count = max(1, round(FEW * g.shape[1]))
    inside = whole = 0.0
    for _ in range(HALVINGS):
        order = torch.randperm(len(g), generator=generator)
        halves = g[order[:half]], g[order[half:]]
        for a, b in (halves, halves[::-1]):
            signal = b.mean(0).square() - b.var(0) / half
            inside += float(signal[a.mean(0).abs().topk(count).indices].sum())
            whole += float(signal.sum())
    return inside, whole


def held_out_loss(task: Task, model: nn.Module, kept: Tensor, held: Tensor, seed: int) -> float:
    """The smallest mean loss on held-out rows in the first tenth of AdamW's training on others.

    Args:
        task: what to train on.
        model: trained in place.
        kept: rows of the training set.
        held: the others.
        seed: of the order of examples.
    """
    x, y = task.train
    train, outside = (select(x, kept), y[kept]), (select(x, held), y[held])
    size = min(task.batch_size, len(kept) - 1)
    optimizer = build_optimizer(ADAMW, model, batch_size=size, dataset_size=len(kept))
    found = [_mean_loss(task, model, outside)]
    for epoch in range(math.ceil(PART * task.epochs)):
        seed_all(1_000_003 * (seed + 1) + epoch)
        order = torch.randperm(len(kept))
        model.train()
        for rows in split_batches(order, size, drop_last=task.drop_last):
            optimizer.zero_grad()
            task.loss(model(train[0][rows]), train[1][rows]).mean().backward()
            optimizer.step()
        found.append(_mean_loss(task, model, outside))
    return min(found) if all(map(math.isfinite, found)) else math.nan


@torch.no_grad()
def _mean_loss(task: Task, model: nn.Module, data: tuple[Inputs, Tensor]) -> float:
    with evaluating(model):
        return float(task.loss(outputs_over(model, data[0]), data[1]).double().mean())


def constant_loss(task: Task, model: nn.Module, rows: Tensor) -> float:
    """The smallest mean loss on rows of the training set that outputs alike for all can have.

    Args:
        task: its loss and training set.
        model: for the shape of its outputs.
        rows: of the training set.
    """
    x, y = task.train
    with torch.no_grad(), evaluating(model):
        start = model(x[rows[:2]])[:1]
    u = torch.zeros_like(start).requires_grad_()
    search = torch.optim.LBFGS([u], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = task.loss(u.expand(len(rows), *u.shape[1:]), y[rows]).mean()
        found.backward()
        return found

    if not bool(loss().isfinite()):
        return math.nan
    search.step(loss)
    return float(loss().detach())
