r"""One step of a run backwards: from what follows to what its gradient and its weights did.

A run's weights answer to a weight :math:`1+\epsilon_i` on the loss of example i through every step
that saw it. With :math:`\lambda` the gradient of a query in the weights, and in whatever else the
optimizer carries, after a step, and :math:`\lambda_g` what the step makes of it for the gradient
:math:`g = \sum_i s_i \nabla\ell_i(w)` of its batch,

.. math:: \frac{\partial q}{\partial \epsilon_i} \mathrel{+}= s_i \langle\lambda_g,
          \nabla\ell_i(w)\rangle, \qquad
          \lambda \leftarrow \lambda_w + \sum_i s_i \nabla^2\ell_i(w)\,\lambda_g

(reverse-mode differentiation of training; Maclaurin et al. 2015; Hara et al. 2019; Ilyas and
Engstrom 2025, arXiv:2503.13751). Both come from one double backward pass, without the gradient of
any single example: the sum's derivative in s is the inner products, that in w the curvature. Where
the gradient's graph was kept when the step was taken, nothing of it is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk import losses
from poprisk.jacobian import flat
from poprisk.optim.step import Diagonal, StepRule
from poprisk.path.problem import Problem

FORMS = ("hessian", "gauss-newton")


class Adjoint(NamedTuple):
    """Gradients of queries in the weights, and in the optimizer's state, at one moment.

    Attributes:
        weights: (q, P).
        state: by name, each (q, P).
    """

    weights: Tensor
    state: Mapping[str, Tensor]

    def of_state(self, name: str) -> Tensor:
        """That of one kind of state; zero if nothing follows from it."""
        found = self.state.get(name)
        return torch.zeros_like(self.weights) if found is None else found


class Pulled(NamedTuple):
    """What a step makes of an adjoint: for its gradient (q, P), and for what was before it."""

    gradient: Tensor
    before: Adjoint


Pull = Callable[[Adjoint], Pulled]


class BatchGradient(NamedTuple):
    """The gradient of a batch's loss, with the graph by which it is differentiated again.

    Attributes:
        weights: of each parameter, without a past.
        share: of each example's loss in that of the batch, (b,), likewise.
        gradient: of each parameter; None where the loss does not depend on it.
    """

    weights: Sequence[Tensor]
    share: Tensor
    gradient: Sequence[Tensor | None]


class BackwardStep(NamedTuple):
    """A step that was taken.

    Attributes:
        weights: before it, of each parameter.
        examples: behind its gradient, (b,).
        share: of each of their losses in it, (b,).
        pull: the optimizer's part of it, backwards.
        graph: of its gradient, where it was kept.
    """

    weights: Sequence[Tensor]
    examples: Tensor
    share: Tensor
    pull: Pull
    graph: BatchGradient | None = None


def pull_rule(rule: StepRule, after: Adjoint) -> Pulled:
    """Backwards through a step that is linear in its gradient, its preconditioner held.

    The transpose of :meth:`poprisk.path.recursion.Recursion.step`.

    Args:
        rule: of all weights: numbers, or (P,).
        after: with the momentum in its state.
    """
    w = after.weights
    r = _times(-rule.correction * rule.precondition, w)
    m = _plus(after.of_state("momentum"), rule.from_momentum, r)
    g = _plus(_times(rule.gain, m), rule.from_gradient, r)
    before = _plus(_times(1 - rule.decay, w), rule.coupled, g)
    return Pulled(_times(rule.sign, g), Adjoint(before, {"momentum": _times(rule.carry, m)}))


def _times(c: Diagonal, t: Tensor) -> Tensor:
    """No pass over memory for a factor of 1."""
    return t if not isinstance(c, Tensor) and c == 1 else c * t


def _plus(base: Tensor, c: Diagonal, t: Tensor) -> Tensor:
    r""":math:`b + c \odot t`, in one pass over memory at most."""
    if isinstance(c, Tensor):
        return torch.addcmul(base, c, t)
    return torch.add(base, t, alpha=c) if c else base


def batch_gradient(
    problem: Problem, weights: Sequence[Tensor], examples: Tensor, share: Tensor
) -> BatchGradient:
    r""":math:`g = \sum_i s_i \nabla\ell_i(w)`, to be differentiated in w and s.

    Args:
        problem: what is trained.
        weights: of each parameter.
        examples: of the batch, (b,).
        share: :math:`s_i`, (b,).
    """
    x, y = (t[examples.to(t.device)] for t in problem.train)
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        s = share.to(leaves[0]).detach().requires_grad_()
        u = problem.J.jacobian(x, dict(zip(problem.names, leaves, strict=True)))
        total = (s * losses.values(problem.loss, problem.shaped(u), y)).sum()
        if not total.requires_grad:
            return BatchGradient(leaves, s, [None] * len(leaves))
        found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    return BatchGradient(leaves, s, found)


def second_order(
    problem: Problem, step: BackwardStep, vectors: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    r"""Curvature of the batch's loss times vectors, and their inner products with gradients.

    Args:
        problem: what is trained.
        step: whose weights, examples and shares count.
        vectors: (q, P).
        form: ``"hessian"``, or ``"gauss-newton"``: :math:`J^\top B J`, the outputs' own curvature
            left out.

    Returns:
        (q, P), and (q, b).
    """
    graph = step.graph
    if graph is None:
        graph = batch_gradient(problem, step.weights, step.examples, step.share)
    curved, inner = list[Tensor](), list[Tensor]()
    for j, v in enumerate(vectors, 1):
        h, dot = _along(graph, v, keep=j < len(vectors))
        curved.append(h)
        inner.append(dot)
    if form == "gauss-newton":
        x, y = (t[step.examples.to(t.device)] for t in problem.train)
        bent = _gauss_newton(problem, flat(step.weights), x, y, graph.share.detach(), vectors)
        return bent, torch.stack(inner)
    return torch.stack(curved), torch.stack(inner)


def _along(graph: BatchGradient, v: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Derivatives of the gradient's product with a vector (P,): in w, (P,), and in s, (b,).

    Args:
        graph: of the gradient.
        v: the vector.
        keep: the graph, for another one.
    """
    pieces = v.split([w.numel() for w in graph.weights])
    pairs = [
        (g, piece.view_as(g))
        for g, piece in zip(graph.gradient, pieces, strict=True)
        if g is not None and g.requires_grad
    ]
    leaves = [*graph.weights, graph.share]
    if not pairs:  # a loss without slope
        found: Sequence[Tensor | None] = [None] * len(leaves)
    else:
        slopes, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(slopes, leaves, along, retain_graph=keep, allow_unused=True)
    *h, dot = [torch.zeros_like(t) if d is None else d for d, t in zip(found, leaves, strict=True)]
    return torch.cat([part.reshape(-1) for part in h]), dot


def _gauss_newton(
    problem: Problem, w: Tensor, x: Tensor, y: Tensor, share: Tensor, vectors: Tensor
) -> Tensor:
    u, pull = problem.J.pullback(w, x)
    moved = problem.J.jvp(w, x, vectors.T)
    bent = losses.hessian_product(problem.loss, problem.shaped(u), y, moved)
    return pull(share.view(-1, 1, 1) * bent).T
