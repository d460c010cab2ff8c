"""Labels that are none, losses of every usual kind, other states: right, flagged or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asserts import assert_bitwise
from poprisk import Canaries, RiskEstimate, TwinRisk, fresh_batch_risk
from poprisk.randomness import RandomState
from poprisk.risk.local_losses import Softmax, ignored_examples, local_loss_of
from poprisk.task.metrics import accuracy, mean_squared_error
from samplers import randn

Loss = Callable[[Tensor, Tensor], Tensor]
N, FRESH, K = 400, 20_000, 3


def inputs_and_scores(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + FRESH, 6, generator=g)
    return x, x @ torch.randn(6, K, generator=g)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, and classes drawn by their softmax."""
    x, scores = inputs_and_scores(seed)
    g = torch.Generator().manual_seed(seed + 1)
    return x, torch.multinomial(scores.softmax(1), 1, generator=g)[:, 0]


def train(twin: TwinRisk, x: Tensor, y: Tensor, epochs: int = 10) -> None:
    torch.manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(50):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()


def network(outputs: int, last: nn.Module | None = None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        tail = [] if last is None else [last]
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs), *tail)

    return make


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def twin_of(loss: Loss, outputs: int = K, last: nn.Module | None = None, **more: Any) -> TwinRisk:
    settings: dict[str, Any] = {"dataset_size": N, **more}
    return TwinRisk(network(outputs, last), adamw, loss, **settings)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def ignoring(index: int) -> Loss:
    return lambda u, y: F.cross_entropy(u, y, reduction="none", ignore_index=index)


def masked(u: Tensor, y: Tensor) -> Tensor:
    return torch.where(y.isnan(), 0.0, (u[:, 0] - y.nan_to_num()).square())


def weighted(u: Tensor, y: Tensor) -> Tensor:
    """Targets and weights side by side."""
    return y[:, 1] * (u[:, 0] - y[:, 0]).square()


def unlabelled(kind: str) -> tuple[Loss, Tensor, Tensor, int]:
    """Loss, inputs, targets of which 40% are none, outputs of the model."""
    x, y = drawn(3)
    gone = torch.rand(N, generator=torch.Generator().manual_seed(9)) < 0.4
    if kind in ("-100", "255", "-1"):
        return ignoring(int(kind)), x[:N], torch.where(gone, int(kind), y[:N]), K
    number = x[:N, 0] + y[:N]
    if kind == "NaN":
        return masked, x[:N], torch.where(gone, math.nan, number), 1
    return weighted, x[:N], torch.stack([number, (~gone).float()], 1), 1


KINDS = ("-100", "255", "-1", "NaN", "weight")


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_without_a_label_counts_neither_way(kind: str) -> None:
    """The estimate is that of the labelled examples alone, from the same training."""
    loss, x, y, outputs = unlabelled(kind)
    twin = twin_of(loss, outputs)
    train(twin, x, y)
    gone = ignored_examples(loss, twin.model(x), y)
    assert 0.3 < float(gone.double().mean()) < 0.5
    labelled = (~gone).nonzero().squeeze(1)
    groups = torch.arange(N) // 2
    found = twin.estimate(x, y, groups=groups)
    alone = twin.estimate(x[labelled], y[labelled], index=labelled, groups=groups[labelled])
    for name in ("value", "standard_error", "train_loss", "response", "dof", "dof_error"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-6), name
    assert found.accuracy == alone.accuracy
    assert (found.valid, found.reason) == (alone.valid, alone.reason)
    assert found.outputs.shape == (N, outputs)
    assert torch.equal(found.losses == 0, gone)
    assert float(found.losses.sum() / len(labelled)) == pytest.approx(found.value)
    fitted = loss(twin.model(x), y).detach()[labelled]
    assert found.train_loss == pytest.approx(float(fitted.mean()), rel=1e-5)


def test_accuracy_of_partly_labelled_examples_is_that_of_fresh_ones() -> None:
    x, y = drawn(3)
    loss, _, labels, _ = unlabelled("255")
    twin = twin_of(loss)
    train(twin, x[:N], labels, epochs=20)
    found = twin.estimate(x[:N], labels)
    fresh = float((twin.model(x[N:]).argmax(1) == y[N:]).double().mean())
    assert found.accuracy == pytest.approx(fresh, abs=0.08)


