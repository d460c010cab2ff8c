"""What the risk estimators ask of losses, data and loops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from poprisk._validate.examples import check_no_batch_statistics


def check_losses(losses: Any, outputs: Tensor) -> Tensor:
    """Return ``losses`` if they are one value an example of ``outputs`` (n, ...), differentiable.

    Raises:
        ValueError: if not; a loss that is already a mean is the usual case.
    """
    n = len(outputs)
    found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        raise ValueError(
            f"loss must give one value per example, shape ({n},) for {n} examples, but gave "
            f"{found}; pass reduction='none', average over all dimensions but the first, and take "
            "the mean over examples yourself."
        )
    if outputs.requires_grad and not losses.requires_grad:
        raise ValueError("loss must be differentiable in the outputs, but its value is constant.")
    return losses


def check_coupling(outputs: int, limit: int) -> None:
    """Raise ValueError if a loss couples more outputs than its second derivative may have."""
    if outputs > limit:
        raise ValueError(
            f"loss couples all {outputs} outputs of an example in a way that is not softmax; that "
            f"is supported up to {limit} outputs. For sequences, let each token be an example: "
            "outputs (tokens, classes) and an index per token."
        )


def check_index(index: Any, dataset_size: int) -> Tensor:
    """Return ``index`` as integer positions in a data set of ``dataset_size`` examples.

    Raises:
        TypeError: if it is not a tensor or sequence of integers.
        ValueError: if one lies outside.
    """
    found = index if isinstance(index, Tensor) else _as_tensor(index)
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


def check_some(name: str, examples: int) -> None:
    """Raise ValueError for a batch or a data set without examples."""
    if examples == 0:
        raise ValueError(f"{name} must hold at least one example, but it is empty; leave it out.")


def _as_tensor(index: Any) -> Tensor:
    try:
        return torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"index must be a tensor of integers, but got {type(index).__name__}."
        ) from None


def check_dataset_size(size: Any) -> int:
    """Return the number of training examples, given as such, as a data set or as its loader.

    Raises:
        TypeError: if its length is unknown.
    """
    if isinstance(size, DataLoader):  # its own length counts batches
        size = size.dataset
    if isinstance(size, Sized) and not isinstance(size, (str, bytes)):
        size = len(size)
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise TypeError(
            f"dataset_size must be the number of training examples (or a data set with a length), "
            f"but got {size!r}; a twin perturbs the label of every example the same way each time "
            "it is seen. For a stream that is seen once, use poprisk.fresh_batch_risk."
        )
    return size


def check_tilt_shape(shape: tuple[int, ...], outputs: Tensor, index: Tensor | None) -> None:
    """Raise ValueError unless outputs are one row an example of the batch, of one shape always."""
    if index is None:
        raise ValueError("run.loss was called outside of `for run in twin.runs(index)`.")
    if len(outputs) != len(index):
        raise ValueError(
            f"outputs hold {len(outputs)} examples, but index has {len(index)}; pass the "
            "positions of exactly this batch's examples to twin.runs(index)."
        )
    if tuple(outputs.shape[1:]) != shape:
        raise ValueError(
            f"outputs must keep their shape from batch to batch, {shape} per example, but got "
            f"{tuple(outputs.shape[1:])}; pad them, or let each token be an example."
        )


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


def check_groups(groups: Any, n: int) -> Tensor:
    """Return group ids as integers 0..G-1, one an example, with G ≥ 2.

    Raises:
        ValueError: if the shape does not fit or there is one group only.
    """
    if not isinstance(groups, Tensor) or groups.shape != (n,):
        found = tuple(groups.shape) if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"groups must be a tensor of one id an example, ({n},), but got {found}.")
    ids = torch.unique(groups.cpu(), return_inverse=True)[1]
    if int(ids.max()) < 1:
        raise ValueError("groups must hold at least two different ids to give a standard error.")
    return ids


PART_EXAMPLES = 10
"""Examples from which a response of their own can be told."""


def check_parts(parts: Any, n: int) -> Tensor:
    """Return ids of parts as integers 0..K-1, one an example, with enough examples in each.

    Raises:
        ValueError: if the shape does not fit, or a part is too small.
    """
    if not isinstance(parts, Tensor) or parts.shape != (n,):
        found = tuple(parts.shape) if isinstance(parts, Tensor) else type(parts).__name__
        raise ValueError(f"parts must be a tensor of one id an example, ({n},), but got {found}.")
    ids, counts = torch.unique(parts.cpu(), return_inverse=True, return_counts=True)[1:]
    if int(counts.min()) < PART_EXAMPLES:
        raise ValueError(
            f"parts must have at least {PART_EXAMPLES} examples each to measure a response, but "
            f"one has {int(counts.min())}; merge small ones."
        )
    return ids


NOT_REPEATED = (
    "the twin's outputs differ from the model's at the first step although their weights are the "
    "same: the model or the batch is random in a way that runs() cannot repeat. Use torch's, "
    "numpy's or Python's global generator inside the loop, and draw the batch before it."
)


def check_calls(mine: int, twins: int) -> None:
    """Raise ValueError unless the model and its twin were called equally often in one step."""
    if mine != twins:
        raise ValueError(
            f"at one step the model was called {mine} times and its twin {twins} times; do the "
            "same with every run of `for run in twin.runs(index)`."
        )


def check_factories(make_model: Any, make_optimizer: Any, loss: Any) -> None:
    """Raise TypeError unless model and optimizer come from functions and the loss is one."""
    if isinstance(make_model, torch.nn.Module):
        raise TypeError(
            "make_model must be a function that returns a module, but got a "
            f"{type(make_model).__name__}; pass lambda: model to train that very one."
        )
    if isinstance(make_optimizer, torch.optim.Optimizer):
        raise TypeError(
            "make_optimizer must be a function from a model to an optimizer, but got a "
            f"{type(make_optimizer).__name__}; each twin needs its own."
        )
    pairs = (("make_model", make_model), ("make_optimizer", make_optimizer), ("loss", loss))
    for name, value in pairs:
        if not callable(value):
            raise TypeError(f"{name} must be callable, but got {value!r}.")


def check_own_optimizers(pairs: Sequence[tuple[torch.nn.Module, Any]]) -> None:
    """Raise ValueError unless each model has an optimizer of its own, of its own parameters."""
    for i, (model, optimizer) in enumerate(pairs):
        mine = {id(p) for p in model.parameters()}
        groups = getattr(optimizer, "param_groups", [])
        trained = [p for group in groups for p in group["params"]]
        other = any(optimizer is another for _, another in pairs[:i])
        if other or (trained and not any(id(p) in mine for p in trained)):
            raise ValueError(
                "make_optimizer must return a new optimizer of the model it is given, but the one "
                f"for {f'twin {i}' if i else 'the model'} is "
                f"{'the same as another' if other else 'of other parameters'}; build it inside the "
                "function, as in lambda model: AdamW(model.parameters())."
            )


def check_scored(times: int) -> None:
    """Raise ValueError if a twin's loss was not asked for in a step."""
    if not times:
        raise ValueError(
            "run.loss was not called for a twin within `for run in twin.runs(index)`, so that it "
            "learns the labels unperturbed: in place of the loss itself call "
            "run.loss(run.model(x), y), for the model and its twins alike."
        )


