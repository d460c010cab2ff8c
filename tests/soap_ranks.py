"""What every process of test_soap_ranks.py does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel

from gloo import batch, full, joined, mine, weights
from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk.optim import kronecker

WORLD = 3
"""So that some process has no rows of a matrix of four."""
BATCH = 9
SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "z": 0.7,
    "slack": 0.05,
    "refresh_every": 5,
    "factors": "gradient",
    "variance": "ema",
    "batch_size": BATCH,
    "dataset_size": 90,
}
TRAINED: dict[str, dict[str, Any]] = {
    "ema": {},
    "second-moment": {"variance": "second-moment"},
    "ungated": {"gate": False, "variance": "exact"},
    "one side": {"max_dim": 4},
}


class Handed(NamedTuple):
    """A parameter whose gradients are given: its shape, where it is, and what differs."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    of_gradient: tuple[Placement, ...] | None = None
    changes: dict[str, Any] = {}  # noqa: RUF012 (a field of a tuple; nobody adds to it)
    dtype: torch.dtype = torch.float64
    mesh: tuple[int, ...] = (WORLD,)
    overflows: bool = False


HANDED = {
    "columns": Handed((7, 7), (Shard(1),)),
    "columns, rows rotated": Handed((5, 9), (Shard(1),), changes={"max_dim": 5}),
    "columns of a convolution": Handed((6, 2, 3), (Shard(1),)),
    "last dimension of a convolution": Handed((6, 2, 3), (Shard(2),)),
    "replicated": Handed((5, 5), (Replicate(),)),
    "replicas of shards": Handed((7, 7), (Replicate(), Shard(0)), mesh=(1, WORLD)),
    "shards of replicas": Handed((7, 7), (Shard(0), Replicate()), mesh=(1, WORLD)),
    "a gradient too large for factors": Handed(
        (16, 16), (Shard(0),), changes={"gate": False}, overflows=True
    ),
    "gradients laid out otherwise": Handed((4, 4), (Shard(0),), of_gradient=(Partial(),)),
    "maximized in bfloat16": Handed(
        (4, 4), (Shard(0),), changes={"maximize": True}, dtype=torch.bfloat16
    ),
}


def build() -> nn.Module:
    """Square matrices, or nearly, whose first bases rounding does not decide on."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    return nn.Sequential(*layers).double()


def optimizer(model: nn.Module, **changes: Any) -> PopRiskSOAP:
    return PopRiskSOAP(model, **(SETTINGS | changes))


def steps(model: Any, opt: torch.optim.Optimizer, numbers: range, share: slice) -> None:
    """Train on this process's share of each batch, with clipped gradients."""
    for step in numbers:
        x, y = batch(step, BATCH)
        opt.zero_grad()
        nn.functional.mse_loss(model(x[share]), y[share]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()


def apart(a: nn.Module, b: nn.Module) -> float:
    return float((weights(a) - weights(b)).abs().max())


def single(count: int, **changes: Any) -> tuple[nn.Module, PopRiskSOAP]:
    model = build()
    opt = optimizer(model, **changes)
    steps(model, opt, range(count), slice(None))
    return model, opt


def sharded(count: int, **changes: Any) -> tuple[nn.Module, PopRiskSOAP]:
    model = build()
    fully_shard(model)
    opt = optimizer(model, **changes)
    steps(model, opt, range(count), mine())
    return model, opt


def trained() -> dict[str, Any]:
    """Weights and statistics of shards beside those of one process, and what is kept here."""
    found: dict[str, Any] = {}
    for name, changes in TRAINED.items():
        (one, alone), (model, opt) = single(12, **changes), sharded(12, **changes)
        found[name] = {
            "apart": apart(one, model),
            "statistics": [[list(x) for x in o.gate_stats().values()] for o in (opt, alone)],
        }
        if name == "ema":
            states = [opt.state[p] for p in model.parameters()]
            found["kept"] = [
                {k: v.to_local().numel() for k, v in s.items() if isinstance(v, DTensor)}
                for s in states
            ]
            found["whole"] = [
                [k for k, v in s.items() if type(v) is Tensor and v.numel() > 6] for s in states
            ]
    return found


def handed() -> dict[str, float]:
    """The largest difference of a parameter in parts to the same in one piece."""
    return {name: _handed(case) for name, case in HANDED.items()}


def _handed(case: Handed) -> float:
    generator = torch.Generator().manual_seed(0)
    start, *grads = (
        torch.randn(*case.shape, generator=generator, dtype=torch.float64).to(case.dtype)
        for _ in range(9)
    )
    if case.overflows:  # the trace of its factors, but none of its numbers in any basis
        size = (torch.finfo(case.dtype).max / len(start) * 1.2) ** 0.5
        grads[3] = size * torch.linalg.qr(grads[3]).Q
    mesh = init_device_mesh("cpu", case.mesh)
    places = case.of_gradient or case.placements
    split = nn.Parameter(distribute_tensor(start.clone(), mesh, case.placements))
    piece = nn.Parameter(start.clone())
    opts = [PopRiskSOAP([p], **(SETTINGS | case.changes)) for p in (split, piece)]
    for grad in grads:
        split.grad, piece.grad = distribute_tensor(grad, mesh, places), grad.clone()
        for opt in opts:
            opt.step()
    return float((full(split) - full(piece)).abs().max())


def disagreeing() -> float:
    """Processes that find other signs for the same eigenvectors, against one alone."""
    one, _ = single(12)
    sign = -1.0 if dist.get_rank() else 1.0
    found = kronecker._eigenvectors

    def other(factor: Tensor) -> Tensor:
        return sign * found(factor)

    with mock.patch.object(kronecker, "_eigenvectors", other):
        model, _ = sharded(12)
    return apart(one, model)


def data_parallel() -> dict[str, Any]:
    """DDP: apart from one process, and the weights."""
    one, _ = single(12)
    model = build()
    steps(DistributedDataParallel(model), optimizer(model), range(12), mine())
    return {"apart": apart(one, model), "weights": weights(model).tolist()}


def resumed(folder: Path) -> dict[str, float]:
    """Save after six steps, load on as many or another number, and go on for six."""
    found = {}
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "shards to one": (sharded, single),
        "shards to shards": (sharded, sharded),
        "one to shards": (single, sharded),
    }
    for name, (before, after) in ways.items():
        (model, opt), (other, again) = before(6), after(0)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
        dcp.save(state, checkpoint_id=folder / name)
        empty = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, again)}
        dcp.load(empty, checkpoint_id=folder / name)
        other.load_state_dict(empty["model"])
        set_optimizer_state_dict(other, again, empty["optimizer"])
        steps(model, opt, range(6, 12), mine() if before is sharded else slice(None))
        steps(other, again, range(6, 12), mine() if after is sharded else slice(None))
        found[name] = apart(model, other)
    return found | {"a whole state to shards": _from_a_whole_state()}


