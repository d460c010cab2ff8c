"""The gate on every optimizer of torch and of pytorch_optimizer: right, or refused by name.

A gate of ones is the optimizer alone; behind a shut gate only decoupled weight decay moves weights;
a saved state goes on alike. There is no fourth: what is none of it is in ``REFUSED``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from asserts import assert_bitwise
from poprisk import gated
from poprisk.optim import wrapper
from poprisk.optim.behaviour import Behaviour, Group, Kind, behaviours, kind_of
from samplers import GradRow, copies, grad_rows, parameter

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of the optimizers themselves
]

KNOWN = importlib.metadata.version("pytorch_optimizer").startswith("4.1.")
"""Whether the tables below were made for this version of pytorch_optimizer."""

DECAY = "applies weight decay that neither enters"
MEMORY = "keeps copies of the weights"
MOVES = "moves weights also where the gradient is zero"
MODES = "has train() and eval()"
TRIAL = "cannot be tried out on stand-ins"
CLOSURE = "needs a closure"
WRAPS = "wraps another optimizer"

# Names as torch's, or as pytorch_optimizer's without a prefix.
REASONS: dict[str, tuple[str, ...]] = {
    MOVES: (
        "torch.ASGD",
        "focus",
        "fromage",
        "ftrl",
        "gravity",
        "mars",
        "nero",
        "ranger21",
        "srmm",
        "yogi",
    ),
    TRIAL: (
        "torch.SparseAdam",
        "adahessian",
        "adalomo",
        "lomo",
        "lorarite",
        "sara",
        "sophiah",
        "alig",
        "bsam",
    ),
    MEMORY: (
        "a2grad",
        "accsgd",
        "adasmooth",
        "dadaptadagrad",
        "dadaptsgd",
        "madgrad",
        "prodigy",
        "ranger",
    ),
    WRAPS: ("magma",),
    MODES: (
        "schedulefreeadamw",
        "schedulefreeradam",
        "schedulefreesgd",
        "splus",
    ),
    CLOSURE: (
        "torch.LBFGS",
        "lbfgs",
    ),
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names}
"""By optimizer, why it is refused whatever its weight decay."""

OWN_DECAY = {
    "adafactor",
    "adagc",
    "adamp",
    "adams",
    "adan",
    "apollo",
    "bcos",
    "dadaptadam",
    "dadaptadan",
    "dadaptlion",
    "fadam",
    "grokfastadamw",
    "kron",
    "mars",
    "lamb",
    "lars",
    "novograd",
    "radam",
    "sgdp",
    "soap",
    "stableadamw",
    "spectralsphere",
}
"""Optimizers with weight decay of a form of their own, in one of their settings at least."""

MATRICES = ("torch.Muon", "pytorch_optimizer.spectralsphere")
MUONS = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")

NOT_BUILT: dict[str, type[Exception]] = {
    "pytorch_optimizer.demo": ImportError,  # needs einops
    "pytorch_optimizer.distributedmuon": ValueError,  # needs process groups
}

DECOUPLED = {
    *("torch.AdamW", "torch.Adafactor", "torch.Muon"),
    *(f"pytorch_optimizer.{name}" for name in ("adammini", "conda", "dash", "fira", "flashadamw")),
    *(f"pytorch_optimizer.{name}" for name in ("galore", "spam", "stablespam", *MUONS)),
}
"""Optimizers whose decay takes lr·weight_decay of the weights, without a setting that says so."""


def classes() -> Iterator[tuple[str, type[Optimizer]]]:
    for name, kind in sorted(vars(torch.optim).items()):
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
            yield f"torch.{name}", kind
    for name in pytorch_optimizer.get_supported_optimizers():
        yield f"pytorch_optimizer.{name}", pytorch_optimizer.load_optimizer(name)


CLASSES = dict(classes())


class Layer(nn.Module):
    """A module of given parameters, for optimizers that take one."""

    def __init__(self, params: list[Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def build(name: str, params: list[Parameter], changes: dict[str, Any]) -> Optimizer:
    """An optimizer with its own defaults, some of them changed in its groups."""
    kind: Any = CLASSES[name]
    needed = inspect.signature(kind).parameters
    groups: Any = params
    if name in MATRICES:
        groups = [p for p in params if p.dim() == 2]
    elif "model" in needed:
        groups = Layer(params)
    elif name.rpartition(".")[2] in MUONS:
        groups = [
            {"params": [p for p in params if (p.dim() == 2) == matrices], "use_muon": matrices}
            for matrices in (True, False)
        ]
    more: dict[str, Any] = {"num_iterations": 100, "num_data": 10}
    more = {key: value for key, value in more.items() if key in needed}
    if "lr" in needed and needed["lr"].default is inspect.Parameter.empty:
        more["lr"] = 0.01
    opt = kind(groups, **more)
    for group in opt.param_groups:
        group.update({key: value for key, value in changes.items() if key in group})
    return opt


def settings_of(opt: Optimizer) -> Iterator[dict[str, Any]]:
    """Settings to try: with weight decay of each form and without."""
    group = opt.param_groups[0] if opt.param_groups else {}
    yield {"weight_decay": 0.0}
    if "weight_decay" in group:
        yield {"weight_decay": 0.1}
        for flag in ("weight_decouple", "decoupled_weight_decay"):
            if flag in group:
                yield {"weight_decay": 0.1, flag: not group[flag]}
        if "fixed_decay" in group:
            yield {"weight_decay": 0.01, "fixed_decay": True}


@pytest.fixture
def examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try an optimizer on each kind of group out once, in place of again for each run of it."""
    known: dict[Any, dict[Kind, Behaviour]] = {}

    def remembered(optimizer: Optimizer, groups: Iterable[Group]) -> dict[Kind, Behaviour]:
        groups = [*groups]
        key = (type(optimizer), *map(kind_of, groups))
        if key not in known:
            known[key] = behaviours(optimizer, groups)
        return {**known[key]}

    monkeypatch.setattr(wrapper, "behaviours", remembered)


