"""What every process of a distributed test does; test_distributed.py starts them and reads on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gloo import WORLD, batch, joined, mine, weights
from poprisk import GatedOptimizer, PopRiskAdamW, entk, gated, grad_mean_var, observe_ranks
from poprisk.path import NotAnalysable, Recorder, integrate

BATCH = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused per tensor": {"fused": True, "reduction": "per_tensor"},
    "foreach per tensor": {"foreach": True, "reduction": "per_tensor", "mask": "snr"},
    "loop per tensor": {"foreach": False, "reduction": "per_tensor", "mask": "hard"},
    "second-moment": {"fused": True, "variance": "second-moment"},
    "paper": {"fused": True, "mode": "paper", "mask": "snr"},
}


def build() -> nn.Module:
    """Odd sizes: the shards are unequal, and the last bias has none on the second process."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
    return nn.Sequential(*layers).double()


def steps(model: nn.Module, opt: torch.optim.Optimizer, numbers: range, share: slice) -> None:
    """Train on this process's share of each batch, in two accumulated halves."""
    for step in numbers:
        x, y = batch(step, BATCH)
        opt.zero_grad()
        for half in (slice(0, BATCH // 2), slice(BATCH // 2, None)):
            xs, ys = x[half][share], y[half][share]
            (nn.functional.mse_loss(model(xs), ys) / 2).backward()
        opt.step()


def optimizer(model: nn.Module, **settings: Any) -> PopRiskAdamW:
    return PopRiskAdamW(model, lr=0.01, batch_size=BATCH, dataset_size=100, z=1.0, **settings)


def single(count: int, **settings: Any) -> tuple[nn.Module, PopRiskAdamW]:
    model = build()
    opt = optimizer(model, **settings)
    steps(model, opt, range(count), slice(None))
    return model, opt


def compare(wrap: Callable[[nn.Module], Any]) -> dict[str, float]:
    """The largest difference of weights to one process, for each of the settings."""
    apart = {}
    for name, settings in SETTINGS.items():
        model = build()
        wrapped = wrap(model)
        opt = optimizer(model, **settings)
        steps(wrapped, opt, range(10), mine())
        expected = weights(single(10, **settings)[0])
        apart[name] = float((weights(model) - expected).abs().max())
    return apart


def ddp() -> dict[str, float]:
    return compare(DistributedDataParallel)


def fsdp() -> dict[str, float]:
    return compare(lambda model: fully_shard(model))


GATED: dict[str, tuple[dict[str, Any], bool]] = {
    "SGD": ({}, False),
    "SGD per tensor": ({"reduction": "per_tensor"}, False),
    "AdamW": ({"mask": "snr"}, True),
    "AdamW per tensor": ({"reduction": "per_tensor", "mask": "hard"}, True),
}
"""Settings of the gate, and whether the optimizer under it is AdamW."""


def gated_optimizer(model: nn.Module, settings: dict[str, Any], adamw: bool) -> GatedOptimizer:
    params = model.parameters()
    inner = (
        torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
        if adamw
        else torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)
    )
    return gated(inner, batch_size=BATCH, dataset_size=100, z=1.0, **settings)


def gate_on_others(folder: Path, wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A gated optimizer against one process: weights, statistics, and after a checkpoint."""
    found = {}
    for name, how in GATED.items():
        one = build()
        alone = gated_optimizer(one, *how)
        steps(one, alone, range(12), slice(None))
        two, again = wrap(build()), wrap(build())
        opt, other = (gated_optimizer(model, *how) for model in (two, again))
        steps(two, opt, range(6), mine())
        state = {"model": two.state_dict(), "optimizer": get_optimizer_state_dict(two, opt)}
        dcp.save(state, checkpoint_id=folder / name)
        empty = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, other)}
        dcp.load(empty, checkpoint_id=folder / name)
        again.load_state_dict(empty["model"])
        set_optimizer_state_dict(again, other, empty["optimizer"])
        steps(two, opt, range(6, 12), mine())
        steps(again, other, range(6, 12), mine())
        found[name] = {
            "apart": float((weights(two) - weights(one)).abs().max()),
            "resumed": float((weights(again) - weights(two)).abs().max()),
            "statistics": [list(o.gate_stats()["groups[0]"]) for o in (opt, alone)],
        }
    return found


def failing() -> dict[str, bool]:
    """An optimizer that fails in its second step on one process, after it has moved weights."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if fail and dist.get_rank() == 1:
                raise ZeroDivisionError

    fail = False
    model = build()
    fully_shard(model)
    opt = gated(Failing(model.parameters(), lr=0.1), batch_size=BATCH)
    steps(model, opt, range(2), mine())
    fail, before = True, [p.to_local().clone() for p in model.parameters()]  # pyrefly: ignore
    raised = False
    try:
        steps(model, opt, range(2, 3), mine())
    except ZeroDivisionError:
        raised = True
    after = [p.to_local() for p in model.parameters()]  # pyrefly: ignore
    return {"raised": raised, "unchanged": all(map(torch.equal, before, after))}


def statistics() -> dict[str, Any]:
    """The gate's statistics of sharded parameters and of whole ones."""
    found = {}
    for reduction in (None, "per_tensor"):
        model = build()
        fully_shard(model)
        opt = optimizer(model, reduction=reduction)
        steps(model, opt, range(10), mine())
        whole = single(10, reduction=reduction)[1]
        found[str(reduction)] = [
            {k: list(v) for k, v in o.gate_stats().items()} for o in (opt, whole)
        ]
    return found


def observed() -> dict[str, Any]:
    """The variance that DDP's processes disagree on, against its definition from all gradients."""
    model = build()
    wrapped = DistributedDataParallel(model)
    opt = optimizer(model, variance="data-parallel", rho=0.9, fused=True)
    message = ""
    try:
        steps(wrapped, opt, range(1), mine())
    except RuntimeError as error:
        message = str(error)
    observe_ranks(wrapped, opt)
    twin, s, apart = build(), 0.0, 0.0
    for step in range(8):
        twin.load_state_dict(model.state_dict())
        x, y = batch(step, BATCH)
        grads = []
        for rank in range(WORLD):
            twin.zero_grad()
            nn.functional.mse_loss(twin(x[rank::WORLD]), y[rank::WORLD]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))  # pyrefly: ignore
        new = torch.stack(grads).var(0, unbiased=True) / WORLD
        s = 0.9 * s + 0.1 * new * (0.25 if step % 2 else 1.0)
        opt.zero_grad()
        nn.functional.mse_loss(wrapped(x[mine()]), y[mine()]).backward()
        if step % 2:
            for p in model.parameters():
                p.grad.mul_(0.5)  # pyrefly: ignore
        opt.step()
        found = torch.cat([opt.state[p]["grad_mean_var"].flatten() for p in model.parameters()])
        apart = max(apart, float((found - s).abs().max() / s.max()))
    moved = not torch.equal(weights(model), weights(build()))
    return {"apart": apart, "message": message, "moved": moved}


def within_batches(wrapper: str) -> dict[str, Any]:
    """What looks within a batch, beside the plain model: a difference, or the words of a refusal.

    All parts of the first step are done, so that a refusal comes after no more than these.
    """
    x, y = batch(0, BATCH)
    x, y = x[mine()], y[mine()]

    def per_example(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1)

    def exact(model: nn.Module, opt: PopRiskAdamW) -> None:
        opt.backward(per_example(model(x), y))
        opt.step()

    def microbatch(model: nn.Module, opt: PopRiskAdamW) -> None:
        for half in (slice(0, 2), slice(2, 4)):
            (per_example(model(x[half]), y[half]).mean() / 2).backward()
            opt.microbatch(2)
        opt.step()

    def without_sync(model: Any, opt: PopRiskAdamW) -> None:
        with model.no_sync():
            (per_example(model(x[:2]), y[:2]).mean() / 2).backward()
        opt.microbatch(2)
        (per_example(model(x[2:]), y[2:]).mean() / 2).backward()
        opt.microbatch(2)
        opt.step()

    def told(model: Any, opt: PopRiskAdamW) -> None:
        observe_ranks(model, opt)

    steps: dict[str, tuple[str, Callable[[Any, PopRiskAdamW], None]]] = {
        "exact": ("exact", exact),
        "microbatch": ("microbatch", microbatch),
    }
    if wrapper == "fsdp":
        steps["observe_ranks"] = ("data-parallel", told)
    else:
        steps["microbatch without synchronization"] = ("microbatch", without_sync)
    found: dict[str, Any] = {}
    for name, (variance, step) in steps.items():
        model, wrapped = wrapped_model(wrapper)
        opt = PopRiskAdamW(model.parameters(), variance=variance)
        found[name] = {"message": words(step, wrapped, opt)}
        found[name]["unchanged"] = torch.equal(weights(model), weights(build())) and not opt.state
    _, wrapped = wrapped_model(wrapper)
    measures: dict[str, Callable[[nn.Module], Tensor]] = {
        "grad_mean_var": lambda model: flat(grad_mean_var(model, per_example, (x, y))),
        "entk": lambda model: entk(model, x).dense().flatten(),
    }
    for name, measure in measures.items():
        try:
            found[name] = float((measure(wrapped) - measure(build())).abs().max())
        except ValueError as error:
            found[name] = str(error)
    return found


def wrapped_model(wrapper: str) -> tuple[nn.Module, Any]:
    model = build()
    if wrapper == "fsdp":
        return model, fully_shard(model)
    return model, DistributedDataParallel(model, gradient_as_bucket_view=wrapper == "ddp views")


def words(step: Callable[[Any, PopRiskAdamW], None], model: Any, opt: PopRiskAdamW) -> str:
    try:
        step(model, opt)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return ""


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def skipped() -> dict[str, Any]:
    """A NaN in the shard of one process makes every process skip."""
    model = build()
    fully_shard(model)
    opt = optimizer(model, fused=True)
    steps(model, opt, range(3), mine())
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
    return {"skipped": opt.skipped_steps, "unchanged": torch.equal(before, weights(model))}


def checkpoint(folder: Path) -> dict[str, float]:
    """Save from two processes after six steps; go on alone, and in two, from what was saved."""
    model = build()
    fully_shard(model)
    opt = optimizer(model, fused=True)
    steps(model, opt, range(6), mine())
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder)
    steps(model, opt, range(6, 12), mine())
    expected = weights(model)
    apart = {}
    for name in ("resharded to one", "again on two"):
        resumed = build()
        if name == "again on two":
            fully_shard(resumed)
        other = optimizer(resumed, fused=True)
        empty = {
            "model": resumed.state_dict(),
            "optimizer": get_optimizer_state_dict(resumed, other),
        }
        dcp.load(empty, checkpoint_id=folder)
        resumed.load_state_dict(empty["model"])
        set_optimizer_state_dict(resumed, other, empty["optimizer"])
        steps(resumed, other, range(6, 12), mine() if name == "again on two" else slice(None))
        apart[name] = float((weights(resumed) - expected).abs().max())
    return apart


