"""Influence through a run equals what trainings with other weights of the losses do."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poprisk import NotAnalysable, PopRiskAdamW, gated, record
from poprisk.attribution import Attribution, Replay, attribute, replay
from poprisk.attribution.adam import adam_step
from poprisk.attribution.adjoint import Adjoint
from poprisk.attribution.steps import TakenStep, copied
from poprisk.path.recursion import Recursion
from samplers import randn

N, M, STEPS = 24, 6, 17
Make = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "dampened": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.05, momentum=0.9, dampening=0.3, maximize=True
    ),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01, eps=1e-3),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
}


def network(outputs: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def batches(steps: int = STEPS) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randperm(N, generator=g)[:7] for _ in range(steps)]


def data(outputs: int = 1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, q = randn(N, 4), randn(M, 4, seed=5)
    if outputs > 1:
        return (x, torch.arange(N) % outputs), (q, torch.arange(M) % outputs)
    return (x, randn(N, 1, seed=1)), (q, randn(M, 1, seed=6))


def trained(make: Make, outputs: int = 1, model: nn.Module | None = None, **more: Any) -> Replay:
    train, query = data(outputs)
    net = network(outputs) if model is None else model
    loss = "cross_entropy" if outputs > 1 else "squared_error"
    return replay(net, loss, make(net), batches(), query, train=train, **more)


def risk(run: Replay, w: Tensor) -> float:
    """The mean loss of the query at flat weights, by the plain model."""
    x, y = run.problem.query
    assert y is not None
    u = run.problem.shaped(run.problem.J.values(w, x))
    return float(run.problem.loss(u, y).mean())


def pushed(run: Replay, i: int, e: float) -> float:
    weights = torch.ones(N, dtype=torch.float64)
    weights[i] += e
    with torch.enable_grad():
        return risk(run, run.trained(weights))


def differences(run: Replay, examples: range, e: float = 1e-5) -> Tensor:
    found = [(pushed(run, i, e) - pushed(run, i, -e)) / (2 * e) for i in examples]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_influence_is_the_derivative_by_the_weight_of_a_loss(name: str, outputs: int) -> None:
    run = trained(OPTIMIZERS[name], outputs)
    found = attribute(run, check=0)
    expected = differences(run, range(6))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.influence[:6], expected, rtol=0, atol=2e-5 * scale)
    assert float(found.value) == pytest.approx(risk(run, run.final))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_inputs_that_are_always_zero_have_no_say(name: str) -> None:
    """Their second moments stay 0, where a root has no derivative."""
    (x, y), (q, p) = data()
    first, *rest = network().children()
    wide, narrow = nn.Linear(6, 8).double(), nn.Linear(4, 8).double()
    narrow.load_state_dict(first.state_dict())
    with torch.no_grad():
        wide.weight[:, :4].copy_(narrow.weight)
        wide.bias.copy_(narrow.bias)
    nets = [nn.Sequential(narrow, *rest), nn.Sequential(wide, *copy.deepcopy(rest))]
    blank, small = torch.zeros(N, 2).double(), torch.zeros(M, 2).double()
    inputs = [(x, q), (torch.cat([x, blank], 1), torch.cat([q, small], 1))]
    found = [
        attribute(
            replay(net, "squared_error", OPTIMIZERS[name](net), batches(), (b, p), train=(a, y)),
            check=0,
        ).influence
        for net, (a, b) in zip(nets, inputs, strict=True)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("snapshots", [1, 4, STEPS])
def test_any_number_of_snapshots_gives_the_same(snapshots: int) -> None:
    make = OPTIMIZERS["AdamW"]
    whole = attribute(trained(make), check=0).influence
    run = trained(make, snapshots=snapshots)
    assert len(run.saved) == snapshots + 1 + (snapshots == 4 and 0)
    assert torch.equal(attribute(run, check=0).influence, whole)


def test_a_schedule_and_an_optimizer_that_was_used_before_are_followed() -> None:
    net, (train, query) = network(), data()
    adam = torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-3)
    for index in batches(4):
        adam.zero_grad()
        F.mse_loss(net(train[0][index]), train[1][index]).backward()
        adam.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.05, total_steps=STEPS + 1)
    run = replay(net, "squared_error", adam, batches(), query, train=train, scheduler=schedule)
    assert len({s[0]["lr"] for s in run.settings}) == STEPS
    found, expected = attribute(run, check=0), differences(run, range(4))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.influence[:4], expected, rtol=0, atol=2e-5 * scale)


def test_a_linear_model_under_full_batches_is_least_squares_without_an_example() -> None:
    """To round-off: the derivative of the ridgeless solution, where training has converged."""
    x, y, q = randn(N, 3), randn(N, 1, seed=1), randn(1, 3, seed=2)
    net = nn.Linear(3, 1, bias=False).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.3)
    run = replay(net, "squared_error", sgd, [torch.arange(N)] * 900, q, train=(x, y))
    found = attribute(run, measure=lambda u, _: u.sum(), check=0)
    inverse = torch.linalg.inv(x.T @ x)
    residual = (y - x @ inverse @ x.T @ y).squeeze(1)
    expected = residual * (x @ inverse @ q.T).squeeze(1)
    torch.testing.assert_close(found.influence, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["hessian", "gauss-newton"])
def test_a_recorded_run_gives_what_a_replay_gives_held(form: str) -> None:
    train, query = data()
    for name in ("momentum", "AdamW", "RMSprop"):
        net = network()
        run = record(net, "squared_error", OPTIMIZERS[name](net), batches(), query, train=train)
        held = attribute(trained(OPTIMIZERS[name]), response="held", form=form)
        found = attribute(run, form=form)
        torch.testing.assert_close(found.influence, held.influence, rtol=1e-6, atol=1e-12)
        assert not found.valid
    assert "cannot be trained again" in attribute(run_of_sgd()).reason


def run_of_sgd() -> Any:
    train, query = data()
    net = network()
    return record(net, "squared_error", OPTIMIZERS["SGD"](net), batches(), query, train=train)


def weighed(
    outputs: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, share: Tensor, w: Tensor
) -> Tensor:
    return (share * 0.5 * (outputs(w, x) - y).square().sum(1)).sum()


def test_the_adjoint_is_the_transpose_of_the_recursion() -> None:
    r""":math:`\lambda^\top\delta` is the same forwards and backwards, to round-off."""
    train, query = data()
    for name in ("momentum", "dampened", "AdamW"):
        net = network()
        run = record(net, "squared_error", OPTIMIZERS[name](net), batches(), query, train=train)
        found, i = attribute(run, check=0).influence, 5
        d = torch.zeros(run.problem.size, 1, dtype=torch.float64)
        recursion = Recursion(torch.zeros_like(d), d)
        for k, interval in enumerate(run.intervals):
            x, y = (t[interval.examples] for t in train)
            share = interval.sampling / N

            outputs = run.problem.J.outputs
            mine = (interval.examples == i).double() * share
            w = run.weights[k]
            total = partial(weighed, outputs, x, y, share)
            change = torch.autograd.functional.hvp(total, w, d.squeeze(1))[1]
            source = torch.autograd.functional.jacobian(partial(weighed, outputs, x, y, mine), w)
            recursion.step(run.rule(k, w.dtype), (change + source).unsqueeze(1))
        x, y = query
        at = run.weights[len(run)].clone().requires_grad_()
        loss = (0.5 * (run.problem.J.outputs(at, x) - y).square().sum(1)).mean()
        (slope,) = torch.autograd.grad(loss, at)
        assert float(slope @ d.squeeze(1)) == pytest.approx(float(found[i]), rel=1e-10)


def test_several_queries_are_those_asked_one_by_one() -> None:
    run = trained(OPTIMIZERS["AdamW"])
    each = attribute(run, measure=lambda u, y: u.squeeze(1), check=0)
    assert each.influence.shape == (M, N)
    for j in range(M):
        one = attribute(run, measure=lambda u, y, j=j: u[j, 0], check=0)
        torch.testing.assert_close(each.influence[j], one.influence)
    mean = attribute(run, measure=lambda u, y: u.mean(), check=0)
    torch.testing.assert_close(each.influence.mean(0), mean.influence)


def test_a_linear_model_is_gauss_newton_exactly_and_a_network_is_not() -> None:
    for model, same in ((nn.Linear(4, 1).double(), True), (network(), False)):
        run = trained(OPTIMIZERS["momentum"], model=model)
        full, part = (
            attribute(run, form=f, check=0).influence for f in ("hessian", "gauss-newton")
        )
        assert torch.allclose(full, part, rtol=1e-9, atol=1e-12) == same


def test_examples_without_a_label_and_those_never_seen_have_no_influence() -> None:
    (x, y), query = data(3)
    y = y.clone()
    y[4] = -100
    net = network(3)
    some = [b[b != 9] for b in batches()]
    run = replay(net, "cross_entropy", OPTIMIZERS["AdamW"](net), some, query, train=(x, y))
    found = attribute(run, check=0).influence
    assert found[4] == found[9] == 0
    assert int((found != 0).sum()) == N - 2


def test_an_example_twice_in_a_batch_counts_twice() -> None:
    train, query = data()
    runs = []
    for drawn in ([torch.tensor([0, 0, 1, 2])] * 5, [torch.tensor([0, 1, 2])] * 5):
        net = network()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        runs.append(replay(net, "squared_error", sgd, drawn, query, train=train))
    twice, once = (attribute(run, check=0).influence for run in runs)
    torch.testing.assert_close(twice[0], differences(runs[0], range(1))[0], rtol=1e-6, atol=0)
    assert not torch.isclose(twice[0], once[0], rtol=1e-3)


# --- what it costs --------------------------------------------------------------------------------

ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decayed": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximized": {"maximize": True, "weight_decay": 0.1},
    "largest": {"amsgrad": True, "betas": (0.8, 0.7)},
}


@pytest.fixture
def counted_in_float64() -> Iterator[None]:
    """Autograd goes through bias corrections in the precision of the counter of steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("counted_in_float64")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", ADAMS)
