"""Arguments that several estimators take, and the inputs of a model and its twin."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from poprisk._validate import check_losses, shapes_hint
from poprisk.dtensor import is_sharded, sharding_of


@final
class InputRecorder:
    """A hook that notes the inputs of a model while it is switched on.

    A copy of the model, such as a recorded run keeps, gets a witness of its own that stays off.
    """

    def __init__(self) -> None:
        self.on = False
        self.seen: list[Any] = []

    def watch(self, on: bool) -> None:
        """Forget what was seen, and switch it on or off."""
        self.on = on
        self.seen.clear()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            self.seen.append(tree_leaves((args, kwargs)))

    def __deepcopy__(self, memo: dict[int, Any]) -> InputRecorder:
        return InputRecorder()


def check_same(name: str, mine: Any, twins: Any) -> None:
    """Raise ValueError unless the model and its twin got the same tensors, or lists of them."""
    if not _same(mine, twins):
        raise ValueError(
            f"the {name} that the twin got differ from the model's at the same step: draw the "
            "batch before `for run in twin.runs(index)`, and let all that is random inside use "
            "torch's, numpy's or Python's global generator, which runs() rewinds."
        )


def _same(mine: Any, twins: Any) -> bool:
    if type(mine) is not type(twins):
        return False
    if isinstance(mine, list):
        return len(mine) == len(twins) and all(map(_same, mine, twins))
    return not isinstance(mine, Tensor) or (mine.shape == twins.shape and _equal(mine, twins))


def _equal(mine: Tensor, twins: Tensor) -> bool:
    """Whether all values are the same; NaN, as in masked targets, is the same as NaN."""
    same = (mine == twins) | (mine.isnan() & twins.isnan())
    return mine.dtype == twins.dtype and bool(same.all())


def check_output_losses(losses: Any, outputs: Tensor, targets: Any) -> Tensor:
    """Return ``losses`` if they are one value an example of ``outputs`` (n, ...), differentiable.

    Raises:
        ValueError: if not.
    """
    losses = check_losses(losses, len(outputs), hint=shapes_hint(outputs, targets))
    if outputs.requires_grad and not losses.requires_grad:
        raise ValueError("loss must be differentiable in the outputs, but its value is constant.")
    return losses


def check_index(index: Any, dataset_size: int) -> Tensor:
    """Return ``index`` as integer positions in a data set of ``dataset_size`` examples.

    Raises:
        TypeError: if it is not a tensor or sequence of integers.
        ValueError: if one lies outside.
    """
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"index must be a tensor of integers, but got {type(index).__name__}."
        ) from None
    if not isinstance(index, Tensor) and not found.numel():
        found = found.long()  # of no number torch makes floating-point ones
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(
            f"index must hold the positions of the batch's examples in the training set, integers "
            f"of shape (b,), but got shape {tuple(found.shape)}, {found.dtype}."
        )
    found = found.long()
    if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < dataset_size):
        raise ValueError(
            f"index must lie in 0..{dataset_size - 1} (dataset_size={dataset_size}), but got "
            f"{int(found.min())}..{int(found.max())}."
        )
    return found


def check_groups(groups: Any, n: int) -> Tensor:
    """Return group ids as integers 0..G-1, one an example, with G ≥ 2.

    Raises:
        ValueError: if the shape does not fit or there is one group only.
    """
    ids, counts = _ids("groups", groups, n)
    if len(counts) < 2:
        raise ValueError("groups must hold at least two different ids to give a standard error.")
    return ids


PART_EXAMPLES = 10
"""Examples from which a response of their own can be told."""


def check_parts(parts: Any, n: int) -> Tensor:
    """Return ids of parts as integers 0..K-1, one an example, with enough examples in each.

    Raises:
        ValueError: if the shape does not fit, or a part is too small.
    """
    ids, counts = _ids("parts", parts, n)
    if int(counts.min()) < PART_EXAMPLES:
        raise ValueError(
            f"parts must have at least {PART_EXAMPLES} examples each to measure a response, but "
            f"one has {int(counts.min())}; merge small ones."
        )
    return ids


def _ids(name: str, ids: Any, n: int) -> tuple[Tensor, Tensor]:
    """Ids as integers from 0 up, and how many examples have each."""
    if not isinstance(ids, Tensor) or ids.shape != (n,):
        found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be a tensor of one id an example, ({n},), but got {found}.")
    return torch.unique(ids.cpu(), return_inverse=True, return_counts=True)[1:]


def check_not_sharded(name: str, model: nn.Module) -> None:
    """Raise ValueError if a model's parameters are sharded over processes."""
    if sharding_of(model) is not None or any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{name} does not take models whose parameters are sharded (FSDP, DTensor), which "
            "cannot be copied; use DistributedDataParallel, or measure on one process."
        )


def check_transformable(problem: Any, w: Tensor) -> None:
    """Raise ValueError if a model's outputs have no derivative along the weights by torch.func.

    Args:
        problem: of a recorded run.
        w: flat weights, (P,).
    """
    try:
        problem.J.jvp(w, problem.train[0][:1], torch.zeros_like(w).unsqueeze(1))
    except RuntimeError as error:
        raise ValueError(
            f"the model's outputs cannot be differentiated along its weights ({error}): a forward "
            "pass that calls torch.autograd.grad cannot be followed, one with torch.func.grad can."
        ) from error


def check_subset(subset: Any, n: int, groups: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return the examples to delete: ``subset`` of them at random, or all.

    Raises:
        ValueError: if there are not so many, or groups are given too.
    """
    if subset is None:
        return torch.arange(n)
    if isinstance(subset, bool) or not isinstance(subset, int) or not 2 <= subset <= n:
        raise ValueError(f"subset must be an integer from 2 to {n} or None, but got {subset!r}.")
    if groups is not None:
        raise ValueError("subset and groups cannot be combined; delete all groups.")
    return torch.randperm(n, generator=generator)[:subset].sort().values
