"""The gate in a Kronecker basis: its reference, its limits, its state."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import poprisk
from asserts import assert_bitwise, complete_state, nothing_changes
from poprisk import PopRiskAdamW, PopRiskSOAP
from poprisk.optim import kronecker
from poprisk.optim.gate import MASKS_
from poprisk.optim.kronecker import BASES, FACTORS
from poprisk.optim.step import StepContext
from poprisk.path import realized_update
from poprisk_lab.arms import backward_mean
from poprisk_lab.controls import UpdateTrace
from reference.soap import ReferenceSOAP

B, N = 16, 64
SIZES = {"batch_size": B, "dataset_size": N}
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.8, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "coordinate_weight_decay": 0.1,
    "z": 1.25,
    "coordinate_z": 1.25,
    "softness": 0.1,
    "slack": 0.05,
    "factor_decay": 0.9,
    "refresh_every": 6,
    **SIZES,
}


def data(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.2])
    return x, torch.randint(0, classes, (N,), generator=g)


def batches(steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randperm(N, generator=g)[:B] for _ in range(steps)]


def linear(seed: int = 2) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3, bias=False).double()


def net(dtype: torch.dtype = torch.float64, seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def wide_net() -> nn.Sequential:
    """With a matrix whose gradient is turned by way of the examples' factors."""
    torch.manual_seed(3)
    layers = nn.Linear(5, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)
    return nn.Sequential(*layers).double()


def train(model: nn.Module, opt: Any, steps: list[Tensor], *, plain: bool = False) -> None:
    x, y = data()
    dtype = next(model.parameters()).dtype
    for rows in steps:
        opt.zero_grad()
        losses = F.cross_entropy(model(x[rows].to(dtype)), y[rows], reduction="none")
        losses.mean().backward() if plain else opt.backward(losses)
        opt.step()


def rotated(model: Any, **changes: Any) -> PopRiskSOAP:
    return PopRiskSOAP(model, **(SETTINGS | changes))


def same(factor: Tensor, *_: Tensor) -> Tensor:
    """The identity, as a basis for a factor."""
    return torch.eye(len(factor), dtype=factor.dtype)


def weight(model: nn.Sequential, i: int) -> Tensor:
    layer = model[i]
    assert isinstance(layer, nn.Linear)
    return layer.weight


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("changes", [{}, {"slack": 0.0}, {"slack": 0.4}, {"open": True}])
def test_many_steps_are_those_of_the_reference(changes: dict[str, Any]) -> None:
    changes = dict(changes)
    opened = changes.pop("open", False)
    layer, (x, y) = linear(), data()
    opt = rotated(layer, **changes, q_min=1.0 if opened else 0.0)
    w = layer.weight.detach().numpy().copy()
    reference = ReferenceSOAP(w, open_gate=opened, **{**SETTINGS, **changes})
    target = F.one_hot(y, 3).double() + 0.3 * torch.randn(N, 3, dtype=torch.float64)
    for rows in batches(45):
        out = layer(x[rows])
        opt.zero_grad()
        opt.backward(0.5 * (out - target[rows]).square().sum(1))
        opt.step()
        d = (out.detach() - target[rows]).numpy()
        expected = torch.from_numpy(reference.step(d, x[rows].numpy()))
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-11)
    if not opened:
        (stats,) = opt.gate_stats().values()
        assert 0 < stats.pass_rate < 1