def test_a_step_of_adam_in_closed_form_is_the_one_by_autograd(
    kind: type[Optimizer], name: str
) -> None:
    """Two groups, the parameters of one between those of the other; one gets no gradient."""
    if kind is torch.optim.AdamW and name == "decoupled":
        pytest.skip("it is that by itself")
    shapes = [(3, 2), (3,), (2, 3), (2,), (4,)]
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    own = [{"params": params[1:2], "lr": 0.02, "eps": 1e-2}, {"params": [params[0], *params[2:]]}]
    optimizer: Any = kind(own, lr=0.05, eps=1e-3, **ADAMS[name])  # pyrefly: ignore
    groups = [
        ({k: v for k, v in group.items() if k != "params"}, places)
        for group, places in zip(optimizer.param_groups, ([1], [0, 2, 3, 4]), strict=True)
    ]
    for k in range(4):
        before = [p.detach().clone() for p in params]
        start = [{n: copied(v) for n, v in optimizer.state[p].items()} for p in params]
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=10 * k + i) / (1 + k)
        params[3].grad = params[3].grad if k < 2 else None
        grads = [p.grad for p in params]
        optimizer.step()
        kept = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if name == "largest" else 2]
        size = sum(p.numel() for p in params)
        after = Adjoint(randn(2, size), {n: randn(2, size, seed=j) for j, n in enumerate(kept)})
        by_autograd = TakenStep(kind, groups, before, start, grads).pull(after)
        state = [optimizer.state[p] for p in params]
        found = adam_step(kind, groups, before, grads, state).pull(after)
        close: Any = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)
        close(found.gradient, by_autograd.gradient)
        close(found.before.weights, by_autograd.before.weights)
        for n in kept if k else ():  # before the first step there is no state
            close(found.before.of_state(n), by_autograd.before.of_state(n))


