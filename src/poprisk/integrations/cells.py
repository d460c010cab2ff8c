"""What the callbacks that trace the cells share, whatever trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.path import CellTrace, CellTracer
from poprisk.protocols import PerExampleLoss

Labelled = tuple[Tensor, Tensor]


class CellFollower:
    """A tracer of somebody else's training: when it begins, what it is told, when it ends.

    Args:
        loss: one value an example, or the name of one.
        train: inputs and targets of the training set, in the order of its positions.
        clean_targets: training targets without the label noise.
        query: inputs, or inputs and targets, of the points to predict.
        settings: of the tracer.
    """

    def __init__(
        self,
        loss: str | PerExampleLoss,
        train: Labelled,
        clean_targets: Tensor,
        query: Tensor | Labelled | None,
        **settings: Any,
    ) -> None:
        self.loss, self.train, self.clean_targets, self.query = loss, train, clean_targets, query
        self._settings = settings
        self._tracer: CellTracer | None = None
        self._told: list[Tensor] = []

    def trace(self) -> CellTrace:
        """The cells so far, as :meth:`poprisk.CellTracer.trace` gives them.

        Raises:
            ValueError: before training.
        """
        if self._tracer is None:
            raise ValueError("nothing was followed yet: pass the callback to the trainer, and fit.")
        return self._tracer.trace()

    @property
    def cost(self) -> float:
        """Time that following took, in units of that of the training."""
        return float("nan") if self._tracer is None else self._tracer.cost

    def _begin(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        x, y = self.train
        query = self.query
        if isinstance(query, Tensor):
            query = query.to(device)
        elif query is not None:
            query = query[0].to(device), query[1].to(device)
        self._tracer = CellTracer(
            model,
            self.loss,
            optimizer,
            train=(x.to(device), y.to(device)),
            clean_targets=self.clean_targets.to(device),
            query=query,
            **self._settings,
        )
        self._told.clear()
        self._tracer.__enter__()

    def _stepped(self) -> None:
        """A step of the optimizer, on all examples that were told since the last one."""
        assert self._tracer is not None
        told, self._told = self._told, list[Tensor]()
        self._tracer.step(torch.cat(told))

    def _finish(self, error: BaseException | None = None) -> None:
        if self._tracer is not None:
            self._tracer.__exit__(None if error is None else type(error), error, None)


def check_plain(refused: dict[str, bool]) -> None:
    """Raise ValueError for settings under which a step is not that of the mean loss.

    Args:
        refused: by what they are called, whether they are on.
    """
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"the cells cannot be traced with {name}, for a step is then not the optimizer's "
                "answer to the mean loss of its batch in the precision of the weights; leave it "
                "out."
            )