@pytest.mark.parametrize("build", [net, wide_net])
def test_an_open_gate_is_no_gate(build: Callable[[], nn.Sequential]) -> None:
    models = [build(), build()]
    train(models[0], rotated(models[0], q_min=1.0), batches(20))
    train(models[1], rotated(models[1], gate=False), batches(20))
    assert_bitwise(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("variance", ["exact", "ema", "second-moment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["no side", "identity"])
def test_without_a_rotation_it_is_the_coordinate_gate(
    variance: str, dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: with no side rotated, and with bases that are the identity."""
    if how == "identity":
        monkeypatch.setattr(kronecker, "_eigenvectors", same)
        monkeypatch.setattr(kronecker, "_iterated", same)
    shared = {k: v for k, v in SETTINGS.items() if k in inspect.signature(PopRiskAdamW).parameters}
    models = [net(dtype), net(dtype)]
    max_dim = 0 if how == "no side" else 100
    factors = "examples" if variance == "exact" else "gradient"
    of_bases: dict[str, Any] = (
        {"z": shared["z"], "slack": 0.0} if how == "identity" else {"z": 4.0, "slack": 0.9}
    )
    turned = PopRiskSOAP(
        models[0],
        **(shared | of_bases),
        coordinate_z=shared["z"],
        coordinate_weight_decay=shared["weight_decay"],
        variance=variance,
        max_dim=max_dim,
        factors=factors,
    )
    train(models[0], turned, batches(20), plain=variance != "exact")
    plain = PopRiskAdamW(models[1], **shared, variance=variance)
    train(models[1], plain, batches(20), plain=variance != "exact")
    assert_bitwise(weights(models[0]), weights(models[1]))
    assert turned.gate_stats(models[0]) == plain.gate_stats(models[1])


def test_numpy_s_numbers_become_python_s() -> None:
    numbers = {key: np.float64(0.25) for key in ("slack", "coordinate_z", "factor_decay")}
    opt = rotated(net(), **numbers)
    stored = io.BytesIO()
    torch.save(opt.state_dict(), stored)
    stored.seek(0)
    torch.load(stored, weights_only=True)


def test_slack_lets_small_noise_pass() -> None:
    rates = []
    for slack in (0.0, 0.1, 1.0):
        model = net()
        opt = rotated(model, slack=slack)
        train(model, opt, batches(30))
        rates.append(opt.gate_stats()["0"].pass_rate)
    assert rates[0] < rates[1] < rates[2]


@pytest.mark.parametrize(
    ("build", "before", "steps"),
    [(net, 1, 15), pytest.param(wide_net, 8, 7, id="wide, up to the next basis")],
)
def test_parts_of_a_batch_are_the_batch(
    build: Callable[[], nn.Sequential], before: int, steps: int
) -> None:
    """But for the first basis, which is that of the first part: here both are given the same.

    Of a matrix wider than the batch rounding decides on basis vectors, too.
    """
    x, y = data()
    models = [build(), build()]
    opts = [rotated(m, refresh_every=16) for m in models]
    train(models[0], opts[0], batches(before))
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    models[1].load_state_dict(models[0].state_dict())
    for rows in batches(steps):
        for model, opt, parts in zip(models, opts, (1, 4), strict=True):
            opt.zero_grad()
            for part in rows.chunk(parts):
                losses = F.cross_entropy(model(x[part]), y[part], reduction="none")
                opt.backward(losses, weight=1 / parts)
            opt.step()
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("build", [net, wide_net])
def test_clipped_and_unscaled_gradients_are_seen_as_such(
    build: Callable[[], nn.Sequential],
) -> None:
    models = [build(), build()]
    opts = [rotated(m, eps=0.0) for m in models]
    x, y = data()
    for rows in batches(12):
        for model, opt, factor in zip(models, opts, (1.0, 8.0), strict=True):
            opt.zero_grad()
            opt.backward(factor * F.cross_entropy(model(x[rows]), y[rows], reduction="none"))
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(1 / factor)
            opt.step()
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factors", ["gradient", "examples"])
def test_the_first_step_is_one_of_coordinates(factors: str) -> None:
    """A batch's gradient is zero in much of its own basis, and Adam would follow round-off there.

    The averages that are carried over are of the size of the gradient everywhere.
    """
    torch.manual_seed(0)
    x, start = 30 * torch.randn(4, 64), torch.randn(64, 64)
    how: dict[str, Any] = {"factors": factors, "variance": "ema", "lr": 0.1, "weight_decay": 0.01}
    moved = list[Tensor]()
    for kind in (PopRiskSOAP, torch.optim.AdamW):
        layer = nn.Linear(64, 64, bias=False)
        layer.weight = nn.Parameter(start.clone())
        opt: Any = (
            PopRiskSOAP(layer, **how) if kind is PopRiskSOAP else kind(layer.parameters(), lr=0.1)
        )
        backward_mean(opt, layer(x).square().sum(1))
        opt.step()
        moved.append(layer.weight.detach() - start)
        if kind is PopRiskSOAP:
            state = opt.state[layer.weight]
            assert "left_basis" in state
            assert float(state["exp_avg_sq"].min()) > 1e-4 * float(state["exp_avg_sq"].mean())
    torch.testing.assert_close(*moved)


def less_of_a_row(grad: Tensor) -> Tensor:
    """A thousandth of what one row had, which is within what may be rounding."""
    return grad * torch.ones(90, 1, dtype=grad.dtype).index_fill(0, torch.tensor([3]), 0.999)


@pytest.mark.parametrize("how", ["as it is", "one entry", "hook"])
def test_the_gradient_is_turned_as_it_is(how: str) -> None:
    """Also where an entry changed between those by which a factor is looked for."""
    torch.manual_seed(0)
    layer = nn.Linear(120, 90, bias=False).double()
    opt = PopRiskSOAP(layer, gate=False, lr=0.1, betas=(0.0, 0.5), eps=1.0, weight_decay=0.0)
    x = torch.randn(8, 120, dtype=torch.float64)
    for step in range(3):
        if how == "hook" and step == 2:
            layer.weight.register_hook(less_of_a_row)
        opt.zero_grad()
        opt.backward(layer(x).square().sum(1) * torch.linspace(1, 2, 8))
        if step < 2:
            opt.step()
    before = layer.weight.detach().clone()
    grad, rotation = layer.weight.grad, opt._noted().rotation(layer.weight)
    assert grad is not None
    assert rotation is not None
    if how == "one entry":
        grad[0, 1] += 1e-3 * grad.norm()
    parts = opt._batch_parts()
    from_factors = parts.turned(layer.weight, parts.factor(layer.weight))
    assert (from_factors is not None) == (how == "as it is")
    turned = rotation.forward(grad)
    opt.step()
    v_hat = opt.state[layer.weight]["exp_avg_sq"] / (1 - 0.5**3)
    expected = rotation.back(turned / (v_hat.sqrt() + 1.0)) * -0.1
    torch.testing.assert_close(layer.weight.detach() - before, expected, rtol=1e-8, atol=1e-12)


def test_factors_follow_a_factor_on_the_gradient() -> None:
    """A loss scaled between two steps and unscaled again leaves the averages as they are."""
    model, (x, y) = net(), data()
    opt = rotated(model)
    scales, found = (1.0, 2.0**10), list[dict[str, Tensor]]()
    for scale in scales:
        own = copy.deepcopy((model, opt))
        for rows in batches(3):
            own[1].zero_grad()
            losses = F.cross_entropy(own[0](x[rows]), y[rows], reduction="none")
            own[1].backward(losses * scale)
            for p in own[0].parameters():
                assert p.grad is not None
                p.grad.mul_(1 / scale)
            own[1].step()
        found.append({k: v for s in own[1].state.values() for k, v in s.items() if k in FACTORS})
    assert_bitwise(found[0], found[1])


@pytest.mark.parametrize("steps", [3, 6, 11])
def test_a_saved_state_goes_on_bit_for_bit(steps: int) -> None:
    model, rows = net(torch.float32), batches(20)
    opt = rotated(model)
    train(model, opt, rows[:steps])
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    resumed = rotated(other)
    state = torch.load(buffer, weights_only=True)
    for own in state["state"].values():  # as formats leave them that keep no strides
        own.update({k: v.contiguous() for k, v in own.items() if isinstance(v, Tensor)})
    resumed.load_state_dict(state)
    train(model, opt, rows[steps:])
    train(other, resumed, rows[steps:])
    assert_bitwise(weights(model), weights(other))


def test_bases_keep_their_precision_under_bfloat16() -> None:
    model = net(torch.bfloat16)
    opt = rotated(model)
    train(model, opt, batches(8))
    state = copy.deepcopy(opt.state_dict())
    resumed = rotated(copy.deepcopy(model))
    resumed.load_state_dict(state)
    for own, loaded in zip(opt.state.values(), resumed.state.values(), strict=True):
        for key in (*FACTORS, *BASES, "exp_avg"):
            if key in own:
                assert own[key].dtype == loaded[key].dtype == torch.float32
                assert_bitwise([own[key]], [loaded[key]])


def test_the_state_of_the_coordinate_gate_is_carried_over() -> None:
    """The moments are turned into the first basis: the first step moves by the same average."""
    model = net()
    plain = PopRiskAdamW(model, **{k: v for k, v in SETTINGS.items() if k in ("lr", *SIZES)})
    train(model, plain, batches(10), plain=True)
    opt = rotated(model, variance="ema", factors="gradient")
    with pytest.warns(RuntimeWarning, match="goes on with the settings"):
        opt.load_state_dict(plain.state_dict())
    w = weight(model, 0)
    before = opt.state[w]["exp_avg"].clone()
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, batches(1), plain=True)
    rotation = kronecker.rotation_of(w, opt.state[w])
    assert rotation is not None
    assert w.grad is not None
    beta = opt.param_groups[0]["betas"][0]
    expected = beta * before + (1 - beta) * w.grad
    torch.testing.assert_close(rotation.back(opt.state[w]["exp_avg"]), expected)


@pytest.mark.filterwarnings("ignore:no factored form")  # of NaN no layout is seen
def test_a_bad_gradient_changes_nothing() -> None:
    model = net()
    opt = rotated(model)
    train(model, opt, batches(5))
    x, y = data()
    losses = F.cross_entropy(model(x[:B]), y[:B], reduction="none")
    opt.zero_grad()
    opt.backward(losses * torch.nan)
    before = complete_state(opt, but=["skipped_steps"])
    with pytest.warns(RuntimeWarning, match="PopRiskSOAP skipped a step"):
        opt.step()
    assert_bitwise(complete_state(opt, but=["skipped_steps"]), before)
    train(model, opt, batches(5))


@pytest.mark.filterwarnings("ignore:no factored form")  # of NaN no layout is seen
def test_a_bad_first_batch_leaves_the_first_basis_to_the_next() -> None:
    model = net()
    opt = rotated(model)
    x, y = data()
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none") * torch.inf)
    with pytest.warns(RuntimeWarning, match="skipped"):
        opt.step()
    other = net()
    reference = rotated(other)
    train(model, opt, batches(5))
    train(other, reference, batches(5))
    assert_bitwise(weights(model), weights(other))


def larger(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(1.3 * g for g in grads)


class Odd(nn.Module):
    """An embedding, convolutions (one in groups), a tied weight, and a matrix of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.mixed = nn.Parameter(torch.randn(6, 8))
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.embedding(x).mT).tanh()
        h = (self.mixed @ self.grouped(h)).mT
        return (self.norm(h) @ self.embedding.weight.T).mean((1, 2)) + self.last(h).mean((1, 2))


@pytest.mark.parametrize("factors", ["examples", "gradient"])
def test_layers_of_all_kinds_are_rotated_where_they_can_be(factors: str) -> None:
    torch.manual_seed(0)
    model = Odd().double()
    variance = "exact" if factors == "examples" else "ema"
    opt = PopRiskSOAP(model, lr=1e-3, factors=factors, variance=variance, refresh_every=4, **SIZES)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randint(0, 11, (B, 9), generator=g)
        opt.zero_grad()
        losses = (model(x) - x.double().mean(1)).square()
        opt.backward(losses) if factors == "examples" else losses.mean().backward()
        opt.step()
    found = {name: {k for k in BASES if k in opt.state[p]} for name, p in model.named_parameters()}
    both = {"left_basis", "right_basis"}
    assert found["conv.weight"] == found["grouped.weight"] == found["mixed"] == both
    assert found["norm.weight"] == found["last.weight"] == found["last.bias"] == set()
    assert "right_basis" in found["embedding.weight"]
    for p in model.parameters():
        rotation = kronecker.rotation_of(p, opt.state[p])
        for basis in rotation or ():
            if basis is not None:
                eye = torch.eye(len(basis), dtype=basis.dtype)
                torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)


def test_large_sides_keep_their_coordinates() -> None:
    model = net()
    opt = rotated(model, max_dim=5)
    train(model, opt, batches(3))
    keys = [{k for k in BASES if k in opt.state[weight(model, i)]} for i in (0, 2)]
    assert keys == [{"right_basis"}, {"left_basis"}]


def test_a_raised_limit_rotates_the_other_side_too() -> None:
    """As if the first eigenvectors of that side were a change from no rotation."""
    model = net()
    opt = rotated(model, max_dim=4, refresh_every=3)
    train(model, opt, batches(4))
    w = next(p for p in model.parameters() if len(opt.state[p].keys() & set(BASES)) == 1)
    opt.param_groups[0]["max_dim"] = max(w.shape)
    train(model, opt, batches(2)[1:])
    assert len(opt.state[w].keys() & set(BASES)) == 1
    last = opt.state[w]["exp_avg"].clone()
    before = kronecker.rotation_of(w, opt.state[w])
    opt.param_groups[0]["lr"] = 0.0
    train(model, opt, batches(1))
    after = kronecker.rotation_of(w, opt.state[w])
    assert before is not None
    assert after is not None
    assert w.grad is not None
    for size, basis in zip(w.shape, after, strict=True):
        assert basis is not None
        torch.testing.assert_close(basis.mT @ basis, torch.eye(size, dtype=basis.dtype))
    beta = opt.param_groups[0]["betas"][0]
    expected = beta * before.back(last) + (1 - beta) * w.grad
    torch.testing.assert_close(after.back(opt.state[w]["exp_avg"]), expected)
    train(model, opt, batches(8))


@pytest.mark.parametrize("limit", [0, 3])
def test_a_lowered_limit_is_refused_before_anything_moves(limit: int) -> None:
    model, (x, y) = net(), data()
    opt = rotated(model)
    train(model, opt, batches(3))
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    kept = opt.param_groups[0]["max_dim"]
    opt.param_groups[0]["max_dim"] = limit
    before = complete_state(opt)
    with pytest.raises(ValueError, match=f"max_dim={limit} keeps a side"):
        opt.step()
    assert_bitwise(before, complete_state(opt))
    opt.param_groups[0]["max_dim"] = kept
    opt.step()


def test_a_state_under_another_limit_says_so() -> None:
    model = net()
    opt = rotated(model, max_dim=4)
    train(model, opt, batches(3))
    other = rotated(net())
    with pytest.warns(RuntimeWarning, match=r"max_dim=4 \(was 2048\)"):
        other.load_state_dict(opt.state_dict())


def test_a_group_may_be_ungated_or_left_in_its_coordinates() -> None:
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters()), "max_dim": 0},
        {"params": list(model[2].parameters()), "gate": False},
    ]
    opt = rotated(groups)
    train(model, opt, batches(4))
    assert "left_basis" not in opt.state[weight(model, 0)]
    assert "left_basis" in opt.state[weight(model, 2)]
    assert "grad_mean_var" not in opt.state[weight(model, 2)]


