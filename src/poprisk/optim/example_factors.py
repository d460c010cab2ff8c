"""The factors of a batch's examples, for bases that come from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, final

from torch import Tensor

from poprisk.optim.kronecker import (
    BASES,
    OF_GRADIENTS,
    ExampleSums,
    Rotation,
    factors_of_terms,
    fits,
    rotation_of,
)
from poprisk.optim.update import state_dtype
from poprisk.per_sample.terms import Term

if TYPE_CHECKING:
    from poprisk.optim.soap import PopRiskSOAP


@final
class ExampleFactors:
    """The factors of a batch's examples, as its parts come in.

    Args:
        optimizer: whose bases hold where a parameter has one.
    """

    def __init__(self, optimizer: PopRiskSOAP) -> None:
        self.optimizer = optimizer
        self.found: dict[Tensor, ExampleSums] = {}
        self.scales: dict[Tensor, float] = {}
        self._kept: dict[Tensor, list[Tensor | None]] = {}
        self._turned: dict[Tensor, Tensor] = {}
        self._rotated: dict[Tensor, tuple[bool, bool]] | None = None

    def seen(self, p: Tensor, terms: list[Term], share: float) -> None:
        """Add the factors of some examples of the batch, and note the basis that they saw."""
        self._kept[p] = _bases_in(self.optimizer.state, p)
        if not self.rotates(p) or not fits(terms, p):
            return
        before = self.found.get(p, ExampleSums())
        kept = before.of_gradients or OF_GRADIENTS in self.optimizer.state.get(p, {})
        found = factors_of_terms(terms, p, self._sides()[p], of_gradients=kept)
        self.found[p] = before.plus(found.times(1 / share, share))

    def check_kept(self, states: Mapping[Tensor, Mapping[str, Any]] | None = None) -> None:
        """Raise unless all have the bases in which squares and gradients of this batch were noted.

        Args:
            states: where they are looked for; None: in the optimizer's state.

        Raises:
            RuntimeError: if a state was loaded or removed since; before a step changes anything.
        """
        states = self.optimizer.state if states is None else states
        for p, kept in self._kept.items():
            if any(a is not b for a, b in zip(kept, _bases_in(states, p), strict=True)):
                raise RuntimeError(
                    "the bases of this optimizer are others than when optimizer.backward(losses) "
                    "noted the examples' gradients in them (was a state loaded or removed since?); "
                    "call optimizer.zero_grad(), and optimizer.backward(losses) again."
                )

    def _sides(self) -> dict[Tensor, tuple[bool, bool]]:
        """Of what is rotated in this batch, which sides are."""
        if self._rotated is None:
            self._rotated = self.optimizer.rotated()
        return self._rotated

    def rotates(self, p: Tensor) -> bool:
        """Whether a parameter gets a basis, if it has none yet."""
        return p in self._sides()

    def rotation(self, p: Tensor) -> Rotation | None:
        """The present basis."""
        return rotation_of(p, self.optimizer.state.get(p, {}))

    def turned(self, p: Tensor) -> Tensor:
        """The gradient of this step in its basis, computed once."""
        if p not in self._turned:
            scale, parts = self.scales.get(p), self.optimizer._batch_parts()
            turned = None if scale is None else parts.turned(p, scale, for_step=True)
            if turned is None:
                rotation, grad = self.rotation(p), cast(Tensor, p.grad)
                turned = grad if rotation is None else rotation.forward(grad.to(state_dtype(p)))
            self._turned[p] = turned.to(state_dtype(p))
        return self._turned[p]

    def forget_turned(self) -> None:
        """A step begins: gradients may have changed since the last one."""
        self._turned.clear()

    def find_scales(self, params: Sequence[Tensor]) -> None:
        """Find what gradients were multiplied by since, of those whose factors were seen.

        Raises:
            RuntimeError: if that is not one number; before a step changes anything.
        """
        parts = self.optimizer._batch_parts()
        self.scales = {p: parts.factor(p) for p in params if p in self.found}

    def restart(self) -> None:
        """A new batch starts."""
        self.found.clear()
        self.scales.clear()
        self._kept.clear()
        self._turned.clear()
        self._rotated = None


def _bases_in(states: Mapping[Tensor, Mapping[str, Any]], p: Tensor) -> list[Tensor | None]:
    """The bases of a parameter's rows and columns, the tensors themselves."""
    state = states.get(p, {})
    return [state.get(key) for key in BASES]
