"""Try a task once before anything trains: every label, both modes, every size of batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poprisk._validate import check_callable, check_losses, check_separate, first_line, shapes_hint
from poprisk.evaluation import evaluating, outputs_of
from poprisk.losses import ignored_labels
from poprisk.randomness import RandomState
from poprisk.risk.local_losses import ignored_examples
from poprisk.task.batches import batch_sizes, split_batches

CHUNK = 1024
"""Examples per forward pass."""
TRIED = 4
"""Examples that a label is given to, to see whether it has a loss."""
LABELS = 64
"""Labels that are looked at so, the smallest ones and the largest."""


def try_task(task: Any, *, by_class: bool) -> None:
    """Evaluate, score and train a fresh model of a task once, and leave no trace.

    The loss is tried on every label of both sets; a training step on the largest and on the
    smallest batch of an epoch, and of an epoch without the fifth that early stopping holds out.

    Args:
        task: a :class:`poprisk.Task` whose data are checked.
        by_class: whether class scores are scored against labels.

    Raises:
        TypeError, ValueError: for what would go wrong later; the message names the part, what was
            found and what to do.
    """
    _check_callables(task)
    _check_clean(task)
    with RandomState.kept():
        model = task.new_model()
        _check_model(task, model)
        outputs, losses = zip(*(_evaluate(task, model, s) for s in ("train", "test")), strict=True)
        for name, u, ell in zip(("train", "test"), outputs, losses, strict=True):
            if by_class:
                _check_classes(task, name, u, ell)
                _check_scored(task, name, u)
            _check_metric(task, name, u)
        if by_class:
            _check_variety(task)
        _check_memorized(task, outputs[0])
        _try_training(task, model)


# --- the parts ------------------------------------------------------------------------------------


def _check_callables(task: Any) -> None:
    if isinstance(task.model, nn.Module):
        raise TypeError(
            f"model must be a function that returns a torch.nn.Module, but got a "
            f"{type(task.model).__name__}; pass what makes a new one, as in lambda: Net(64)."
        )
    check_callable("model", task.model)
    check_callable("loss", task.loss)
    if not callable(task.scored_by.function):
        raise TypeError(
            f"metric must hold a function of outputs and targets, but got "
            f"{task.scored_by.function!r}; pass Metric(name, function)."
        )


def _check_clean(task: Any) -> None:
    clean, targets = task.clean, task.train[1]
    if clean is None:
        return
    if clean.shape != targets.shape:
        raise ValueError(
            f"clean must have the shape of the training targets, {tuple(targets.shape)}, but got "
            f"{tuple(clean.shape)}."
        )
    if clean.is_floating_point() and not bool(clean.isfinite().all()):
        raise ValueError("clean holds NaN or Inf; leave it out if the clean targets are unknown.")


def _check_model(task: Any, model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        found = "all parameters are frozen" if [*model.parameters()] else "it has no parameters"
        raise ValueError(f"model has nothing to train: {found}.")
    mine = {id(p) for p in trained}
    if any(id(p) in mine for p in task.model().parameters()):
        raise ValueError(
            "model must return a new module at each call, but two of its modules share trainable "
            "parameters, so that one arm would go on from another's weights; build all of it "
            "inside the function, or copy.deepcopy what is shared."
        )
    loss = task.loss
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            "loss has trainable parameters, which no arm would train; put them into the model, or "
            "freeze them with loss.requires_grad_(False)."
        )


# --- evaluation -----------------------------------------------------------------------------------


def _evaluate(task: Any, model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Outputs and losses of all examples of a set, in evaluation mode."""
    x, y = getattr(task, name)
    outputs: list[Tensor] = []
    losses: list[Tensor] = []
    with evaluating(model, *_modules(task.loss)):
        for rows in split_batches(torch.arange(len(y)), getattr(x, "batch_size", CHUNK)):
            u = _outputs(model, x[rows], name, int(rows[0]))
            losses.append(_losses(task.loss, u, y[rows], name, int(rows[0])))
            outputs.append(u)
            if len(outputs) == 1:
                _check_separate(task.loss, u, y[rows])
    shapes = {tuple(u.shape[1:]) for u in outputs}
    if len(shapes) > 1:
        raise ValueError(
            f"model must give outputs of one shape per example, but on the {name} set it gave "
            f"{', '.join(map(str, sorted(shapes)))}."
        )
    return torch.cat(outputs), torch.cat(losses)


def _modules(loss: Any) -> list[nn.Module]:
    return [loss] if isinstance(loss, nn.Module) else []


def _outputs(model: nn.Module, x: Tensor, name: str, start: int) -> Tensor:
    """Outputs of a batch of a set that begins at ``start``; one example that fails is named."""
    try:
        u = outputs_of(model, x)
    except Exception as error:
        i, _ = _first_failing(lambda rows: outputs_of(model, x[rows]), len(x)) or (0, None)
        where = f"{name}[{start + i}]" if i else f"the {name} inputs"
        raise ValueError(
            f"model failed on {where}, {_type(x)} of shape {tuple(x.shape)}: {first_line(error)}"
            f"{_hint(error, model, x)}"
        ) from error
    return _check_outputs(u, len(x))


