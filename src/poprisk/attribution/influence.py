"""Influence of training examples through a whole run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from poprisk import _validate as checks
from poprisk import losses
from poprisk._validate import NotAnalysable, check_separate
from poprisk.attribution.adjoint import FORMS, Adjoint, BackwardStep, pull_rule, second_order
from poprisk.attribution.result import Attribution
from poprisk.attribution.training import MAX_MEMORY, RESPONSES, Replay
from poprisk.optim.step import StepRule
from poprisk.path import Run
from poprisk.path.checks import check_uncut
from poprisk.path.problem import Problem
from poprisk.path.run import check_answers
from poprisk.randomness import generator_of

CHECKED = 0.01
"""Share of the examples that are left out, to see whether the run follows; one at least."""
AGREES = 0.25
"""Relative difference between measured and predicted changes up to which it does."""
CORRELATES = 0.94
r"""Correlation with their predictions, over random shares that are left out, from which changes of
a query agree: :math:`1/\sqrt{1 + r^2}` if the difference, r standard deviations of the predicted
change, is independent of it; the mean over queries."""
DRAWS = 64
"""Of which the most typical is tried: a small change tells little of what a usual one does."""
REMOVALS = ("largest", "random")
ALIKE = "all examples have the same influence on the query: shares at random tell nothing"
NOTHING = "no example has any influence on the query"
UNTRIED = "check=0: whether leaving examples out does what the derivative says was not tried"
ONCE = "a recorded run cannot be trained again without examples; use replay()"

Measure = Callable[[Tensor, Tensor | None], Tensor]
"""From outputs of the query inputs (m, ...) and their targets to queries, (q,) or a number."""


@torch.inference_mode(False)
def attribute(
    run: Run | Replay,
    query: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    measure: Measure | None = None,
    form: str = "hessian",
    response: str | None = None,
    check: float = CHECKED,
    left_out: str = "largest",
    seed: int = 0,
    max_memory: float = MAX_MEMORY,
) -> Attribution:
    r"""Which training examples did this: the derivative of a query by the weight of each one.

    The adjoint of the query is carried backwards through all steps (:mod:`.adjoint`): one pass for
    all examples, and for each query. To first order, leaving example i out changes the query by
    minus its influence.

    Args:
        run: from :func:`replay`, or, held, from :func:`poprisk.record`, every step recorded.
        query: inputs, or inputs and targets, in place of those of the run.
        measure: from outputs and targets to queries; the mean loss if left out.
        form: ``"hessian"``, or ``"gauss-newton"``, which leaves the curvature of outputs out.
        response: ``"followed"``: second moments answer to the gradient too, exact for torch's
            optimizers; ``"held"``: the preconditioner stays what it was, as must that of
            PopRiskAdamW and of a recorded run. Left out: followed where it can be.
        check: a replay is trained once more without this share of the examples, to see whether the
            derivative holds that far; 0: not.
        left_out: in the check: ``"largest"``, those of largest influence one way; ``"random"``, two
            trainings without a random share each, the rest weighed up for it. A random half
            moves the query little by its influence, and much by how examples act together: what is
            valid for the first need not be for the second.
        seed: of the random share.
        max_memory: bytes that graphs of gradients may take, so that no gradient of a replay is
            computed twice, beside its :math:`2\sqrt K` states of model and optimizer.

    Raises:
        TypeError, ValueError: for a bad argument, or a query without targets for its loss.
        NotAnalysable: if the run cannot be gone through backwards.

    Example:
        >>> from poprisk.attribution import replay
        >>> net = torch.nn.Linear(1, 1, bias=False).double()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x = torch.linspace(-1, 1, 40).double()[:, None]
        >>> run = replay(net, "squared_error", sgd, [torch.arange(40)] * 90, train=(x, 2 * x + 1))
        >>> found = attribute(run, x[:1], measure=lambda u, y: u[0, 0])
        >>> found.influence.shape, found.valid
        (torch.Size([40]), True)
    """
    began = time.perf_counter()
    if not isinstance(run, (Run, Replay)):
        raise TypeError(
            f"run must be what replay() or record() returned, but got {type(run).__name__}."
        )
    checks.check_choice("form", form, FORMS)
    checks.check_number("check", check, low=0.0, high=0.5)
    checks.check_choice("left_out", left_out, REMOVALS)
    generator_of(seed, "left out")  # refuses a bad one before the work
    checks.check_number("max_memory", max_memory, low=0.0)
    kind = _response(run, response)
    problem, w = run.problem, _final(run)
    problem.check_data()
    check_uncut(problem, "the adjoint", "retrain without the examples in question.")
    asked = _Query(problem, query, measure)
    value, slopes = asked.gradient(w)
    influence = torch.zeros(len(slopes), problem.n, dtype=slopes.dtype, device=slopes.device)
    adjoint = Adjoint(slopes, {})
    with torch.enable_grad():
        for step in _backwards(run, kind, max_memory):
            pulled = step.pull(adjoint)
            curved, inner = second_order(problem, step, pulled.gradient, form)
            share = step.share.to(inner)
            influence.index_add_(1, step.examples.to(influence.device), share * inner)
            adjoint = pulled.before._replace(weights=pulled.before.weights + curved)
    reason, agreement = _objection(run, kind, influence), math.nan
    if isinstance(run, Replay) and check and influence.isfinite().all():
        given = run, asked, value, influence, check
        differs, agreement = (
            _without_largest(*given) if left_out == "largest" else _without_random(*given, seed)
        )
        reason = reason or differs
    elif not reason:
        reason = UNTRIED if isinstance(run, Replay) else ONCE
    single = asked.single
    seconds = time.perf_counter() - began
    return Attribution(
        influence[0] if single else influence,
        float(value[0]) if single else value,
        asked.error(w),
        not reason,
        reason,
        agreement,
        seconds / run.seconds if run.seconds > 0 else math.nan,
    )


class _Query:
    """What is asked of outputs on some inputs."""

    def __init__(
        self,
        problem: Problem,
        query: Tensor | tuple[Tensor, Tensor] | None,
        measure: Measure | None,
    ) -> None:
        given = problem.query if query is None else query
        x, y = given if isinstance(given, (tuple, list)) else (given, None)
        if measure is None and y is None:
            raise ValueError(
                "query has no targets, so there is no loss of it; pass query=(inputs, targets), or "
                "measure=, a function of the outputs."
            )
        if y is not None and len(x) != len(y):
            raise ValueError(f"query has {len(x)} inputs, but {len(y)} targets.")
        self.problem, self.measure = problem, measure
        device = problem.parameters[0].device
        self.x, self.y = x.to(device), None if y is None else y.to(device)
        self.single = True

    def __call__(self, w: Tensor) -> Tensor:
        """The queries (q,) at some weights."""
        u = self.problem.shaped(self.problem.J.outputs(w, self.x))
        if self.measure is None:
            assert self.y is not None
            found = losses.values(self.problem.loss, u, self.y)
            check_separate(self.problem.loss, u.detach(), self.y, found)
            return found.mean().reshape(1)
        found = self.measure(u, self.y)
        if not isinstance(found, Tensor) or found.ndim > 1 or not found.requires_grad:
            raise ValueError(
                "measure must return a number or a vector of them as a tensor that depends on the "
                f"outputs, but returned {type(found).__name__}"
                + (f" of shape {tuple(found.shape)}." if isinstance(found, Tensor) else ".")
            )
        self.single = found.ndim == 0
        return found.reshape(-1)

    def error(self, w: Tensor) -> float:
        """Standard error of a mean loss over the query's examples."""
        if self.measure is not None or len(self.x) < 2:
            return math.nan
        u = self.problem.shaped(self.problem.J.values(w, self.x))
        assert self.y is not None
        found = losses.values(self.problem.loss, u, self.y).detach()
        return float(found.std()) / math.sqrt(len(found))

    def gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The queries (q,), and their gradients (q, P)."""
        with torch.enable_grad():
            at = w.detach().requires_grad_()
            value = self(at)
            rows = [torch.autograd.grad(v, at, retain_graph=True)[0] for v in value]
        return value.detach(), torch.stack(rows)


def _response(run: Run | Replay, response: str | None) -> str:
    can = isinstance(run, Replay) and run.followed
    if response is None:
        return "followed" if can else "held"
    checks.check_choice("response", response, RESPONSES)
    if isinstance(run, Replay) and run.linear:
        return "held"  # which is the same
    if response == "followed" and not can:
        what = "a recorded run" if isinstance(run, Run) else type(run.optimizer).__name__
        raise NotAnalysable(
            f"the second moments of {what} cannot be followed: use replay() with one of torch's "
            'optimizers, or response="held".'
        )
    return response


def _final(run: Run | Replay) -> Tensor:
    return run.weights[len(run)] if isinstance(run, Run) else run.final


def _backwards(run: Run | Replay, response: str, max_memory: float) -> Iterator[BackwardStep]:
    if isinstance(run, Replay):
        yield from run.backwards(response, max_memory)
        return
    check_answers(run)
    for k in reversed(range(len(run))):
        interval, w = run.intervals[k], run.weights[k]
        *fields, steps = run.rule(k, w.dtype)
        rule = StepRule(
            *(v.squeeze(1) if isinstance(v, Tensor) else v for v in fields), steps=steps
        )
        share = interval.sampling / run.problem.n
        weights = [*run.problem.J.named(w).values()]
        yield BackwardStep(weights, interval.examples, share, partial(pull_rule, rule))


def _objection(run: Run | Replay, response: str, influence: Tensor) -> str:
    if not bool(influence.isfinite().all()):
        return "the adjoint blew up: training is too far from smooth to be differentiated"
    moving = run.preconditioned if isinstance(run, Run) else not run.linear
    if response == "held" and moving:
        name = run.optimizer if isinstance(run, Run) else type(run.optimizer).__name__
        return f"the preconditioner of {name} is held as it was with all examples"
    return ""


def _changes(
    run: Replay, asked: _Query, value: Tensor, influence: Tensor, removals: Sequence[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Train again with other weights of the losses, and compare.

    Args:
        run: the training.
        asked: the queries.
        value: of them, (q,).
        influence: (q, n).
        removals: weights of the losses, (n,) each.

    Returns:
        Measured and predicted changes, each (removals, q), and how far the former go along the
        latter.
    """
    moved = list[Tensor]()
    with torch.enable_grad():
        for weights in removals:
            moved.append(asked(run.trained(weights).requires_grad_()).detach() - value)
    a, b = torch.stack(moved).double(), _predicted(influence, removals)
    return a, b, float((a * b).sum() / b.square().sum())