def test_the_tilt_spares_what_has_no_label() -> None:
    loss, x, y, _ = unlabelled("-100")
    twin = twin_of(loss)
    for run in twin.runs(torch.arange(50)):
        u = run.model(x[:50])
        (slope,) = torch.autograd.grad(run.loss(u, y[:50]).sum(), u)
        assert torch.equal(slope.abs().sum(1) == 0, y[:50] == -100)


def test_no_label_at_all_is_said() -> None:
    loss, x, y, _ = unlabelled("-100")
    twin = twin_of(loss)
    train(twin, x, y, epochs=1)
    found = twin.estimate(x, torch.full_like(y, -100))
    assert not found.valid
    assert "no example has a loss" in found.reason
    with pytest.raises(ValueError, match=r"gives no scale .*are all labels of the batch ignored"):
        train(twin_of(loss), x, torch.full_like(y, -100), epochs=1)


def test_a_loss_that_is_zero_by_merit_is_one() -> None:
    u, y = 5 * randn(100, 1), (randn(100, seed=1) > 0).double()
    hinge: Loss = lambda u, y: (1 - (2 * y - 1) * u[:, 0]).clamp_min(0)  # noqa: E731
    assert bool((hinge(u, y) == 0).any())
    assert not bool(ignored_examples(hinge, u, y).any())
    u, y = 5 * randn(100, K), torch.arange(100) % K
    margin: Loss = lambda u, y: F.multi_margin_loss(u, y, reduction="none")  # noqa: E731
    assert bool((margin(u, y) == 0).any())
    assert not bool(ignored_examples(margin, u, y).any())
    assert not bool(ignored_examples(lambda u, y: u.square().sum(1), 0 * u, y).any())


@pytest.mark.parametrize("gone", [-100, -1, 255])
def test_metrics_leave_out_what_has_no_label(gone: int) -> None:
    u, y = randn(50, K), torch.arange(50) % K
    y[::3] = gone
    kept = y != gone
    assert accuracy(u, y) == float((u.argmax(1) == y)[kept].double().mean())
    assert math.isnan(accuracy(u, torch.full_like(y, gone)))
    numbers = torch.where(kept, u[:, 0], math.nan)
    assert mean_squared_error(u[:, 1], numbers) == pytest.approx(
        float((u[:, 1] - u[:, 0])[kept].square().mean())
    )
    assert math.isnan(mean_squared_error(u[:, 1] * math.nan, u[:, 0]))


def test_a_step_is_told_of_what_has_a_loss() -> None:
    """Twice the batch, half of it without labels: the step is half as long, its effect too."""
    x, y = randn(16, 3), randn(16, 1)
    model = nn.Linear(3, 1).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 0.0, (u - y.nan_to_num()).square()).mean(1)

    full = fresh_batch_risk(model, loss, x, y, opt, fresh=True, splits=8)
    doubled = torch.stack([y, y * math.nan], 1).reshape(32, 1)
    half = fresh_batch_risk(model, loss, x.repeat_interleave(2, 0), doubled, opt, fresh=True)
    assert half.level == pytest.approx(full.level)
    for name in ("value", "standard_error", "empirical", "noise"):
        assert getattr(half, name) == pytest.approx(getattr(full, name) / 2), name
    assert half.modules[""].risk == pytest.approx(half.value) if "" in half.modules else True
    with pytest.raises(ValueError, match="no example of the batch has a loss"):
        fresh_batch_risk(model, loss, x, y * math.nan, opt, fresh=True)


def likelihood(u: Tensor, y: Tensor) -> Tensor:
    """Mean and logarithm of the variance."""
    return F.gaussian_nll_loss(u[:, 0], y, u[:, 1].exp(), reduction="none")


def ordinal(u: Tensor, y: Tensor) -> Tensor:
    """Cumulative logits of an ordered class."""
    above = (y.unsqueeze(1) > torch.arange(K - 1)).to(u)
    return F.binary_cross_entropy_with_logits(u, above, reduction="none").sum(1)