def _from_a_whole_state() -> float:
    (model, opt), (other, again) = sharded(6), sharded(0)
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, opt, options=options)
    states: list[Any] = [state if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    set_optimizer_state_dict(other, again, states[0], options=options)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    for m, o in ((model, opt), (other, again)):
        steps(m, o, range(6, 12), mine())
    return apart(model, other)


def skipped() -> dict[str, Any]:
    """A NaN in the shard of one process makes every process skip, and all go on."""
    model, opt = sharded(3)
    before = weights(model)
    x, y = batch(3, BATCH)
    opt.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    grad: Any = next(model.parameters()).grad
    if dist.get_rank() == 1:
        grad.to_local()[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    unchanged = torch.equal(before, weights(model))
    steps(model, opt, range(3, 6), mine())
    return {
        "skipped": opt.skipped_steps,
        "unchanged": unchanged,
        "apart": apart(model, single(6)[0]),
    }


def refused() -> dict[str, Any]:
    """The words by which each is refused, and how far training that goes on is from one process."""
    model, opt = sharded(2)
    mesh = next(model.parameters()).device_mesh  # pyrefly: ignore
    examples, _ = single(0)
    exact = PopRiskSOAP(examples, batch_size=BATCH)
    x, y = batch(0, BATCH)
    exact.backward((examples(x) - y).square().sum(1))
    exact.step()
    summand = nn.Parameter(distribute_tensor(torch.eye(4), mesh, [Partial()]))
    coordinates = PopRiskAdamW(model, lr=0.01)
    attempts: dict[str, Callable[[], Any]] = {
        "examples": lambda: PopRiskSOAP(model),
        "exact": lambda: PopRiskSOAP(model, factors="gradient"),
        "a summand": lambda: optimizer(nn.ParameterList([summand])),
        "offloaded": lambda: _offloaded(model, mesh),
        "settings of a state": lambda: opt.load_state_dict(exact.state_dict()),
        "a whole state": lambda: opt.load_state_dict(single(2)[1].state_dict()),
        "a whole state for coordinates": lambda: coordinates.load_state_dict(
            _coordinates().state_dict()
        ),
        "shards of a state": lambda: single(0)[1].load_state_dict(opt.state_dict()),
    }
    found: dict[str, Any] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = str(error)
    steps(model, opt, range(2, 6), mine())
    return found | {"apart": apart(model, single(6)[0])}


def _offloaded(model: nn.Module, mesh: Any) -> None:
    with mock.patch.object(mesh, "_device_type", "cuda"):
        optimizer(model)


def _coordinates() -> PopRiskAdamW:
    model = build()
    opt = PopRiskAdamW(model, lr=0.01)
    steps(model, opt, range(1), slice(None))
    return opt


PARTS: dict[str, Callable[[Path], Any]] = {
    "trained": lambda _: trained(),
    "handed": lambda _: handed(),
    "disagreeing": lambda _: disagreeing(),
    "ddp": lambda _: data_parallel(),
    "resumed": resumed,
    "skipped": lambda _: skipped(),
    "refused": lambda _: refused(),
}


def main(rank: int, folder: Path, part: str) -> None:
    """What one process does; its findings go into ``folder``."""
    with joined(rank, folder, WORLD):
        found = PARTS[part](folder)
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
