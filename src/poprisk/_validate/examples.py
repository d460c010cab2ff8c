"""What per-example work asks of models, data, losses and memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poprisk._validate.errors import first_line

MIB = 1 << 20


def check_names(name: str, chosen: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError if a name is not known."""
    if isinstance(chosen, str):
        raise TypeError(f"{name} must be a collection of names, but got the string {chosen!r}.")
    missing = [key for key in chosen if key not in known]
    if missing:
        raise ValueError(
            f"{name} has no entry for, or names, what is no trainable parameter: {missing[:5]}. "
            f"There are: {sorted(known)[:20]}."
        )


def check_some_parameters(params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if there is no parameter, or parameters are on several devices."""
    if not params:
        raise ValueError(
            "there is no trainable parameter to differentiate with respect to: all are frozen "
            "(requires_grad=False), or params selects none."
        )
    devices = sorted({str(p.device) for p in params.values()})
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on several devices, {', '.join(devices)}; move the model to one."
        )


def check_one_device(tensors: Iterable[Any], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor is on another device than the parameters."""
    device = next(iter(params.values())).device
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(
                f"the inputs are on {tensor.device} but the parameters on {device}; move both to "
                "one device."
            )


def check_iterable(name: str, data: Any) -> None:
    """Raise TypeError unless ``data`` can be read more than once."""
    if not hasattr(data, "__iter__") or hasattr(data, "__next__"):
        raise TypeError(
            f"{name} must be a tensor, a tuple or dict of tensors, or a list or loader of batches "
            f"that can be read again, but got {type(data).__name__}."
        )


def check_tensors(name: str, leaves: Iterable[Any]) -> None:
    """Raise TypeError unless all are tensors."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} must hold tensors only, but holds a {type(leaf).__name__}.")


def check_repeatable(name: str, same: bool) -> None:
    """Raise ValueError if a second pass through the data gave something else."""
    if not same:
        raise ValueError(
            f"{name} gives other data in a second pass; use shuffle=False and no random "
            "augmentation, or pass one tensor."
        )


def check_inputs(name: str, leaves: Sequence[Any]) -> None:
    """Raise unless all are tensors with one positive number of examples."""
    if not leaves:
        raise ValueError(f"{name} holds no example.")
    check_tensors(name, leaves)
    for leaf in leaves:
        if leaf.ndim == 0 or len(leaf) == 0:
            raise ValueError(
                f"{name} holds no example: a tensor has shape {tuple(leaf.shape)}; its first "
                "dimension counts examples."
            )
    lengths = sorted({len(leaf) for leaf in leaves})
    if len(lengths) > 1:
        raise ValueError(
            f"{name} holds tensors of different lengths, {lengths}; the first dimension of each "
            "must count the examples (a graph's list of edges does not: there, each example must "
            "be a graph of its own)."
        )


def check_outputs(outputs: Any, examples: int) -> None:
    """Raise unless a model returned a floating-point tensor with a row for each example."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model must return a tensor, but returned {type(outputs).__name__}; wrap it in a "
            "module whose forward returns the one that counts, such as model(x)[0] or "
            "model(x).logits."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"the outputs must be real floating-point, but are {outputs.dtype}.")
    if outputs.ndim == 0 or len(outputs) != examples:
        raise ValueError(
            f"the model returned shape {tuple(outputs.shape)} for {examples} examples; its first "
            "dimension must count examples."
        )


def check_part(part: int, examples: int, error: Exception) -> None:
    """Raise ValueError for a model or loss that failed on some of the examples alone."""
    raise ValueError(
        f"the model (or loss) fails on {part} of {examples} examples without the others "
        f"({first_line(error)}); the first dimension of every input must count examples that can "
        "be passed by themselves, which the nodes of one graph, say, cannot."
    ) from error


def check_numbers(what: str, values: Tensor, *, start: int = 0, finite: bool = True) -> None:
    """Raise ValueError if an example has NaN or Inf.

    Args:
        what: the values are.
        values: (b, ...).
        start: position of the first example.
        finite: False where Inf may be meant, such as in masked logits.
    """
    wrong = ~values.detach().isfinite() if finite else values.detach().isnan()
    bad = wrong.flatten(1).any(dim=1) if wrong.ndim > 1 else wrong
    if bool(bad.any()):
        first = start + int(bad.nonzero()[0])
        raise ValueError(
            f"the {what} of {int(bad.sum())} of {len(bad)} examples are NaN or Inf, the first at "
            f"position {first}: look at its inputs, and at the weights."
        )


