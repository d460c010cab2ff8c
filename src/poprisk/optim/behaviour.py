"""What an optimizer does to weights, found by trying it on small stand-ins.

A gate needs to know two things of a step: how much of it is decoupled weight decay, which is not
gated, and that nothing but the parameters holds weights, for whatever else does would move on
behind a shut gate. Names of classes tell neither. So a twin of the optimizer, with the same
settings and no state, takes a few steps on stand-ins of the same kinds of tensors, and what it does
is compared with the patterns that are known. An optimizer that fits none is refused.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from poprisk.dtensor import is_sharded
from poprisk.randomness import RandomState

Group = dict[str, Any]
Kind = tuple[Any, ...]

SIZES = (6, 4, 3, 2)
"""Sizes of a stand-in's dimensions; further ones have size 2."""

RATES = (0.1, 0.04)
"""Learning rates of the two halves of a trial: they tell a decay that is the rate times a constant
from one that is not."""

WEIGHT_DECAY = 0.3
STEPS = 8
MEMORY_STEPS = 13
"""Twice the usual period of a lookahead, and one."""


class Decay(NamedTuple):
    r"""Decoupled weight decay of a group: weights shrink by a factor :math:`1-c` in each step.

    Attributes:
        scaled: c is the learning rate times ``weight_decay``; else ``weight_decay`` itself.
        last: weights shrink after the update, and the update with them.
    """

    scaled: bool
    last: bool

    def share(self, group: Group) -> float:
        """The share c of the weights that a step takes away."""
        decay = float(group["weight_decay"])
        return float(group["lr"]) * decay if self.scaled else decay


CANDIDATES = tuple(Decay(scaled, last) for scaled in (True, False) for last in (False, True))


class Behaviour(NamedTuple):
    """What was found about a group.

    Attributes:
        decay: its decoupled decay; None: there is none, or it enters the gradient.
        keys: of a parameter with so many dimensions, which tensors of its state have its shape.
    """

    decay: Decay | None
    keys: dict[int, frozenset[str]]


class _Misfit(Exception):
    """Why an optimizer cannot be gated, to be read after its name."""


def kind_of(group: Group) -> Kind:
    """What the behaviour on a group depends on: its switches, whether it decays, its tensors.

    Rates and other numbers change from step to step and are no part of it.
    """
    switches = {k: v for k, v in group.items() if v is None or isinstance(v, (bool, str))}
    tensors = {(p.dim(), _place(p)) for p in group["params"]}
    named = frozenset((dim, str(place)) for dim, place in tensors)  # few: names take long to make
    return (tuple(sorted(switches.items())), _decays(group), named)


def behaviours(optimizer: Optimizer, groups: Iterable[Group]) -> dict[Kind, Behaviour]:
    """The behaviour of an optimizer on each kind of group (:func:`kind_of`).

    Args:
        optimizer: any; neither it nor its hooks nor random numbers are touched.
        groups: complete settings, with ``params``.

    Raises:
        TypeError: if a gate on it could not keep its promise.
    """
    name, kinds = type(optimizer).__name__, {kind_of(group): group for group in groups}
    kept = RandomState.now()
    try:
        _check_structure(optimizer)
        with torch.no_grad():
            return {kind: _examined(optimizer, group) for kind, group in kinds.items()}
    except _Misfit as misfit:
        raise TypeError(f"{name} cannot be gated: it {misfit}.") from None
    finally:
        kept.restore()


