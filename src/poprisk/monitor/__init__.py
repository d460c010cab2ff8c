"""A monitor that people keep switched on: what a run learns, measured now and then on the way."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, final

from torch import Tensor, nn

from poprisk._renamed import renamed_names
from poprisk._validate import check_callable, check_positive, check_type
from poprisk.dtensor import sharding_of
from poprisk.evaluation import Forward, call, evaluating
from poprisk.jacobian import inner
from poprisk.monitor.alerts import Alert, Alerts, Condition, Drift, LabelMemorization, Starvation
from poprisk.monitor.quantities import (
    CanaryMemorization,
    Gates,
    Loss,
    Measured,
    Moment,
    NormSignal,
    Quantity,
    Risk,
    Signal,
    TangentKernel,
    check_quantities,
    limit_of,
)
from poprisk.monitor.ranks import Ranks, writes
from poprisk.monitor.sinks import (
    Accelerate,
    Jsonl,
    TensorBoard,
    Trackio,
    WeightsAndBiases,
    as_sinks,
)
from poprisk.monitor.statistics import Statistics
from poprisk.monitor.steps import Gradients, innermost, warn_unwatched, watch
from poprisk.printing import described
from poprisk.protocols import PerExampleLoss

__all__ = [
    "Accelerate",
    "Alert",
    "CanaryMemorization",
    "Condition",
    "Drift",
    "Gates",
    "Jsonl",
    "LabelMemorization",
    "Loss",
    "Measured",
    "NormSignal",
    "Quantity",
    "Risk",
    "RiskMonitor",
    "Signal",
    "Starvation",
    "TangentKernel",
    "TensorBoard",
    "Trackio",
    "WeightsAndBiases",
]

_LOG = logging.getLogger(__name__)

__getattr__ = renamed_names(__name__, Kernel="TangentKernel")


@final
class RiskMonitor:
    """Measure a training run every so many steps, without changing it and without ending it.

    Weights, gradients, optimizer, random numbers and whatever layers keep are bitwise what they
    would be without it (:func:`poprisk.evaluation.evaluating` says how far that goes). Numbers are
    of the examples of one step of the optimizer, at the weights before it, in evaluation mode (no
    dropout, running statistics), per-example gradients exact. What fails is warned about once, by
    name, and becomes NaN.

    A row belongs to a step of the optimizer: all calls of :meth:`step` before it are parts of its
    batch, however many, and the row goes to the sinks when the optimizer steps. A step that a
    GradScaler leaves out is counted, too: it is over when gradients are cleared. Over several
    ranks, sums are pooled when the optimizer steps, and rank 0 writes. FSDP's modules have a loss
    but no signal.

    Args:
        model: the module, wrapped by DistributedDataParallel or torch.compile or not.
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        optimizer: its optimizer, wrapped or not.
        every: steps of the optimizer between measurements; the first step is measured.
        quantities: what to measure; loss, signal and, if there is one, the gate, if left out.
        sinks: paths of JSONL files, TensorBoard writers, runs of wandb or trackio (or these words,
            for the present run), an Accelerator or one of its trackers, or functions of step and
            row; or one of these.
        accumulate: parts of a batch behind one step, if known: the row is written after so many,
            without waiting for the step. Needed only where neither the step can be seen nor
            gradients are cleared by ``zero_grad(set_to_none=True)``.
        forward: from a model and inputs to outputs; ``model(x)`` if left out.
        conditions: what to raise an alert for when rows are written: a warning of the logger
            ``poprisk.monitor``, and in the sinks. If left out, Starvation, LabelMemorization and
            Drift, as far as rows have their numbers; ``()`` for none.

    Attributes:
        rows: steps and numbers measured so far; the last may lack parts still to come.
        alerts: raised so far.
        steps: of the optimizer, so far.

    Raises:
        TypeError, ValueError: for a bad argument.
        OSError: if a file cannot be written.

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
        optimizer: Any,
        *,
        every: int = 50,
        quantities: Sequence[Quantity] | None = None,
        sinks: Any = (),
        accumulate: int | None = None,
        forward: Forward | None = None,
        conditions: Iterable[Condition] | None = None,
    ) -> None:
        check_type("model", model, nn.Module, "a torch.nn.Module")
        check_callable("loss", loss)
        check_positive("every", every)
        if accumulate is not None:
            check_positive("accumulate", accumulate)
        self.model, self.optimizer = inner(model), innermost(optimizer)
        self.loss, self.every, self.forward = loss, every, forward or call
        self.accumulate = accumulate
        self._sharding = sharding_of(self.model)
        self._check_trains()
        if quantities is None:
            gates: list[Quantity] = [Gates()] if hasattr(self.optimizer, "gate_stats") else []
            quantities = [Loss(), Signal(), *gates]
        self.quantities = check_quantities(quantities)
        if conditions is None:
            conditions = (Starvation(), LabelMemorization(), Drift())
        self._conditions = Alerts(conditions)
        self.sinks = as_sinks(sinks)
        self.alerts: list[Alert] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.steps = 0
        self._gradient_names = " and ".join(q.name for q in self.quantities if q.gradients)
        self._limit = limit_of(self.quantities)
        self._params = self._trained()
        readers = [q for q in self.quantities if q.gradients and not isinstance(q, Loss)]
        self._derives = bool(readers)
        modules = any(getattr(q, "modules", True) for q in readers)
        self._statistics = Statistics(self._measured(), modules=modules)
        self._gradients = Gradients()
        self._parts = 0
        self._expected = accumulate or 1
        self._row: dict[str, float] | None = None
        self._unwritten = False
        self._inside = self._heard = False
        self._broken: set[str] = set()
        self._ranks = Ranks()
        self._watched = watch(self.optimizer, self)
        if not self._watched:
            warn_unwatched(optimizer, self._expected)

    def _check_trains(self) -> None:
        """Raise unless the optimizer trains parameters of the model."""
        groups = getattr(self.optimizer, "param_groups", None)
        if not groups:
            raise TypeError(
                f"optimizer must be a torch optimizer, or around one, but got "
                f"{type(self.optimizer).__name__}."
            )
        own = {id(p) for p in self._trained().values()}
        if not own:
            raise ValueError(
                "model has no trainable parameter: all are frozen (requires_grad=False)."
            )
        # FSDP shows other parameters while weights are whole.
        if self._sharding is None and not any(id(p) in own for g in groups for p in g["params"]):
            raise ValueError(
                "optimizer trains none of the model's parameters; pass the optimizer of this "
                "model, made after it was moved or wrapped."
            )

    def __repr__(self) -> str:
        measured = f"{len(self.rows):,} measurements, one every {self.every} steps"
        names = ", ".join(q.name for q in self.quantities)
        return described("RiskMonitor", type(self.model).__name__, measured, f"of {names}")

    def step(self, x: Any, y: Tensor) -> None:
        """Note a batch, or part of one, and measure if it is time.

        Call it before the optimizer steps: the numbers are of the present weights.

        Args:
            x: inputs of the batch.
            y: targets.
        """
        if self._parts and not self._goes_on():
            if self._inside:  # a closure that is evaluated again; the first time counts
                return
            self._close()
        if self._is_time():
            self._add_part(x, y)
        self._parts += 1
        self._gradients.note(self._params)

    def measure(self, parts: Iterable[tuple[Any, Tensor]], *, step: int) -> dict[str, float]:
        """Measure now, whatever the schedule says; for loops that are not one's own.

        Args:
            parts: inputs and targets of the step, in one or several parts.
            step: under which the numbers are written.

        Returns:
            The numbers, by name.
        """
        self._clear()
        self._add(parts)
        row = self._numbers(self._pooled(), step)
        self.rows.append((step, row))
        self._write(step, row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting, and to repeat no alert."""
        return {"steps": self.steps, "holding": self._conditions.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where another monitor was.

        Raises:
            ValueError: if this is no state of a monitor.
        """
        steps = state_dict.get("steps") if isinstance(state_dict, dict) else None
        holding = state_dict.get("holding", {}) if steps is not None else None
        counted = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
        if not counted or not isinstance(holding, dict):
            raise ValueError(
                f"state_dict must be what RiskMonitor.state_dict() returned, but got "
                f"{state_dict!r}."
            )
        self.steps = steps
        self._conditions.load_state_dict(holding)

    def before_step(self) -> None:
        """What the optimizer calls before each of its steps; not for you."""
        self._heard = True
        self._inside = self._parts == 0
        if self._parts:
            self._close()
        elif self._is_time() and self._ranks.pool():
            # A rank without a batch of its own must not let the others wait.
            self._clear()
            self._finish()
            self._publish()

    def after_step(self) -> None:
        """What the optimizer calls after each of its steps; not for you."""
        if self._inside:  # by a closure, in which step() may have been called
            self._close()
        self._inside = False

    def _is_time(self) -> bool:
        return self.steps % self.every == 0

    def _trained(self) -> dict[str, Tensor]:
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    def _clear(self) -> None:
        """Look at parameters anew: some may be frozen since, or others put in their place."""
        self._params = self._trained()
        self._statistics.clear(self._measured())

    def _measured(self) -> dict[str, Tensor]:
        """The parameters whose per-example gradients are taken."""
        if not any(isinstance(q, NormSignal) for q in self.quantities):
            return self._params
        found = {name: p for name, p in self._params.items() if p.ndim == 1}
        if not found:
            raise ValueError(
                "NormSignal() needs trainable parameters of one dimension (gains, biases), and the "
                "model has none; use Signal()."
            )
        return found

    def _goes_on(self) -> bool:
        """Whether a call belongs to the same step of the optimizer as the last one."""
        complete = self._parts >= self._expected
        counting = not self._watched or (self.accumulate is not None and not self._heard)
        if counting and complete:
            return False
        cleared = self._gradients.cleared(self._params)
        if cleared is None:  # nothing to go by: no backward pass has come between
            return self.accumulate is not None and not complete
        return not cleared

    def _add_part(self, x: Any, y: Tensor) -> None:
        if not self._parts:
            self._clear()
        self._add([(x, y)])
        # Ranks wait for each other, and are sure to meet only where the optimizer steps.
        if self._statistics.parts >= self._expected and not self._ranks.pool():
            self._finish()
            if self._statistics.parts == self.accumulate:
                self._publish()

    def _close(self) -> None:
        """The step is over, whether the optimizer took it or not."""
        if self._parts and self._is_time():
            if self._row is None:
                self._finish()
            self._publish()
        if self.accumulate is None and self._watched:
            self._expected = max(self._expected, self._parts)
        self._parts, self._row = 0, None
        self.steps += 1

    def _finish(self) -> None:
        """Measure what there is of the step, in place of what was measured of it before."""
        statistics = self._pooled()
        if not statistics.parts:
            return
        row = self._numbers(statistics, self.steps)
        if self._row is not None:
            self.rows.pop()
        self.rows.append((self.steps, row))
        self._row, self._unwritten = row, True

    def _publish(self) -> None:
        if self._row is not None and self._unwritten:
            self._write(self.steps, self._row)
            self._unwritten = False

    def _add(self, parts: Iterable[tuple[Any, Tensor]]) -> None:
        """Add batches to the statistics; a failure is one of all quantities that need them."""
        found, needed = self._statistics, bool(self._gradient_names)
        how = (self.model, self.loss, self.forward)
        gradients = self._derives and self._sharding is None
        try:
            with evaluating(*how) if needed else nullcontext():
                for x, y in parts:
                    found.parts += 1
                    if needed and self._sharding != "FSDP1":
                        found.add(*how, x, y, gradients=gradients, limit=self._limit)
        except Exception as error:
            found.parts += not found.parts
            found.failed += 1
            self._warn_once(self._gradient_names or "the batch", error)

    def _pooled(self) -> Statistics:
        found = self._statistics
        try:
            return found.pooled() if self._ranks.pool() else found
        except Exception as error:
            found.failed += 1
            self._warn_once("the other ranks", error)
            return found

    def _numbers(self, statistics: Statistics, step: int) -> dict[str, float]:
        moment = Moment(step, self.model, self.optimizer, statistics, self.forward)
        row: dict[str, float] = {}
        left = list(self.quantities)
        looking = any(not isinstance(q, (Loss, Signal, NormSignal, Gates)) for q in left)
        try:
            with evaluating(self.model, self.forward) if looking else nullcontext():
                while left:
                    row |= self._measured_by(left[0], moment)
                    left.pop(0)
        except Exception as error:
            for quantity in left:
                row |= _unknown(quantity)
            self._warn_once(" and ".join(q.name for q in left) or "the model's state", error)
        return row

    def _measured_by(self, quantity: Quantity, moment: Moment) -> dict[str, float]:
        """The numbers of a quantity; NaN, and a warning the first time, if it fails."""
        try:
            found = quantity.measure(moment)
            return {_key(quantity, part): float(value) for part, value in found.items()}
        except Exception as error:
            self._warn_once(quantity.name, error)
            return _unknown(quantity)

    def _warn_once(self, name: str, error: Exception) -> None:
        said = f"the monitor cannot measure {name}: {error or type(error).__name__}"
        self._say_once(f"{said.rstrip('.')}. Training goes on.", name)

    def _say_once(self, message: str, about: str) -> None:
        if about not in self._broken:
            self._broken.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=6)

    def _write(self, step: int, row: dict[str, float]) -> None:
        self._to_sinks(lambda sink: sink(step, row))
        self._conditions.add(step, row)
        for condition in self._conditions.conditions:
            try:
                alert = self._conditions.look(condition)
            except Exception as error:
                self._warn_once(condition.name, error)
                continue
            if alert is not None:
                self._raise(alert)

    def _raise(self, alert: Alert) -> None:
        self.alerts.append(alert)
        if writes():
            _LOG.warning("step %d: %s: %s", alert.step, alert.name, alert.text)
        self._to_sinks(lambda sink: getattr(sink, "alert", _ignore)(alert))

    def _to_sinks(self, write: Callable[[Any], object]) -> None:
        for sink in self.sinks if writes() else ():
            try:
                write(sink)
            except Exception as error:
                self._say_once(
                    f"the monitor cannot write to {sink}: {error or type(error).__name__}. Its "
                    "rows are in .rows; training goes on.",
                    f"sink {id(sink)}",
                )


def _ignore(alert: Alert) -> None:
    """What a function does with an alert."""


def _key(quantity: Quantity, part: str) -> str:
    return f"{quantity.name}/{part}" if part else quantity.name


def _unknown(quantity: Quantity) -> dict[str, float]:
    """NaN under the names that a quantity is known to have."""
    parts = getattr(quantity, "parts", ("",))
    return {_key(quantity, part): math.nan for part in parts}
