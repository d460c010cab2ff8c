"""Runs of the grokking claims: one optimizer on a part of a modular table until it generalizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk_lab.arms import Arm, build_optimizer
from poprisk_lab.controls import UpdateTrace
from poprisk_lab.fit import FROM_GRADIENT, without_functions
from poprisk_lab.plots import rounded
from poprisk_lab.studies.claim import Metrics, Workspace
from poprisk_lab.studies.grokking.decay import GatedDecay
from poprisk_lab.tasks.modular import ModularTransformer, split_table

GOAL = 0.95
KEPT = 60
"""Points of a curve that are kept."""
WITH_MORE = ("poprisk", "basis", "paper", "shuffled", "decay-gated", "grokfast", "muon", "soap")
"""Arms that take what their trial has under ``gate``."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "poprisk": ("poprisk", {}),
    "basis": ("poprisk-soap", FROM_GRADIENT),
    "paper": ("poprisk", {}),
    "decay-gated": ("poprisk", {"weight_decay": 0.0}),
    "shuffled": ("shuffled", {}),
    "adamw": ("adamw", {}),
    "rms-matched": ("rms-matched", {}),
    "grokfast": ("grokfast", {"normalize_lr": False}),
    "orthograd": ("orthograd", {}),
    "muon": ("muon", {}),
    "soap": ("soap", {}),
}
"""What :func:`poprisk_lab.arms.build_optimizer` makes for an arm, and its further settings."""


class SplitTable(NamedTuple):
    """A table: inputs (n, k) and results (n,), seen and asked."""

    x: Tensor
    y: Tensor
    asked: Tensor
    answers: Tensor


def load(settings: dict[str, Any]) -> SplitTable:
    """The table of a trial."""
    (x, y), (asked, answers) = split_table(
        settings["table"], settings["p"], settings["fraction"], settings["seed"]
    )
    return SplitTable(x, y, asked, answers)


def build_model(settings: dict[str, Any]) -> ModularTransformer:
    """The network of a trial, freshly initialized from its seed."""
    torch.manual_seed(settings["seed"])
    operands = {"division": 2, "two-step": 3}[settings["table"]]
    return ModularTransformer(
        settings["p"],
        operands=operands,
        width=settings["width"],
        hidden=settings["hidden"],
        layers=settings.get("layers", 1),
    )


def build(settings: dict[str, Any], model: nn.Module, n: int) -> Optimizer:
    """The optimizer of a trial; ``n`` training examples.

    Raises:
        ValueError: for an arm that does not exist.
    """
    arm = settings["arm"]
    if arm not in KINDS:
        raise ValueError(f"there is no arm {arm!r}.")
    given: dict[str, Any] = {
        "lr": settings["lr"],
        "betas": (0.9, settings["beta2"]),
        "eps": settings.get("eps", 1e-8),
        "weight_decay": settings["weight_decay"],
        **KINDS[arm][1],
        **(settings["gate"] if arm in WITH_MORE else {}),
    }
    batch = settings["batch"] or n
    sizes: dict[str, Any] = {"batch_size": batch, "dataset_size": n if batch < n else None}
    trace = record_trace(settings, n) if arm == "rms-matched" else None
    made = build_optimizer(Arm(arm, arm, arm, KINDS[arm][0], given), model, **sizes, trace=trace)
    if arm == "decay-gated":
        assert isinstance(made, PopRiskAdamW)
        return GatedDecay(made, settings["weight_decay"])
    return made


def record_trace(settings: dict[str, Any], n: int) -> UpdateTrace:
    """RMS of the gated run's updates, step by step, up to the limit of the trial."""
    gated = {**settings, "arm": "poprisk"}
    data, model, trace = load(gated), build_model(gated), UpdateTrace()
    optimizer = build(gated, model, n)
    for index in itertools.islice(batches(gated, n, 0), settings["limit"]):
        gradient(model, optimizer, data, index)
        trace.record_step(optimizer)
    return trace