def other_rates(first: Any, *others: Any) -> str:
    """A doubt if learning rates of a twin are not the model's."""

    def rates(optimizer: Any) -> list[float]:
        return [float(g["lr"]) for g in getattr(optimizer, "param_groups", []) if "lr" in g]

    for other in others:
        for mine, its in zip(rates(first), rates(other), strict=False):
            if not math.isclose(mine, its, rel_tol=1e-6):
                return (
                    f"the twin trained at a learning rate of {its:.3g}, the model at {mine:.3g}: "
                    "give each run a scheduler of its own, and step them alike"
                )
    return ""


def check_module(model: Any) -> torch.nn.Module:
    """Return ``model`` if it is a module, else raise TypeError."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"make_model must return a module, but returned {type(model).__name__}.")
    return model


def check_no_later_hooks(name: str, parameter: Tensor) -> None:
    """Raise ValueError for a hook that runs after a gradient is there, such as a step of its own.

    It may hold an optimizer, which is that of one model, and is not that of its twin.
    """
    if parameter._post_accumulate_grad_hooks:
        raise ValueError(
            f"{name} has a post-accumulate-grad hook when make_model returns, and a twin needs one "
            "of its own; register it in make_optimizer, which is called for each model."
        )


def check_not_nested(busy: bool) -> None:
    """Raise RuntimeError if a loop over ``runs`` was left before its twins had their turn."""
    if busy:
        raise RuntimeError(
            "the loop over twin.runs(index) was left before every twin had its turn (a break, an "
            "exception, or a nested call); the runs are no longer in lockstep: start anew, or load "
            "a checkpoint."
        )


def check_scale(scale: float) -> float:
    """Return the size of the output gradient if a perturbation can be measured by it."""
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"the loss has an output gradient of size {scale} on the first batch, which gives no "
            "scale for the perturbation; check labels and outputs for NaN, or for a loss that is 0 "
            "(are all labels of the batch ignored?)."
        )
    return scale


def check_twin_state(state_dict: Any, models: list[Any], settings: dict[str, Any]) -> None:
    """Raise unless ``state_dict`` is one of a twin with the same replicas and settings.

    Args:
        state_dict: to load.
        models: state dicts of the replicas it is to be loaded into.
        settings: of the twin; a state of an earlier version has none.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it does not fit.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, but got {type(state_dict).__name__}.")
    found = len(state_dict["models"]) if "models" in state_dict else 0
    if found != len(models):
        raise ValueError(
            f"state_dict does not fit: it holds {found} models, this one {len(models)} (probes + "
            "1)."
        )
    missing = {"optimizers", "steps", "scale", "shape", "doubt"} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict is not a twin's: it has no {sorted(missing)}.")
    for name, value in state_dict.get("settings", {}).items():
        if name in settings and settings[name] != value:
            raise ValueError(
                f"state_dict was saved with {name}={value!r}, but this twin has "
                f"{settings[name]!r}; the estimates depend on it: use the same settings."
            )
    for mine, theirs in zip(models, state_dict["models"], strict=True):
        check_same_shapes(mine, theirs)