def check_finite_kernel(finite: bool) -> None:
    """Raise ValueError if a kernel holds NaN or Inf."""
    if not finite:
        raise ValueError(
            "the kernel, or its product with a vector, holds NaN or Inf: a derivative of the "
            "outputs is not finite, or its square overflows; look for NaN or Inf in the inputs and "
            "the weights, or use float64."
        )


def check_differentiable(recorded: bool) -> None:
    """Raise ValueError if outputs depend on no parameter."""
    if not recorded:
        raise ValueError(
            "the outputs depend on no trainable parameter that counts: the model computes them "
            "under torch.no_grad(), or params selects only unused ones."
        )


def check_positions(name: str, positions: Sequence[int], count: int) -> None:
    """Raise unless positions are distinct integers in [0, count)."""
    if not isinstance(positions, Sequence):
        raise TypeError(f"{name} must be a list of integers, but got {positions!r}.")
    good = all(isinstance(p, int) and not isinstance(p, bool) for p in positions)
    if not positions or not good or len(set(positions)) < len(positions):
        raise ValueError(f"{name} must be distinct integers, but got {positions!r}.")
    if min(positions) < 0 or max(positions) >= count:
        raise ValueError(
            f"{name} must lie in [0, {count}) for a model with {count} outputs per example, but "
            f"got {list(positions)}."
        )


def check_no_batch_statistics(model: nn.Module) -> None:
    """Raise ValueError if a batch normalization would mix examples."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) normalizes by the statistics of "
                "the batch, so that there are no per-example gradients; call model.eval(), or use "
                "GroupNorm or LayerNorm."
            )


def check_deterministic(same: bool, model: nn.Module) -> None:
    """Raise ValueError if the same inputs gave two different outputs."""
    if same:
        return
    random = [n for n, m in model.named_modules() if m.training and "Dropout" in type(m).__name__]
    where = f" (dropout is on in {', '.join(random[:3])})" if random else ""
    raise ValueError(
        f"the model gives other outputs when called again with the same inputs{where}; call "
        "model.eval(), and fix the seed of any other randomness."
    )


def check_independent(same: bool) -> None:
    """Raise ValueError if the outputs of an example depend on the other examples."""
    if not same:
        raise ValueError(
            "the outputs of an example depend on the other examples of its batch; there is no "
            "kernel between examples then. Call model.eval(), or replace what mixes them."
        )


def check_same_values(left: int, right: int) -> None:
    """Raise ValueError unless both sides have the same outputs."""
    if left != right:
        raise ValueError(f"x gives {left} outputs per example but y gives {right}.")


def check_columns(vectors: Any, rows: int) -> None:
    """Raise ValueError unless ``vectors`` are (rows,) or (rows, s)."""
    good = isinstance(vectors, Tensor) and vectors.ndim in (1, 2) and vectors.numel() > 0
    if not good or len(vectors) != rows:
        found = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"the kernel multiplies ({rows},) or ({rows}, s), but got {found}.")


def check_same_kind(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ValueError unless a tensor has the dtype and the device of the kernel."""
    found, needed = (f"{t.dtype} on {t.device}" for t in (tensor, like))
    if found != needed:
        raise ValueError(f"{name} must be {needed}, as the kernel is, but got {found}.")


def check_symmetric(symmetric: bool, what: str) -> None:
    """Raise ValueError for a kernel between two sets."""
    if not symmetric:
        raise ValueError(f"{what} needs the kernel of one set with itself: leave y out.")


def check_range(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but got {value!r} ({type(value).__name__}).")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, but got {value}.")


def check_kernel_fits(shape: tuple[int, int], size: int, budget: int) -> None:
    """Raise ValueError if a kernel takes more memory than there is."""
    if size >= budget:
        raise ValueError(
            f"the kernel of shape {shape} takes {size / MIB:.1f} MiB, but max_memory is "
            f"{budget / MIB:.1f} MiB; raise it, use matmul instead of dense, or ask for "
            "outputs='trace' or 'sum'."
        )


def check_block_fits(block: int, needed: int, budget: int) -> None:
    """Raise ValueError if not even one example fits."""
    if block < 1:
        raise ValueError(
            f"max_memory={budget} ({budget / MIB:.1f} MiB) is too small for a block of one "
            f"example, which needs {needed / MIB:.1f} MiB."
        )