def _check_outputs(u: Any, n: int) -> Tensor:
    if not isinstance(u, Tensor):
        raise TypeError(
            f"model must return one tensor of outputs, but returned {type(u).__name__}; wrap it in "
            "a module that returns the outputs alone."
        )
    if u.ndim == 0 or len(u) != n:
        raise ValueError(
            f"model must give one row of outputs per example, ({n}, ...) for {n} examples, but "
            f"gave shape {tuple(u.shape)}."
        )
    return u


@torch.no_grad()
def _losses(loss: Any, u: Tensor, y: Tensor, name: str, start: int) -> Tensor:
    """Losses of a batch of a set that begins at ``start``; the example that fails is named."""
    try:
        losses = loss(u, y)
    except Exception as error:
        i, found = _first_failing(lambda rows: loss(u[rows], y[rows]), len(y)) or (0, error)
        where = f"{name}[{start + i}], target {_value(y[i])}"
        raise ValueError(f"loss failed on {where}: {first_line(found)}{_types(u, y)}") from error
    _check_losses(losses, u, y)
    bad = losses.isfinite().logical_not().nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"loss is {float(losses[i])} for {name}[{start + i}], target {_value(y[i])}, at the "
            "initial weights; mend that example, or bound the loss."
        )
    return losses


def _first_failing(call: Callable[[slice], Any], n: int) -> tuple[int, Exception] | None:
    """The first of n examples that fails on its own."""
    for i in range(n):
        try:
            call(slice(i, i + 1))
        except Exception as error:
            return i, error
    return None


def _check_losses(losses: Any, u: Tensor, y: Tensor) -> None:
    check_losses(losses, len(y), hint=shapes_hint(u, y))
    if not losses.is_floating_point():
        raise TypeError(f"loss must give floating-point numbers, but gave {losses.dtype}.")


@torch.no_grad()
def _check_separate(loss: Any, u: Tensor, y: Tensor) -> None:
    """Refuse a loss that compares the examples of a batch with each other."""
    first, again = loss(u, y), loss(u, y)
    if torch.equal(first, again):  # else it draws random numbers, and its halves tell nothing
        check_separate(loss, u, y, first)


def _types(u: Tensor, y: Tensor) -> str:
    """The types at work, where they may be the reason."""
    if y.dtype in (u.dtype, torch.int64):
        return ""
    return f" (outputs are {_type(u)}, targets {_type(y)}: convert them where the task is made)"


# --- scores ---------------------------------------------------------------------------------------


def _check_classes(task: Any, name: str, u: Tensor, losses: Tensor) -> None:
    """A column of outputs stands for a class: there are several, and each label is one."""
    y = getattr(task, name)[1]
    if u.ndim < 2 or u[:, 0].shape != y.shape:
        return  # the metric says so itself
    classes = u.shape[1]
    if classes == 1:
        raise ValueError(
            f"{task.scored_by.name} compares columns of outputs, but model gives one column only; "
            "give a column per class, or another metric=Metric(...)."
        )
    _check_range(task, name, y, classes, losses)
    if name == "train" and task.clean is not None:
        _check_range(task, "clean", task.clean, classes, None)


def _check_range(task: Any, name: str, y: Tensor, classes: int, losses: Tensor | None) -> None:
    outside = ((y < 0) | (y >= classes)) & ~ignored_labels(task.loss, y)
    if losses is not None:
        # What costs nothing is left out by the loss in a way of its own.
        outside &= (losses != 0).reshape(-1, *[1] * (y.ndim - 1))
    found = outside.nonzero()
    if len(found):
        where = ", ".join(str(int(i)) for i in found[0])
        label = _value(y[tuple(found[0])])
        raise ValueError(
            f"{name}[{where}] has label {label}, but model gives {classes} classes, 0 to "
            f"{classes - 1}; mend the label, or give model a column for it."
        )


def _check_scored(task: Any, name: str, u: Tensor) -> None:
    """Refuse a class that the loss leaves out and the metric would count."""
    y = getattr(task, name)[1]
    if u.ndim < 2 or u[:, 0].shape != y.shape:
        return
    labels = y[(y >= 0) & (y < u.shape[1])].unique()
    for label in labels[: LABELS - 1].tolist() + labels[-1:].tolist():
        some = torch.full_like(y[:TRIED], label)
        if bool(ignored_examples(task.loss, u[:TRIED], some).all()):
            count = int((y == label).sum())
            raise ValueError(
                f"loss is zero for label {label} whatever the outputs (an ignore_index, or a "
                f"weight of zero), but {task.scored_by.name} would count the {count} of them in "
                f"{name}; set them to -100 and ignore_index with them, or give a "
                "metric=Metric(...) that leaves them out."
            )


