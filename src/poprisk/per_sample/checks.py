"""Refusals of the Jacobian and the kernel: models, data and memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from poprisk._validate import check_type, first_line

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
        raise ValueError(f"x1 gives {left} outputs per example but x2 gives {right}.")


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
        raise ValueError(f"{what} needs the kernel of one set with itself: leave x2 out.")


def check_kernel_fits(shape: tuple[int, int], size: int, max_memory: int) -> None:
    """Raise ValueError if a kernel takes more memory than there is."""
    if size >= max_memory:
        raise ValueError(
            f"the kernel of shape {shape} takes {size / MIB:.1f} MiB, but max_memory is "
            f"{max_memory / MIB:.1f} MiB; raise it, use matmul instead of dense, or ask for "
            "outputs='trace' or 'sum'."
        )


def check_block_fits(block: int, needed: int, max_memory: int) -> None:
    """Raise ValueError if not even one example fits."""
    if block < 1:
        raise ValueError(
            f"max_memory={max_memory} ({max_memory / MIB:.1f} MiB) is too small for a block of one "
            f"example, which needs {needed / MIB:.1f} MiB."
        )


def check_vectors_fit(rows: int, needed: int, max_memory: int) -> None:
    """Raise ValueError if vectors that a spectrum is looked for with do not fit."""
    if needed > max_memory:
        raise ValueError(
            f"max_memory={max_memory} ({max_memory / MIB:.1f} MiB) is too small for vectors of "
            f"{rows} rows, which need {needed / MIB:.1f} MiB; raise it, or ask for fewer "
            "eigenpairs (k) or probes."
        )


def check_count(name: str, found: int, needed: int) -> None:
    """Raise ValueError unless there is one tensor for each parameter."""
    if found != needed:
        raise ValueError(f"{name} must hold {needed} tensors, one per parameter, but has {found}.")


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is a tensor of a shape."""
    check_type(name, tensor, Tensor, "a tensor")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, but got {tuple(tensor.shape)}.")