def _predicted(influence: Tensor, removals: Sequence[Tensor]) -> Tensor:
    """Changes to first order, (removals, q)."""
    return (torch.stack([*removals]).to(influence.device) - 1) @ influence.double().T


def _without_largest(
    run: Replay, asked: _Query, value: Tensor, influence: Tensor, share: float
) -> tuple[str, float]:
    """Leave out the examples that moved the query most one way."""
    total = influence.sum(0)
    if float(total.clamp(min=0).sum()) < float(total.clamp(max=0).abs().sum()):
        total = -total
    left_out = total.topk(max(1, round(share * len(total)))).indices
    weights = torch.ones(len(total), dtype=torch.float64)
    weights[left_out.cpu()] = 0.0
    if not bool(influence[:, left_out].any()):
        return NOTHING, math.nan
    moved, predicted, ratio = _changes(run, asked, value, influence, [weights])
    off = float((moved - predicted).norm() / predicted.norm())
    if off <= AGREES:
        return "", ratio
    examples = f"the {len(left_out)} examples" if len(left_out) > 1 else "the example"
    return (
        f"trained without {examples} of largest influence, the query did not move as the "
        f"derivative says (by {ratio:.2f} of it, {off:.0%} off): training is not smooth enough",
        ratio,
    )


def _without_random(
    run: Replay, asked: _Query, value: Tensor, influence: Tensor, share: float, seed: int
) -> tuple[str, float]:
    """Leave out examples at random, twice, none of them both times; the rest counts for them."""
    n = influence.shape[1]
    count = max(1, round(share * n))
    # Standard deviation of each query's change over all draws.
    spread = (influence.double().var(1) * count * n / (n - count)).sqrt()
    some = spread > 0
    if not bool(some.any()):
        return (ALIKE if bool(influence.any()) else NOTHING), math.nan
    generator = generator_of(seed, "left out")

    def drawn() -> list[Tensor]:
        order, kept = torch.randperm(n, generator=generator), n / (n - count)
        removals = [torch.full((n,), kept, dtype=torch.float64) for _ in range(2)]
        removals[0][order[:count]] = removals[1][order[-count:]] = 0.0
        return removals

    def atypical(removals: Sequence[Tensor]) -> float:
        return abs(float((_predicted(influence, removals) / spread)[:, some].square().mean()) - 1)

    removals = min((drawn() for _ in range(DRAWS)), key=atypical)
    moved, predicted, ratio = _changes(run, asked, value, influence, removals)
    off = ((moved - predicted) / spread)[:, some].square().mean(0)
    correlation = float((1 / (1 + off).sqrt()).mean())
    if correlation >= CORRELATES:
        return "", ratio
    return (
        f"trained without {count} examples at random, the query is so far from what the "
        f"derivative says that over draws the two would correlate by {correlation:.2f}: training "
        "is not linear that far",
        ratio,
    )
