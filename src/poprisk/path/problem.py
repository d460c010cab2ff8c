r"""What a run trains: the model, whose outputs are a function of flat weights, loss and data."""

from __future__ import annotations

import copy
import warnings
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from poprisk import losses
from poprisk._validate import NotAnalysable, first_line
from poprisk.evaluation import evaluating
from poprisk.jacobian import Jacobian, flat, looking, recording, tolerance_of
from poprisk.path.jacobian import FlatJacobian
from poprisk.printing import brief, described
from poprisk.protocols import PerExampleLoss
from poprisk.randomness import generator_of

TRIED = 2
"""Examples that show whether gradients are cut inside a model."""
COMBINATIONS = 4
"""Of their outputs that are looked at."""
PIECES = 16
"""Of the line to other weights, along which two Jacobians are compared."""
FAR = 0.5
"""Share of the way to other weights that are as large, where rounded weights round differently."""
ENDS = (1, 2, 3)
"""These weights: the same, so many places on."""
FOLLOWS = 0.15
"""Relative error up to which a Jacobian tells how outputs move, all ways: of small nets that hand
on without gradients it was 0.06 at most, ReLUs included, of rounded ones 0.28 at least."""


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

    def check_data(self) -> None:
        """Raise NotAnalysable if the data was written to since the run was recorded."""
        if self.digest is not None and digest_of(*self.train, *self.query) != self.digest:
            raise NotAnalysable(
                "the training or query data was changed in place since the run was recorded; pass "
                "a copy of it, and train again."
            )

    @torch.inference_mode(False)  # or its weights could be written to only in there
    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another precision, on the CPU.

        Raises:
            NotAnalysable: if the data was written to since, or the model cannot be converted.
        """
        self.check_data()
        x, y = self.query

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
                    made.J.values(flat(made.parameters), made.train[0][:2])
                except (RuntimeError, TypeError, ValueError) as error:
                    raise NotAnalysable(
                        f"the model does not run in {dtype} ({first_line(error)}), which dense "
                        "operators are computed in; let it follow the dtype of its weights and "
                        "inputs."
                    ) from error
        return made

    @cached_property
    def J(self) -> FlatJacobian:
        """Outputs as a function of flat weights, and their Jacobian."""
        return self._jacobian(whole=False)

    @cached_property
    def J_whole(self) -> FlatJacobian:
        r"""What outputs move by, where the model detaches what it hands on; else :attr:`J` itself.

        Of the two Jacobians the one that predicts better what a change of all weights does, if it
        does predict it: what a straight-through estimator rounds has no derivative to follow.
        Weights that no gradient reaches, as behind ``torch.no_grad()``, do not move either.
        """
        whole = self._jacobian(whole=True)
        w, x = self.J.elsewhere, self.train[0][:TRIED]
        try:
            rows, others = (_rows(jacobian, w, x) for jacobian in (self.J, whole))
            apart = (others - rows)[self._reached(x)]
            if float(apart.norm()) <= tolerance_of(w) * float(rows.norm()):
                return self.J
            better = _chord_error(whole, w, x) < _chord_error(self.J, w, x)
            return whole if better and _follows(whole, x) else self.J
        except RuntimeError as error:
            warnings.warn(
                f"what the model detaches cannot be followed ({first_line(error)}): if outputs "
                "depend on weights through it, the closure will say so.",
                RuntimeWarning,
                stacklevel=3,
            )
            return self.J

    @property
    def is_cut(self) -> bool:
        """Whether outputs follow weights that their own gradients do not reach."""
        return self.J_whole is not self.J

    def _reached(self, x: Tensor) -> Tensor:
        """Which weights a gradient reaches, (P,)."""
        with looking(self.model), recording():
            u = self.J.jacobian(x)
            grads = torch.autograd.grad(u.sum(), self.parameters, allow_unused=True)
        pairs = zip(self.parameters, grads, strict=True)
        return flat(torch.full_like(p, grad is not None, dtype=torch.bool) for p, grad in pairs)

    def _jacobian(self, *, whole: bool) -> FlatJacobian:
        params = dict(zip(self.names, self.parameters, strict=True))
        jacobian = Jacobian(self.model, params, written=self.written, whole=whole)
        return FlatJacobian(jacobian, self.train[0], self.c)

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


def _rows(J: FlatJacobian, w: Tensor, x: Tensor) -> Tensor:
    """Some combinations of the rows of J, (P, r)."""
    u, pull = J.pullback(w, x)
    return pull(_combining(u))


def _combining(u: Tensor) -> Tensor:
    """Weights of outputs (b, k), the same for all Jacobians: (b, k, r)."""
    drawn = torch.randn(*u.shape, COMBINATIONS, generator=generator_of(0, "cut"))
    return drawn.to(u.device, u.dtype)


def _chord_error(J: FlatJacobian, end: Tensor, x: Tensor) -> float:
    """How far J is from the movement of outputs along the line to other weights, relative to it."""
    w = flat(J.jacobian.params.values())
    change = J.values(end, x) - J.values(w, x)
    moved = torch.einsum("bk,bkr->r", change, _combining(change))
    told = torch.zeros_like(moved)
    for i in range(PIECES):
        rows = _rows(J, torch.lerp(w, end, (i + 0.5) / PIECES), x)
        told += rows.T @ (end - w) / PIECES
    return float((told - moved).norm() / moved.norm())


def _follows(J: FlatJacobian, x: Tensor) -> bool:
    """Whether J predicts large movements of outputs."""
    w = flat(J.jacobian.params.values())
    ends = [torch.lerp(w, w.roll(places), FAR) for places in ENDS]
    return all(_chord_error(J, end, x) < FOLLOWS for end in ends)


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