def graphs(run: Replay, max_memory: float = math.inf) -> list[bool]:
    """Of which steps, the last one first, the graph of the gradient was kept."""
    response = "held" if run.linear else "followed"
    return [step.graph is not None for step in run.backwards(response, max_memory)]


@pytest.mark.parametrize("name", ["momentum", "AdamW", "RMSprop"])
def test_a_gradient_is_kept_for_the_way_back_as_memory_allows(name: str) -> None:
    run = trained(OPTIMIZERS[name], snapshots=3)
    whole = attribute(run, check=0).influence
    assert graphs(run) == [True] * STEPS
    assert graphs(run, 0) == [False] * STEPS
    torch.testing.assert_close(attribute(run, check=0, max_memory=0).influence, whole)
    activations = 7 * 8 * 8  # bytes, of one batch
    sizes = [activations, 10**3, 4 * 10**3, 10**4, 10**6]
    counts = [sum(graphs(run, size)) for size in sizes]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 0 < counts[2] < STEPS == counts[-1]
    torch.testing.assert_close(attribute(run, check=0, max_memory=sizes[2]).influence, whole)


class Rounding(torch.autograd.Function):
    """The identity, whose gradient is rounded otherwise where it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore
        return grad * (1 + 1e-15) if torch.is_grad_enabled() else grad.clone()


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        found: Any = Rounding.apply(self.net(x))
        return found


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_kernels_that_round_otherwise_with_a_graph_are_gone_through_without(name: str) -> None:
    run = trained(OPTIMIZERS[name], model=Rounded())
    assert graphs(run) == [False] * STEPS
    plain = attribute(trained(OPTIMIZERS[name]), check=0).influence
    torch.testing.assert_close(attribute(run, check=0).influence, plain, rtol=1e-9, atol=1e-13)


def test_attention_is_trained_by_a_kernel_that_can_be_differentiated_twice() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        net = nn.Sequential(nn.Unflatten(1, (2, 4)), block, nn.Flatten(), nn.Linear(8, 1))
    train, query = (randn(N, 8).float(), randn(N, 1).float()), randn(M, 8).float()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = replay(net, "squared_error", sgd, batches(), query, train=train)
    assert graphs(run) == [True] * STEPS


def test_no_more_gradients_are_taken_than_steps() -> None:
    """Forward passes of a batch: one in training, and one on the way back."""
    calls = list[int]()

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.net(x)

    run = trained(OPTIMIZERS["AdamW"], model=Counted())
    for memory, passes in ((2.0**30, STEPS), (0.0, 2 * STEPS)):
        calls.clear()
        attribute(run, check=0, max_memory=memory)
        assert calls.count(7) == passes


# --- what is made of it ---------------------------------------------------------------------------


def test_leaving_out_groups_and_the_most_harmful() -> None:
    influence = torch.tensor([0.5, -1.0, 2.0, 0.0])
    found = Attribution(influence, 3.0, math.nan, True, "", 1.0, 3.0)
    assert found.without(torch.tensor([0, 2])) == 0.5
    assert found.without(torch.tensor([True, False, True, False])) == 0.5
    assert found.of_groups(torch.tensor([1, 0, 1, 0])).tolist() == [-1.0, 2.5]
    assert found.raising(2).tolist() == [2, 0]
    assert found.lowering(1).tolist() == [1]
    assert found.raising(9).tolist() == [2, 0, 3, 1]
    several = found._replace(influence=torch.stack([influence, -influence]), value=torch.ones(2))
    assert several.without(torch.tensor([2])).tolist() == [-1.0, 3.0]
    assert several.raising(1).tolist() == [[2], [1]]


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_a_prediction_without_examples_is_near_retraining(name: str) -> None:
    gentle: dict[str, Make] = {
        "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
        "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.003, eps=1e-3),
    }
    run = trained(gentle[name])
    found = attribute(run)
    assert found.valid
    assert found.agreement == pytest.approx(1, abs=0.25)
    _, (x, y) = data()
    each = 0.5 * (run.problem.J.values(run.final, x) - y).square().sum(1)
    assert found.standard_error == pytest.approx(float(each.std()) / M**0.5)
    predicted, actual = list[float](), list[float]()
    for i in range(N):
        predicted.append(float(found.without(torch.tensor([i])) - found.value))
        actual.append(pushed(run, i, -1.0) - float(found.value))
    both = torch.tensor([predicted, actual])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_a_run_that_is_not_smooth_is_flagged() -> None:
    """A learning rate at the edge of what converges."""
    wild: Make = lambda m: torch.optim.SGD(m.parameters(), lr=3.0, momentum=0.9)  # noqa: E731
    net = network()
    train, query = data()
    run = replay(net, "squared_error", wild(net), batches(40), query, train=train)
    found = attribute(run)
    assert not found.valid
    assert "not smooth enough" in found.reason or "blew up" in found.reason


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
def test_random_shares_are_disjoint_and_weigh_one_on_average(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on a linear model is linear in the weights of the losses: any share agrees."""
    net, (train, _) = nn.Linear(4, 1).double(), data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = replay(net, "squared_error", sgd, [torch.arange(N)], train[0], train=train)
    tried, plain = list[Tensor](), Replay.trained

    def noted(self: Replay, weights: Tensor) -> Tensor:
        tried.append(weights)
        return plain(self, weights)

    monkeypatch.setattr(Replay, "trained", noted)
    for seed in (0, 1):
        found = attribute(
            run, measure=lambda u, _: u[:, 0], check=share, left_out="random", seed=seed
        )
        assert found.valid, found.reason
        assert found.agreement == pytest.approx(1, abs=1e-9)
    count = max(1, round(share * N))
    assert len(tried) == 4
    for weights in tried:
        assert int((weights == 0).sum()) == count
        assert float(weights.mean()) == pytest.approx(1)
        assert len(set(weights.tolist())) == 2
    assert not bool(((tried[0] == 0) & (tried[1] == 0)).any())
    assert not torch.equal(tried[0], tried[2])


