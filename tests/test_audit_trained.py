"""An audit after training: a model, a twin, outputs, folds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from poprisk import Auditor, Canaries, TwinRisk, audit

N, C = 120, 3
WRONG = [4, 31, 77]


def data(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that say the class, given and true labels."""
    true = torch.arange(n) % C
    x = F.one_hot(true, C) + 0.3 * torch.randn(n, C, generator=torch.Generator().manual_seed(0))
    given = true.clone()
    given[WRONG] = (given[WRONG] + 1) % C
    return x, given, true


def linear() -> nn.Linear:
    model = nn.Linear(C, C, bias=False)
    with torch.no_grad():
        model.weight.copy_(8 * torch.eye(C))
    return model


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def test_a_model_in_hand() -> None:
    x, y, true = data()
    model = nn.Sequential(linear(), nn.Dropout(0.5)).train()
    result = audit(model, x, y, batch_size=50)
    assert set(WRONG) <= set(result.suspects())
    np.testing.assert_array_equal(result.suggested[WRONG], true[WRONG])
    assert model.training
    assert "no labels were planted" in result.reason
    assert not result.valid
    np.testing.assert_allclose(result.predictions, model[0](x).softmax(1).detach(), rtol=1e-5)


def test_canaries_certify_a_model() -> None:
    x, y, _ = data(300)
    canaries = Canaries(y, fraction=0.2)
    result = audit(linear(), x, canaries)
    assert result.valid, result.reason
    assert result.recall is not None
    assert result.recall.value > 0.7
    np.testing.assert_array_equal(result.labels, y)
    parrot = 9.0 * F.one_hot(canaries.targets, C)
    memorized = audit(parrot, None, canaries)
    assert not memorized.valid
    assert memorized.reason.startswith("memorization of the planted labels is 1.00, above 0.2")
    assert audit(parrot, None, canaries, limit=1.1).valid


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_numbers_are_compared_with_their_own_predictions(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(2000, generator=g).to(dtype)
    outputs = y + 0.5 * torch.randn(2000, generator=g)
    canaries = Canaries(y.reshape(shape), fraction=0.05)
    result = audit(outputs.reshape(shape), None, canaries, kind="regression")
    found = audit(outputs, None, canaries.targets.flatten().float(), kind="regression")
    assert result.recall is not None
    assert 0.05 < result.recall.value < 0.3
    # Where they are labels like others, they make the estimated noise a little larger.
    mean = found.suspect[canaries.index.numpy()].mean()
    assert result.recall.value == pytest.approx(mean, abs=0.06)


def test_outputs_in_hand_are_those_of_the_model() -> None:
    x, y, _ = data()
    one, two = audit(linear(), x, y), audit(linear()(x).detach(), None, y)
    np.testing.assert_array_equal(one.margin, two.margin)
    np.testing.assert_array_equal(
        audit(linear()(x).softmax(1), None, y, probabilities=True).suspect, one.suspect
    )


def test_a_loader_in_order_or_with_positions() -> None:
    x, y, _ = data()
    expected = audit(linear(), x, y)
    plain = TensorDataset(x, y)
    positions = TensorDataset(x, y, torch.arange(N))
    for loader in (DataLoader(plain, 32), DataLoader(positions, 32, shuffle=True)):
        np.testing.assert_allclose(audit(linear(), loader, y).margin, expected.margin, atol=1e-5)
    with pytest.raises(ValueError, match="the DataLoader shuffles"):
        audit(linear(), DataLoader(plain, 32, shuffle=True), y)


def test_the_forward_of_ones_own() -> None:
    x, y, _ = data()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.net(x), None

    found = audit(Two(), x, y, forward=forward)
    np.testing.assert_array_equal(found.margin, audit(linear(), x, y).margin)


def test_a_twin_gives_its_leave_one_out_outputs() -> None:
    x, y, _ = data(600)
    torch.manual_seed(0)
    twin = TwinRisk(
        lambda: nn.Linear(C, C),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        cross_entropy,
        dataset_size=600,
    )
    for epoch in range(20):
        g = torch.Generator().manual_seed(epoch)
        for index in torch.randperm(600, generator=g).split(100):
            for run in twin.runs(index):
                run.optimizer.zero_grad()
                run.loss(run.model(x[index]), y[index]).mean().backward()
                run.optimizer.step()
    result, estimate = audit(twin, x, y), twin.estimate(x, y)
    np.testing.assert_allclose(result.predictions, estimate.outputs.softmax(1), rtol=1e-5)
    assert result.valid == estimate.valid
    assert result.valid, result.reason
    assert result.cost == pytest.approx(estimate.cost, rel=1)
    assert result.cost > 0
    assert set(WRONG) <= set(result.suspects())
    twin.doubt = "of another loss"
    assert audit(twin, x, y).reason == "the twin's estimate is not valid: of another loss"


def fit(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(C, C)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(40):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model


def test_folds_predict_what_they_were_not_trained_on() -> None:
    x, y, _ = data()
    inside: list[Tensor] = []
    outside: list[Tensor] = []

    def train(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        inside.append(x[:, 0])
        model = fit(x, y)

        def predict(x: Tensor) -> Tensor:
            outside.append(x[:, 0])
            return model(x)

        return predict

    result = audit(train, x, y, folds=4)
    assert len(inside) == 4
    for there, left in zip(inside, outside, strict=True):
        assert len(there) + len(left) == N
        assert set(there.tolist()).isdisjoint(left.tolist())
        classes = y[[x[:, 0].tolist().index(v) for v in left.tolist()]].bincount(minlength=C)
        assert int(classes.max() - classes.min()) <= 2
    assert sorted(torch.cat(outside).tolist()) == sorted(x[:, 0].tolist())
    assert set(WRONG) <= set(result.suspects())
    assert result.valid, result.reason
    assert result.cost == 3
    assert result.recall is None


def test_folds_take_a_module_and_numpy_inputs() -> None:
    x, y, _ = data()

    def train(x: Any, y: Tensor) -> Any:
        model = fit(torch.as_tensor(x), y)

        def predict(rows: Any) -> Any:
            return model(torch.as_tensor(rows)).detach().numpy()

        return predict

    arrays = audit(train, x.numpy(), y, folds=3, seed=1)
    np.testing.assert_allclose(arrays.margin, audit(fit, x, y, folds=3, seed=1).margin, atol=1e-5)
    assert not np.allclose(arrays.margin, audit(fit, x, y, folds=3, seed=2).margin)


def test_what_has_no_label_is_in_no_training_set_but_is_predicted() -> None:
    x, y, true = data()
    y[7] = -100
    seen = []

    def train(x: Tensor, y: Tensor) -> nn.Module:
        seen.append(int(y.min()))
        return fit(x, y)

    result = audit(train, x, y, folds=3)
    assert seen == [0, 0, 0]
    assert result.suggested[7] == true[7]


def test_planted_labels_are_trained_on_in_folds_too() -> None:
    x, y, _ = data(300)
    canaries = Canaries(y, fraction=0.2)
    given = []

    def train(x: Tensor, y: Tensor) -> nn.Module:
        given.append(y)
        return fit(x, y)

    result = audit(train, x, canaries, folds=2)
    assert int((torch.cat(given).bincount() - canaries.targets.bincount()).abs().sum()) == 0
    assert result.recall is not None
    assert result.recall.value > 0.5
    assert result.valid, result.reason


def three(x: Tensor, y: Tensor) -> int:
    return 3


REFUSED: list[tuple[Callable[[Tensor, Tensor], Any], str]] = [
    (lambda x, y: audit("model", x, y), "source must be a module, a TwinRisk or a tensor"),
    (lambda x, y: audit(fit, x, y), "or with folds a function"),
    (lambda x, y: audit(linear(), x[:7], y), "x has 7 examples, but y has 120"),
    (lambda x, y: audit(fit, x[:7], y, folds=2), "x has 7 examples, but y has 120"),
    (lambda x, y: audit(fit, x, y, folds=1), r"folds must be in \[2, 120\], but got 1"),
    (lambda x, y: audit(3, x, y, folds=2), "source must be callable"),
    (lambda x, y: audit(three, x, y, folds=2), "what source returns must be callable"),
    (lambda x, y: audit(linear(), x, y, limit=0), "limit must lie in"),
    (lambda x, y: audit(linear(), x, y, batch_size=0), "batch_size must be positive"),
    (lambda x, y: audit(x[:9], None, y), "rows"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_a_bad_argument_is_refused(call: Callable[..., Any], message: str) -> None:
    x, y, _ = data()
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, y)


def test_the_last_look_of_an_auditor_is_an_audit_of_the_same_outputs() -> None:
    x, y, _ = data()
    canaries = Canaries(y, fraction=0.2)
    auditor = Auditor(canaries)
    outputs = linear()(x)
    auditor.update(torch.arange(N), outputs, canaries.targets)
    found, expected = auditor.result(), audit(outputs, None, canaries)
    np.testing.assert_allclose(found.margin, expected.margin, atol=1e-6)
    assert found.recall == expected.recall
    assert found.looks == expected.looks


@pytest.mark.parametrize(("c", "rate"), [(10, 0.25), (4, 0.3), (3, 0.2)])
def test_planted_labels_are_found_as_often_as_wrong_ones_that_follow_a_pattern(
    c: int, rate: float
) -> None:
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        true = rng.integers(0, c, 2_000)
        wrong = rng.random(len(true)) < rate
        given = np.where(wrong, (true + 1) % c, true)
        noise = (1 - rate) * np.eye(c) + rate * np.roll(np.eye(c), 1, axis=1)
        knows = 0.3 * rng.dirichlet(np.ones(c), len(true)) + 0.7 * np.eye(c)[true]
        canaries = Canaries(torch.from_numpy(given), fraction=0.05, classes=c, seed=seed)
        predictions = torch.from_numpy(knows @ noise)
        result = audit(predictions, None, canaries, probabilities=True)
        assert result.recall is not None
        found.append(result.recall.value - float(result.suspect[wrong].mean()))
    assert np.abs(found).max() < 0.06, found
