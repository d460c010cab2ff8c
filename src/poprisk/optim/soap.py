"""PopRiskSOAP: the gate in a basis where signal is sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor

from poprisk._validate import NotAnalysable, check_choice, check_number
from poprisk.dtensor import is_sharded
from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.example_factors import ExampleFactors
from poprisk.optim.gate import Mask
from poprisk.optim.groups import TensorGroup, update_group, update_rotated
from poprisk.optim.kronecker import (
    BASES,
    FACTORS,
    Pair,
    Rotation,
    add_factors_,
    adopt_,
    begin_factors_anew_,
    check_basis_shapes,
    factors_of_gradient,
    finite,
    first_rotation,
    is_due,
    refresh_,
    rotation_of,
)
from poprisk.optim.matrices import rotated_sides
from poprisk.optim.replay import gate_row
from poprisk.optim.settings import CompiledGroup
from poprisk.optim.sharded import (
    change_basis_,
    check_split,
    factor_parts,
    rotation_part,
    whole_gradient,
)
from poprisk.optim.state import ADAM_KEYS, completed_state
from poprisk.optim.step import StepContext, StepRule
from poprisk.optim.update import state_dtype
from poprisk.optim.variance import GivenVariances

FACTORS_FROM = ("examples", "gradient")
GATE_SUMS = "gate_sums"
"""State of a rotated parameter: the last step that changed its basis, and the sums of statistics of
that step's gate (:func:`poprisk.optim.stats.gate_sums`), which the new basis does not tell."""
VARIANCES = ("exact", "ema", "second-moment")


