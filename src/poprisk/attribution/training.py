"""A training that repeats from snapshots, bit for bit, and so can be gone through backwards."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import _validate as checks
from poprisk._validate import NotAnalysable
from poprisk.attribution import adam
from poprisk.attribution.adjoint import (
    BackwardStep,
    BatchGradient,
    Pull,
    batch_gradient,
    pull_rule,
)
from poprisk.attribution.steps import FOLLOWED, Settings, State, TakenStep, copied, held_rule
from poprisk.forward_mode import plain_kernels
from poprisk.jacobian import flat
from poprisk.losses import resolve_loss
from poprisk.optim.step import describe
from poprisk.path.batches import Batch, Examples
from poprisk.path.problem import Problem
from poprisk.path.surroundings import Surroundings
from poprisk.path.trial import trained_parameters, tried_problem
from poprisk.printing import described, short_html, short_repr
from poprisk.protocols import PerExampleLoss, ProgressCallback

RESPONSES = ("followed", "held")


MAX_MEMORY = 2**30
"""Bytes that the graphs of a segment's gradients may take."""


class GraphMemory:
    """Keeps the graphs of gradients within a segment as far as memory allows.

    Args:
        max_memory: bytes.

    Attributes:
        kept: whether any was.
    """

    def __init__(self, max_memory: float) -> None:
        self.max_memory, self.kept, self.left = max_memory, False, max_memory
        self.per_example: float | None = None

    def begin(self) -> None:
        """At the start of a segment."""
        self.left = self.max_memory

    def kept_of(self, make: Callable[[], BatchGradient], examples: int) -> BatchGradient | None:
        """The gradient of a batch with its graph; None if that does not fit any more."""
        if self.max_memory <= 0:
            return None
        if self.per_example is None:  # the first one is measured
            with measured_graph() as storages:
                graph = make()
            own = {w.untyped_storage().data_ptr() for w in graph.weights}
            size = sum(n for place, n in storages.items() if place not in own)
            self.per_example = size / max(1, examples)
        elif self.left < self.per_example * examples:
            return None
        else:
            graph = make()
        self.left -= self.per_example * examples
        if self.left < 0:
            return None
        self.kept = True
        return graph


@contextlib.contextmanager
def measured_graph() -> Iterator[dict[int, int]]:
    """Where what autograd saves inside lies, and how many bytes there are at each place."""
    found = dict[int, int]()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


class ReplayState(NamedTuple):
    """Weights and the optimizer's state before a step.

    Attributes:
        step: which one.
        weights: of each parameter.
        state: of each parameter, for optimizers of torch, which round some of it on loading.
        optimizer: the state dict of others.
    """

    step: int
    weights: list[Tensor]
    state: State
    optimizer: dict[str, Any] | None

    __repr__ = short_repr


