r"""Record a run: weights, batches and the optimizer's realized steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import checks
from poprisk.checks.examples import check_separate
from poprisk.evaluation import outputs_of
from poprisk.forward_mode import plain_kernels
from poprisk.path import checks as refuse
from poprisk.path import losses
from poprisk.path.batches import Batch, Examples
from poprisk.path.losses import Loss, resolve_loss
from poprisk.path.problem import Problem, flat
from poprisk.path.rules import Facts, Rule, StepRule, describe
from poprisk.path.run import SCALARS, Interval, Run
from poprisk.path.store import Storage
from poprisk.printing import described

Progress = Callable[[int, int | None], None]
"""Called with how many steps are done, and of how many (None: unknown)."""

BUDGET = 4 * 2**30
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
RULE_TOLERANCE = {torch.float32: 2e-2, torch.float64: 1e-6}


@final
class Recorder:
    r"""Records the steps of an optimizer in a loop of your own.

    Inside the ``with`` block, call :meth:`step` after each ``optimizer.step()`` with the indices
    of the examples behind it (all of them, if gradients were accumulated); the loss must be
    averaged over them. Weights and the realized preconditioner are taken at the moment of the
    optimizer's step, so a scheduler may follow. A step that the optimizer skipped is left out.

    Args:
        model: what is trained; each row of its output belongs to one example.
        loss: per-example loss (b,), or the name of one (:data:`poprisk.path.losses.LOSSES`).
        optimizer: SGD, Adam, AdamW, RMSprop, PopRiskAdamW, ``gated(...)``, one with a
            ``step_rule`` method, or any with ``rule=``.
        train: inputs and targets of the training set.
        query: inputs, or inputs and targets, of the points to predict; the training inputs if
            left out.
        stride: keep every so many steps only (exponential midpoint, approximate).
        budget: bytes that the record may take.
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

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss,
        optimizer: Optimizer,
        *,
        train: tuple[Tensor, Tensor],
        query: Tensor | tuple[Tensor, Tensor] | None = None,
        stride: int = 1,
        budget: float = BUDGET,
        directory: str | Path | None = None,
        rule: Rule | None = None,
    ) -> None:
        checks.check_positive("stride", stride)
        checks.check_tensors("train", train)
        self.model, self.optimizer = model, optimizer
        self.rule, self.momentum_of = describe(optimizer, rule)
        self.exact = rule is None
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        named = {n: p for n, p in model.named_parameters() if id(p) in groups}
        refuse.check_foreign(len(groups) - len(named))
        self.params = list(named.values())
        refuse.check_weights(list(self.params))
        self.groups = [groups[id(p)] for p in self.params]
        points = (train[0], None) if query is None else query
        x, y = points if isinstance(points, (tuple, list)) else (points, None)
        refuse.check_repeatable(model, train[0][:8])
        with plain_kernels(model):
            first = outputs_of(model, train[0][:2])
        per_example = resolve_loss(loss)
        check_separate(
            per_example, first, train[1][:2], losses.values(per_example, first, train[1][:2])
        )
        shape = tuple(first.shape[1:])
        self.problem = Problem(
            copy.deepcopy(model), per_example, train, (x, y), tuple(named), shape
        )
        storage = Storage(budget, directory)
        self.weights = storage.table("weights")
        self.preconditions = storage.table("preconditions")
        self.gains = storage.table("gains")
        self.stride, self.intervals = stride, list[Interval]()
        self.pending: list[_Step] = []
        self.count, self.rule_error = 0, 0.0
        self._taken: tuple[list[StepRule], Tensor] | None = None

    def __repr__(self) -> str:
        optimizer = type(self.optimizer).__name__
        return described("Recorder", optimizer, f"{self.count:,} steps so far", stride=self.stride)

    def __enter__(self) -> Recorder:
        self.before = [p.detach().clone() for p in self.params]
        self.weights.append(flat(self.before))
        self.momentum = [self._momentum_in(p) for p in self.params]
        self.started = [self.momentum_of(p) is not None for p in self.params]
        self.momentum_in = flat(self.momentum)
        self.skipped = getattr(self.optimizer, "skipped_steps", 0)
        self.handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        if error is None and self.pending:
            self._close_interval()

    @property
    def run(self) -> Run:
        """The record so far, whole intervals."""
        return Run(
            self.problem,
            self.weights,
            self.preconditions,
            self.gains,
            self.intervals,
            self.momentum_in,
            type(self.optimizer).__name__,
            self.stride,
            self.exact,
            self.rule_error,
        )

    def step(self, batch: Tensor) -> None:
        """Say which examples (b,), integers, were behind the step just taken.

        Raises:
            ValueError: if they are no indices of training examples, or no step was taken.
            NotAnalysable: if the gradient of that step was another.
        """
        refuse.check_indices(batch, self.problem.n)
        if self._taken is None:
            if getattr(self.optimizer, "skipped_steps", 0) > self.skipped:
                self.skipped += 1
                return
            raise ValueError("call Recorder.step(batch) once after each optimizer.step().")
        rules, grad = self._taken
        self._taken = None
        self.count += 1
        if self.count & (self.count - 1) == 0:
            self._check_gradient(batch, grad)
        self.before = [p.detach().clone() for p in self.params]
        examples, counts = batch.cpu().unique(return_counts=True)
        sampling = counts.double() * (self.problem.n / len(batch))
        self.pending.append(_Step(rules, examples, sampling))
        if len(self.pending) == self.stride:
            self._close_interval()

    def _momentum_in(self, p: Tensor) -> Tensor:
        found = self.momentum_of(p)
        return torch.zeros_like(p) if found is None else found.detach().clone().to(p.dtype)

    def _before_step(self, *_: Any) -> None:
        if self._taken is not None:
            raise ValueError("call Recorder.step(batch) once after each optimizer.step().")
        pairs = zip(self.params, self.before, strict=True)
        refuse.check_untouched(all(torch.equal(p, b) for p, b in pairs))
        self.grads = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.params
        ]

    def _after_step(self, *_: Any) -> None:
        if getattr(self.optimizer, "skipped_steps", 0) > self.skipped:
            return
        rules, worst, size = list[StepRule](), 0.0, 0.0
        for i, p in enumerate(self.params):
            rule, error, norm = self._apply_rule(i, p)
            rules.append(rule)
            worst, size = worst + error, size + norm
        relative = (worst / size) ** 0.5 if size > 0 else 0.0
        self.rule_error = max(self.rule_error, relative)
        name = type(self.optimizer).__name__
        refuse.check_rule_error(relative, RULE_TOLERANCE[self.params[0].dtype], name)
        self._taken = rules, flat(self.grads)

    def _apply_rule(self, i: int, p: Tensor) -> tuple[StepRule, float, float]:
        """The rule of tensor ``i``; squared error and size of the step it implies."""
        if p.grad is None:
            return StepRule(precondition=0.0, carry=1.0, gain=0.0), 0.0, 0.0
        w, grad, update = self.before[i], self.grads[i], p.detach() - self.before[i]
        state = self.optimizer.state.get(p, {})
        facts = Facts(self.groups[i], state, not self.started[i], update, grad, w, self.momentum[i])
        rule = self.rule(p, facts)
        self.started[i] = True
        g = rule.sign * grad + rule.coupled * w
        self.momentum[i] = m = rule.carry * self.momentum[i] + rule.gain * g
        r = rule.from_momentum * m + rule.from_gradient * g
        implied = -rule.correction * rule.precondition * r - rule.decay * w
        # what rounding of the weights themselves can do to their difference is no error
        slack = 2 * torch.finfo(w.dtype).eps * w.abs()
        difference = ((implied - update).abs() - slack).clamp_min(0)
        return rule, float(difference.square().sum()), float(update.square().sum())

    def _check_gradient(self, batch: Tensor, grad: Tensor) -> None:
        problem, w = self.problem, flat(self.before)
        x, y = problem.train[0][batch], problem.train[1][batch]
        with torch.enable_grad():
            w.requires_grad_()
            u = problem.shaped(problem.outputs(w, x))
            (expected,) = torch.autograd.grad(problem.loss(u, y).mean(), w)
        error = float((grad - expected).norm() / expected.norm().clamp_min(1e-30))
        refuse.check_gradient(self.count, error, GRADIENT_TOLERANCE[w.dtype])

    def _close_interval(self) -> None:
        steps, self.pending = self.pending, list[_Step]()
        diagonals = {
            key: [_mean([getattr(s.rules[i], key) for s in steps]) for i in range(len(self.params))]
            for key in ("precondition", "gain")
        }
        uniform = torch.zeros(len(self.params), 2, dtype=torch.float64)
        for j, (key, table) in enumerate(
            (("precondition", self.preconditions), ("gain", self.gains))
        ):
            if len(table) or any(isinstance(d, Tensor) for d in diagonals[key]):
                pairs = zip(self.params, diagonals[key], strict=True)
                table.append(flat([d + torch.zeros_like(p) for p, d in pairs]))
            else:
                uniform[:, j] = torch.tensor(diagonals[key], dtype=torch.float64)
        scalars = torch.tensor(
            [[[getattr(r, name) for name in SCALARS] for r in s.rules] for s in steps],
            dtype=torch.float64,
        ).mean(0)
        total = torch.zeros(self.problem.n, dtype=torch.float64)
        for s in steps:
            total[s.examples] += s.sampling / len(steps)
        examples = total.nonzero().squeeze(1)
        self.intervals.append(Interval(len(steps), examples, total[examples], scalars, uniform))
        self.weights.append(flat(self.params))


class _Step:
    """What one step contributes to an interval."""

    def __init__(self, rules: list[StepRule], examples: Tensor, sampling: Tensor) -> None:
        self.rules, self.examples, self.sampling = rules, examples, sampling


def _mean(values: list[Tensor | float]) -> Tensor | float:
    return values[0] if len(values) == 1 else sum(values[1:], values[0]) / len(values)


def record(
    model: nn.Module,
    loss: str | Loss,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    query: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    train: tuple[Tensor, Tensor] | None = None,
    stride: int = 1,
    budget: float = BUDGET,
    directory: str | Path | None = None,
    rule: Rule | None = None,
    progress: Progress | None = None,
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
        budget: bytes.
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
        budget=budget,
        directory=directory,
        rule=rule,
    )
    (x, y), per_example = found.train, recorder.problem.loss
    total = len(batches) if isinstance(batches, Sized) else None
    with recorder:
        for k, batch in enumerate(found):
            optimizer.zero_grad()
            per_example(model(x[batch]), y[batch]).mean().backward()
            optimizer.step()
            recorder.step(batch)
            if progress is not None:
                progress(k + 1, total)
    return recorder.run