def check_same_shapes(mine: Any, theirs: Any) -> None:
    """Raise ValueError unless two state dicts of a model have the same tensors."""
    for name in {**mine, **theirs}:
        found, needed = (_shape(state.get(name)) for state in (theirs, mine))
        if found != needed:
            raise ValueError(
                f"state_dict is of another model: {name} is {found} there and {needed} here."
            )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_same_loss(loss: Any, sample: Any) -> None:
    """Raise ValueError unless a loss gives what it gave on a sample of examples.

    Args:
        loss: one value an example.
        sample: outputs, targets and losses of a few examples, or None.
    """
    if sample is None:
        return
    outputs, targets, losses = sample
    try:
        found = loss(outputs, targets)
    except Exception as error:
        raise ValueError(
            f"state_dict was saved with another loss: this one fails on its examples ({error})."
        ) from error
    same = isinstance(found, Tensor) and found.shape == losses.shape
    if not same or not found.detach().allclose(losses, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            "state_dict was saved with another loss: this one gives other values on its examples; "
            "the estimates depend on it."
        )


def check_defined_around(loss: Any, outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError if a loss fails a step away from the outputs of a model.

    Leave-one-out outputs lie anywhere around a model's own; a loss of probabilities does not.
    """
    for step in (-1.0, 1.0):
        moved = outputs + step * (1 + outputs.abs())
        try:
            good = bool(loss(moved, targets).detach().isfinite().all())
        except (RuntimeError, ValueError, AssertionError) as error:
            good, why = False, f"raises {type(error).__name__}"
        else:
            why = "is not finite"
        if not good:
            raise ValueError(
                f"loss must be defined for any outputs, but {why} at some that lie a step beyond "
                "the model's; if these are probabilities, let the model put out logits and use "
                "binary_cross_entropy_with_logits or cross_entropy."
            )


SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def check_not_sharded(name: str, model: torch.nn.Module) -> None:
    """Raise ValueError if a model's parameters are sharded over processes."""
    kinds = {kind.__name__ for m in model.modules() for kind in type(m).__mro__}
    if kinds & set(SHARDED) or any(hasattr(p, "to_local") for p in model.parameters()):
        raise ValueError(
            f"{name} does not take models whose parameters are sharded (FSDP, DTensor), which "
            "cannot be copied; use DistributedDataParallel, or measure on one process."
        )


def check_not_parallel(name: str, model: torch.nn.Module) -> None:
    """Raise ValueError if a model's gradients are those of several processes."""
    check_not_sharded(name, model)
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    if any(isinstance(m, parallel) for m in model.modules()):
        raise ValueError(
            f"{name} takes this process's batch only, but the step of a {type(model).__name__} is "
            "made of all processes' batches; gather the batch and pass model.module with an "
            "optimizer of its parameters, on one process."
        )


def check_estimates(estimates: Any, kind: type) -> None:
    """Raise unless there are estimates, all of equally many examples.

    Raises:
        TypeError: if one is of another kind, such as its value alone.
        ValueError: if there is none, or they are not of the same examples.
    """
    single = isinstance(estimates, (kind, str)) or not isinstance(estimates, Iterable)
    found: list[Any] = [estimates] if single else list(estimates)
    wrong = next((e for e in found if not isinstance(e, kind)), estimates if single else None)
    if wrong is not None:
        raise TypeError(
            f"estimates must be a sequence of what twin.estimate(x, y) returned ({kind.__name__}), "
            f"but got {type(wrong).__name__}: their values alone have no errors to compare."
        )
    if not found:
        raise ValueError("there is no estimate to choose from; call twin.estimate(x, y) first.")
    lengths = [len(e.losses) for e in found]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"estimates must be of the same training examples, but they are of {min(lengths)} to "
            f"{max(lengths)}; pass the same x and y each time."
        )


