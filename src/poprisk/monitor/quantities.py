r"""What a monitor can measure.

A quantity has a name and a ``measure`` that returns numbers by name; they are written as
``name/part``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk._validate import check_positive
from poprisk.evaluation import Forward, outputs_of
from poprisk.monitor import signal as norms
from poprisk.monitor.statistics import Statistics
from poprisk.monitor.window import MeasuredSteps
from poprisk.ntk import entk
from poprisk.risk import Canaries, RiskEstimate


class Moment(NamedTuple):
    """What a quantity may look at: the model in evaluation mode, and the step's statistics."""

    step: int

    model: nn.Module
    optimizer: Optimizer
    statistics: Statistics
    forward: Forward


class Quantity(Protocol):
    """Something to measure.

    Attributes:
        name: prefix of its numbers.
        gradients: whether it needs the statistics of per-example gradients.

    One that also has ``parts``, the names of its numbers, is NaN under these where it fails; one
    whose ``modules`` is false needs the statistics of the whole gradient alone.
    """

    name: str
    gradients: bool

    def measure(self, moment: Moment) -> dict[str, float]:
        """The numbers, by name; an empty name stands for the quantity itself."""
        ...


def check_quantities(quantities: Iterable[Any]) -> list[Quantity]:
    """Return quantities as a list if each can be measured, under a name of its own.

    Raises:
        TypeError: if one has no name or no ``measure``.
        ValueError: if two have one name.
    """
    found = list(quantities)
    for q in found:
        if not isinstance(getattr(q, "name", None), str) or not callable(
            getattr(q, "measure", None)
        ):
            raise TypeError(
                "quantities must hold objects of poprisk.monitor such as Signal() or Risk(f), "
                f"but got {q!r}; a function of your own goes in as Measured('name', function)."
            )
    for name, count in Counter(q.name for q in found).items():
        if count > 1:
            raise ValueError(f"quantities must have different names, but two are called {name!r}.")
    if {"signal", "norm_signal"} <= {q.name for q in found}:
        raise ValueError(
            "quantities must have Signal() or NormSignal(), which takes gradients of fewer "
            "parameters, but got both: make a second monitor."
        )
    return found


def limit_of(quantities: Iterable[Quantity]) -> int | None:
    """How many examples of a part of a batch the quantities look at; None: all."""
    found = [q.examples if isinstance(q, NormSignal) else None for q in quantities if q.gradients]
    return found[0] if len(found) == 1 else None


@final
class Loss:
    """Mean loss of the step's examples before the step, without those whose label is ignored.

    An example is ignored if it has no label but the loss's ``ignore_index``, or -100.
    """

    name, gradients = "loss", True

    def measure(self, moment: Moment) -> dict[str, float]:
        found = moment.statistics
        known = found.examples > 0 and not found.failed
        return {"": found.loss / found.examples if known else math.nan}


@final
class Signal:
    r"""How much of the gradient is signal, in total and by module, over the last measured steps.

    With :math:`S=\sum(\mu^2-\Sigma_B/(b-1))`, which is unbiased for :math:`|\nabla R|^2`, and
    noise :math:`V=\sum\Sigma_B/(b-1)` (:mod:`poprisk.monitor.signal`), and with bars for means over
    the steps of the window, those measured last:

    - steps: how many there are in the window; 1 in the first row.
    - share: :math:`\bar S/(\bar V+|\bar S|)`, a ratio of sums over the window, which is
      :math:`\bar S/\sum\mu^2` unless negative; corrected for the bend of the ratio, so that it is
      right on average and may leave [-1, 1] a little. Pure noise has 0 on average. share_error: its
      standard error. Both are NaN below 4 steps (or ``window``), as one batch tells too little:
      with noise of one to ten directions it reads 0.15 to 0.4 on average where the share is 0.5.
    - share_low, share_high: the share's interval, from the first row on. It holds the truth more
      often than two errors do where the noise has few directions (those 85%).
    - snr: :math:`1+\bar S/\bar V`, 1 for pure noise.
    - noise_scale: the batch size at which signal and noise are equal, :math:`B\bar V/\bar S`
      (McCandlish et al. 2018), infinite where no signal is seen; noise_scale_low and
      noise_scale_high: two standard errors of its reciprocal away. An infinite upper end says that
      the signal cannot be told from 0, and that noise_scale is no more than its lower end.

    Errors are of the examples' drawing. Where no part of the batch, on no rank, has three examples,
    they are those of steps from each other, with the quantile of Student's t in the place of 2 in
    intervals, and NaN with one step. A step whose gradients are not
    finite has NaN and does not go into the window. A resumed run begins with an empty window.

    Args:
        modules: whether to write modules one by one too.
        window: measured steps behind a row, this one and those before; 1 is this batch alone, whose
            share is biased towards zero.

    Raises:
        TypeError, ValueError: if ``window`` is not a positive integer.
    """

    name, gradients, parts = "signal", True, ("steps", *norms.NAMES)

    def __init__(self, *, modules: bool = True, window: int = 8) -> None:
        self.modules = modules
        self._window = MeasuredSteps(window)

    def measure(self, moment: Moment) -> dict[str, float]:
        return _signal_numbers(moment, self._window, modules=self.modules)


