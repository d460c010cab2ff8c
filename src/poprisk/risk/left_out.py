r"""Twins that are trained without a part of the examples, for losses whose labels cannot be pushed.

A twin is trained on :math:`\sum_i w_i\ell_i`, with weights :math:`w_i` drawn once for the whole
run. To first order an example answers to its own weight by
:math:`\partial u_i/\partial w_i = -H_i\nabla\ell_i`, the response to a push of its label by
:math:`-\nabla\ell_i`, so that weights near 1 would do for what has no label to push,

.. math:: \ell_i(u_i^{loo}) \approx \ell_i(u_i) - \partial\ell_i/\partial w_i .

They do not where an example is memorized: its gradient is gone, and its loss answers to its weight
no more, but all the same it is fitted only because it was trained on. For gradient flow of one
output from :math:`u_0` the right side is :math:`e^{-2t}(1+2t)(u_0-y)^2/2`, which is nothing in the
end, and the left :math:`(u_0-y)^2/2`. So the weight is taken away whole: it is 0 for m of n
examples drawn at random, the part o, and :math:`n/(n-m)` for the others, 1 on average. Those of o
are then fresh to the twin, u', whatever the loss, the optimizer, or how much is memorized. Their
mean loss is measured with that of the model as a control, known on all n examples,

.. math:: \hat R = \bar\ell'_o + b\,(\bar\ell - \bar\ell_o),\qquad
          b = \frac{\mathrm{cov}_o(\ell', \ell)}{\mathrm{var}_o(\ell)},

the regression estimator of surveys (Cochran 1977, ch. 7), with the error of

.. math:: \psi_i = \hat R + \kappa\,\Bigl(b\,(\ell_i-\bar\ell)
          + \frac nm 1_{i\in o}\,(r_i - \bar r)\Bigr),\qquad
          r_i = \frac{\ell'_i-\bar\ell'_o - b\,(\ell_i-\bar\ell_o)}{1-h_i},

the mean of which it is, with leverages h as the jackknife has them (HC3; MacKinnon and White 1985)
and :data:`SCATTER` as κ. With every example left out once it is cross-validation. Ours; prior art:
the infinitesimal jackknife (Jaeckel 1972), the delete-d jackknife (Wu 1986), hold-out.

It is the risk of training on n-m examples, which is a little more than that of training on n.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from poprisk._validate import check_number
from poprisk.randomness import generator_of
from poprisk.risk.estimate import MAX_UNCERTAINTY, RiskEstimate
from poprisk.risk.grouped import TINY, grouped_error

FEWEST = 20
"""Examples that a twin is trained without, at least: of fewer no spread can be told."""
SCATTER = 1.25
"""By what an estimate scatters more than its examples say: losses of one training set are not
independent. 1.27 on the risk of the twin over 100 networks that memorize labels of which 30% are
random, 1.39 on that of the model."""
LEAST = 1e-3
"""Share of an example that no other one tells, at least: its line goes through a lone outlier."""
STREAM = "left out"
"""The stream of random numbers that says who is left out."""


@final
class Without:
    """The examples that one twin is trained without.

    Args:
        out: which, (n,), boolean.
    """

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.weight = len(out) / int((~out).sum())

    def weights(self, index: Tensor) -> Tensor:
        """Weights (b,) of the examples at ``index``, float64: 0, or what makes 1 of their mean."""
        return self.weight * (~self.out[index.to(self.out.device)]).double()


def parts_left_out(share: Any, dataset_size: int, *, probes: int, seed: int) -> list[Without]:
    """What each twin is trained without: parts of that share that have nothing in common.

    Args:
        share: of the examples, at most a half.
        dataset_size: number of examples.
        probes: twins.
        seed: of the draw.

    Raises:
        TypeError, ValueError: for a share that is none, too few examples, or too many parts.

    Example:
        >>> [int(part.out.sum()) for part in parts_left_out(0.2, 100, probes=2, seed=0)]
        [20, 20]
    """
    share = check_number("leave_out", share, low=0.0, high=0.5, include_low=False)
    count = round(share * dataset_size)
    if count < FEWEST:
        raise ValueError(
            f"leave_out={share:g} of {dataset_size} examples are {count}, and an estimate takes "
            f"{FEWEST} at least; leave out a larger share."
        )
    if probes * count > dataset_size:
        raise ValueError(
            f"{probes} twins without {count} examples each need {probes * count}, but there are "
            f"{dataset_size}; take fewer probes, or leave out a smaller share."
        )
    order = torch.randperm(dataset_size, generator=generator_of(seed, STREAM))
    parts = list[Without]()
    for chosen in order[: probes * count].split(count):
        out = torch.zeros(dataset_size, dtype=torch.bool)
        out[chosen] = True
        parts.append(Without(out))
    return parts


def left_out_risk(
    losses: Tensor,
    twins: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    counted: Tensor,
    cost: float = math.nan,
    doubt: str = "",
) -> RiskEstimate:
    """Estimate the risk from losses of the training examples; see the module.

    Args:
        losses: of the model, (n,), float64.
        twins: losses of each twin, (n,), float64.
        out: which examples each twin was trained without, (n,), boolean.
        counted: which examples have a loss, (n,), boolean.
        cost: passed on.
        doubt: a reason known beforehand why the estimate is not valid.
    """
    nan, mine = math.nan, losses[counted]
    own, parts = ([row[counted] for row in rows] for rows in (twins, out))
    found, missing = torch.full_like(mine, nan), _missing(mine, own, parts)
    if not missing:
        rows = [_pseudo_values(mine, twin, part) for twin, part in zip(own, parts, strict=True)]
        found = torch.stack(rows).mean(0)
    value = float(found.mean())
    error = grouped_error(found - value, None) / max(len(found), 1)
    objection = doubt or missing
    reason = objection or _uncertain(value, error, mine)
    return RiskEstimate(
        value=value,
        standard_error=nan if missing else error,
        valid=not reason,
        reason=reason,
        comparable=not objection,
        cost=cost,
        train_loss=float(mine.mean()),
        response=nan,
        dof=nan,
        dof_error=nan,
        accuracy=None,
        outputs=torch.zeros(len(losses), 0, dtype=torch.float64),
        losses=torch.zeros_like(losses).masked_scatter(counted, found),
        signs=zlib.crc32(b"".join(part.numpy().tobytes() for part in out)),
        counted=counted,
    )


def _missing(losses: Tensor, twins: Sequence[Tensor], out: Sequence[Tensor]) -> str:
    """Why nothing can be estimated; empty if it can."""
    if not len(losses):
        return "no example has a loss: all are masked or of weight zero"
    if not all(bool(row.isfinite().all()) for row in (losses, *twins)):
        return "losses are not finite"
    fewest = min(int(part.sum()) for part in out)
    if fewest < FEWEST:
        return f"of these examples a twin was trained without {fewest} only: pass more of them"
    return ""


def _uncertain(value: float, error: float, losses: Tensor) -> str:
    """Why the error is too large for the level to mean much; empty if it is not."""
    share = error / max(abs(value), float(losses.abs().mean()), TINY)
    if share <= MAX_UNCERTAINTY:
        return ""
    return (
        f"too few examples left out: their losses leave {share:.0%} uncertainty; use more probes, "
        "or leave out a larger share"
    )


def _pseudo_values(losses: Tensor, twin: Tensor, out: Tensor) -> Tensor:
    """The ψ of the module, (n,): independent, and their mean is the estimate."""
    theirs, mine = twin[out], losses[out]
    centred = mine - mine.mean()
    square = float(centred.square().sum())
    b = float((theirs * centred).sum()) / square if square > 0 else 0.0
    value = theirs.mean() + b * (losses.mean() - mine.mean())
    leverage = 1 / len(mine) + centred.square() / max(square, TINY)
    left = (theirs - theirs.mean() - b * centred) / (1 - leverage).clamp_min(LEAST)
    found = b * (losses - losses.mean())
    found[out] += len(losses) / len(mine) * (left - left.mean())
    return value + SCATTER * found
