r"""What a run trains: outputs as a function of flat weights, their Jacobian, the loss, the data."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from poprisk import losses
from poprisk._validate import NotAnalysable, first_line
from poprisk.evaluation import evaluating
from poprisk.jacobian import JACOBIAN_BYTES, Jacobian, Rows, flat
from poprisk.printing import brief, described
from poprisk.protocols import PerExampleLoss

CHUNK = 1024
"""Examples whose products with the Jacobian are computed at once."""

TRIED = 4
"""Examples on which factors must give the rows that ``torch.func`` gives."""


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
    loss: PerExampleLoss
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
        if self.digest is not None and digest_of(*self.train, x, y) != self.digest:
            raise NotAnalysable(
                "the training or query data was changed in place since the run was recorded; pass "
                "a copy to record(), and record again."
            )

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
                    raise NotAnalysable(
                        f"the model does not run in {dtype} ({first_line(error)}), which dense "
                        "operators are computed in; let it follow the dtype of its weights and "
                        "inputs."
                    ) from error
        return made

    @cached_property
    def _jacobian(self) -> Jacobian:
        params = dict(zip(self.names, self.parameters, strict=True))
        return Jacobian(self.model, params, written=self.written)

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs of inputs ``x`` (b, ...) at flat weights ``w`` (P,), as (b, c)."""
        return self._jacobian(x, self._jacobian.named(w))

    def elsewhere(self) -> Tensor:
        """Weights (P,) that the private copy does not have, to see whether it uses its own."""
        w = flat(self.parameters)
        return 1.1 * w + 0.01 * w.abs().mean()

    def values(self, w: Tensor, x: Tensor) -> Tensor:
        """Like :meth:`outputs`, without a graph."""
        with torch.inference_mode(False):
            w = w.clone() if w.is_inference() else w.detach()
        return self._jacobian.values(x, self._jacobian.named(w))

    def jacobian(self, w: Tensor, x: Tensor) -> Tensor:
        r""":math:`J = \partial u/\partial w` of inputs (b, ...), as (b·c, P)."""
        if self.no_vectorizing:
            warnings.warn(
                f"the model cannot be vectorized over examples ({self.no_vectorizing}); Jacobians "
                "are computed row by row, which is slow.",
                RuntimeWarning,
                stacklevel=2,
            )
        parts = x.split(self._chunk(w))
        vectorized, w = not self.no_vectorizing, w.detach()
        rows = [self._jacobian.dense(w, part, vectorized=vectorized) for part in parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(-1, len(w))

    @cached_property
    def rows(self) -> Rows:
        """What writes the Jacobian to memory that is there already."""
        return Rows(self._jacobian, self.jacobian, self.elsewhere(), self.train[0][:TRIED])

    def _chunk(self, w: Tensor) -> int:
        """Examples whose Jacobian is formed at once."""
        return max(1, JACOBIAN_BYTES // (self.c * self.size * w.element_size()))

    def each(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs (b, c) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Tensor, vmap(self._jacobian.one)(w.detach(), x)).detach()

    def jacobians(self, w: Tensor, x: Tensor) -> Tensor:
        """Jacobians (b, c, P) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Callable[..., Tensor], vmap(jacrev(self._jacobian.one)))(w, x)

    def jvp(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """The Jacobian times ``vectors`` (P, r), as (b, c, r), without forming it."""
        if self.no_forward_mode:
            warnings.warn(
                f"{self.no_forward_mode}; Jacobians are formed instead, which is slow. Write that "
                "part of the model with other operations of torch to be fast.",
                RuntimeWarning,
                stacklevel=2,
            )
            parts = [self.jacobian(w, part) @ vectors for part in x.split(self._chunk(w))]
            return torch.cat(parts).view(len(x), self.c, -1)
        return torch.cat([self._forward(w, part, vectors) for part in x.split(CHUNK)])

    def _forward(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        at, named = self._jacobian.named(w), self._jacobian.named

        def product(v: Tensor) -> Tensor:
            return self._jacobian.pushforward(x, at, named(v))

        return cast(Tensor, vmap(product, in_dims=1, out_dims=-1)(vectors)).detach()

    @cached_property
    def no_forward_mode(self) -> str:
        """Why the model has no forward-mode derivative; empty if it has one, and the right one."""
        w, x = self.elsewhere(), self.train[0][:2]

        def product(row: dict[str, Tensor]) -> Tensor:
            return self._forward(w, x, flat(row.values()).unsqueeze(1)).squeeze(-1)

        return self._jacobian.flaw_of(product, x, self._jacobian.named(w))

    @cached_property
    def no_vectorizing(self) -> str:
        """Why per-example Jacobians by ``vmap`` are not to be had, or not right; else empty."""
        # More than one example, and as many as nothing else is likely to be.
        some = self.train[0][torch.arange(5) % self.n]
        return self._jacobian.no_vectorizing(self.elsewhere(), some)

    def pullback(self, w: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs (b, c), and the transposed Jacobian as a map from (b, c, r) to (P, r)."""
        u, by_name = self._jacobian.pullback(x, self._jacobian.named(w))

        def pull(vectors: Tensor) -> Tensor:
            columns = by_name(*vectors.unbind(-1))
            return torch.stack([flat(column.values()) for column in columns], dim=1)

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
            raise NotAnalysable(
                f"the model cannot be copied by copy.deepcopy ({first_line(error)}), and recording "
                "keeps a copy of its own; remove what it holds beside its parameters, or define "
                "__deepcopy__."
            ) from error
    for module in made.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False
    for p in made.parameters():
        p.grad = None
    return made


def digest_of(*tensors: Tensor | None) -> int:
    """A checksum of the numbers in some tensors."""
    found = 0
    for t in tensors:
        if t is not None:
            numbers = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(numbers.numpy().data, found)
    return found