def check_arms(arms: Any) -> None:
    """Raise unless arms are named.

    Raises:
        TypeError: if they are no mapping.
        ValueError: if there is none.
    """
    if not isinstance(arms, Mapping):
        raise TypeError(
            f"arms must be a dict from names to estimates, but got {type(arms).__name__}."
        )
    if not arms:
        raise ValueError("there is no estimate to choose from; call twin.estimate(x, y) first.")


def check_labels(targets: Any) -> Tensor:
    """Return targets if some of them can be replaced by others.

    Raises:
        TypeError: if they are not a tensor of numbers or of one class an example.
        ValueError: if they are classes in floating point, of which noise would make no labels.
    """
    if not isinstance(targets, Tensor) or targets.is_complex() or targets.ndim == 0:
        raise TypeError(f"targets must be a tensor of labels, but got {type(targets).__name__}.")
    if not targets.is_floating_point() and targets.ndim != 1:
        raise TypeError(
            f"class targets must have shape (n,), but got {tuple(targets.shape)}; flatten tokens."
        )
    if targets.is_floating_point():
        known = targets[~targets.isnan()]
        found = known.unique() if len(known) else known
        if 0 < len(found) <= 2:
            values = " and ".join(f"{v:g}" for v in found.tolist())
            raise ValueError(
                f"targets hold only {values} as {targets.dtype}: class labels, which noise cannot "
                "be added to; pass integer classes 0..classes-1 (n,): targets.long() for zeros and "
                "ones, (targets > 0).long() for signs, or targets.argmax(1) for one-hot rows."
            )
        if _are_distributions(targets):
            raise ValueError(
                f"targets {tuple(targets.shape)} are probabilities (no row has a negative entry, "
                "all sum to one), which they would not be with noise added; pass integer classes "
                "(n,): targets.argmax(1)."
            )
    return targets


def _are_distributions(targets: Tensor) -> bool:
    """Whether every row of (n, c) that is not missing sums to one, c > 1, nothing being below 0."""
    if targets.ndim != 2 or targets.shape[1] < 2:
        return False
    rows = targets[~targets.isnan().any(1)].double()
    sums = rows.sum(1)
    return len(rows) > 0 and bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())


def check_canaries(labels: int, fraction: float) -> int:
    """Return how many of the labels become canaries.

    Raises:
        ValueError: if no label, or every label, would be replaced.
    """
    count = round(fraction * labels)
    if not 1 <= count < labels:
        raise ValueError(
            f"fraction={fraction} of {labels} labels makes {count} canaries; choose one that "
            "makes at least one and leaves some labels as they are."
        )
    return count


def check_classes(targets: Tensor, classes: int | None, dtype: torch.dtype) -> int:
    """Return the number of classes, counted if not given; at least two, and all labels below it.

    Args:
        targets: labels, (n,), 64 bits.
        classes: given number of them.
        dtype: of the labels as they came, which has to hold the last class.
    """
    found = int(targets.max()) + 1
    if classes is None and dtype != torch.bool and int(targets.min()) >= 0:
        absent = found - len(targets.unique())
        if absent:
            raise ValueError(
                f"{absent} of the labels 0..{found - 1} never occur, so the number of classes "
                f"cannot be counted; pass classes={found} if there are so many, "
                f"ignore_index={found - 1} if that one stands for no label, and begin with 0."
            )
    classes = max(found, 2) if classes is None and dtype == torch.bool else classes
    classes = found if classes is None else classes
    if classes < max(found, 2) or int(targets.min()) < 0:
        raise ValueError(
            f"labels must lie in 0..classes-1 with at least two classes, but got "
            f"{int(targets.min())}..{found - 1} and classes={classes}."
        )
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if classes - 1 > largest:
        raise ValueError(f"classes={classes} do not fit into labels of {dtype}; widen them.")
    return classes