@final
class PopRiskSOAP(PopRiskAdamW):
    r"""The gated step of :class:`PopRiskAdamW` in the eigenbasis of Kronecker factors.

    .. math:: W \leftarrow (1-\eta\lambda_{wd}) W
              - \eta\, U \Bigl( q \odot \frac{\hat m}{\sqrt{\hat v} + \varepsilon} \Bigr) V^\top

    m, v, the variance s and the mask q are those of :math:`U^\top G V`
    (:mod:`poprisk.optim.kronecker`). Matrices and convolutions are rotated; vectors, matrices of
    one row and sides larger than ``max_dim`` keep their coordinates. The first step is one of
    coordinates; its batch gives the first basis, which is found anew after steps 2, 4, 8, ... and
    then every ``refresh_every``. Averages are carried over into a new basis, squares by the squares
    of the rotation, which is exact where coordinates are uncorrelated. Source: the basis is SOAP's
    (Vyas et al., arXiv:2409.11321) with the factors of K-FAC; the gate in it is ours, after
    [LG, Thm 6.5].

    Args:
        params: as of :class:`PopRiskAdamW`; so are betas, eps, rho, mask, alpha, softness,
            batch_size, dataset_size, q_min, foreach, maximize and gate.
        lr: learning rate.
        weight_decay: decoupled, and not gated. It, lr, z and slack were chosen together on runs of
            800 to 1,300 steps of classification. Weights are forgotten within ``1 / (lr *
            weight_decay)`` steps, 625 of these defaults: lower it in much longer runs, and take
            0.01 for regression by a network.
        z: how many standard errors ``alpha="auto"`` asks for in a basis.
        coordinate_z: the same for what keeps its coordinates, where the gate is that of
            :class:`PopRiskAdamW`.
        coordinate_weight_decay: likewise; None: ``weight_decay``, but at most 0.01.
        slack: :math:`\kappa`: in a basis only :math:`(\hat s - \kappa \hat v)_+` of the variance
            counts, so that noise that is small beside the gradients of the long run does not close
            the gate.
        variance: ``"exact"`` (within the batch, rotated through the factors), ``"ema"`` or
            ``"second-moment"``.
        factors: ``"examples"``: inputs and output gradients of each layer, by :meth:`backward` with
            one loss per example; ``"gradient"``: those of Shampoo, from the batch's gradient alone,
            so that any training loop will do (with ``variance="ema"``).
        factor_decay: decay of their averages, in [0, 1).
        refresh_every: steps between two bases, later on.
        max_dim: the largest side that is rotated; 0: none, which is PopRiskAdamW at
            ``coordinate_z`` and ``coordinate_weight_decay``. In a running group it may be raised.

    State beside that of PopRiskAdamW: two square matrices for each side that is rotated.
    ``gate=False`` is Adam in that basis. Where parameters are sharded (DTensor), each process keeps
    its part of all that; ``factors="gradient"`` is needed there.

    Raises:
        TypeError, ValueError: for a bad argument, before anything is changed.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = PopRiskSOAP(layer, lr=0.1)
        >>> opt.backward(layer(torch.randn(8, 3)).square().sum(1))
        >>> opt.step()
        >>> opt.state[layer.weight]["right_basis"].shape
        torch.Size([3, 3])
    """

    _tensor_keys = (*ADAM_KEYS, "grad_mean_var", *FACTORS, *BASES, GATE_SUMS)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.6e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1.0,
        *,
        rho: float = 0.99,
        mask: str | Mask = "soft",
        alpha: float | str = "auto",
        z: float = 1.25,
        coordinate_z: float = 1.5,
        coordinate_weight_decay: float | None = None,
        softness: float = 0.1,
        slack: float = 0.25,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        variance: str = "exact",
        factors: str = "examples",
        factor_decay: float = 0.97,
        refresh_every: int = 40,
        max_dim: int = 2048,
        q_min: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        gate: bool = True,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        fixed = {"mode": "auto", "reduction": None, "fused": None, "capturable": False}
        self._start(params, {**defaults, **fixed})

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("fused", "capturable"):
            if group[name]:
                raise ValueError(f"PopRiskSOAP has no {name} step; leave {name} out.")
        if isinstance(group["batch_size"], Mapping) or isinstance(group["dataset_size"], Mapping):
            raise TypeError(
                "PopRiskSOAP takes batch_size and dataset_size as numbers: terms of a loss are "
                "told to PopRiskAdamW alone."
            )
        if group["mode"] != "auto" or group["reduction"] is not None:
            raise ValueError('PopRiskSOAP has mode="auto" and no reduction; leave them out.')
        super()._check_group(group)
        check_number("slack", group["slack"], low=0.0)
        check_number("coordinate_z", group["coordinate_z"], low=0.0)
        if group["coordinate_weight_decay"] is not None:
            check_number("coordinate_weight_decay", group["coordinate_weight_decay"], low=0.0)
        check_choice("factors", group["factors"], FACTORS_FROM)
        check_choice("variance", group["variance"], VARIANCES)
        check_number("factor_decay", group["factor_decay"], low=0.0, high=1.0, include_high=False)
        for name, least in (("refresh_every", 1), ("max_dim", 0)):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, but got {value!r}.")
            check_number(name, value, low=float(least))
        for entry in group["params"]:
            check_split(entry[1] if isinstance(entry, tuple) else entry, group)

    def _check_within(self, method: str, needed: str) -> None:
        from_examples = any(group["factors"] == "examples" for group in self.param_groups)
        if not (needed == "exact" and from_examples):
            super()._check_within(method, needed)

    def told_by_loop(self) -> str | None:
        if any(group["factors"] == "examples" for group in self.param_groups):
            return "factors='examples'"
        return super().told_by_loop()

    def _bases(self) -> ExampleFactors:
        return ExampleFactors(self)

    def rotated(self) -> dict[Tensor, tuple[bool, bool]]:
        """Of each parameter that is rotated, which sides are."""
        found = {
            p: rotated_sides(p, group["max_dim"])
            for group in self.param_groups
            for p in group["params"]
        }
        return {p: sides for p, sides in found.items() if any(sides)}

    def _noted(self) -> ExampleFactors:
        noted = self._batch_parts().bases
        assert isinstance(noted, ExampleFactors)
        return noted

    def _given_variances(self) -> GivenVariances:
        self._check_sides()
        self._noted().forget_turned()
        parts, rotated = self._batch_parts(), self.rotated()
        needed = [
            p
            for group in self.param_groups
            if group["factors"] == "examples"
            for p in group["params"]
            if p in rotated and p.grad is not None
        ]
        elsewhere = any(bool(_grad(p).any()) for p in needed if not parts.saw(p))
        if elsewhere or (needed and parts.parts == 0):
            raise RuntimeError(
                'factors="examples" needs inputs and output gradients of this step: call '
                "optimizer.backward(losses), with one loss per example, in place of "
                "losses.mean().backward(). In a loop that has one loss use "
                'PopRiskSOAP(model, factors="gradient", variance="ema").'
            )
        given = super()._given_variances()
        self._noted().check_kept(self.state)
        self._noted().find_scales([p for p in rotated if p.grad is not None])
        return given

    def _check_sides(self) -> None:
        """Raise ValueError where ``max_dim`` leaves out a side that has a basis by now."""
        for group in self.param_groups:
            for p in group["params"]:
                sides = rotated_sides(p, group["max_dim"])
                kept = [key in self.state.get(p, {}) for key in BASES]
                if any(has and not rotates for has, rotates in zip(kept, sides, strict=True)):
                    raise ValueError(
                        f"max_dim={group['max_dim']} keeps a side of a parameter of shape "
                        f"{tuple(p.shape)} in its coordinates, but that has a basis by now, which "
                        "its averages are in; leave max_dim as it was, or begin with a new "
                        "optimizer. (It may be raised.)"
                    )

    def _begin(self, p: Tensor, state: dict[str, Any], tensors: TensorGroup) -> None:
        """Take up a first basis of what a batch showed, after the step of that batch.

        In it the batch's gradient is zero but for round-off in many coordinates (from the gradient
        alone it is diagonal), and Adam would divide round-off by round-off there.
        """
        sides = rotated_sides(p, tensors.group.settings["max_dim"])
        if tensors.layout is None:
            found = whole = self._step_factors(p, tensors.group)
        else:
            grad = whole_gradient(p)
            found, whole = factor_parts(grad, p, sides), factors_of_gradient(grad, sides)
        first = first_rotation(whole)
        if first is not None:
            self._change_basis_(p, state, tensors, partial(adopt_, p, rotation=first))
            self._follow(p, state, found, tensors)

    def _step_factors(self, p: Tensor, group: CompiledGroup) -> Pair:
        """Of the step's gradient; of examples, as clipped or unscaled since."""
        sides = rotated_sides(p, group.settings["max_dim"])
        if not any(sides):
            return (None, None)
        if group.settings["factors"] == "gradient":
            return factors_of_gradient(_grad(p).to(state_dtype(p)), sides)
        found = self._noted().found.get(p)
        if found is None:
            return (None, None)
        left, right = found.total(self._noted().scales[p] ** 2)
        return left if sides[0] else None, right if sides[1] else None

    def _update(self, tensors: TensorGroup) -> None:
        rotations = [rotation_of(p, s) for p, s in zip(tensors.params, tensors.states, strict=True)]
        turned = [i for i, rotation in enumerate(rotations) if rotation is not None]
        plain, to_rotate = self._without_basis(tensors, rotations)
        for indices in (plain, to_rotate):
            if indices:
                own = tensors.group.in_coordinates(tensors.params[indices[0]])
                update_group(tensors.subset(indices)._replace(group=own))
        for i in to_rotate:
            self._begin(tensors.params[i], tensors.states[i], tensors)
        if tensors.layout is not None:
            for i in turned:
                self._update_sharded(tensors.subset([i]), cast(Rotation, rotations[i]))
            return
        if turned:
            rotated, noted = tensors.subset(turned), self._noted()
            grads = [noted.turned(p) for p in rotated.params]
            update_rotated(rotated, [r for r in rotations if r is not None], grads)
        for i in turned:
            p, state = tensors.params[i], tensors.states[i]
            self._follow(p, state, finite(self._step_factors(p, tensors.group)), tensors)

    def _without_basis(
        self, tensors: TensorGroup, rotations: Sequence[Rotation | None]
    ) -> tuple[list[int], list[int]]:
        """Which parameters have none: for good, and as yet."""
        for_good, as_yet = list[int](), list[int]()
        for i, (p, rotation) in enumerate(zip(tensors.params, rotations, strict=True)):
            if rotation is None:
                sides = rotated_sides(p, tensors.group.settings["max_dim"])
                (as_yet if any(sides) else for_good).append(i)
        return for_good, as_yet

    def _update_sharded(self, tensors: TensorGroup, rotation: Rotation) -> None:
        """Of one parameter, whose whole matrices are given up again before the next."""
        p, settings = tensors.params[0], tensors.group.settings
        part, grad = rotation_part(p, rotation), whole_gradient(p)
        update_rotated(tensors, [part], [part.forward(grad)])
        sides = rotated_sides(p, settings["max_dim"])
        self._follow(p, tensors.states[0], factor_parts(grad, p, sides), tensors)

    def _follow(self, p: Tensor, state: dict[str, Any], found: Pair, tensors: TensorGroup) -> None:
        """Let the factors, and where it is due the basis, follow a step with these factors."""
        settings = tensors.group.settings
        if p in self._noted().found and settings["factors"] == "examples":
            begin_factors_anew_(state, of_gradients=self._noted().found[p].of_gradients)
        add_factors_(state, found, settings["factor_decay"])
        if is_due(tensors.t, settings["refresh_every"]):
            exact = tensors.t < settings["refresh_every"]
            self._change_basis_(p, state, tensors, partial(refresh_, exact=exact))

    def _change_basis_(
        self,
        p: Tensor,
        state: dict[str, Any],
        tensors: TensorGroup,
        change_: Callable[[dict[str, Any]], None],
    ) -> None:
        """Change averages and bases in a state as ``change_`` does in one that is whole.

        What the gate let through in the old basis is noted before: no other tells it.
        """
        if tensors.group.estimator is not None and _step_of_sums(state) != tensors.t:
            row = _sums_of_gate(p, state, tensors.group.settings)
            state[GATE_SUMS] = torch.cat([row.new_tensor([float(tensors.t)]), row])
        if is_sharded(p):
            change_basis_(p, state, change_)
        else:
            change_(state)

    def _gate_row(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if _step_of_sums(state) == int(state["step"].item()):
            return state[GATE_SUMS][1:].double()
        return super()._gate_row(p, group)

    @torch.no_grad()
    def step_rule(self, param: Tensor, context: StepContext) -> StepRule:
        """The last step as a linear map of the gradient, of what is not rotated.

        Raises:
            NotAnalysable: of a parameter in another basis, where the map is not diagonal.
        """
        if rotation_of(param, self.state[param]) is not None:
            raise NotAnalysable(
                "a step of PopRiskSOAP is diagonal in its own basis, not in the weights; pass "
                "rule=poprisk.path.realized_update(momentum=...), which is exact for "
                "displacements only, or use max_dim=0."
            )
        return super().step_rule(param, context)

    def _load(self, state_dict: dict[str, Any]) -> None:
        completed = completed_state(state_dict, self.param_groups)["param_groups"]
        for mine, theirs in zip(self.param_groups, completed, strict=True):
            self._check_group({**theirs, "params": mine["params"]})
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group.get("params", ())]
        for i, (p, index) in enumerate(zip(params, indices, strict=False)):
            check_basis_shapes(i, p, state_dict["state"].get(index, {}))
        super()._load(state_dict)


def _step_of_sums(state: dict[str, Any]) -> int:
    """The step whose sums are kept; 0: of none."""
    return int(state[GATE_SUMS][0].item()) if GATE_SUMS in state else 0


def _sums_of_gate(p: Tensor, state: dict[str, Any], settings: dict[str, Any]) -> Tensor:
    """The sums of statistics of the gate of a step, as of yet in its basis.

    A mask that is a function is not called again, as it may draw at random: NaN is what it made.
    """
    if not callable(settings["mask"]):
        return gate_row(p, state, settings)
    row = gate_row(p, state, {**settings, "mask": "hard"})
    return row.index_fill(0, torch.tensor([1, 3], device=row.device), torch.nan)


def _grad(p: Tensor) -> Tensor:
    return cast(Tensor, p.grad)