def check_count(name: str, found: int, needed: int) -> None:
    """Raise ValueError unless there is one tensor for each parameter."""
    if found != needed:
        raise ValueError(f"{name} must hold {needed} tensors, one per parameter, but has {found}.")


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is a tensor of a shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, but got {type(tensor).__name__}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, but got {tuple(tensor.shape)}.")


def check_values(losses: Any, examples: int | None = None) -> None:
    """Raise unless losses are one value per example."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"the losses must be a tensor, but got {type(losses).__name__}.")
    if losses.ndim != 1 or (examples is not None and len(losses) != examples):
        expected = "(b,)" if examples is None else f"({examples},)"
        raise ValueError(
            f"the loss must give one value per example, shape {expected}, but gave "
            f"{tuple(losses.shape)}; pass reduction='none' and average over all dimensions but "
            "the first."
        )


def check_losses(losses: Any, examples: int | None = None) -> None:
    """Raise unless losses are one differentiable value per example, for at least two."""
    check_values(losses, examples)
    if len(losses) < 2:
        raise ValueError(
            f"a variance between examples needs at least two of them, but got {len(losses)}."
        )
    if not losses.requires_grad:
        raise ValueError(
            "the losses depend on no trainable parameter: all are frozen, or they were computed "
            "under torch.no_grad()."
        )


def check_separate(loss: Any, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Raise ValueError if an example's loss depends on the others of its batch.

    Args:
        loss: from outputs (b, ...) and targets (b, ...) to ``losses``; it is evaluated once more,
            on either half of them.
        outputs: of the batch.
        targets: of the batch.
        losses: per example, (b,).
    """
    half = len(losses) // 2
    if half == 0:
        return
    parts = (loss(outputs[rows], targets[rows]) for rows in (slice(half), slice(half, None)))
    alone, found = torch.cat([part.detach() for part in parts]), losses.detach()
    rtol = max(1e-3, 8 * torch.finfo(found.dtype).eps)
    atol = 1e-5 * float(found.nan_to_num(0.0, 0.0, 0.0).abs().max())  # what rounding can do
    if not alone.allclose(found, rtol=rtol, atol=atol, equal_nan=True):
        raise ValueError(
            "loss gives one value per example, but that of an example changes with the others of "
            "its batch (a mean spread over all, a normalization?); pass reduction='none', and take "
            "the mean over examples yourself."
        )


def check_unmixed(same: bool) -> None:
    """Raise ValueError if the loss of an example depends on the others of its batch."""
    if not same:
        raise ValueError(
            "the loss of an example changes with the others of its batch: the model or loss looks "
            "across the batch (contrast, normalization, division by a number of the batch's), so "
            "there are no per-example gradients. Each loss must depend on its own example alone."
        )


