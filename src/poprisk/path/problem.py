r"""Outputs as a function of the flat weights, and their Jacobian in every form that is needed."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap

from poprisk import losses
from poprisk._validate import first_line
from poprisk.evaluation import evaluating, outputs_of
from poprisk.forward_mode import plain_kernels
from poprisk.losses import Loss
from poprisk.path.checks import check_copied, check_data_kept, check_dtype
from poprisk.printing import brief, described

CHUNK = 1024
"""Examples whose products with the Jacobian are computed at once."""

JACOBIAN_BYTES = 256 * 2**20
"""Memory that the Jacobian of one chunk of examples may take."""


Result = TypeVar("Result")


class _Holder(nn.Module):
    """Gives weights to a model for the time of any work, where a call is not all of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


@dataclass(frozen=True)
class Problem:
    r"""A model, its loss, a training set S of n examples and a query set Q of m.

    The weights are the P parameters called ``names``, flat and in that order; all other
    parameters and buffers are constants.

    Attributes:
        model: a private copy; in the mode (train or eval) it was recorded in.
        loss: per example.
        train: inputs and targets of S.
        query: inputs of Q and, if they are known, targets.
        names: of the parameters that were trained.
        output_shape: of the outputs of one example; c is their number.
        digest: of the data when it was recorded, see :func:`digest_of`; None: not known.
        written: buffers that a forward pass writes to, and outputs do not depend on.
    """

    model: nn.Module
    loss: Loss
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor | None]
    names: tuple[str, ...]
    output_shape: tuple[int, ...]
    digest: int | None = None
    written: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sizes = f"{self.n:,} training and {self.m:,} query examples", f"{self.size:,} weights"
        return described("Problem", type(self.model).__name__, brief(self.loss), *sizes)

    @property
    def n(self) -> int:
        """Training examples."""
        return len(self.train[0])

    @property
    def m(self) -> int:
        """Query examples."""
        return len(self.query[0])

    @property
    def c(self) -> int:
        """Outputs per example."""
        return torch.Size(self.output_shape).numel()

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters of the private copy."""
        found = dict(self.model.named_parameters())
        return [found[name] for name in self.names]

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(p.numel() for p in self.parameters)

    @torch.inference_mode(False)  # or its weights could be written to only in there
    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another precision, on the CPU.

        Raises:
            NotAnalysable: if the data was written to since, or the model cannot be converted.
        """
        x, y = self.query
        if self.digest is not None:
            check_data_kept(digest_of(*self.train, x, y) == self.digest)

        def cast_to(t: Tensor) -> Tensor:
            return t.to("cpu", dtype) if t.is_floating_point() else t.cpu()

        made = Problem(
            private_copy(self.model).to("cpu", dtype),
            self.loss,
            (cast_to(self.train[0]), cast_to(self.train[1])),
            (cast_to(x), None if y is None else cast_to(y)),
            self.names,
            self.output_shape,
            written=self.written,
        )
        if self.parameters and dtype != self.parameters[0].dtype:
            with evaluating(made.model, eval_mode=False):
                try:
                    made.values(flat(made.parameters), made.train[0][:2])
                except (RuntimeError, TypeError, ValueError) as error:
                    check_dtype(error, dtype)
        return made

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Flat weights ``w`` (P,) by name, in their shapes, as views."""
        shapes = [p.shape for p in self.parameters]
        pieces = w.split([shape.numel() for shape in shapes])
        return {k: v.view(s) for k, v, s in zip(self.names, pieces, shapes, strict=True)}

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs of inputs ``x`` (b, ...) at flat weights ``w`` (P,), as (b, c)."""
        return self.call(self.named(w), x)

    def call(self, named: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Outputs (b, c) of inputs ``x`` (b, ...) with the named weights."""
        return self.holding(named, lambda: self.model(x)).reshape(len(x), -1)

    def holding(self, named: Mapping[str, Tensor], work: Callable[[], Result]) -> Result:
        """What ``work`` returns while the model has the named weights.

        A backward pass through checkpointed layers calls them again, and is to be in here too.
        """
        tensors = dict(named)
        if self.written:  # copies, for torch.func lets no captured tensor be written to
            buffers = dict(self.model.named_buffers())
            tensors |= {name: buffers[name].clone() for name in self.written}
        held = {f"model.{name}": t for name, t in tensors.items()}
        with plain_kernels(self.model), eagerly(self.model):
            return cast(Result, functional_call(_Holder(self.model), held, (work,)))

    def elsewhere(self) -> Tensor:
        """Weights (P,) that the private copy does not have, to see whether it uses its own."""
        w = flat(self.parameters)
        return 1.1 * w + 0.01 * w.abs().mean()

    def values(self, w: Tensor, x: Tensor) -> Tensor:
        """Like :meth:`outputs`, without a graph."""
        with torch.inference_mode(False):
            w = w.clone() if w.is_inference() else w.detach()
        return outputs_of(self.model, x, lambda _, x: self.outputs(w, x))

    def jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        r""":math:`J = \partial u/\partial w` of inputs (b, ...), as (b·c, P)."""
        chunk = max(1, JACOBIAN_BYTES // (self.c * self.size * w.element_size()))
        w = w.detach()
        rows = [_per_example(self, w, part) for part in x.split(chunk)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(-1, len(w))

    def each(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs (b, c) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Tensor, vmap(self._one)(w.detach(), x)).detach()

    def jacobians(self, w: Tensor, x: Tensor) -> Tensor:
        """Jacobians (b, c, P) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Callable[..., Tensor], vmap(jacrev(self._one)))(w, x)

    def _one(self, w: Tensor, example: Tensor) -> Tensor:
        return self.outputs(w, example.unsqueeze(0))[0]

    def jvp(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """The Jacobian times ``vectors`` (P, r), as (b, c, r), without forming it."""
        if self.no_forward_mode:
            warnings.warn(
                f"{self.no_forward_mode}; Jacobians are formed instead, which is slow. Write that "
                "part of the model with other operations of torch to be fast.",
                RuntimeWarning,
                stacklevel=2,
            )
            chunk = max(1, JACOBIAN_BYTES // (self.c * self.size * w.element_size()))
            parts = [self.jacobian(w, part) @ vectors for part in x.split(chunk)]
            return torch.cat(parts).view(len(x), self.c, -1)
        return torch.cat([self._forward(w, part, vectors) for part in x.split(CHUNK)])

    def _forward(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        def at(z: Tensor) -> Tensor:
            return self.outputs(z, x)

        def product(v: Tensor) -> Tensor:
            return cast(Tensor, jvp(at, (w,), (v,))[1])

        return cast(Tensor, vmap(product, in_dims=1, out_dims=-1)(vectors)).detach()

    @cached_property
    def no_forward_mode(self) -> str:
        r"""Why the model has no forward-mode derivative; empty if it has one, and the right one.

        The right one is the transpose of reverse mode, :math:`v^T(J J^T v) = \|J^T v\|^2`: forward
        mode does not stop at ``torch.no_grad()`` inside a model, as reverse mode does.
        """
        w, x = self.elsewhere(), self.train[0][:2]
        u, pull = self.pullback(w, x)
        v = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype, device=u.device).view_as(u)
        row = pull(v.unsqueeze(-1))
        try:
            found = (v.unsqueeze(-1) * self._forward(w, x, row)).sum()
        except (NotImplementedError, RuntimeError) as error:
            return f"the model has no forward-mode derivative ({first_line(error)})"
        tolerance = 1e-9 if w.dtype == torch.float64 else 1e-3
        expected = row.square().sum()
        if bool((found - expected).abs() <= tolerance * expected):
            return ""
        return "forward and reverse mode differ (torch.no_grad() or detach() inside the model?)"

    @cached_property
    def no_vectorizing(self) -> str:
        """Why per-example Jacobians by ``vmap`` are not to be had, or not right; else empty.

        Some operations of torch (``cdist``) are silently wrong there.
        """
        # More than one example, and as many as nothing else is likely to be.
        w, x = self.elsewhere(), self.train[0][torch.arange(5) % self.n]
        try:
            found = _vectorized(self, w, x)
        except RuntimeError as error:
            return first_line(error)
        expected = _row_by_row(self, w, x)
        tolerance = 1e-9 if w.dtype == torch.float64 else 1e-3
        off = float((found - expected).abs().max())
        if off <= tolerance * float(expected.abs().max()):
            return ""
        return "torch's vectorized derivative of it is wrong"

    def pullback(self, w: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs (b, c), and the transposed Jacobian as a map from (b, c, r) to (P, r)."""
        with torch.enable_grad():
            at = w.detach().requires_grad_()
            named = self.named(at)
            u = self.call(named, x)

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(u, at, vector, retain_graph=True)[0]

        def pull(vectors: Tensor) -> Tensor:
            columns = vectors.unbind(-1)
            found = self.holding(named, lambda: [product(column) for column in columns])
            return torch.stack(found, dim=1)

        return u.detach(), pull

    def shaped(self, u: Tensor) -> Tensor:
        """Outputs (b, c) in the shape that the loss takes."""
        return u.reshape(len(u), *self.output_shape)

    def output_gradient(self, u: Tensor, targets: Tensor | None = None) -> Tensor:
        r""":math:`g = \nabla_u \Phi_S`, (n, c), for outputs (n, c) of the training set."""
        y = self.train[1] if targets is None else targets
        return losses.gradient(self.loss, self.shaped(u), y).reshape_as(u) / self.n

    def output_hessian(self, u: Tensor) -> Tensor:
        r""":math:`B = \nabla^2_u \Phi_S`, its diagonal blocks (n, c, c)."""
        return losses.hessian(self.loss, self.shaped(u), self.train[1]) / self.n

    def training_loss(self, u: Tensor) -> float:
        r""":math:`\Phi_S(u)`."""
        return losses.values(self.loss, self.shaped(u), self.train[1]).mean().item()


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in the modes that it is in, made without a trace.

    Embeddings give dense gradients in it: the Jacobian is taken through flat weights.

    Raises:
        NotAnalysable: if it cannot be copied.
    """
    with evaluating(model, eval_mode=False):
        try:
            made = copy.deepcopy(model)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            check_copied(error)
    for module in made.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False
    for p in made.parameters():
        p.grad = None
    return made


@contextlib.contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """No compiled part of a model is used as such inside: it knows one derivative at most."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not any(isinstance(m, dynamo.OptimizedModule) for m in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def digest_of(*tensors: Tensor | None) -> int:
    """A checksum of the numbers in some tensors."""
    found = 0
    for t in tensors:
        if t is not None:
            numbers = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(numbers.numpy().data, found)
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, detached and copied."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _per_example(problem: Problem, w: Tensor, x: Tensor) -> Tensor:
    """Jacobians (b, c, P) of a chunk of examples; row by row if vmap cannot take the model."""
    if not problem.no_vectorizing:
        return _vectorized(problem, w, x)
    warnings.warn(
        f"the model cannot be vectorized over examples ({problem.no_vectorizing}); Jacobians are "
        "computed row by row, which is slow.",
        RuntimeWarning,
        stacklevel=2,
    )
    return _row_by_row(problem, w, x)


def _vectorized(problem: Problem, w: Tensor, x: Tensor) -> Tensor:
    return cast(Callable[..., Tensor], vmap(jacrev(problem._one), in_dims=(None, 0)))(w, x)


def _row_by_row(problem: Problem, w: Tensor, x: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for example in x.split(1):
        u, pull = problem.pullback(w, example)
        rows.append(pull(torch.eye(problem.c, dtype=u.dtype, device=u.device)[None]).T)
    return torch.stack(rows)