def focal(u: Tensor, y: Tensor) -> Tensor:
    cost = cross_entropy(u, y)
    return (1 - (-cost).exp()).square() * cost


def per_class(**settings: Any) -> Loss:
    def loss(u: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, K).to(u)
        return F.binary_cross_entropy_with_logits(u, hot, reduction="none", **settings).mean(1)

    return loss


def divergence(u: Tensor, y: Tensor) -> Tensor:
    target = 0.7 * F.one_hot(y, K) + 0.1
    return F.kl_div(u.log_softmax(1), target, reduction="none").sum(1)


def of_log_probabilities(u: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(u, y, reduction="none")


def divergence_of_log_probabilities(u: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(u, 0.7 * F.one_hot(y, K) + 0.1, reduction="none").sum(1)


def weights(u: Tensor) -> Tensor:
    return torch.tensor([0.3, 1.0, 2.0], dtype=u.dtype)


USUAL: dict[str, tuple[Loss, int, nn.Module | None, str]] = {
    "class weights": (
        lambda u, y: F.cross_entropy(u, y, weights(u), reduction="none"),
        K,
        None,
        "class",
    ),
    "label smoothing": (
        lambda u, y: F.cross_entropy(u, y, reduction="none", label_smoothing=0.1),
        K,
        None,
        "class",
    ),
    "positive weight": (
        lambda u, y: per_class(pos_weight=weights(u))(u, y),
        K,
        None,
        "class",
    ),
    "multi-label": (per_class(), K, None, "class"),
    "focal": (focal, K, None, "class"),
    "ordinal": (ordinal, K - 1, None, "class"),
    "divergence": (divergence, K, None, "class"),
    "log-probabilities": (of_log_probabilities, K, nn.LogSoftmax(1), "class"),
    "divergence of log-probabilities": (
        divergence_of_log_probabilities,
        K,
        nn.LogSoftmax(1),
        "class",
    ),
    "Brier score": (
        lambda u, y: (u - F.one_hot(y, K)).square().sum(1),
        K,
        nn.Softmax(1),
        "class",
    ),
    "Poisson": (
        lambda u, y: F.poisson_nll_loss(u[:, 0], y, reduction="none"),
        1,
        None,
        "count",
    ),
    "Gaussian likelihood": (likelihood, 2, None, "number"),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_losses_are_near_the_true_risk_where_valid(name: str) -> None:
    loss, outputs, last, kind = USUAL[name]
    x, y = drawn(5)
    if kind != "class":
        y = y.float() + (torch.poisson(x[:, 0].exp()) if kind == "count" else 0.7 * x.roll(1)[:, 0])
    twin, seen = twin_of(loss, outputs, last), 0
    for _ in range(3):
        train(twin, x[:N], y[:N], epochs=6)
        found = twin.estimate(x[:N], y[:N])
        with torch.no_grad():
            true = float(loss(twin.model(x[N:]), y[N:]).mean())
        seen += found.valid
        if found.valid:
            assert abs(found.value - true) <= 3 * found.standard_error + 0.1 * abs(true)
    assert seen >= 2


def test_log_probabilities_are_logits() -> None:
    """The same network with its normalization inside or outside of the loss: the same numbers."""
    x, y = drawn(5)
    estimates = []
    for loss, last in ((cross_entropy, None), (of_log_probabilities, nn.LogSoftmax(1))):
        twin = twin_of(loss, K, last)
        train(twin, x[:N], y[:N])
        estimates.append(twin.estimate(x[:N], y[:N]))
    inside, outside = estimates
    assert outside.value == pytest.approx(inside.value, rel=1e-3)
    assert outside.dof == pytest.approx(inside.dof, rel=1e-3)
    assert outside.accuracy == inside.accuracy
    u = randn(6, 4).log_softmax(1)
    assert isinstance(local_loss_of(of_log_probabilities, u, torch.arange(6) % 4), Softmax)


@pytest.mark.parametrize("kind", ["squared", "absolute", "logistic"])
def test_accuracy_goes_by_what_the_loss_takes_labels_for(kind: str) -> None:
    """Squared error on 0/1 labels predicts 1 above a half, a logistic loss above 0."""
    x, y = drawn(7)
    y = (y > 0).float().unsqueeze(1)
    losses: dict[str, Loss] = {
        "squared": lambda u, y: (u - y).square().mean(1),
        "absolute": lambda u, y: (u - y).abs().mean(1),
        "logistic": lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="none")[:, 0],
    }
    twin = twin_of(losses[kind], 1)
    train(twin, x[:N], y[:N], epochs=8)
    boundary = 0.0 if kind == "logistic" else 0.5
    fresh = float(((twin.model(x[N:]) > boundary) == (y[N:] > 0.5)).double().mean())
    assert twin.estimate(x[:N], y[:N]).accuracy == pytest.approx(fresh, abs=0.08)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("first", [False, True])
def test_separable_preferences_are_flagged(optimizer: str, first: bool) -> None:
    """Every pair is a direction of its own: of a fresh one nothing is known, its loss is ln 2."""
    n = 100
    y = torch.ones(n) if first else torch.randint(2, (n,)).float()

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-(2 * y - 1) * u[:, 0])

    def linear() -> nn.Module:
        model = nn.Linear(n, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def make(m: nn.Module) -> torch.optim.Optimizer:
        if optimizer == "SGD":
            return torch.optim.SGD(m.parameters(), lr=10.0)
        return torch.optim.AdamW(m.parameters(), lr=0.05)

    twin = TwinRisk(linear, make, loss, dataset_size=n)
    x = torch.eye(n)
    for _ in range(4):
        train(twin, x, y, epochs=8)
        found = twin.estimate(x, y)
        near = abs(found.value - math.log(2)) <= 3 * found.standard_error + 0.07
        assert near or not found.comparable
        assert near or "separable" in found.reason


FAULTY: dict[str, tuple[Loss, int, nn.Module | None, str]] = {
    "a count of mistakes": (
        lambda u, y: (u.argmax(1) != y).double(),
        K,
        None,
        "must be differentiable",
    ),
    "a detached loss": (
        lambda u, y: cross_entropy(u.detach(), y),
        K,
        None,
        "must be differentiable",
    ),
    "a mean": (nn.CrossEntropyLoss(), K, None, "one value per example"),
    "no reduction over outputs": (
        lambda u, y: (u - F.one_hot(y, K)).square(),
        K,
        None,
        "one value per example",
    ),
    "probabilities": (
        lambda u, y: F.binary_cross_entropy(u[:, 0], (y > 0).to(u), reduction="none"),
        1,
        nn.Sigmoid(),
        r"defined for any outputs, but raises RuntimeError .* put out logits",
    ),
    "a variance that may be negative": (
        lambda u, y: F.gaussian_nll_loss(u[:, 0], y.to(u), u[:, 1], reduction="none"),
        2,
        nn.Softplus(),
        r"defined for any outputs, but raises ValueError",
    ),
    "a logarithm": (
        lambda u, y: -u.gather(1, y.unsqueeze(1)).log()[:, 0],
        K,
        nn.Softmax(1),
        "defined for any outputs, but is not finite",
    ),
    "many coupled outputs": (
        lambda u, y: u.square().sum(1).square(),
        200,
        None,
        "couples all 200 outputs",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_losses_that_cannot_be_measured_are_refused_at_the_first_batch(name: str) -> None:
    loss, outputs, last, message = FAULTY[name]
    x, y = drawn(5)
    twin = twin_of(loss, outputs, last)
    before = copy.deepcopy(twin.model.state_dict())
    with pytest.raises(ValueError, match=message):
        train(twin, x[:N], y[:N], epochs=1)
    assert_bitwise(twin.model.state_dict(), before)


INTEGERS = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.bool),
]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("classes", [2, 5])
def test_canaries_of_every_kind_of_integer_say_the_same(dtype: torch.dtype, classes: int) -> None:
    if dtype == torch.bool and classes > 2:
        pytest.skip("no such labels")
    y = torch.arange(500) % classes
    outputs, wide = randn(500, classes), Canaries(y, fraction=0.2)
    canaries = Canaries(y.to(dtype), fraction=0.2)
    assert canaries.targets.dtype == canaries.original.dtype == dtype
    assert torch.equal(canaries.targets.long(), wide.targets)
    assert canaries.memorization(outputs) == wide.memorization(outputs)
    assert canaries.error_bound(outputs) == wide.error_bound(outputs)
    part = torch.arange(100, 300)
    relabelled = canaries.relabel(y.to(dtype)[part], part)
    assert torch.equal(relabelled.long(), wide.targets[part])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, K)])