def test_what_holds_without_a_few_need_not_hold_for_a_random_half() -> None:
    """A query that bends: by a fifth of its change without the largest, more without a half."""
    net, train = nn.Linear(4, 1).double(), (randn(96, 4), randn(96, 1, seed=1))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    steps = [torch.arange(96)]
    run = replay(net, "squared_error", sgd, steps, randn(1, 4, seed=5), train=train)
    straight = attribute(run, measure=lambda u, _: u[0, 0], check=0)
    at, bend = straight.value, 0.2 / float(straight.influence.abs().max())

    def bent(u: Tensor, _: Tensor | None) -> Tensor:
        return (u[0, 0] - at) + bend * (u[0, 0] - at) ** 2

    few = attribute(run, measure=bent)
    assert few.valid, few.reason
    for seed in range(5):
        half = attribute(run, measure=bent, check=0.5, left_out="random", seed=seed)
        assert not half.valid
    assert "48 examples at random" in half.reason


def test_shares_at_random_of_examples_that_are_all_alike_tell_nothing() -> None:
    x, y = torch.ones(8, 1, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
    net = nn.Linear(1, 1).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = replay(net, "squared_error", sgd, [torch.arange(8)], x, train=(x, y))
    found = attribute(run, measure=lambda u, _: u[0, 0], check=0.5, left_out="random")
    assert not found.valid
    assert "same influence" in found.reason
    none = attribute(run, measure=lambda u, _: 0 * u[0, 0], check=0.5, left_out="random")
    assert "no example has any influence" in none.reason
    assert none.reason == attribute(run, measure=lambda u, _: 0 * u[0, 0]).reason


def test_no_check_is_said() -> None:
    found = attribute(trained(OPTIMIZERS["SGD"]), check=0)
    assert not found.valid
    assert "check=0" in found.reason


def test_a_gate_is_held_and_says_so() -> None:
    sizes: dict[str, Any] = {"batch_size": 7, "dataset_size": N, "mask": "soft"}
    makes: list[Make] = [
        lambda m: PopRiskAdamW(m, lr=0.01, **sizes),
        lambda m: gated(torch.optim.SGD(m.parameters(), lr=0.1), **sizes),
    ]
    for make in makes:
        run = trained(make)
        found = attribute(run)
        assert bool(found.influence.isfinite().all())
        assert not found.valid
        assert "is held as it was" in found.reason
        with pytest.raises(NotAnalysable, match="cannot be followed"):
            attribute(run, response="followed")


def number(u: Tensor, y: Tensor) -> float:
    return 3.0


def outputs_themselves(u: Tensor, y: Tensor) -> Tensor:
    return u


def detached(u: Tensor, y: Tensor) -> Tensor:
    return u.detach().sum()


# --- refusals -------------------------------------------------------------------------------------


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    train, query = data()
    net = nn.Sequential(network(), nn.Dropout(0.5))
    with pytest.raises(NotAnalysable):
        replay(net, "squared_error", OPTIMIZERS["SGD"](net), batches(), query, train=train)


def test_a_training_that_does_not_repeat_is_refused() -> None:
    run = trained(OPTIMIZERS["AdamW"])
    with torch.no_grad():
        run.saved[1].weights[0].add_(1e-9)
    with pytest.raises(NotAnalysable, match="not at step"):
        attribute(run)


def test_data_that_was_written_to_is_refused() -> None:
    train, query = data()
    net = network()
    run = replay(net, "squared_error", OPTIMIZERS["SGD"](net), batches(), query, train=train)
    train[0].mul_(2)
    with pytest.raises(NotAnalysable, match="changed in place"):
        attribute(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": None, "query": randn(2, 4)}, "query has no targets"),
        ({"measure": number}, "measure must return"),
        ({"measure": outputs_themselves}, "of shape"),
        ({"measure": detached}, "depends on the outputs"),
        ({"form": "newton"}, "form"),
        ({"response": "ignored"}, "response"),
        ({"check": 0.9}, "check"),
        ({"max_memory": -1}, "max_memory"),
        ({"left_out": "all"}, "left_out"),
        ({"seed": 0.5}, "seed"),
        ({"query": (randn(2, 4), randn(3, 1))}, "query"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(
    change: dict[str, Any], message: str
) -> None:
    run = trained(OPTIMIZERS["SGD"])
    with pytest.raises((ValueError, TypeError), match=message):
        attribute(run, **change)


def test_an_optimizer_without_a_rule_and_no_step_are_refused() -> None:
    train, query = data()
    net = network()
    other = torch.optim.Rprop(net.parameters())
    with pytest.raises(NotAnalysable, match="no rule"):
        attribute(replay(net, "squared_error", other, batches(), query, train=train))
    with pytest.raises(ValueError, match="no step"):
        replay(net, "squared_error", OPTIMIZERS["SGD"](net), [], query, train=train)
    with pytest.raises(TypeError, match="replay"):
        attribute(net)  # pyrefly: ignore


def test_training_by_replay_is_plain_training() -> None:
    run, net = trained(OPTIMIZERS["AdamW"]), network()
    (x, y), _ = data()
    adam = OPTIMIZERS["AdamW"](net)
    for index in batches():
        adam.zero_grad()
        (0.5 * (net(x[index]) - y[index]).square().sum(1)).mean().backward()
        adam.step()
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(run.final, mine, rtol=0, atol=0)
    again = torch.ones(N, dtype=torch.float64)
    with torch.enable_grad():
        assert torch.equal(run.trained(again), run.final)
    assert [a.step for a in run.saved] == sorted({a.step for a in run.saved})
    assert all(a.step < b.step for a, b in itertools.pairwise(run.saved))