def test_without_the_losses_of_the_examples_nothing_moves() -> None:
    every: list[dict[str, Any]] = [{}, {"variance": "ema"}, {"gate": False}]
    for changes in every:
        model = net()
        opt = rotated(model, **changes)
        train(model, opt, batches(2))
        opt.zero_grad()
        model(data()[0]).sum().backward()
        with nothing_changes(opt), pytest.raises(RuntimeError, match=r"optimizer\.backward"):
            opt.step()


@pytest.mark.parametrize("changes", [{}, {"variance": "ema"}, {"gate": False}])
def test_gradients_that_were_changed_are_refused_before_anything_moves(
    changes: dict[str, Any],
) -> None:
    """Factors take a common factor alone, also where no variance is noted."""
    model, (x, y) = net(), data()
    opt = rotated(model, **changes)
    train(model, opt, batches(2))
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x), y, reduction="none")[:B])
    nn.utils.clip_grad_value_([weight(model, 2)], 1e-3)
    with nothing_changes(opt), pytest.raises(RuntimeError, match="common factor per tensor"):
        opt.step()


@pytest.mark.parametrize("changes", [{"gate": False}, {"variance": "ema"}, {}])
def test_a_gradient_from_elsewhere_is_refused_before_anything_moves(
    changes: dict[str, Any],
) -> None:
    """It would be trained without a basis, and no one the wiser."""
    model, other = net(), linear()
    opt = rotated([*model.parameters(), *other.parameters()], **changes)
    train(model, opt, batches(2))
    x, y = data()
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    other.weight.square().sum().backward()
    with nothing_changes(opt), pytest.raises(RuntimeError, match=r"from elsewhere|needs inputs"):
        opt.step()


