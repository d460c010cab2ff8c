"""The gate on any torch optimizer, by rewriting the step it takes."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk._validate import check_number, check_type
from poprisk.dtensor import (
    all_agree,
    global_sums,
    layout_of,
    local,
    locals_of,
)
from poprisk.optim.adamw import (
    Patience,
    PopRiskAdamW,
    checked_gradients,
    evaluate,
    tensor_names,
)
from poprisk.optim.behaviour import Behaviour, Decay, Kind, behaviours, kind_of
from poprisk.optim.fused import gradients_are_finite
from poprisk.optim.fused.build import library, library_if_any
from poprisk.optim.gate import Gate, Mask, TensorList
from poprisk.optim.keep import (
    MOMENTS,
    StepTensors,
    after_step,
    before_step,
    counts_at,
    share_of,
)
from poprisk.optim.replay import mask_and_passed, mask_of
from poprisk.optim.settings import (
    check_by_name,
    check_gate_settings,
    compiled,
    tell_differences,
)
from poprisk.optim.state import (
    check_distinct,
    check_group_sizes,
    check_is_state,
    check_not_resized,
    check_same_basis,
    check_state_keys,
    check_state_shapes,
    count_step,
    follow_precision_,
    hooked_state,
    loaded_hooks,
)
from poprisk.optim.stats import GateStats, gate_sums, module_stats
from poprisk.optim.step import StepContext, StepRule, describe
from poprisk.optim.update import (
    all_finite,
    pieces,
    real_lists,
    state_dtype,
)
from poprisk.optim.variance import ESTIMATORS, StepCounts, VarianceEstimator

Rewrite = Callable[[Tensor, Tensor], Tensor]
PREFIX = "gate_"
"""What the gate's own entries of a saved state begin with, beside those of the optimizer."""

STATE = ("step", *MOMENTS)
SETTINGS = (
    *("beta1", "rho", "mask", "alpha", "z", "softness", "eps"),
    *("batch_size", "dataset_size", "mode", "reduction", "q_min", "gate"),
)


def rewrite_step(optimizer: Optimizer, rewrite: Rewrite) -> None:
    """Let ``optimizer`` take its step and replace each tensor's update by ``rewrite``'s result.

    ``rewrite(p, update)`` sees the parameter after the step and its update without decoupled weight
    decay, which is applied unchanged; it returns the update to take instead. The optimizer's own
    state advances as it would alone.
    """
    found = behaviours(optimizer, optimizer.param_groups)
    decays = [found[kind_of(group)].decay for group in optimizer.param_groups]
    groups = [[p for p in g["params"] if p.grad is not None] for g in optimizer.param_groups]
    before = [[p.detach().clone() for p in params] for params in groups]
    with without_decay(optimizer, decays):
        optimizer.step()
    for group, decay, params, starts in zip(
        optimizer.param_groups, decays, groups, before, strict=True
    ):
        share, last = share_of(decay, group)
        for p, start in zip(params, starts, strict=True):
            update = rewrite(p, p - start).to(p.dtype)
            p.copy_((start + update) * (1 - share) if last else start * (1 - share) + update)


@contextmanager
def without_decay(optimizer: Optimizer, decays: list[Decay | None]) -> Iterator[None]:
    """Set the decoupled weight decay of the groups to 0 for a while."""
    kept = [
        (g, g["weight_decay"]) for g, d in zip(optimizer.param_groups, decays, strict=True) if d
    ]
    for group, _ in kept:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in kept:
            group["weight_decay"] = value


