r"""What one step does to population risk, from the batch it was made of: a U-statistic.

A step :math:`\Delta w(\hat g) = -M\hat g + \Delta_0`, where :math:`\Delta_0` is what momentum and
weight decay do without a gradient, changes population risk to first order by

.. math:: -\sum_k M_k\Big(\mu_k^2 - \frac{\Sigma_{B,k}}{b-1}\Big) + \Delta_0\cdot\mu
          = \frac1b\sum_i g_i\cdot\Delta w(\hat g_{-i})

in expectation over fresh batches: each example judges the step that the others would have made.
The right side holds for any optimizer, linear in the gradient or not, of a step made of one example
(here: one group) less. The batch loss falls by :math:`\mathrm{tr}(M\Sigma_B)/(b-1)` more: noise
fitted [LG, Thm 6.5; the split of the momentum and the right side are ours].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk._renamed import renamed_arguments, renamed_attributes
from poprisk._validate import check_no_batch_statistics, check_separate
from poprisk.evaluation import evaluating
from poprisk.printing import short_html, short_repr
from poprisk.protocols import PerExampleLoss
from poprisk.risk.inputs import check_not_sharded, check_output_losses
from poprisk.risk.local_losses import ignored_examples

Named = Mapping[str, Tensor]


@renamed_attributes(value="risk")
class ModuleChange(NamedTuple):
    """What the step does to the risk through one module; first order, units of the loss.

    Attributes:
        risk: change of population risk.
        empirical: change of the batch loss.
    """

    risk: float
    empirical: float

    __repr__ = short_repr

    @property
    def noise(self) -> float:
        """By how much the batch loss falls further than the risk: noise fitted."""
        return self.risk - self.empirical


class FreshBatchRisk(NamedTuple):
    """Estimate for one step.

    Attributes:
        value: change of population risk, to first order.
        standard_error: over parts of the batch.
        valid: whether the batch was fresh.
        reason: why not.
        cost: of the step's own work: one more pass over its batch, 1.
        level: mean loss of the batch before the step: the population risk, if it is fresh.
        empirical: change of the batch loss.
        noise: noise fitted, the difference.
        modules: the same by module.
    """

    value: float
    standard_error: float
    valid: bool
    reason: str
    cost: float
    level: float
    empirical: float
    noise: float
    modules: dict[str, ModuleChange]

    __repr__ = short_repr
    _repr_html_ = short_html


@renamed_arguments(groups="splits")
def fresh_batch_risk(
    model: nn.Module,
    loss: PerExampleLoss,
    x: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    *,
    fresh: bool,
    splits: int = 8,
) -> FreshBatchRisk:
    """Estimate what the next step on a batch will do to population risk; changes nothing.

    Unbiased in one-pass training only: gradients of examples seen before are no estimate of the
    population's. The step is that of the mean loss over the batch; what is told of risk is told per
    example that has a loss, without those that are masked or of weight zero.

    Args:
        model: in the mode it is trained in; batch norm in training mode is refused.
        loss: one value an example.
        x: inputs of the batch, (b, ...).
        y: targets, (b, ...).
        optimizer: before its step on this batch.
        fresh: whether no example of the batch was trained on before.
        splits: into how many parts the batch is cut, 2 to b; each costs an optimizer step. With b
            parts and SGD the value is the formula above to round-off.

    Raises:
        ValueError: for a loss that is not one value an example, fewer examples than parts, or
            batch norm in training mode, no example that has a loss, or a model whose gradients
            are those of several processes (DDP, FSDP).
        TypeError: if ``fresh`` is not a bool.
    """
    _check_one_process(model)
    if not isinstance(fresh, bool):
        raise TypeError(f"fresh must be True or False, but got {fresh!r}.")
    if isinstance(splits, bool) or not isinstance(splits, int) or not 2 <= splits <= len(x):
        raise ValueError(
            f"splits must be an integer from 2 to the batch's {len(x)} examples, but got "
            f"{splits!r}."
        )
    check_no_batch_statistics(model)
    modes = [(m, m.training) for m in model.modules()]
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    pieces = list(zip(x.tensor_split(splits), y.tensor_split(splits), strict=True))
    shares = [len(part) / len(x) for part, _ in pieces]
    with evaluating(model), _as_trained(modes):
        found = [_gradient(model, loss, *piece, params) for piece in pieces]
    counted = sum(n for _, _, n in found)
    if not counted:
        raise ValueError(
            "no example of the batch has a loss: all labels are ignored, masked or of weight zero."
        )
    rows = [g for _, g, _ in found]
    mean = _combined(rows, shares)
    step = _Rehearsal(optimizer, params)
    idle = step({k: torch.zeros_like(g) for k, g in mean.items()})
    others = [step(_without(mean, g, s)) for g, s in zip(rows, shares, strict=True)]
    judged = [_dot(g, other) for g, other in zip(rows, others, strict=True)]
    rested = torch.stack([_total(_dot(g, idle)) for g in rows])
    value = _combined(judged, shares)
    empirical = _dot(mean, step(mean))
    influence = (2 * torch.stack([_total(j) for j in judged]) - rested) * len(x) / counted
    value, empirical = (
        {k: v * len(x) / counted for k, v in change.items()} for change in (value, empirical)
    )
    modules = _by_module(value, empirical)
    total = ModuleChange(float(_total(value)), float(_total(empirical)))
    return FreshBatchRisk(
        value=total.risk,
        standard_error=float(influence.std()) / math.sqrt(splits),
        valid=fresh,
        reason="" if fresh else "examples were seen before: a rate of noise fitting, not of risk",
        cost=1.0,
        level=sum(total for total, _, _ in found) / counted,
        empirical=total.empirical,
        noise=total.noise,
        modules=modules,
    )


def _check_one_process(model: nn.Module) -> None:
    check_not_sharded("fresh_batch_risk", model)
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if any(isinstance(m, parallel) for m in model.modules()):
        raise ValueError(
            "fresh_batch_risk takes this process's batch only, but the step of a "
            f"{type(model).__name__} is made of all processes' batches; gather the batch and pass "
            "model.module with an optimizer of its parameters, on one process."
        )


@contextmanager
def _as_trained(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """The modes that the model is trained in, inside of ``evaluating``, which restores the rest."""
    for module, training in modes:
        module.training = training
    yield


def _gradient(
    model: nn.Module, loss: PerExampleLoss, x: Tensor, y: Tensor, params: Named
) -> tuple[float, dict[str, Tensor], int]:
    """Sum of the losses of a part of the batch, gradient of their mean, and how many have one."""
    outputs = model(x)
    losses = check_output_losses(loss(outputs, y), outputs, y)
    check_separate(loss, outputs.detach(), y, losses)
    grads = torch.autograd.grad(losses.mean(), list(params.values()), allow_unused=True)
    named = zip(params, grads, strict=True)
    counted = len(x) - int(ignored_examples(loss, outputs, y).sum())
    total = float(losses.detach().double().sum())
    return total, {k: g for k, g in named if g is not None}, counted


class _Rehearsal:
    """The update that an optimizer would take for given gradients; it is put back each time."""

    def __init__(self, optimizer: Optimizer, params: Named) -> None:
        self.optimizer, self.params = optimizer, params
        self.state = copy.deepcopy(optimizer.state_dict())

    def __call__(self, grads: Named) -> dict[str, Tensor]:
        kept = {k: (self.params[k].detach().clone(), self.params[k].grad) for k in self.params}
        try:
            for k, p in self.params.items():
                p.grad = grads.get(k)
            self.optimizer.step()
            return {k: self.params[k].detach() - kept[k][0] for k in grads}
        finally:
            self.optimizer.load_state_dict(copy.deepcopy(self.state))
            for k, p in self.params.items():
                p.data.copy_(kept[k][0])
                p.grad = kept[k][1]


def _without(mean: Named, part: Named, share: float) -> dict[str, Tensor]:
    """The gradient of the rest of the batch."""
    return {k: (g - share * part[k]) / (1 - share) for k, g in mean.items()}


def _combined(rows: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    named = ((k, [s * row[k] for s, row in zip(shares, rows, strict=True)]) for k in rows[0])
    return {k: torch.stack(parts).sum(0) for k, parts in named}


def _dot(a: Named, b: Named) -> dict[str, Tensor]:
    return {k: (a[k].double() * b[k].double()).sum() for k in b}


def _total(values: Named) -> Tensor:
    return torch.stack(list(values.values())).sum()


def _by_module(value: Named, empirical: Named) -> dict[str, ModuleChange]:
    sums: dict[str, ModuleChange] = {}
    for k in value:
        name = k.rpartition(".")[0] or k
        old = sums.get(name, ModuleChange(0.0, 0.0))
        new = (old.risk + float(value[k]), old.empirical + float(empirical[k]))
        sums[name] = ModuleChange(*new)
    return sums