@dataclass(frozen=True)
class Replay:
    """What :func:`replay` returns.

    Attributes:
        problem: model, loss and data.
        model: a private copy, to be trained again.
        optimizer: its optimizer.
        batches: indices of the training examples of each step.
        settings: of the parameter groups at each step.
        saved: states in their order, the last one at the end.
        seconds: that the training took.
    """

    problem: Problem
    model: nn.Module
    optimizer: Optimizer
    batches: list[Tensor]
    settings: list[list[Settings]]
    saved: list[ReplayState]
    seconds: float

    def __repr__(self) -> str:
        p = self.problem
        return described(
            "Replay",
            type(self.optimizer).__name__,
            f"{len(self.batches):,} steps, {len(self.saved)} states kept",
            f"{p.n:,} training and {p.m:,} query examples",
            f"{p.size:,} weights of a {type(p.model).__name__}",
        )

    _repr_html_ = short_html

    @property
    def final(self) -> Tensor:
        """Flat weights at the end, (P,)."""
        return flat(self.saved[-1].weights)

    @property
    def followed(self) -> bool:
        """Whether autograd goes through the optimizer's whole step."""
        return type(self.optimizer) in FOLLOWED

    @property
    def linear(self) -> bool:
        """Whether the step is linear in its gradients, so that nothing is held."""
        return type(self.optimizer) is torch.optim.SGD

    def backwards(self, response: str, max_memory: float = MAX_MEMORY) -> Iterator[BackwardStep]:
        """The steps, the last one first; each segment between snapshots is trained anew.

        Args:
            response: of second moments to the gradient.
            max_memory: bytes that the graphs of a segment's gradients may take.

        Raises:
            NotAnalysable: if a segment does not end where it did.
        """
        graphs = GraphMemory(max_memory)
        for start, end in reversed([*zip(self.saved, self.saved[1:], strict=False)]):
            steps = [*self._segment(start, end, response, graphs)]
            if graphs.kept and not self._ends(end):
                # Some backward passes round otherwise where they can be differentiated again.
                graphs = GraphMemory(0)
                steps = [*self._segment(start, end, response, graphs)]
            if not self._ends(end):
                raise NotAnalysable(
                    f"trained again from step {start.step}, the run is not at step {end.step} "
                    "where it was: its kernels or data do not repeat (atomic additions on a GPU, "
                    "a model that draws random numbers?). Try "
                    "torch.use_deterministic_algorithms(True)."
                )
            while steps:  # each graph goes as soon as it was used
                yield steps.pop()

    def trained(self, weights: Tensor) -> Tensor:
        """Flat weights at the end of the same training with other weights of the losses, (P,).

        Args:
            weights: of each example's loss, (n,); ones give the recorded run.
        """
        self._load(self.saved[0])
        for k in range(len(self.batches)):
            self._step(k, weights)
        return flat([p.detach() for p in self._params])

    @property
    def _params(self) -> list[nn.Parameter]:
        found = dict(self.model.named_parameters())
        return [found[name] for name in self.problem.names]

    def _load(self, snapshot: ReplayState) -> None:
        with torch.no_grad():
            for p, w in zip(self._params, snapshot.weights, strict=True):
                p.copy_(w)
        if snapshot.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
            return
        self.optimizer.state.clear()
        for p, state in zip(self._params, snapshot.state, strict=True):
            if state:
                self.optimizer.state[p] = {k: copied(v) for k, v in state.items()}

    def _step(
        self, k: int, weights: Tensor | None = None, graph: BatchGradient | None = None
    ) -> None:
        """Take step k again, by a gradient that is there already if a graph is given."""
        for group, settings in zip(self.optimizer.param_groups, self.settings[k], strict=True):
            group.update(settings)
        if graph is None:
            take_step(self.problem, self.model, self.optimizer, self.batches[k], weights)
            return
        for p, g in zip(self._params, graph.gradient, strict=True):
            p.grad = None if g is None else g.detach()
        self.optimizer.step()

    def _segment(
        self, start: ReplayState, end: ReplayState, response: str, graphs: GraphMemory
    ) -> Iterator[BackwardStep]:
        self._load(start)
        graphs.begin()
        params, description = self._params, describe(self.optimizer) if response == "held" else None
        kind = type(self.optimizer)
        for k in range(start.step, end.step):
            batch = self.batches[k]
            share = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64)
            weights = [p.detach().clone() for p in params]
            make = partial(batch_gradient, self.problem, weights, batch, share)
            graph = graphs.kept_of(make, len(batch))
            if description is not None:
                momentum = [description.momentum(p) for p in params]
                if not self.linear:  # goes on changing
                    momentum = [copied(m) for m in momentum]
                self._step(k, graph=graph)
                rule = held_rule(self.optimizer, description, params, weights, momentum)
                pull: Pull = partial(pull_rule, rule)
            elif kind in adam.KINDS:
                self._step(k, graph=graph)
                grads, state = [p.grad for p in params], [self.optimizer.state[p] for p in params]
                pull = adam.adam_step(kind, self._groups(k), weights, grads, state).pull
            else:
                state = _state_of(self.optimizer, params)
                self._step(k, graph=graph)
                grads = [None if p.grad is None else p.grad.clone() for p in params]
                pull = TakenStep(kind, self._groups(k), weights, state, grads).pull
            yield BackwardStep(weights, batch, share, pull, graph)

    def _ends(self, end: ReplayState) -> bool:
        return all(map(torch.equal, self._params, end.weights))

    def _groups(self, k: int) -> list[tuple[Settings, list[int]]]:
        """Settings of each group at step k, and the positions of its parameters."""
        place = {p: i for i, p in enumerate(self._params)}
        return [
            (settings, [place[p] for p in group["params"] if p in place])
            for settings, group in zip(self.settings[k], self.optimizer.param_groups, strict=True)
        ]


def take_step(
    problem: Problem,
    model: nn.Module,
    optimizer: Optimizer,
    batch: Tensor,
    weights: Tensor | None = None,
) -> None:
    """One step on the mean loss of a batch, whose losses may be weighed."""
    x, y = problem.train
    optimizer.zero_grad()
    with plain_kernels(model):  # those of fused attention cannot be differentiated twice
        found = problem.loss(model(x[batch]), y[batch])
        (found if weights is None else found * weights[batch].to(found)).mean().backward()
    optimizer.step()


