"""A twin that follows a model in somebody else's training loop."""

from __future__ import annotations

import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk._validate import check_callable, check_type
from poprisk.dtensor import processes
from poprisk.evaluation import Forward
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.printing import described
from poprisk.protocols import PerExampleLoss
from poprisk.randomness import RandomState
from poprisk.risk.inputs import check_output_losses
from poprisk.risk.left_out import Without
from poprisk.risk.local_losses import gradient_of, ignored_examples
from poprisk.risk.twin import CHECKED_EVERY, CHECKED_STEPS, Probe, TwinRisk

Outputs = Callable[[Any], Tensor]
Clip = Callable[[nn.Module, Optimizer], object]

ROUNDING = 1e-3
"""Share of a gradient, or of a loss, that rounding in single precision may make up."""
HALF_ROUNDING = 3e-2
"""Likewise in half precision."""
SMALLEST = 1e-4
"""What the value of a loss is compared with, if it is smaller."""
UPDATE_ROUNDING = 5e-2
"""Share of a step of the optimizer: a sign may turn where a gradient is all rounding."""
ELSEWHERE = (
    "the optimizer had taken steps before the twin followed: what its model learned of the "
    "labels then is not measured"
)


@dataclass
class _Pass:
    """One call of the model in training, and what the loop back-propagates through it.

    Attributes:
        args: of the call.
        kwargs: likewise.
        autocast: precision that the loop set.
        start: global random numbers before the call.
        index: positions of the examples in the training set, None if they were not told.
        targets: of the examples.
        end: random numbers after it.
        dtype: of the outputs.
        slopes: gradient of the summed loss by each tensor that the model returned.
        inner: weight of an example in each scalar that the model returned, and how much of the
            scalar's gradient that leaves open; only of those that the outputs lead to.
        scalars: values of those scalars.
        total: summed loss.
        count: examples that have one.
        cotangents: what the loop back-propagates through each returned tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: _Autocast
    start: RandomState
    index: Tensor | None = None
    targets: Tensor | None = None
    end: RandomState | None = None
    dtype: torch.dtype = torch.float32
    slopes: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, _Fit] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    total: float = math.nan
    count: int = 0
    cotangents: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, grad: Tensor) -> None:
        """Add what is back-propagated through one of the returned tensors."""
        before = self.cotangents.get(name)
        self.cotangents[name] = grad.clone() if before is None else before + grad

    @property
    def rounding(self) -> float:
        """Relative differences that the precision of the outputs explains."""
        whole = self.dtype not in (torch.bfloat16, torch.float16) and not self.autocast.enabled
        return ROUNDING if whole else HALF_ROUNDING


class _Fit(NamedTuple):
    """How many times one gradient another is, and what share of it that leaves open."""

    weight: float
    open: float

    @classmethod
    def of(cls, grads: Iterable[Tensor], slopes: Iterable[Tensor]) -> _Fit:
        g, d = (
            torch.cat([t.detach().double().flatten() for t in parts] or [torch.zeros(0)])
            for parts in (grads, slopes)
        )
        square, size = float(d @ d), float(g.norm())
        if not square:
            return cls(math.nan, math.nan)
        weight = float(g @ d) / square
        return cls(weight, float((g - weight * d).norm()) / size if size else 0.0)


class _Autocast(NamedTuple):
    """Mixed precision as it is set."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> _Autocast:
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, self.enabled)

    def off(self) -> torch.autocast:
        return torch.autocast(self.device, enabled=False)