def _check_gate_of_all(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a group that asks to be left out of the gate, which is one for all."""
    if group.get("gate", True) is False:
        raise ValueError(
            "gated() puts one gate on all groups, but one has gate=False (exempt_groups); give "
            "those parameters to an optimizer of their own, or use PopRiskAdamW."
        )


@final
class GatedOptimizer(Optimizer):
    """What :func:`gated` returns; ``param_groups`` are the wrapped optimizer's own.

    Args:
        optimizer: to be wrapped.
        settings: the keyword arguments of :func:`gated`, with its defaults.
    """

    settings: dict[str, Any]
    skipped_steps: int
    _wrapped: Optimizer
    _behaviours: dict[Kind, Behaviour]

    def __init__(self, optimizer: Optimizer, **settings: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"gated() takes a torch optimizer, but got {type(optimizer).__name__}.")
        if isinstance(optimizer, (PopRiskAdamW, GatedOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} is gated already.")
        settings = _checked_settings(settings)
        for group in optimizer.param_groups:
            check_distinct(group["params"])
            _check_gate_of_all(group)
        found = behaviours(optimizer, optimizer.param_groups)
        self.__setstate__(
            {
                "defaults": optimizer.defaults,
                "state": defaultdict(dict),
                "settings": settings,
                "skipped_steps": 0,
                "_wrapped": optimizer,
                "_behaviours": found,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        own = ("settings", "skipped_steps", "_wrapped", "_behaviours")
        state = {"defaults": self.defaults, "state": self.state}
        return {**state, **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._patience = Patience("gated optimizer")
        self._updates: dict[Tensor, Tensor] = {}

    def __repr__(self) -> str:
        gate = ", ".join(f"{name}={value!r}" for name, value in self._own_settings().items())
        inner = repr(self._wrapped).replace("\n", "\n  ")
        return f"GatedOptimizer (\n  gate: {gate}\n  optimizer: {inner}\n)"

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._wrapped

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self._wrapped.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._wrapped.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, unless a gate on it could not be kept."""
        groups = self._wrapped.param_groups
        self._wrapped.add_param_group(param_group)
        try:
            check_distinct(groups[-1]["params"])
            _check_gate_of_all(groups[-1])
            self._decays()
        except (TypeError, ValueError):
            groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one gated step; ``closure`` re-evaluates the model and returns the loss.

        If the wrapped optimizer raises an error, the weights are put back.
        """
        loss = evaluate(closure)
        grads = checked_gradients(self)
        check_not_resized(self.param_groups, self.state)
        decays, own = self._decays(), compiled(self.settings)
        kernel = self._kernel(grads)
        finite = all_finite if kernel is None else gradients_are_finite
        if not all_agree(finite(locals_of(grads)), grads):
            self.skipped_steps += 1
            self._patience.skipped(self.skipped_steps)
            return loss
        self._patience.took(grads, self.param_groups)
        parts = [
            b for g, d in zip(self.param_groups, decays, strict=True) for b in self._take(g, d)
        ]
        for tensors in parts:
            before_step(tensors, own, kernel)
        try:
            with without_decay(self._wrapped, decays):
                self._wrapped.step()
        except BaseException:
            for tensors in parts:
                torch._foreach_copy_(locals_of(tensors.params), tensors.starts)
            raise
        for tensors in parts:
            after_step(tensors, own, kernel)
        return loss

    def _kernel(self, grads: TensorList) -> ctypes.CDLL | None:
        """What does the gate's part of a step in one pass; None: foreach does."""
        fused = self.settings.get("fused")  # a pickle of before has none
        off_cpu = any(g.device.type != "cpu" for g in grads)
        if fused is False or callable(self.settings["mask"]) or off_cpu:
            return None
        return library() if fused else library_if_any()

    def gate_stats(self, model: nn.Module | None = None) -> dict[str, GateStats]:
        """What the gate let through at the last step, as in :meth:`PopRiskAdamW.gate_stats`."""
        names = {id(p): name for name, p in model.named_parameters()} if model else {}
        rows = []
        for i, group in enumerate(self.param_groups):
            own = tensor_names(i, group)
            for j, p in enumerate(group["params"]):
                if p in self._updates:
                    rows.append((names.get(id(p), own[j]), self._row(p)))
        return module_stats(rows)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state with the gate's entries beside its own.

        The gate's begin with ``gate_``: of each parameter its state, of each group the settings and
        the number of skipped steps.
        """
        return hooked_state(self, self._state)

    def _state(self) -> dict[str, Any]:
        saved = self._wrapped.state_dict()
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state = dict(saved["state"])
        for i, p in zip(indices, params, strict=True):
            if self.state.get(p):
                own = {PREFIX + key: self.state[p][key] for key in STATE}
                state[i] = {**state.get(i, {}), **own}
        gate = {**self._own_settings(), "skipped_steps": self.skipped_steps}
        marked = {PREFIX + key: value for key, value in gate.items()}
        groups = [{**group, **marked} for group in saved["param_groups"]]
        return {**saved, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the wrapped optimizer alone (the gate starts fresh).

        As with torch, saved settings replace present ones; a RuntimeWarning tells which of the
        gate's differed.

        Raises:
            TypeError, ValueError: if it is not such a state or does not fit; nothing is changed
                then.
        """
        with loaded_hooks(self, state_dict) as hooked:
            self._load(hooked)

    def _load(self, state_dict: dict[str, Any]) -> None:
        inner, own, settings, skipped = self._checked(state_dict)
        kept = dict(vars(self._wrapped))
        try:
            self._wrapped.load_state_dict(inner)
        except BaseException:
            vars(self._wrapped).update(kept)
            raise
        before = self._own_settings()
        self.settings, self.skipped_steps = settings, skipped
        self.state.clear()
        self._updates.clear()
        for p, state in own.items():
            tensors = {
                k: v.to(p.device, state_dtype(p), copy=True)
                for k, v in state.items()
                if k != "step"
            }
            self.state[p] = {"step": torch.tensor(float(state["step"])), **tensors}
        tell_differences("gated optimizer", [(before, self._own_settings())])

    def _checked(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]], dict[str, Any], int]:
        """The wrapped optimizer's state, the gate's, its settings, skipped steps; all checked."""
        if "gate" in state_dict and "optimizer" in state_dict:
            state_dict = _today(state_dict)
        check_state_keys(state_dict, ("state", "param_groups"), "a gated or plain")
        groups = [dict(group) for group in state_dict["param_groups"]]
        check_group_sizes(groups, self.param_groups)
        marked = [_pop_marked(group) for group in groups]
        numbers = {k for k, v in self.defaults.items() if type(v) in (int, float, tuple)}
        for group, mine in zip(groups, self.param_groups, strict=True):
            check_same_basis(group, mine)
            if missing := sorted(numbers - set(group)):
                raise ValueError(
                    "state_dict does not come from an optimizer of this kind: a group of it lacks "
                    f"{missing}."
                )
            group.update({k: v for k, v in mine.items() if k not in group and k != "params"})
        found = behaviours(
            self._wrapped,
            [{**g, "params": m["params"]} for g, m in zip(groups, self.param_groups, strict=True)],
        )
        state, own = dict(state_dict["state"]), dict[Tensor, dict[str, Any]]()
        for group, mine in zip(groups, self.param_groups, strict=True):
            kind = kind_of({**group, "params": mine["params"]})
            for i, p in zip(group["params"], mine["params"], strict=True):
                entries = check_is_state(i, state.get(i, {}))
                rest = dict(entries)
                gate = _pop_marked(rest)
                _check_complete(i, rest, found[kind].keys[p.dim()])
                check_state_shapes(i, p, rest, found[kind].keys[p.dim()], flat=True)
                if gate:
                    _check_complete(i, gate, STATE)
                    check_state_shapes(i, p, gate, MOMENTS)
                    own[p] = gate
                if i in state:
                    state[i] = rest
        settings = {**self.settings, **_gate_settings(marked[0])} if marked else self.settings
        check_gate_settings(settings)
        skipped = int(marked[0].get("skipped_steps", 0)) if marked else 0
        self._behaviours.update(found)
        return {**state_dict, "state": state, "param_groups": groups}, own, settings, skipped

    def _decays(self) -> list[Decay | None]:
        """The decoupled decay of each group; kinds of groups that are new are tried out first."""
        kinds = [kind_of(group) for group in self.param_groups]
        new = [
            g for g, k in zip(self.param_groups, kinds, strict=True) if k not in self._behaviours
        ]
        if new:
            self._behaviours.update(behaviours(self._wrapped, new))
        return [self._behaviours[kind].decay for kind in kinds]

    def _take(self, group: dict[str, Any], decay: Decay | None) -> list[StepTensors]:
        """The group's parameters with gradients, counted on, with room for their weights."""
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        states = [self._prepared(p) for p in params]
        starts = [self._room(p) for p in params]
        by_kind = dict[Any, StepTensors]()
        for p, state, start, t in zip(params, states, starts, count_step(states), strict=True):
            kind = (p.device, p.dtype, t, layout_of(p))
            if kind not in by_kind:
                by_kind[kind] = StepTensors(group, decay, *kind[2:], [], [], [])
            tensors = by_kind[kind]
            tensors.params.append(p)
            tensors.states.append(state)
            tensors.starts.append(start)
        return list(by_kind.values())

    def _prepared(self, p: Tensor) -> dict[str, Any]:
        """The gate's state of a parameter, made when first needed."""
        state = self.state[p]
        if not state:
            moments = {k: torch.zeros_like(p, dtype=state_dtype(p)) for k in MOMENTS}
            state.update(step=torch.tensor(0.0), **moments)
        follow_precision_(p, state)
        return state

    def _room(self, p: Tensor) -> Tensor:
        """Where a parameter's weights are kept during a step, and its update after it."""
        here, room = local(p), self._updates.get(p)
        if room is None or room.dtype != state_dtype(p) or room.shape != here.shape:
            room = self._updates[p] = torch.empty_like(here, dtype=state_dtype(p))
        return room

    def _row(self, p: Tensor) -> Tensor:
        """The gate of the last step evaluated again: the sums of its statistics."""
        state, layout = self.state[p], layout_of(p)
        tensors = StepTensors({}, None, 0, layout, [p], [state], [self._updates[p]])
        lists = real_lists(tensors.columns(), maximize=False)
        counts, estimator, gate = self._last_gate(p)
        total = torch.zeros(5, dtype=torch.float64, device=lists.params[0].device)
        for piece in [lists] if gate is not None and gate.per_tensor else pieces(lists):
            (update,), (m,), (s,) = piece.exp_avg_sqs, piece.exp_avgs, piece.variances
            q, passed = mask_and_passed(piece, counts, estimator, gate)
            total += gate_sums(q, passed, update, ((m != 0) | (s > 0)).to(m.dtype))
        return global_sums(total, layout)

    def _last_gate(self, p: Tensor) -> tuple[StepCounts, VarianceEstimator | None, Gate | None]:
        t, own = int(self.state[p]["step"]), compiled(self.settings)
        counts = counts_at(own, t)
        return counts, own.estimator, own.gate(counts, layout_of(p))

    @torch.no_grad()
    def step_rule(self, param: Tensor, context: StepContext) -> StepRule:
        """The last step of ``param`` as a linear map of its gradient: the wrapped one's, masked."""
        inner = context._replace(state=self._wrapped.state.get(param, {}))
        rule = describe(self._wrapped).rule(param, inner)
        counts, estimator, gate = self._last_gate(param)
        if gate is None:
            return rule
        tensors = StepTensors({}, None, counts.t, None, [param], [self.state[param]], [param])
        lists = real_lists(tensors.columns(), maximize=False)
        q = mask_of(lists, counts, estimator, gate)
        return rule._replace(precondition=q * rule.precondition)

    def momentum_of(self, param: Tensor) -> Tensor | None:
        """The wrapped optimizer's momentum."""
        return describe(self._wrapped).momentum(param)

    def _own_settings(self) -> dict[str, Any]:
        return {"beta1": self.settings["betas"][0], **{k: self.settings[k] for k in SETTINGS[1:]}}


