"""PopRiskAdamW: AdamW with a population-risk gate on its update."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsFloat, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk._validate import check_positive, check_type
from poprisk.dtensor import (
    all_agree,
    everywhere,
    layouts_of,
    locals_of,
)
from poprisk.optim.batch_variance import Bases, BatchParts
from poprisk.optim.fused import check_capturable, gradients_are_finite, gradients_are_small
from poprisk.optim.gate import Mask, TensorList
from poprisk.optim.groups import TensorGroup, captured_updates, update_group
from poprisk.optim.rank_variance import Observation, rank_variances
from poprisk.optim.replay import gate_row, last_step_rule
from poprisk.optim.settings import (
    CompiledGroup,
    check_optimizer_settings,
    compiled,
    make_plain_,
    tell_differences,
)
from poprisk.optim.sizes import Sizes
from poprisk.optim.state import (
    ADAM_KEYS,
    VARIANCE_KEYS,
    check_dense,
    check_distinct,
    check_not_resized,
    check_state_shapes,
    completed_state,
    count_step,
    forget_variance_,
    loaded_hooks,
    prepare_state,
    take_variances_,
)
from poprisk.optim.stats import GateStats, module_stats
from poprisk.optim.step import StepContext, StepRule
from poprisk.optim.terms import TermGradients
from poprisk.optim.update import (
    all_finite,
    all_small,
    state_dtype,
)
from poprisk.optim.variance import WITHIN_BATCH, GivenVariances

MEASURED = "measured_variance"
"""Entry of a group: the variance that the averages in the state are of."""


class PopRiskAdamW(Optimizer):
    r"""AdamW whose update is masked where the batch gradients do not support it.

    .. math:: w \leftarrow (1-\eta\lambda_{wd}) w
              - \eta\, q \odot \frac{\hat m}{\sqrt{\hat v} + \varepsilon}

    The mask q compares the squared average gradient with the variance of the batch mean
    (:mod:`poprisk.optim.gate`, :mod:`poprisk.optim.variance`). Source: Algorithm 1 of [LG]; the
    calibration of ``mode="auto"`` is ours. One state vector more than AdamW, none with
    ``variance="second-moment"``, three where terms of the loss have sizes of their own.

    Args:
        params: parameters, named parameters, parameter groups, or a module (which gives names).
        lr: learning rate, as in ``torch.optim.AdamW``.
        betas: decay rates of the average gradient and of its square.
        eps: added to the root of the average square.
        weight_decay: decoupled, and not gated.
        rho: decay of the variance estimate.
        mask: ``"soft"``, ``"hard"``, ``"snr"``, or a function with the signature of
            :func:`poprisk.optim.gate.soft` (not saved by ``torch.save(..., weights_only=True)``).
        alpha: threshold: ``"auto"``, ``"fresh"`` (1), ``"finite"`` (b/(n-b)) or a number;
            see :func:`poprisk.optim.gate.threshold`. In ``mode="paper"``, ``"auto"`` is the paper's
            rule: finite if ``dataset_size`` is given, else fresh.
        z: how many standard errors ``alpha="auto"`` asks for.
        softness: :math:`\lambda` of the soft and snr masks.
        batch_size: examples behind one step: batch × accumulation steps × processes. Of a loss of
            several terms with sizes of their own, a dict by the term's name; then compute each
            gradient within :meth:`term`.
        dataset_size: number of training examples; None for a stream. A dict likewise.
        mode: ``"auto"`` centres the variance on the bias-corrected mean and leaves a step
            ungated while there is no estimate; ``"paper"`` is Algorithm 1 to the letter, cold
            start and absolute ``eps`` in the mask included.
        variance: ``"ema"`` (:class:`poprisk.optim.variance.Ema`), ``"second-moment"``, ``"exact"``
            (from per-example gradients: call :meth:`backward` with the losses), ``"microbatch"``
            (between accumulation steps: call :meth:`microbatch` after each) or
            ``"data-parallel"``, which needs :func:`poprisk.observe_ranks`. Another one in a running
            group begins its own average.
        reduction: None, or ``"per_tensor"``: average over a tensor before the comparison.
        q_min: floor of the mask, in [0, 1].
        foreach: many tensors per kernel (None: yes) or one at a time.
        fused: one pass over memory by a native kernel, compiled at the first step and then kept
            (:mod:`poprisk.optim.fused`): on the CPU by the system's C++ compiler, on CUDA devices
            by Triton. For masks by name; where there is no compiler or no Triton, foreach takes
            over after one RuntimeWarning.
        maximize: maximize the objective.
        capturable: keep counters and choices in tensors, so that CUDA graphs and torch.compile can
            hold the step; skipped steps are counted without a warning. With ``fused=True`` on CUDA
            devices only.
        gate: False for a group that is to be plain AdamW.

    A step whose gradients hold a NaN or Inf changes nothing; it is counted in
    :attr:`skipped_steps` and reported as a RuntimeWarning, once, and again after 100 in a row; so
    are ten steps in a row that find no gradient at all, and the first one where no parameter
    requires any, as where adapters were put on a model after its optimizer was made. State is kept
    in float32 for float16 and bfloat16 parameters. Complex parameters are gated per real component,
    as AdamW treats them.

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

    _tensor_keys: tuple[str, ...] = (*ADAM_KEYS, *VARIANCE_KEYS)
    """What is kept in the precision of the state, also when loaded."""

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
        batch_size: Sizes = None,
        dataset_size: Sizes = None,
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
        self._start(params, defaults)

    def _start(self, params: Any, defaults: dict[str, Any]) -> None:
        """Take up the parameters, with these settings where a group has none of its own."""
        self.rank_observations: dict[Tensor, Observation] = {}
        self._notes = _Notes(type(self).__name__, params if isinstance(params, nn.Module) else None)
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        if params is None:
            raise TypeError(
                "params must be parameters, parameter groups or a module, but got None; pass "
                "model or model.parameters()."
            )
        super().__init__(params, {**defaults, "skipped_steps": 0})
        if not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__} was given parameters none of which requires a gradient: "
                "it will train nothing until some do (requires_grad_()).",
                RuntimeWarning,
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rank_observations": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_notes", _Notes(type(self).__name__, None))

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite; saved in ``state_dict``."""
        return int(self.param_groups[0]["skipped_steps"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its settings; missing ones come from the defaults.

        Where the other groups have names and this one has none, they are looked up in the module
        that the constructor was given, else made up from the position; and the other way round.
        """
        check_type("param_group", param_group, dict, "a dict")
        params = param_group.get("params", ())  # a generator, perhaps, which is read but once
        param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        self._check_group({**self.defaults, **param_group})
        unnamed = self._agree_on_names(param_group)
        try:
            check_distinct(param_group["params"])
            check_capturable({**self.defaults, **param_group})
            super().add_param_group(param_group)
        except BaseException:
            for group in unnamed:
                del group["param_names"]
            raise
        make_plain_(self.param_groups[-1])
        self._notes.parts = None
        self._prepare_captured()

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings, or parameters with them, that cannot be (TypeError, ValueError)."""
        check_optimizer_settings(group)

    def _agree_on_names(self, new: dict[str, Any]) -> list[dict[str, Any]]:
        """Name the new group, or the present ones, where only the other side has names.

        Returns:
            The present groups that have got names.
        """
        params = new["params"]
        named = "param_names" in new or any(isinstance(p, tuple) for p in params)
        old = [group for group in self.param_groups if "param_names" in group]
        if named:
            unnamed = [group for group in self.param_groups if "param_names" not in group]
            for i, group in enumerate(self.param_groups):
                group.setdefault("param_names", tensor_names(i, group))
            return unnamed
        if old:
            known = {id(p): name for name, p in self._notes.named_parameters()}
            i = len(self.param_groups)
            names = [known.get(id(p), f"groups[{i}].{j}") for j, p in enumerate(params)]
            new["params"] = list(zip(names, params, strict=True))
        return []

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; ``closure`` re-evaluates the model and returns the loss."""
        self._notes.terms.check_closed("step()")
        loss = evaluate(closure)
        grads = checked_gradients(self)
        check_not_resized(self.param_groups, self.state)
        if self._any("capturable"):
            self._captured_step(grads)
            return loss
        finite = gradients_are_finite if self._any("fused") else all_finite
        taken = all_agree(finite(locals_of(grads)), grads)
        terms = self._weighted_terms() if taken else {}
        if not (taken and all_finite([*terms.values()])):
            self._notes.patience.skipped(self._count_skip())
            self._use_parts()
            return loss
        given = self._given_variances()
        self._notes.patience.took(grads, self.param_groups)
        self._begin_variances_anew()
        groups = [compiled(group) for group in self.param_groups]
        parts = [tensors for group in groups for tensors in self._tensor_groups(group, terms)]
        take_variances_(groups, self.state, given)
        self.rank_observations.clear()
        for tensors in parts:
            self._update(tensors)
        self._use_parts()
        return loss

    def _begin_variances_anew(self) -> None:
        """Forget averages of a variance that a group no longer takes: they are of other numbers."""
        for group in self.param_groups:
            if group["gate"]:
                before = group.get(MEASURED, group["variance"])
                for p in group["params"] if before != group["variance"] else ():
                    forget_variance_(self.state.get(p, {}))
                group[MEASURED] = group["variance"]

    def _update(self, tensors: TensorGroup) -> None:
        """Update parameters of one kind, and their state."""
        update_group(tensors)

    def backward(self, losses: Tensor, *, weight: float = 1.0) -> None:
        """Compute gradients for ``variance="exact"``, in place of ``losses.mean().backward()``.

        Adds ``weight`` times the gradient of the mean loss to ``.grad`` of this optimizer's
        parameters, by autograd's own backward pass, and notes the square of each example's share.

        Args:
            losses: (b,), one per example, b ≥ 2; after ``GradScaler.scale`` under AMP.
            weight: share of these examples in the step: chunk size over batch size when one step
                takes several calls.

        Raises:
            TypeError, ValueError: if the losses are not one per example or more than
                ``batch_size``, a layer mixes the examples (batch normalization in train mode), or
                gradients take a way that the graph does not show (a compiled model, reentrant
                checkpointing, sharded parameters).
            RuntimeError: if gradients from elsewhere are left, a hook on a parameter whose variance
                is wanted does more than zero entries or scale, or something else changes gradients
                on their way (DistributedDataParallel, say). ``.grad`` and weights are then as
                before.
        """
        self._check_within("backward", "exact")
        if isinstance(weight, bool) or not isinstance(weight, SupportsFloat):
            raise TypeError(f"weight must be a number, but got {type(weight).__name__}.")
        if not 0 < float(weight) < math.inf:
            raise ValueError(f"weight must be positive and finite, but got {weight}.")
        self._next_parts().backward(losses, float(weight), self._step_size("exact"))

    def microbatch(self, size: int) -> None:
        """Note one part of an accumulated batch, for ``variance="microbatch"``.

        Call it after each ``backward()`` of a step; the losses are to be scaled such that
        ``.grad`` becomes the mean over the batch. Gradients are left as they are.

        Args:
            size: examples of this part.

        Raises:
            RuntimeError: if there was no or more than one backward pass since the last call.
        """
        self._check_within("microbatch", "microbatch")
        check_positive("size", size)
        self._next_parts().part(size, self._step_size("microbatch"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the parts of a batch that were noted."""
        self._notes.terms.reset()
        super().zero_grad(set_to_none)
        if self._notes.parts is not None:
            self._notes.parts.reset()

    def term(self, name: str) -> AbstractContextManager[None]:
        """Within this context, ``loss.backward()`` computes the gradient of one term of the loss.

        For ``batch_size`` and ``dataset_size`` by term. ``.grad`` becomes the sum of all terms, as
        without it; factors common to a tensor (unscaling, clipping by norm) may follow. Several
        backward passes of one term add up.

        Args:
            name: of the term, as in ``batch_size``.

        Raises:
            ValueError: for a name that ``batch_size`` does not have.
            RuntimeError: if sizes are not by term; or if gradients are not of a term of this step,
                or not seen whole (several processes, hooks that step): ``.grad`` and weights are
                then as before.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(1))
            >>> batch, whole = {"data": 5, "inside": 5}, {"data": 50, "inside": None}
            >>> opt = PopRiskAdamW([w], batch_size=batch, dataset_size=whole)
            >>> with opt.term("data"):
            ...     (2 * w).sum().backward()
            >>> with opt.term("inside"):
            ...     (3 * w).sum().backward()
            >>> w.grad
            tensor([5.])
        """
        told = [g for g in self.param_groups if isinstance(g["batch_size"], Mapping)]
        if not told:
            raise RuntimeError(
                f"term({name!r}) is for batch_size and dataset_size by term, but they are "
                'one number here; pass dicts, as in batch_size={"data": 32, "inside": 32}.'
            )
        for group in told:
            if name not in group["batch_size"]:
                known = ", ".join(map(repr, group["batch_size"]))
                raise ValueError(f"name must be a term of batch_size ({known}), but got {name!r}.")
        groups = [compiled(group) for group in told]
        charges = {p: g.charges[name] for g in groups if g.charges for p in g.settings["params"]}
        return self._notes.terms.term(name, charges) if charges else nullcontext()

    def _weighted_terms(self) -> dict[Tensor, Tensor]:
        """What terms that are charged differently add, for the parameters that are told of them."""
        groups = [g for g in self.param_groups if isinstance(g["batch_size"], Mapping)]
        told = [p for g in map(compiled, groups) if g.charges for p in g.settings["params"]]
        return self._notes.terms.weighted([p for p in told if p.grad is not None and p.numel()])

    def _use_parts(self) -> None:
        if self._notes.terms.open is None:
            self._notes.terms.reset()
        if self._notes.parts is not None:
            self._notes.parts.use()

    def _batch_parts(self) -> BatchParts:
        """The parts of this batch; at its start, of what is trainable by now."""
        parts = self._notes.parts
        if parts is None or parts.parts == 0:
            params = self._trainable()
            parts = self._notes.parts = parts or BatchParts(params, self._bases())
            parts.params, parts.wanted = params, {*self._params_with(WITHIN_BATCH)}
        return parts

    def _trainable(self) -> dict[str, Tensor]:
        """The parameters that take gradients at present, by group and place."""
        return {
            f"{i}.{j}": p
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
            if p.requires_grad
        }

    def _next_parts(self) -> BatchParts:
        """The same before a backward pass, which may be the first after gradients were cleared."""
        if self._notes.parts is not None:
            self._notes.parts.restart_if_cleared()
        parts = self._batch_parts()
        if parts.parts > 0 and {*parts.params.values()} != {*self._trainable().values()}:
            raise RuntimeError(
                "parameters were frozen, unfrozen or added between two parts of a batch; do so "
                "after step() or optimizer.zero_grad()."
            )
        return parts

    def _params_with(self, variances: Sequence[str]) -> TensorList:
        """Parameters whose gate takes one of these variances."""
        groups = [g for g in self.param_groups if g["gate"] and g["variance"] in variances]
        return [p for group in groups for p in group["params"]]

    def _bases(self) -> Bases | None:
        """In which bases variances are wanted."""
        return None

    def _given_variances(self) -> GivenVariances:
        """The variances that parameters are given; checked before any state changes."""
        within, between = (
            [p for p in self._params_with(kinds) if p.grad is not None and p.numel()]
            for kinds in (WITHIN_BATCH, ("data-parallel",))
        )
        given = rank_variances(between, self.rank_observations)
        return given | (self._batch_parts().variances(within) if within else {})

    def _step_size(self, variance: str) -> int | None:
        """The least examples behind one step that a group with this variance was told of."""
        groups = [g for g in self.param_groups if g["gate"] and g["variance"] == variance]
        return min((g["batch_size"] for g in groups if g["batch_size"] is not None), default=None)

    def _check_within(self, method: str, needed: str) -> None:
        """Raise RuntimeError if a method does not belong to the variance estimator in use."""
        found = {group["variance"] for group in self.param_groups if group["gate"]}
        if set(WITHIN_BATCH) <= found:
            raise RuntimeError(
                'one optimizer takes variance="exact" or "microbatch", not both; use two '
                "optimizers."
            )
        if needed not in found:
            used = ", ".join(map(repr, sorted(found))) or "none"
            raise RuntimeError(
                f"{method}() is for variance={needed!r}, but this optimizer uses {used}."
            )

    def told_by_loop(self) -> str | None:
        """A setting by which the training loop has to tell more than gradients; None: none."""
        for group in self.param_groups:
            if group["gate"] and group["variance"] in (*WITHIN_BATCH, "data-parallel"):
                return f"variance={group['variance']!r}"
            if compiled(group).charges:
                return "sizes by term"
        return None

    def gate_stats(self, model: nn.Module | None = None) -> dict[str, GateStats]:
        """What the gate let through at the last step, per module (:class:`GateStats`).

        Names come from ``model``, or from the named parameters or module given to the
        constructor, else from the position. Groups with ``gate=False`` are left out. Computed
        from the state when called, so that a step costs nothing extra.
        """
        names = {id(p): name for name, p in model.named_parameters()} if model else {}
        return module_stats(self._tensor_gates(names))

    @torch.no_grad()
    def step_rule(self, param: Tensor, context: StepContext) -> StepRule:
        """The last step of ``param`` as a linear map of its gradient, for :mod:`poprisk.path`.

        The preconditioner contains the mask. A mask given as a function may draw at random, so it
        is read off the step.
        """
        return last_step_rule(param, self.state[param], context)

    @torch.no_grad()
    def _tensor_gates(self, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
        for i, group in enumerate(self.param_groups):
            own = tensor_names(i, group)
            for j, p in enumerate(group["params"]):
                if group["gate"] and "variance_start" in self.state.get(p, {}):
                    yield names.get(id(p), own[j]), self._gate_row(p, group)

    def _gate_row(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The sums of the statistics of one parameter's last gate."""
        return gate_row(p, self.state[p], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of ``torch.optim.AdamW`` (the variance starts fresh).

        Tensors keep their saved precision (float32 for low-precision parameters). As with torch,
        saved settings replace present ones, and a RuntimeWarning tells which of the gate's
        differed; settings that the saved groups lack keep their present values.

        Raises:
            ValueError: if groups or shapes do not match or the state is AMSGrad's; nothing is
                changed then.
        """
        with loaded_hooks(self, state_dict) as hooked:
            self._load(hooked)

    def _load(self, state_dict: dict[str, Any]) -> None:
        completed = completed_state(state_dict, self.param_groups)
        params = [p for g in self.param_groups for p in g["params"]]
        indices = [i for g in completed["param_groups"] for i in g["params"]]
        saved = {p: completed["state"].get(i, {}) for p, i in zip(params, indices, strict=True)}
        for i, (p, state) in enumerate(saved.items()):
            check_state_shapes(i, p, state, (*ADAM_KEYS, *VARIANCE_KEYS))
        pairs = zip(self.param_groups, completed["param_groups"], strict=True)
        tell_differences(type(self).__name__, list(pairs))
        super().load_state_dict(completed)
        for group in self.param_groups:
            group.setdefault(MEASURED, group["variance"])
        for p, state in saved.items():
            for key in self._tensor_keys:
                if key in state:
                    self.state[p][key] = state[key].to(p.device, state_dtype(p), copy=True)
            if "step" in state:
                self.state[p]["step"] = torch.tensor(float(state["step"]))
        self._prepare_captured()

    def _captured_step(self, grads: TensorList) -> None:
        """The same step without a number that changes from call to call, nor a choice by value."""
        in_one_pass = self._any("fused") and not torch.compiler.is_compiling()
        small = gradients_are_small if in_one_pass else all_small
        finite = everywhere(small(locals_of(grads)), grads)
        for group in self.param_groups:
            _count_captured_skip(group, ~finite)
            now = compiled(group)
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            captured_updates(now, params, [self.state[p] for p in params], finite)

    def _prepare_captured(self) -> None:
        """Make all state at once: none may be made while a step is captured."""
        for group in self.param_groups:
            for p in group["params"] if group["capturable"] else []:
                prepare_state(p, self.state[p], compiled(group).estimator, on_device=True)

    def _any(self, switch: str) -> bool:
        return any(group[switch] for group in self.param_groups)

    def _count_skip(self) -> int:
        count = self.skipped_steps + 1
        for group in self.param_groups:
            group["skipped_steps"] = count
        return count

    def _tensor_groups(
        self, group: CompiledGroup, terms: Mapping[Tensor, Tensor]
    ) -> list[TensorGroup]:
        """The group's parameters with gradients, counted on."""
        params = [p for p in group.settings["params"] if p.grad is not None and p.numel()]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            prepare_state(p, state, group.estimator)
        steps = count_step(states)
        starts = [state["variance_start"] for state in states] if group.estimator else steps
        kinds = [
            (p.device, p.dtype, t, t - start, layout)
            for p, t, start, layout in zip(params, steps, starts, layouts_of(params), strict=True)
        ]
        if len(set(kinds)) == 1:
            return [TensorGroup(group, params, states, *kinds[0][2:], terms)]
        by_kind = {kind: TensorGroup(group, [], [], *kind[2:], terms) for kind in kinds}
        for kind, p, state in zip(kinds, params, states, strict=True):
            by_kind[kind].params.append(p)
            by_kind[kind].states.append(state)
        return list(by_kind.values())


def _count_captured_skip(group: dict[str, Any], skipped: Tensor) -> None:
    """Count a step that may be left out, in place: a graph reads and writes the same memory."""
    count = group["skipped_steps"]
    if isinstance(count, Tensor) and count.device == skipped.device:
        count.add_(skipped)
    else:
        group["skipped_steps"] = int(count) + skipped.int()


class _Notes:
    """What an optimizer remembers of a run beside its state; neither saved nor copied.

    It is one object, so that a wrapper that imitates the optimizer, as Lightning's does, shares it.

    Args:
        name: of the optimizer, for messages.
        model: the module whose parameters are optimized, if it is known; not kept alive.
    """

    def __init__(self, name: str, model: nn.Module | None) -> None:
        self.model = weakref.ref(model) if model is not None else None
        self.parts: BatchParts | None = None
        self.terms = TermGradients()
        self.patience = Patience(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Notes:
        return _Notes(self.patience.name, None)

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The present parameters of the module."""
        model = self.model() if self.model is not None else None
        return list(model.named_parameters()) if model is not None else []


class Patience:
    """Counts steps in a row that did nothing, and says so when they become many.

    Args:
        name: of the optimizer, for messages.
    """

    SKIPS = 100
    IDLE = 10

    def __init__(self, name: str) -> None:
        self.name = name
        self.skips = self.idle = 0
        self.told_idle = False

    def skipped(self, count: int) -> None:
        """Note a step that was left out, the ``count``-th in all."""
        self.skips += 1
        if count == 1:
            warnings.warn(
                f"{self.name} skipped a step because a gradient holds NaN or Inf (or its square "
                "would); weights and state are unchanged. Further skips are only counted "
                f"(optimizer.skipped_steps), until {self.SKIPS} in a row.",
                RuntimeWarning,
                stacklevel=5,
            )
        elif self.skips == self.SKIPS:
            warnings.warn(
                f"{self.name} has skipped {self.SKIPS} steps in a row: NOTHING IS BEING TRAINED. "
                "Every gradient since holds NaN or Inf; look for NaN in the data or the weights, "
                "or lower the learning rate.",
                RuntimeWarning,
                stacklevel=5,
            )

    def took(self, grads: TensorList, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note a step that was not left out."""
        self.skips = 0
        self.idle = 0 if grads else self.idle + 1
        frozen = self.idle == 1 and not any(p.requires_grad for g in groups for p in g["params"])
        if frozen and not self.told_idle:
            self.told_idle = True
            warnings.warn(
                f"{self.name} holds frozen parameters only: nothing is being trained. If adapters "
                "(LoRA) were put on the model after its optimizer was made, make the optimizer "
                "from the model that has them.",
                RuntimeWarning,
                stacklevel=5,
            )
        if self.idle == self.IDLE and not self.told_idle:
            self.told_idle = True
            warnings.warn(
                f"{self.name} has found no gradient at all in {self.IDLE} steps in a row: nothing "
                "is being trained. Call backward() before step(), and check that the parameters "
                "given to the optimizer are those that the loss depends on.",
                RuntimeWarning,
                stacklevel=5,
            )


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What a closure passed to ``step`` returns, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def checked_gradients(optimizer: Optimizer) -> TensorList:
    """All gradients of an optimizer's parameters; sparse ones are refused."""
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    check_dense(grads)
    return grads


def tensor_names(index: int, group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters: those given to the constructor, or their positions."""
    return group.get("param_names") or [f"groups[{index}].{j}" for j in range(len(group["params"]))]