def test_classes_in_floating_point_are_refused(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y = (randn(*shape) > 0).to(dtype)
    with pytest.raises(ValueError, match=r"only 0 and 1 as .* pass integer classes"):
        Canaries(y)
    Canaries(randn(*shape).to(dtype))


def test_labels_that_cannot_hold_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"classes=300 do not fit into labels of torch\.uint8"):
        Canaries((torch.arange(N) % 5).to(torch.uint8), classes=300)
    with pytest.raises(ValueError, match=r"classes=3 do not fit into labels of torch\.bool"):
        Canaries(torch.arange(N) % 2 == 0, classes=3)


@pytest.mark.parametrize("gone", [-100, 255])
def test_what_has_no_label_becomes_no_canary(gone: int) -> None:
    y = torch.arange(1000) % K
    y[::4] = gone
    canaries = Canaries(y, fraction=0.4, ignore_index=gone)
    assert len(canaries.index) == 300
    assert not bool((y[canaries.index] == gone).any())
    assert torch.equal(canaries.targets == gone, y == gone)
    outputs = randn(1000, K)
    bound = canaries.error_bound(outputs)
    assert bound.sacrificed == canaries.memorization(outputs).sacrificed == 0.4
    labelled = Canaries(y[y != gone], fraction=0.4)
    assert bound == labelled.error_bound(outputs[y != gone])