def replay(
    model: nn.Module,
    loss: str | PerExampleLoss,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    query: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    train: tuple[Tensor, Tensor] | None = None,
    scheduler: Any = None,
    snapshots: int | None = None,
    progress: ProgressCallback | None = None,
) -> Replay:
    r"""Train on ``batches``, one optimizer step each, and keep what it takes to do it again.

    Weights and optimizer state are kept at about :math:`\sqrt{K}` of K steps; going back trains
    each segment once more, so that memory is that of :math:`2\sqrt{K}` states.

    Args:
        model: its outputs are a function of weights and inputs, one row per example.
        loss: per example; a step follows the gradient of its mean over the batch.
        optimizer: takes the steps; may have been used before.
        batches: index tensors into ``train``, or (inputs, targets) pairs of repeating examples.
        query: inputs, or inputs and targets.
        train: the training set; left out, it is the distinct examples of ``batches``.
        scheduler: its ``step()`` is called after each step.
        snapshots: how many to keep; None: the square root of the number of steps.
        progress: told of each step.

    Raises:
        NotAnalysable: if the run cannot be analysed; the message says what would work.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> x = torch.ones(2, 1)
        >>> replay(net, "squared_error", adam, [torch.tensor([0, 1])] * 9, train=(x, 2 * x))
        Replay(Adam, 9 steps, 4 states kept, 2 training and 2 query examples, 2 weights of a Linear)
    """
    if snapshots is not None:
        checks.check_positive("snapshots", snapshots)
    found = Examples(batches, train)
    drawn = [batch.cpu() for batch in found]
    if not drawn:
        raise ValueError("batches is empty: there is no step to take.")
    checks.check_tensors("train", found.train)
    x, y = query if isinstance(query, (tuple, list)) else (query, None)
    points = (found.train[0], None) if x is None else (x, y)
    names = tuple(trained_parameters(model, optimizer))
    with torch.inference_mode(False), torch.enable_grad():
        problem, free = tried_problem(model, resolve_loss(loss), names, found.train, points)
        surroundings = Surroundings(model, problem.model, names, free)
        private, twin = _pair(model, optimizer)
        kept, settings, seconds = _train(
            problem, model, optimizer, drawn, scheduler, snapshots, progress
        )
    if moved := surroundings.changed(thorough=True):
        raise NotAnalysable(
            f"{', '.join(moved[:3])} changed in training, but not by the optimizer (running "
            "statistics, a counter?): outputs depend on it, and it cannot be gone back through."
        )
    return Replay(problem, private, twin, drawn, settings, kept, seconds)


def _pair(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Copies of both that belong together, without gradients."""
    try:
        private, twin = copy.deepcopy((model, optimizer))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise NotAnalysable(
            f"model and optimizer cannot be copied by copy.deepcopy ({checks.first_line(error)})."
        ) from error
    for p in private.parameters():
        p.grad = None
    return private, twin


def _train(
    problem: Problem,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Tensor],
    scheduler: Any,
    snapshots: int | None,
    progress: ProgressCallback | None,
) -> tuple[list[ReplayState], list[list[Settings]], float]:
    steps = len(batches)
    every = math.ceil(steps / (snapshots or math.ceil(math.sqrt(steps))))
    found = dict(model.named_parameters())
    params = [found[name] for name in problem.names]
    kept, settings = list[ReplayState](), list[list[Settings]]()

    def keep(k: int) -> None:
        weights = [p.detach().clone() for p in params]
        own = type(optimizer).load_state_dict is not Optimizer.load_state_dict
        state = copy.deepcopy(optimizer.state_dict()) if own else None
        kept.append(ReplayState(k, weights, [] if own else _state_of(optimizer, params), state))

    seconds = 0.0
    for k, batch in enumerate(batches):
        if k % every == 0:
            keep(k)
        settings.append([_settings(group) for group in optimizer.param_groups])
        began = time.perf_counter()
        take_step(problem, model, optimizer, batch)
        if scheduler is not None:
            scheduler.step()
        seconds += time.perf_counter() - began
        if progress is not None:
            progress(k + 1, steps)
    keep(steps)
    if not all(bool(w.isfinite().all()) for w in kept[-1].weights):
        raise NotAnalysable("the weights are NaN or infinite at the end; lower the learning rate.")
    return kept, settings, seconds


def _settings(group: Mapping[str, Any]) -> Settings:
    """A group's settings as they are now; a learning rate may be a tensor that is written to."""
    return {k: copied(v) for k, v in group.items() if k not in ("params", "param_names")}


def _state_of(optimizer: Optimizer, params: Sequence[Tensor]) -> State:
    return [{k: copied(v) for k, v in optimizer.state.get(p, {}).items()} for p in params]