class Pooled(nn.Module):
    """A convolution over positions, whose mean a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.head = nn.Conv1d(3, 6, 3).double(), nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.conv(x).tanh().mean(-1))
        return found


@pytest.mark.parametrize("lengths", [[4], [20], [4, 20], [20, 4]])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_size_of_a_loss_does_not_matter_whatever_the_lengths(
    lengths: list[int], parts: int
) -> None:
    """Few positions and many lead to factors of two kinds, whose averages are not mixed."""
    models = [Pooled(), Pooled()]
    opts = [rotated(m, refresh_every=3, eps=1e-30, weight_decay=0.0) for m in models]
    g = torch.Generator().manual_seed(5)
    for k in range(8):
        x = [
            torch.randn(B // parts, 3, lengths[(k + j) % len(lengths)], generator=g).double()
            for j in range(parts)
        ]
        for model, opt, factor in zip(models, opts, (1.0, 1000.0), strict=True):
            opt.zero_grad()
            for some in x:
                losses = (model(some) - some.mean((1, 2))[:, None]).square().sum(1)
                opt.backward(factor * losses, weight=1 / parts)
            opt.step()
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("room", [1, 100_000])
def test_factors_of_examples_are_what_is_said(
    many: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of positions; or of the gradients of examples, formed for as many as there is room."""
    monkeypatch.setattr(kronecker, "CACHED", room)
    torch.manual_seed(0)
    layer, (t, n) = nn.Linear(4, 3, bias=False).double(), (9 if many else 1, 5)
    opt = rotated(layer, factor_decay=0.0)
    for x in (torch.randn(n, t, 4).double(), torch.randn(n, 1, 4).double()):
        losses = layer(x).square().sum((1, 2))
        outputs = layer(x)
        (back,) = torch.autograd.grad(outputs.square().sum() / n, outputs)
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
        if many:
            grads = torch.einsum("bto,bti->boi", back, x)
            rows, columns = (torch.einsum(e, grads, grads) for e in ("boi,bpi->op", "boi,boj->ij"))
            expected = n * rows, n * columns
        else:
            rows, columns = (torch.einsum("btx,bty->xy", z, z) for z in (back, x))
            expected = n * rows, columns / n
        for key, factor in zip(FACTORS, expected, strict=True):
            torch.testing.assert_close(opt.state[layer.weight][key], factor)


