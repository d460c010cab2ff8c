"""Twins trained without a part of the examples: against retraining, and where pushes fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk import Lockstep, RiskCurve, RiskEstimate, TwinRisk, audit, select
from poprisk.losses import direct_preference, next_token
from poprisk.risk.left_out import Without, left_out_risk, parts_left_out
from reference import left_out as reference
from samplers import randn

Loss = Callable[[Tensor, Tensor], Tensor]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def logistic(u: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * u).sum(1)


def near(value: float, rel: float = 1e-9) -> Any:
    return pytest.approx(value, rel=rel, abs=1e-12)


def parts(n: int, *sizes: int) -> list[Tensor]:
    rows = torch.arange(n)
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [(rows >= end - size) & (rows < end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("flat", [False, True], ids=["", "equal losses"])
@pytest.mark.parametrize("sizes", [(25,), (25, 21, 30)])
def test_an_estimate_is_its_naive_form(sizes: tuple[int, ...], flat: bool) -> None:
    n = 80
    mine = torch.ones(n).double() if flat else randn(n, seed=1).square()
    twins = [0.7 * mine + randn(n, seed=2 + k).square() for k in range(len(sizes))]
    out = parts(n, *sizes)
    value, error, values = reference.estimate(
        mine.tolist(), [t.tolist() for t in twins], [p.tolist() for p in out]
    )
    # Examples that have no loss change nothing.
    counted = torch.cat([torch.ones(n), torch.zeros(3)]).bool()
    rest = torch.zeros(3).double()
    found = left_out_risk(
        torch.cat([mine, rest]),
        [torch.cat([t, rest]) for t in twins],
        [torch.cat([p, torch.ones(3).bool()]) for p in out],
        counted=counted,
    )
    assert found.value == near(value)
    assert found.standard_error == near(error)
    assert found.train_loss == near(float(mine.mean()))
    assert found.losses[:n].tolist() == [near(v) for v in values]
    assert found.losses[n:].tolist() == [0.0] * 3


def ridge(x: Tensor, y: Tensor, w: Tensor, decay: float) -> Tensor:
    """Weights that minimize the weighted sum of squares and ``decay`` times their own."""
    gram = x.T @ (w[:, None] * x) + decay * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (w[:, None] * y))


def test_a_weight_near_one_pushes_an_output_by_its_gradient() -> None:
    """The identity of the module, du/dw = -H ∇ℓ, and what leaving an example out does."""
    n, d = 30, 5
    x, y = randn(n, d), randn(n, 1, seed=1)
    at = ridge(x, y, torch.ones(n).double(), 2.0)
    smoother = x @ torch.linalg.solve(x.T @ x + 2.0 * torch.eye(d).double(), x.T)
    for i in range(n):
        u, g = x[i] @ at, x[i] @ at - y[i]  # of half the squared error
        weights = torch.ones(n).double()
        weights[i] += 1e-6
        answer = (x[i] @ ridge(x, y, weights, 2.0) - u) / 1e-6
        assert float(answer) == near(float(-smoother[i, i] * g), 1e-4)
        weights[i] = 0.0
        without = x[i] @ ridge(x, y, weights, 2.0)
        assert float(without) == near(float(u + smoother[i, i] / (1 - smoother[i, i]) * g), 1e-6)


def test_what_is_memorized_no_longer_answers_to_its_weight() -> None:
    """Gradient flow of one output: the first-order form goes to nothing, the loss without stays."""
    u0, y = 0.0, 2.0

    def after(weight: Tensor, t: float) -> Tensor:
        return 0.5 * ((u0 - y) * torch.exp(-weight * t)) ** 2

    for t, share in ((0.1, 0.98), (1.0, 0.41), (5.0, 0.001)):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        loss = after(w, t)
        (slope,) = torch.autograd.grad(loss, w)
        first = float(loss.detach() - slope)
        assert first == near(math.exp(-2 * t) * (1 + 2 * t) * (u0 - y) ** 2 / 2)
        assert first / float(after(torch.tensor(0.0).double(), t)) == pytest.approx(share, abs=0.01)


Make = Callable[[], nn.Module]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def linear(d: int) -> nn.Module:
    model = nn.Linear(d, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def trained(
    x: Tensor, y: Tensor, loss: Loss, *, epochs: int, batch: int, **settings: Any
) -> TwinRisk:
    twin = TwinRisk(partial(linear, x.shape[1]), sgd, loss, dataset_size=len(x), **settings)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
    return twin


def weighted(x: Tensor, y: Tensor, loss: Loss, w: Tensor, *, epochs: int, batch: int) -> Tensor:
    """Outputs on all examples after the same training with weights, by hand."""
    at = torch.zeros(x.shape[1], 1, dtype=torch.float64)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            at.requires_grad_()
            total = (w[index] * loss(x[index] @ at, y[index])).sum() / len(index)
            (grad,) = torch.autograd.grad(total, at)
            at = at.detach() - 0.05 * grad
    return x @ at


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("loss", [squared, logistic])
def test_twins_are_trained_as_without_their_examples(loss: Loss, probes: int) -> None:
    n, d = 80, 8
    x, y = randn(n, d), randn(n, 1, seed=1).sign()
    settings: dict[str, Any] = {"epochs": 6, "batch": 20}
    twin = trained(x, y, loss, leave_out=0.25, probes=probes, **settings)
    out = [p.out for p in twin.without]
    assert [int(o.sum()) for o in out] == [20] * probes
    assert int(torch.stack(out).sum(0).max()) == 1
    mine = weighted(x, y, loss, torch.ones(n).double(), **settings)
    twins = [weighted(x, y, loss, torch.where(o, 0.0, 80 / 60).double(), **settings) for o in out]
    with torch.no_grad():
        for run, expected in zip(twin.replicas, (mine, *twins), strict=True):
            torch.testing.assert_close(run.model(x), expected, rtol=1e-5, atol=1e-6)
    value, error, _ = reference.estimate(
        loss(mine, y).tolist(),
        [loss(u, y).tolist() for u in twins],
        [o.tolist() for o in out],
    )
    found = twin.estimate(x, y)
    assert found.valid
    assert found.value == near(value, 1e-4)
    assert found.standard_error == near(error, 1e-4)


def left_out_each(x: Tensor, y: Tensor, loss: Loss, *, epochs: int, batch: int) -> Tensor:
    """Loss of each example after training without it, one training after the other."""
    found = list[Tensor]()
    for i in range(len(x)):
        w = torch.ones(len(x)).double()
        w[i] = 0.0
        found.append(loss(weighted(x, y, loss, w, epochs=epochs, batch=batch), y)[i])
    return torch.stack(found)


def test_it_is_the_risk_of_retraining_as_pushed_labels_say_too() -> None:
    n, d = 100, 20
    x, noise = randn(n, d), randn(n, 1, seed=1)
    y = x[:, :1] + noise
    settings: dict[str, Any] = {"epochs": 4, "batch": 100}
    true = float(left_out_each(x, y, squared, **settings).mean())
    without = trained(x, y, squared, leave_out=0.2, probes=5, **settings).estimate(x, y)
    pushed = trained(x, y, squared, probes=5, **settings).estimate(x, y)
    assert without.valid
    assert pushed.valid
    assert true > 1.1 * without.train_loss
    assert without.value == pytest.approx(true, rel=0.06)
    assert pushed.value == pytest.approx(true, rel=0.06)


def test_it_holds_where_all_is_memorized() -> None:
    """More weights than examples, fitted to the end: no pushed label tells the risk."""
    n, d = 100, 200
    x = 0.3 * randn(n, d)
    y = (randn(n, 1, seed=1) + x[:, :1] / 0.3).sign()
    settings: dict[str, Any] = {"epochs": 500, "batch": 100}
    pushed = trained(x, y, squared, **settings).estimate(x, y)
    assert not pushed.valid
    true = float(left_out_each(x, y, squared, **settings).mean())
    found = trained(x, y, squared, leave_out=0.2, probes=5, **settings).estimate(x, y)
    assert found.train_loss < 1e-2 * true
    assert found.valid
    assert found.value == pytest.approx(true, rel=0.1)


def memorizing(seed: int, **settings: Any) -> tuple[RiskEstimate, float]:
    """An estimate of a network that learns labels of which a third is random, and its risk."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 10, generator=g)
        y = (x[:, 0] > 0).long()
        return x, torch.where(torch.rand(n, generator=g) < 0.3, 1 - y, y)

    (x, y), (fresh, other) = draw(300), draw(2000)

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    twin = TwinRisk(make, adam, cross_entropy, dataset_size=300, seed=seed, **settings)
    for _ in range(12):
        for index in torch.randperm(300, generator=g).split(25):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
    with torch.no_grad():
        return twin.estimate(x, y), float(cross_entropy(twin.model(fresh), other).mean())


