r"""A step of Adam backwards, in closed form.

With :math:`\hat g = \sigma g + \lambda w`, :math:`m' = \beta_1 m + (1-\beta_1)\hat g`,
:math:`v' = \beta_2 v + (1-\beta_2)\hat g^2`, bias corrections :math:`c_1, c_2` and
:math:`d = \sqrt{v'}/\sqrt{c_2} + \epsilon`, a step is
:math:`w' = (1-\delta) w - \frac{\eta}{c_1} \frac{m'}{d}`, and for adjoints
:math:`\lambda_{w'}, \lambda_{m'}, \lambda_{v'}` after it

.. math:: a = -\frac{\eta}{c_1 d} \lambda_{w'}, \quad
          \mu = \lambda_{m'} + a, \quad
          \nu = \lambda_{v'} - \frac{a\, m'}{2 d \sqrt{c_2 v'}}, \quad
          \lambda_{\hat g} = (1-\beta_1)\mu + 2(1-\beta_2)\hat g\,\nu,

before it :math:`\lambda_w = (1-\delta)\lambda_{w'} + \lambda\,\lambda_{\hat g}`,
:math:`\lambda_m = \beta_1\mu`, :math:`\lambda_v = \beta_2\nu`. With AMSGrad, d reads the largest
:math:`v'` so far, which answers in its place where it is larger. Where :math:`v'` is 0, all
gradients so far were, and its term is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk.attribution.adjoint import Adjoint, Pulled
from poprisk.attribution.steps import WEIGHTS, Settings
from poprisk.jacobian import flat

MOMENTUM, SECOND, LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
"""What Adam keeps of each weight, by the names that torch gives it."""
KINDS = (torch.optim.Adam, torch.optim.AdamW)


class AdamPart(NamedTuple):
    """Neighbouring parameters that took a step alike; the moments are flat, (p,).

    Attributes:
        place: among all weights.
        settings: of their group.
        decoupled: whether weight decay is no part of the gradient.
        step: how many they have taken, this one included.
        weights: before it, of each parameter.
        grads: of each.
        momentum: after the step.
        second: moments after the step.
        largest: of them so far, with AMSGrad.
    """

    place: slice
    settings: Settings
    decoupled: bool
    step: float
    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum: Tensor
    second: Tensor
    largest: Tensor | None

    def pull(self, after: Adjoint) -> Pulled:
        """Backwards through the step of these parameters."""
        w, m, v = self._rows(after, WEIGHTS), self._rows(after, MOMENTUM), self._rows(after, SECOND)
        lr, eps, decay = (float(self.settings[k]) for k in ("lr", "eps", "weight_decay"))
        beta1, beta2 = map(float, self.settings["betas"])
        # In place where that is free: new memory costs as much as the arithmetic.
        root = (self.second if self.largest is None else self.largest).sqrt()
        root.clamp_min_(torch.finfo(root.dtype).tiny ** 0.5)  # of 0: m' is 0, and so is the term
        c = (1 - beta2**self.step) ** 0.5
        inverse = (root / c).add_(eps).reciprocal_()
        a = (w * inverse).mul_(-lr / (1 - beta1**self.step))
        bent = inverse.mul_(self.momentum).div_(root).mul_(-0.5 / c)
        mu, state = m + a, dict[str, Tensor]()
        if self.largest is None:
            nu = torch.addcmul(v, a, bent)
        else:
            top = torch.addcmul(self._rows(after, LARGEST), a, bent)
            own = self.second == self.largest
            nu, state[LARGEST] = v + top * own, top * ~own
        g = torch.mul(self.gradient(), nu, out=a).mul_(2 * (1 - beta2)).add_(mu, alpha=1 - beta1)
        before = w * (1 - lr * decay) if self.decoupled else w + decay * g
        state |= {MOMENTUM: mu.mul_(beta1), SECOND: nu.mul_(beta2)}
        return Pulled(-g if self.settings["maximize"] else g, Adjoint(before, state))

    def gradient(self) -> Tensor:
        r""":math:`\hat g`, what decays and the sign included."""
        g = flat(self.grads)
        if self.settings["maximize"]:
            g.neg_()
        if (decay := float(self.settings["weight_decay"])) and not self.decoupled:
            g.add_(flat(self.weights), alpha=decay)
        return g

    def _rows(self, of: Adjoint, name: str) -> Tensor:
        return _rows(of, name, self.place)


class PartLeftOut(NamedTuple):
    """Neighbouring parameters that had no gradient in a step: nothing of them moved."""

    place: slice

    def pull(self, after: Adjoint) -> Pulled:
        """Their adjoints as they are."""
        w = _rows(after, WEIGHTS, self.place)
        state = {name: _rows(after, name, self.place) for name in after.state}
        return Pulled(torch.zeros_like(w), Adjoint(w, state))


class AdamStep(NamedTuple):
    """A step of all parameters, in parts."""

    parts: Sequence[AdamPart | PartLeftOut]

    def pull(self, after: Adjoint) -> Pulled:
        """Backwards through the whole step, what second moments answer included."""
        found = [part.pull(after) for part in self.parts]
        if len(found) == 1:
            return found[0]
        before = [f.before for f in found]
        names = {name for b in before for name in b.state}
        state = {name: torch.cat([b.of_state(name) for b in before], 1) for name in names}
        weights = torch.cat([b.weights for b in before], 1)
        return Pulled(torch.cat([f.gradient for f in found], 1), Adjoint(weights, state))


def adam_step(
    kind: type[Optimizer],
    groups: Sequence[tuple[Settings, Sequence[int]]],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Sequence[dict[str, Any]],
) -> AdamStep:
    """A step that was taken; what it takes of the state, which goes on changing, is copied.

    Args:
        kind: Adam or AdamW.
        groups: settings of each, and the positions of its parameters.
        weights: before it, of each parameter.
        grads: of each; None for one that was left out.
        state: after it, of each.
    """
    group = {i: j for j, (_, places) in enumerate(groups) for i in places}

    def likeness(i: int) -> tuple[int, float]:
        return group[i], 0.0 if grads[i] is None else float(state[i]["step"])

    parts, start = list[AdamPart | PartLeftOut](), 0
    for (j, step), some in itertools.groupby(range(len(weights)), likeness):
        rows = [*some]
        place = slice(start, start + sum(weights[i].numel() for i in rows))
        start = place.stop
        if not step:
            parts.append(PartLeftOut(place))
            continue
        settings = groups[j][0]
        decoupled = kind is torch.optim.AdamW or settings.get("decoupled_weight_decay", False)
        own, slopes = [weights[i] for i in rows], [g for i in rows if (g := grads[i]) is not None]
        m, v = (flat([state[i][name] for i in rows]) for name in (MOMENTUM, SECOND))
        top = flat([state[i][LARGEST] for i in rows]) if settings["amsgrad"] else None
        parts.append(AdamPart(place, settings, decoupled, step, own, slopes, m, v, top))
    return AdamStep(parts)


def _rows(of: Adjoint, name: str, place: slice) -> Tensor:
    return (of.weights if name == WEIGHTS else of.of_state(name))[:, place]
