"""Arms of a comparison: our optimizer, AdamW over a grid, its controls and its peers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.sizes import Sizes
from poprisk.optim.soap import PopRiskSOAP
from poprisk_lab.controls import RmsMatched, ShuffledMask, UpdateTrace

FAMILIES = (
    "poprisk",
    "basis",
    "adamw",
    "early-stopping",
    "rms-matched",
    "shuffled",
    "paper",
    "peer",
)
"""Kinds of arms, in the order of the tables."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FULL_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAYS = (0.01, 1.0)
FULL_WEIGHT_DECAYS = (0.0, 0.01, 0.1, 1.0, 3.0)
OURS = "poprisk"
DEFAULT_ADAMW = {"lr": 1e-3, "weight_decay": 0.01}
"""Those of our optimizer too, so that methods are compared at the same settings."""


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: unique, fit for a file name.
        label: for tables.
        family: one of :data:`FAMILIES`.
        optimizer: which optimizer :func:`build_optimizer` makes.
        settings: its arguments, JSON values.
        held_out: train on four fifths and stop by the rest, labels as noisy as they are.
        follows: arm whose update sizes this one repeats, seed by seed.
    """

    name: str
    label: str
    family: str
    optimizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False
    follows: str | None = None

    @property
    def can_have_twin(self) -> bool:
        """Whether a twin can be trained beside it: it neither follows nor shuffles anything."""
        return self.optimizer in ("adamw", "poprisk") and self.follows is None

    def as_json(self) -> dict[str, Any]:
        """The arm as written to ``config.json``."""
        return asdict(self)


def default_arms(*, full: bool) -> list[Arm]:
    """The arms that `poprisk compare` trains: the telling ones, or all of them."""
    rates = FULL_LEARNING_RATES if full else LEARNING_RATES
    decays = FULL_WEIGHT_DECAYS if full else WEIGHT_DECAYS
    stop_decays = decays if full else (0.01,)
    return [
        Arm(OURS, "PopRiskAdamW", "poprisk", "poprisk"),
        *(_adamw(lr, wd) for lr in rates for wd in decays),
        *(_adamw(lr, wd, held_out=True) for lr in rates for wd in stop_decays),
        Arm(
            "rms-matched",
            "AdamW, RMS-matched",
            "rms-matched",
            "rms-matched",
            DEFAULT_ADAMW,
            follows=OURS,
        ),
        Arm("shuffled", "shuffled mask", "shuffled", "shuffled"),
        Arm("poprisk-soap", "PopRiskSOAP", "basis", "poprisk-soap"),
        *(_paper_arms() + _peer_arms() if full else []),
    ]


def _adamw(lr: float, weight_decay: float, *, held_out: bool = False) -> Arm:
    return Arm(
        name=f"{'stopped' if held_out else 'adamw'}-lr{lr:g}-wd{weight_decay:g}",
        label=f"AdamW{', early stopping' if held_out else ''}, lr {lr:g}, decay {weight_decay:g}",
        family="early-stopping" if held_out else "adamw",
        optimizer="adamw",
        settings={"lr": lr, "weight_decay": weight_decay},
        held_out=held_out,
    )


def _paper_arms() -> list[Arm]:
    rest = {"softness": 1.0, "weight_decay": 0.01}
    return [
        Arm(f"paper-{mask}", f"Algorithm 1, {mask} mask", "paper", "poprisk",
            {"mode": "paper", "mask": mask, **rest})
        for mask in ("soft", "hard", "snr")
    ]  # fmt: skip


def _peer_arms() -> list[Arm]:
    grokfast = {**DEFAULT_ADAMW, "betas": [0.9, 0.999], "normalize_lr": False}
    return [
        Arm("m-svag", "M-SVAG, lr 0.1", "peer", "m-svag", {"lr": 0.1}),
        Arm("adabelief", "AdaBelief, lr 0.001", "peer", "adabelief", DEFAULT_ADAMW),
        Arm("grokfast", "Grokfast, lr 0.001", "peer", "grokfast", grokfast),
    ]


def build_optimizer(
    arm: Arm,
    model: nn.Module,
    *,
    batch_size: Sizes,
    dataset_size: Sizes,
    trace: UpdateTrace | None = None,
) -> Optimizer:
    """Make an arm's optimizer for a model.

    Args:
        arm: which one.
        model: whose parameters it trains.
        batch_size: examples per step, for the gate.
        dataset_size: training examples, for the gate.
        trace: update sizes for an arm that ``follows`` another.
    """
    kind, settings = arm.optimizer, arm.settings
    sizes: dict[str, Any] = {"batch_size": batch_size, "dataset_size": dataset_size}
    if kind == "poprisk":
        return PopRiskAdamW(model, **sizes, **settings)
    if kind == "poprisk-soap":
        return PopRiskSOAP(model, **sizes, **settings)
    if kind == "shuffled":
        given: dict[str, Any] = {**settings, "mask": ShuffledMask(settings.get("mask", "soft"))}
        return PopRiskAdamW(model, **sizes, **given)
    if kind == "rms-matched":
        if trace is None:
            raise ValueError(f"arm {arm.name} needs the trace of arm {arm.follows}.")
        return RmsMatched(torch.optim.AdamW(model.parameters(), **settings), trace)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=_fusible(model), **settings)
    return _peer(kind, model, settings)


def backward_mean(optimizer: Optimizer, losses: Tensor) -> None:
    """The gradient of the mean of one loss per example, by the way that an optimizer asks for."""
    if isinstance(optimizer, PopRiskAdamW) and optimizer.told_by_loop():
        optimizer.backward(losses)
    else:
        losses.mean().backward()


def settings_used(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's class and the settings it trains with, defaults included; JSON values."""
    classes = [optimizer]
    while isinstance(inner := getattr(classes[-1], "optimizer", None), Optimizer):
        classes.append(inner)
    # Records older than the laboratory know one package, and must go on.
    packages = [type(o).__module__.partition(".")[0].removesuffix("_lab") for o in classes]
    names = [f"{p}.{type(o).__name__}" for p, o in zip(packages, classes, strict=True)]
    group = classes[-1].param_groups[0]
    left_out = ("params", "param_names", "skipped_steps", "step")
    return {
        "class": " of ".join(names),
        **{k: _json_value(v) for k, v in group.items() if k not in left_out},
    }


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return getattr(value, "__qualname__", None) or str(value)


