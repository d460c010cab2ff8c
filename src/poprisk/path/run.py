r"""A recorded run: its weights, batches and steps, from which the operators are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poprisk.path.problem import Problem
from poprisk.path.store import Table
from poprisk.printing import described, short_repr

SCALARS = ("correction", "carry", "from_momentum", "from_gradient", "coupled", "decay", "sign")
"""What is one number per tensor in a :class:`poprisk.optim.step.StepRule`."""


class Interval(NamedTuple):
    r"""One recorded interval: a step, or ``steps`` of them in strided mode.

    Attributes:
        steps: optimizer steps in it.
        examples: indices of the training examples seen in it, ascending.
        sampling: the diagonal of :math:`S_k` at them, averaged over the steps.
        scalars: :data:`SCALARS` of each tensor, averaged, (T, 7).
        uniform: preconditioner and gain per tensor (T, 2), where they are numbers.
    """

    steps: int
    examples: Tensor
    sampling: Tensor
    scalars: Tensor
    uniform: Tensor

    __repr__ = short_repr


class FlatRule(NamedTuple):
    r"""A :class:`poprisk.optim.step.StepRule` over all weights: numbers, or vectors (P, 1).

    ``steps`` of the recursion :math:`m \leftarrow a m + c\hat g` are taken with one gradient.
    """

    steps: int
    precondition: Tensor | float
    gain: Tensor | float
    correction: Tensor | float
    carry: Tensor | float
    from_momentum: Tensor | float
    from_gradient: Tensor | float
    coupled: Tensor | float
    decay: Tensor | float
    sign: Tensor | float

    __repr__ = short_repr

    def part(self, rows: slice) -> FlatRule:
        """The rule over some of the weights."""
        fields = (v[rows] if isinstance(v, Tensor) else v for v in self[1:])
        return FlatRule(self.steps, *fields)

    def usual(self) -> tuple[float, float] | None:
        """Numbers a and c of one step that reads the momentum itself; None for any other rule."""
        others = (self.from_momentum, self.from_gradient, self.sign)
        numbers = [v for v in (self.carry, self.gain, *others) if not isinstance(v, Tensor)]
        if self.steps != 1 or numbers[2:] != [1.0, 0.0, 1.0]:
            return None
        return numbers[0], numbers[1]

    def readout(self, momentum: Tensor, gradient: Tensor) -> Tensor:
        r"""Sum over the steps of :math:`r = p m + q \hat g`, with m before them."""
        carried, entered = self.weights()
        return carried * momentum + entered * gradient

    def weights(self) -> tuple[Tensor | float, Tensor | float]:
        """How much of the momentum before, and of the gradient, the summed readout holds."""
        a, s = self.carry, self.steps
        if s == 1:  # the sums below are 0/0 for a tensor that gets no gradient, a = 1
            return self.from_momentum * a, self.from_momentum * self.gain + self.from_gradient
        carried = a * (1 - a**s) / (1 - a)
        entered = self.gain * (s - carried) / (1 - a)
        return self.from_momentum * carried, self.from_momentum * entered + self.from_gradient * s

    def advance(self, momentum: Tensor, gradient: Tensor) -> Tensor:
        """The momentum after the steps."""
        a, s = self.carry, self.steps
        if s == 1:
            return a * momentum + self.gain * gradient
        return a**s * momentum + self.gain * (1 - a**s) / (1 - a) * gradient


@dataclass(frozen=True)
class Run:
    """What :func:`poprisk.path.record` returns.

    Attributes:
        problem: model, loss and data.
        weights: flat weights, K+1 rows: before each interval and at the end.
        preconditions: diagonals (P,), a row for each of the last intervals; before the first one
            they are numbers per tensor.
        gains: likewise.
        intervals: K of them.
        momentum_in: momentum that the optimizer brought into the run, (P,).
        optimizer: its class name.
        stride: steps per interval.
        exact: whether the rule of the optimizer is exact, or read off its steps.
        rule_error: largest relative difference between a step and what its rule says.
    """

    problem: Problem
    weights: Table
    preconditions: Table
    gains: Table
    intervals: list[Interval]
    momentum_in: Tensor
    optimizer: str
    stride: int
    exact: bool
    rule_error: float

    def __repr__(self) -> str:
        p = self.problem
        every = "" if self.stride == 1 else f" every {self.stride} steps"
        return described(
            "Run",
            self.optimizer,
            f"{self.steps:,} steps recorded{every}",
            f"{p.n:,} training and {p.m:,} query examples",
            f"{p.size:,} weights of a {type(p.model).__name__}",
            "exact" if self.exact and self.stride == 1 else "approximate",
        )

    def __len__(self) -> int:
        return len(self.intervals)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(interval.steps for interval in self.intervals)

    @property
    def preconditioned(self) -> bool:
        """Whether steps were scaled by vectors, which the optimizer takes from its gradients."""
        return len(self.preconditions) + len(self.gains) > 0

    def rule(self, k: int, dtype: torch.dtype) -> FlatRule:
        """The rule of interval ``k`` over all weights."""
        interval = self.intervals[k]
        numels = torch.tensor([p.numel() for p in self.problem.parameters])

        def spread(column: Tensor) -> Tensor | float:
            if bool((column == column[0]).all()):
                return float(column[0])
            return column.repeat_interleave(numels).to(dtype).unsqueeze(1)

        def diagonal(table: Table, column: Tensor) -> Tensor | float:
            row = k - len(self.intervals) + len(table)  # numbers until the first vector
            return table[row].to(dtype).unsqueeze(1) if row >= 0 else spread(column)

        return FlatRule(
            interval.steps,
            diagonal(self.preconditions, interval.uniform[:, 0]),
            diagonal(self.gains, interval.uniform[:, 1]),
            *(spread(column) for column in interval.scalars.T),
        )

    def describe(self) -> list[str]:
        """What is exact about this run and what is not, one sentence each."""
        notes = []
        if self.exact:
            notes.append(f"The steps of {self.optimizer} are linear in the gradients: exact.")
        else:
            notes.append(
                f"The preconditioner of {self.optimizer} was read off its steps: displacements are "
                "exact, the response to another gradient is that of the diagonal."
            )
        if self.stride > 1:
            notes.append(
                f"Recorded every {self.stride} steps (exponential midpoint): approximate, the "
                "closure error says how far."
            )
        return notes
