r"""Record a run: weights, batches and the optimizer's realized steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import _validate as checks
from poprisk._renamed import renamed_arguments
from poprisk.jacobian import flat
from poprisk.optim.step import Rule, StepRule
from poprisk.path.batches import Batch, Examples
from poprisk.path.run import Run, StepInterval
from poprisk.path.store import Storage
from poprisk.path.watch import StepRead, StepReader
from poprisk.printing import described
from poprisk.protocols import PerExampleLoss, ProgressCallback

MAX_MEMORY = 4 * 2**30


@final
class Recorder:
    r"""Records the steps of an optimizer in a loop of your own.

    Inside the ``with`` block, call :meth:`step` after each ``optimizer.step()`` with the indices
    of the examples behind it (all of them, if gradients were accumulated); the loss must be
    averaged over them. Weights and the realized preconditioner are taken at the moment of the
    optimizer's step, so a scheduler may follow. A step that the optimizer skipped is left out.

    Args:
        model: what is trained; each row of its output belongs to one example.
        loss: per-example loss (b,), or the name of one (:data:`poprisk.losses.LOSSES`).
        optimizer: SGD, Adam, AdamW, RMSprop, PopRiskAdamW, ``gated(...)``, one with a
            ``step_rule`` method, or any with ``rule=``.
        train: inputs and targets of the training set.
        query: inputs, or inputs and targets, of the points to predict; the training inputs if
            left out.
        stride: keep every so many steps only (exponential midpoint, approximate).
        max_memory: bytes that the record may take, in memory or in files.
        directory: keep it in files there; None: in memory.
        rule: for an optimizer without one, such as :func:`poprisk.path.realized_update`.

    Raises:
        NotAnalysable: if the run cannot be analysed; the message says what would work.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x = torch.ones(2, 1)
        >>> with Recorder(net, "squared_error", sgd, train=(x, 2 * x)) as recorder:
        ...     (net(x) - 2 * x).square().mean().div(2).backward()
        ...     sgd.step()
        ...     recorder.step(torch.tensor([0, 1]))
        >>> recorder.run.steps
        1
    """

    @renamed_arguments(budget="max_memory")
    def __init__(
        self,
        model: nn.Module,
        loss: str | PerExampleLoss,
        optimizer: Optimizer,
        *,
        train: tuple[Tensor, Tensor],
        query: Tensor | tuple[Tensor, Tensor] | None = None,
        stride: int = 1,
        max_memory: float = MAX_MEMORY,
        directory: str | Path | None = None,
        rule: Rule | None = None,
    ) -> None:
        checks.check_positive("stride", stride)
        checks.check_number("max_memory", max_memory, low=0.0, include_low=False)
        self._reader = StepReader(
            "Recorder", model, loss, optimizer, train=train, query=query, rule=rule
        )
        self.problem, self.exact = self._reader.problem, rule is None
        storage = Storage(max_memory, directory)
        self.weights = storage.table("weights")
        self.preconditions = storage.table("preconditions")
        self.gains = storage.table("gains")
        self.stride, self.intervals = stride, list[StepInterval]()
        self.pending: list[StepRead] = []

    def __repr__(self) -> str:
        reader = self._reader
        done, optimizer = f"{reader.count:,} steps so far", type(reader.optimizer).__name__
        return described("Recorder", optimizer, done, stride=self.stride)

    def __enter__(self) -> Recorder:
        if len(self.weights):
            raise ValueError("a Recorder records one run; make another for the next.")
        self._reader.begin()
        self.weights.append(flat(self._reader.before))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.end()
        if error is not None:
            return
        self._reader.check_told()
        if self.pending:
            self._close_interval()
        if self._reader.count:
            self._reader.check_ended()

    @property
    def run(self) -> Run:
        """The record so far, whole intervals."""
        reader = self._reader
        return Run(
            self.problem,
            self.weights,
            self.preconditions,
            self.gains,
            self.intervals,
            reader.momentum_in,
            type(reader.optimizer).__name__,
            self.stride,
            self.exact,
            reader.rule_error,
            reader.seconds,
        )

    def step(self, batch: Tensor) -> None:
        """Say which examples (b,), integers, were behind the step just taken.

        Raises:
            ValueError: if they are no indices of training examples, or no step was taken.
            NotAnalysable: if the gradient of that step was another.
        """
        try:
            taken = self._reader.take(batch)
            if taken is not None:
                self.pending.append(taken)
                if len(self.pending) == self.stride:
                    self._close_interval()
        finally:
            self._reader.resume()

    def _close_interval(self) -> None:
        steps, self.pending = self.pending, list[StepRead]()
        tables = {"precondition": self.preconditions, "gain": self.gains}
        fields: dict[str, Any] = {"steps": len(steps)}
        for name in StepRule._fields[:-1]:
            rules = zip(*(s.rules for s in steps), strict=True)
            means = [_mean([getattr(rule, name) for rule in tensor]) for tensor in rules]
            table = tables.get(name)
            if table is not None and (len(table) or any(isinstance(d, Tensor) for d in means)):
                pairs = zip(self._reader.params, means, strict=True)
                table.append(flat([d + torch.zeros_like(p) for p, d in pairs]))
                fields[name] = math.nan
                continue
            numbers = [float(d) for d in means]
            same = all(d == numbers[0] for d in numbers)
            fields[name] = numbers[0] if same else torch.tensor(numbers, dtype=torch.float64)
        total = torch.zeros(self.problem.n, dtype=torch.float64)
        for s in steps:
            total[s.examples] += s.sampling / len(steps)
        examples = total.nonzero().squeeze(1)
        self.intervals.append(StepInterval(examples, total[examples], StepRule(**fields)))
        self.weights.append(flat(self._reader.before))


def _mean(values: list[Tensor | float]) -> Tensor | float:
    return values[0] if len(values) == 1 else sum(values[1:], values[0]) / len(values)


@renamed_arguments(budget="max_memory")
def record(
    model: nn.Module,
    loss: str | PerExampleLoss,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    query: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    train: tuple[Tensor, Tensor] | None = None,
    stride: int = 1,
    max_memory: float = MAX_MEMORY,
    directory: str | Path | None = None,
    rule: Rule | None = None,
    progress: ProgressCallback | None = None,
) -> Run:
    r"""Train on ``batches``, one optimizer step each, and record the run.

    Args:
        model: as for :class:`Recorder`, like all that is not listed here.
        loss: per example; a step follows the gradient of its mean over the batch.
        optimizer: takes the steps.
        batches: index tensors into ``train``, or (inputs, targets) pairs of repeating examples.
        query: inputs, or inputs and targets.
        train: the training set; left out, it is the distinct examples of ``batches``.
        stride: keep every so many steps.
        max_memory: bytes.
        directory: for files.
        rule: of the optimizer.
        progress: told of each step.

    Raises:
        NotAnalysable: if the run cannot be analysed; the message says what would work.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x = torch.ones(2, 1)
        >>> len(record(net, "squared_error", sgd, [torch.tensor([0, 1])] * 3, train=(x, 2 * x)))
        3
    """
    found = Examples(batches, train)
    recorder = Recorder(
        model,
        loss,
        optimizer,
        train=found.train,
        query=query,
        stride=stride,
        max_memory=max_memory,
        directory=directory,
        rule=rule,
    )
    (x, y), per_example = recorder.problem.train, recorder.problem.loss
    total = len(batches) if isinstance(batches, Sized) else None
    with torch.inference_mode(False), torch.enable_grad(), recorder:
        for k, batch in enumerate(found):
            optimizer.zero_grad()
            per_example(model(x[batch]), y[batch]).mean().backward()
            optimizer.step()
            recorder.step(batch)
            if progress is not None:
                progress(k + 1, total)
    return recorder.run