@final
class Lockstep:
    r"""Let the twins of a :class:`poprisk.TwinRisk` follow a model that another loop trains.

    After each step of the model's optimizer the twins take theirs: on the same batches, all parts
    of an accumulation, with the same random numbers, precision and settings of the optimizer. A
    twin's gradient at its outputs is the loop's own, moved by what the loss says of the difference,

    .. math:: g_i + w\,\bigl(\nabla\ell_i(u_i^{twin}) - \nabla\ell_i(u_i)\bigr) - w\,t_i,

    with t the perturbation and w the weight of an example, which g and :math:`\nabla\ell` tell
    together; with ``leave_out`` t is :math:`(1-w_i)\nabla\ell_i(u_i^{twin})`, with the weight that
    the example has for that twin. Without a perturbation a twin is thus the model, bit for bit. A
    loss that a model computes itself, as those of transformers do, is back-propagated through the
    twin itself.

    That the loop trains nothing but the mean of ``loss`` (or another sum with one weight for all
    examples of a call) is checked at every step; and at the first ten, and then every hundredth,
    that a copy of the model that is trained so without a perturbation has the model's gradients and
    weights. What cannot be followed is an error at first, later a reason why no estimate is valid.

    Args:
        model: to follow, before its training begins; one process, not compiled.
        optimizer: of the model.
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        dataset_size: number of training examples, or the data set itself.
        delta: as for the twin.
        probes: as for the twin.
        seed: as for the twin.
        outputs: from what the model returns to outputs (b, ...); by default the tensor that it is,
            or its ``logits``.
        forward: from a model and an input batch to outputs, for estimates; by default
            ``outputs(model(x))``.
        clip: what the loop does to the gradients before each step, from a model and its optimizer,
            such as ``lambda model, _: clip_grad_norm_(model.parameters(), 1.0)``.
        leave_out: as for the twin.

    Attributes:
        twin: for estimates, ``lockstep.twin.estimate(x, y)``.

    Raises:
        TypeError, ValueError: for a bad argument, or a model or optimizer that cannot be followed.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
        >>> loss = lambda u, y: (u - y).square().mean(1)
        >>> model = nn.Linear(3, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lockstep = Lockstep(model, sgd, loss, dataset_size=100)
        >>> for index in torch.arange(100).split(20):
        ...     lockstep.batch(index, y[index])
        ...     loss(model(x[index]), y[index]).mean().backward()
        ...     sgd.step()
        ...     sgd.zero_grad()
        >>> lockstep.twin.estimate(x, y).valid
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: PerExampleLoss,
        *,
        dataset_size: Any,
        delta: float = 0.3,
        probes: int = 1,
        seed: int = 0,
        outputs: Outputs | None = None,
        forward: Forward | None = None,
        clip: Clip | None = None,
        leave_out: float | None = None,
    ) -> None:
        _check_followed(model, optimizer)
        for name, value in (("outputs", outputs), ("forward", forward), ("clip", clip)):
            if value is not None:
                check_callable(name, value)
        self.outputs: Outputs = outputs or logits_of
        self.clip: Clip = clip or _unclipped
        self._forward = forward or self._called
        self._autocast = _Autocast.now(_device_of(model))
        self.twin = TwinRisk(
            lambda: model,
            lambda m: optimizer if m is model else optimizer_of(m, model, optimizer),
            loss,
            dataset_size=dataset_size,
            delta=delta,
            probes=probes,
            seed=seed,
            forward=self._evaluated,
            leave_out=leave_out,
        )
        if any(optimizer.state.values()):
            self.twin.doubt = ELSEWHERE
        self._checker = copy.deepcopy(self.twin.replicas[1].model)
        self._checked: Optimizer | None = None
        self._left = False
        self._announced: tuple[Tensor, Tensor] | None = None
        self._open: _Pass | None = None
        self._passes: list[_Pass] = []
        self._settings: list[dict[str, Any]] = []
        self._began = 0.0
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __repr__(self) -> str:
        return described("Lockstep", repr(self.twin))

    def remove(self) -> None:
        """Follow no more, and leave no hook on the model."""
        self.twin.replicas[0].leave()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.clear()

    def batch(self, index: Any, targets: Tensor) -> None:
        """Tell which examples the next call of the model in training is of.

        Args:
            index: their positions in the training set, integers (b,).
            targets: as the loss takes them, (b, ...).

        Raises:
            TypeError, ValueError: if the index does not fit the data set, or the targets the index.
        """
        index = self.twin._some_of(index)
        check_type("targets", targets, Tensor, "a tensor")
        if len(targets) != len(index):
            raise ValueError(
                f"targets must hold one row for each of the {len(index)} positions of index, but "
                f"have {len(targets)}."
            )
        self._announced = index, targets

    def state_dict(self) -> dict[str, Any]:
        """The twins' weights and optimizers, and what they depend on; the model is not in it."""
        state = self.twin.state_dict()
        return {
            **state,
            "models": state["models"][1:],
            "optimizers": state["optimizers"][1:],
            "followed": _sizes(self.twin.model),
            "seconds": [run.seconds for run in self.twin.replicas],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; the model has to be where it was then.

        Raises:
            TypeError, ValueError: if it is no such state, or one of another moment of the model,
                other settings, loss or optimizer; nothing is changed then.
        """
        check_type("state_dict", state_dict, Mapping, "a dict")
        missing = {"models", "optimizers", "followed", "seconds"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict is not a Lockstep's: it has no {sorted(missing)}.")
        here = _sizes(self.twin.model)
        if len(here) != len(state_dict["followed"]) or not all(
            math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip(here, state_dict["followed"], strict=True)
        ):
            raise ValueError(
                "state_dict was saved beside other weights of the model than it has now: load the "
                "model and its optimizer from the same checkpoint first."
            )
        own = self.twin.state_dict()
        whole = {name: [own[name][0], *state_dict[name]] for name in ("models", "optimizers")}
        self.twin.load_state_dict({**state_dict, **whole})
        for run, seconds in zip(self.twin.replicas, state_dict["seconds"], strict=True):
            run.seconds = seconds

    def _called(self, model: nn.Module, x: Any) -> Tensor:
        return self.outputs(model(x))

    def _evaluated(self, model: nn.Module, x: Any) -> Tensor:
        """Outputs in the precision that the loop trains in."""
        with self._autocast.again():
            return self._forward(model, x)

    def _object(self, reason: str) -> None:
        """Refuse what cannot be followed, or flag all estimates once training has gone on."""
        if self.twin.steps < CHECKED_STEPS:
            raise ValueError(f"the twin cannot follow this training: {reason}.")
        if not self.twin.doubt:
            self.twin.doubt = reason
            warnings.warn(
                f"no estimate of the twin is valid from now on: {reason}.",
                RuntimeWarning,
                stacklevel=3,
            )

    # What the loop does, as it does it.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open = None
        if not module.training or not torch.is_grad_enabled():
            return
        if not self._passes:
            self._begin_step()
        self._autocast = _Autocast.now(self._autocast.device)
        index, targets = self._announced or (None, None)
        self._announced = None
        self._open = _Pass(args, dict(kwargs), self._autocast, RandomState.now(), index, targets)

    def _begin_step(self) -> None:
        """Before the first pass of a step: keep what a check of the step begins from."""
        self._began = time.perf_counter()
        if self._left:
            self._left = False
            pairs = zip(self.twin.model.parameters(), self._checker.parameters(), strict=True)
            if not all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in pairs):
                self._object(
                    "something else than the optimizer changes the model's weights between steps"
                )
        self._checked = None
        if self.twin.steps < CHECKED_STEPS or self.twin.steps % CHECKED_EVERY == 0:
            _copy_weights_(self._checker, self.twin.model)
            self._checked = optimizer_of(self._checker, self.twin.model, self.twin.optimizer)

    def _after(self, module: nn.Module, args: tuple[Any, ...], found: Any) -> Any:
        """Note what a twin needs, and hand on copies of what was returned.

        What the loop back-propagates through those is apart from what the model itself made of
        the originals, such as its own loss.
        """
        seen, self._open = self._open, None
        if seen is None:
            return found
        seen.end = RandomState.now()
        if seen.index is not None and seen.targets is not None:
            self._look(seen, seen.index, seen.targets, found)
        self._passes.append(seen)
        return _watched(found, seen.note)

    def _look(self, seen: _Pass, index: Tensor, targets: Tensor, found: Any) -> None:
        """What the loss says of the outputs of one pass."""
        u = self._outputs(found, len(index))
        seen.targets = targets = targets.to(u.device)
        with self._autocast.off():
            full = _full(u)
            losses = check_output_losses(self.twin.loss(full, targets), full, targets).detach()
            self.twin._see_first(u, targets)
            labelled = ~ignored_examples(self.twin.loss, _full(u), targets)
            slope = self._slope(u, targets)
        if self.twin.leave_out is None and tuple(u.shape[1:]) != self.twin._shape:
            raise ValueError(
                f"outputs must keep their shape from batch to batch, {self.twin._shape} per "
                f"example, but got {tuple(u.shape[1:])}: give texts of any length leave_out=0.2."
            )
        self.twin.seen.note(index, targets)
        seen.dtype, seen.total, seen.count = u.dtype, float(losses.sum()), int(labelled.sum())
        for name, leaf in _leaves(found).items():
            if leaf.ndim == 0:
                seen.scalars[name] = float(leaf.detach())
                inner = _grad(leaf, u, None)
                if inner is not None:
                    seen.inner[name] = _Fit.of([inner], [slope])
            else:
                through = _grad(u, leaf, slope)
                if through is not None:
                    seen.slopes[name] = through

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Before it: counters that an optimizer keeps in its groups move with the step.
        self._settings = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Let the twins take the step; after it, as a loop may run within ``step(closure)``."""
        own, *twins = self.twin.replicas
        passes = [seen for seen in self._passes if seen.cotangents]
        self._passes.clear()
        if not passes:
            self._checked = None
            self._object(
                "its optimizer stepped, but nothing was back-propagated through what the model "
                "returned (is a part of it called instead?)"
            )
            return
        own.seconds += time.perf_counter() - self._began
        with torch.enable_grad(), RandomState.kept():
            weights = self._weights(passes)
            if self._checked is not None:
                self._check(self._checked, passes, weights)
                self._checked = None
            for run, probe in zip(twins, self.twin.probes or self.twin.without, strict=True):
                began = time.perf_counter()
                self._step(run.model, run.optimizer, passes, weights, probe)
                run.optimizer.zero_grad()
                run.seconds += time.perf_counter() - began
        self.twin.steps += 1

    # What twins do after it.

    def _weights(self, passes: list[_Pass]) -> list[float]:
        """The weight of an example of each pass in what the loop minimizes; checks that it is."""
        count = sum(seen.count for seen in passes)
        return [self._weight(seen, count) for seen in passes]

    def _weight(self, seen: _Pass, count: int) -> float:
        if seen.index is None:
            raise ValueError(
                "the model was trained on a batch whose examples were not told: call "
                "lockstep.batch(index, targets) before each call of the model."
            )
        if not all(bool(grad.isfinite().all()) for grad in seen.cotangents.values()):
            return 0.0  # what is not finite has no weight, and no twin is needed to tell
        scalars = sorted(seen.cotangents.keys() & seen.scalars.keys())
        through = sorted(seen.cotangents.keys() & seen.slopes.keys())
        strange = sorted(seen.cotangents.keys() - {*scalars, *through})
        if strange or (scalars and len(seen.cotangents) > 1):
            self._object(
                "it trains more than the mean of `loss`: it back-propagates through "
                f"{' and '.join(strange or sorted(seen.cotangents))}"
            )
        if scalars:
            fit = seen.inner.get(scalars[0]) or _by_value(seen, seen.scalars[scalars[0]], count)
            scale = float(seen.cotangents[scalars[0]])
        else:
            fit, scale = (
                _Fit.of(
                    *([notes[name] for name in through] for notes in (seen.cotangents, seen.slopes))
                ),
                1.0,
            )
        if seen.count and not (fit.open <= seen.rounding and fit.weight * scale > 0):
            self._object(
                "the loss that is back-propagated is not the mean of `loss` over the batch "
                f"({fit.open:.1%} of its gradient at the outputs is something else; smoothed "
                "labels, weights of classes or examples, a penalty of the outputs?)"
            )
        return fit.weight * scale if math.isfinite(fit.weight) else 0.0

    def _step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        passes: list[_Pass],
        weights: list[float],
        probe: Probe | Without | None,
    ) -> None:
        """One step of a copy of the model, with its labels perturbed if there is a probe."""
        for mine, its in zip(self.twin.model.modules(), model.modules(), strict=True):
            its.training = mine.training
        params = list(model.parameters())
        for mine, its in zip(self.twin.model.parameters(), params, strict=True):
            its.requires_grad_(mine.requires_grad)
        trained = [p for p in params if p.requires_grad]
        for seen, weight in zip(passes, weights, strict=True):
            roots, grads = self._replay(model, seen, weight, probe)
            # Only its own parameters: a forward pass that is tied to the model would reach those.
            torch.autograd.backward(roots, grads, inputs=trained)
        self.clip(model, optimizer)
        if len(optimizer.param_groups) != len(self._settings):
            raise ValueError(
                "a group of parameters was added to the optimizer, which a twin cannot follow: add "
                "all of them before, with a learning rate of 0 for those that are frozen at first."
            )
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update(copy.deepcopy(settings))
        optimizer.step()

    def _replay(
        self, model: nn.Module, seen: _Pass, weight: float, probe: Probe | Without | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What is back-propagated through which tensors, of a copy's pass on the same batch."""
        assert seen.index is not None
        assert seen.targets is not None
        assert seen.end is not None
        seen.start.restore()
        with seen.autocast.again():
            found = model(*seen.args, **seen.kwargs)
        if not seen.end.same(RandomState.now()):
            self._object("a copy of the model drew other random numbers than the model")
        u, leaves = self._outputs(found, len(seen.index)), _leaves(found)
        roots, grads = list[Tensor](), list[Tensor]()
        with self._autocast.off():
            slope = self._slope(u, seen.targets)
        for name, grad in seen.cotangents.items():
            roots.append(leaves[name])
            if name in seen.slopes:
                through = _grad(u, leaves[name], slope)
                grad = grad if through is None else grad + weight * (through - seen.slopes[name])
            grads.append(grad)
        if isinstance(probe, Without):
            beyond = (probe.weights(seen.index) - 1).to(slope)
            roots.append(u)
            grads.append(weight * beyond.reshape(-1, *[1] * (u.ndim - 1)) * slope)
        elif probe is not None:
            roots.append(u)
            grads.append(-weight * self._perturbation(seen.index, u, seen.targets, probe))
        return roots, grads

    def _perturbation(self, index: Tensor, u: Tensor, targets: Tensor, probe: Probe) -> Tensor:
        """Of the labels of a batch, (b, ...); none where there is no label."""
        scale, shift_invariant = self.twin._set_scale(u.detach(), targets)
        z = probe.perturbation(index, u.shape[1:], shift_invariant=shift_invariant)
        found = (scale * z).to(u.device, u.dtype)
        with self._autocast.off():
            ignored = ignored_examples(self.twin.loss, _full(u), targets)
        found[ignored] = 0.0
        return found

    def _check(self, optimizer: Optimizer, passes: list[_Pass], weights: list[float]) -> None:
        """Compare a copy that is trained without a perturbation with the model."""
        own, model = self.twin.model, self._checker
        before = [p.detach().clone() for p in model.parameters()]
        self._step(model, optimizer, passes, weights, None)
        pairs = list(zip(own.parameters(), model.parameters(), strict=True))
        gradients = [(a.grad, b.grad) for a, b in pairs]
        if any((a is None) != (b is None) for a, b in gradients):
            self._object("a copy of the model has no gradients where the model has some")
        model.zero_grad()
        pairs_of_gradients = [(a, b) for a, b in gradients if a is not None and b is not None]
        if not all(bool(a.isfinite().all()) for a, _ in pairs_of_gradients):
            return
        off = _distance(pairs_of_gradients)
        rounding = max(seen.rounding for seen in passes)
        if not off <= rounding:
            self._object(
                f"the gradients of a copy that is trained without a perturbation are {off:.1%} off "
                "(clipping that clip= does not tell, hooks on gradients, a GradScaler, a term of "
                "the loss that is none of the outputs, or a batch that changed afterwards?)"
            )
        moved = [(a - start, b - start) for (a, b), start in zip(pairs, before, strict=True)]
        off = _distance(moved)
        if not off <= UPDATE_ROUNDING:
            self._object(
                f"a step of a copy of {type(optimizer).__name__} with the same gradients is "
                f"{off:.1%} off; it has a state that cannot be copied"
            )
        _copy_weights_(model, own)
        self._left = True

    def _outputs(self, found: Any, count: int) -> Tensor:
        u = self.outputs(found)
        if not isinstance(u, Tensor) or u.ndim < 1 or len(u) != count or not u.requires_grad:
            shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(
                f"outputs must be one row for each of the {count} examples that lockstep.batch() "
                f"was told of, with a gradient, but are {shape}; pass outputs= to take them from "
                "what the model returns."
            )
        return u

    def _slope(self, u: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each example's loss by its outputs, of their shape and kind."""
        return gradient_of(self.twin.loss, _full(u), targets).reshape(u.shape).to(u.dtype)


def logits_of(found: Any) -> Tensor:
    """What a model puts out: the tensor that it returns, or its ``logits``."""
    if isinstance(found, Mapping) and "logits" in found:
        return found["logits"]
    return getattr(found, "logits", found)


def optimizer_of(twin: nn.Module, model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """A copy of a model's optimizer, of the same class, settings and state, for a twin of it."""
    memo: dict[int, Any] = {
        id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    }
    return copy.deepcopy(optimizer, memo)


def _by_value(seen: _Pass, value: float, count: int) -> _Fit:
    """The weight of an example by the values of a loss that the model computes itself.

    Args:
        seen: a pass of the model.
        value: of its loss.
        count: examples of all passes of the step, that the loss may be a share of the mean of.
    """
    weights = [1 / max(examples, 1) for examples in (seen.count, count)]
    fits = [_Fit(w, abs(value - w * seen.total) / max(abs(value), SMALLEST)) for w in weights]
    return min(fits, key=lambda fit: fit.open)


def _unclipped(model: nn.Module, optimizer: Optimizer) -> None:
    """Leave the gradients as they are."""


def _check_followed(model: Any, optimizer: Any) -> None:
    """Raise unless a twin can follow the model and its optimizer."""
    check_type("model", model, nn.Module, "a module")
    check_type("optimizer", optimizer, Optimizer, "a torch.optim optimizer")
    if processes() > 1:
        raise ValueError(
            f"a twin follows a run on one process, but there are {processes()}; let TwinRisk train "
            "it in a loop of your own."
        )
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name or 'the model'} is compiled, and a twin follows no compiled model; leave "
                "torch.compile out."
            )
    hooked = [n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"{hooked[0]} has a post-accumulate-grad hook, which a twin cannot follow; remove it."
        )
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not held or not all(id(p) in own for p in held):
        raise ValueError(
            "the optimizer must hold parameters of the model and no others; put what else is "
            "trained into the model."
        )
    told = optimizer.told_by_loop() if isinstance(optimizer, PopRiskAdamW) else None
    if told is not None:
        raise ValueError(
            f"{type(optimizer).__name__}({told}) is told of gradients by the loop, which a twin "
            'cannot follow; use variance="ema" or "second-moment".'
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} calls the model several times a step, which a twin cannot "
            "follow."
        )


