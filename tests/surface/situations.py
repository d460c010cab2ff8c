"""A situation: what is called, on what, in which precision, wrapper and mode."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from surface import losses, models

FLOATS = {"float64": 40, "float32": 45, "bfloat16": 8, "float16": 7}
MODES = {"": 79, "no_grad": 7, "inference_mode": 7, "autocast": 7}
WRAPPERS = {"": 82, "DataParallel": 7, "DDP": 7, "compiled": 4}
SIZES = {0: 2, 1: 4, 2: 8, 3: 11, 7: 25, 12: 25, 20: 25}
LABELS = {"int64": 70, "int32": 10, "uint8": 10, "bool": 10}
PIECES = {
    "entk": 17,
    "grad_mean_var": 17,
    "TwinRisk": 22,
    "record": 20,
    "RiskMonitor": 14,
    "Canaries": 5,
    "gated": 5,
}
TOLERANCE = {"float64": 1e-7, "float32": 3e-3, "bfloat16": 0.2, "float16": 0.05, "autocast": 0.4}


def drawn(case: random.Random, weights: dict[Any, int]) -> Any:
    return case.choices(list(weights), list(weights.values()))[0]


@dataclass
class Situation:
    """One random call; everything is a function of the seed.

    Attributes:
        seed: of all that is drawn.
        piece: what of the library is called.
        kind: name of the model.
        sort: name of the loss.
        n: examples.
        c: outputs.
        dtype: of model, inputs and numbers as targets.
        labels: dtype of classes.
        wrapper: around the model.
        mode: that the call is made under.
        training: whether the model is in training mode.
        case: where further choices are drawn from.
    """

    seed: int
    piece: str
    kind: str
    sort: str
    n: int
    c: int
    dtype: str
    labels: str
    wrapper: str
    mode: str
    training: bool
    case: random.Random = field(repr=False)

    @classmethod
    def of(cls, seed: int) -> Situation:
        case = random.Random(seed)
        kind = case.choice(list(models.ORDINARY if case.random() < 0.9 else models.ODD))
        sort = case.choice(list(losses.ORDINARY if case.random() < 0.85 else losses.ODD))
        classes = losses.LOSSES[sort].targets in ("classes", "ignored")
        labels = drawn(case, LABELS)
        c = 2 if classes and labels == "bool" else 3 if classes else case.choice([1, 3])
        if sort == "weighted cross-entropy":
            c = 3
        n = drawn(case, SIZES)
        dtype, wrapper, mode = (drawn(case, w) for w in (FLOATS, WRAPPERS, MODES))
        dtype = "float32" if mode == "autocast" else dtype
        training = case.random() < 0.5
        piece = drawn(case, PIECES)
        return cls(
            seed, piece, kind, sort, n, c, dtype, labels, wrapper, mode, training, case
        )  # fmt: skip

    @property
    def tolerance(self) -> float:
        """Relative to the size of the numbers."""
        return TOLERANCE["autocast" if self.mode == "autocast" else self.dtype]

    @property
    def loss(self) -> losses.Loss:
        return losses.LOSSES[self.sort].loss

    @property
    def random(self) -> bool:
        """Whether outputs are random."""
        return self.training and models.KINDS[self.kind].random

    def bare(self, dtype: str | None = None) -> nn.Module:
        """The model without a wrapper, the same one each time."""
        with torch.inference_mode(False), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = models.KINDS[self.kind].make(self.c)
            # Rounded to the precision of the situation first: all copies hold the same numbers.
            model = models.cast(model, getattr(torch, self.dtype))
            return models.cast(model, getattr(torch, dtype or self.dtype)).train(self.training)

    def model(self) -> nn.Module:
        """The model in its wrapper."""
        model = self.bare()
        if self.wrapper == "DataParallel":
            return nn.DataParallel(model)
        if self.wrapper == "DDP" and any(p.requires_grad for p in model.parameters()):
            return DistributedDataParallel(model)
        if self.wrapper == "compiled":
            compiled: Any = torch.compile(model, backend="aot_eager")
            return compiled
        return model

    @torch.inference_mode(False)
    def data(self, dtype: str | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        kind, sort = models.KINDS[self.kind], losses.LOSSES[self.sort]
        generator = torch.Generator().manual_seed(self.seed + 1)
        floats = getattr(torch, dtype or self.dtype)
        if kind.tokens:
            x = torch.randint(6, (self.n, *kind.inputs), generator=generator)
        else:
            x = torch.randn(self.n, *kind.inputs, generator=generator, dtype=torch.float64)
            x = x.to(getattr(torch, self.dtype)).to(floats)
        y = losses.draw_targets(sort, self.n, self.c, getattr(torch, self.labels), generator)
        return x, y.to(getattr(torch, self.dtype)).to(floats) if y.is_floating_point() else y

    @contextlib.contextmanager
    def under(self) -> Iterator[None]:
        """The mode of the call."""
        modes: dict[str, Any] = {
            "": contextlib.nullcontext,
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        }
        with modes[self.mode]():
            yield

    @contextlib.contextmanager
    def under_to_train(self) -> Iterator[None]:
        """The mode of a training loop: nobody trains without gradients."""
        with self.under() if self.mode == "autocast" else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        """A process group of one for DDP."""
        if self.wrapper != "DDP":
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def inner(model: nn.Module) -> nn.Module:
    """The module inside of a wrapper."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


def without_hooks(model: nn.Module) -> nn.Module:
    """The model as a function of its weights: hooks change what ``.grad`` holds, not that."""
    for p in model.parameters():
        (p._backward_hooks or {}).clear()
    return model


def own_name(name: str) -> str:
    """The name of a parameter without what a wrapper puts before it."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")
