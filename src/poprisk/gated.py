"""The gate on any torch optimizer, by rewriting the step it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import checks
from poprisk.gate import MASKS_, Mask
from poprisk.optimizer import (
    PopRiskAdamW,
    checked_gradients,
    evaluate,
    tensor_names,
    warn_skipped,
)
from poprisk.path.rules import Facts, StepRule, describe
from poprisk.settings import check_gate_settings, gate_of
from poprisk.stats import GateStats, gate_sums, module_stats
from poprisk.update import all_finite
from poprisk.variance import Clock, Ema

Rewrite = Callable[[Tensor, Tensor], Tensor]


def rewrite_step(optimizer: Optimizer, rewrite: Rewrite) -> None:
    """Let ``optimizer`` take its step and replace each tensor's update by ``rewrite``'s result.

    ``rewrite(p, update)`` sees the parameter after the step and its ungated update, without
    decoupled weight decay, which is applied unchanged; it returns the update to take instead.
    The optimizer's own state advances as it would alone.
    """
    decays = [_decoupled_decay(optimizer, group) for group in optimizer.param_groups]
    before = [
        [p.detach().clone() if p.grad is not None else None for p in group["params"]]
        for group in optimizer.param_groups
    ]
    kept = [group.get("weight_decay") for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay:
            group["weight_decay"] = 0.0
    try:
        optimizer.step()
    finally:
        for group, decay, value in zip(optimizer.param_groups, decays, kept, strict=True):
            if decay:
                group["weight_decay"] = value
    for group, decay, starts in zip(optimizer.param_groups, decays, before, strict=True):
        for p, start in zip(group["params"], starts, strict=True):
            if start is not None:
                update = rewrite(p, p - start)
                p.copy_(start * (1 - float(group["lr"]) * decay) + update.to(p.dtype))


def _decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The group's weight decay if it shrinks weights directly, 0 if it enters the gradient."""
    muon = getattr(torch.optim, "Muon", torch.optim.AdamW)
    decoupled = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adafactor, muon))
    if decoupled or group.get("decoupled_weight_decay", False):
        return float(group["weight_decay"])
    return 0.0


