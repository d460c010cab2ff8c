"""Try once, on a few examples and before anything moves, all that recording and analysing takes.

The theory needs outputs that are a function of the recorded weights, one row per example, and a
loss with two derivatives. Whatever is not so is refused here, by name, and not after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from poprisk import losses
from poprisk._validate import NotAnalysable, check_separate, first_line
from poprisk.dtensor import is_sharded
from poprisk.evaluation import evaluating, outputs_of
from poprisk.forward_mode import plain_kernels
from poprisk.jacobian import flat
from poprisk.path.checks import named
from poprisk.path.problem import Problem, digest_of, private_copy
from poprisk.path.surroundings import changed, numbers_in, places_in, state_of
from poprisk.protocols import PerExampleLoss

EXAMPLES = 8
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative difference of outputs that rounding may make, by their dtype."""


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of the model that the optimizer trains, by name.

    Raises:
        NotAnalysable: if it trains others, or :func:`check_model` refuses them.
    """
    trained = {p for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    own = {n: p for n, p in model.named_parameters() if p in trained}
    if foreign := len(trained) - len(own):
        raise NotAnalysable(
            f"the optimizer trains {foreign} tensors that are no parameters of the model; pass "
            "the module that holds all of them."
        )
    check_model(model, own)
    return own


def check_model(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Refuse a model whose weights and gradients cannot be read as they are."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
    found = [type(m).__name__ for m in model.modules() if type(m).__name__ in wrappers]
    if found:
        raise NotAnalysable(
            f"the model is wrapped in {found[0]}, but recording needs the whole model in one "
            "process. Under DistributedDataParallel pass the module inside (model.module), and to "
            "recorder.step() the examples of all processes."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if sharded := [n for n, t in tensors.items() if is_sharded(t)]:
        raise NotAnalysable(
            f"parameters are spread over processes as DTensors (FSDP2?): {named(sharded)}; "
            "recording needs the whole model in one process."
        )
    lazy = [n for n, t in tensors.items() if nn.parameter.is_lazy(t)]
    if inference := [n for n, t in tensors.items() if n not in lazy and t.is_inference()]:
        raise NotAnalysable(
            f"the model was made under torch.inference_mode(): {named(inference)}; make it "
            "outside, for such tensors cannot be trained."
        )
    if lazy:
        raise NotAnalysable(
            f"parameters have no shape yet: {named(lazy)}; call the model once on a batch, make "
            "the optimizer, and record then."
        )
    _check_weights(list(trained.values()))
    check_unhooked(trained)
    if torch.is_autocast_enabled(next(iter(trained.values())).device.type):
        raise NotAnalysable(
            "torch.autocast is on, whose rounding hides what single steps do; record outside of "
            "it, in float32 or float64."
        )


def _check_weights(parameters: list[Tensor]) -> None:
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


def check_unhooked(trained: Mapping[str, Tensor]) -> None:
    """Raise NotAnalysable if hooks stand between the loss and the gradients of parameters."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if hooked := [n for n, p in trained.items() if any(getattr(p, h, None) for h in hooks)]:
        raise NotAnalysable(
            f"hooks are registered on gradients of {named(hooked)} (a mask, clipping, a step in "
            "the backward pass?), which the Jacobian does not see; remove them, and freeze with "
            "requires_grad_(False)."
        )


def tried_problem(
    model: nn.Module,
    loss: PerExampleLoss,
    names: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor | None],
) -> tuple[Problem, frozenset[str]]:
    """What is recorded, and the state of the model that may change on the way.

    All that recording and analysing takes is tried once, on a private copy; random numbers are
    afterwards as they were.
    """
    copied = private_copy(model)
    (x, y), (points, labels) = (_trainable(*train), _trainable(*query))
    with evaluating(copied, eval_mode=False):
        some = slice(EXAMPLES)
        u, free = _try_outputs(copied, x[some], x[-EXAMPLES:])
        _try_loss(loss, u, y[some], y)
        digest = digest_of(x, y, points, labels)
        shape = tuple(u.shape[1:])
        written = tuple(name for name, _ in copied.named_buffers() if name in free)
        data = (x, y), (points, labels)
        problem = Problem(copied, loss, *data, names, shape, digest, written)
        _try_weights(problem, x[some])
        _try_query(problem)
    return problem, free


def _trainable(*tensors: Tensor | None) -> tuple[Any, Any]:
    """Tensors that autograd may save; those of inference mode are copied."""
    first, second = (t.clone() if t is not None and t.is_inference() else t for t in tensors)
    return first, second


