r"""A recorded run: its weights, batches and steps, from which the operators are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk._validate import NotAnalysable
from poprisk.optim.step import StepRule
from poprisk.path.problem import Problem
from poprisk.path.store import VectorTable
from poprisk.printing import described, short_html, short_repr


class StepInterval(NamedTuple):
    r"""One recorded interval: a step, or several of them in strided mode.

    Attributes:
        examples: indices of the training examples seen in it, ascending.
        sampling: the diagonal of :math:`S_k` at them, averaged over the steps.
        rule: of its steps, averaged: numbers, or one per parameter (T,); what the tables of the
            run hold is left to them.
    """

    examples: Tensor
    sampling: Tensor
    rule: StepRule

    __repr__ = short_repr


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
        seconds: that the training took, recording left out; NaN if unknown.
    """

    problem: Problem
    weights: VectorTable
    preconditions: VectorTable
    gains: VectorTable
    intervals: list[StepInterval]
    momentum_in: Tensor
    optimizer: str
    stride: int
    exact: bool
    rule_error: float
    seconds: float = math.nan

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

    _repr_html_ = short_html

    def __len__(self) -> int:
        return len(self.intervals)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(interval.rule.steps for interval in self.intervals)

    @property
    def preconditioned(self) -> bool:
        """Whether steps were scaled by vectors, which the optimizer takes from its gradients."""
        return len(self.preconditions) + len(self.gains) > 0

    def rule(self, k: int, dtype: torch.dtype) -> StepRule:
        """The rule of interval ``k`` over all weights: numbers, or vectors (P, 1)."""
        numels = torch.tensor([p.numel() for p in self.problem.parameters])

        def spread(value: Tensor | float) -> Tensor | float:
            if not isinstance(value, Tensor):
                return value
            return value.repeat_interleave(numels).to(dtype).unsqueeze(1)

        def diagonal(table: VectorTable, value: Tensor | float) -> Tensor | float:
            row = k - len(self.intervals) + len(table)  # numbers until the first vector
            return table[row].to(dtype).unsqueeze(1) if row >= 0 else spread(value)

        *fields, steps = stored = self.intervals[k].rule
        return StepRule(*map(spread, fields), steps=steps)._replace(
            precondition=diagonal(self.preconditions, stored.precondition),
            gain=diagonal(self.gains, stored.gain),
        )

    def trainings(self, seconds: float) -> float:
        """So much time in units of that of the training; NaN where it is unknown."""
        return seconds / self.seconds if self.seconds > 0 else math.nan

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


def check_answers(run: Any) -> None:
    """Raise unless a run says how each of its steps answers to another gradient.

    Raises:
        TypeError: if ``run`` is no recorded run.
        NotAnalysable: if it holds no steps, not every step, or not their exact rules.
    """
    if not isinstance(run, Run):
        raise TypeError(
            "run must be what poprisk.record(...) returns, or the run of a poprisk.Recorder, but "
            f"got {type(run).__name__}."
        )
    if len(run) == 0:
        raise NotAnalysable("the run holds no step, so nothing has left a trace; record some.")
    if run.stride > 1:
        raise NotAnalysable(
            f"the run was recorded every {run.stride} steps, but what a step answers to another "
            "gradient needs every step; record with stride=1."
        )
    if not run.exact:
        raise NotAnalysable(
            f"the preconditioner of {run.optimizer} was read off its steps (realized_update), "
            "which does not say how a step answers to another gradient; train with an optimizer "
            "that has an exact rule, or use poprisk.TwinRisk alone."
        )