def batches(settings: dict[str, Any], n: int, start: int) -> Iterator[Tensor | slice]:
    """Index batches from step ``start`` on, for ever: shuffled passes, incomplete ones cut."""
    size = settings["batch"] or n
    if size >= n:
        while True:
            yield slice(None)
    each = n // size
    epoch = start // each
    while True:
        generator = torch.Generator().manual_seed(1_000_003 * (settings["seed"] + 1) + epoch)
        parts = torch.randperm(n, generator=generator)[: each * size].split(size)
        yield from parts[start % each if epoch == start // each else 0 :]
        epoch += 1


def gradient(
    model: ModularTransformer,
    optimizer: Optimizer,
    data: SplitTable,
    index: Tensor | slice,
    floor: float = 0.0,
) -> float:
    """Put the gradient of the mean loss over a batch into the parameters; return that loss.

    Below ``floor`` the gradient is turned round, which holds the training loss there (flooding:
    T. Ishida et al., arXiv:2002.08709).

    Raises:
        ValueError: for a floor together with the variance over examples.
    """
    optimizer.zero_grad()
    x, y = data.x[index], data.y[index]
    if isinstance(optimizer, PopRiskAdamW) and optimizer.defaults["variance"] == "exact":
        if floor:
            raise ValueError("the loss cannot be held at a floor with the variance over examples.")
        losses = F.cross_entropy(model.per_example(x), y, reduction="none")
        optimizer.backward(losses)
        return losses.detach().mean().item()
    loss = F.cross_entropy(model(x), y)
    (loss - floor).abs().backward()
    return loss.item()


@torch.no_grad()
def measure(model: nn.Module, data: SplitTable) -> tuple[float, float, float, float]:
    """Training loss and accuracy, test loss and accuracy."""
    found: list[float] = []
    for x, y in ((data.x, data.y), (data.asked, data.answers)):
        outputs = model(x)
        found.append(F.cross_entropy(outputs, y).item())
        found.append((outputs.argmax(1) == y).double().mean().item())
    return found[0], found[1], found[2], found[3]


@torch.no_grad()
def square(model: nn.Module) -> float:
    """Squared norm of all weights."""
    return sum(p.double().square().sum().item() for p in model.parameters())


def run(settings: dict[str, Any], workspace: Workspace) -> Metrics:
    """Train until 95% of what was not seen is right, a little longer, or up to the limit.

    Returns ``reached`` and ``memorized`` (first step measured at 95% of the test set and 99% of
    the training set; None if never), ``best`` (test accuracy), ``jumps`` (steps at which the loss
    more than doubled) and a ``curve`` of (step, training loss, training and test accuracy, squared
    norm of the weights; older records lack the last).
    """
    data, model = load(settings), build_model(settings)
    optimizer = build(settings, model, len(data.y))
    state: dict[str, Any] = {"step": 0, "jumps": 0, "before": None, "rows": []}
    saved = workspace.load()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        state = saved["state"]
    source = batches(settings, len(data.y), state["step"])
    while state["step"] < settings["limit"]:
        if state["step"] % settings["every"] == 0:
            train_loss, train, _, test = measure(model, data)
            state["rows"].append([state["step"], train_loss, train, test, square(model)])
            if _enough(state["rows"], settings):
                break
        loss = gradient(model, optimizer, data, next(source), settings.get("floor", 0.0))
        optimizer.step()
        before = state["before"]
        state["jumps"] += before is not None and loss > 2 * before + 0.02
        state["before"], state["step"] = loss, state["step"] + 1
        workspace.save(
            lambda: {
                "model": model.state_dict(),
                "optimizer": without_functions(optimizer.state_dict()),
                "random": torch.get_rng_state(),
                "state": state,
            }
        )
    return summarize(state, settings)


def _enough(rows: list[list[float]], settings: dict[str, Any]) -> bool:
    reached = first(rows, 3, GOAL)
    return reached is not None and rows[-1][0] >= reached + settings["after"]


def first(rows: list[list[float]], column: int, goal: float) -> int | None:
    """The first step whose ``column`` is at least ``goal``; None if there is none."""
    return next((int(row[0]) for row in rows if row[column] >= goal), None)


def summarize(state: dict[str, Any], settings: dict[str, Any]) -> Metrics:
    """What is kept of a run."""
    rows = state["rows"]
    every = -(-len(rows) // KEPT)
    kept = [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]
    return {
        "reached": first(rows, 3, GOAL),
        "memorized": first(rows, 2, 0.99),
        "limit": settings["limit"],
        "best": round(max(row[3] for row in rows), 5),
        "jumps": int(state["jumps"]),
        "steps": int(state["step"]),
        "curve": [[int(s), *rounded(rest, 4)] for s, *rest in kept],
    }
