"""Scores of labels: against the naive ones, and what must hold of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from poprisk.audit import scores
from poprisk.audit.noise import error_pattern, noise_matrix, unmix
from poprisk.audit.rate import share_of
from poprisk.audit.scores import (
    _between,
    fit_noise,
    fit_residuals,
    normalized_margin,
    posterior_margin,
    ranking,
)
from reference import audit as naive

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def labels_and_predictions(
    *, n: int = 200, c: int = 4, pairs: float = 0.0, even: float = 0.2, seed: int = 0
) -> tuple[Floats, Integers, Integers]:
    """Predictions for given labels, the given and the true ones."""
    rng = np.random.default_rng(seed)
    true = rng.integers(c, size=n)
    given = true.copy()
    swapped = rng.random(n) < pairs
    given[swapped] = (true[swapped] + 1) % c
    random = rng.random(n) < even
    given[random] = rng.integers(c, size=int(random.sum()))
    logits = 2.0 * rng.normal(size=(n, c))
    logits[np.arange(n), true] += 4
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    matrix = (1 - pairs) * np.eye(c) + pairs * np.roll(np.eye(c), 1, axis=1)
    return p @ ((1 - even) * matrix + even / c), given, true


CASES = [
    {"pairs": 0.0, "even": 0.2},
    {"pairs": 0.3, "even": 0.05},
    {"pairs": 0.0, "even": 0.3, "c": 2},
    {"pairs": 0.2, "even": 0.0, "c": 3, "n": 30},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_noise_aware_score_is_the_naive_one(case: dict[str, float]) -> None:
    p, y, _ = labels_and_predictions(**case)  # pyrefly: ignore
    model = fit_noise(p, y)
    margin, _ = model.margin(p, y)
    expected, suspect = naive.noise_aware(p.tolist(), y.tolist())
    np.testing.assert_allclose(margin + model.threshold, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(margin < 0, suspect)
    assert model.matrix is not None
    np.testing.assert_allclose(posterior_margin(p, y, model.matrix), expected, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_score_is_the_normalized_margin(case: dict[str, float]) -> None:
    p, y, _ = labels_and_predictions(**case)  # pyrefly: ignore
    model = fit_noise(p, y, structure=False)
    margin, rival = model.margin(p, y)
    expected = [naive.normalized_margin(row, k) for row, k in zip(p.tolist(), y, strict=True)]
    np.testing.assert_allclose(margin, expected, atol=1e-12)
    np.testing.assert_array_equal(margin < 0, p.argmax(1) != y)
    np.testing.assert_array_equal(rival[margin < 0], p.argmax(1)[margin < 0])
    assert model.disagreement == np.mean(p.argmax(1) != y)
    np.testing.assert_array_equal(normalized_margin(p, y), margin)


@pytest.mark.parametrize("structure", [True, False])
def test_quality_orders_as_the_margin_and_halves_at_suspicion(structure: bool) -> None:
    p, y, _ = labels_and_predictions(pairs=0.2)
    model = fit_noise(p, y, structure=structure)
    margin, _ = model.margin(p, y)
    quality = model.quality(margin)
    assert quality.min() >= 0
    assert quality.max() <= 1
    np.testing.assert_array_equal(quality < 0.5, margin < 0)
    order = np.argsort(margin)
    assert (np.diff(quality[order]) >= 0).all()
    np.testing.assert_array_equal(np.argsort(order), ranking(margin))


@pytest.mark.parametrize("structure", [True, False])
def test_predictions_that_are_right_leave_no_suspect(structure: bool) -> None:
    y = np.arange(40) % 4
    p = np.full((40, 4), 0.02)
    p[np.arange(40), y] = 0.94
    model = fit_noise(p, y, structure=structure)
    assert not (model.margin(p, y)[0] < 0).any()
    assert model.disagreement == 0


@pytest.mark.parametrize(("suspects", "found"), [(1, 2), (0.6, 0), (2.0, 2), (2.4, 2), (9.0, 10)])
def test_equal_margins_are_suspect_together(suspects: float, found: int) -> None:
    rounding = 1e-15 * np.arange(10, dtype=np.float64)
    ordered = np.concatenate([np.full(2, -1.0), np.full(8, 3.0)]) + rounding
    assert _between(ordered, suspects) == found


def test_few_wrong_labels_among_equal_margins_are_the_only_suspects() -> None:
    y = np.arange(4_000) % 4
    p = np.where(np.eye(4)[y] > 0, 0.94, 0.02)
    wrong = np.arange(0, 4_000, 100)
    y[wrong] = (y[wrong] + 1) % 4
    model = fit_noise(p, y)
    np.testing.assert_array_equal(np.flatnonzero(model.margin(p, y)[0] < 0), wrong)


def test_labels_that_are_all_wrong_are_all_suspect() -> None:
    y = np.arange(40) % 4
    p = np.full((40, 4), 0.02)
    p[np.arange(40), (y + 1) % 4] = 0.94
    model = fit_noise(p, y)
    assert (model.margin(p, y)[0] < 0).all()


@pytest.mark.parametrize("structure", [True, False])
def test_renaming_classes_renames_results(structure: bool) -> None:
    p, y, _ = labels_and_predictions(pairs=0.3, even=0.05)
    names = np.array([2, 0, 3, 1])  # class j is called names[j]
    renamed = np.empty_like(p)
    renamed[:, names] = p
    model, other = (
        fit_noise(p, y, structure=structure),
        fit_noise(renamed, names[y], structure=structure),
    )
    margin, rival = model.margin(p, y)
    margin_other, rival_other = other.margin(renamed, names[y])
    np.testing.assert_allclose(margin_other, margin, atol=1e-9)
    np.testing.assert_array_equal(rival_other, names[rival])


def test_reordering_examples_reorders_results() -> None:
    p, y, _ = labels_and_predictions(pairs=0.3)
    order = np.random.default_rng(1).permutation(len(y))
    margin, _ = fit_noise(p, y).margin(p, y)
    np.testing.assert_allclose(
        fit_noise(p[order], y[order]).margin(p[order], y[order])[0], margin[order]
    )


def test_a_pattern_is_found_where_labels_follow_one() -> None:
    p, y, true = labels_and_predictions(n=2000, pairs=0.3, even=0.0)
    model = fit_noise(p, y)
    assert model.matrix is not None
    off = model.matrix - np.diag(model.matrix.diagonal())
    assert (off.argmax(1) == (np.arange(4) + 1) % 4).all()
    assert (off.max(1) > 0.6 * off.sum(1)).all()
    found = {}
    for structure in (True, False):
        suspect = fit_noise(p, y, structure=structure).margin(p, y)[0] < 0
        found[structure] = np.mean(suspect == (y != true))
    assert found[True] > found[False]


def test_rates_that_differ_by_chance_are_one_rate_and_others_are_kept() -> None:
    alike = noise_matrix(np.array([[90.0, 10], [13, 87]]))
    np.testing.assert_allclose(alike.diagonal(), alike[0, 0])
    one_way = noise_matrix(np.array([[700.0, 300], [5, 995]])).diagonal()
    np.testing.assert_allclose(one_way, [0.7, 0.995], atol=0.005)


def test_errors_at_random_have_no_pattern() -> None:
    counts = np.array([[80.0, 10, 10, 10], [9, 90, 11, 10], [12, 9, 90, 10], [10, 10, 10, 80]])
    matrix = noise_matrix(counts)
    for j, row in enumerate(matrix):
        off = np.delete(row, j)
        np.testing.assert_allclose(off, off.mean())
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert (matrix > 0).all()


@pytest.mark.parametrize("structure", [True, False])
def test_labels_are_caught_that_would_be_suspect_among_the_others(structure: bool) -> None:
    p, y, _ = labels_and_predictions(pairs=0.3, even=0.1)
    model = fit_noise(p, y, structure=structure)
    scored = model.margin(p, y)[0]
    other = (y + np.random.default_rng(2).integers(1, 4, len(y))) % 4
    margin = model.margin(p, other)[0]
    likeliest = model.likeliest(p)
    suspects = int((scored < 0).sum())
    caught = model.catches(p, other)
    for i in np.flatnonzero(likeliest != other):
        place = int((scored < margin[i]).sum())  # among the others and itself
        assert caught[i] == (place < suspects + 1)
    agree = likeliest == other
    np.testing.assert_array_equal(caught[agree], margin[agree] < 0)


def test_a_class_that_is_never_predicted_has_the_rate_of_all() -> None:
    counts = np.array([[90.0, 10, 0], [10, 90, 0], [0, 0, 0]])
    matrix = noise_matrix(counts)
    assert 1 - matrix[2, 2] == pytest.approx(20.5 / 201)
    assert matrix[2, 0] == matrix[2, 1]


def test_noise_that_was_mixed_in_is_removed() -> None:
    matrix = np.array([[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.2, 0.0, 0.8]])
    pi = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    found = unmix(pi @ matrix, matrix)
    before, after = np.abs(pi @ matrix - pi).max(), np.abs(found - pi).max()
    assert after < 0.15 * before
    np.testing.assert_allclose(unmix(pi, np.eye(3)), pi)
    expected = [naive.unmixed(q, matrix.tolist()) for q in (pi @ matrix).tolist()]
    np.testing.assert_allclose(found, expected)


def test_blocks_of_examples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    p, y, _ = labels_and_predictions(pairs=0.3)
    whole = fit_noise(p, y)
    monkeypatch.setattr(scores, "BLOCK", 7)
    parts = fit_noise(p, y)
    np.testing.assert_allclose(parts.margin(p, y)[0], whole.margin(p, y)[0], atol=1e-9)
    assert parts.expected == pytest.approx(whole.expected)


def test_half_precision_tensors_are_taken() -> None:
    p, y, _ = labels_and_predictions(pairs=0.3)
    exact = fit_noise(p, y).margin(p, y)[0] < 0
    half = torch.from_numpy(p).half()
    assert np.mean((fit_noise(half, y).margin(half, y)[0] < 0) == exact) > 0.99


def test_residuals_in_units_of_the_noise() -> None:
    rng = np.random.default_rng(0)
    u, noise = rng.normal(size=(4001, 2)), rng.normal(size=(4001, 2)) * [1.0, 5.0]
    noise[7] = [0.0, 40.0]
    model = fit_residuals(u, u + noise)
    np.testing.assert_allclose(model.sigma, [1, 5], rtol=0.05)
    margin = model.margin(u, u + noise)
    r = np.abs(noise / model.sigma).max(1)
    np.testing.assert_allclose(margin, model.limit - r)
    np.testing.assert_array_equal(model.quality(margin) < 0.5, r > model.limit)
    assert margin.argmin() == 7
    assert model.quality(margin).min() > 0


@pytest.mark.parametrize("k", [1, 2, 50])
def test_as_much_normal_noise_is_suspect_however_many_numbers_a_target_has(k: int) -> None:
    noise = np.random.default_rng(k).normal(size=(200_000, k))
    model = fit_residuals(np.zeros_like(noise), noise)
    share = float((model.margin(np.zeros_like(noise), noise) < 0).mean())
    assert share == pytest.approx(0.0027, abs=0.0006)
    assert (model.limit == 3) is (k == 1)


def test_residuals_of_an_exact_fit() -> None:
    y = np.array([[0.0], [1.0], [2.0], [9.0]])
    u = np.array([[0.0], [1.0], [2.0], [3.0]])
    margin = fit_residuals(u, y).margin(u, y)
    np.testing.assert_array_equal(margin, [3, 3, 3, -np.inf])
    assert fit_residuals(u, y).quality(margin)[3] == 0


def test_a_share_of_groups_has_the_error_of_groups() -> None:
    """Copies of each case add nothing; cases of their own groups are independent."""
    rng = np.random.default_rng(0)
    found = rng.random(500) < 0.2
    alone = share_of(found)
    copies = share_of(np.repeat(found, 8), groups=np.repeat(np.arange(500), 8))
    assert copies.value == alone.value
    assert copies.standard_error == pytest.approx(alone.standard_error, rel=0.02)
    assert share_of(found, groups=np.arange(500)) == alone
    assert share_of(found, groups=np.zeros(500, np.int64)).standard_error == np.inf
    assert share_of(np.zeros(20, bool), groups=np.arange(20) // 2).standard_error > 0


def test_a_weighted_share() -> None:
    found = np.array([True, True, False, False])
    assert share_of(found).value == 0.5
    assert share_of(found, np.array([3.0, 0, 1, 0])).value == 0.75
    whole, some = share_of(found), share_of(found, np.array([1.0, 0, 1, 0]))
    assert some.standard_error > whole.standard_error
    assert not share_of(found[:0]).valid
    low, high = share_of(np.ones(5, bool)).interval
    assert 0 < low < high == 1


def test_the_pattern_of_errors_is_without_the_even_spread() -> None:
    counts = np.array([[700.0, 100.0, 0.0], [0.0, 800.0, 0.0], [40.0, 40.0, 720.0]])
    pattern = error_pattern(noise_matrix(counts))
    np.testing.assert_allclose(pattern.sum(1) - pattern.diagonal(), 1.0)
    assert pattern[0, 1] > 0.98
    np.testing.assert_allclose(pattern[[1, 1, 2, 2], [0, 2, 0, 1]], 0.5, atol=0.02)
