"""Influence by bergson's MAGIC, which goes back through a training as :mod:`poprisk` does.

Ilyas and Engstrom 2025, arXiv:2503.13751. Its command trains causal language models of
transformers by text; its ``Trainer``, called here, any module whose output is the loss of a batch.
It takes the training up in torchopt's optimizers, and each query goes back through it on its own.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poprisk.attribution import Replay
from poprisk.forward_mode import plain_kernels
from poprisk.jacobian import flat
from poprisk.path.problem import private_copy

Loss = Callable[[Tensor, Tensor], Tensor]

EPS_ROOT = 1e-17
"""Added to Adam's second moments, as bergson does by default: the root of one that is 0, as where
an input is always 0, has no derivative, and all influences would be NaN."""

APART = 1e-2
"""Distance of bergson's weights at the end from ours, over the way from the start, that rounding
explains."""


def model_at(done: Replay, weights: Tensor) -> nn.Module:
    """Another copy of the model with these weights, (P,)."""
    model = private_copy(done.problem.model)
    with torch.no_grad():
        for name, w in done.problem.J.named(weights).items():
            model.get_parameter(name).copy_(w)
    return model.eval()


class BatchLoss(nn.Module):
    """A model whose output is its mean loss over a batch, each example's weighed."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, input_ids: Tensor, targets: Tensor, example_weight: Tensor) -> Tensor:
        """From inputs, by the name that bergson counts columns of, (b, ...) to a number."""
        return (self.loss(self.model(input_ids), targets) * example_weight).mean()


class Batches:
    """The batches of a run in their order, with a weight for each example's loss.

    What bergson's trainer reads of its own ``DataStream``, whose examples are token ids.

    Attributes:
        weights: (n,), of all examples: an example answers for all its visits.
        requires_grad: of the weights; they always do.
        device: where a backward pass that is resumed would be loaded.
    """

    def __init__(self, done: Replay) -> None:
        self.drawn, (self.x, self.y) = done.batches, done.problem.train
        self.weights = nn.Parameter(torch.ones(len(self.x)))
        self.requires_grad, self.device = True, self.x.device

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        i = self.drawn[k]
        weights = self.weights[i]
        return {"input_ids": self.x[i], "targets": self.y[i], "example_weight": weights}


def functional_optimizer(done: Replay) -> Any:
    """A run's SGD or AdamW in torchopt's form.

    Raises:
        ValueError: for another optimizer, several groups, or a schedule.
    """
    kind, (group, *others) = type(done.optimizer), done.settings[0]
    if others or any(settings != done.settings[0] for settings in done.settings):
        raise ValueError("the run has several groups or a schedule; bergson's is of one rate.")
    names: Mapping[type, tuple[str, ...]] = {
        torch.optim.SGD: ("lr", "momentum", "weight_decay", "nesterov"),
        torch.optim.AdamW: ("lr", "betas", "eps", "weight_decay"),
    }
    if kind not in names:
        raise ValueError(f"the run's optimizer is {kind.__name__}; bergson's are SGD and AdamW.")
    # torchopt undampens what it calls first, but on the way back the first step comes last.
    for name in ("maximize", "amsgrad", "dampening"):
        if value := group.get(name):
            raise ValueError(
                f"the run's {kind.__name__} has {name}={value}, which bergson does not go back by."
            )
    import torchopt

    settings = {name: group[name] for name in names[kind]}
    if kind is torch.optim.SGD:
        return torchopt.sgd(**settings)
    return torchopt.adamw(**settings, eps_root=EPS_ROOT)


def magic(done: Replay, loss: Loss) -> Tensor:
    """The derivative of queries by the weights of examples, (q, n).

    Raises:
        ValueError: if bergson cannot train so.
        RuntimeError: if its training is not the same.
    """
    from bergson.magic.trainer import Trainer

    start = flat(done.saved[0].weights)
    model, data = BatchLoss(model_at(done, start), loss), Batches(done)
    with (
        tempfile.TemporaryDirectory() as folder, plain_kernels(model), torch.enable_grad(),
        contextlib.redirect_stderr(io.StringIO()),  # its bars
    ):  # fmt: skip
        trainer, state = Trainer.initialize(model, functional_optimizer(done))
        states = str(Path(folder) / "states")
        state = trainer.train(state, data, inplace=True, save_dir=states)
        ends = flat([state.params[f"model.{name}"].detach() for name in done.problem.names])
        if float((ends - done.final).norm()) > APART * float((done.final - start).norm()):
            raise RuntimeError("bergson's training does not end where the run did.")
        found = [
            trainer.backward(states, data, end, state, cleanup=False, inplace=True).weight_grads
            for end in _ends(model, state, done.problem.query, len(data.x))
        ]
    return torch.stack(found).detach()


def _ends(model: BatchLoss, state: Any, query: tuple[Tensor, Tensor | None], n: int) -> list[Any]:
    """Where each query's way back begins: its gradient in the weights, nothing in the rest."""
    from bergson.magic.trainer import BackwardState

    x, y = query
    assert y is not None
    found = list[Any]()
    with state.activate(model) as weights:
        for value in model.loss(model.model(x), y):
            slopes = torch.autograd.grad(value, [*weights.values()], retain_graph=True)
            rest = state.differentiable_tensors()[len(slopes) :]
            gradient = dict(zip(weights, slopes, strict=True))
            found.append(BackwardState(gradient, list(map(torch.zeros_like, rest)), torch.zeros(n)))
    return found
