r"""The four cells in lockstep with training, without a record of it.

What :func:`poprisk.path.trace_cells` reads from a record is needed one step at a time: the weights
before and after it, the batch, and the optimizer's rule. So the same recursion runs beside the
training, and keeps a few copies of the weights in place of one for every step. THEORY §4 (ours).
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import TracebackType
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import _validate as checks
from poprisk.jacobian import flat
from poprisk.optim.step import Rule, joined
from poprisk.path.checks import check_memory
from poprisk.path.closure import Closure
from poprisk.path.march import Followed, March, is_early
from poprisk.path.problem import Problem
from poprisk.path.quadrature import Nodes, composite
from poprisk.path.trace import CellTrace, QueryParts, check_clean, energies, split_at, trace_of
from poprisk.path.watch import StepRead, StepReader
from poprisk.printing import described
from poprisk.protocols import PerExampleLoss

MAX_MEMORY = 4 * 2**30
PASSES = {"all": 1, "noise": 2}
"""Passes over the data between updates of all outputs, by what is followed."""
CHECKED = 32
"""Examples of each set whose movement along the chords is checked where not all is followed."""
COPIES = {"all": 30, "noise": 22}
"""Copies of the weights that are held at the peak, the training's own not counted."""
OUTPUTS = {"all": 22, "noise": 10}
"""Copies of all outputs, likewise."""