def check_loss_takes(outputs: Any, error: Exception) -> None:
    """Raise TypeError if a loss failed on outputs that are no tensor."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}, on which loss failed "
            f"({first_line(error)}); let loss take what counts of it, as in lambda out, y: "
            "loss(out[0], y) or loss(out.logits, y)."
        ) from error


def check_same_share(same: bool) -> None:
    """Raise ValueError if the examples of one step count differently."""
    if not same:
        raise ValueError(
            "weight must give every example of a step the same share: the number of losses over "
            "the batch size, also for a smaller last part."
        )


def check_weight(weight: Any) -> None:
    """Raise unless ``weight`` is a positive number."""
    if isinstance(weight, bool) or not isinstance(weight, SupportsFloat):
        raise TypeError(f"weight must be a number, but got {type(weight).__name__}.")
    if not 0 < float(weight) < math.inf:
        raise ValueError(f"weight must be positive and finite, but got {weight}.")


def check_step_size(examples: int, implied: float, batch_size: int | None) -> None:
    """Raise ValueError if a step has more examples than its optimizer was told.

    Args:
        examples: seen in this step so far.
        implied: what the weight of the last part says of the whole; weights may be rounded.
        batch_size: the setting; of all processes, so more than those seen here is no contradiction.
    """
    if batch_size is not None and (examples > batch_size or implied > 1.05 * batch_size):
        raise ValueError(
            f"batch_size={batch_size}, but this step has {max(examples, round(implied))} examples; "
            "set batch_size to the examples behind one step (batch × accumulation steps × "
            "processes), and weight to a part's share of them."
        )


def check_no_post_hooks(found: bool) -> None:
    """Raise RuntimeError if a hook could use a gradient before it is known to be whole."""
    if found:
        raise RuntimeError(
            "a parameter has a hook by register_post_accumulate_grad_hook(), which may step or "
            "change gradients within the backward pass; optimizer.backward(losses) cannot see "
            'what it does: remove it, or use another variance than "exact".'
        )


def check_parts(parts: int) -> None:
    """Raise RuntimeError if a batch was not seen in parts."""
    if parts < 2:
        raise RuntimeError(
            f'variance="exact" or "microbatch" saw {parts} part(s) of the batch and needs two: for '
            '"exact" call optimizer.backward(losses), with one loss per example, in place of '
            'losses.mean().backward(); for "microbatch" call optimizer.microbatch(size) after '
            "each backward pass of an accumulated step."
        )


def check_seen(seen: bool) -> None:
    """Raise RuntimeError for a gradient that did not come from the parts of the batch."""
    if not seen:
        raise RuntimeError(
            "a parameter has a gradient from elsewhere: compute all gradients by "
            'optimizer.backward(losses) for variance="exact", and call optimizer.microbatch(size) '
            'after each backward pass for "microbatch".'
        )


def check_fresh(fresh: bool) -> None:
    """Raise RuntimeError if gradients were there before the first part of a batch."""
    if not fresh:
        raise RuntimeError(
            "gradients are left from before this batch; call optimizer.zero_grad() before "
            "optimizer.backward(losses), and use no other backward pass with it."
        )


def check_same_grad(same: bool) -> None:
    """Raise RuntimeError if gradients were changed between the parts of a batch."""
    if not same:
        raise RuntimeError(
            "gradients were changed between two parts of a batch; clip or unscale them once, "
            "after the last part, and call optimizer.zero_grad() between steps."
        )


def check_one_backward(same: bool, changes: int) -> None:
    """Raise RuntimeError unless one backward pass at most added to a gradient."""
    if not same or changes > 1:
        wrapped = (
            " A wrapper that averages gradients over processes writes them, too: under "
            'DistributedDataParallel use variance="data-parallel" with observe_ranks(model, '
            "optimizer)."
        )
        raise RuntimeError(
            "call optimizer.microbatch(size) once after each backward pass, and "
            "optimizer.zero_grad() between steps: the gradients were "
            f"{f'changed {changes} times' if same else 'replaced by other tensors'} since the last "
            f"call.{wrapped if processes() > 1 else ''}"
        )


def processes() -> int:
    """How many there are, 1 without torch.distributed."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def check_some_backward(some: bool) -> None:
    """Raise RuntimeError if no gradient has changed since the last part."""
    if not some:
        raise RuntimeError(
            "there was no backward pass since the last part; call optimizer.microbatch(size) once "
            "after each."
        )


def check_only_scaled(scaled: bool) -> None:
    """Raise RuntimeError if gradients were changed by more than a factor per tensor."""
    if not scaled:
        raise RuntimeError(
            'gradients were changed between the backward pass and step(): variance="exact" and '
            '"microbatch" take a common factor per tensor (unscaling, clipping by norm), but not '
            "clipping by value, added noise or terms from another backward pass."
        )


def check_pair(name: str, pair: Any) -> tuple[Any, Any]:
    """Return a pair of inputs and targets; TypeError if it is none."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (inputs, targets), but got {type(pair).__name__}.")
    return pair[0], pair[1]


def check_targets(targets: Any, examples: int) -> None:
    """Raise unless targets are a tensor with an entry for each example."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"the targets must be a tensor, but got {type(targets).__name__}.")
    if targets.ndim == 0 or len(targets) != examples:
        raise ValueError(
            f"there are {examples} examples but targets of shape {tuple(targets.shape)}."
        )


def check_within(method: str, found: Collection[str], needed: str) -> None:
    """Raise RuntimeError if a method does not belong to the variance estimator in use."""
    if {"exact", "microbatch"} <= set(found):
        raise RuntimeError(
            'one optimizer takes variance="exact" or "microbatch", not both; use two optimizers.'
        )
    if needed not in found:
        used = ", ".join(repr(f) for f in sorted(found)) or "none"
        raise RuntimeError(
            f"{method}() is for variance={needed!r}, but this optimizer uses {used}."
        )