def _checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`gated`, and its defaults for others, as one step takes them."""
    defaults = dict(gated.__kwdefaults__ or {})
    if unknown := sorted(set(settings) - set(defaults)):
        raise TypeError(
            f"gated() takes no {', '.join(unknown)}: what is not of the gate is set on the "
            f"optimizer that is wrapped; it takes {', '.join(defaults)}."
        )
    found = {**defaults, **settings}
    if found["variance"] in ESTIMATORS and found["variance"] != "ema":
        raise ValueError(
            f'gated() takes variance="ema" only, but got {found["variance"]!r}: it measures from '
            "gradients alone, and the others need PopRiskAdamW's own moments or methods."
        )
    for key in ("batch_size", "dataset_size"):
        if isinstance(found[key], Mapping):
            raise TypeError(
                f"gated() takes {key} as one number, but got {found[key]!r}: gradients of terms "
                "are told to PopRiskAdamW alone, by its method term()."
            )
    check_number("beta1", found["beta1"], low=0.0, high=1.0, include_high=False)
    check_number("eps", found["eps"], low=0.0)
    check_type("gate", found["gate"], bool, "True or False")
    if found["fused"] is not None:
        check_type("fused", found["fused"], bool, "True, False or None")
    check_by_name(found)
    found |= {"betas": (found.pop("beta1"), 0.0), "foreach": None, "weight_decay": 0.0}
    check_gate_settings(found)
    return compiled(found).settings


def _check_complete(index: Any, state: Mapping[str, Any], keys: Iterable[str]) -> None:
    missing = sorted(set(keys) - set(state))
    if state and missing:
        raise ValueError(
            f"state_dict does not come from an optimizer of this kind: its state of parameter "
            f"{index} has {sorted(state)}, but not {missing}."
        )


def _pop_marked(group: dict[str, Any]) -> dict[str, Any]:
    """Take the gate's entries out of a saved group, or of the state of a parameter."""
    keys = [key for key in group if key.startswith(PREFIX)]
    return {key.removeprefix(PREFIX): group.pop(key) for key in keys}


