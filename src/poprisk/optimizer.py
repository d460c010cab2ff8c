"""PopRiskAdamW: AdamW with a population-risk gate on its update."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast, final, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import checks
from poprisk.checks import examples
from poprisk.gate import MASKS_, Mask, TensorList
from poprisk.path.rules import Facts, StepRule
from poprisk.settings import check_optimizer_settings, estimator_of, gate_of
from poprisk.stats import GateStats, gate_sums, module_stats
from poprisk.update import (
    ADAM_KEYS,
    AdamSettings,
    Slots,
    adam_denominator,
    cache_blocks,
    gated_adamw_,
    last_gate,
    last_step_rule,
    masks,
)
from poprisk.variance import WITHIN_BATCH, Clock, VarianceEstimator
from poprisk.within import BatchParts

LOW_PRECISION = (torch.float16, torch.bfloat16)
NOT_LOADED = {
    "foreach",
    "fused",
    "capturable",
    "amsgrad",
    "differentiable",
    "decoupled_weight_decay",
}
"""Settings of a saved group that say how AdamW computed, not what."""


class Bucket(NamedTuple):
    """Parameters of one group that share dtype, device and counters, updated together."""

    group: dict[str, Any]
    params: TensorList
    states: list[dict[str, Any]]
    t: int
    observations: int


@final
class PopRiskAdamW(Optimizer):
    r"""AdamW whose update is masked where the batch gradients do not support it.

    .. math:: w \leftarrow (1-\eta\lambda_{wd}) w
              - \eta\, q \odot \frac{\hat m}{\sqrt{\hat v} + \varepsilon}

    The mask q compares the squared average gradient with the variance of the batch mean
    (:mod:`poprisk.gate`, :mod:`poprisk.variance`). Source: Algorithm 1 of [LG]; the
    calibration of ``mode="auto"`` is ours. One state vector more than AdamW, none with
    ``variance="second-moment"``.

    Args:
        params: parameters, named parameters, parameter groups, or a module (which gives names).
        lr: learning rate, as in ``torch.optim.AdamW``.
        betas: decay rates of the average gradient and of its square.
        eps: added to the root of the average square.
        weight_decay: decoupled, and not gated.
        rho: decay of the variance estimate.
        mask: ``"soft"``, ``"hard"``, ``"snr"``, or a function with the signature of
            :func:`poprisk.gate.soft` (not saved by ``torch.save(..., weights_only=True)``).
        alpha: threshold: ``"auto"``, ``"fresh"`` (1), ``"finite"`` (b/(n-b)) or a number;
            see :func:`poprisk.gate.threshold`. In ``mode="paper"``, ``"auto"`` is the paper's
            rule: finite if ``dataset_size`` is given, else fresh.
        z: how many standard errors ``alpha="auto"`` asks for.
        softness: :math:`\lambda` of the soft and snr masks.
        batch_size: examples behind one step: batch × accumulation steps × processes.
        dataset_size: number of training examples; None for a stream.
        mode: ``"auto"`` centres the variance on the bias-corrected mean and leaves a step
            ungated while there is no estimate; ``"paper"`` is Algorithm 1 to the letter, cold
            start and absolute ``eps`` in the mask included.
        variance: ``"ema"`` (:class:`poprisk.variance.Ema`), ``"second-moment"``, ``"exact"``
            (from per-example gradients: call :meth:`backward` with the losses) or
            ``"microbatch"`` (between accumulation steps: call :meth:`microbatch` after each).
        reduction: None, or ``"per_tensor"``: average over a tensor before the comparison.
        q_min: floor of the mask, in [0, 1].
        foreach: many tensors per kernel (None: yes) or one at a time.
        fused: not available yet; must be None or False.
        maximize: maximize the objective.
        capturable: not available yet; must be False.
        gate: False for a group that is to be plain AdamW.

    A step whose gradients hold a NaN or Inf changes nothing; it is counted in
    :attr:`skipped_steps` and reported once as a RuntimeWarning. State is kept in float32 for
    float16 and bfloat16 parameters. Complex parameters are gated per real component, as AdamW
    treats them.

    Raises:
        TypeError, ValueError: for a bad argument, before anything is changed.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> opt = PopRiskAdamW([w], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.ones(1)
        >>> opt.step()
        >>> w.detach()
        tensor([0.9000])
    """

    _parts: BatchParts | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rho: float = 0.99,
        mask: str | Mask = "soft",
        alpha: float | str = "auto",
        z: float = 1.5,
        softness: float = 0.1,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        mode: str = "auto",
        variance: str = "ema",
        reduction: str | None = None,
        q_min: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        gate: bool = True,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        super().__init__(params, {**defaults, "skipped_steps": 0})

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite; saved in ``state_dict``."""
        return self.param_groups[0]["skipped_steps"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its settings; missing ones come from the defaults."""
        check_optimizer_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._parts = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step; ``closure`` re-evaluates the model and returns the loss."""
        loss = evaluate(closure)
        if not all_finite(checked_gradients(self)):
            warn_skipped("PopRiskAdamW", self._count_skip())
            self._use_parts()
            return loss
        parts = self._checked_parts()
        for bucket in self._buckets():
            _update_bucket(bucket, parts)
        self._use_parts()
        return loss

    def backward(self, losses: Tensor, *, weight: float = 1.0) -> None:
        """Compute gradients for ``variance="exact"``, in place of ``losses.mean().backward()``.

        Adds ``weight`` times the gradient of the mean loss to ``.grad`` of this optimizer's
        parameters and notes the square of each example's share.

        Args:
            losses: (b,), one per example, b ≥ 2; after ``GradScaler.scale`` under AMP.
            weight: share of these examples in the step: chunk size over batch size when one step
                takes several calls.

        Raises:
            TypeError, ValueError: if the losses are not one per example.
            RuntimeError: if gradients from elsewhere are left.
        """
        examples.check_within("backward", self._modes(), "exact")
        self._batch_parts().backward(losses, weight)

    def microbatch(self, size: int) -> None:
        """Note one part of an accumulated batch, for ``variance="microbatch"``.

        Call it after each ``backward()`` of a step; the losses are to be scaled such that
        ``.grad`` becomes the mean over the batch. Gradients are left as they are.

        Args:
            size: examples of this part.

        Raises:
            RuntimeError: if there was no or more than one backward pass since the last call.
        """
        examples.check_within("microbatch", self._modes(), "microbatch")
        checks.check_positive("size", size)
        self._batch_parts().part(size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the parts of a batch that were noted."""
        super().zero_grad(set_to_none)
        if self._parts is not None:
            self._parts.reset()

    def _use_parts(self) -> None:
        if self._parts is not None:
            self._parts.use()

    def _batch_parts(self) -> BatchParts:
        """The parts of this batch; at its start, of what is trainable by now."""
        if self._parts is None or self._parts.parts == 0:
            params = {
                f"{i}.{j}": p
                for i, group in enumerate(self.param_groups)
                for j, p in enumerate(group["params"])
                if p.requires_grad
            }
            self._parts = self._parts or BatchParts(params)
            self._parts.params = params
        return self._parts

    def _checked_parts(self) -> BatchParts | None:
        """The parts of the batch if a group needs them, found to be complete."""
        within = [g for g in self.param_groups if g["variance"] in WITHIN_BATCH and g["gate"]]
        params = [p for group in within for p in group["params"] if p.grad is not None]
        if not params:
            return None
        parts = self._batch_parts()
        parts.check(params)
        return parts

    def _modes(self) -> set[str]:
        return {group["variance"] for group in self.param_groups if group["gate"]}

    def gate_stats(self, model: nn.Module | None = None) -> dict[str, GateStats]:
        """What the gate let through at the last step, per module (:class:`GateStats`).

        Names come from ``model``, or from the named parameters or module given to the
        constructor, else from the position. Groups with ``gate=False`` are left out. Computed
        from the state when called, so that a step costs nothing extra.
        """
        names = {id(p): name for name, p in model.named_parameters()} if model else {}
        return module_stats(self._tensor_gates(names))

    @torch.no_grad()
    def step_rule(self, param: Tensor, facts: Facts) -> StepRule:
        """The last step of ``param`` as a linear map of its gradient, for :mod:`poprisk.path`.

        The preconditioner contains the mask. A mask given as a function may draw at random, so it
        is read off the step.
        """
        return last_step_rule(self.state[param], facts)

    @torch.no_grad()
    def _tensor_gates(self, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
        for i, group in enumerate(self.param_groups):
            own = tensor_names(i, group)
            for j, p in enumerate(group["params"]):
                if group["gate"] and "variance_start" in self.state.get(p, {}):
                    yield names.get(id(p), own[j]), _tensor_gate(self.state[p], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of ``torch.optim.AdamW`` (the variance starts fresh).

        Tensors keep their saved precision (float32 for low-precision parameters). Settings that
        the saved groups lack keep their present values.

        Raises:
            ValueError: if groups or shapes do not match or the state is AMSGrad's; nothing is
                changed then.
        """
        completed = _completed(state_dict, self.param_groups)
        params = [p for g in self.param_groups for p in g["params"]]
        indices = [i for g in completed["param_groups"] for i in g["params"]]
        saved = {p: completed["state"].get(i, {}) for p, i in zip(params, indices, strict=True)}
        for i, (p, state) in enumerate(saved.items()):
            checks.check_state_shapes(i, p, state, (*ADAM_KEYS, "grad_mean_var"))
        super().load_state_dict(completed)
        for p, state in saved.items():
            for key in (*ADAM_KEYS, "grad_mean_var"):
                if key in state:
                    self.state[p][key] = state[key].to(p.device, _state_dtype(p), copy=True)
            if "step" in state:
                self.state[p]["step"] = torch.tensor(float(state["step"]))

    def _count_skip(self) -> int:
        count = self.skipped_steps + 1
        for group in self.param_groups:
            group["skipped_steps"] = count
        return count

    def _buckets(self) -> list[Bucket]:
        return [bucket for group in self.param_groups for bucket in self._group_buckets(group)]

    def _group_buckets(self, group: dict[str, Any]) -> list[Bucket]:
        estimator = estimator_of(group)
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            _prepare(p, state, estimator)
        kinds = [
            (p.device, p.dtype, t, t - state["variance_start"] if estimator else 0)
            for p, state, t in zip(params, states, _count_step(states), strict=True)
        ]
        if len(set(kinds)) == 1:
            return [Bucket(group, params, states, *kinds[0][2:])]
        buckets = {kind: Bucket(group, [], [], *kind[2:]) for kind in kinds}
        for kind, p, state in zip(kinds, params, states, strict=True):
            buckets[kind].params.append(p)
            buckets[kind].states.append(state)
        return list(buckets.values())


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """The loss of a closure passed to ``step``, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    checks.check_closure_result(loss)
    return loss


def checked_gradients(optimizer: Optimizer) -> TensorList:
    """All gradients of an optimizer's parameters; sparse ones are refused."""
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    checks.check_gradients(grads)
    return grads


def tensor_names(index: int, group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters: those given to the constructor, or their positions."""
    return group.get("param_names") or [f"groups[{index}].{j}" for j in range(len(group["params"]))]


def warn_skipped(name: str, count: int) -> None:
    """Say once that steps are being left out."""
    if count == 1:
        warnings.warn(
            f"{name} skipped a step because a gradient holds NaN or Inf (or its square would); "
            "weights and state are unchanged. Further skips are only counted "
            "(optimizer.skipped_steps).",
            RuntimeWarning,
            stacklevel=5,
        )


def all_finite(grads: TensorList) -> bool:
    """Whether no gradient holds a NaN, an Inf, or a number whose square would overflow.

    One norm per tensor decides almost always; the largest entry decides where a norm is larger
    than an entry may be.
    """
    norms: dict[tuple[torch.device, torch.dtype], TensorList] = defaultdict(list)
    for norm in torch._foreach_norm(grads) if grads else []:
        norms[norm.device, norm.dtype].append(norm)
    if all(_below(torch.stack(n)) for n in norms.values()):
        return True
    return all(_below(g.abs()) for g in grads if g.numel())


def _below(sizes: Tensor) -> bool:
    """Whether deviations of these sizes, and no NaN, can be squared in the state's dtype."""
    limit = torch.finfo(_state_dtype(sizes)).max ** 0.5 / 4
    return bool(sizes.max().double() <= limit)


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in LOW_PRECISION else p.dtype


def _prepare(p: Tensor, state: dict[str, Any], estimator: VarianceEstimator | None) -> None:
    """Create the state that the estimator and Adam need and ``state`` lacks."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
        for key in ADAM_KEYS:
            state[key] = torch.zeros_like(p, dtype=_state_dtype(p))
    if estimator is None:
        if "variance_start" in state:
            state["variance_start"] += 1  # nothing is observed while the gate is off
        return
    if "variance_start" in state and all(key in state for key in estimator.state_keys):
        return
    t = int(state["step"].item())
    state["variance_start"] = t if estimator.observes(t + 1) else t + 1
    for key in estimator.state_keys:
        state[key] = torch.zeros_like(p, dtype=_state_dtype(p))


def _count_step(states: list[dict[str, Any]]) -> list[int]:
    """Advance the step counters by one and return them."""
    if not states:
        return []
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    return [int(t) for t in torch.stack(steps).tolist()]


def _update_bucket(bucket: Bucket, parts: BatchParts | None) -> None:
    group, estimator = bucket.group, estimator_of(bucket.group)
    beta1, beta2 = group["betas"]
    clock = Clock(bucket.t, bucket.observations, beta1, beta2)
    settings = AdamSettings(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
    gate = gate_of(group, clock, estimator)
    slots = _slots(bucket, estimator, parts)

    def update_(block: Slots) -> None:
        gated_adamw_(block, settings=settings, clock=clock, estimator=estimator, gate=gate)

    whole_tensors = group["reduction"] is not None or callable(group["mask"])
    if group["foreach"] is False:
        for i in range(len(slots.params)):
            update_(slots.subset([i]))
    elif slots.params[0].device.type != "cpu" or whole_tensors:
        update_(slots)
    else:
        cache_blocks(slots, update_)
    for p, w in zip(bucket.params, slots.params, strict=True):
        if p.dtype in LOW_PRECISION:
            p.copy_(w)


def _slots(bucket: Bucket, estimator: VarianceEstimator | None, parts: BatchParts | None) -> Slots:
    """Real float32 or float64 tensors of a bucket; parameters share memory unless low precision."""
    params, states = bucket.params, bucket.states
    within = parts is not None and estimator is not None and estimator.within_batch
    observed = parts.mean_var(params) if within else []
    keys = (*ADAM_KEYS, *(estimator.state_keys if estimator else ()))
    columns = [params, [cast(Tensor, p.grad) for p in params]]
    columns += [[state[key] for state in states] for key in keys]
    dtype = _state_dtype(params[0])
    if dtype != params[0].dtype or any(g.dtype != dtype for g in columns[1]):
        columns = [[x.to(dtype) for x in column] for column in columns]
    if dtype.is_complex:
        observed = [torch.view_as_real(x) for x in observed]
        columns = [[torch.view_as_real(x) for x in column] for column in columns]
    if bucket.group["maximize"]:
        columns[1] = list(torch._foreach_neg(columns[1]))
    slots = Slots(*columns, *([] for _ in range(6 - len(columns))))
    return slots._replace(observed=observed)


def _tensor_gate(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Re-evaluate the gate of the last step: the sums of its statistics."""
    gate, slots, clock, estimator = last_gate(state, group)
    (m,), (v,) = slots.exp_avgs, slots.exp_avg_sqs
    update = m * clock.mean_scale / adam_denominator([v], clock, group["eps"])[0]
    if gate is None or estimator is None:
        return gate_sums(torch.ones_like(m), torch.ones_like(m), update, v > 0)
    q = masks(slots, clock, estimator, gate)[0]
    passed = masks(slots, clock, estimator, gate._replace(mask=MASKS_["hard"], q_min=0.0))[0]
    return gate_sums(q, passed, update, v > 0)


def _completed(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A shallow copy of ``state_dict`` whose groups have every setting."""
    checks.check_state_dict(state_dict, ADAM_KEYS)
    saved = state_dict["param_groups"]
    sizes, own = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if sizes != own:
        raise ValueError(
            f"state_dict does not fit this optimizer: its groups hold {sizes} parameters, the "
            f"optimizer's {own}."
        )
    if any(group.get("amsgrad") for group in saved):
        raise ValueError(
            "state_dict comes from AdamW(amsgrad=True), whose maximum of v̂ PopRiskAdamW does "
            "not have; train on from a checkpoint without amsgrad, or start the state fresh."
        )
    filled = [
        {**mine, **{k: v for k, v in theirs.items() if k not in NOT_LOADED}}
        for mine, theirs in zip(groups, saved, strict=True)
    ]
    for group in filled:
        check_optimizer_settings(group)
    return {"state": state_dict["state"], "param_groups": filled}