def test_a_group_may_be_a_generator() -> None:
    model = net()
    opt = PopRiskSOAP([{"params": model[0].parameters()}])
    opt.add_param_group({"params": model[2].parameters()})
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]


class Looked(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(6, 4).double(), nn.Linear(4, 3).double()

    def forward(self, i: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(i)).tanh()
        return found


def test_a_factor_on_the_loss_does_not_change_an_embedding() -> None:
    """Its gradients stand on the other side of the matrix: of the columns."""
    models = [Looked(), Looked()]
    opts = [rotated(m, refresh_every=3) for m in models]
    g = torch.Generator().manual_seed(5)
    for k in range(6):
        i = torch.randint(0, 6, (B,), generator=g)
        for model, opt, factor in zip(models, opts, (1.0, 4.0**k), strict=True):
            opt.zero_grad()
            opt.backward(factor * F.cross_entropy(model(i), i % 3, reduction="none"))
            for p in model.parameters():
                assert p.grad is not None
                p.grad.div_(factor)
            opt.step()
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_noted_in_a_basis_is_of_the_examples(parts: int) -> None:
    """Also of a head that is tied to an embedding, whose rows the basis mixes."""
    torch.manual_seed(0)
    model = Odd().double()
    opt = PopRiskSOAP(model, lr=1e-2, refresh_every=4, **SIZES)
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        x = torch.randint(0, 11, (B, 9), generator=g)
        opt.zero_grad()
        for some in x.chunk(parts):
            opt.backward((model(some) - some.double().mean(1)).square(), weight=1 / parts)
        losses = (model(x) - x.double().mean(1)).square() / B
        each = [torch.autograd.grad(a, list(model.parameters()), retain_graph=True) for a in losses]
        for p, *grads in zip(model.parameters(), *each, strict=True):
            rotation = kronecker.rotation_of(p, opt.state.get(p, {}))
            if rotation is not None:
                turned = torch.stack([rotation.forward(grad) for grad in grads])
                seen = opt._batch_parts()
                found, noted = opt._noted().turned(p), seen._noted[p]
                for a, b in ((found, turned.sum(0)), (noted.squares, turned.square().sum(0))):
                    assert a is not None
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
        opt.step()
    left = opt.state[model.embedding.weight]["left_basis"]
    assert len(left) == 11


@pytest.mark.parametrize("how", ["loaded", "removed"])
def test_a_basis_that_changed_since_the_gradients_were_noted_is_refused(how: str) -> None:
    model, (x, y) = net(), data()
    opt = rotated(model)
    train(model, opt, batches(1))
    state = copy.deepcopy(opt.state_dict())
    train(model, opt, batches(4))
    opt.zero_grad()
    losses = F.cross_entropy(model(x[:8]), y[:8], reduction="none")
    opt.backward(losses, weight=0.5)
    if how == "loaded":
        opt.load_state_dict(state)
    else:
        del opt.state[weight(model, 0)]
    losses = F.cross_entropy(model(x[:8]), y[:8], reduction="none")
    with nothing_changes(opt), pytest.raises(RuntimeError, match="are others than when"):
        opt.backward(losses, weight=0.5)
    with nothing_changes(opt), pytest.raises(RuntimeError, match="are others than when"):
        opt.step()
    train(model, opt, batches(1))


def test_factors_of_a_batch_that_was_refused_do_not_count() -> None:
    models, found = [net(), net()], list[Any]()
    for refused, model in enumerate(models):
        opt, (x, y), w = rotated(model), data(), weight(model, 0)
        train(model, opt, batches(3))
        model.zero_grad()
        if refused:
            w.grad = torch.ones_like(w)
            losses = F.cross_entropy(model(x[-B:]), y[-B:], reduction="none")
            with pytest.raises(RuntimeError, match="gradients are left"):
                opt.backward(losses)
            w.grad = None
        opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
        opt.step()
        found.append(complete_state(opt))
    assert_bitwise(found[0], found[1])


def test_bases_follow_a_model_to_another_precision() -> None:
    model = net(torch.float32)
    opt = rotated(model)
    train(model, opt, batches(3))
    model.double()
    train(model, opt, batches(10))
    for p in (weight(model, 0), weight(model, 2)):
        state = opt.state[p]
        assert {state[key].dtype for key in (*FACTORS, *BASES)} == {torch.float64}
        for key in BASES:
            eye = torch.eye(len(state[key]), dtype=torch.float64)
            torch.testing.assert_close(state[key].mT @ state[key], eye, rtol=0, atol=1e-12)


def test_squares_are_formed_where_a_gate_takes_them() -> None:
    model, (x, y) = wide_net(), data()
    groups = [
        {"params": [*model[0].parameters()], "gate": False},
        {"params": [*model[2].parameters()], "variance": "ema"},
        {"params": [*model[4].parameters()]},
    ]
    opt = rotated(groups)
    train(model, opt, batches(3))
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    noted = opt._batch_parts()._noted
    known = [noted[p].squares is not None for p in model.parameters()]
    assert known == [False] * 4 + [True] * 2
    turned = [noted[weight(model, i)].turned for i in (0, 2, 4)]
    assert [t and t.for_step for t in turned] == [None, True, False]
    before = weights(model)
    opt.param_groups[0]["gate"] = True
    with pytest.raises(RuntimeError, match="was given a gate, or another variance, since"):
        opt.step()
    assert_bitwise(before, weights(model))


@pytest.mark.parametrize(
    ("given", "matrix", "bias"),
    [
        ({}, 1.0, 0.01),
        ({"weight_decay": 0.0}, 0.0, 0.0),
        ({"coordinate_weight_decay": 0.2}, 1.0, 0.2),
    ],
)
def test_what_keeps_its_coordinates_is_decayed_by_less(
    given: dict[str, float], matrix: float, bias: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    changes: dict[str, Any] = {"weight_decay": 1.0, **given}
    opt = PopRiskSOAP(model, lr=0.1, **changes)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model(torch.randn(4, 3).double()).square().sum(1) * 0)
        start = weights(model)
        opt.step()
        for p, before, decay in zip(model.parameters(), start, (matrix, bias), strict=True):
            torch.testing.assert_close(p.detach(), before * (1 - 0.1 * decay), rtol=1e-12, atol=0)
    (group,), (b, at) = opt.param_groups, (model.bias, torch.zeros_like(model.bias))
    context = StepContext(group, opt.state[b], False, b - start[1], at, start[1], at)
    assert opt.step_rule(b, context).decay == pytest.approx(0.1 * bias)


def test_sizes_of_updates_are_told_without_what_decays() -> None:
    """As of the controls that take steps of the same size."""
    model, trace = nn.Linear(6, 5), UpdateTrace()
    nn.init.ones_(model.bias)
    opt = PopRiskSOAP(model, lr=1e-2)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model(torch.randn(4, 6)).square().sum(1) * 0)
        trace.record_step(opt)
    assert max(max(row) for row in trace.rms) < 1e-8


