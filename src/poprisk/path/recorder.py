r"""Record a run: weights, batches and the optimizer's realized steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import _validate as checks
from poprisk._renamed import renamed_arguments
from poprisk._validate import NotAnalysable
from poprisk.evaluation import evaluating
from poprisk.jacobian import flat
from poprisk.losses import gradient, resolve_loss
from poprisk.optim.step import Rule, StepContext, StepRule, describe
from poprisk.path.batches import Batch, Examples
from poprisk.path.checks import check_indices, named
from poprisk.path.run import Run, StepInterval
from poprisk.path.store import Storage
from poprisk.path.surroundings import Surroundings
from poprisk.path.trial import check_unhooked, same_outputs, trained_parameters, tried_problem
from poprisk.printing import described
from poprisk.protocols import PerExampleLoss, ProgressCallback

MAX_MEMORY = 4 * 2**30
OFTEN = 4
"""Steps at the start whose gradients are all compared with those of the recorded batches."""
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
        checks.check_tensors("train", train)
        self.model, self.optimizer = model, optimizer
        self.rule, self.momentum_of = describe(optimizer, rule)
        self.exact = rule is None
        own = trained_parameters(model, optimizer)
        self.names, self.params = tuple(own), list(own.values())
        points = (train[0], None) if query is None else query
        x, y = points if isinstance(points, (tuple, list)) else (points, None)
        with torch.inference_mode(False), torch.enable_grad():
            self.problem, free = tried_problem(model, resolve_loss(loss), self.names, train, (x, y))
        self.surroundings = Surroundings(model, self.problem.model, self.names, free)
        storage = Storage(max_memory, directory)
        self.weights = storage.table("weights")
        self.preconditions = storage.table("preconditions")
        self.gains = storage.table("gains")
        self.stride, self.intervals = stride, list[StepInterval]()
        self.pending: list[_Step] = []
        self.count, self.rule_error = 0, 0.0
        self.seconds = self._since = 0.0
        self._taken: tuple[list[StepRule], list[Tensor]] | None = None

    def __repr__(self) -> str:
        optimizer = type(self.optimizer).__name__
        return described("Recorder", optimizer, f"{self.count:,} steps so far", stride=self.stride)

    def __enter__(self) -> Recorder:
        if len(self.weights):
            raise ValueError("a Recorder records one run; make another for the next.")
        self._check_surroundings(thorough=True)
        self.before = self.after = [p.detach().clone() for p in self.params]
        self.weights.append(flat(self.before))
        self.momentum = [self._momentum_in(p) for p in self.params]
        self.started = [self.momentum_of(p) is not None for p in self.params]
        self.momentum_in = flat(self.momentum)
        self.skipped = getattr(self.optimizer, "skipped_steps", 0)
        self.handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self._since = self._now()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        if error is not None:
            return
        self._check_alternating(self._taken is None)
        if self.pending:
            self._close_interval()
        if not self.count:
            return
        self._check_untouched()
        self._check_surroundings(thorough=True)
        if not same_outputs(self.model, self.problem, flat(self.after)):
            raise NotAnalysable(
                "the model's outputs at the end are not those of the recorded weights: something "
                "else in it changed (a counter or a cache that outputs depend on, a setting?); "
                "keep it fixed while recording."
            )

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
            self.seconds,
        )

    def step(self, batch: Tensor) -> None:
        """Say which examples (b,), integers, were behind the step just taken.

        Raises:
            ValueError: if they are no indices of training examples, or no step was taken.
            NotAnalysable: if the gradient of that step was another.
        """
        try:
            self._note(batch)
        finally:
            self._since = self._now()

    def _note(self, batch: Tensor) -> None:
        check_indices(batch, self.problem.n)
        if self._taken is None:
            self._check_alternating(getattr(self.optimizer, "skipped_steps", 0) > self.skipped)
            self.skipped += 1
            return
        self._check_untouched()
        rules, grads = self._taken
        self._taken = None
        self.count += 1
        if self.count <= OFTEN or _is_due(self.count):
            self._check_gradient(batch, grads)
        self.before = self.after
        examples, counts = batch.cpu().unique(return_counts=True)
        sampling = counts.double() * (self.problem.n / len(batch))
        self.pending.append(_Step(rules, examples, sampling))
        if len(self.pending) == self.stride:
            self._close_interval()

    def _now(self) -> float:
        """The clock, when what was begun on a device is done: the training's time is its own."""
        if self.params[0].is_cuda:
            torch.cuda.synchronize(self.params[0].device)
        return time.perf_counter()

    def _trained(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter that the optimizer trains."""
        groups = self.optimizer.param_groups
        return {p: group for group in groups for p in group["params"] if p.requires_grad}

    def _check_untouched(self) -> None:
        """Raise NotAnalysable unless weights are those after the last step."""
        pairs = zip(self.names, self.params, self.after, strict=True)
        if touched := [name for name, p, w in pairs if not torch.equal(p, w)]:
            raise NotAnalysable(
                f"weights changed outside of the optimizer's steps: {named(touched)} (clipping, "
                "averaging, or a load?); only what the optimizer does can be followed."
            )

    def _check_surroundings(self, *, thorough: bool) -> None:
        """Raise NotAnalysable if what the optimizer does not train has changed."""
        if changed := self.surroundings.changed(thorough=thorough):
            raise NotAnalysable(
                f"{named(changed)} changed since the recorder was made, but not by the optimizer "
                "that is recorded (a second optimizer, running statistics, a load?); only what one "
                "optimizer does can be followed."
            )

    def _check_alternating(self, stepped: bool) -> None:
        """Raise ValueError unless steps of the optimizer and of the recorder alternate."""
        if not stepped:
            raise ValueError(
                "call Recorder.step(batch) once after each optimizer.step(), and not after one "
                "that was left out, as a GradScaler does when gradients overflow."
            )

    def _check_finite(self, tensors: list[Tensor]) -> None:
        """Raise NotAnalysable if weights would become, or became, NaN or infinite."""
        if not _all_finite(tensors):
            raise NotAnalysable(
                f"the gradient of step {self.count + 1} is NaN or infinite, or the weights are "
                "after it; lower the learning rate, or use an optimizer that skips such steps, "
                "such as PopRiskAdamW."
            )

    def _momentum_in(self, p: Tensor) -> Tensor:
        found = self.momentum_of(p)
        return torch.zeros_like(p) if found is None else found.detach().clone().to(p.dtype)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.seconds += self._now() - self._since
        self._check_alternating(self._taken is None)
        self._check_untouched()
        self._check_surroundings(thorough=_is_due(self.count + 1))
        check_unhooked(dict(zip(self.names, self.params, strict=True)))
        groups = {p: g for g in optimizer.param_groups for p in g["params"]}
        trained, now = set(self.params), set(self._trained())
        if now - trained or trained - set(groups):
            raise NotAnalysable(
                "the optimizer trains other parameters than when the recorder was made "
                f"({len(now - trained)} more, {len(trained - set(groups))} fewer: a group added, a "
                "layer unfrozen?); make a new Recorder when that changes."
            )
        self.groups = [groups[p] for p in self.params]
        if getattr(optimizer, "grad_scale", None) is not None:
            raise NotAnalysable(
                "a GradScaler leaves unscaling to the fused step, which hides the gradient; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or make the optimizer "
                "with fused=False."
            )
        closure = (args[1] if len(args) > 1 else None) or kwargs.get("closure")
        if closure is None and not hasattr(optimizer, "skipped_steps"):
            self._check_finite([p.grad for p in self.params if p.grad is not None])
        self._since = self._now()

    def _after_step(self, *_: Any) -> None:
        # What comes between here and step(), a twin's turn, say, is not of this training.
        self.seconds += self._now() - self._since
        self._since = self._now()
        if getattr(self.optimizer, "skipped_steps", 0) > self.skipped:
            return
        # Read now, and not before the step: a closure has put them there meanwhile.
        grads = [torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in self.params]
        self.after = [p.detach().clone() for p in self.params]
        self._check_finite(self.after)
        rules, worst, size = list[StepRule](), 0.0, 0.0
        for i, p in enumerate(self.params):
            rule, error, norm = self._apply_rule(i, p, grads[i])
            rules.append(rule)
            worst, size = worst + error, size + norm
        relative = (worst / size) ** 0.5 if size > 0 else 0.0
        self.rule_error = max(self.rule_error, relative)
        if not relative <= RULE_TOLERANCE[self.params[0].dtype]:
            raise NotAnalysable(
                f"the step of {type(self.optimizer).__name__} is not the one its rule describes "
                f"(relative difference {relative:.2g}); is step() overridden or wrapped, or was "
                "another state loaded? Pass rule=poprisk.path.realized_update(momentum=...)."
            )
        self._taken = rules, grads

    def _apply_rule(self, i: int, p: Tensor, grad: Tensor) -> tuple[StepRule, float, float]:
        """The rule of tensor ``i``; squared error and size of the step it implies."""
        if p.grad is None:
            return StepRule(precondition=0.0, carry=1.0, gain=0.0), 0.0, 0.0
        w, update = self.before[i], self.after[i] - self.before[i]
        state = self.optimizer.state.get(p, {})
        context = StepContext(
            self.groups[i], state, not self.started[i], update, grad, w, self.momentum[i]
        )
        rule = self.rule(p, context)
        self.started[i] = True
        g = rule.sign * grad + rule.coupled * w
        self.momentum[i], r = rule.take(self.momentum[i], g)
        implied = -rule.correction * rule.precondition * r - rule.decay * w
        # what rounding of the weights themselves can do to their difference is no error
        slack = 2 * torch.finfo(w.dtype).eps * w.abs()
        difference = ((implied - update).abs() - slack).clamp_min(0)
        return rule, float(difference.square().sum()), float(update.square().sum())

    def _check_gradient(self, batch: Tensor, grads: list[Tensor]) -> None:
        problem, w, grad = self.problem, flat(self.before), flat(grads)
        rows = batch.to(problem.train[0].device)
        x, y = (t[rows].to(w.device) for t in problem.train)
        with torch.inference_mode(False), evaluating(problem.model, eval_mode=False):
            u, pull = problem.J.pullback(w, x)
            g = gradient(problem.loss, problem.shaped(u), y).reshape_as(u) / len(x)
            expected = pull(g.unsqueeze(-1)).squeeze(-1)
        # A parameter without a gradient was left out of the step, and its rule says so.
        seen = torch.cat([torch.full_like(p, p.grad is not None).flatten() for p in self.params])
        expected = expected * seen
        error = float((grad - expected).norm() / expected.norm().clamp_min(1e-30))
        if not error <= GRADIENT_TOLERANCE[w.dtype]:
            raise NotAnalysable(
                f"the gradient of step {self.count} is not that of the recorded loss on the "
                f"recorded batch (relative difference {error:.2g}): augmented or changing data, "
                "dropout, another reduction than the mean, or clipping would do that. Record with "
                "repeatable data, loss.mean() over the batch, and no clipping."
            )

    def _close_interval(self) -> None:
        steps, self.pending = self.pending, list[_Step]()
        tables = {"precondition": self.preconditions, "gain": self.gains}
        fields: dict[str, Any] = {"steps": len(steps)}
        for name in StepRule._fields[:-1]:
            rules = zip(*(s.rules for s in steps), strict=True)
            means = [_mean([getattr(rule, name) for rule in tensor]) for tensor in rules]
            table = tables.get(name)
            if table is not None and (len(table) or any(isinstance(d, Tensor) for d in means)):
                pairs = zip(self.params, means, strict=True)
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
        self.weights.append(flat(self.before))


class _Step(NamedTuple):
    """What one step contributes to an interval."""

    rules: list[StepRule]
    examples: Tensor
    sampling: Tensor


def _is_due(step: int) -> bool:
    """Whether what is costly to look at is to be looked at: at steps 1, 2, 4, 8, ..."""
    return step & (step - 1) == 0


def _dense(grad: Tensor) -> Tensor:
    """A copy of a gradient, in which sparse ones are written out."""
    found = grad.detach()
    return found.to_dense() if found.is_sparse else found.clone()


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are finite: so are their sums then, unless one overflows."""
    dense = [t.detach().to_dense() if t.is_sparse else t.detach() for t in tensors]
    sums = torch.stack([t.sum() for t in dense]) if dense else torch.zeros(1)
    return bool(sums.isfinite().all()) or all(bool(t.isfinite().all()) for t in dense)


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
