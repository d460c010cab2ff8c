"""The Jacobian of outputs by flat weights: products, and rows written to given memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import cast, final

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from poprisk._validate import first_line
from poprisk.jacobian import Jacobian, chunks, flat, leaves_at, tolerance_of
from poprisk.per_sample import Factors, capture
from poprisk.per_sample.plan import Plan, learn_plan
from poprisk.per_sample.terms import OneHot, Outer, Term

JACOBIAN_BYTES = 256 * 2**20
"""Memory that the Jacobian of one chunk of examples may take."""

PRODUCTS = 1024
"""Examples whose products with the Jacobian are computed at once."""

TRIED = 4
"""Examples on which factors must give the rows that ``torch.func`` gives."""

Weighted = Sequence[tuple[Tensor, float]]
"""Flat weights (P,) and what the Jacobian at them counts."""


@final
class FlatJacobian:
    r"""J at any flat weights (P,), of one real dtype: outputs (b, k), products, rows (b·k, P).

    Products take forward mode. Rows take per-example gradients in factors, which are an order of
    magnitude faster than ``torch.func``. Each is tried once on a few examples, at weights that the
    model does not have; a slower way is taken where it is not to be had, or not right.

    Args:
        jacobian: of a model by some of its weights.
        examples: inputs (n, ...), of which some are tried.
        count: outputs of each, k.

    Attributes:
        elsewhere: weights that the model does not have, to see whether it uses its own.
    """

    def __init__(self, jacobian: Jacobian, examples: Tensor, count: int) -> None:
        self.jacobian, self.examples, self.count = jacobian, examples, count
        w = flat(jacobian.params.values())
        self.elsewhere = 1.1 * w + 0.01 * w.abs().mean()
        self._plan: Plan | None = None

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Flat weights by name, in their shapes, as views."""
        pieces = w.split([p.numel() for p in self.jacobian.params.values()])
        pairs = zip(self.jacobian.params.items(), pieces, strict=True)
        return {name: piece.view(p.shape) for (name, p), piece in pairs}

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs (b, k) of inputs (b, ...)."""
        return self.jacobian(x, self.named(w))

    def values(self, w: Tensor, x: Tensor) -> Tensor:
        """Like :meth:`outputs`, without a graph."""
        with torch.inference_mode(False):
            w = w.clone() if w.is_inference() else w.detach()
        return self.jacobian.values(x, self.named(w))

    def pullback(self, w: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs (b, k), and the transposed Jacobian as a map from (b, k, r) to (P, r)."""
        u, by_name = self.jacobian.pullback(x, self.named(w))

        def pull(vectors: Tensor) -> Tensor:
            columns = by_name(*vectors.unbind(-1))
            return torch.stack([flat(column.values()) for column in columns], dim=1)

        return u.detach(), pull

    def jvp(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """J times ``vectors`` (P, r), as (b, k, r), without forming it."""
        if self.no_forward_mode:
            warnings.warn(
                f"{self.no_forward_mode}; Jacobians are formed instead, which is slow. Write that "
                "part of the model with other operations of torch to be fast.",
                RuntimeWarning,
                stacklevel=2,
            )
            parts = [self.dense(w, part) @ vectors for part in x.split(self._chunk(w))]
            return torch.cat(parts).view(len(x), self.count, -1)
        return torch.cat([self._forward(w, part, vectors) for part in x.split(PRODUCTS)])

    def _forward(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        at = self.named(w)

        def product(v: Tensor) -> Tensor:
            return self.jacobian.pushforward(x, at, self.named(v))

        # In a row of its own, each vector is as fast to multiply with as the weights are.
        rows = vectors.T.contiguous()
        return cast(Tensor, vmap(product, out_dims=-1)(rows)).detach()

    @cached_property
    def no_forward_mode(self) -> str:
        """Why the model has no forward-mode derivative; empty if it has one, and the right one."""
        w, x = self.elsewhere, self.examples[:2]

        def product(row: dict[str, Tensor]) -> Tensor:
            return self._forward(w, x, flat(row.values()).unsqueeze(1)).squeeze(-1)

        return self.jacobian.flaw_of(product, x, self.named(w))

    def one(self, w: Tensor, example: Tensor) -> Tensor:
        """Outputs (k,) of one example."""
        return self.outputs(w, example.unsqueeze(0))[0]

    def each(self, w: Tensor, x: Tensor) -> Tensor:
        """Outputs (b, k) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Tensor, vmap(self.one)(w.detach(), x)).detach()

    def rows_of_each(self, w: Tensor, x: Tensor) -> Tensor:
        """J (b, k, P) of inputs (b, ...), each at its own weights (b, P)."""
        return cast(Callable[..., Tensor], vmap(jacrev(self.one)))(w, x)

    def dense(self, w: Tensor, x: Tensor) -> Tensor:
        r""":math:`J = \partial u/\partial w` of inputs (b, ...), as (b·k, P), by ``torch.func``."""
        if self.no_vectorizing:
            warnings.warn(
                f"the model cannot be vectorized over examples ({self.no_vectorizing}); Jacobians "
                "are computed row by row, which is slow.",
                RuntimeWarning,
                stacklevel=2,
            )
        rows, w = self._one_by_one if self.no_vectorizing else self._at_once, w.detach()
        parts = [rows(w, part) for part in x.split(self._chunk(w))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, len(w))

    def _chunk(self, w: Tensor) -> int:
        """Examples whose rows are formed at once."""
        return max(1, JACOBIAN_BYTES // (self.count * w.nbytes))

    def _at_once(self, w: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, vmap(jacrev(self.one), in_dims=(None, 0))(w, x))

    def _one_by_one(self, w: Tensor, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for example in x.split(1):
            u, pull = self.pullback(w, example)
            units = torch.eye(u.numel(), dtype=u.dtype, device=u.device)
            found.append(pull(units.unsqueeze(0)).T)
        return torch.stack(found)

    @cached_property
    def no_vectorizing(self) -> str:
        """Why rows of some examples at once are not to be had, or not right; else empty.

        Some operations of torch (``cdist``) are silently wrong under ``vmap``.
        """
        # More than one example, and as many as nothing else is likely to be.
        w, x = self.elsewhere, self.examples[torch.arange(5) % len(self.examples)]
        try:
            found = self._at_once(w, x)
        except RuntimeError as error:
            return first_line(error)
        expected = self._one_by_one(w, x)
        off = float((found - expected).abs().max())
        if off <= tolerance_of(w) * float(expected.abs().max()):
            return ""
        return "torch's vectorized derivative of it is wrong"

    def write(self, out: Tensor, at: Weighted, x: Tensor) -> Tensor:
        r"""Fill ``out`` (b·k, P) with a weighted sum of J over weights, and return it.

        Matrices of this size are large: to allocate one costs about as much as to multiply with it.
        A quadrature over weights is one product per layer, :math:`\sum_j b_j\, \delta_j a_j^T`, of
        the factors at all of its nodes.
        """
        rows = len(out) // len(x)
        for part in chunks(len(x), max(2, JACOBIAN_BYTES // (rows * out[0].nbytes))):
            some, place = x[part], out[part.start * rows : part.stop * rows]
            if len(some) > 1 and self.has_factors:
                self._write(place, at, some)
                continue
            for i, (w, weight) in enumerate(at):
                found = self.dense(w, some)
                place.copy_(found.mul_(weight)) if i == 0 else place.add_(found, alpha=weight)
        return out

    def _write(self, out: Tensor, at: Weighted, x: Tensor) -> None:
        terms: dict[str, list[Term]] = {}
        for w, weight in at:
            for name, found in self._factors(w, weight, x).terms.items():
                terms.setdefault(name, []).extend(found)
        params, rows = self.jacobian.params, out.view(len(x), -1, out.shape[1])
        whole = Factors(terms, params, examples=len(x), values=rows.shape[1])
        places = rows.split([p.numel() for p in params.values()], dim=2)
        for name, place in zip(params, places, strict=True):
            _fill(place, whole.terms.get(name, []))

    def _factors(self, w: Tensor, weight: float, x: Tensor) -> Factors:
        leaves, jacobian = leaves_at(self.named(w)), self.jacobian
        with torch.enable_grad():
            return jacobian.holding(
                leaves, lambda: capture(weight * jacobian(x, leaves), leaves, plan=self._plan)
            )

    @cached_property
    def has_factors(self) -> bool:
        """Whether factors can be had on a few examples, without a warning, and give the same."""
        w, x = self.elsewhere, self.examples[:TRIED]
        if len(x) < 2:
            return False
        expected, found = self.dense(w, x), torch.empty(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                leaves = leaves_at(self.named(w))
                self._plan = learn_plan(
                    lambda some: 1.0 * self.jacobian(x[some], leaves),
                    leaves,
                    examples=len(x),
                    size=len(x),
                )
                found = torch.empty_like(expected)
                self._write(found, [(w, 1.0)], x)
            except (Warning, RuntimeError, ValueError, TypeError, NotImplementedError):
                return False
        scale = float(expected.abs().max())
        tolerance = 1e-10 if w.dtype == torch.float64 else 1e-4
        return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def _fill(place: Tensor, terms: list[Term]) -> None:
    """Write the sum of terms to (b, k, entries of a parameter)."""
    if not terms:
        place.zero_()
    for i, term in enumerate(terms):
        if isinstance(term, Outer) and not isinstance(term.activation, OneHot):
            for k in range(place.shape[1]):
                factors = (term.cotangent[:, k].mT, term.activation)
                left, right = (
                    (term.activation.mT, term.cotangent[:, k]) if term.flipped else factors
                )
                shape = (left.shape[1], right.shape[2])
                place[:, k].unflatten(1, shape).baddbmm_(left, right, beta=int(i > 0))
        elif i == 0:
            place.copy_(term.dense())
        else:
            place.add_(term.dense())
