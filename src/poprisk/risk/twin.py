"""Twin response: a second model trained in lockstep on perturbed labels shows what follows them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from poprisk._validate import (
    check_callable,
    check_number,
    check_positive,
    check_separate,
    check_type,
)
from poprisk.dtensor import processes
from poprisk.evaluation import Forward, call, evaluating, outputs_of
from poprisk.printing import described, short_repr
from poprisk.protocols import PerExampleLoss
from poprisk.randomness import RandomState, generator_of
from poprisk.risk.estimate import RiskEstimate, TwinOutputs, estimate_risk
from poprisk.risk.inputs import (
    InputRecorder,
    check_groups,
    check_index,
    check_not_sharded,
    check_output_losses,
    check_parts,
    check_same,
)
from poprisk.risk.left_out import Without, left_out_risk, parts_left_out
from poprisk.risk.local_losses import (
    gradient_of,
    ignored_examples,
    is_shift_invariant,
    local_loss_of,
    on_logits,
)

DELTA = 0.3
"""Size of the perturbation of labels, in standard deviations of the output gradient."""
CHECKED_STEPS = 10
CHECKED_EVERY = 100
TRIED = 8
"""Examples of the first batch that the loss is tried on for all that an estimate asks of it."""
OTHER_TARGETS = 0.05
"""Share of examples with other targets than in training from which an estimate is flagged."""
CONSTANT = 1e-6
"""Spread of the output gradients, as a share of their size, that rounding may make up."""
SIGNS = "twin"
"""The stream of random numbers that twins are pushed along."""
OLD_STATE = (
    "the state that was loaded is of an earlier version: its twins were pushed at other signs, or "
    "under settings that it does not say"
)


class Probe:
    r"""Random signs z, one vector an example; centred where the loss ignores shifts.

    Args:
        dataset_size: number of examples.
        seed: of the signs.
    """

    def __init__(self, dataset_size: int, seed: int) -> None:
        self.dataset_size, self.seed = dataset_size, seed
        self.signs = torch.empty(0, dtype=torch.int8)
        self.tied = True

    def perturbation(self, index: Tensor, shape: torch.Size, *, shift_invariant: bool) -> Tensor:
        """The signs (b, *shape) of the examples at ``index``, of mean square one.

        Signs that are all equal are a shift, which pushes nothing: one of them is turned.
        """
        if self.signs.shape != (self.dataset_size, *shape) or self.tied == shift_invariant:
            generator = generator_of(self.seed, SIGNS)
            size = (self.dataset_size, *shape)
            self.signs = 2 * torch.randint(2, size, generator=generator, dtype=torch.int8) - 1
            self.tied = not shift_invariant
            if shift_invariant:
                _break_ties(self.signs, generator)
        z = self.signs[index.to(self.signs.device)].double()
        if not shift_invariant:
            return z
        c = z.shape[1]
        square = (c - 1) / c * (1 + 2.0 ** (3 - c) / c)  # without ties less their mean, on average
        return (z - z.mean(1, keepdim=True)) / math.sqrt(square)


def _break_ties(signs: Tensor, generator: torch.Generator) -> None:
    """Turn one of the signs (n, c, ...) of an example that are all equal."""
    n, c, *rest = signs.shape
    tied = (signs == signs[:, :1]).all(1, keepdim=True)
    turned = torch.randint(c, (n, 1, *rest), generator=generator)
    signs.scatter_(1, turned, torch.where(tied, -1, 1).to(signs) * signs.gather(1, turned))


class Tally:
    """How many examples of an estimate have another target than training had at their index."""

    def __init__(self) -> None:
        self.known = self.other = 0

    def doubt(self) -> str:
        """Why the twin's push is not at the examples it is looked for, or nothing."""
        if self.other <= OTHER_TARGETS * self.known:
            return ""
        return (
            f"{self.other} of {self.known} examples have other targets here than training had at "
            "their index: pass the same index to runs() and estimate(), and the labels trained on"
        )


