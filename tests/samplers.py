"""Random cases, each from its own seed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from poprisk import PopRiskAdamW

Shape = tuple[int, ...]
GradRow = Sequence[Tensor | None]
"""The gradients of all parameters at one step."""

means = st.one_of(st.just(0.0), st.floats(1e-60, 1e60), st.floats(-1e60, -1e-60))
variances = st.one_of(st.just(0.0), st.floats(1e-120, 1e120))
moments = st.lists(st.tuples(means, variances), min_size=1, max_size=8)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Parameter:
    return Parameter(randn(*shape, seed=seed, dtype=dtype))


def noisy_grads(
    steps: int, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Independent noise around one random mean: masks of them are neither all 0 nor all 1."""
    mean = randn(*shape, seed=seed, dtype=dtype)
    return [mean + 2 * randn(*shape, seed=1000 * seed + t, dtype=dtype) for t in range(steps)]


def grad_rows(
    params: Sequence[Tensor], steps: int, *, seed: int = 1, dtype: torch.dtype | None = None
) -> list[list[Tensor]]:
    """Gradients for all of ``params`` over some steps."""
    columns = [
        noisy_grads(steps, *p.shape, seed=seed + j, dtype=dtype or p.dtype)
        for j, p in enumerate(params)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def take_steps(optimizer: Optimizer, rows: Sequence[GradRow]) -> list[list[Tensor]]:
    """Step on each row of gradients; return the weights after each step."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    weights = []
    for row in rows:
        for p, grad in zip(params, row, strict=True):
            p.grad = grad
        optimizer.step()
        weights.append([p.detach().clone() for p in params])
    return weights


def copies(params: Sequence[Tensor]) -> list[Parameter]:
    """Parameters of the same values and memory layout."""
    return [Parameter(p.detach().clone()) for p in params]


def trajectory(
    build: Callable[[list[Parameter]], Optimizer], starts: Sequence[Tensor], rows: Sequence[GradRow]
) -> list[list[Tensor]]:
    """Weights after each step of a new optimizer on copies of ``starts``."""
    return take_steps(build(copies(starts)), rows)


def observed_masks(grads: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """The mask of each step, read off as gated update over ungated update."""
    gated, plain = (Parameter(torch.zeros_like(grads[0])) for _ in range(2))
    groups = [{"params": [gated]}, {"params": [plain], "gate": False}]
    optimizer = PopRiskAdamW(groups, lr=1.0, weight_decay=0.0, **settings)
    masks = []
    for grad in grads:
        with torch.no_grad():
            gated.zero_()
            plain.zero_()
        masks.append(torch.div(*take_steps(optimizer, [[grad, grad]])[0]))
    return masks