@final
class NormSignal:
    r"""The signal of gains and biases alone, a fraction of the cost of :class:`Signal`.

    The parameters of one dimension: scales of normalizations, and biases, as nanoGNS takes those of
    normalization layers (Gray et al. 2024, arXiv:2411.00999). Their per-example gradients need no
    products of large matrices. The numbers are those of :class:`Signal`, named ``norm_signal/…``,
    of these parameters and **not of the whole gradient**: in two networks without normalization the
    noise scale of the whole was four and seven times that of the biases before training
    (:doc:`/how-to/fast`). It takes the place of Signal; for both, make two monitors.

    Args:
        examples: how many of each part of a batch to look at, the first (a shuffled batch has no
            order); None, or :class:`Loss` beside it: all. The share is that of the whole batch.
            Inputs of other structures than tensors, lists, tuples and dicts of them need None.
        window: as for Signal.

    Raises:
        TypeError, ValueError: if an argument is not a positive integer.
    """

    name, gradients, parts = "norm_signal", True, ("steps", *norms.NAMES)
    modules = False

    def __init__(self, *, examples: int | None = 16, window: int = 8) -> None:
        if examples is not None:
            check_positive("examples", examples)
        self.examples = examples
        self._window = MeasuredSteps(window)

    def measure(self, moment: Moment) -> dict[str, float]:
        return _signal_numbers(moment, self._window, modules=False)


def _signal_numbers(moment: Moment, window: MeasuredSteps, *, modules: bool) -> dict[str, float]:
    found = moment.statistics
    if not found.whole:
        raise RuntimeError(
            "it needs per-example gradients of whole weights, and FSDP spreads them over "
            "processes; it is left out."
        )
    unknown = dict.fromkeys(norms.NAMES, math.nan) | {"steps": float(len(window.steps))}
    if found.failed or found.examples < 2:
        return unknown
    signals = {k: v for k, v in found.signals().items() if modules or not k}
    if not all(math.isfinite(v.norm) and math.isfinite(v.square) for v in signals.values()):
        return unknown
    window.add(moment.model, moment.step, signals)
    return window.numbers()


@final
class Gates:
    """What the gate of :class:`poprisk.PopRiskAdamW` lets through, by module."""

    name, gradients = "gate", False

    def measure(self, moment: Moment) -> dict[str, float]:
        if not hasattr(moment.optimizer, "gate_stats"):
            raise TypeError(
                "Gates() needs PopRiskAdamW or poprisk.gated(...), but got "
                f"{type(moment.optimizer).__name__}."
            )
        stats = moment.optimizer.gate_stats(moment.model)
        parts = ("pass_rate", "update_ratio", "starved")
        return {f"{p}/{m}": float(getattr(row, p)) for m, row in stats.items() for p in parts}


@final
class Risk:
    """An estimate of population risk.

    Args:
        estimate: makes it, as in ``lambda: twin.estimate(x, y)``.
    """

    name, gradients = "risk", False

    def __init__(self, estimate: Callable[[], RiskEstimate]) -> None:
        self.estimate = estimate

    def measure(self, moment: Moment) -> dict[str, float]:
        found = self.estimate()
        return {
            "": found.value if found.valid else math.nan,
            "error": found.standard_error,
            "valid": float(found.valid),
            "dof": found.dof,
            "train_loss": found.train_loss,
        }


@final
class CanaryMemorization:
    """How much of planted labels is memorized.

    Args:
        canaries: planted.
        x: inputs of the canaries, in the order of their index.
    """

    name, gradients = "canaries", False

    def __init__(self, canaries: Canaries, x: Any) -> None:
        self.canaries, self.x = canaries, x

    def measure(self, moment: Moment) -> dict[str, float]:
        found = self.canaries.memorization(outputs_of(moment.model, self.x, moment.forward))
        return {"": found.value, "error": found.standard_error}


@final
class TangentKernel:
    r"""Top eigenvalues of the tangent kernel on probe inputs, and its drift since the first look.

    drift: :math:`\|K_t-K_0\|_F/\|K_0\|_F`.

    Args:
        x: a few inputs, n.
        count: eigenvalues.
    """

    name, gradients = "kernel", False

    def __init__(self, x: Tensor, *, count: int = 3) -> None:
        self.x, self.count = x, count
        self.first: Tensor | None = None

    def measure(self, moment: Moment) -> dict[str, float]:
        k = entk(moment.model, self.x, outputs="trace").dense().detach()
        if self.first is None:
            self.first = k.clone()
        drift = torch.linalg.matrix_norm(k - self.first) / torch.linalg.matrix_norm(self.first)
        values = torch.linalg.eigvalsh(k).flip(0)[: self.count].tolist()
        return {"drift": float(drift), **{f"top{i + 1}": v for i, v in enumerate(values)}}


@final
class Measured:
    """A function of your own.

    Args:
        name: what to call it.
        function: without arguments, to a number or to numbers by name.
    """

    gradients = False

    def __init__(self, name: str, function: Callable[[], float | Mapping[str, float]]) -> None:
        self.name, self.function = name, function

    def measure(self, moment: Moment) -> dict[str, float]:
        found = self.function()
        return dict(found) if isinstance(found, Mapping) else {"": float(found)}