class Seen:
    """A number for the target that each example was last trained with, NaN for none.

    Args:
        dataset_size: number of examples.
    """

    def __init__(self, dataset_size: int) -> None:
        self.marks = torch.full((dataset_size,), math.nan, dtype=torch.float64)
        self.lengths = torch.zeros(dataset_size, dtype=torch.int64)

    def note(self, index: Tensor, targets: Tensor) -> None:
        """Note the targets (b, ...) of the examples at ``index``; of others than one each, none."""
        if len(targets) == len(index):
            self.marks[index.cpu()] = _marks(targets)
            self.lengths[index.cpu()] = targets[0].numel()

    def compared(
        self, batches: Iterable[tuple[Any, Tensor, Tensor]], tally: Tally
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """The batches as they come, and on the way what they have in common with training."""
        for x, y, index in batches:
            then, now = self.marks[index.cpu()], _marks(y)
            known = ~(then.isnan() | now.isnan())
            known &= self.lengths[index.cpu()] == y[0].numel()  # padded alike
            rounding = 1e-2 if y.is_floating_point() else 1e-9  # of targets in half precision
            tally.known += int(known.sum())
            tally.other += int((~torch.isclose(then, now, rounding, 1e-9) & known).sum())
            yield x, y, index


def _marks(targets: Tensor) -> Tensor:
    """A weighted sum of each target (n, ...), (n,)."""
    rows = targets.detach().unsqueeze(1).flatten(1).double().cpu()
    return rows @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64)


class Answers(NamedTuple):
    """Outputs of a model (n, ...), the targets, and what its twins put out."""

    outputs: Tensor
    targets: Tensor
    twins: list[TwinOutputs]

    __repr__ = short_repr


