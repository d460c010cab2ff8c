"""Canaries know what they planted; the bound is the published formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk import Canaries
from samplers import randn

N, K = 1000, 10


def labels() -> Tensor:
    return torch.arange(N) % K


def predicting(classes: Tensor) -> Tensor:
    return F.one_hot(classes, K).double()


def test_exactly_the_fraction_is_replaced_and_nothing_else() -> None:
    y = labels()
    canaries = Canaries(y, fraction=0.3)
    assert torch.equal(y, labels())
    assert len(canaries.index) == len(canaries.index.unique()) == 300
    others = torch.ones(N, dtype=torch.bool)
    others[canaries.index] = False
    assert torch.equal(canaries.targets[others], y[others])
    assert torch.equal(canaries.original, y[canaries.index])
    kept = (canaries.targets[canaries.index] == canaries.original).double().mean()
    assert float(kept) == pytest.approx(1 / K, abs=4 * math.sqrt(0.09 / 300))


def test_the_same_seed_repeats_and_another_does_not() -> None:
    a, b, c = (Canaries(labels(), seed=s) for s in (0, 0, 1))
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.index, b.index)
    assert not torch.equal(a.index, c.index)


def certain(classes: Tensor) -> Tensor:
    return 50 * predicting(classes)


def test_all_memorized_is_one_and_none_is_zero_on_average() -> None:
    """A model that never saw the canaries has its own opinion of each, right or wrong."""
    y = labels()
    opinion = predicting(y) + randn(N, K)
    rates = []
    for seed in range(60):
        canaries = Canaries(y, fraction=0.1, seed=seed)
        assert canaries.memorization(certain(canaries.targets)).value == pytest.approx(1)
        assert canaries.memorization(certain(y)).value == pytest.approx(0)
        found = canaries.memorization(opinion)
        rates.append(found.value / found.standard_error)
    z = torch.tensor(rates, dtype=torch.float64)
    assert abs(float(z.mean())) < 3 / math.sqrt(60)
    assert 0.6 < float(z.std()) < 1.4


def test_the_label_is_compared_with_other_wrong_ones() -> None:
    y = torch.arange(400) % 4
    canaries = Canaries(y, fraction=0.5)
    p = torch.full((400, 4), 0.15, dtype=torch.float64)
    p[torch.arange(400), canaries.targets] = 0.2
    p[torch.arange(400), y] = 0.5
    found = canaries.memorization(p.log())
    assert found.value == pytest.approx(0.2 - 0.15)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_of_two_classes_chance_is_taken_off() -> None:
    canaries = Canaries(torch.arange(N) % 2, fraction=0.1)
    p = torch.full((N, 2), 0.3, dtype=torch.float64)
    p[torch.arange(N), canaries.targets] = 0.7
    assert canaries.memorization(p.log()).value == pytest.approx(0.4)


def test_half_memorized_is_half() -> None:
    canaries = Canaries(labels(), fraction=0.5)
    half = labels()
    first = canaries.index[:250]
    half[first] = canaries.targets[first]
    found = canaries.memorization(certain(half))
    assert found.value == pytest.approx(0.5, abs=3 * found.standard_error)
    assert (found.sacrificed, found.cost) == (0.5, 0.0)


def test_what_is_not_logits_is_refused() -> None:
    canaries = Canaries(labels())
    with pytest.raises(ValueError, match=r"logits, but got probabilities: .* logarithms"):
        canaries.memorization(randn(N, K).softmax(1))
    with pytest.raises(ValueError, match=r"shape \(m, 10\), but got \(20, 7\)"):
        canaries.memorization(randn(N, 7))


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_numbers_have_the_share_of_the_noise(shape: tuple[int, ...], share: float) -> None:
    y = 5 + 3 * randn(*shape)
    canaries = Canaries(y, fraction=0.2, spread=0.5)
    noise = canaries.targets - y
    for size in noise[canaries.index].abs():
        torch.testing.assert_close(size, 0.5 * y.std(0))
    found = canaries.memorization(y + share * noise)
    assert found.value == pytest.approx(share)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_outputs_of_the_canaries_alone_will_do() -> None:
    canaries = Canaries(labels(), fraction=0.1)
    outputs = randn(N, K)
    whole = canaries.memorization(outputs)
    assert canaries.memorization(outputs[canaries.index]) == whole
    with pytest.raises(ValueError, match=r"the 100 canaries .* of all 1000 .* but got 7 rows"):
        canaries.memorization(outputs[:7])


@pytest.mark.parametrize("y", [labels(), randn(N), randn(N, 2)], ids=["classes", "(n,)", "(n, 2)"])
def test_batches_are_relabelled_as_the_whole_is(y: Tensor) -> None:
    canaries = Canaries(y, fraction=0.2)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for part in index.split(64):
        assert torch.equal(canaries.relabel(y[part], part), canaries.targets[part])


def test_the_bound_is_the_published_one() -> None:
    y = torch.arange(20_000) % 2
    canaries = Canaries(y, fraction=0.25)
    wrong = y.clone()
    wrong[::10] = 1 - wrong[::10]
    found = canaries.error_bound(F.one_hot(wrong, 2).double(), confidence=0.9)
    m, n, k = 5000, 15_000, 2
    others = torch.ones(20_000, dtype=torch.bool)
    others[canaries.index] = False
    fitted = float((wrong != y)[others].double().mean())
    planted = float((wrong != canaries.targets)[canaries.index].double().mean())
    expected = fitted + (k - 1) * (1 - k / (k - 1) * planted)
    c = 2 * k + math.sqrt(k) + m / (n * math.sqrt(k))
    slack = c * math.sqrt(math.log(4 / (1 - 0.9)) / (2 * m))
    assert found.expected == pytest.approx(expected)
    assert found.value == pytest.approx(expected + slack)
    assert (found.valid, found.reason, found.sacrificed) == (True, "", 0.25)
    assert found.expected == pytest.approx(0.1, abs=3 * found.standard_error)


def test_a_bound_that_says_nothing_is_flagged() -> None:
    found = Canaries(labels()).error_bound(predicting(labels()))
    assert not found.valid
    assert found.reason == "vacuous: 20 canaries are too few for 10 classes"


def test_one_canary_is_flagged() -> None:
    found = Canaries(labels(), fraction=0.001).memorization(certain(labels()))
    assert not found.valid


@pytest.mark.parametrize(
    ("targets", "settings", "error", "message"),
    [
        (labels().tolist(), {}, TypeError, "targets must be a tensor of labels, but got list"),
        (labels().reshape(10, 100), {}, TypeError, r"must have shape \(n,\), but got \(10, 100\)"),
        (labels()[:20], {}, ValueError, r"fraction=0.02 of 20 labels makes 0 canaries"),
        (labels(), {"fraction": 1.0}, ValueError, "makes 1000 canaries"),
        (labels(), {"fraction": 0}, ValueError, "fraction must lie in"),
        (labels(), {"spread": 0}, ValueError, "spread must lie in"),
        (labels(), {"classes": 5}, ValueError, r"but got 0..9 and classes=5"),
        (labels() * 0, {}, ValueError, "at least two classes"),
        (labels() - 1, {}, ValueError, r"but got -1..8"),
        (labels() + 1, {}, ValueError, "1 of the labels 0..10 never occur.*begin with 0"),
        (labels().where(labels() > 0, 255), {}, ValueError, "ignore_index=255"),
        (labels() // 5 * 2.0 - 1, {}, ValueError, r"only -1 and 1 as .*\(targets > 0\)\.long"),
        (labels() // 5 * 1.0, {}, ValueError, "only 0 and 1 as"),
        (randn(N, 3).softmax(1), {}, ValueError, r"probabilities.*argmax\(1\)"),
    ],
)
def test_bad_arguments_are_refused(
    targets: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Canaries(targets, **settings)


def test_a_bound_that_does_not_apply_is_refused() -> None:
    with pytest.raises(ValueError, match="the bound is for classes"):
        Canaries(randn(N)).error_bound(randn(N))
    with pytest.raises(ValueError, match=r"whole training set, \(1000, 10\), but got \(20, 10\)"):
        Canaries(labels()).error_bound(randn(20, 10))