def dtype_of(name: str) -> torch.dtype:
    """Double precision, or single for an optimizer that has no other."""
    params = starts()
    try:
        take(build(name, params, {}), params, rows(25))
    except Exception as error:  # or one that takes no step at all
        if "ouble" in str(error):
            return torch.float32
    return torch.float64


def shut(mean_sq: list[Tensor], var: list[Tensor], **_: float) -> list[Tensor]:
    return [torch.zeros_like(x) for x in mean_sq]


def take(opt: Optimizer, params: list[Parameter], rows: list[GradRow], first: int = 0) -> None:
    """Step on rows of gradients, with a learning rate that changes on the way."""
    for t, row in enumerate(rows, first):
        torch.manual_seed(t)
        for group in opt.param_groups:
            if isinstance(group.get("lr"), float):
                group["lr"] *= 0.97
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)
        opt.step()


def starts(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [parameter(5, 4, dtype=dtype), parameter(4, seed=1, dtype=dtype)]


@cache
def rows(steps: int) -> list[GradRow]:
    """Gradients that :func:`take` copies."""
    return [*grad_rows(starts(), steps)]


def outcomes(name: str) -> dict[str, str]:
    """By settings, why it was refused; "" if it was not. What was not is held to the promise."""
    probe = build(name, starts(), {})
    dtype = dtype_of(name)
    found = {}
    for changes in settings_of(probe):
        params = starts(dtype)
        opt = build(name, params, changes)
        before, state = [p.detach().clone() for p in params], deepcopy(opt.state_dict())
        draws = torch.get_rng_state()
        try:
            gated(opt)
            found[str(changes)] = ""
        except TypeError as error:
            found[str(changes)] = str(error)
        assert_bitwise([before, draws], [[p.detach() for p in params], torch.get_rng_state()])
        assert repr(opt.state_dict()) == repr(state)
        if not found[str(changes)]:
            check_open(name, changes, dtype)
            check_shut(name, changes, dtype)
    accepted = [c for c in settings_of(probe) if not found[str(c)]]
    if accepted:  # what is saved is the same for every form of decay
        check_resumed(name, accepted[-1], dtype)
    return found


def check_open(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    params, twins = starts(dtype), starts(dtype)
    take(build(name, params, changes), params, rows(15))
    take(gated(build(name, twins, changes), q_min=1.0), twins, rows(15))
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)


def check_shut(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """The first step, which has no estimate yet, is not gated."""
    params = starts(dtype)
    opt = gated(build(name, params, changes), mask=shut)
    take(opt, params, rows(1))
    expected = {p: p.detach().clone() for g in opt.param_groups for p in g["params"]}
    for t, row in enumerate(rows(13)[1:], 1):
        take(opt, params, [row], first=t)
        for group in opt.param_groups:
            for p in group["params"]:
                expected[p] *= 1 - share(name, group)
    tolerance = 1e-9 if params[0].dtype == torch.float64 else 1e-5
    for p, w in expected.items():
        torch.testing.assert_close(p.detach(), w, rtol=tolerance, atol=1e-12)


def share(name: str, group: dict[str, Any]) -> float:
    """What decoupled decay must take, from what the optimizer says of itself."""
    said = group.get("weight_decouple", group.get("decoupled_weight_decay", name in DECOUPLED))
    if not said or not group.get("weight_decay"):
        return 0.0
    return group["weight_decay"] * (1.0 if group.get("fixed_decay") else float(group["lr"]))


def resumed(name: str, changes: dict[str, Any], dtype: torch.dtype, *, gate: bool) -> bool:
    """Whether a saved and loaded optimizer goes on as one that never stopped."""
    whole, params = starts(dtype), starts(dtype)

    def wrap(opt: Optimizer) -> Optimizer:
        return gated(opt) if gate else opt

    one, first = (wrap(build(name, ps, changes)) for ps in (whole, params))
    take(one, whole, rows(12))
    take(first, params, rows(12)[:8])
    again = copies(params)
    second = wrap(build(name, again, changes))
    second.load_state_dict(deepcopy(first.state_dict()))
    take(second, again, rows(12)[8:], first=8)
    return all(
        torch.allclose(p, q, rtol=1e-12, atol=1e-14) for p, q in zip(whole, again, strict=True)
    )


def check_resumed(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """As the optimizer alone does; some forget part of their state, or cannot step after a load."""
    try:
        alone = resumed(name, changes, dtype, gate=False)
    except RuntimeError:
        return
    if alone:
        assert resumed(name, changes, dtype, gate=True), changes


@pytest.mark.usefixtures("examined_once")
@pytest.mark.parametrize(
    "name",
    [
        # each of its steps searches a root
        pytest.param(name, marks=[pytest.mark.long] if name.endswith(".spectralsphere") else [])
        for name in CLASSES
    ],
)
def test_every_optimizer_is_gated_right_or_refused_by_name(name: str) -> None:
    if name in NOT_BUILT:
        with pytest.raises(NOT_BUILT[name]):
            build(name, starts(), {})
        return
    found, short = outcomes(name), name.removeprefix("pytorch_optimizer.")
    reason = REFUSED.get(short, "")
    start = f"{CLASSES[name].__name__} cannot be gated: it "
    assert all(message.startswith(start) for message in found.values() if message)
    if not KNOWN:
        return
    for settings, message in found.items():
        expected = reason
        if DECAY in message:
            assert short in OWN_DECAY
            assert settings != "{'weight_decay': 0.0}"
            expected = DECAY
        assert message.startswith(start + expected if expected else ""), settings
        assert bool(message) == bool(expected), settings
    assert any(DECAY in message for message in found.values()) == (short in OWN_DECAY)
