"""A finish by L-BFGS on a fixed objective, as networks of differential equations are trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def finish(
    model: nn.Module,
    loss: Callable[[], Tensor],
    measure: Callable[[], float],
    *,
    evaluations: int,
    every: int,
) -> list[float]:
    """Minimize a loss by torch's L-BFGS with a strong Wolfe line search.

    Args:
        model: whose parameters are moved.
        loss: the objective, the same at each call.
        measure: what is kept along the way.
        evaluations: of loss and gradient, after which it ends: what a step is for other optimizers.
        every: how many evaluations a measurement stands for.

    Returns:
        Measurements after each ``every`` evaluations, the last at ``evaluations``; between two
        iterations the earlier weights count. What an iteration knows from the one before it is not
        counted again.
    """
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=5, history_size=50, tolerance_grad=0.0, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    done, found = 0, list[float]()

    def closure() -> Tensor:
        nonlocal done
        done += 1
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    while len(found) < evaluations // every:
        before, at = measure(), done
        optimizer.step(closure)
        if at:
            done = max(done - 1, at + 1)
        found += [before] * (min(done, evaluations) // every - len(found))
    if done <= evaluations:
        found[-1] = measure()
    return found
