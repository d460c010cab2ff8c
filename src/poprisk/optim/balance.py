r"""How much of the error of repeated examples the other terms of a loss leave to be fitted.

The charge of a term for the error ε of its data set, of variance :math:`\tau^2`, counts ε as if the
weights had not answered to it. Take one direction of a quadratic, in which the repeated examples
have curvature a and the fresh ones of a term that is true, an equation say, curvature b. At a
distance d from the solution their gradients are :math:`g_r = a d - \varepsilon` and
:math:`m = (a + b) d - \varepsilon`, theirs and that of the loss. Gradient flow leaves of ε

.. math:: m:\ -e\,\varepsilon, \qquad g_r:\ -\frac{b + a e}{a + b}\,\varepsilon,
          \qquad e = e^{-(a+b)t},

beside what is left of the distance at the start, :math:`(a+b)` and :math:`a` times the same. The
unbiased charge is :math:`-E[m \varepsilon] = e \tau^2`: what the equation holds in balance is no
step any more, though the examples stay as far from their fit as they are. Both parts of m are to
those of :math:`g_r` as e or more to 1, so that

.. math:: e \le \kappa = \min\big(1, \sqrt{E m^2 / E g_r^2}\big) \le 1,

and :math:`\kappa \tau^2` is never too small a charge; it is exact where the examples bend the loss
little, :math:`a \ll b`. Without other terms :math:`m = g_r` and κ = 1: no term, or one of no
weight, changes nothing.

Both squares are summed over a tensor, less what the noise of the batches adds to them, with
:math:`\hat h/\sqrt{\rho_\max}` in the place of :math:`g_r` (:mod:`poprisk.optim.sizes`):

.. math:: \kappa^2 = \rho_\max \frac{\sum (\hat m^2 - r_t \hat s)}{\sum (\hat h^2 - r_t \hat c)}

Where nothing is seen of h, the charge stays whole. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Balance(NamedTuple):
    r"""What :func:`unbalanced` needs beside sums; h may have been averaged over fewer steps than m.

    Attributes:
        kept: of :math:`\hat s`, as it is estimated, what is in :math:`\hat m^2`.
        kept_terms: of :math:`\hat c` what is in :math:`\hat h^2`.
        scale_terms: the bias correction of h.
        most: :math:`\rho_\max`.
    """

    kept: float
    kept_terms: float
    scale_terms: float
    most: float


def unbalanced(
    balance: Balance,
    rows: Sequence[Sequence[Tensor]],
    *,
    mean_scale: float,
    var_scale: float,
) -> Tensor:
    r"""The factor κ of each tensor, shape (tensors,), float64, in [0, 1].

    Args:
        balance: the noise of the averages.
        rows: of each tensor :math:`m^2`, s, c and :math:`h^2`, averages that are not corrected yet.
        mean_scale: bias correction of m.
        var_scale: of s and c.

    Example:
        >>> one, four = [torch.tensor([1.0])], [torch.tensor([4.0])]
        >>> nothing = [torch.tensor([0.0])]
        >>> balance = Balance(kept=0.1, kept_terms=0.1, scale_terms=1.0, most=1.0)
        >>> unbalanced(balance, [one, nothing, nothing, four], mean_scale=1.0, var_scale=1.0)
        tensor([0.5000], dtype=torch.float64)
    """
    mean_sq, var, charged, terms_sq = (sums(row) for row in rows)
    moved = mean_scale**2 * mean_sq - balance.kept * var_scale * var
    held = balance.scale_terms**2 * terms_sq - balance.kept_terms * var_scale * charged
    share = (balance.most * moved / held).clamp(0.0, 1.0).sqrt()
    return torch.where(held > 0, share, torch.ones_like(share))


def sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor in float64: the same to float32 in any order of summation."""
    return torch.stack([x.sum(dtype=torch.float64) for x in tensors])
