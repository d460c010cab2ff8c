"""What recording and analysing a run refuses, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.evaluation import outputs_of
from poprisk.forward_mode import plain_kernels


class NotAnalysable(ValueError):
    """A run that the theory cannot be put on as it is; the message says what would work."""


def check_rule_known(optimizer: Optimizer, known: bool, names: Collection[str]) -> None:
    """Raise NotAnalysable for an optimizer whose step is not known to be linear."""
    if not known:
        raise NotAnalysable(
            f"{type(optimizer).__name__} has no rule that writes its step as a linear map of the "
            f"gradient; exact ones exist for {', '.join(names)}, PopRiskAdamW and gated(). Pass "
            "rule=poprisk.path.realized_update(momentum=...), which is exact for displacements "
            "only, or give the optimizer a method step_rule(param, facts)."
        )


def check_per_example(values: Any, examples: int) -> None:
    """Raise ValueError unless a loss gave one value per example."""
    if not isinstance(values, Tensor) or tuple(values.shape) != (examples,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"loss must give one value per example, shape ({examples},), but gave {found}; pass "
            "reduction='none' and reduce all dimensions but the first."
        )


def check_weights(parameters: list[Tensor]) -> None:
    """Raise NotAnalysable unless there are real trained weights of one dtype and device."""
    if not parameters:
        raise NotAnalysable("the optimizer trains no parameter of the model; pass the same model.")
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1 or not parameters[0].is_floating_point():
        raise NotAnalysable(
            f"the trained parameters must be real, of one dtype and on one device, but they are "
            f"{sorted(map(str, kinds))}; convert the model with model.to(...)."
        )
    if parameters[0].dtype in (torch.float16, torch.bfloat16):
        raise NotAnalysable(
            f"weights are {parameters[0].dtype}, whose rounding hides single steps; train in "
            "float32 or float64."
        )


def check_foreign(count: int) -> None:
    """Raise NotAnalysable if the optimizer also trains what is no part of the model."""
    if count:
        raise NotAnalysable(
            f"the optimizer trains {count} tensors that are no parameters of the model; pass the "
            "module that holds all of them."
        )


def check_repeatable(model: nn.Module, x: Tensor) -> None:
    """Raise NotAnalysable unless outputs repeat and do not depend on the rest of the batch."""
    kept = {k: v.clone() for k, v in model.named_buffers()}
    try:
        with plain_kernels(model):
            whole, again, part = (outputs_of(model, some) for some in (x, x, x[:2]))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
    if not isinstance(whole, Tensor) or len(whole) != len(x):
        raise NotAnalysable("the model must return one tensor with a row per example.")
    scale = float(whole.double().abs().max()) + 1e-30
    tolerance = 1e-4 if whole.dtype == torch.float32 else 1e-10
    if float((whole - again).abs().max()) > tolerance * scale:
        raise NotAnalysable(
            "the model gives other outputs when the same inputs are repeated (dropout?), so its "
            "path is no function of the weights; set dropout to 0 or record in model.eval()."
        )
    if len(x) > 2 and float((whole[:2] - part).abs().max()) > tolerance * scale:
        raise NotAnalysable(
            "outputs depend on the other examples of the batch (batch norm in training mode?); "
            "record in model.eval(), or use group or layer norm."
        )


def check_forward_mode(missing: str, instead: str) -> None:
    """Raise NotAnalysable if a model has no forward-mode derivative where one is needed."""
    if missing:
        raise NotAnalysable(
            f"{missing}; write that part of the model with other operations of torch, or {instead}."
        )


def check_gradient(step: int, error: float, tolerance: float) -> None:
    """Raise NotAnalysable if the optimizer saw another gradient than the recorded batch gives."""
    if not error <= tolerance:
        raise NotAnalysable(
            f"the gradient of step {step} is not that of the recorded loss on the recorded batch "
            f"(relative difference {error:.2g}): augmented or changing data, dropout, another "
            "reduction than the mean, or clipping would do that. Record with repeatable data, "
            "loss.mean() over the batch, and no clipping."
        )


def check_rule_error(error: float, tolerance: float, name: str) -> None:
    """Raise NotAnalysable if a rule does not reproduce the step the optimizer took."""
    if not error <= tolerance:
        raise NotAnalysable(
            f"the step of {name} is not the one its rule describes (relative difference "
            f"{error:.2g}); is step() overridden or wrapped? Pass "
            "rule=poprisk.path.realized_update(momentum=...)."
        )


def check_untouched(untouched: bool) -> None:
    """Raise NotAnalysable if weights changed outside of the optimizer."""
    if not untouched:
        raise NotAnalysable(
            "weights changed between two steps of the optimizer (clipping, averaging, or a load?); "
            "only what the optimizer does can be followed."
        )


def check_budget(needed: float, budget: float, what: str, instead: str) -> None:
    """Raise NotAnalysable if something needs more bytes than allowed."""
    if needed > budget:
        raise NotAnalysable(
            f"{what} needs {needed / 2**30:.3g} GiB, over the budget of {budget / 2**30:.3g} GiB; "
            f"{instead}"
        )


FileState = tuple[int, int]
"""Size of a file in bytes, and when it was last written, in ns."""


def file_state(path: Path) -> FileState | None:
    """The present state of a file; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def check_kept(path: Path, written: FileState | None) -> None:
    """Raise NotAnalysable unless a file of a recorded run is as it was written."""
    found = file_state(path)
    if found is None or found != written:
        what = "is gone" if found is None else "was changed since"
        raise NotAnalysable(
            f"{path}, which holds a part of the recorded run, {what}; record again, each run into "
            "a directory of its own that is kept while the run is used."
        )