def recorded() -> dict[str, Any]:
    """Recording under wrappers: refused, or exact of the module inside with all examples."""
    data = batch(0, BATCH)
    found: dict[str, Any] = {}
    wrappers: dict[str, Any] = {"ddp": DistributedDataParallel, "fsdp": fully_shard}
    for name, wrap in wrappers.items():
        wrapped = wrap(build())
        before = weights(wrapped)
        sgd = torch.optim.SGD(wrapped.parameters(), lr=0.05)
        try:
            Recorder(wrapped, "squared_error", sgd, train=data)
        except NotAnalysable as error:
            found[name] = str(error)
        found[f"{name} moved"] = not torch.equal(weights(wrapped), before)
    for name, behind in (("whole", torch.arange(BATCH)), ("own", torch.arange(BATCH)[mine()])):
        wrapped = DistributedDataParallel(build())
        sgd = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
        try:
            with Recorder(wrapped.module, "squared_error", sgd, train=data) as recorder:
                for _ in range(5):
                    sgd.zero_grad()
                    x, y = data[0][mine()], data[1][mine()]
                    (nn.functional.mse_loss(wrapped(x), y) / 2).backward()
                    sgd.step()
                    recorder.step(behind)
            found[name] = integrate(recorder.run).closure.worst
        except NotAnalysable as error:
            found[name] = str(error)
    return found


def main(rank: int, folder: Path) -> None:
    """What one process does; its findings go into ``folder``."""
    with joined(rank, folder):
        (folder / f"{rank}.json").write_text(json.dumps(results(folder)), encoding="utf-8")


def results(folder: Path) -> dict[str, Any]:
    return {
        "recorded": recorded(),
        "ddp": ddp(),
        "fsdp": fsdp(),
        "gated ddp": gate_on_others(folder / "gated ddp", DistributedDataParallel),
        "gated fsdp": gate_on_others(folder / "gated fsdp", fully_shard),
        "failing": failing(),
        "statistics": statistics(),
        "observed": observed(),
        "within": {w: within_batches(w) for w in ("ddp", "ddp views", "fsdp")},
        "skipped": skipped(),
        "checkpoint": checkpoint(folder / "checkpoint"),
    }
