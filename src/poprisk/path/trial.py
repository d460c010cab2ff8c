"""Try once, on a few examples and before anything moves, all that recording and analysing takes.

The theory needs outputs that are a function of the recorded weights, one row per example, and a
loss with two derivatives. Whatever is not so is refused here, by name, and not after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from poprisk import losses
from poprisk._validate import NotAnalysable, check_separate, first_line
from poprisk.evaluation import evaluating, outputs_of, uncompiled
from poprisk.forward_mode import plain_kernels
from poprisk.jacobian import flat
from poprisk.path.checks import named
from poprisk.path.problem import Problem
from poprisk.protocols import PerExampleLoss

EXAMPLES = 8
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative difference of outputs that rounding may make, by their dtype."""

State = dict[str, list[Any]]
"""What a model keeps beside its parameters: numbers and tensors by the name of their attribute."""


def try_outputs(model: nn.Module, x: Tensor, others: Tensor) -> tuple[Tensor, frozenset[str]]:
    """Outputs of a few examples, and the state that the model writes to but does not read.

    Args:
        model: the private copy; left as it was.
        x: examples, (b, ...).
        others: more of them, for state that follows the data.

    Raises:
        NotAnalysable: unless outputs are one row per example and depend on nothing else.
    """
    weights: dict[str, Any] = dict(model.named_parameters())
    before = _leaves(weights)
    with evaluating(model, eval_mode=False):
        kept = state_of(model)
        whole = _outputs(model, x)
        _check_rows(whole, len(x))
        after_one = state_of(model)
        again, part = _outputs(model, x), _outputs(model, x[: (len(x) + 1) // 2])
        _outputs(model, others)
        always = changed(after_one, state_of(model))
        written = changed(kept, state_of(model))
        if moved := changed(before, _leaves(weights)) or _renormalized(model):
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


def try_loss(loss: PerExampleLoss, u: Tensor, y: Tensor, targets: Tensor) -> None:
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


def try_weights(problem: Problem, x: Tensor) -> None:
    """See that outputs follow the flat weights, and have a derivative by them.

    Raises:
        NotAnalysable: if not.
    """
    w, other, params = flat(problem.parameters), problem.J.elsewhere, problem.parameters
    with _set(params, other), evaluating(problem.model, eval_mode=False):
        expected = _outputs(problem.model, x)
        with plain_kernels(problem.model), uncompiled():
            u = problem.model(x)
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
    if w.dtype != torch.float64:
        try:
            problem.to(torch.float64)
        except NotAnalysable as error:
            warnings.warn(
                f"{error} Until then only what computes in the dtype of the weights can be had of "
                "this run, such as trace_cells().",
                RuntimeWarning,
                stacklevel=4,
            )


def try_query(problem: Problem) -> None:
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
        losses.values(problem.loss, u, y[:2])


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


class Surroundings:
    """All of a model that is not to move in a run: other parameters, and state that it reads.

    Args:
        model: that is trained.
        copied: its private copy, which stays as it is.
        trained: names of the parameters that are to move.
        free: names of state that may change, for outputs do not read it.
    """

    def __init__(
        self, model: nn.Module, copied: nn.Module, trained: tuple[str, ...], free: frozenset[str]
    ) -> None:
        self.model, self.copied = model, copied
        self.left_out = frozenset(trained) | free
        self.seen: list[tuple[int, int]] = []

    def changed(self, *, thorough: bool = False) -> list[str]:
        """Names of what is no longer what it was.

        Args:
            thorough: compare numbers even where no tensor was written to, as far as torch counts.
        """
        tensors = self._tensors(self.model)
        seen = [(id(t), t._version) for t in tensors.values()]
        if seen == self.seen and not thorough:
            return []
        self.seen = seen
        kept = self._tensors(self.copied)
        return changed(_leaves(kept), _leaves(tensors))

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: t for name, t in named if name not in self.left_out}


class _Place(NamedTuple):
    """Where an attribute of a model is kept."""

    holder: dict[str, Any]
    key: str


def _renormalized(model: nn.Module) -> list[str]:
    """Weights of embeddings that are written to once a row of theirs is too long."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    named = model.named_modules()
    return [f"{n}.weight" for n, m in named if isinstance(m, kinds) and m.max_norm is not None]


def _places(model: nn.Module) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    own = vars(nn.Module())
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for key in module._buffers:
            found[path + key] = _Place(module._buffers, key)
        for key in vars(module):
            if key not in own:
                found[path + key] = _Place(vars(module), key)
    return found


def state_of(model: nn.Module) -> State:
    """Copies of what a model keeps beside its parameters, as far as it is numbers."""
    return _leaves({name: place.holder[place.key] for name, place in _places(model).items()})


def _leaves(values: dict[str, Any]) -> State:
    found: State = {}
    for name, value in values.items():
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, int, float))]
        found[name] = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
    return found


def changed(before: State, after: State) -> list[str]:
    """Names whose numbers differ; NaN is no difference."""
    names = [*after, *(name for name in before if name not in after)]
    return [name for name in names if not _same(before.get(name, []), after.get(name, []))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _ignores(model: nn.Module, name: str, x: Tensor, outputs: Tensor) -> bool:
    """Whether outputs stay the same when the state called ``name`` is another."""
    holder, key = _places(model)[name]
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
    with plain_kernels(model), uncompiled():
        return outputs_of(model, x)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1e-30
    atol = TOLERANCE.get(b.dtype, 1e-2) * scale
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=atol, equal_nan=True)


@contextmanager
def _set(parameters: list[Tensor], w: Tensor) -> Iterator[None]:
    """Other weights inside."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        pieces = w.split([p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.copy_(piece.view_as(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