@final
class GatedOptimizer(Optimizer):
    """See :func:`gated`; ``param_groups`` are the wrapped optimizer's own."""

    def __init__(self, optimizer: Optimizer, settings: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.skipped_steps = 0
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        own = ("optimizer", "settings", "skipped_steps")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one gated step; ``closure`` re-evaluates the model and returns the loss."""
        loss = evaluate(closure)
        grads = checked_gradients(self)
        if not all_finite(grads):
            self.skipped_steps += 1
            warn_skipped("gated optimizer", self.skipped_steps)
            return loss
        params = (p for g in self.param_groups for p in g["params"] if p.grad is not None)
        for p, g in zip(params, grads, strict=True):
            self._observe(p, g)
        rewrite_step(self.optimizer, self._rewrite)
        return loss

    def gate_stats(self, model: nn.Module | None = None) -> dict[str, GateStats]:
        """What the gate let through at the last step, as in :meth:`PopRiskAdamW.gate_stats`."""
        names = {id(p): name for name, p in model.named_parameters()} if model else {}
        rows = []
        for i, group in enumerate(self.param_groups):
            own = tensor_names(i, group)
            for j, p in enumerate(group["params"]):
                if "sums" in self.state.get(p, {}):
                    rows.append((names.get(id(p), own[j]), self.state[p]["sums"]))
        return module_stats(rows)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and the gate's, by position of the parameter."""
        params = [p for g in self.param_groups for p in g["params"]]
        gate = {i: dict(self.state[p]) for i, p in enumerate(params) if p in self.state}
        return {
            "optimizer": self.optimizer.state_dict(),
            "gate": gate,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is not such a state or does not fit; nothing is changed then.
        """
        checks.check_state_keys(state_dict, ("optimizer", "gate", "skipped_steps"), "a gated")
        params = [p for g in self.param_groups for p in g["params"]]
        for i, state in state_dict["gate"].items():
            if i >= len(params):
                raise ValueError(
                    f"state_dict does not fit this optimizer: it has state for parameter {i}, but "
                    f"there are {len(params)}."
                )
            checks.check_state_shapes(i, params[i], state, ("exp_avg", "grad_mean_var"))
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        self.skipped_steps = state_dict["skipped_steps"]
        self.state.clear()
        for i, state in state_dict["gate"].items():
            self.state[params[i]] = {
                k: v.to(params[i].device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state.items()
            }

    def _clock(self, p: Tensor) -> Clock:
        t = self.state[p]["step"]
        return Clock(t, t - 1, *self.settings["betas"])

    def _observe(self, p: Tensor, grad: Tensor) -> None:
        state = self.state[p]
        g = _real(grad).to(torch.promote_types(_real(grad).dtype, torch.float32))
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(g), grad_mean_var=torch.zeros_like(g))
        state["step"] += 1
        estimator = Ema(self.settings["rho"])
        estimator.observe_([state["grad_mean_var"]], [g], [state["exp_avg"]], self._clock(p))
        state["exp_avg"].lerp_(g, 1 - self.settings["betas"][0])

    @torch.no_grad()
    def step_rule(self, param: Tensor, facts: Facts) -> StepRule:
        """The last step of ``param`` as a linear map of its gradient: the wrapped one's, masked."""
        inner = facts._replace(state=self.optimizer.state.get(param, {}))
        rule = describe(self.optimizer).rule(param, inner)
        q, _ = self._masks(param)
        return rule if q is None else rule._replace(precondition=q * rule.precondition)

    def momentum_of(self, param: Tensor) -> Tensor | None:
        """The wrapped optimizer's momentum."""
        return describe(self.optimizer).momentum(param)

    def _masks(self, p: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask and which coordinates pass the threshold; None while ungated."""
        state, clock, estimator = self.state[p], self._clock(p), Ema(self.settings["rho"])
        gate = gate_of(self.settings, clock, estimator)
        if gate is None:
            return None, None
        m, s = [state["exp_avg"]], [state["grad_mean_var"]]
        scales = {
            "mean_scale": clock.mean_scale,
            "var_scale": estimator.read(s, m, m, clock)[1],
        }
        q = gate(m, s, **scales)[0]
        return q, gate._replace(mask=MASKS_["hard"], q_min=0.0)(m, s, **scales)[0]

    def _rewrite(self, p: Tensor, update: Tensor) -> Tensor:
        state, u = self.state[p], _real(update)
        m, s = state["exp_avg"], state["grad_mean_var"]
        active = ((m != 0) | (s > 0)).to(m.dtype)
        q, passed = self._masks(p)
        if q is None or passed is None:
            state["sums"] = gate_sums(torch.ones_like(m), torch.ones_like(m), u, active)
            return update
        state["sums"] = gate_sums(q, passed, u, active)
        gated_update = q * u
        return torch.view_as_complex(gated_update) if update.is_complex() else gated_update


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def gated(
    optimizer: Optimizer,
    *,
    beta1: float = 0.9,
    rho: float = 0.99,
    mask: str | Mask = "soft",
    alpha: float | str = "auto",
    z: float = 1.5,
    softness: float = 0.1,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    reduction: str | None = None,
    q_min: float = 0.0,
) -> GatedOptimizer:
    r"""Put the population-risk gate on any ``torch.optim`` optimizer, without touching its code.

    The wrapped optimizer takes its own step :math:`\Delta w`; the gate then keeps
    :math:`q \odot \Delta w`. Decoupled weight decay (AdamW, Muon, ``decoupled_weight_decay=True``)
    is not gated; decay that enters the gradient is part of the gradient. Two state vectors of
    its own: the average gradient and the variance of the batch mean.

    Args:
        optimizer: any optimizer that takes one step per gradient; its ``param_groups`` stay in
            charge, so that schedulers work on either object.
        beta1: decay of the gate's average gradient; best equal to the optimizer's momentum.
        rho: as for :class:`PopRiskAdamW`, like all that follow.
        mask: the mask.
        alpha: threshold.
        z: standard errors for ``alpha="auto"``.
        softness: of the soft and snr masks.
        batch_size: examples behind one step.
        dataset_size: training examples; None for a stream.
        reduction: None or ``"per_tensor"``.
        q_min: floor of the mask.

    Raises:
        TypeError: if ``optimizer`` is no torch optimizer, is gated already, or evaluates its
            closure several times per step (LBFGS).
        ValueError: for a bad setting.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> opt = gated(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        >>> w.grad = torch.ones(1)
        >>> opt.step()
        >>> w.detach()
        tensor([0.9000])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"gated() takes a torch optimizer, but got {type(optimizer).__name__}.")
    if isinstance(optimizer, (PopRiskAdamW, GatedOptimizer)):
        raise TypeError(f"{type(optimizer).__name__} is gated already.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates its closure several times per step and cannot be gated.")
    checks.check_number("beta1", beta1, low=0.0, high=1.0, include_high=False)
    settings = {
        "betas": (beta1, 0.0),
        "rho": rho,
        "mask": mask,
        "alpha": alpha,
        "z": z,
        "softness": softness,
        "batch_size": batch_size,
        "dataset_size": dataset_size,
        "mode": "auto",
        "variance": "ema",
        "reduction": reduction,
        "q_min": q_min,
        "gate": True,
    }
    check_gate_settings(settings)
    return GatedOptimizer(optimizer, settings)