def _try_outputs(model: nn.Module, x: Tensor, others: Tensor) -> tuple[Tensor, frozenset[str]]:
    """Outputs of a few examples, and the state that the model writes to but does not read.

    Args:
        model: the private copy; left as it was.
        x: examples, (b, ...).
        others: more of them, for state that follows the data.

    Raises:
        NotAnalysable: unless outputs are one row per example and depend on nothing else.
    """
    weights: dict[str, Any] = dict(model.named_parameters())
    before = numbers_in(weights)
    with evaluating(model, eval_mode=False):
        kept = state_of(model)
        whole = _outputs(model, x)
        _check_rows(whole, len(x))
        after_one = state_of(model)
        again, part = _outputs(model, x), _outputs(model, x[: (len(x) + 1) // 2])
        _outputs(model, others)
        always = changed(after_one, state_of(model))
        written = changed(kept, state_of(model))
        if moved := changed(before, numbers_in(weights)) or _renormalized(model):
            raise NotAnalysable(
                f"the forward pass writes to parameters, {named(moved)} "
                "(nn.Embedding(max_norm=...), or an initialization by the first batch?), so they "
                "move outside of the optimizer; leave max_norm out, or call the model once before "
                "recording."
            )
        if not _close(again, whole):
            raise NotAnalysable(
                f"the model gives other outputs when the same inputs are repeated, for its forward "
                f"pass writes to what it reads, {named(always)}, so its path is no function of the "
                "weights; record in model.eval(), or keep that state fixed."
                if always
                else "the model gives other outputs when the same inputs are repeated (dropout?), "
                "so its path is no function of the weights; set dropout to 0 or record in "
                "model.eval()."
            )
        if part.shape[1:] != whole.shape[1:] or len(part) != (len(x) + 1) // 2:
            raise NotAnalysable(
                "the shape of outputs depends on the number of examples: the model must return one "
                "tensor with a row per example, examples first."
            )
        if not _close(part, whole[: len(part)]):
            raise NotAnalysable(
                "outputs depend on the other examples of the batch (batch norm in training mode?); "
                "record in model.eval(), or use group or layer norm."
            )
        read = [name for name in written if not _ignores(model, name, x, whole)]
        if often := [name for name in read if name in always]:
            raise NotAnalysable(
                f"the forward pass writes to {named(often)}, which outputs depend on, so the path "
                "is no function of the weights; record in model.eval(), or keep that state fixed."
            )
        if read:
            raise NotAnalysable(
                f"the first forward pass writes to {named(read)}, which outputs depend on; call "
                "the model once on a batch before recording."
            )
    return whole, frozenset(written)


def _try_loss(loss: PerExampleLoss, u: Tensor, y: Tensor, targets: Tensor) -> None:
    """Evaluate a loss with its two derivatives on a few outputs, and on all targets once.

    Args:
        loss: per example.
        u: outputs of a few examples, (b, ...).
        y: their targets.
        targets: of all examples.

    Raises:
        ValueError: unless it gives one value per example, of that example alone.
        NotAnalysable: if a derivative is missing, or it does not take the targets.
    """
    rows = torch.arange(len(targets), device=u.device) % len(u)
    try:
        with torch.enable_grad():
            found = losses.values(loss, u.detach().requires_grad_(), y)
        with torch.no_grad():
            losses.values(loss, u[rows], targets)
    except (RuntimeError, IndexError) as error:
        raise NotAnalysable(
            f"loss fails on the targets of the training set ({first_line(error)}); check their "
            "range and dtype."
        ) from error
    check_separate(loss, u, y, found)
    if not found.requires_grad:
        raise NotAnalysable(
            "loss must be differentiable in the outputs, but its value is constant (argmax, "
            "detach() or numpy inside?)."
        )
    ones = torch.ones(*u.flatten(1).shape, 1, dtype=u.dtype, device=u.device)
    try:
        losses.hessian_product(loss, u, y, ones)
    except (RuntimeError, NotImplementedError) as error:
        raise NotAnalysable(
            f"loss has no second derivative ({first_line(error)}), which the path of the output "
            "gradient needs; write it with elementary operations of torch."
        ) from error


def _try_weights(problem: Problem, x: Tensor) -> None:
    """See that outputs follow the flat weights, and have a derivative by them.

    Raises:
        NotAnalysable: if not.
    """
    other, model = problem.J.elsewhere, private_copy(problem.model)
    params = [p for name, p in model.named_parameters() if name in problem.names]
    with torch.no_grad():
        for p, w in zip(params, problem.J.named(other).values(), strict=True):
            p.copy_(w)
    with evaluating(model, eval_mode=False), plain_kernels(model):
        expected = _outputs(model, x)
        u = model(x)
        inside = _reentrant(u)
        if not u.requires_grad:
            raise _no_reverse_mode("they do not depend on them", inside)
        u.sum().backward()
        slope = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    with evaluating(problem.model, eval_mode=False):
        u = problem.J.values(other, x)
        if not _close(u, expected.reshape_as(u)):
            raise NotAnalysable(
                "the model gives other outputs when torch.func.functional_call puts the same "
                "weights into it: it reads them from elsewhere than its parameters (a list, a "
                "cache?)."
            )
        try:
            u, pull = problem.J.pullback(other, x)
            found = pull(torch.ones_like(u).unsqueeze(-1)).squeeze(-1)
        except (RuntimeError, NotImplementedError) as error:
            raise _no_reverse_mode(first_line(error), inside) from error
    if not _close(found, slope):
        raise _no_reverse_mode("they are not what backward() gives", inside)
    if other.dtype != torch.float64:
        try:
            problem.to(torch.float64)
        except NotAnalysable as error:
            warnings.warn(
                f"{error} Until then only what computes in the dtype of the weights can be had of "
                "this run, such as trace_cells().",
                RuntimeWarning,
                stacklevel=4,
            )


def _try_query(problem: Problem) -> None:
    """Evaluate the model on two query points, and the loss on their targets.

    Raises:
        NotAnalysable: unless outputs have the shape of those of the training examples.
        ValueError: if there are more or fewer targets, or the loss does not take them.
    """
    (x, y), model = problem.query, problem.model
    targets = len(x) if y is None else len(y)
    if len(x) != targets or len(x) == 0:
        raise ValueError(
            f"query must hold a target for each input, at least one, but holds {len(x)} inputs and "
            f"{targets} targets."
        )
    with evaluating(model, eval_mode=False):
        u = _outputs(model, x[:2])
    _check_rows(u, len(x[:2]))
    if tuple(u.shape[1:]) != problem.output_shape:
        raise NotAnalysable(
            f"outputs of a query point have shape {tuple(u.shape[1:])}, but those of a training "
            f"example {problem.output_shape}; the model must give the same number for each."
        )
    if y is not None:
        check_separate(problem.loss, u, y[:2], losses.values(problem.loss, u, y[:2]))


def same_outputs(model: nn.Module, problem: Problem, w: Tensor) -> bool:
    """Whether a model still gives the outputs of its private copy at weights ``w``."""
    x = problem.train[0][:EXAMPLES]
    modes = {name: module.training for name, module in problem.model.named_modules()}
    with evaluating(model, eval_mode=False):
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
        found = _outputs(model, x)
    with evaluating(problem.model, eval_mode=False):
        expected = problem.J.values(w, x)
    return _close(found.reshape_as(expected), expected)


def _check_rows(outputs: Any, examples: int) -> None:
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


def _no_reverse_mode(why: str, reentrant: bool) -> NotAnalysable:
    """The error for a model without a derivative by its weights, or with a wrong one."""
    advice = "the trained weights must lead to the outputs by operations of torch"
    if reentrant:
        advice = "pass use_reentrant=False to torch.utils.checkpoint"
    return NotAnalysable(
        "outputs have no derivatives by the weights that torch.autograd.grad gives "
        f"({why}); {advice}."
    )


def _reentrant(u: Tensor) -> bool:
    """Whether a re-entrant checkpoint lies behind outputs."""
    seen, todo = set[Any](), [u.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False


def _renormalized(model: nn.Module) -> list[str]:
    """Weights of embeddings that are written to once a row of theirs is too long."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    named = model.named_modules()
    return [f"{n}.weight" for n, m in named if isinstance(m, kinds) and m.max_norm is not None]


def _ignores(model: nn.Module, name: str, x: Tensor, outputs: Tensor) -> bool:
    """Whether outputs stay the same when the state called ``name`` is another."""
    holder, key = places_in(model)[name]
    kept = holder[key]
    try:
        holder[key] = tree_map(_shifted, kept)
        return _close(_outputs(model, x), outputs)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError):
        return False  # it was read, and does not fit
    finally:
        holder[key] = kept


def _shifted(value: Any) -> Any:
    if isinstance(value, (nn.Parameter, bool)):
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dtype == torch.bool:
            return ~value
        return 1.5 * value + 0.5 if value.is_floating_point() else value + 1000
    if isinstance(value, float):
        return 1.5 * value + 0.5
    return value + 1000 if isinstance(value, int) else value


def _outputs(model: nn.Module, x: Tensor) -> Any:
    with plain_kernels(model):
        return outputs_of(model, x)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1e-30
    atol = TOLERANCE.get(b.dtype, 1e-2) * scale
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=atol, equal_nan=True)