def test_masked_numbers_become_no_canaries() -> None:
    y = randn(200, 2)
    y[::4, 1] = math.nan
    canaries = Canaries(y, fraction=0.5)
    assert not bool((canaries.index % 4 == 0).any())
    assert len(canaries.index) == 75
    assert math.isfinite(canaries.memorization(torch.zeros(200, 2).double()).value)


def saved() -> tuple[TwinRisk, dict[str, Any], Tensor, Tensor]:
    x, y = drawn(5)
    twin = twin_of(cross_entropy)
    train(twin, x[:N], y[:N], epochs=1)
    return twin, copy.deepcopy(twin.state_dict()), x[:N], y[:N]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def halved(u: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(u, y) / 2


def of_numbers(u: Tensor, y: Tensor) -> Tensor:
    return (u[:, :5] - y.reshape(-1, 7)).square().sum(1)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "delta": ({"delta": 0.1}, r"saved with delta=0\.3, but this twin has 0\.1"),
    "seed": ({"seed": 1}, "saved with seed=0, but this twin has 1"),
    "probes": ({"probes": 2}, "holds 2 models, this one 3"),
    "dataset_size": ({"dataset_size": 500}, "saved with dataset_size=400"),
    "optimizer": ({"make_optimizer": sgd}, "saved with optimizer='AdamW', but this twin has 'SGD'"),
    "loss": ({"loss": halved}, "another loss: this one gives other values"),
    "failing loss": ({"loss": of_numbers}, "another loss: this one fails"),
    "width": ({"make_model": network(K + 1)}, r"another model: 2\.weight is \(3, 16\) there"),
    "depth": ({"make_model": network(K, nn.BatchNorm1d(K))}, r"another model: 3\.weight is None"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(name: str) -> None:
    change, message = OTHER[name]
    _, state, _, _ = saved()
    arguments = {"make_model": network(K), "make_optimizer": adamw, "loss": cross_entropy}
    settings: dict[str, Any] = {"dataset_size": N, **arguments, **change}
    other = TwinRisk(**settings)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert_same(other.state_dict(), before)


def assert_same(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found["models"], expected["models"], strict=True):
        assert_bitwise(mine, theirs)
    assert found["optimizers"] == expected["optimizers"]
    assert found["steps"] == expected["steps"]
    assert found["scale"] == expected["scale"]


@pytest.mark.parametrize("state", [None, [], "a", {}, {"models": []}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        twin_of(cross_entropy).load_state_dict(state)


def test_a_state_that_lacks_a_part_is_refused() -> None:
    for key in ("optimizers", "steps", "scale", "shape", "doubt"):
        _, state, _, _ = saved()
        del state[key]
        with pytest.raises(ValueError, match=f"no .*{key}"):
            twin_of(cross_entropy).load_state_dict(state)


def test_an_optimizer_that_refuses_late_changes_nothing() -> None:
    twin, state, x, y = saved()
    state["optimizers"][1]["param_groups"] = []
    train(twin, x, y, epochs=1)
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        twin.load_state_dict(state)
    for mine, theirs in zip(twin.state_dict()["models"], before["models"], strict=True):
        assert_bitwise(mine, theirs)
    for mine, theirs in zip(twin.state_dict()["optimizers"], before["optimizers"], strict=True):
        for k, values in theirs["state"].items():
            assert_bitwise(mine["state"][k], values)
    assert twin.steps == before["steps"]


@pytest.mark.parametrize("lacks", [["settings", "sample"], ["sample"]])
def test_a_state_of_an_earlier_version_is_taken_and_flagged(lacks: list[str]) -> None:
    """Without settings, or without what tells its signs."""
    twin, state, x, y = saved()
    del state["settings"]["signs"]
    for name in lacks:
        del state[name]
    other = twin_of(cross_entropy)
    other.load_state_dict(state)
    found, expected = other.estimate(x, y), twin.estimate(x, y)
    assert found.value == expected.value
    assert expected.valid
    assert not found.valid
    assert "of an earlier version" in found.reason


class Stateful(nn.Module):
    """Counts and averages in every pass, keeps a list, writes to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, K)
        self.register_buffer("mean", torch.zeros(6))
        self.calls, self.seen = 0, list[int]()
        self.words = nn.Embedding(4, 6, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean + self.words(torch.zeros(len(x), dtype=torch.long)))


def snapshot(model: nn.Module) -> Any:
    own = {k: copy.deepcopy(v) for k, v in vars(model).items() if k in ("calls", "seen")}
    return copy.deepcopy(model.state_dict()), own, [m.training for m in model.modules()]


@pytest.mark.parametrize("way", ["estimate", "fresh batch"])
def test_measuring_leaves_no_trace(way: str) -> None:
    x, y = drawn(5)
    x, y = x[:N], y[:N]
    twin = TwinRisk(Stateful, adamw, cross_entropy, dataset_size=N)
    train(twin, x, y, epochs=1)
    before, random = [snapshot(r.model) for r in twin.replicas], RandomState.now()
    states = copy.deepcopy([r.optimizer.state_dict() for r in twin.replicas])
    if way == "estimate":
        twin.estimate(x, y)
    else:
        fresh_batch_risk(twin.model, cross_entropy, x[:20], y[:20], twin.optimizer, fresh=True)
    assert random.same(RandomState.now())
    for run, (weights_then, own, modes), state in zip(twin.replicas, before, states, strict=True):
        assert_bitwise(run.model.state_dict(), weights_then)
        assert {k: getattr(run.model, k) for k in own} == own
        assert [m.training for m in run.model.modules()] == modes
        assert_bitwise(
            {str(k): v["exp_avg"] for k, v in run.optimizer.state_dict()["state"].items()},
            {str(k): v["exp_avg"] for k, v in state["state"].items()},
        )


class Forces(nn.Module):
    """The negative gradient of an energy by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_is_measured() -> None:
    x = torch.randn(N + FRESH, 6, generator=torch.Generator().manual_seed(0))
    y = -x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    squared: Loss = lambda u, y: (u - y).square().mean(1)  # noqa: E731
    twin = TwinRisk(Forces, adamw, squared, dataset_size=N)
    train(twin, x[:N], y[:N])
    found: RiskEstimate = twin.estimate(x[:N], y[:N])
    true = float(squared(twin.model(x[N:]), y[N:]).detach().mean())
    assert found.valid
    assert abs(found.value - true) <= 3 * found.standard_error + 0.1 * true
    batch = slice(N, N + 40)
    fresh = fresh_batch_risk(twin.model, squared, x[batch], y[batch], twin.optimizer, fresh=True)
    assert math.isfinite(fresh.value)
