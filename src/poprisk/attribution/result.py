"""What training examples did to a query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from poprisk._validate import check_positive
from poprisk.printing import short_html, short_repr


class Attribution(NamedTuple):
    r"""Influence of every training example on queries of a trained model.

    Attributes:
        influence: derivative of each query by the weight of an example's loss in the whole run,
            (q, n), or (n,) of a single query: positive where the example raised it.
        value: the queries themselves, (q,), or a number.
        standard_error: of a mean loss, over the query's examples; NaN for anything else. The
            influence is a derivative and has none.
        valid: whether a training without some of the examples ended where the derivative says.
        reason: why not, or why that is not known.
        agreement: measured change of the queries there along the predicted one, over its size: 1
            for a training that is linear that far; NaN if none was made.
        cost: time it took over that of the training; NaN where it is unknown.
    """

    influence: Tensor
    value: Tensor | float
    standard_error: float
    valid: bool
    reason: str
    agreement: float
    cost: float

    __repr__ = short_repr
    _repr_html_ = short_html

    def without(self, index: Tensor) -> Tensor:
        """The queries if some examples had not been trained on, to first order.

        Args:
            index: of the examples, (k,) integers, or (n,) booleans.
        """
        return self.value - self.influence[..., index].sum(-1)

    def of_groups(self, ids: Tensor) -> Tensor:
        """Influence of groups of examples, (q, G) or (G,).

        Args:
            ids: 0..G-1 of each example, (n,).
        """
        shape = (*self.influence.shape[:-1], int(ids.max()) + 1)
        found = torch.zeros(shape, dtype=self.influence.dtype, device=self.influence.device)
        return found.index_add(-1, ids.to(found.device), self.influence)

    def raising(self, k: int = 10) -> Tensor:
        """Examples that raised the query most, (q, k) or (k,); of a test loss the harmful ones."""
        check_positive("k", k)
        return self.influence.topk(min(k, self.influence.shape[-1])).indices

    def lowering(self, k: int = 10) -> Tensor:
        """Those that lowered it most; of a test loss the helpful ones."""
        check_positive("k", k)
        return (-self.influence).topk(min(k, self.influence.shape[-1])).indices
