"""When an audit may be believed: each kind of labels has its own way to fail, and says so."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk import Auditor, AuditResult, audit

N = 1000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looked_at(
    targets: Tensor, outputs: Tensor, kind: str, *, plant: float = 0.1, follow: float = 0.0
) -> AuditResult:
    """What is found by outputs, of which a share follows the targets that are trained on."""
    auditor = Auditor(targets, kind=kind, plant=plant)
    if follow and kind == "regression":
        outputs = outputs + follow * (auditor.targets - outputs)
    auditor.update(torch.arange(len(targets)), outputs, auditor.targets)
    return auditor.result()


def assert_doubted(result: AuditResult, reason: str) -> None:
    assert not result.valid
    assert re.search(reason, result.reason), result.reason
    assert not result.wrong_share.valid
    assert result.wrong_share.reason == result.reason


def assert_believed(result: AuditResult) -> None:
    assert result.valid, result.reason
    assert result.wrong_share.valid, result.wrong_share.reason


# --- numbers --------------------------------------------------------------------------------------


def numbers(noise: float, *, wrong: int = 0) -> tuple[Tensor, Tensor]:
    """Targets of unit spread and what the best model predicts; the first ones are far off."""
    signal = torch.randn(N, generator=generator())
    y = signal + noise * torch.randn(N, generator=generator(1))
    y[:wrong] += 4
    return y, signal


def test_numbers_that_are_predicted_well() -> None:
    result = looked_at(*numbers(0.2, wrong=40), "regression")
    assert_believed(result)
    assert set(range(40)) <= set(result.suspects())
    assert result.recall is not None
    assert result.recall.value > 0.9


def test_numbers_whose_noise_hides_the_planted_errors() -> None:
    """Errors of one standard deviation, in noise of a half: about one in six is found."""
    result = looked_at(*numbers(0.7, wrong=40), "regression")
    assert_doubted(result, r"recall of the planted labels is 0\.\d\d: errors of a standard dev")
    assert result.recall is not None
    assert result.recall.value < 0.4


def test_numbers_that_are_fitted() -> None:
    result = looked_at(*numbers(0.2), "regression", follow=0.5)
    assert_doubted(result, r"memorization of the planted labels is 0\.5\d, above 0\.2")


def test_numbers_that_are_mostly_predicted_exactly() -> None:
    """Without noise to measure, a difference by rounding would count as an error."""
    y, _ = numbers(0.2)
    outputs = y.clone()
    outputs[:50] += 1e-6
    assert_doubted(looked_at(y, outputs, "regression"), "half of the targets are predicted exactly")
    assert_believed(looked_at(y, y, "regression"))


def test_the_share_of_wrong_numbers_is_not_believed_where_noise_has_a_long_tail() -> None:
    _, signal = numbers(0.0)
    tail = torch.distributions.Laplace(0.0, 0.1)
    torch.manual_seed(0)
    result = looked_at(signal + tail.sample((N,)), signal, "regression")
    assert result.valid  # the ranking is what it is
    assert result.value > 0.02
    assert not result.wrong_share.valid
    assert re.match(
        r"\d+\.\d% of the residuals lie between two and three", result.wrong_share.reason
    )


def test_normal_noise_has_no_long_tail() -> None:
    y = torch.randn(20 * N, generator=generator())
    noise = 0.1 * torch.randn(20 * N, generator=generator(1))
    assert_believed(looked_at(y + noise, y, "regression"))


def test_numbers_of_different_scales_are_planted_each_by_its_own() -> None:
    signal = torch.randn(N, 3, generator=generator()) * torch.tensor([1.0, 1e3, 0.0])
    y = signal + 0.2 * signal.std(0) * torch.randn(N, 3, generator=generator(1))
    auditor = Auditor(y, kind="regression", plant=0.1)
    moved = (auditor.targets - y)[(auditor.targets != y).all(1)].abs()
    sizes = y.double().std(0).float()
    torch.testing.assert_close(moved.median(0).values[:2], sizes[:2], rtol=1e-3, atol=0)
    assert float(moved[0, 2]) > 0  # a number without spread of its own gets that of all
    for follow in (0.0, 0.5):
        result = looked_at(y, signal, "regression", follow=follow)
        assert result.memorization is not None
        assert result.memorization.value == pytest.approx(follow, abs=0.05)
    outputs = signal.clone()
    outputs[:, 0] += 0.9 * (auditor.targets - signal)[:, 0]  # the least of them, and it alone
    auditor.update(torch.arange(N), outputs, auditor.targets)
    (look,) = auditor.result().looks
    assert look.memorization is not None
    assert look.memorization.value == pytest.approx(0.3, abs=0.05)


# --- one logit ------------------------------------------------------------------------------------


def two(share: float) -> Tensor:
    return (torch.rand(N, generator=generator()) < share).long()


def with_flips(y: Tensor, share: float) -> Tensor:
    return torch.where(torch.rand(y.shape, generator=generator(2)) < share, 1 - y, y)


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_two_classes_that_are_known(share: float) -> None:
    y = two(share)
    given = with_flips(y, 0.02)
    result = looked_at(given, 6.0 * y - 3, "binary")
    assert_believed(result)
    np.testing.assert_array_equal(result.suspect, given != y)


def test_a_rare_class_that_is_never_predicted() -> None:
    """Confidence, agreement, recall and memorization are all as they should be."""
    result = looked_at(two(0.05), torch.full((N,), -3.0), "binary")
    assert result.recall is not None
    assert result.memorization is not None
    assert result.recall.value > 0.9
    assert result.memorization.value < 0.1
    assert_doubted(result, "predictions give class 0 only, so that they tell nothing")
    y = two(0.05)
    result = looked_at(y, F.one_hot(torch.zeros_like(y), 2) * 3.0, "classes")
    assert_doubted(result, "predictions give class 0 only, so that they tell nothing")


def test_a_rare_class_that_is_hardly_ever_predicted() -> None:
    y = two(0.1)
    outputs = torch.full((N,), -3.0)
    outputs[y.nonzero().squeeze(1)[:8]] = 3.0
    assert_doubted(
        looked_at(y, outputs, "binary"),
        r"give back fewer than 20% of the labels of class 1, which (\d+) of \1 suspects are of",
    )


def test_most_planted_labels_are_missed() -> None:
    """Predictions lean to one class, and call the other one right wherever it is given."""
    y = two(0.5)
    auditor = Auditor(y, kind="binary", plant=0.2)
    # Of 1s it knows a half; where it does not, the planted 0 is found right.
    outputs = torch.where((y == 1) & (torch.arange(N) % 8 < 7), 3.0, -3.0)
    outputs = torch.where(auditor.targets != y, 6.0 * auditor.targets - 3, outputs)
    auditor.limit = 2.0
    auditor.update(torch.arange(N), outputs, auditor.targets)
    assert_doubted(auditor.result(), "recall of the planted labels is 0.00: most wrong labels")


# --- several labels -------------------------------------------------------------------------------


def test_several_labels_that_are_all_known() -> None:
    y = torch.stack([two(0.5), two(0.1), two(0.3)], 1)
    result = looked_at(with_flips(y, 0.03), 6.0 * y - 3, "multilabel")
    assert_believed(result)


def test_a_label_of_several_that_is_not_known() -> None:
    y = torch.stack([two(0.5), two(0.2), two(0.3)], 1)
    outputs = 6.0 * y - 3
    outputs[:, 1] = 0.2 * torch.randn(N, generator=generator(3))  # of which nothing was learned
    result = looked_at(with_flips(y, 0.03), outputs, "multilabel")
    assert_doubted(
        result, r"unsure of label 1, which \d+ of \d+ suspects are of: predictions have a"
    )


def test_a_rare_label_of_several_that_is_never_predicted() -> None:
    y = torch.stack([two(0.5), two(0.1), two(0.3)], 1)
    outputs = 6.0 * y - 3
    outputs[:, 1] = -3
    result = looked_at(y, outputs, "multilabel")
    assert_doubted(result, r"unsure of label 1, .*: predictions give class 0 only")


def test_a_label_that_hardly_adds_suspects_does_no_harm() -> None:
    y = torch.stack([two(0.5), (torch.arange(N) < 3).long(), two(0.3)], 1)
    outputs = 6.0 * y - 3
    outputs[:, 1] = -3  # three suspects of a label that is never predicted
    assert_believed(
        looked_at(
            with_flips(y, 0.05) * y.new_tensor([1, 0, 1]) + y * y.new_tensor([0, 1, 0]),
            outputs,
            "multilabel",
        )
    )


# --- tokens ---------------------------------------------------------------------------------------


def sentences() -> Tensor:
    """Mostly the class of words that are nothing, and two others."""
    y = torch.zeros(200, 10, dtype=torch.long)
    y[::2, 2], y[1::4, 5] = 1, 2
    y[::3, 8:] = -100
    return y


def logits(y: Tensor) -> Tensor:
    return 6.0 * F.one_hot(y.clamp_min(0), 3)


def test_tokens_that_are_known() -> None:
    y = sentences()
    given = y.clone()
    given[10:20, 0] = 2
    result = looked_at(given, logits(y), "tokens")
    assert_believed(result)
    assert set(result.example[result.suspect]) == set(range(10, 20))


def test_tokens_of_which_only_the_common_class_is_known() -> None:
    y = sentences()
    found = torch.where(y == 2, y, 0)
    found[0, 2] = 1
    assert_doubted(
        looked_at(y, logits(found), "tokens"),
        "fewer than 20% of the labels of class 1, which 99 of",
    )
    assert_doubted(looked_at(y, logits(0 * y), "tokens"), "predictions give class 0 only")


def test_errors_of_one_sentence_are_not_independent() -> None:
    y = sentences()[:, :8]
    alone, together = y.clone(), y.clone()
    alone[:40, 0] = 2
    together[:5, :8] = torch.where(y[:5] == 2, 0, 2)
    errors = [looked_at(given, logits(y), "tokens").standard_error for given in (alone, together)]
    assert errors[1] > 2 * errors[0]
    # as of 200 sentences, 5 of which are wrong
    assert errors[1] == pytest.approx((5 / 200 * 195 / 200 / 200) ** 0.5, rel=0.1)


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_of_which_some_are_swapped() -> None:
    y = two(0.5)
    result = looked_at(with_flips(y, 0.2), 4.0 * y - 2, "preferences")
    assert_believed(result)
    assert result.value == pytest.approx(0.2, abs=0.03)


def test_pairs_that_are_told_by_their_order() -> None:
    """Whoever labelled them took the first where it was not sure."""
    y = two(0.5)
    given = torch.where(torch.rand(N, generator=generator(2)) < 0.2, 1, y)
    result = looked_at(given, 4.0 * y - 2, "preferences")
    assert_doubted(
        result, r"unsure: 1\d% of the pairs whose first is said to be better are suspect, and 0% of"
    )


def test_pairs_of_which_too_little_is_known() -> None:
    y = two(0.5)
    known = torch.rand(N, generator=generator(3)) < 0.05
    guess = torch.where(known, y, two(0.5)[torch.randperm(N, generator=generator(4))])
    result = looked_at(y, 4.0 * guess - 2, "preferences")
    assert_doubted(result, r"agree with 5\d% of the labels, and either is below")


def test_pairs_that_are_fitted() -> None:
    y = two(0.5)
    auditor = Auditor(y, kind="preferences", plant=0.1)
    auditor.update(torch.arange(N), 4.0 * auditor.targets - 2, auditor.targets)
    assert_doubted(auditor.result(), "memorization of the planted labels is 0.7")


def test_predictions_that_did_not_see_the_labels_are_judged_likewise() -> None:
    y = two(0.05).numpy()

    def train(x: Tensor, y: Tensor) -> torch.nn.Module:
        return torch.nn.Identity()

    x = torch.full((N,), -3.0)
    assert_doubted(
        audit(train, x, torch.as_tensor(y), kind="binary", folds=3), "predictions give class 0 only"
    )