class Replica:
    """One of the models that are trained side by side.

    Attributes:
        model: the module.
        optimizer: its own.
        position: 0 for the model, 1 and up for its twins.
    """

    def __init__(self, owner: TwinRisk, model: nn.Module, position: int) -> None:
        self.model, self.position = model, position
        self.optimizer = owner.make_optimizer(model)
        self.seconds = 0.0
        self.scored = 0
        self.inputs = InputRecorder()
        self._owner = owner
        self._watching = model.register_forward_pre_hook(self.inputs, with_kwargs=True)

    def __repr__(self) -> str:
        kind = f"twin {self.position}" if self.position else "the model"
        return described("Replica", kind, type(self.model).__name__, type(self.optimizer).__name__)

    def leave(self) -> None:
        """Leave no hook on the model."""
        self._watching.remove()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, (b,); for a twin with its labels perturbed, or weighted.

        Args:
            outputs: of this replica's model on the batch, (b, ...).
            targets: of the batch, unperturbed.

        Raises:
            ValueError: if the loss is not one value an example, the batch is not the one passed to
                ``runs``, or differs from the model's.
        """
        losses = check_output_losses(self._owner.loss(outputs, targets), outputs, targets)
        self.scored += 1
        weights = self._owner._weights(self, outputs, targets)
        if weights is not None:
            return losses * weights.to(losses)
        perturbation = self._owner._perturbation(self, outputs, targets)
        if perturbation is None:
            return losses
        follow = perturbation.reshape(len(perturbation), -1) * _full(outputs).reshape(
            len(perturbation), -1
        )
        follow = follow.sum(1).to(losses.dtype)
        if bool((losses.detach() == 0).any()):
            # What has no label has none that could be perturbed.
            follow = follow * ~ignored_examples(self._owner.loss, outputs, targets)
        return losses - follow


@final
class TwinRisk:
    r"""Estimate population risk with a twin trained in lockstep on perturbed labels.

    .. math:: \varphi = \frac1N\sum_i \mathrm{tr}\,B_i\frac{\partial u_i}{\partial t_i}

    is measured as the twin's response to its own label noise, features' adaptation included, at any
    time of training; leave-one-out outputs follow from it (:mod:`poprisk.risk.local_losses`), and
    the estimate is their mean loss. Ours; prior art: generalized degrees of freedom (Ye 1998), GCV
    and GACV (Wahba), Monte-Carlo divergence (Ramani 2008), ALO.

    It is *expected* risk with labels as noisy as the training set's, for examples drawn like it; it
    does not replace a test set. One more training run per probe, no data lost.

    Args:
        make_model: makes the model; the twins start as copies of it.
        make_optimizer: from a model to its optimizer.
        loss: one value an example, from outputs (b, ...) and targets (b, ...).
        dataset_size: number of training examples, or the data set itself.
        delta: size of the label perturbation, in standard deviations of the output gradient over
            the first batch (for squared error: of the labels); in its root mean square where it is
            the same for all, as for preferences whose chosen side always comes first.
        probes: twins.
        seed: of the perturbations.
        forward: from a model and an input batch to outputs; ``model(x)`` if left out.
        leave_out: share of the examples that each twin is trained without (those of different twins
            have nothing in common), in place of pushed labels. For losses without a label to push
            (pairs, sequences of any length, texts), and for runs that memorize: the estimate is
            right however much is memorized, but has only those examples to tell it by, and is the
            risk of training on the others (:mod:`poprisk.risk.left_out`). 0.2 is a good start.

    The first call of ``run.loss`` tries the loss on a few examples: that it is one value an
    example, differentiable, and defined around the outputs.

    Raises:
        TypeError, ValueError: for a bad argument, an optimizer that is not the model's own, or a
            model that is sharded (FSDP); under DDP let ``make_model`` return the wrapped model.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
        >>> loss = lambda u, y: (u - y).square().mean(1)
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
        >>> twin = TwinRisk(lambda: nn.Linear(3, 1), sgd, loss, dataset_size=100)
        >>> for index in torch.arange(100).split(20):
        ...     for run in twin.runs(index):
        ...         run.optimizer.zero_grad()
        ...         run.loss(run.model(x[index]), y[index]).mean().backward()
        ...         run.optimizer.step()
        >>> twin.estimate(x, y).valid
        True
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        loss: PerExampleLoss,
        *,
        dataset_size: Any,
        delta: float = DELTA,
        probes: int = 1,
        seed: int = 0,
        forward: Forward | None = None,
        leave_out: float | None = None,
    ) -> None:
        self.dataset_size = _length(dataset_size)
        self.delta = check_number("delta", delta, low=0.0, include_low=False)
        check_positive("probes", probes)
        _check_factories(make_model, make_optimizer, loss)
        self.make_optimizer, self.loss = make_optimizer, loss
        self.forward: Forward = forward or call
        self.seed = seed
        model = make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"make_model must return a module, but returned {type(model).__name__}."
            )
        check_not_sharded("TwinRisk", model)
        copies = [_twin_of(model) for _ in range(probes)]
        self.replicas = [Replica(self, m, i) for i, m in enumerate([model, *copies])]
        _check_own_optimizers(self.replicas)
        self.seen = Seen(self.dataset_size)
        self.leave_out = leave_out
        self.probes, self.without = list[Probe](), list[Without]()
        if leave_out is None:
            self.probes = [Probe(self.dataset_size, seed * 1009 + k) for k in range(probes)]
        else:
            _check_one_kind(delta, leave_out)
            self.without = parts_left_out(leave_out, self.dataset_size, probes=probes, seed=seed)
        self.steps = 0
        self.doubt = ""
        self._scale: tuple[float, bool] | None = None
        self._sample: tuple[Tensor, Tensor, Tensor] | None = None
        self._shape: tuple[int, ...] = ()
        self._index: Tensor | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._checking = False

    def __repr__(self) -> str:
        return described(
            "TwinRisk",
            type(self.model).__name__,
            type(self.optimizer).__name__,
            dataset_size=self.dataset_size,
            probes=len(self.replicas) - 1,
            steps=self.steps,
        )

    @property
    def model(self) -> nn.Module:
        """The model, trained exactly as it would be alone."""
        return self.replicas[0].model

    @property
    def optimizer(self) -> Optimizer:
        """The model's optimizer."""
        return self.replicas[0].optimizer

    @property
    def cost(self) -> float:
        """Time of the twins over that of the model itself, so far; NaN before any."""
        own, *twins = (run.seconds for run in self.replicas)
        return sum(twins) / own if own else math.nan

    def runs(self, index: Any) -> Iterator[Replica]:
        """Yield the model, then its twins, each with the random numbers rewound.

        Args:
            index: positions of the batch's examples in the training set, integers (b,).

        Raises:
            TypeError, ValueError: if the index does not fit the data set.
                Likewise if ``run.loss`` was not called for a twin.
            RuntimeError: if the loop over the last batch was left early.
        """
        index = self._some_of(index)
        if self._index is not None:
            raise RuntimeError(
                "the loop over twin.runs(index) was left before every twin had its turn (a break, "
                "an exception, or a nested call); the runs are no longer in lockstep: start anew, "
                "or load a checkpoint."
            )
        self._index, self._first = index, None
        self._checking = self.steps < CHECKED_STEPS or self.steps % CHECKED_EVERY == 0
        start = end = RandomState.now()
        for run in self.replicas:
            start.restore()
            run.inputs.watch(self._checking)
            run.scored = 0
            began = time.perf_counter()
            yield run
            run.seconds += time.perf_counter() - began
            if run.position == 0:
                end = RandomState.now()
            else:
                self._compare(run, end)
        end.restore()
        for run in self.replicas:
            run.inputs.watch(False)
        if not self.doubt:
            self.doubt = _other_rates(*(run.optimizer for run in self.replicas))
        self.steps += 1
        self._checking, self._index, self._first = False, None, None

    def estimate(
        self,
        x: Any,
        y: Tensor,
        *,
        index: Any = None,
        groups: Tensor | None = None,
        parts: Tensor | None = None,
        batch_size: int = 1024,
    ) -> RiskEstimate:
        """Estimate the risk now, from the training examples in evaluation mode.

        It is flagged if targets are not those that training had at their index.

        Args:
            x: inputs (n, ...), indexable by a slice.
            y: targets (n, ...).
            index: their positions in the training set; 0..n-1 if left out.
            groups: ids of dependent examples (one patient, one document), (n,): the estimate is
                for examples of new ones, and its error counts groups (:mod:`poprisk.risk.grouped`).
            parts: ids of examples whose response is measured apart, (n,), such as their classes.
                Both take pushed labels.
            batch_size: examples per forward pass.

        Raises:
            ValueError: if shapes do not fit, or for groups or parts with ``leave_out``.
        """
        index = self._some_of(range(len(y)) if index is None else index)
        pieces = (slice(i, i + batch_size) for i in range(0, len(y), batch_size))
        return self._estimate(((x[s], y[s], index[s]) for s in pieces), groups, parts)

    def estimate_batches(
        self,
        batches: Iterable[tuple[Any, Tensor, Any]],
        *,
        groups: Tensor | None = None,
        parts: Tensor | None = None,
    ) -> RiskEstimate:
        """Estimate the risk from batches (inputs, targets, index), as training gets them.

        Args:
            batches: without augmentation; a part of the training set will do.
            groups: ids in the order of the examples.
            parts: likewise.
        """
        checked = ((x, y, check_index(i, self.dataset_size)) for x, y, i in batches)
        return self._estimate(checked, groups, parts)

    def _some_of(self, index: Any) -> Tensor:
        """Positions in the training set, at least one."""
        index = check_index(index, self.dataset_size)
        if len(index) == 0:
            raise ValueError("index must hold at least one example, but it is empty; leave it out.")
        return index

    def state_dict(self) -> dict[str, Any]:
        """All replicas' weights and optimizers, and what the perturbation depends on."""
        return {
            "models": [run.model.state_dict() for run in self.replicas],
            "optimizers": [run.optimizer.state_dict() for run in self.replicas],
            "settings": self._settings(),
            "sample": self._sample,
            "steps": self.steps,
            "scale": self._scale,
            "shape": self._shape,
            "doubt": self.doubt,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, under the settings it was saved with.

        The twins of an earlier version were pushed at other signs, or its state does not say under
        which settings: it is taken for this twin's, and the estimates are flagged.

        Raises:
            TypeError, ValueError: if it is no such state, or one of other settings (``delta``,
                ``seed``, ``probes``, ``dataset_size``), another loss, model or optimizer; nothing
                is changed then.
        """
        models = [run.model.state_dict() for run in self.replicas]
        _check_state(state_dict, models, self._settings())
        if state_dict.get("sample") is not None:
            _check_same_loss(self.loss, *state_dict["sample"])
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state_dict)
        except Exception:
            self._load(before)  # an optimizer's own check may refuse late
            raise
        if "signs" not in state_dict.get("settings", {}) and not self.doubt:
            self.doubt = OLD_STATE

    def _load(self, state_dict: dict[str, Any]) -> None:
        for run, model, optimizer in zip(
            self.replicas, state_dict["models"], state_dict["optimizers"], strict=True
        ):
            run.optimizer.load_state_dict(optimizer)
            run.model.load_state_dict(model)
        self.steps, self.doubt = state_dict["steps"], state_dict["doubt"]
        self._scale, self._shape = state_dict["scale"], state_dict["shape"]
        self._sample = state_dict.get("sample")

    def _settings(self) -> dict[str, Any]:
        """What the numbers depend on besides the weights."""
        return {
            "delta": self.delta,
            "seed": self.seed,
            "probes": len(self.replicas) - 1,
            "dataset_size": self.dataset_size,
            "optimizer": type(self.optimizer).__name__,
            "signs": SIGNS if self.leave_out is None else f"without {self.leave_out:g}",
        }

    def outputs(self, batches: Iterable[tuple[Any, Tensor, Tensor]]) -> Answers:
        """Outputs of the model and its twins now, in evaluation mode.

        Args:
            batches: inputs, targets and index of all examples, in their order.

        Raises:
            ValueError: if no labels are pushed.
        """
        self._check_pushed("outputs to compare")
        columns: list[list[Tensor]] = [[] for _ in range(len(self.replicas) + 2)]
        with evaluating(*(run.model for run in self.replicas)):
            for x, y, index in batches:
                rows = [
                    _full(outputs_of(run.model, x, self.forward)).cpu() for run in self.replicas
                ]
                for column, part in zip(columns, (y.cpu(), index.cpu(), *rows), strict=True):
                    column.append(part)
        y, index, u, *others = (torch.cat(column) for column in columns)
        scale, shift_invariant = self._set_scale(u, y)
        twins = [
            TwinOutputs(
                v, scale * probe.perturbation(index, u.shape[1:], shift_invariant=shift_invariant)
            )
            for v, probe in zip(others, self.probes, strict=True)
        ]
        return Answers(u, y, twins)

    def _check_pushed(self, what: str) -> None:
        """Raise ValueError if the twins are trained without examples, and not on pushed labels."""
        if self.leave_out is not None:
            raise ValueError(
                f"a twin with leave_out={self.leave_out:g} pushes no labels and has no {what}; "
                "make it without leave_out."
            )

    def _estimate(
        self,
        batches: Iterable[tuple[Any, Tensor, Tensor]],
        groups: Tensor | None,
        parts: Tensor | None,
    ) -> RiskEstimate:
        tally = Tally()
        if self.leave_out is not None:
            if groups is not None or parts is not None:
                self._check_pushed("groups or parts")
            return self._estimate_left_out(self.seen.compared(batches, tally), tally)
        u, y, twins = self.outputs(self.seen.compared(batches, tally))
        _check_own(self.loss, u, y)
        return estimate_risk(
            self.loss,
            u,
            y,
            twins,
            groups=None if groups is None else check_groups(groups, len(y)),
            parts=None if parts is None else check_parts(parts, len(y)),
            cost=self.cost,
            doubt=self.doubt or self._unpushed() or tally.doubt(),
        )

    @torch.no_grad()
    def _estimate_left_out(
        self, batches: Iterable[tuple[Any, Tensor, Tensor]], tally: Tally
    ) -> RiskEstimate:
        """The estimate of twins that were trained without examples, from losses alone."""
        columns: list[list[Tensor]] = [[] for _ in range(len(self.replicas) + 2)]
        with evaluating(*(run.model for run in self.replicas)):
            for x, y, index in batches:
                found = [_full(outputs_of(run.model, x, self.forward)) for run in self.replicas]
                y = y.to(found[0].device)
                _check_own(self.loss, found[0], y)
                rows = [check_output_losses(self.loss(u, y), u, y) for u in found]
                counted = ~ignored_examples(self.loss, found[0], y)
                for column, part in zip(columns, (index, counted, *rows), strict=True):
                    column.append(part.detach().cpu())
        index, counted, losses, *twins = (torch.cat(column) for column in columns)
        return left_out_risk(
            losses.double(),
            [twin.double() for twin in twins],
            [part.out[index] for part in self.without],
            counted=counted,
            cost=self.cost,
            doubt=self.doubt or tally.doubt(),
        )

    def _weights(self, run: Replica, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The present batch's weights (b,), None for pushed labels; checks on the way."""
        if not self.without:
            return None
        self._see_first(outputs, targets)
        index = self._checked_batch(run, outputs, targets)
        if run.position == 0:
            return torch.ones(len(index))
        return self.without[run.position - 1].weights(index)

    def _see_first(self, outputs: Tensor, targets: Tensor) -> None:
        """Check on the first batch that each loss is an example's own, and what else it takes."""
        if self.leave_out is None:
            self._set_scale(outputs.detach(), targets)
        elif self._sample is None:
            u = _full(outputs.detach())
            losses = check_output_losses(self.loss(u, targets), u, targets).detach()
            check_separate(self.loss, u, targets, losses)
            self._sample = u[:TRIED].clone(), targets[:TRIED].clone(), losses[:TRIED].clone()

    def _unpushed(self) -> str:
        """Why there is no response to measure, if there is none."""
        return "" if self.steps else "no batch has gone through runs() yet: no twin was pushed"

    def _perturbation(self, run: Replica, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The present batch's perturbation for a twin, None for the model; checks on the way."""
        scale, shift_invariant = self._set_scale(outputs, targets)
        index = self._checked_batch(run, outputs, targets)
        if run.position == 0:
            return None
        z = self.probes[run.position - 1].perturbation(
            index, outputs.shape[1:], shift_invariant=shift_invariant
        )
        return (scale * z).to(outputs.device, _full(outputs).dtype)

    def _checked_batch(self, run: Replica, outputs: Tensor, targets: Tensor) -> Tensor:
        """The index of the present batch, if all runs are fed alike."""
        index = self._checked_index(outputs)
        if run.position == 0:
            self.seen.note(index, targets)
            self._first = (outputs.detach(), targets) if self._checking else None
        elif self._first is not None:
            check_same("targets", self._first[1], targets)
            first, again = self._first[0], outputs.detach()
            if self.steps == 0 and not torch.allclose(first, again, equal_nan=True):
                raise ValueError(
                    "the twin's outputs differ from the model's at the first step although their "
                    "weights are the same: the model or the batch is random in a way that runs() "
                    "cannot repeat. Use torch's, numpy's or Python's global generator inside the "
                    "loop, and draw the batch before it."
                )
        return index

    def _checked_index(self, outputs: Tensor) -> Tensor:
        """The index of the present batch, if outputs are one row for each, of one shape always."""
        if self._index is None:
            raise ValueError("run.loss was called outside of `for run in twin.runs(index)`.")
        if len(outputs) != len(self._index):
            raise ValueError(
                f"outputs hold {len(outputs)} examples, but index has {len(self._index)}; pass the "
                "positions of exactly this batch's examples to twin.runs(index)."
            )
        if self.leave_out is None and tuple(outputs.shape[1:]) != self._shape:
            raise ValueError(
                f"outputs must keep their shape from batch to batch, {self._shape} per example, "
                f"but got {tuple(outputs.shape[1:])}; pad them, or let each token be an example."
            )
        return self._index

    def _set_scale(self, outputs: Tensor, targets: Tensor) -> tuple[float, bool]:
        """Size of the perturbation, and whether the loss ignores shifts; from the first batch."""
        if self._scale is None:
            scale, sample = _gradient_scale(self.loss, outputs, targets)
            self._scale, self._sample, self._shape = scale, sample, tuple(outputs.shape[1:])
        return self.delta * self._scale[0], self._scale[1]

    def _compare(self, run: Replica, end: RandomState) -> None:
        """Check that a twin was pushed, and was fed and drew what the model did."""
        model = self.replicas[0]
        if self._checking:
            calls = [len(replica.inputs.seen) for replica in (model, run)]
            if calls[0] != calls[1]:
                raise ValueError(
                    f"at one step the model was called {calls[0]} times and its twin {calls[1]} "
                    "times; do the same with every run of `for run in twin.runs(index)`."
                )
            for mine, twins in zip(model.inputs.seen, run.inputs.seen, strict=True):
                check_same("inputs", mine, twins)
        if not run.scored:
            raise ValueError(
                "run.loss was not called for a twin within `for run in twin.runs(index)`, so that "
                "it learns the labels unperturbed: in place of the loss itself call "
                "run.loss(run.model(x), y), for the model and its twins alike."
            )
        if not self.doubt and not end.same(RandomState.now()):
            self.doubt = "the twin drew other random numbers than the model"


def _length(size: Any) -> int:
    """The number of training examples, given as such, as a data set or as its loader."""
    if isinstance(size, DataLoader):  # its own length counts batches
        size = size.dataset
    if isinstance(size, Sized) and not isinstance(size, (str, bytes)):
        size = len(size)
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise TypeError(
            f"dataset_size must be the number of training examples (or a data set with a length), "
            f"but got {size!r}; a twin perturbs the label of every example the same way each time "
            "it is seen. For a stream that is seen once, use poprisk.fresh_batch_risk."
        )
    return size


def _check_factories(make_model: Any, make_optimizer: Any, loss: Any) -> None:
    if isinstance(make_model, nn.Module):
        raise TypeError(
            "make_model must be a function that returns a module, but got a "
            f"{type(make_model).__name__}; pass lambda: model to train that very one."
        )
    if isinstance(make_optimizer, Optimizer):
        raise TypeError(
            "make_optimizer must be a function from a model to an optimizer, but got a "
            f"{type(make_optimizer).__name__}; each twin needs its own."
        )
    check_callable("make_model", make_model)
    check_callable("make_optimizer", make_optimizer)
    check_callable("loss", loss)


def _check_one_kind(delta: float, leave_out: float) -> None:
    if delta != DELTA:
        raise ValueError(
            f"delta={delta} is the size of pushed labels, and leave_out={leave_out} pushes none; "
            "leave out one of them."
        )


def _check_own_optimizers(replicas: list[Replica]) -> None:
    """Raise ValueError unless each model has an optimizer of its own, of its own parameters."""
    for i, run in enumerate(replicas):
        mine = {id(p) for p in run.model.parameters()}
        groups = getattr(run.optimizer, "param_groups", [])
        trained = [p for group in groups for p in group["params"]]
        other = any(run.optimizer is another.optimizer for another in replicas[:i])
        if other or (trained and not any(id(p) in mine for p in trained)):
            raise ValueError(
                "make_optimizer must return a new optimizer of the model it is given, but the one "
                f"for {f'twin {i}' if i else 'the model'} is "
                f"{'the same as another' if other else 'of other parameters'}; build it inside the "
                "function, as in lambda model: AdamW(model.parameters())."
            )


def _other_rates(first: Any, *others: Any) -> str:
    """A doubt if learning rates of a twin are not the model's."""

    def rates(optimizer: Any) -> list[float]:
        return [float(g["lr"]) for g in getattr(optimizer, "param_groups", []) if "lr" in g]

    for other in others:
        for mine, its in zip(rates(first), rates(other), strict=False):
            if not math.isclose(mine, its, rel_tol=1e-6):
                return (
                    f"the twin trained at a learning rate of {its:.3g}, the model at {mine:.3g}: "
                    "give each run a scheduler of its own, and step them alike"
                )
    return ""


def _check_state(state_dict: Any, models: list[Any], settings: dict[str, Any]) -> None:
    """Raise unless ``state_dict`` is one of a twin with the same replicas and settings.

    Args:
        state_dict: to load; one of an earlier version has no settings.
        models: state dicts of the replicas it is to be loaded into.
        settings: of the twin.
    """
    check_type("state_dict", state_dict, Mapping, "a dict")
    found = len(state_dict["models"]) if "models" in state_dict else 0
    if found != len(models):
        raise ValueError(
            f"state_dict does not fit: it holds {found} models, this one {len(models)} (probes + "
            "1)."
        )
    missing = {"optimizers", "steps", "scale", "shape", "doubt"} - state_dict.keys()
    if missing:
        raise ValueError(f"state_dict is not a twin's: it has no {sorted(missing)}.")
    for name, value in state_dict.get("settings", {}).items():
        if name in settings and settings[name] != value:
            raise ValueError(
                f"state_dict was saved with {name}={value!r}, but this twin has "
                f"{settings[name]!r}; the estimates depend on it: use the same settings."
            )
    for mine, theirs in zip(models, state_dict["models"], strict=True):
        for name in {**mine, **theirs}:
            there, here = (_shape(state.get(name)) for state in (theirs, mine))
            if there != here:
                raise ValueError(
                    f"state_dict is of another model: {name} is {there} there and {here} here."
                )


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_same_loss(loss: Any, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Raise ValueError unless a loss gives what it gave on a sample of examples."""
    try:
        found = loss(outputs, targets)
    except Exception as error:
        raise ValueError(
            f"state_dict was saved with another loss: this one fails on its examples ({error})."
        ) from error
    same = isinstance(found, Tensor) and found.shape == losses.shape
    if not same or not found.detach().allclose(losses, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            "state_dict was saved with another loss: this one gives other values on its examples; "
            "the estimates depend on it."
        )


def _twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model with the hooks on its parameters, which copying a parameter drops."""
    found = copy.deepcopy(model)
    for name, p in model.named_parameters():
        # One that steps, say, holds the optimizer of the model, which is not that of its twin.
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a post-accumulate-grad hook when make_model returns, and a twin needs "
                "one of its own; register it in make_optimizer, which is called for each model."
            )
        twin = found.get_parameter(name)
        for hook in (p._backward_hooks or {}).values():
            twin.register_hook(hook)
    return found


def _full(outputs: Tensor) -> Tensor:
    """Outputs in single precision at least."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


Sample = tuple[Tensor, Tensor, Tensor]
"""Outputs and targets of a few examples, and their losses."""


def _check_own(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError if the losses of the first examples depend on each other."""
    u, y = outputs[:TRIED].detach(), targets[:TRIED]
    check_separate(loss, u, y, check_output_losses(loss(u, y), u, y))


def _gradient_scale(
    loss: PerExampleLoss, outputs: Tensor, targets: Tensor
) -> tuple[tuple[float, bool], Sample]:
    """Spread of the output gradient over a batch, and whether the loss ignores shifts; a sample."""
    u = _full(outputs.detach())
    targets = _full(targets) if targets.is_floating_point() else targets
    losses = check_output_losses(loss(u.requires_grad_(), targets), u, targets)
    check_separate(loss, u, targets, losses)
    labelled = (~ignored_examples(loss, u, targets)).nonzero().squeeze(1)
    sample = (u.detach()[:TRIED].clone(), targets[:TRIED].clone(), losses.detach()[:TRIED].clone())
    g = gradient_of(on_logits(loss, u), u, targets).reshape(u.shape)[labelled]
    _check_scale(float(g.abs().sum()))
    _try_out(loss, u.detach()[labelled[:TRIED]], targets[labelled[:TRIED]])
    spread = (g - g.mean(0)) if len(g) > 1 else g
    size, scale = (v.square().mean().sqrt() for v in (g, spread))
    scale = scale if float(scale) > CONSTANT * float(size) else size
    if processes() > 1:
        torch.distributed.all_reduce(scale)
        scale /= processes()
    shift_invariant = g.ndim > 1 and is_shift_invariant(
        g.reshape(g.shape[0], g.shape[1], -1).sum(2)
    )
    return (_check_scale(float(scale)), shift_invariant), sample


def _check_scale(scale: float) -> float:
    """Return the size of the output gradient if a perturbation can be measured by it."""
    if not 0 < scale < math.inf:
        raise ValueError(
            f"the loss has an output gradient of size {scale} on the first batch, which gives no "
            "scale for the perturbation; check labels and outputs for NaN, or for a loss that is 0 "
            "(are all labels of the batch ignored?)."
        )
    return scale


def _try_out(loss: PerExampleLoss, outputs: Tensor, targets: Tensor) -> None:
    """Do on a few examples what an estimate does, so that it does not fail after training."""
    if not len(outputs):
        return
    local_loss_of(loss, outputs, targets)
    for step in (-1.0, 1.0):  # leave-one-out outputs lie anywhere around a model's own
        moved = outputs + step * (1 + outputs.abs())
        try:
            why = "" if bool(loss(moved, targets).detach().isfinite().all()) else "is not finite"
        except (RuntimeError, ValueError, AssertionError) as error:
            why = f"raises {type(error).__name__}"
        if why:
            raise ValueError(
                f"loss must be defined for any outputs, but {why} at some that lie a step beyond "
                "the model's; if these are probabilities, let the model put out logits and use "
                "binary_cross_entropy_with_logits or cross_entropy."
            )