def _gate_settings(marked: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings of a gate as it keeps them."""
    found = {key: marked[key] for key in SETTINGS[1:] if key in marked}
    return {**found, "betas": (marked["beta1"], 0.0)} if "beta1" in marked else found


def _today(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state of version 0.1.0, which kept the gate's beside the optimizer's, in this layout."""
    inner = state_dict["optimizer"]
    state = dict(inner["state"])
    for i, own in state_dict["gate"].items():
        state[i] = {**state.get(i, {}), **{PREFIX + key: own[key] for key in STATE}}
    skipped = {PREFIX + "skipped_steps": state_dict.get("skipped_steps", 0)}
    groups = [{**group, **skipped} for group in inner["param_groups"]]
    return {**inner, "state": state, "param_groups": groups}


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
    mode: str = "auto",
    variance: str = "ema",
    reduction: str | None = None,
    q_min: float = 0.0,
    eps: float = 1e-8,
    gate: bool = True,
    fused: bool | None = None,
) -> GatedOptimizer:
    r"""Put the population-risk gate on any ``torch.optim`` optimizer, without touching its code.

    The wrapped optimizer takes its own step :math:`\Delta w`; the gate then keeps
    :math:`q \odot \Delta w`. Decoupled weight decay is not gated; decay that enters the gradient
    is part of the gradient. Which of them an optimizer applies, and that nothing in its state is a
    copy of the weights, is found by trying it on stand-ins (:mod:`poprisk.optim.behaviour`),
    here and when groups change. Two state vectors of its own, the average gradient and the variance
    of the batch mean, and one of working memory.

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
        mode: ``"auto"`` or ``"paper"``.
        variance: ``"ema"``; the others need what only :class:`PopRiskAdamW` has.
        reduction: None or ``"per_tensor"``.
        q_min: floor of the mask.
        eps: in the mask of ``mode="paper"``.
        gate: False for the wrapped optimizer's own steps, a control.
        fused: the gate's part of a step by the native kernel of :class:`PopRiskAdamW`, one pass
            over memory before the optimizer's and one after it, with the same numbers. None: where
            the kernel can be had, for parameters on the CPU and masks by name; True: with a
            RuntimeWarning where there is no compiler for it; False: never.

    Raises:
        TypeError: for ``fused=True`` with a mask that is a function, and
            if ``optimizer`` is no torch optimizer, is gated already, or does what a gate
            could not keep its promise for: wraps another optimizer, keeps other weights (averages,
            lookahead, schedule-free), needs a closure, moves weights without gradient, or applies
            weight decay of another form than lr·weight_decay or weight_decay times the weights.
        ValueError: for a bad setting.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> opt = gated(torch.optim.SGD([w], lr=0.1, momentum=0.9))
        >>> w.grad = torch.ones(1)
        >>> opt.step()
        >>> w.detach()
        tensor([0.9000])
    """
    settings = {name: value for name, value in locals().items() if name != "optimizer"}
    return GatedOptimizer(optimizer, **settings)