def test_a_gate_may_be_switched_on_after_a_step_that_was_left_out() -> None:
    model, (x, y) = net(), data()
    opt = rotated(model, gate=False)
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    model.zero_grad()
    opt.param_groups[0]["gate"] = True
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    opt.step()


@pytest.mark.parametrize("gate", [True, False])
def test_a_gradient_changed_on_its_way_is_noticed_where_positions_cancel(gate: bool) -> None:
    """What is added up is large then, and its rounding is no measure of the examples' gradients."""
    torch.manual_seed(0)
    layer, signs = nn.Linear(64, 64, bias=False), torch.tensor([[1.0], [-1.0]] * 10)
    opt = PopRiskSOAP(layer, lr=1e-4, gate=gate, **SIZES)
    view: Any = layer.weight.expand_as(layer.weight).grad_fn
    accumulated = view.next_functions[0][0]
    for step in range(3):
        opt.zero_grad()
        x = 100 + torch.randn(B, 20, 64)
        losses = (layer(x) * signs).sum(1).square().sum(1)
        if step < 2:
            opt.backward(losses)
            opt.step()
    accumulated.register_prehook(larger)
    with nothing_changes(opt), pytest.raises(RuntimeError, match="is not the sum of its examples"):
        opt.backward(losses)


def test_a_hook_that_changes_a_gradient_is_refused() -> None:
    model = net()
    opt = rotated(model)
    weight(model, 0).register_hook(torch.relu)
    x, y = data()
    losses = F.cross_entropy(model(x[:B]), y[:B], reduction="none")
    with nothing_changes(opt), pytest.raises(RuntimeError, match="in another basis"):
        opt.backward(losses)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slack": -1.0}, "slack"),
        ({"factors": "kfac"}, "factors must be"),
        ({"variance": "microbatch"}, "variance must be"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"refresh_every": 1.5}, "refresh_every must be an integer"),
        ({"max_dim": -1}, "max_dim"),
        ({"factor_decay": 1.0}, "factor_decay"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        rotated(net(), **changes)
    with pytest.raises((TypeError, ValueError), match=said):
        rotated([{"params": list(net().parameters()), **changes}])


@pytest.mark.parametrize("changes", [{"fused": True}, {"capturable": True}, {"mode": "paper"}])
def test_what_it_does_not_have_is_refused_in_a_group(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="PopRiskSOAP has"):
        PopRiskSOAP([{"params": list(net().parameters()), **changes}])


@pytest.mark.parametrize(
    ("mark", "said"),
    [("_fsdp_flattened", "part of a flat parameter"), ("ds_id", "partitioned by DeepSpeed")],
)
def test_parameters_without_rows_and_columns_are_refused(mark: str, said: str) -> None:
    model = net()
    setattr(weight(model, 0), mark, True)
    with pytest.raises(ValueError, match=f"needs rows and columns, but a parameter is {said}"):
        rotated(model, factors="gradient", variance="ema")


def test_a_matrix_without_rows_is_left_alone() -> None:
    model, empty = net(), nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    opt = rotated([*model.parameters(), empty], factors="gradient", variance="ema")
    empty.grad = torch.zeros_like(empty)
    train(model, opt, batches(3), plain=True)
    assert not opt.state[empty]


def test_settings_of_a_state_are_refused_before_anything_changes() -> None:
    """Also those that a saved group has and only this class checks."""
    model = net()
    opt = rotated(model)
    train(model, opt, batches(2))
    state = opt.state_dict()
    state["param_groups"][0]["refresh_every"] = 0
    with nothing_changes(opt), pytest.raises(ValueError, match="refresh_every"):
        opt.load_state_dict(state)


def test_a_state_of_other_shapes_is_refused() -> None:
    model = net()
    opt = rotated(model)
    train(model, opt, batches(3))
    state = opt.state_dict()
    state["state"][0]["left_basis"] = torch.eye(3)
    with nothing_changes(opt), pytest.raises(ValueError, match="left_basis"):
        opt.load_state_dict(state)


def test_coordinates_refuse_averages_of_bases() -> None:
    model = net()
    opt = rotated(model)
    train(model, opt, batches(3))
    state = opt.state_dict()
    plain = PopRiskAdamW(model)
    with nothing_changes(plain), pytest.raises(ValueError, match="comes from PopRiskSOAP"):
        plain.load_state_dict(state)
    wrapped = poprisk.gated(torch.optim.AdamW(model.parameters()))
    with nothing_changes(wrapped), pytest.raises(ValueError, match="comes from PopRiskSOAP"):
        wrapped.load_state_dict(state)


def test_a_copy_goes_on_as_the_original() -> None:
    model = net()
    opt = rotated(model)
    train(model, opt, batches(5))
    other, twin = copy.deepcopy((model, opt))
    train(model, opt, batches(6))
    train(other, twin, batches(6))
    assert_bitwise(weights(model), weights(other))


@pytest.mark.parametrize(
    ("steps", "changes", "others"),
    [(1, {"refresh_every": 1}, {"max_dim": 0}), (5, {"refresh_every": 5}, {"refresh_every": 100})],
)
def test_statistics_are_of_the_gate_of_the_step(
    steps: int, changes: dict[str, Any], others: dict[str, Any]
) -> None:
    """Not of the averages in the basis that is found after it."""
    found = list[Any]()
    for more in (changes, others):
        model = net()
        opt = rotated(model, **more)
        train(model, opt, batches(steps))
        found.append((weights(model), opt.gate_stats()))
    assert_bitwise(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    train(model, opt, batches(1))
    assert opt.gate_stats() != found[1][1]


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_statistics_of_the_last_gate_survive(steps: int, how: str) -> None:
    model = net()
    opt = rotated(model)
    train(model, opt, batches(steps))
    again = copy.deepcopy(opt)
    if how == "loaded":
        again = rotated(copy.deepcopy(model))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.gate_stats(model) == opt.gate_stats(model)


def test_statistics_of_a_function_that_is_not_called_again_are_nan() -> None:
    """It may draw at random, and the basis in which it was asked is gone."""
    model, calls = net(), list[int]()

    def counted(*args: Any, **kwargs: Any) -> list[Tensor]:
        calls.append(1)
        return MASKS_["soft"](*args, **kwargs)

    opt = rotated(model, mask=counted)
    train(model, opt, batches(4))
    before = len(calls)
    found = opt.gate_stats()["0"]
    assert len(calls) == before + 2  # of biases, which have no basis
    assert math.isnan(found.mean_gate)
    assert math.isnan(found.update_ratio)
    assert found.pass_rate > 0


@pytest.mark.parametrize("limit", [0, 3])
def test_a_limit_lowered_before_the_first_step_counts(limit: int) -> None:
    model, (x, y) = net(), data()
    opt = rotated(model)
    opt.backward(F.cross_entropy(model(x[:B]), y[:B], reduction="none"))
    opt.param_groups[0]["max_dim"] = limit
    opt.step()
    for p in model.parameters():
        for key, size in zip(BASES, p.shape, strict=False):
            assert (key in opt.state[p]) == (p.dim() > 1 and size <= limit)
    train(model, opt, batches(3))


def test_a_rotated_step_is_no_diagonal_map() -> None:
    model, (x, y) = net(), data()
    opt = rotated(model, variance="ema", factors="gradient")
    loss = "cross_entropy"
    with pytest.raises(poprisk.NotAnalysable, match="diagonal in its own basis"):
        poprisk.record(model, loss, opt, batches(3), train=(x, y))
    model = net()
    opt = rotated(model, variance="ema", factors="gradient")
    rule = realized_update(momentum=SETTINGS["betas"][0])
    run = poprisk.record(model, loss, opt, batches(3), x[:4], train=(x, y), rule=rule)
    assert max(poprisk.path_operators(run).closure) < 1e-6
    model, x = net(), x * (torch.arange(5) > 0)
    opt = rotated(model, variance="ema", factors="gradient")
    with pytest.raises(poprisk.NotAnalysable, match="whose gradient was always zero"):
        poprisk.record(model, loss, opt, batches(9), x[:4], train=(x, y), rule=rule)


def test_what_is_missing_is_said_of_a_loop_with_one_loss() -> None:
    model, (x, y) = net(), data()
    every: list[dict[str, Any]] = [{}, {"gate": False}, {"factors": "gradient"}]
    for settings in every:
        opt = rotated(model, **settings)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with nothing_changes(opt), pytest.raises(RuntimeError, match='variance="ema"'):
            opt.step()