def _device_of(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _full(u: Tensor) -> Tensor:
    """Outputs in single precision at least."""
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _grad(of: Tensor, by: Tensor, along: Tensor | None) -> Tensor | None:
    """Derivative of a tensor of a graph that is kept, None if the other does not lead to it."""
    if of is by:
        return along
    (found,) = torch.autograd.grad(of, by, along, retain_graph=True, allow_unused=True)
    return found


def _leaves(found: Any, name: str = "output") -> dict[str, Tensor]:
    """Tensors with a gradient in what a model returned, by their names in it."""
    if isinstance(found, Tensor):
        return {name: found} if found.requires_grad else {}
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(found, Mapping):
        parts = found.items()
    elif isinstance(found, (tuple, list)):
        parts = enumerate(found)
    return {k: v for key, part in parts for k, v in _leaves(part, f"{name}[{key!r}]").items()}


def _watched(found: Any, note: Callable[[str, Tensor], None], name: str = "output") -> Any:
    """What a model returned, in copies that tell what is back-propagated through them.

    Not views: a loop may write to them in place, as the Trainer does to a loss.
    """
    if isinstance(found, Tensor):
        if not found.requires_grad:
            return found
        copied = found.clone()
        copied.register_hook(partial(note, name))
        return copied
    if isinstance(found, MutableMapping):
        for key, part in list(found.items()):
            found[key] = _watched(part, note, f"{name}[{key!r}]")
        return found
    if isinstance(found, (tuple, list)):
        parts = [_watched(part, note, f"{name}[{i!r}]") for i, part in enumerate(found)]
        return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
    return found


@torch.no_grad()
def _copy_weights_(to: nn.Module, model: nn.Module) -> None:
    """Give a copy of a model its present weights and buffers."""
    for mine, its in ((model.parameters(), to.parameters()), (model.buffers(), to.buffers())):
        for a, b in zip(mine, its, strict=True):
            b.copy_(a)


def _distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How far tensors are from others, as a share of the latter's size."""
    found = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    apart = math.hypot(*(float((a - b).norm()) for a, b in found))
    size = math.hypot(*(float(b.norm()) for _, b in found))
    return apart / size if size else (0.0 if apart == 0 else math.inf)


def _sizes(model: nn.Module) -> list[float]:
    """The size of each of a model's weights."""
    return [float(p.detach().double().norm()) for p in model.parameters()]