def _check_structure(optimizer: Optimizer) -> None:
    """Refuse what steps another optimizer, swaps weights for evaluation, or asks for closures."""
    inner = [type(x).__name__ for x in vars(optimizer).values() if isinstance(x, Optimizer)]
    if inner:
        raise _Misfit(
            f"wraps another optimizer. Gate that one, and wrap it then: "
            f"{type(optimizer).__name__}(poprisk.gated({inner[0]}(...)))"
        )
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise _Misfit(
            "has train() and eval(), so it keeps other weights for evaluation, which would move "
            "behind a shut gate"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _Misfit("needs a closure, which it may evaluate several times per step")


def _examined(optimizer: Optimizer, group: Group) -> Behaviour:
    """Try one group out, in double precision or, where the optimizer cannot, in single."""
    errors = list[Exception]()
    for dtype in (torch.float64, torch.float32):
        try:
            return _judged(_Trial(optimizer, group, dtype))
        except _Misfit:
            raise
        except Exception as error:  # a step of a foreign optimizer may fail in any way
            errors.append(error)
    raise _Misfit(
        "cannot be tried out on stand-ins for its parameters: "
        f"{type(errors[0]).__name__}: {errors[0]}"
    ) from errors[0]


class _Trial:
    """Runs of twins of an optimizer on stand-ins for one group.

    The gradients of half of the rows are zero at every step: what happens there comes from the
    weights.
    """

    def __init__(self, optimizer: Optimizer, group: Group, dtype: torch.dtype) -> None:
        self.optimizer, self.group = optimizer, group
        self.tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        draws = torch.Generator().manual_seed(0)
        self.starts, self.grads = list[Tensor](), list[list[Tensor]]()
        for dim, device in sorted({(p.dim(), _device(p)) for p in group["params"]}):
            shape = (*SIZES, *[2] * dim)[:dim]
            rows = torch.randn((MEMORY_STEPS + 2, *shape), generator=draws, dtype=dtype)
            start, *grads = rows.to(device)
            for grad in grads if dim else ():
                grad[SIZES[0] // 2 :] = 0.0
            self.starts.append(start)
            self.grads.append(grads)

    def twin(self, starts: Sequence[Tensor], weight_decay: float) -> Optimizer:
        """A fresh optimizer of the same kind on stand-ins with these values, drawing the same."""
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        group = {k: v for k, v in self.group.items() if k not in ("params", "param_names")}
        group = copy.deepcopy(group)
        group["params"] = [torch.nn.Parameter(w.clone()) for w in starts]
        if "weight_decay" in group:
            _set(group, "weight_decay", weight_decay)
        return _twin(self.optimizer, group)

    def run(
        self, weight_decay: float, *, by_hand: Decay | None = None, coupled: float = 0.0
    ) -> list[Tensor]:
        """The weights after some steps; decay may be applied by hand, or added to gradients."""
        twin = self.twin(self.starts, weight_decay)
        (group,) = twin.param_groups
        for t in range(STEPS):
            _set(group, "lr", RATES[2 * t // STEPS])
            before = [p.detach().clone() for p in group["params"]]
            for p, w, grads in zip(group["params"], before, self.grads, strict=True):
                p.grad = grads[t] + coupled * w
            _bare_step(twin)
            if by_hand is not None:
                share = by_hand.share({**group, "weight_decay": WEIGHT_DECAY})
                for p, w in zip(group["params"], before, strict=True):
                    p.sub_(share * (p if by_hand.last else w))
        return [p.detach().clone() for p in group["params"]]

    def idle(self) -> list[Tensor]:
        """The weights after two steps without gradient and weight decay."""
        twin = self.twin(self.starts, 0.0)
        for _ in range(2):
            for p in twin.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            _bare_step(twin)
        return [p.detach().clone() for p in twin.param_groups[0]["params"]]

    def held(self, at: Sequence[Tensor]) -> Optimizer:
        """The twin after steps that all left the weights at ``at``, and one from the start."""
        twin = self.twin(at, 0.0)
        params = twin.param_groups[0]["params"]
        for t in range(MEMORY_STEPS + 1):
            for p, held, start, grads in zip(params, at, self.starts, self.grads, strict=True):
                p.copy_(held if t < MEMORY_STEPS else start)
                p.grad = grads[t].clone()
            _bare_step(twin)
        return twin

    def same(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        """Whether weights agree to rounding."""
        pairs = zip(a, b, strict=True)
        return all(bool(((x - y).abs() <= self.tolerance * (1 + y.abs())).all()) for x, y in pairs)


def _judged(trial: _Trial) -> Behaviour:
    if not trial.same(trial.idle(), trial.starts):
        raise _Misfit(
            "moves weights also where the gradient is zero and weight_decay is 0, which a gate "
            "would prevent"
        )
    keys = _keys_without_memory(trial)
    return Behaviour(_decay(trial) if _decays(trial.group) else None, keys)


def _decay(trial: _Trial) -> Decay | None:
    """Which of the known patterns the weight decay of a group follows.

    Without momentum, decay in the gradient and decay of the weights are the same; then the group's
    own word decides.
    """
    group, actual = trial.group, trial.run(WEIGHT_DECAY)
    if trial.same(actual, trial.run(0.0)):
        return None
    sign = -1.0 if group.get("maximize") else 1.0
    coupled = trial.same(actual, trial.run(0.0, coupled=sign * WEIGHT_DECAY))
    said = group.get("weight_decouple") or group.get("decoupled_weight_decay")
    if coupled and not said:
        return None
    for pattern in CANDIDATES:
        known = not pattern.scaled or _is_number(group.get("lr"))
        if known and trial.same(actual, trial.run(0.0, by_hand=pattern)):
            return pattern
    if coupled:
        return None
    raise _Misfit(
        "applies weight decay that neither enters the gradient nor takes a share lr·weight_decay "
        f"or weight_decay of the weights; use weight_decay=0, but got {group['weight_decay']}"
    )


def _keys_without_memory(trial: _Trial) -> dict[int, frozenset[str]]:
    """The state tensors of a parameter's shape, none of which holds weights.

    Two twins see the same gradients at different weights and then the same weights: whatever they
    remember of weights, they must differ in, where the gradient was always zero.
    """
    shift = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for w in trial.starts]
    other = [w + s.to(w) for w, s in zip(trial.starts, shift, strict=True)]
    for w, start in zip(other, trial.starts, strict=True):
        if w.dim():
            w[: SIZES[0] // 2] = start[: SIZES[0] // 2]
    here, there = trial.held(trial.starts), trial.held(other)
    found = dict[int, frozenset[str]]()
    for p, q in zip(*(x.param_groups[0]["params"] for x in (here, there)), strict=True):
        mine, theirs = here.state.get(p, {}), there.state.get(q, {})
        found[p.dim()] = frozenset(
            k for k, v in mine.items() if isinstance(v, Tensor) and v.shape == p.shape
        )
        pairs = [(p.detach(), q.detach()), *_tensors_like(p, mine, theirs)]
        if p.dim() and not all(
            trial.same([a[SIZES[0] // 2 :]], [b[SIZES[0] // 2 :]]) for a, b in pairs
        ):
            raise _Misfit(
                "keeps copies of the weights in its state (averages, slow or initial weights), "
                "which would move behind a shut gate"
            )
    return found


def _tensors_like(p: Tensor, mine: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.shape == p.shape]


def _twin(optimizer: Optimizer, group: Group) -> Optimizer:
    """A copy of the optimizer with one other group, no state of parameters and no hooks."""
    twin = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(p): p for g in optimizer.param_groups for p in g["params"]}
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            twin.__dict__[name] = OrderedDict()
        elif name not in ("state", "param_groups", "step"):  # schedulers put theirs over step
            twin.__dict__[name] = copy.deepcopy(value, memo)
    shared = {k: v for k, v in optimizer.state.items() if not isinstance(k, Tensor)}
    state = defaultdict(dict, copy.deepcopy(shared, memo))
    twin.__dict__.update(state=state, param_groups=[group])
    return twin


def _bare_step(optimizer: Optimizer) -> None:
    """One step, without what torch and others hang before and after it."""
    step: Any = type(optimizer).step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def _decays(group: Group) -> bool:
    decay = group.get("weight_decay")
    return _is_number(decay) and bool(decay != 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


def _set(group: Group, key: str, value: float) -> None:
    """Set a number, as a tensor if it was one; leave what is no number."""
    old = group.get(key)
    if _is_number(old):
        group[key] = torch.full_like(old, value) if isinstance(old, Tensor) else value


def _device(p: Tensor) -> str:
    return str(_place(p))


def _place(p: Tensor) -> str | torch.device:
    return p.device_mesh.device_type if is_sharded(p) else p.device  # pyrefly: ignore