def check_bound(classes: int | None, outputs: Tensor, n: int) -> int:
    """Return the number of classes if the bound applies to these outputs."""
    if classes is None:
        raise ValueError(
            "the bound is for classes, but the targets are numbers; use memorization()."
        )
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(
            f"outputs must be those of the whole training set, ({n}, {classes}), but got "
            f"{tuple(outputs.shape)}."
        )
    return classes


def check_canary_outputs(found: int, canaries: int, n: int) -> None:
    """Raise ValueError unless outputs are of the canaries or of the whole training set."""
    if found not in (canaries, n):
        raise ValueError(
            f"outputs must be those of the {canaries} canaries (in the order of .index) or of all "
            f"{n} training examples, but got {found} rows."
        )


def check_logits(outputs: Tensor, classes: int) -> Tensor:
    """Return outputs (m, classes) if they are logits; probabilities would be taken for these."""
    shape = tuple(outputs.shape)
    if outputs.ndim != 2 or shape[1] != classes:
        raise ValueError(f"outputs must be logits of shape (m, {classes}), but got {shape}.")
    sums = outputs.double().sum(1)
    if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise ValueError(
            "outputs must be logits, but got probabilities: each row is not negative and sums to "
            "1; pass their logarithms."
        )
    return outputs


def check_fresh(model: torch.nn.Module, b: int, fresh: Any, groups: Any) -> None:
    """Raise unless a batch of b can be cut into parts; see ``fresh_batch_risk``."""
    if not isinstance(fresh, bool):
        raise TypeError(f"fresh must be True or False, but got {fresh!r}.")
    if isinstance(groups, bool) or not isinstance(groups, int) or not 2 <= groups <= b:
        raise ValueError(
            f"groups must be an integer from 2 to the batch's {b} examples, but got {groups!r}."
        )
    check_no_batch_statistics(model)


def check_some_loss(counted: int) -> None:
    """Raise ValueError if no example of a batch has a loss."""
    if not counted:
        raise ValueError(
            "no example of the batch has a loss: all labels are ignored, masked or of weight zero."
        )


def check_transformable(problem: Any, w: Tensor) -> None:
    """Raise ValueError if a model's outputs have no derivative along the weights by torch.func.

    Args:
        problem: of a recorded run.
        w: flat weights, (P,).
    """
    try:
        problem.jvp(w, problem.train[0][:1], torch.zeros_like(w).unsqueeze(1))
    except RuntimeError as error:
        raise ValueError(
            f"the model's outputs cannot be differentiated along its weights ({error}): a forward "
            "pass that calls torch.autograd.grad cannot be followed, one with torch.func.grad can."
        ) from error


def check_record_of_twin(now: list[Tensor], recorded: Tensor, twin_steps: int, steps: int) -> None:
    """Raise ValueError unless a run ends with the weights that the twin's model has now."""
    if not now or not torch.equal(torch.cat(now), recorded):
        raise ValueError(
            f"the run ({steps} steps) does not end with the weights of the twin's model (after "
            f"{twin_steps} batches): wrap the whole loop in Recorder(twin.model, loss, "
            "twin.optimizer, train=(x, y)), and call this before either is trained on."
        )


def check_subset(
    subset: Any, n: int, group_ids: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Return the examples to delete: ``subset`` of them at random, or all.

    Raises:
        ValueError: if there are not so many, or groups are given too.
    """
    if subset is None:
        return torch.arange(n)
    if isinstance(subset, bool) or not isinstance(subset, int) or not 2 <= subset <= n:
        raise ValueError(f"subset must be an integer from 2 to {n} or None, but got {subset!r}.")
    if group_ids is not None:
        raise ValueError("subset and group_ids cannot be combined; delete all groups.")
    return torch.randperm(n, generator=generator)[:subset].sort().values
