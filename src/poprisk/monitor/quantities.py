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

from poprisk.evaluation import Forward, outputs_of
from poprisk.monitor import signal as norms
from poprisk.monitor.statistics import Statistics
from poprisk.ntk import entk
from poprisk.risk import Canaries, RiskEstimate


class Moment(NamedTuple):
    """What a quantity may look at: the model in evaluation mode, and the step's statistics."""

    model: nn.Module
    optimizer: Optimizer
    statistics: Statistics
    forward: Forward


class Quantity(Protocol):
    """Something to measure.

    Attributes:
        name: prefix of its numbers.
        gradients: whether it needs the statistics of per-example gradients.

    One that also has ``parts``, the names of its numbers, is NaN under these where it fails.
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
    return found


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
    r"""How much of the gradient is signal, in total and by module.

    With :math:`S=\sum(\mu^2-\Sigma_B/(b-1))`, which is unbiased for :math:`|\nabla R|^2`, and
    noise :math:`V=\sum\Sigma_B/(b-1)` (:mod:`poprisk.monitor.signal`):

    - share: :math:`S/(V+|S|)`, which is :math:`S/\sum\mu^2` unless S is negative. Pure noise has
      0 on average (for :math:`S/\sum\mu^2` it would be less, its denominator being small where
      S is); share_error: its standard error.
    - snr: :math:`\sum\mu^2/V`, 1 for pure noise.
    - noise_scale: the batch size at which signal and noise are equal, :math:`bV/S` (McCandlish et
      al. 2018), infinite where no signal is seen; noise_scale_low and noise_scale_high: two
      standard errors of its reciprocal away. An infinite upper end says that S cannot be told
      from 0, and that noise_scale is no more than its lower end.

    Errors are of the examples' drawing, and NaN where no part of the batch, on no rank, has three
    of them.

    Args:
        modules: whether to write modules one by one too.
    """

    name, gradients, parts = "signal", True, norms.NAMES

    def __init__(self, *, modules: bool = True) -> None:
        self.modules = modules

    def measure(self, moment: Moment) -> dict[str, float]:
        found = moment.statistics
        if not found.whole:
            raise RuntimeError(
                "it needs per-example gradients of whole weights, and FSDP spreads them over "
                "processes; it is left out."
            )
        if found.failed or found.examples < 2:
            return dict.fromkeys(norms.NAMES, math.nan)
        signals = found.signals()
        return {
            "/".join(filter(None, (part, module))): value
            for module, row in signals.items()
            if self.modules or not module
            for part, value in row.parts().items()
        }


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