@pytest.mark.slow
def test_the_error_is_the_scatter_over_seeds() -> None:
    found = [memorizing(seed, leave_out=0.2) for seed in range(20)]
    z = torch.tensor([(e.value - risk) / e.standard_error for e, risk in found])
    assert all(e.value > 1.5 * e.train_loss for e, _ in found)
    assert -0.4 < float(z.mean()) < 1.0  # a fifth fewer examples: a little more risk
    assert 0.5 < float(z.square().mean().sqrt()) < 1.5


def pad(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


class Writer(nn.Module):
    """The next symbol from the last one and a sum of all before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(6, 8), nn.Linear(16, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.clamp_min(0))
        return self.head(torch.cat([x, x.cumsum(1)], 2))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-2)


def sequences(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randint(6, (int(k),), generator=g) for k in torch.randint(3, 9, (n,), generator=g)
    ]


def test_sequences_of_any_length() -> None:
    n = 100
    rows = sequences(n)
    twin = TwinRisk(Writer, adam, next_token, dataset_size=n, leave_out=0.3)
    for _ in range(15):
        for index in torch.randperm(n).split(20):
            tokens = pad([rows[i] for i in index.tolist()])
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(tokens), tokens).mean().backward()
                run.optimizer.step()
    batches = [(pad(rows[i : i + 7]), torch.arange(i, min(i + 7, n))) for i in range(0, n, 7)]
    found = twin.estimate_batches((tokens, tokens, index) for tokens, index in batches)
    assert found.valid
    assert found.train_loss < math.log(6) < found.value
    at_once = pad(rows)
    assert twin.estimate(at_once, at_once).value == near(found.value, 1e-5)
    other = at_once[torch.randperm(n)]
    assert "have other targets here" in twin.estimate(other, other).reason


def test_next_token_is_the_mean_over_known_tokens() -> None:
    logits, tokens = randn(2, 4, 5), torch.tensor([[1, 2, 3, 0], [4, 0, -100, -100]])
    p = logits.log_softmax(2)
    first = [-float(p[0, t, int(tokens[0, t + 1])]) for t in range(3)]
    sums = [sum(first), -float(p[1, 0, 0])]
    assert next_token(logits, tokens, reduction="sum").tolist() == [near(s) for s in sums]
    assert next_token(logits, tokens).tolist() == [near(sums[0] / 3), near(sums[1])]
    with pytest.raises(ValueError, match="reduction must be"):
        next_token(logits, tokens, reduction="none")


def test_direct_preference_is_a_logistic_loss_of_the_margin() -> None:
    r, r0 = torch.tensor([3.0, -1.0]).double(), torch.tensor([1.0, 1.0]).double()
    found = direct_preference(r, r0, beta=0.5)
    assert found.tolist() == [near(math.log1p(math.exp(-m))) for m in (1.0, -1.0)]


def followed(clip: Any = None, *, accumulate: int = 1) -> tuple[TwinRisk, TwinRisk]:
    """The twin of a loop that is followed, and that of a loop of its own."""
    n = 90
    rows = sequences(n)
    tokens, index = pad(rows), torch.arange(n)
    model = Writer()
    opt = adam(model)
    lockstep = Lockstep(model, opt, next_token, dataset_size=n, leave_out=0.3, probes=2, clip=clip)
    twin = TwinRisk(Writer, adam, next_token, dataset_size=n, leave_out=0.3, probes=2)
    for _ in range(4):
        for batch in index.split(30):
            for part in batch.split(30 // accumulate):
                # Each part as long as its longest sequence.
                some = tokens[part, : max(len(rows[i]) for i in part.tolist())]
                lockstep.batch(part, some)
                (next_token(model(some), some).mean() / accumulate).backward()
            if clip is not None:
                clip(model, opt)
            opt.step()
            opt.zero_grad()
            for run in twin.runs(batch):
                run.loss(run.model(tokens[batch]), tokens[batch]).mean().backward()
                if clip is not None:
                    clip(run.model, run.optimizer)
                run.optimizer.step()
                run.optimizer.zero_grad()
    return lockstep.twin, twin


def test_a_twin_follows_another_loop_without_examples() -> None:
    def clip(model: nn.Module, _: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    tokens = pad(sequences(90))
    cases: list[dict[str, Any]] = [{}, {"clip": clip, "accumulate": 3}]
    for settings in cases:
        one, other = followed(**settings)
        assert not one.doubt
        a, b = one.estimate(tokens, tokens), other.estimate(tokens, tokens)
        assert a.value == near(b.value, 1e-3)
        assert a.standard_error == near(b.standard_error, 1e-2)
        weights = [p.detach() for p in one.replicas[1].model.parameters()]
        for p, q in zip(weights, other.replicas[1].model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-2, atol=2e-3)


def make(**settings: Any) -> TwinRisk:
    return TwinRisk(partial(linear, 3), sgd, squared, dataset_size=80, **settings)


def test_what_cannot_be_left_out_is_refused() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"leave_out": "a fifth"}, TypeError, "leave_out must be a number"),
        ({"leave_out": 0.0}, ValueError, "leave_out must lie in"),
        ({"leave_out": 0.6}, ValueError, "leave_out must lie in"),
        ({"leave_out": math.nan}, ValueError, "leave_out must lie in"),
        ({"leave_out": 0.1}, ValueError, "of 80 examples are 8, and an estimate takes 20"),
        ({"leave_out": 0.4, "probes": 3}, ValueError, "need 96, but there are 80"),
        ({"leave_out": 0.2, "delta": 0.1}, ValueError, "leave out one of them"),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message):
            make(**settings)


def test_what_takes_pushed_labels_says_so() -> None:
    x, y = randn(80, 3), randn(80, 1, seed=1)
    twin = make(leave_out=0.3)
    halves = torch.arange(80) % 2
    with pytest.raises(ValueError, match="pushes no labels and has no groups or parts"):
        twin.estimate(x, y, groups=halves)
    with pytest.raises(ValueError, match="pushes no labels and has no groups or parts"):
        twin.estimate(x, y, parts=halves)
    with pytest.raises(ValueError, match="pushes no labels and has no outputs to compare"):
        twin.outputs([(x, y, torch.arange(80))])
    with pytest.raises(ValueError, match="has no leave-one-out outputs"):
        audit(twin, x, y, kind="regression")


def test_an_estimate_that_cannot_be_made_is_flagged() -> None:
    x, y = randn(80, 3), randn(80, 1, seed=1)
    twin = make(leave_out=0.3)
    before = twin.estimate(x, y)  # nothing is trained on yet: all is fresh
    assert before.value == near(before.train_loss)
    few = twin.estimate(x[:20], y[:20])
    assert not few.valid
    assert not few.comparable
    assert "a twin was trained without" in few.reason
    assert math.isnan(few.value)
    with torch.no_grad():
        next(twin.replicas[1].model.parameters()).fill_(math.inf)
    assert twin.estimate(x, y).reason == "losses are not finite"
    heavy = y.clone()
    heavy[0] = 1e6
    assert "too few examples left out" in make(leave_out=0.3).estimate(x, heavy).reason
    masked = TwinRisk(
        partial(linear, 3), sgd, lambda u, y: 0 * squared(u, y), dataset_size=80, leave_out=0.3
    )
    assert "no example has a loss" in masked.estimate(x, y).reason


def test_a_state_goes_on_and_fits_no_other_twin() -> None:
    x, y = randn(80, 3), randn(80, 1, seed=1)
    twin, again = make(leave_out=0.3), make(leave_out=0.3)
    for run in twin.runs(torch.arange(80)):
        run.loss(run.model(x), y).mean().backward()
        run.optimizer.step()
    again.load_state_dict(twin.state_dict())
    assert again.estimate(x, y).value == twin.estimate(x, y).value
    for other in (make(), make(leave_out=0.4), make(leave_out=0.3, seed=1)):
        with pytest.raises(ValueError, match="state_dict was saved with"):
            other.load_state_dict(twin.state_dict())
    with pytest.raises(ValueError, match="state_dict was saved with"):
        twin.load_state_dict(make().state_dict())


def test_the_same_seed_leaves_out_the_same() -> None:
    one, other, third = (parts_left_out(0.2, 100, probes=2, seed=seed)[0].out for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    part = Without(one)
    assert float(part.weights(torch.arange(100)).mean()) == near(1.0)


def test_a_curve_of_them_stops_and_selects() -> None:
    first, second = (memorizing(0, leave_out=0.3)[0] for _ in range(2))
    curve = RiskCurve()
    for step, estimate in enumerate((first, second)):
        curve.add(step, estimate, nn.Linear(1, 1))
    point = curve.point
    assert point is not None
    assert point.valid
    assert (point.low, point.high) == (0, 1)  # the same estimate twice
    assert select({"a": first, "b": second}).tied == ["b"]
    restored = RiskCurve()
    restored.load_state_dict(curve.state_dict())
    assert restored.estimates[0].value == first.value
