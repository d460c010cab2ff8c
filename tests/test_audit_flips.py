"""The share of flipped pairs, from what was predicted before they were trained on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from poprisk import Auditor, audit
from poprisk.audit.flips import FEWEST, MOST_SPREAD, OFF, flip_rate
from poprisk.audit.noise import Floats
from poprisk.audit.rate import Rate
from poprisk.audit.result import AuditResult

N = 3000


def margins(n: int, distance: float, share: float, seed: int) -> tuple[Floats, Floats]:
    """Normal margins of pairs, and a sign for each: -1 where it is flipped."""
    g = np.random.default_rng(seed)
    m = 0.1 * g.normal(distance / 2, 1.0, n)
    sign = np.where(g.random(n) < share, -1.0, 1.0)
    return m * sign, sign


def sampling_error(rate: Rate) -> float:
    """Without what the curve itself may be off by."""
    return float((rate.standard_error**2 - OFF**2) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_the_share_is_right_on_average(share: float) -> None:
    found = [flip_rate(margins(N, 3.0, share, seed)[0]) for seed in range(8)]
    values = np.array([rate.value for rate in found])
    errors = np.array([sampling_error(rate) for rate in found])
    assert abs(values.mean() - share) < 0.02
    assert all(rate.valid for rate in found)
    assert (np.abs(values - share) < 3 * errors + 0.001).all()
    assert errors.max() < (0.03 if share < 0.4 else MOST_SPREAD)


def test_errors_of_the_run_are_not_counted_as_flips() -> None:
    """One in six margins is negative though no pair is flipped."""
    m, _ = margins(N, 2.0, 0.0, 0)
    assert (m < 0).mean() > 0.14
    assert flip_rate(m).value < 0.01


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_a_run_that_knows_too_little_says_so(share: float) -> None:
    rate = flip_rate(margins(640, 0.7, share, 1)[0])
    assert not rate.valid
    assert rate.standard_error > MOST_SPREAD
    assert "does not know even the clearest pairs" in rate.reason
    low, high = rate.interval
    assert low <= share <= high


def test_more_pairs_tell_more() -> None:
    found = [flip_rate(margins(n, 2.0, 0.3, 0)[0]) for n in (300, 3000, 30000)]
    errors = [sampling_error(rate) for rate in found]
    assert all(b < a / 2 for a, b in pairwise(errors))


def test_neither_scale_nor_what_is_missing_matters() -> None:
    m, _ = margins(640, 3.0, 0.2, 0)
    rate = flip_rate(m)
    scaled = flip_rate(np.concatenate([1e-3 * m, np.zeros(9), [np.nan, np.inf, -np.inf]]))
    assert scaled == pytest.approx(rate)
    few = flip_rate(m[: FEWEST - 1])
    assert np.isnan(few.value)
    assert not few.valid
    assert few.reason.startswith(f"{FEWEST - 1} pairs have a margin")
    assert flip_rate(m[:FEWEST]).value < 0.5


def test_margins_that_all_agree_are_of_no_flips() -> None:
    rate = flip_rate(np.full(1000, 40.0))
    assert rate.valid
    assert rate.value < 0.002


def watched(*looks: Floats, plant: float = 0.05) -> AuditResult:
    """What an auditor of pairs, all given as 1, makes of logits."""
    auditor = Auditor(torch.ones(N, dtype=torch.long), kind="preferences", plant=plant)
    for look in looks:
        for rows in torch.arange(N).split(500):
            auditor.update(rows, torch.from_numpy(look)[rows].float(), auditor.targets[rows])
    return auditor.result()


def test_an_audit_takes_the_pass_before_pairs_were_trained_on() -> None:
    m, sign = margins(N, 3.0, 0.3, 0)
    auditor = Auditor(torch.ones(N, dtype=torch.long), kind="preferences")
    trained = np.where(auditor.targets.numpy() == 1, 1.0, -1.0)  # what every pair was trained on
    result = watched(m, m + 9 * trained, m + 9 * trained)
    assert result.flip_rate is not None
    assert result.flip_rate.value == pytest.approx((sign < 0).mean(), abs=0.03)
    assert result.flip_rate.valid
    alone = flip_rate(m)
    assert result.flip_rate.value == pytest.approx(alone.value, abs=0.003)  # half precision
    assert watched(m).flip_rate == result.flip_rate


def test_large_margins_are_not_lost_in_half_precision() -> None:
    m, sign = margins(N, 3.0, 0.2, 0)
    result = watched(25 * m, plant=0)  # up to 14
    assert result.flip_rate is not None
    assert result.flip_rate.value == pytest.approx((sign < 0).mean(), abs=0.02)


def test_outputs_of_pairs_that_were_trained_on_tell_no_share() -> None:
    m, _ = margins(N, 3.0, 0.2, 0)
    y = torch.ones(N, dtype=torch.long)
    found = audit(torch.from_numpy(m).float(), None, y, kind="preferences")
    assert found.flip_rate is not None
    assert not found.flip_rate.valid
    assert "no first pass over the pairs" in found.flip_rate.reason
    classes = audit(torch.eye(2)[1 - y], None, 1 - y, classes=2, probabilities=True)
    assert classes.flip_rate is None


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_margins_of_the_wrong_sign_are_no_flips(share: float) -> None:
    rng = np.random.default_rng(0)
    right = rng.normal(size=640) + 2
    margins = right * np.where(rng.random(640) < share, -1, 1)
    assert flip_rate(margins).valid
    rate = flip_rate(-margins)  # as of a run that saw the flipped ones first
    assert not rate.valid
    assert "signs" in rate.reason


def test_a_curve_that_matches_to_a_hundredth_is_believed_of_any_number_of_pairs() -> None:
    rng = np.random.default_rng(1)
    margins = (rng.laplace(size=100_000) + 1.5) * np.where(rng.random(100_000) < 0.2, -1, 1)
    rate = flip_rate(margins)
    assert rate.valid
    assert abs(rate.value - 0.2) < 0.05
