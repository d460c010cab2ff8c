"""Predictions along a run: of the present look, of the last one and averaged, in O(n c) memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from poprisk.audit.rate import Rate
from poprisk.printing import short_repr

KEPT_LOOKS = 16
"""Looks whose margins are kept; when there are more, every second is dropped."""
UNBELIEVED = 1e-6
"""Weight of a look that is not believed, as long as there is none that is."""
SINGLE_PRECISION = 1 << 26
"""Numbers up to which predictions are kept in float32."""


def default_dtype(items: int, width: int, *, numbers: bool) -> torch.dtype:
    """Of predictions; numbers do not lie between 0 and 1, so that float16 may not hold them."""
    small = numbers or items * width <= SINGLE_PRECISION
    return torch.float32 if small else torch.float16


def history_dtype(*, numbers: bool) -> torch.dtype:
    """Of margins, which lie between -1 and 1, or of residuals."""
    return torch.float32 if numbers else torch.float16


def memory_of(items: int, width: int, dtype: torch.dtype | None, *, numbers: bool) -> int:
    """Bytes that :class:`Predictions` take."""
    kept = dtype or default_dtype(items, width, numbers=numbers)
    history = history_dtype(numbers=numbers)
    return items * (3 * width * kept.itemsize + KEPT_LOOKS * history.itemsize + 9)


class Look(NamedTuple):
    """One pass over the data: what its predictions were like.

    Attributes:
        number: 1 for the first.
        items: labels that predictions came for.
        agreement: share of them that is the most probable class; NaN for numbers.
        confidence: mean probability of the most probable class; NaN for numbers.
        memorization: of the planted labels; None if none were planted.
        believed: whether it counts in the average.
    """

    number: int
    items: int
    agreement: float
    confidence: float
    memorization: Rate | None
    believed: bool

    __repr__ = short_repr


@final
class Predictions:
    r"""What was predicted for each item, by look.

    The average over looks gives the l-th look a weight of l: a run knows little in its first ones.

    Args:
        items: N.
        width: numbers in a prediction, c.
        dtype: of what is kept; float32 if left out, float16 for more than
            :data:`SINGLE_PRECISION` numbers.
        directory: where to keep it in files, outside of memory.
        numbers: whether predictions are numbers of any size, which float16 does not hold.
    """

    def __init__(
        self,
        items: int,
        width: int,
        *,
        dtype: torch.dtype | None = None,
        directory: Any = None,
        numbers: bool = False,
    ) -> None:
        self.dtype = dtype or default_dtype(items, width, numbers=numbers)
        self.numbers = numbers
        self.directory = None if directory is None else Path(directory)
        self.present = self._array("present", items, width)
        self.last = self._array("last", items, width)
        self.average = self._array("average", items, width)
        self.history = self._array("history", items, KEPT_LOOKS).fill_(torch.nan)
        self.seen = torch.zeros(items, dtype=torch.bool)
        self.weight = torch.zeros(items)
        self.last_look = torch.zeros(items, dtype=torch.int32)
        self.kept: list[int] = []
        self.stride = 1
        self.passed = 0

    def _array(self, name: str, items: int, width: int) -> Tensor:
        dtype = history_dtype(numbers=self.numbers) if name == "history" else self.dtype
        if self.directory is None:
            return torch.zeros(items, width, dtype=dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = str(self.directory / f"{name}.bin")
        flat = torch.from_file(path, shared=True, size=items * width, dtype=dtype)
        return flat.reshape(items, width).zero_()

    def note(self, items: Tensor, predictions: Tensor) -> None:
        """Keep predictions (m, c) of the present look."""
        self.present[items] = predictions.to(self.dtype)
        # An example that comes twice in a row, as from a closure, does not make a look go faster.
        self.passed += len(items[~self.seen[items]].unique())
        self.seen[items] = True

    def close(self, look: Look, margins: Tensor) -> None:
        """End the present look, and let it count if it is believed.

        Args:
            look: what it was like.
            margins: of the items that were seen, in their order.
        """
        rows = self.seen.nonzero().squeeze(1)
        self._remember(look.number, rows, margins)
        share = 1.0 if look.believed else UNBELIEVED
        counted = rows[self.weight[rows] < 1] if not look.believed else rows
        now, before = self.present[counted].float(), self.average[counted].float()
        self.weight[counted] += share * look.number
        step = share * look.number / self.weight[counted]
        self.average[counted] = (before + (now - before) * step[:, None]).to(self.dtype)
        self.last[counted] = self.present[counted]
        self.last_look[counted] = look.number
        self.seen.zero_()
        self.passed = 0

    def _remember(self, number: int, rows: Tensor, margins: Tensor) -> None:
        if (number - 1) % self.stride:
            return
        if len(self.kept) == KEPT_LOOKS:
            half = KEPT_LOOKS // 2
            self.history[:, :half] = self.history[:, ::2].clone()
            self.history[:, half:] = torch.nan
            self.kept, self.stride = self.kept[::2], 2 * self.stride
            if (number - 1) % self.stride:
                return
        self.history[rows, len(self.kept)] = margins.to(self.history.dtype)
        self.kept.append(number)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is kept."""
        return {
            **{name: getattr(self, name).clone() for name in TENSORS},
            "kept": list(self.kept),
            "stride": self.stride,
            "passed": self.passed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; shapes have been compared."""
        for name in TENSORS:
            getattr(self, name).copy_(state[name])
        self.kept = list(state["kept"])
        self.stride, self.passed = state["stride"], state["passed"]


TENSORS = ("present", "last", "average", "history", "seen", "weight", "last_look")
"""What :class:`Predictions` holds for each item."""
