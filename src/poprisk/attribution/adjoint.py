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
any single example: the sum's derivative in s is the inner products, that in w the curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk import losses
from poprisk.optim.step import StepRule
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


class BackwardStep(NamedTuple):
    """A step that was taken.

    Attributes:
        weights: before it, (P,).
        examples: behind its gradient, (b,).
        share: of each of their losses in it, (b,).
        pull: the optimizer's part of it, backwards.
    """

    weights: Tensor
    examples: Tensor
    share: Tensor
    pull: Pull


def pull_rule(rule: StepRule, after: Adjoint) -> Pulled:
    """Backwards through a step that is linear in its gradient, its preconditioner held.

    The transpose of :meth:`poprisk.path.recursion.Recursion.step`.

    Args:
        rule: of all weights: numbers, or (P,).
        after: with the momentum in its state.
    """
    w = after.weights
    r = -rule.correction * rule.precondition * w
    m = after.of_state("momentum") + rule.from_momentum * r
    g = rule.gain * m + rule.from_gradient * r
    before = (1 - rule.decay) * w + rule.coupled * g
    return Pulled(rule.sign * g, Adjoint(before, {"momentum": rule.carry * m}))


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
    x, y = (t[step.examples.to(t.device)] for t in problem.train)
    share = step.share.to(step.weights)
    with torch.enable_grad():
        w = step.weights.detach().requires_grad_()
        s = share.clone().requires_grad_()
        u = problem.J.outputs(w, x)
        total = (s * losses.values(problem.loss, problem.shaped(u), y)).sum()
        (g,) = _grad(total, [w], create_graph=True)
        curved, inner = list[Tensor](), list[Tensor]()
        for v in vectors:
            h, dot = _grad((g * v).sum(), [w, s], retain_graph=True)
            curved.append(h)
            inner.append(dot)
    if form == "gauss-newton":
        return _gauss_newton(problem, step.weights, x, y, share, vectors), torch.stack(inner)
    return torch.stack(curved), torch.stack(inner)


def _gauss_newton(
    problem: Problem, w: Tensor, x: Tensor, y: Tensor, share: Tensor, vectors: Tensor
) -> Tensor:
    u, pull = problem.J.pullback(w, x)
    moved = problem.J.jvp(w, x, vectors.T)
    bent = losses.hessian_product(problem.loss, problem.shaped(u), y, moved)
    return pull(share.view(-1, 1, 1) * bent).T


def _grad(value: Tensor, at: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """Gradients of a value; zero where it does not depend on one."""
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in at]
    found = torch.autograd.grad(value, list(at), allow_unused=True, **settings)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]