def _fusible(model: nn.Module) -> bool:
    """Whether torch's fused AdamW takes these parameters: the same update, in one pass."""
    return all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters()
    )


def _peer(kind: str, model: nn.Module, settings: dict[str, Any]) -> Optimizer:
    import pytorch_optimizer as peers  # slow to import, and only needed here

    if kind == "m-svag":
        return peers.MSVAG(model.parameters(), **settings)
    if kind == "adabelief":
        return peers.AdaBelief(model.parameters(), **settings)
    if kind == "soap":
        return peers.SOAP(model.parameters(), **settings)
    if kind == "orthograd":
        return peers.OrthoGrad(torch.optim.AdamW(model.parameters(), **settings))
    if kind == "muon":
        return peers.Muon(muon_groups(model, **settings))
    return peers.GrokFastAdamW(model.parameters(), **settings)


def muon_groups(model: nn.Module, *, momentum: float = 0.95, **adamw: Any) -> list[dict[str, Any]]:
    """Muon for the weights of the hidden linear layers, AdamW for all else, as Muon is meant.

    All else: embeddings, biases, gains, and the last linear layer, which gives the outputs. The
    orthogonal updates are scaled by ``0.2 √max(rows, columns)`` (J. Liu et al., arXiv:2502.16982),
    to the root mean square of AdamW's updates, so that a learning rate and a decay mean the same
    for both parts, and the same as for AdamW.

    Args:
        model: whose parameters are trained.
        momentum: of Muon.
        adamw: ``lr`` and ``weight_decay`` of both parts, ``betas`` and ``eps`` of AdamW's.
    """
    hidden = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][:-1]
    own = {id(weight) for weight in hidden}
    shared = {"lr": adamw["lr"], "weight_decay": adamw["weight_decay"]}
    muon = {**shared, "use_muon": True, "momentum": momentum, "use_adjusted_lr": True}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [{"params": hidden, **muon}, {"params": rest, "use_muon": False, **adamw}]
