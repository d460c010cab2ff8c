"""Read the steps of an optimizer in somebody's loop, each as a linear map of its gradient."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import _validate as checks
from poprisk._validate import NotAnalysable
from poprisk.evaluation import evaluating
from poprisk.jacobian import flat
from poprisk.losses import gradient, resolve_loss
from poprisk.optim.step import Rule, StepContext, StepRule, describe
from poprisk.path.checks import check_indices, named
from poprisk.path.surroundings import Surroundings
from poprisk.path.trial import check_unhooked, same_outputs, trained_parameters, tried_problem
from poprisk.protocols import PerExampleLoss

OFTEN = 4
"""Steps at the start whose gradients are all compared with those of the named batches."""
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
RULE_TOLERANCE = {torch.float32: 2e-2, torch.float64: 1e-6}


class StepRead(NamedTuple):
    """A step of the optimizer.

    Attributes:
        rules: of each parameter.
        examples: indices of the training examples behind it, ascending.
        sampling: the diagonal of :math:`S_k` at them.
    """

    rules: list[StepRule]
    examples: Tensor
    sampling: Tensor


@final
class StepReader:
    r"""Reads what each step of an optimizer did, and refuses what cannot be followed.

    Attributes:
        seconds: that the training took, between :meth:`resume` and a step, and in the step.
        spent: seconds that reading the steps took.

    Args:
        owner: name of the class that is used, for messages.
        model: what is trained; each row of its output belongs to one example.
        loss: per-example loss (b,), or the name of one.
        optimizer: one whose step is linear in its gradients, or any with ``rule``.
        train: inputs and targets of the training set.
        query: inputs, or inputs and targets; None: the training inputs.
        rule: for an optimizer without one.
        thorough: compare each step with its rule, and not only the first ones and some after.

    Raises:
        NotAnalysable: if the run cannot be analysed; the message says what would work.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        loss: str | PerExampleLoss,
        optimizer: Optimizer,
        *,
        train: tuple[Tensor, Tensor],
        query: Tensor | tuple[Tensor, Tensor] | None,
        rule: Rule | None,
        thorough: bool = True,
    ) -> None:
        checks.check_tensors("train", train)
        self.owner, self.model, self.optimizer = owner, model, optimizer
        self.rule, self.momentum_of = describe(optimizer, rule)
        own = trained_parameters(model, optimizer)
        self.names, self.params = tuple(own), list(own.values())
        points = (train[0], None) if query is None else query
        x, y = points if isinstance(points, (tuple, list)) else (points, None)
        with torch.inference_mode(False), torch.enable_grad():
            self.problem, free = tried_problem(model, resolve_loss(loss), self.names, train, (x, y))
        self.surroundings = Surroundings(model, self.problem.model, self.names, free)
        self.count, self.rule_error, self.thorough = 0, 0.0, thorough
        self.seconds = self.spent = self._since = 0.0
        self._taken: tuple[list[StepRule], list[Tensor | None]] | None = None

    def begin(self) -> None:
        """Read the optimizer's steps from now on."""
        self._check_surroundings(thorough=True)
        self.before = self.after = [p.detach().clone() for p in self.params]
        self.momentum = [self._momentum_in(p) for p in self.params]
        self.started = [self.momentum_of(p) is not None for p in self.params]
        self.momentum_in = flat(self.momentum)
        self.skipped = getattr(self.optimizer, "skipped_steps", 0)
        self.handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self._since = self.now()

    def end(self) -> None:
        """Leave no hook on the optimizer."""
        for handle in self.handles:
            handle.remove()

    def check_told(self) -> None:
        """Raise ValueError if nobody told which examples were behind the last step."""
        self._check_alternating(self._taken is None)

    def check_ended(self) -> None:
        """Raise NotAnalysable if something else than the optimizer changed the model."""
        self._check_untouched()
        self._check_surroundings(thorough=True)
        if not same_outputs(self.model, self.problem, flat(self.after)):
            raise NotAnalysable(
                "the model's outputs at the end are not those of the recorded weights: something "
                "else in it changed (a counter or a cache that outputs depend on, a setting?); "
                "keep it fixed while recording."
            )

    @torch.inference_mode(False)  # what it makes is differentiated
    def take(self, batch: Tensor) -> StepRead | None:
        """The step just taken, on the examples (b,) of a batch; None if it was left out.

        Raises:
            ValueError: if they are no indices of training examples, or no step was taken.
            NotAnalysable: if the gradient of that step was another.
        """
        check_indices(batch, self.problem.n)
        if self._taken is None:
            self._check_alternating(getattr(self.optimizer, "skipped_steps", 0) > self.skipped)
            self.skipped += 1
            return None
        self._check_untouched()
        rules, grads = self._taken
        self._taken = None
        self.count += 1
        if self._is_due(self.count):
            self._check_gradient(batch, grads)
        self.before = self.after
        examples, counts = batch.cpu().unique(return_counts=True)
        sampling = counts.double() * (self.problem.n / len(batch))
        return StepRead(rules, examples, sampling)

    def resume(self) -> float:
        """From now on, which is returned, time is the training's again."""
        self._since = self.now()
        return self._since

    def now(self) -> float:
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
                f"{named(changed)} changed since the {self.owner} was made, but not by the "
                "optimizer that is followed (a second optimizer, running statistics, a load?); "
                "only what one optimizer does can be followed."
            )

    def _check_alternating(self, stepped: bool) -> None:
        """Raise ValueError unless steps of the optimizer and of the recorder alternate."""
        if not stepped:
            raise ValueError(
                f"call {self.owner}.step(batch) once after each optimizer.step(), and not after "
                "one that was left out, as a GradScaler does when gradients overflow."
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
        began = self.now()
        self.seconds += began - self._since
        self._check_alternating(self._taken is None)
        self._check_untouched()
        self._check_surroundings(thorough=_is_power(self.count + 1))
        check_unhooked(dict(zip(self.names, self.params, strict=True)))
        groups = {p: g for g in optimizer.param_groups for p in g["params"]}
        trained, now = set(self.params), set(self._trained())
        if now - trained or trained - set(groups):
            raise NotAnalysable(
                f"the optimizer trains other parameters than when the {self.owner} was made "
                f"({len(now - trained)} more, {len(trained - set(groups))} fewer: a group added, a "
                f"layer unfrozen?); make a new {self.owner} when that changes."
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
        self._since = self.now()
        self.spent += self._since - began

    def _after_step(self, *_: Any) -> None:
        # What comes between here and step(), a twin's turn, say, is not of this training.
        self.seconds += self.now() - self._since
        self._since = self.now()
        if getattr(self.optimizer, "skipped_steps", 0) > self.skipped:
            return
        # Read now, and not before the step: a closure has put them there meanwhile.
        grads = [None if p.grad is None else _dense(p.grad) for p in self.params]
        self.after = [p.detach().clone() for p in self.params]
        self._check_finite(self.after)
        due = self.thorough or self._is_due(self.count + 1)
        rules, worst, size = list[StepRule](), 0.0, 0.0
        for i, p in enumerate(self.params):
            rule, r = self._apply_rule(i, p, grads[i])
            rules.append(rule)
            if due and r is not None:
                error, norm = self._compare(i, rule, r)
                worst, size = worst + error, size + norm
        relative = (worst / size) ** 0.5 if size > 0 else 0.0
        self.rule_error = max(self.rule_error, relative)
        if not relative <= RULE_TOLERANCE[self.params[0].dtype]:
            raise NotAnalysable(
                f"the step of {type(self.optimizer).__name__} is not the one its rule describes "
                f"(relative difference {relative:.2g}); is step() overridden or wrapped, or was "
                "another state loaded? Pass rule=poprisk.path.realized_update(momentum=...); if "
                "that was passed, weights move whose gradient was always zero (inputs that are "
                "zero, and an optimizer that mixes coordinates), which no diagonal map does."
            )
        self._taken = rules, grads
        self.spent += self.now() - self._since

    def _apply_rule(self, i: int, p: Tensor, grad: Tensor | None) -> tuple[StepRule, Tensor | None]:
        """The rule of tensor ``i``, and its r; none for one that was left out of the step."""
        if grad is None:
            return StepRule(precondition=0.0, carry=1.0, gain=0.0), None
        w, update = self.before[i], self.after[i] - self.before[i]
        state = self.optimizer.state.get(p, {})
        context = StepContext(
            self.groups[i], state, not self.started[i], update, grad, w, self.momentum[i]
        )
        rule = self.rule(p, context)
        self.started[i] = True
        g = rule.sign * grad + rule.coupled * w
        self.momentum[i], r = rule.take(self.momentum[i], g)
        return rule, r

    def _compare(self, i: int, rule: StepRule, r: Tensor) -> tuple[float, float]:
        """Squared error and size of the step of tensor ``i`` that a rule implies."""
        w, update = self.before[i], self.after[i] - self.before[i]
        implied = -rule.correction * rule.precondition * r - rule.decay * w
        # what rounding of the weights themselves can do to their difference is no error
        slack = 2 * torch.finfo(w.dtype).eps * w.abs()
        difference = ((implied - update).abs() - slack).clamp_min(0)
        return float(difference.square().sum()), float(update.square().sum())

    def _is_due(self, step: int) -> bool:
        """Whether a step is compared with what is said of it."""
        return step <= OFTEN or _is_power(step)

    def _check_gradient(self, batch: Tensor, grads: list[Tensor | None]) -> None:
        problem, w = self.problem, flat(self.before)
        pairs = [*zip(self.params, grads, strict=True)]
        grad = flat([torch.zeros_like(p) if g is None else g for p, g in pairs])
        rows = batch.to(problem.train[0].device)
        x, y = (t[rows].to(w.device) for t in problem.train)
        with torch.inference_mode(False), evaluating(problem.model, eval_mode=False):
            u, pull = problem.J.pullback(w, x)
            g = gradient(problem.loss, problem.shaped(u), y).reshape_as(u) / len(x)
            expected = pull(g.unsqueeze(-1)).squeeze(-1)
        # A parameter without a gradient was left out of the step, and its rule says so.
        seen = flat([torch.full_like(p, g is not None) for p, g in pairs])
        expected = expected * seen
        error = float((grad - expected).norm() / expected.norm().clamp_min(1e-30))
        if not error <= GRADIENT_TOLERANCE[w.dtype]:
            raise NotAnalysable(
                f"the gradient of step {self.count} is not that of the recorded loss on the "
                f"recorded batch (relative difference {error:.2g}): augmented or changing data, "
                "dropout, another reduction than the mean, or clipping would do that. Record with "
                "repeatable data, loss.mean() over the batch, and no clipping."
            )


def _is_power(step: int) -> bool:
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
