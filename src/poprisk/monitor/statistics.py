r"""Loss and gradient statistics of the examples behind one step, pooled over parts and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from poprisk._validate import check_separate
from poprisk.evaluation import Forward, evaluating, outputs_of
from poprisk.losses import ignored_labels
from poprisk.monitor.signal import SUMS, Counts, GradientSignal, sums_of
from poprisk.optim.update import CHUNK
from poprisk.per_sample import WORKSPACE, capture
from poprisk.per_sample.gram import formed, gram_, mirror_
from poprisk.per_sample.moments import total, wide
from poprisk.per_sample.terms import Dense, Term
from poprisk.protocols import PerExampleLoss
from poprisk.risk.inputs import check_output_losses

BLOCK = 256
"""Examples whose inner products are taken at once; errors do without those between blocks."""


class Statistics:
    r"""Losses and gradients of the examples of one step.

    Args:
        params: by name.
        modules: whether to keep what signals of single modules need, too.

    Attributes:
        parts: batches that were added, or could not be.
        failed: batches that could not be.
        whole: whether gradients were taken of all of them.
        examples: that count, without those whose label is ignored.
        batch: examples of the step, also those that ``limit`` leaves out.
        loss: sum over them.
        sums: of their gradients, by name of the parameter.
        rows: :func:`poprisk.monitor.signal.sums_of` by module; under "" of the whole gradient.
        counts: behind ``rows``.
    """

    def __init__(self, params: Mapping[str, Tensor], *, modules: bool = True) -> None:
        self.checked, self.modules = False, modules
        self.clear(params)

    def clear(self, params: Mapping[str, Tensor]) -> None:
        """Forget all examples."""
        self.params = dict(params)
        self.parts = self.failed = self.examples = self.batch = 0
        self.whole = True
        self.loss = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts = Counts()
        names = dict.fromkeys(["", *(map(module_of, self.params) if self.modules else ())])
        self.rows = {name: torch.zeros(SUMS, dtype=torch.float64) for name in names}

    def add(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        forward: Forward,
        x: Any,
        y: Tensor,
        *,
        gradients: bool = True,
        limit: int | None = None,
    ) -> None:
        """Add the examples of a batch, at the present weights.

        Args:
            model: in evaluation mode, and its state kept by the caller, as the loss's.
            loss: one value an example.
            forward: from model and inputs to outputs.
            x: inputs.
            y: targets.
            gradients: whether to take those, or the loss alone.
            limit: how many examples to look at, the first; all if left out.
        """
        left_out = 0
        if limit is not None and isinstance(y, Tensor) and y.ndim and len(y) > limit:
            left_out = int(counted(loss, y, len(y))[limit:].sum())
            x, y = _first(x, len(y), limit), y[:limit]
        with torch.inference_mode(False), torch.enable_grad():
            outputs = forward(model, x) if gradients else outputs_of(model, x, forward)

            def unchanged(u: Tensor, targets: Tensor) -> Tensor:
                with evaluating(loss):  # each call finds the same state
                    return loss(u, targets)

            # What is compared below is to be of one state; else each part is looked at once.
            values = loss(outputs, y) if self.checked else unchanged(outputs, y)
            losses = check_output_losses(values, outputs, y)
            if not self.checked:
                check_separate(unchanged, outputs, y, losses)
                self.checked = True
            counting = counted(loss, y, len(losses))
            self.whole &= gradients
            if gradients:
                self._add_gradients(losses, counting)
        self.examples += int(counting.sum())
        self.batch += int(counting.sum()) + left_out
        self.loss += float(losses.detach().double().sum())

    def _add_gradients(self, losses: Tensor, counting: Tensor) -> None:
        if not bool(losses.isfinite().all()):
            # Whose gradient is whose cannot be told where zero times infinity is NaN.
            for row in self.rows.values():
                row.fill_(math.nan)
            return
        factors = capture(losses, self.params) if len(losses) > 1 else None
        terms = _single(losses, self.params) if factors is None else factors.terms
        with torch.no_grad():
            kept = {name: [wide(t) for t in ts] for name, ts in terms.items() if ts}
            for start in range(0, len(losses), BLOCK):
                block = slice(start, min(start + BLOCK, len(losses)))
                self._add_block(kept, block)
                # An ignored example has gradient zero: it is in no sum, and in no pair.
                self.counts = self.counts.plus(Counts.of(int(counting[block].sum())))

    def _add_block(self, terms: Mapping[str, list[Term]], block: slice) -> None:
        whole: Tensor | None = None
        for module, grams in self._grams(terms, block):
            if self.modules:
                self.rows[module] += sums_of(grams).cpu()
            whole = grams.double() if whole is None else whole + grams
        if whole is not None:
            self.rows[""] += sums_of(whole).cpu()

    def _grams(self, terms: Mapping[str, list[Term]], block: slice) -> Iterator[tuple[str, Tensor]]:
        """Inner products of the gradients of a block, module by module; their sums are added."""
        b = block.stop - block.start
        by_module: dict[str, list[str]] = {}
        for name in terms:
            by_module.setdefault(module_of(name), []).append(name)
        for module, names in by_module.items():
            like = terms[names[0]][0]
            factor = like.grads if isinstance(like, Dense) else like.cotangent
            gram = factor.new_zeros(b, b)
            for name in names:
                own = formed([t.part(block) for t in terms[name]], None, WORKSPACE)
                value = total(own)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
                gram_(gram, own, own, None, WORKSPACE)
            mirror_(gram, b, 1)
            yield module, gram

    def pooled(self) -> Statistics:
        """The sums over all ranks; takes part in the collectives whatever happened before."""
        device = next(iter(self.params.values())).device
        found = Statistics(self.params, modules=self.modules)
        cut = float(not self.whole)  # ranks are to agree on it: one may have had no batch
        own = [cut, self.parts, self.failed, self.examples, self.batch, self.loss, *self.counts]
        rows = torch.stack(list(self.rows.values()))
        counts = torch.tensor(own, dtype=torch.float64)
        pooled = _summed(torch.cat([counts, rows.flatten()]).to(device)).cpu()
        cut, parts, failed, examples, batch, found.loss, *pairs = pooled[: len(own)].tolist()
        found.whole = cut == 0
        found.parts, found.failed = int(parts), int(failed)
        found.examples, found.batch = int(examples), int(batch)
        found.counts = Counts(*map(int, pairs))
        found.rows = dict(zip(self.rows, pooled[len(own) :].reshape(rows.shape), strict=True))
        if found.failed or not found.whole:
            return found
        for name, p in self.params.items():
            size = p.numel() * (2 if p.is_complex() else 1)
            dtype = torch.promote_types(p.dtype.to_real(), torch.float32)
            nothing = torch.zeros(size, dtype=dtype, device=device)
            found.sums[name] = _summed(self.sums.get(name, nothing).clone())
        return found

    def signals(self) -> dict[str, GradientSignal]:
        """Signal and noise by module, and under "" of the whole gradient."""
        squares = dict.fromkeys(self.rows, 0.0)
        for name, value in self.sums.items():
            square = sum(float(part.dot(part)) for part in value.split(CHUNK))
            squares[""] += square
            if self.modules:
                squares[module_of(name)] += square
        counts = self.counts._replace(examples=self.examples)
        return {
            module: GradientSignal.of(squares[module], row.tolist(), counts, self.batch)
            for module, row in self.rows.items()
        }


def module_of(name: str) -> str:
    """The module that a parameter belongs to: its name without the last part."""
    return name.rpartition(".")[0] or name


def counted(loss: PerExampleLoss, y: Any, examples: int) -> Tensor:
    """Which examples count, (b,): a loss over classes ignores those without any other label."""
    everything = torch.ones(examples, dtype=torch.bool)
    classes = isinstance(y, Tensor) and y.ndim > 0 and len(y) == examples and y.numel() > 0
    if not classes or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return everything
    ignored = ignored_labels(loss, y).reshape(examples, -1)
    return ~ignored.all(1).cpu()


def _first(x: Any, examples: int, limit: int) -> Any:
    """The first of the examples, of all tensors that have a row for each."""

    def cut(t: Tensor) -> Tensor:
        return t[:limit] if t.ndim and len(t) == examples else t

    return tree_map_only(Tensor, cut, dict(x) if isinstance(x, Mapping) else x)


def _single(losses: Tensor, params: Mapping[str, Tensor]) -> dict[str, list[Term]]:
    """The gradient of one example is the gradient."""
    grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
    return {
        name: [Dense(_real(g).reshape(1, 1, -1), tuple(g.shape))]
        for name, g in zip(params, grads, strict=True)
        if g is not None
    }


def _real(g: Tensor) -> Tensor:
    return torch.view_as_real(g.resolve_conj()) if g.is_complex() else g


def _summed(value: Tensor) -> Tensor:
    torch.distributed.all_reduce(value)
    return value
