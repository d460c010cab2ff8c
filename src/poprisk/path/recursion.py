r"""The linear recursion that momentum and weights follow along a recorded run, in many columns.

With second moments, masks and learning rates as they were, each column answers to the columns
:math:`\partial` of the batch's gradient as the run did to its own:

.. math::
    \hat g = \sigma\,\partial + \lambda z,\quad m \leftarrow a m + c \odot \hat g,\quad
    r = p\, m + q\, \hat g,\quad V = \gamma\,\eta M \odot r + \delta z

with z what weight decay acts on: the weights of the run, in the column of what is affine, or what
each column itself has moved. The dense operators, a few vectors and deletions of examples differ in
where :math:`\partial` comes from, and in what is made of V. THEORY §3 (ours).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from poprisk.optim.step import StepRule
from poprisk.path.run import Run


@final
class Recursion:
    """Columns of the momentum, and of what they moved.

    Attributes:
        momentum: m, (P, r); advanced in place.
        moved: (P, r), likewise, for decay to act on; None: it does not.
    """

    def __init__(self, momentum: Tensor, moved: Tensor | None = None) -> None:
        self.momentum, self.moved = momentum, moved

    @classmethod
    def of_run(cls, run: Run, columns: int, dtype: torch.dtype) -> Recursion:
        """No momentum but the last column's, which holds what was brought in."""
        momentum = torch.zeros(run.problem.size, columns, dtype=dtype)
        momentum[:, -1] = run.momentum_in.to(dtype)
        return cls(momentum)

    def step(
        self,
        rule: StepRule,
        gradient: Tensor,
        factor: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        rows: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        r"""Take a step with some of the weights.

        Args:
            rule: of those weights.
            gradient: :math:`\partial` (P, r); or (P, b), its left factor, which is faster.
            factor: the right one, (b, r).
            weights: their values, which decay acts on in the last column; None: on what was moved.
            rows: their positions.

        Returns:
            r, summed over the steps of the rule, and V, each (P, r); the first may be the momentum.
        """
        m, z = self.momentum[rows], None
        if weights is not None:
            z = weights.unsqueeze(1)
        elif self.moved is not None:
            z = self.moved[rows]
        usual = rule.usual()
        if usual is not None and factor is not None:
            carry, gain = usual
            r = m.addmm_(gradient, factor, beta=carry, alpha=gain)
            _add(r, gain * rule.coupled, z)
        else:
            g = rule.sign * (gradient if factor is None else gradient @ factor)
            _add(g, rule.coupled, z)
            after, r = rule.take(m, g)
            m.copy_(after)
        V = r * (rule.correction * rule.precondition)
        _add(V, rule.decay * rule.steps, z)
        if self.moved is not None:
            self.moved[rows] -= V
        return r, V


def _add(columns: Tensor, rate: Tensor | float, z: Tensor | None) -> None:
    """Add decay to the last columns."""
    if z is not None:
        columns[:, columns.shape[1] - z.shape[1] :] += rate * z