@final
class CellTracer:
    r"""Splits the movement of the query outputs into signal and label noise while you train.

    Inside the ``with`` block, call :meth:`step` after each ``optimizer.step()`` with the indices of
    the examples behind it, as for a :class:`poprisk.Recorder`. The training is bit for bit what it
    is without. The result is that of :func:`poprisk.trace_cells` on a record of the same run with
    the same ``every`` and ``quadrature``, but no record is needed: memory does not grow with the
    number of steps.

    Args:
        model: what is trained; each row of its output belongs to one example.
        loss: per-example loss (b,), or the name of one (:data:`poprisk.losses.LOSSES`).
        optimizer: SGD, Adam, AdamW, RMSprop, PopRiskAdamW, ``gated(...)``, one with a
            ``step_rule`` method, or any with ``rule=``.
        train: inputs and targets of the training set, labels as noisy as they are.
        clean_targets: training targets without the label noise, in the form of the targets.
        query: inputs, or inputs and targets, of the points to predict; the training inputs if
            left out.
        parts: ``"all"``; or ``"noise"``, which follows nothing else and is the cheaper: what is
            left of the movement, weight decay's part included, then counts as signal.
        every: steps between updates of all outputs; None: one pass over the data, two where only
            the noise is followed. 1 is exact. Before the first of them there are some after 1, 2,
            4, ... steps.
        quadrature: of the chords in between; ``"gauss3"`` is exact.
        points: moments that are kept at least, if there are so many updates; at most twice as many.
        max_memory: bytes that may be taken beside the training.
        rule: for an optimizer without one, such as :func:`poprisk.path.realized_update`.

    Raises:
        NotAnalysable: if the training cannot be followed; the message says what would work.
        ValueError: if ``clean_targets`` does not fit, or for bad settings.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> x, noisy, clean = torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
        >>> with CellTracer(
        ...     net, "squared_error", sgd, train=(x, noisy), clean_targets=clean
        ... ) as tracer:
        ...     (net(x) - noisy).square().mean().div(2).backward()
        ...     sgd.step()
        ...     tracer.step(torch.tensor([0, 1]))
        >>> tracer.trace().parts[-1].noise.tolist()
        [[0.5], [0.5]]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | PerExampleLoss,
        optimizer: Optimizer,
        *,
        train: tuple[Tensor, Tensor],
        clean_targets: Tensor,
        query: Tensor | tuple[Tensor, Tensor] | None = None,
        parts: str = "all",
        every: int | None = None,
        quadrature: str = "midpoint",
        points: int = 30,
        max_memory: float = MAX_MEMORY,
        rule: Rule | None = None,
    ) -> None:
        checks.check_choice("parts", parts, PASSES)
        if every is not None:
            checks.check_positive("every", every)
        checks.check_positive("points", points)
        checks.check_number("max_memory", max_memory, low=0.0, include_low=False)
        self._nodes = composite(quadrature, 1)
        checks.check_tensors("train", train)
        check_clean(clean_targets, train[1])
        self._reader = StepReader(
            "CellTracer",
            model,
            loss,
            optimizer,
            train=train,
            query=query,
            rule=rule,
            thorough=False,
        )
        self._parts, self._every, self._points = parts, every, points
        self._clean, self._problem = clean_targets, _beside(self._reader.problem)
        self._check_memory(max_memory)
        self._updates, self._gap = 0, 1
        self._passing = False  # whether the last moment is to be replaced by the next
        self._seconds = 0.0
        self._march: March | None = None
        self._chords: _Chords | None = None

    def _check_memory(self, max_memory: float) -> None:
        problem, size = self._problem, self._reader.params[0].element_size()
        outputs = (problem.n + problem.m) * problem.c
        needed = size * (COPIES[self._parts] * problem.size + OUTPUTS[self._parts] * outputs)
        cheaper = 'follow the noise alone (parts="noise"), ' if self._parts == "all" else ""
        instead = f"{cheaper}pass fewer examples, or raise max_memory=."
        check_memory(needed, max_memory, "following this training", instead)

    def __repr__(self) -> str:
        reader = self._reader
        done, optimizer = f"{reader.count:,} steps so far", type(reader.optimizer).__name__
        return described("CellTracer", optimizer, done, parts=self._parts)

    def __enter__(self) -> CellTracer:
        if self._march is not None:
            raise ValueError("a CellTracer follows one training; make another for the next.")
        began = self._reader.now()
        self._reader.begin()
        w, momentum = flat(self._reader.before), self._reader.momentum_in
        with torch.inference_mode(False), torch.enable_grad():
            signal, noise = split_at(self._problem, self._clean, w)
            self._energy = energies(torch.stack([signal, noise], -1))
            if self._parts == "noise":
                self._march = March(self._problem, w, noise.unsqueeze(-1), self._nodes)
                self._chords = _Chords(self._problem, w, self._nodes)
            else:
                probes = torch.stack([signal, noise], -1)
                carried = momentum if bool(momentum.any()) else None
                self._march = March(self._problem, w, probes, self._nodes, momentum=carried)
        self._seconds += self._reader.resume() - began
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
        self._reader.problem.check_data()
        if self._march is not None and not self._march.fresh:
            began = self._reader.now()
            self._update(self._march)
            self._seconds += self._reader.now() - began
        if self._reader.count:
            self._reader.check_ended()

    def step(self, batch: Tensor) -> None:
        """Say which examples (b,), integers, were behind the step just taken.

        Raises:
            ValueError: if they are no indices of training examples, or no step was taken.
            NotAnalysable: if the gradient of that step was another.
        """
        began = self._reader.now()
        try:
            taken = self._reader.take(batch)
            if taken is not None:
                self._advance(taken)
        finally:
            self._seconds += self._reader.resume() - began

    @property
    def cost(self) -> float:
        """Time that following took, in units of that of the training itself; NaN before a step."""
        spent, training = self._seconds + self._reader.spent, self._reader.seconds
        return spent / training if training > 0 else float("nan")

    def trace(self) -> CellTrace:
        """The cells at the last update of all outputs; after the block, at the end.

        Raises:
            ValueError: before the block.
        """
        if self._march is None:
            raise ValueError("nothing was followed: train inside of `with tracer:`.")
        with torch.inference_mode(False), torch.enable_grad():
            followed, shape = self._march.result(), self._problem.output_shape
            if self._chords is None:
                found = trace_of(followed, shape, self._energy)
            else:
                found = _rest_as_signal(followed, shape, self._energy, self._chords.closure())
        found.closure.warn(
            'Pass every=1, quadrature="gauss3" to be exact; gradients that were clipped or masked '
            "do that too.",
            stacklevel=2,
        )
        return found

    def _advance(self, taken: StepRead) -> None:
        """Take the step with every part, and update all outputs if they are due."""
        march = self._march
        assert march is not None  # the reader reads nothing outside of the block
        if self._every is None:
            seen = PASSES[self._parts] * self._problem.n
            self._every = max(1, round(seen / len(taken.examples)))
        with torch.inference_mode(False), torch.enable_grad():
            rule = joined(taken.rules, self._reader.params).column()
            if rule.decays and self._parts == "all" and not march.affine:
                march.open_affine()
            march.advance(rule, taken.examples, taken.sampling, flat(self._reader.before))
            if march.steps % self._every == 0:
                self._update(march)
            elif is_early(march.steps, self._every):
                self._update(march, early=True)

    def _update(self, march: March, *, early: bool = False) -> None:
        """Move all outputs to where they are now; of past moments only so many stay."""
        with torch.inference_mode(False), torch.enable_grad():
            march.refresh()
            if self._chords is not None:
                self._chords.follow(march.w)
        if self._passing:
            march.moments.pop()
        march.keep()
        if not early:
            self._updates += 1
            if len(march.moments) > 2 * self._points and self._updates % self._gap == 0:
                march.moments[:] = march.moments[::2]
                self._gap *= 2
        self._passing = early or self._updates % self._gap != 0


def _rest_as_signal(
    followed: Followed, output_shape: tuple[int, ...], energy: Tensor, closure: Closure
) -> CellTrace:
    """The cells where only the noise was followed."""
    start, parts = followed.moments[0].outputs, list[QueryParts]()
    for step, moved, outputs in followed.moments:
        noise, nothing = (-moved).unbind(-1)
        parts.append(QueryParts(step, outputs - start - noise, noise, nothing, outputs))
    left = float(energies(followed.applied.gradient)[0] / energy[1])
    return CellTrace(start, parts, closure, output_shape, (math.nan, left))


class _Chords:
    """How far the chords between updates predict the movement of outputs, for some examples."""

    def __init__(self, problem: Problem, w: Tensor, nodes: Nodes) -> None:
        (x, y), (points, _) = problem.train, problem.query
        rows, others = _spread(problem.n), _spread(problem.m)
        some = replace(problem, train=(x[rows], y[rows]), query=(points[others], None))
        g = some.output_gradient(some.J.values(w, some.train[0]))
        self._march = March(some, w, g.unsqueeze(-1), nodes)

    def follow(self, w: Tensor) -> None:
        """Go on to weights ``w``, by a step that is all of the chord."""
        march = self._march
        march.moved[:, 0] = march.origin - w
        march.w = w
        march.refresh()
        del march.moments[1:]
        march.keep()

    def closure(self) -> Closure:
        """So far."""
        return self._march.result().closure()


def _spread(examples: int) -> Tensor:
    """Positions of some examples, all over the set."""
    count = min(CHECKED, examples)
    return torch.arange(count) * examples // count


def _beside(problem: Problem) -> Problem:
    """The same problem with its data where the weights are."""
    device = problem.parameters[0].device
    x, y = problem.query
    return replace(
        problem,
        train=(problem.train[0].to(device), problem.train[1].to(device)),
        query=(x.to(device), None if y is None else y.to(device)),
    )
