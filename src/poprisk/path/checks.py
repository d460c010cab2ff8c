"""What recording and analysing a run refuses, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from poprisk._validate import NotAnalysable, first_line


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


def check_whole(model: nn.Module, sharded: Collection[str]) -> None:
    """Raise NotAnalysable for a model that is spread over processes or devices."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
    found = [type(m).__name__ for m in model.modules() if type(m).__name__ in wrappers]
    if found:
        raise NotAnalysable(
            f"the model is wrapped in {found[0]}, but recording needs the whole model in one "
            "process. Under DistributedDataParallel pass the module inside (model.module), and to "
            "recorder.step() the examples of all processes."
        )
    if sharded:
        raise NotAnalysable(
            f"parameters are spread over processes as DTensors (FSDP2?): {_named(sharded)}; "
            "recording needs the whole model in one process."
        )


def check_plain_tensors(inference: Collection[str], lazy: Collection[str]) -> None:
    """Raise NotAnalysable for tensors that cannot be trained or have no shape yet."""
    if inference:
        raise NotAnalysable(
            f"the model was made under torch.inference_mode(): {_named(inference)}; make it "
            "outside, for such tensors cannot be trained."
        )
    if lazy:
        raise NotAnalysable(
            f"parameters have no shape yet: {_named(lazy)}; call the model once on a batch, make "
            "the optimizer, and record then."
        )


def check_no_hooks(hooked: Collection[str]) -> None:
    """Raise NotAnalysable if hooks stand between the loss and the gradients of parameters."""
    if hooked:
        raise NotAnalysable(
            f"hooks are registered on gradients of {_named(hooked)} (a mask, clipping, a step in "
            "the backward pass?), which the Jacobian does not see; remove them, and freeze with "
            "requires_grad_(False)."
        )


def check_no_autocast(on: bool) -> None:
    """Raise NotAnalysable under autocast."""
    if on:
        raise NotAnalysable(
            "torch.autocast is on, whose rounding hides what single steps do; record outside of "
            "it, in float32 or float64."
        )


def check_copied(error: BaseException) -> NoReturn:
    """Raise NotAnalysable for a model that cannot be copied."""
    raise NotAnalysable(
        f"the model cannot be copied by copy.deepcopy ({first_line(error)}), and recording keeps a "
        "copy of its own; remove what it holds beside its parameters, or define __deepcopy__."
    ) from error


def check_lengths(name: str, inputs: int, targets: int) -> None:
    """Raise ValueError unless there are as many targets as inputs, and some."""
    if inputs != targets or inputs == 0:
        raise ValueError(
            f"{name} must hold a target for each input, at least one, but holds {inputs} inputs "
            f"and {targets} targets."
        )


def check_rows(outputs: Any, examples: int) -> None:
    """Raise NotAnalysable unless a model gave one real tensor with a row per example."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != examples:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise NotAnalysable(
            f"the model must return one tensor with a row per example, but for {examples} examples "
            f"it returned {found}; wrap it in a module that does."
        )
    if not outputs.is_floating_point():
        raise NotAnalysable(f"outputs must be real numbers, but are {outputs.dtype}.")
    if not bool(outputs.isfinite().all()):
        raise NotAnalysable(
            "outputs of the first examples are NaN or infinite before any step; check weights and "
            "inputs."
        )


def check_query_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise NotAnalysable if query points give outputs of another shape than training examples."""
    if found != expected:
        raise NotAnalysable(
            f"outputs of a query point have shape {found}, but those of a training example "
            f"{expected}; the model must give the same number for each."
        )


def check_weights_kept(written: Collection[str]) -> None:
    """Raise NotAnalysable if a forward pass writes to parameters."""
    if written:
        raise NotAnalysable(
            f"the forward pass writes to parameters, {_named(written)} "
            "(nn.Embedding(max_norm=...), or an initialization by the first batch?), so they move "
            "outside of the optimizer; "
            "leave max_norm out, or call the model once before recording."
        )


def check_repeatable(same: bool, written: Collection[str]) -> None:
    """Raise NotAnalysable if outputs change when inputs are repeated."""
    if not same and written:
        raise NotAnalysable(
            f"the model gives other outputs when the same inputs are repeated, for its forward "
            f"pass writes to what it reads, {_named(written)}, so its path is no function of the "
            "weights; record in model.eval(), or keep that state fixed."
        )
    if not same:
        raise NotAnalysable(
            "the model gives other outputs when the same inputs are repeated (dropout?), so its "
            "path is no function of the weights; set dropout to 0 or record in model.eval()."
        )


def check_independent(shaped: bool, same: bool) -> None:
    """Raise NotAnalysable if outputs of an example depend on the rest of the batch."""
    if not shaped:
        raise NotAnalysable(
            "the shape of outputs depends on the number of examples: the model must return one "
            "tensor with a row per example, examples first."
        )
    if not same:
        raise NotAnalysable(
            "outputs depend on the other examples of the batch (batch norm in training mode?); "
            "record in model.eval(), or use group or layer norm."
        )


def check_state_unread(always: Collection[str], once: Collection[str]) -> None:
    """Raise NotAnalysable if outputs read state that the forward pass writes."""
    if always:
        raise NotAnalysable(
            f"the forward pass writes to {_named(always)}, which outputs depend on, so the path is "
            "no function of the weights; record in model.eval(), or keep that state fixed."
        )
    if once:
        raise NotAnalysable(
            f"the first forward pass writes to {_named(once)}, which outputs depend on; call the "
            "model once on a batch before recording."
        )