def _check_variety(task: Any) -> None:
    y = task.train[1]
    found = y[~ignored_labels(task.loss, y)].unique()
    if len(found) < 2:
        label = _value(found[0]) if len(found) else "one that is ignored"
        raise ValueError(
            f"train targets are all {label}: with one class there is nothing to learn; check how "
            "the labels are read."
        )


def _check_metric(task: Any, name: str, u: Tensor) -> None:
    metric, y = task.scored_by, getattr(task, name)[1]
    value = _scored(metric, name, u, y)
    if u.shape != y.shape and u.squeeze().shape == y.squeeze().shape:
        try:
            apart = _scored(metric, name, u.reshape(y.shape), y)
        except ValueError:
            return  # it minds the shapes
        if not math.isclose(value, apart, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError(
                f"metric {metric.name!r} gives {value:.4g} for outputs {tuple(u.shape)} and "
                f"targets {tuple(y.shape)}, but {apart:.4g} once they have one shape: it compares "
                "all with all; bring them to one shape first."
            )


def _scored(metric: Any, name: str, u: Tensor, y: Tensor) -> float:
    try:
        value = metric.function(u, y)
    except Exception as error:
        raise ValueError(
            f"metric {metric.name!r} failed on the {name} set: {first_line(error)}"
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"metric {metric.name!r} must give one number, but gave {found} on the {name} set."
        ) from None


def _check_memorized(task: Any, u: Tensor) -> None:
    try:
        task.memorized(u)
    except Exception as error:
        raise ValueError(
            f"clean was given, but memorization cannot be measured: {first_line(error)} Leave "
            "clean out, or give outputs the shape of the targets."
        ) from error


# --- training -------------------------------------------------------------------------------------


def _try_training(task: Any, model: nn.Module) -> None:
    """A forward and a backward pass in training mode on each size of batch that matters."""
    n, b = len(task.train[1]), task.batch_size
    kept = n - n // 5
    last = task.drop_last
    sizes = {*batch_sizes(n, b, drop_last=last), *batch_sizes(kept, min(b, kept), drop_last=last)}
    model.train()
    with evaluating(*_modules(task.loss)):
        constant = [_try_batch(task, model, size) for size in sorted(sizes, reverse=True)]
    if all(constant):
        raise ValueError(
            "loss has derivative zero in all outputs, though it is not zero: it is constant in "
            "them (rounded, or an argmax?); give a loss that training can follow."
        )


def _try_batch(task: Any, model: nn.Module, size: int) -> bool:
    """Whether the derivative in the outputs is zero in all a batch, and the loss is not."""
    x, y = (part[:size] for part in task.train)
    n, b = len(task.train[1]), task.batch_size
    where = f"on a batch of {size} in training mode ({n} examples, batch_size={b})"
    model.zero_grad()
    try:
        u = model(x)
    except Exception as error:
        hint = _hint(error, model, x)
        raise ValueError(f"model failed {where}: {first_line(error)}{hint}") from error
    _check_outputs(u, size)
    with _said(f"loss failed {where}", _types(u.detach(), y)):
        losses = task.loss(u, y)
    _check_losses(losses, u, y)
    if not (losses.requires_grad and u.requires_grad):
        raise ValueError(
            "loss cannot be differentiated in the parameters: its value has no gradient; keep to "
            "differentiable operations from weights to loss (no argmax, .detach() or numpy)."
        )
    u.retain_grad()
    with _said(f"the backward pass failed {where}", _types(u.detach(), y)):
        losses.mean().backward()
    if not bool(losses.isfinite().all()):
        raise ValueError(f"loss is not finite {where}, at the initial weights.")
    _check_gradients(model, where)
    passed_on = u.grad is not None and bool((u.grad != 0).any())
    return not passed_on and bool((losses != 0).any())


def _check_gradients(model: nn.Module, where: str) -> None:
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not named:
        raise ValueError(
            "no parameter of model gets a gradient from the loss: the outputs do not depend on "
            "them."
        )
    for name, grad in named:
        if grad.layout is not torch.strided:
            raise ValueError(
                f"model gives a sparse gradient for {name}, which neither AdamW nor the gate "
                "takes; build the embedding with sparse=False."
            )
        if not bool(grad.isfinite().all()):
            raise ValueError(
                f"the gradient of {name} holds NaN or Inf {where}, at the initial weights."
            )


@contextlib.contextmanager
def _said(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}{hint}") from error


# --- words ----------------------------------------------------------------------------------------


def _value(y: Tensor) -> str:
    """A target as a message shows it."""
    return str(y.tolist()) if y.numel() <= 4 else f"of shape {tuple(y.shape)}"


def _type(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _hint(error: Exception, model: nn.Module, x: Tensor) -> str:
    """What to do about inputs of another type than the weights."""
    types: Sequence[torch.dtype] = sorted({p.dtype for p in model.parameters()}, key=str)
    if "type" not in str(error) or len(types) != 1 or x.dtype == types[0]:
        return ""
    name = str(types[0]).removeprefix("torch.")
    return f" (the weights are {name}, the inputs {_type(x)}: convert them where the task is made)"