def check_written(path: Path, error: OSError) -> NoReturn:
    """Raise NotAnalysable for a file of a recorded run that cannot be written."""
    raise NotAnalysable(
        f"{path} cannot be written: {error.strerror or error}; choose another directory=, or leave "
        "it out to record in memory."
    ) from error


def check_indices(indices: Tensor, examples: int) -> None:
    """Raise ValueError unless ``indices`` is a batch of the training set."""
    integers = not indices.is_floating_point() and indices.dtype != torch.bool
    if indices.ndim != 1 or len(indices) == 0 or not integers:
        raise ValueError(
            f"a batch must be a 1-d tensor of example indices, but got shape "
            f"{tuple(indices.shape)} of {indices.dtype}."
        )
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= examples:
        raise ValueError(
            f"a batch names example {low if low < 0 else high}, but the training set has "
            f"{examples}."
        )


def check_probes(probes: Any, shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``probes`` is (n, c, r)."""
    if not isinstance(probes, Tensor) or probes.ndim != 3 or tuple(probes.shape[:2]) != shape:
        found = tuple(probes.shape) if isinstance(probes, Tensor) else type(probes).__name__
        raise ValueError(
            f"probes must have shape (n, c, r) = ({shape[0]}, {shape[1]}, r): a starting output "
            f"gradient for each of r vectors; but got {found}."
        )


def check_clean(clean: Any, targets: Tensor) -> None:
    """Raise ValueError unless clean targets have the form of the training targets."""
    fits = isinstance(clean, Tensor) and clean.shape == targets.shape
    if not fits or clean.is_floating_point() != targets.is_floating_point():
        found = f"{tuple(clean.shape)} of {clean.dtype}" if isinstance(clean, Tensor) else clean
        raise ValueError(
            f"clean targets must be like the training targets, {tuple(targets.shape)} of "
            f"{targets.dtype}, but got {found}."
        )


def check_minibatches(batch: int, examples: int, stride: int) -> None:
    """Raise NotAnalysable for a run without minibatch noise, or whose steps are merged."""
    if stride > 1:
        raise NotAnalysable(
            f"drift and diffusion need every step, but the run was recorded every {stride}; record "
            "with stride=1."
        )
    if batch >= examples:
        raise NotAnalysable(
            "a full-batch run has no minibatch noise, so no diffusion; record minibatches."
        )


def check_answers(run: Any, recorded: bool) -> None:
    """Raise unless a run says how each of its steps answers to another gradient.

    Raises:
        TypeError: if ``run`` is not ``recorded``.
        NotAnalysable: if it holds no steps, not every step, or not their exact rules.
    """
    if not recorded:
        raise TypeError(
            "run must be what poprisk.record(...) returns, or the run of a poprisk.Recorder, but "
            f"got {type(run).__name__}."
        )
    if len(run) == 0:
        raise NotAnalysable("the run holds no step, so nothing has left a trace; record some.")
    if run.stride > 1:
        raise NotAnalysable(
            f"the run was recorded every {run.stride} steps, but what a step answers to another "
            "gradient needs every step; record with stride=1."
        )
    if not run.exact:
        raise NotAnalysable(
            f"the preconditioner of {run.optimizer} was read off its steps (realized_update), "
            "which does not say how a step answers to another gradient; train with an optimizer "
            "that has an exact rule, or use poprisk.TwinRisk alone."
        )