def check_surroundings(changed: Collection[str]) -> None:
    """Raise NotAnalysable if what the optimizer does not train has changed."""
    if changed:
        raise NotAnalysable(
            f"{_named(changed)} changed since the recorder was made, but not by the optimizer that "
            "is recorded (a second optimizer, running statistics, a load?); only what one "
            "optimizer does can be followed."
        )


def check_state_kept(same: bool) -> None:
    """Raise NotAnalysable if a trained model is more than its recorded weights."""
    if not same:
        raise NotAnalysable(
            "the model's outputs at the end are not those of the recorded weights: something else "
            "in it changed (a counter or a cache that outputs depend on, a setting?); keep it "
            "fixed while recording."
        )


def check_differentiable(recorded: bool) -> None:
    """Raise NotAnalysable if a loss has no gradient by the outputs."""
    if not recorded:
        raise NotAnalysable(
            "loss must be differentiable in the outputs, but its value is constant (argmax, "
            "detach() or numpy inside?)."
        )


def check_second_derivative(error: BaseException) -> NoReturn:
    """Raise NotAnalysable for a loss without a second derivative."""
    raise NotAnalysable(
        f"loss has no second derivative ({first_line(error)}), which the path of the output "
        "gradient needs; write it with elementary operations of torch."
    ) from error


def check_targets(error: BaseException) -> NoReturn:
    """Raise NotAnalysable for a loss that cannot take all targets of the training set."""
    raise NotAnalysable(
        f"loss fails on the targets of the training set ({first_line(error)}); check their range "
        "and dtype."
    ) from error


def check_reverse_mode(right: bool, why: str, reentrant: bool) -> None:
    """Raise NotAnalysable for a model without a derivative by its weights, or with a wrong one."""
    if not right:
        advice = "the trained weights must lead to the outputs by operations of torch"
        if reentrant:
            advice = "pass use_reentrant=False to torch.utils.checkpoint"
        raise NotAnalysable(
            "outputs have no derivatives by the weights that torch.autograd.grad gives "
            f"({why}); {advice}."
        )


def check_function_of_weights(same: bool) -> None:
    """Raise NotAnalysable if a model reads its weights in a way that cannot be followed."""
    if not same:
        raise NotAnalysable(
            "the model gives other outputs when torch.func.functional_call puts the same weights "
            "into it: it reads them from elsewhere than its parameters (a list, a cache?)."
        )


def check_dtype(error: BaseException, dtype: torch.dtype) -> NoReturn:
    """Raise NotAnalysable for a model that cannot be put into another precision."""
    raise NotAnalysable(
        f"the model does not run in {dtype} ({first_line(error)}), which dense operators are "
        "computed in; let it follow the dtype of its weights and inputs."
    ) from error


def check_data_kept(same: bool) -> None:
    """Raise NotAnalysable if the data of a run was written to since."""
    if not same:
        raise NotAnalysable(
            "the training or query data was changed in place since the run was recorded; pass a "
            "copy to record(), and record again."
        )


def check_trained(added: int, removed: int) -> None:
    """Raise NotAnalysable if the optimizer trains other parameters than at the start."""
    if added or removed:
        raise NotAnalysable(
            f"the optimizer trains other parameters than when the recorder was made ({added} more, "
            f"{removed} fewer: a group added, a layer unfrozen?); make a new Recorder when that "
            "changes."
        )


def check_unscaled(scaled: bool) -> None:
    """Raise NotAnalysable if a fused step divides gradients by a loss scale itself."""
    if scaled:
        raise NotAnalysable(
            "a GradScaler leaves unscaling to the fused step, which hides the gradient; call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer), or make the optimizer with "
            "fused=False."
        )


def check_finite(step: int, finite: bool) -> None:
    """Raise NotAnalysable if weights would become, or became, NaN or infinite."""
    if not finite:
        raise NotAnalysable(
            f"the gradient of step {step} is NaN or infinite, or the weights are after it; lower "
            "the learning rate, or use an optimizer that skips such steps, such as PopRiskAdamW."
        )


def check_stepped(stepped: bool) -> None:
    """Raise ValueError unless steps of the optimizer and of the recorder alternate."""
    if not stepped:
        raise ValueError(
            "call Recorder.step(batch) once after each optimizer.step(), and not after one that "
            "was left out, as a GradScaler does when gradients overflow."
        )


def check_recorded_once(entered: bool) -> None:
    """Raise ValueError if a recorder is used for a second run."""
    if entered:
        raise ValueError("a Recorder records one run; make another for the next.")


def _named(names: Collection[str], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


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
            f"{error:.2g}); is step() overridden or wrapped, or was another state loaded? Pass "
            "rule=poprisk.path.realized_update(momentum=...)."
        )


def check_untouched(touched: Collection[str]) -> None:
    """Raise NotAnalysable if weights changed outside of the optimizer."""
    if touched:
        raise NotAnalysable(
            f"weights changed outside of the optimizer's steps: {_named(touched)} (clipping, "
            "averaging, or a load?); only what the optimizer does can be followed."
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
