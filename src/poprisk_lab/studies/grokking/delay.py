r"""The delay law: does learning rate times weight decay set when a network generalizes?

T. X. Khanh et al., *First-passage prediction of grokking delay*, arXiv:2605.18845, of which the
abstract was at hand, give for AdamW

.. math:: T_{grok} - T_{mem} \approx \frac{1}{2\kappa\eta\lambda}\log\frac{V_{mem}}{V_*},
   \qquad V = \lVert w\rVert^2,

with one :math:`\kappa` and one threshold :math:`V_*` for an architecture: while decay shrinks the
weights, nothing is learned until they are small enough. Two things follow that can be measured:
doubling :math:`\eta`, or :math:`\lambda`, halves the delay; and V is smaller when the test set is
right than when the training set was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from poprisk.intervals import CONFIDENCE, Interval, student_quantile, t_interval
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies.criteria import Criterion, at_least
from poprisk_lab.studies.grokking.arms import LABELS
from poprisk_lab.studies.grokking.runs import GOAL, first

NO_DELAY = 2.0
"""Below so many times the steps to fit the training set there is no delay to be explained."""

DELAYS = {
    "AdamW": ("grid-", "adamw-tuned"),
    "PopRiskAdamW": ("gate-grid-", "ours-tuned"),
    "Grokfast": ("grokfast-grid-", "grokfast-tuned"),
    "SOAP": ("soap-grid-", "soap-tuned"),
    "Muon": ("muon-grid-", "muon-tuned"),
}
"""Beginnings of the names of the runs from which the delay law is measured."""
NORMS = ("letter-snr-best", "letter-soft-best", "soap-tuned", "muon-tuned")
"""Arms whose runs tell the norm of the weights."""


class LateSetting(NamedTuple):
    """A learning rate and a decay, and the mean logarithm of the delay over its seeds."""

    lr: float
    decay: float
    log_delay: float


def settings(results: Results) -> list[LateSetting]:
    """The settings, by the trials' names, all of whose runs generalized late.

    Late: after more than :data:`NO_DELAY` times the steps to 99% of the training set.
    """
    found = list[LateSetting]()
    for runs in results.by("name").values():
        if all(_late(d) for d in runs):
            logs = [math.log(d.metrics["reached"] - d.metrics["memorized"]) for d in runs]
            own = runs[0].settings
            found.append(LateSetting(own["lr"], own["weight_decay"], sum(logs) / len(logs)))
    return found


def _late(d: TrialResult) -> bool:
    reached, memorized = d.metrics["reached"], d.metrics["memorized"]
    return None not in (reached, memorized) and reached > NO_DELAY * memorized


def shortened(found: Sequence[LateSetting], *, apart: bool = False) -> list[Interval]:
    r"""Times shorter the delay where :math:`\eta\lambda` doubles; 2 by the law.

    From the slope of the least squares line of log delay in :math:`\log\eta\lambda`, with its
    Student-t interval over settings; no interval (NaN) from fewer than two settings more than there
    are coefficients, or where they do not vary.

    Args:
        found: settings and their delays.
        apart: one figure where :math:`\eta` doubles and one where :math:`\lambda` does, the other
            held.
    """
    logs = torch.tensor([[s.lr, s.decay] for s in found], dtype=torch.float64).reshape(-1, 2).log()
    x = logs if apart else logs.sum(1, keepdim=True)
    y = torch.tensor([s.log_delay for s in found], dtype=torch.float64)
    return [i.mapped(lambda power: 2.0**power) for i in _slopes(x, -y)]


def _slopes(x: torch.Tensor, y: torch.Tensor) -> list[Interval]:
    """Coefficients (k,) of y (n,) on the columns of x (n, k) and a constant, with intervals."""
    n, k = x.shape
    design = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    if n < k + 3 or int(torch.linalg.matrix_rank(design)) <= k:
        return [Interval(math.nan, math.nan, math.nan)] * k
    inverse = torch.linalg.inv(design.T @ design)
    fit = inverse @ design.T @ y
    variance = (y - design @ fit).square().sum() / (n - k - 1)
    half = student_quantile(0.5 + CONFIDENCE / 2, n - k - 1) * (inverse.diag() * variance).sqrt()
    ends = zip(fit.tolist(), half.tolist(), strict=True)
    return [Interval(b, b - h, b + h) for b, h in [*ends][:k]]


def off_by(found: Sequence[LateSetting]) -> float:
    """Factor by which the law, calibrated on one setting, is off at another: geometric mean.

    Over all ordered pairs; NaN from fewer than two settings.
    """
    logs = [s.log_delay + math.log(s.lr * s.decay) for s in found]
    gaps = [abs(a - b) for i, a in enumerate(logs) for b in logs[:i]]
    return math.exp(sum(gaps) / len(gaps)) if gaps else math.nan


def contraction(results: Results) -> Interval:
    r"""Mean of :math:`\log(V_{mem}/V_{grok})` over the runs that tell V; above 0 by the law."""
    logs = list[float]()
    for d in results:
        rows = [row for row in d.metrics["curve"] if len(row) > 4]
        steps = first(rows, 2, 0.99), first(rows, 3, GOAL)
        if None not in steps:
            squares = {row[0]: row[4] for row in rows}
            logs.append(math.log(squares[steps[0]] / squares[steps[1]]))
    return t_interval(logs)


def delay_law(results: Results) -> list[Criterion]:
    """Whether delays go as the law has it.

    Its figure, 2, stands where the paper's would.
    """

    def shorter(what: str, found: Interval) -> Criterion:
        name = f"times shorter delay with twice {what} (law of arXiv:2605.18845: 2)"
        return at_least(name, found, 1.0)._replace(claimed=2.0)

    of = {
        label: settings(Results(d for d in results if _is_of(d, prefix)))
        for label, prefix in DELAYS.items()
    }
    rate, decay = shortened(of["AdamW"], apart=True)
    return [
        shorter("the learning rate, AdamW", rate),
        shorter("the decay, AdamW", decay),
        *(
            shorter(f"learning rate × decay, {label}", shortened(found)[0])
            for label, found in of.items()
        ),
        *(
            at_least(
                "log of the squared norm of the weights when the training set is fitted over that "
                f"when the test set is, {LABELS[name]}",
                contraction(results.where(name=name)),
                0.0,
            )
            for name in NORMS
        ),
    ]


def _is_of(d: TrialResult, prefix: tuple[str, ...]) -> bool:
    """Whether a run is of the grid of these prefixes, and what was chosen from it."""
    return d.settings["kind"] == "run" and d.settings["name"].startswith(prefix)
