"""A monitor that people keep switched on: what a run learns, measured now and then on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import checks
from poprisk.checks import monitor as inputs
from poprisk.evaluation import Forward, call, evaluating
from poprisk.monitor.quantities import (
    CanaryMemorization,
    Gates,
    Kernel,
    Loss,
    Measured,
    Moment,
    Quantity,
    Risk,
    Signal,
)
from poprisk.monitor.sinks import Jsonl, TensorBoard, WeightsAndBiases, as_sink
from poprisk.monitor.statistics import PerExampleLoss, Statistics
from poprisk.printing import described

__all__ = [
    "CanaryMemorization",
    "Gates",
    "Jsonl",
    "Kernel",
    "Loss",
    "Measured",
    "Quantity",
    "Risk",
    "RiskMonitor",
    "Signal",
    "TensorBoard",
    "WeightsAndBiases",
]


@final
class RiskMonitor:
    """Measure a training run every so many steps, without changing it.

    Weights, gradients, optimizer and random numbers are bitwise what they would be without it.
    Numbers are of the step's own examples, in evaluation mode (no dropout, running statistics),
    per-example gradients exact. Over several ranks sums are pooled and rank 0 writes.

    Args:
        model: the module, wrapped by DistributedDataParallel or not.
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        optimizer: its optimizer.
        every: steps between measurements; the first step is measured.
        quantities: what to measure; loss, signal and, if there is one, the gate, if left out.
        sinks: paths of JSONL files, TensorBoard writers, wandb runs, or functions of step and row.
        accumulate: calls of :meth:`step` (parts of a batch) behind one optimizer step.
        forward: from a model and inputs to outputs; ``model(x)`` if left out.

    Attributes:
        rows: steps and numbers measured so far.

    Raises:
        TypeError, ValueError: for a bad argument.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = RiskMonitor(model, lambda u, y: (u - y).square().mean(1), sgd)
        >>> monitor.step(torch.randn(8, 3), torch.randn(8, 1))  # before optimizer.step()
        >>> sorted(monitor.rows[0][1])[:2]
        ['loss', 'signal/noise_scale']
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        optimizer: Optimizer,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Sequence[Any] = (),
        accumulate: int = 1,
        forward: Forward | None = None,
    ) -> None:
        inputs.check_monitored(model, loss)
        checks.check_positive("every", every)
        checks.check_positive("accumulate", accumulate)
        if quantities is None:
            gates: list[Quantity] = [Gates()] if hasattr(optimizer, "gate_stats") else []
            quantities = [Loss(), Signal(), *gates]
        self.quantities = [inputs.check_quantity(q) for q in quantities]
        inputs.check_unique(q.name for q in self.quantities)
        self.sinks = [as_sink(sink) for sink in sinks]
        self.model = _unwrapped(model)
        self.loss, self.optimizer, self.every = loss, optimizer, every
        self.accumulate, self.forward = accumulate, forward or call
        self.calls = 0
        self.rows: list[tuple[int, dict[str, float]]] = []
        trained = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self._statistics = Statistics(trained)
        self._broken: set[str] = set()

    def __repr__(self) -> str:
        measured = f"{len(self.rows):,} measurements, one every {self.every} steps"
        names = ", ".join(q.name for q in self.quantities)
        return described("RiskMonitor", type(self.model).__name__, measured, f"of {names}")

    def step(self, x: Any, y: Tensor) -> None:
        """Count a batch, or part of one, and measure if it is time.

        Call it before the optimizer steps: the numbers are of the present weights. A
        quantity that fails is warned about once and becomes NaN; training goes on.

        Args:
            x: inputs of the batch.
            y: targets.
        """
        step, part = divmod(self.calls, self.accumulate)
        self.calls += 1
        if step % self.every:
            return
        if part == 0:
            self._statistics.clear()
        with evaluating(self.model):
            if any(q.gradients for q in self.quantities):
                self._attempt("gradients", lambda: self._add(x, y))
            if part == self.accumulate - 1:
                self._write(step, self._measure())

    def measure(self, parts: Iterable[tuple[Any, Tensor]], *, step: int) -> dict[str, float]:
        """Measure now, whatever the schedule says; for loops that are not one's own.

        Args:
            parts: inputs and targets of the step, in one or several parts.
            step: under which the numbers are written.

        Returns:
            The numbers, by name.
        """
        self._statistics.clear()
        with evaluating(self.model):
            if any(q.gradients for q in self.quantities):
                for x, y in parts:
                    self._attempt("gradients", lambda x=x, y=y: self._add(x, y))
            row = self._measure()
        self._write(step, row)
        return row

    def _add(self, x: Any, y: Tensor) -> dict[str, float]:
        self._statistics.add(self.model, self.loss, self.forward, x, y)
        return {}

    def _measure(self) -> dict[str, float]:
        moment = Moment(self.model, self.optimizer, self._statistics.pooled(), self.forward)
        row: dict[str, float] = {}
        for quantity in self.quantities:
            found = self._attempt(quantity.name, lambda q=quantity: q.measure(moment))
            row |= {f"{quantity.name}/{k}" if k else quantity.name: v for k, v in found.items()}
        return row

    def _attempt(self, name: str, measure: Any) -> dict[str, float]:
        """What ``measure`` returns; NaN, and a warning the first time, if it fails."""
        try:
            return measure()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self._warn_once(f"the monitor cannot measure {name}: {error} Training goes on.", name)
            return {"": float("nan")}

    def _warn_once(self, message: str, about: str) -> None:
        if about not in self._broken:
            self._broken.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=5)

    def _write(self, step: int, row: dict[str, float]) -> None:
        self.rows.append((step, row))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank() != 0:
            return
        for sink in self.sinks:
            try:
                sink(step, row)
            except OSError as error:
                self._warn_once(
                    f"the monitor cannot write to {sink}: {error}. Its rows are in .rows; training "
                    "goes on.",
                    f"{sink}",
                )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of a data-parallel wrapper, whose forward pass would wait for others."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model
