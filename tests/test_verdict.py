"""The verdict: its statistics by hand, and its sentences for every outcome of a comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from poprisk.intervals import Interval, student_quantile, t_interval
from poprisk_lab import wording
from poprisk_lab.convergence import still_improving
from poprisk_lab.results import RunData
from poprisk_lab.verdict import Row, Verdict, judge
from poprisk_lab.wording import (
    BEATEN,
    MASK_ALONE,
    NO_REFERENCE,
    SMALLER_STEP,
    STEP_ALONE,
    TOO_FEW,
    WRONG_WEIGHTS,
    Rivals,
    Scale,
    compared,
    headline,
    scale_of,
)

NAN = math.nan
ACCURACY = {"name": "accuracy", "higher_is_better": True, "percent": True}
ERROR = {"name": "mean squared error", "higher_is_better": False, "percent": False}
POINTS, MSE = Scale("accuracy", True, True), Scale("mean squared error", False, False)

Finals = Sequence[float | None]


def arm(name: str, family: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "label": f"label of {name}", "family": family, "settings": settings}


ARMS = [
    arm("poprisk", "poprisk"),
    arm("low", "adamw", lr=3e-4, weight_decay=0.01),
    arm("mid", "adamw", lr=1e-3, weight_decay=0.01),
    arm("high", "adamw", lr=3e-3, weight_decay=1.0),
    arm("stopped-low", "early-stopping"),
    arm("stopped-high", "early-stopping"),
    arm("rms-matched", "rms-matched"),
    arm("shuffled", "shuffled"),
]


def end(final: float, **more: Any) -> dict[str, Any]:
    values = {
        "final_metric": final,
        "final_memorized": None,
        "best_metric": final,
        "held_out_best": None,
        "stopped_metric": None,
    }
    return {**values, **more}


def comparison(
    finals: Mapping[str, Finals],
    *,
    metric: Mapping[str, Any] = ACCURACY,
    more: Mapping[tuple[str, int], dict[str, Any]] | None = None,
) -> RunData:
    """Record of the arms named, with one final metric a seed; None: not finished."""
    seeds = max(len(values) for values in finals.values())
    ends = {
        (name, seed): end(value, **(more or {}).get((name, seed), {}))
        for name, values in finals.items()
        for seed, value in enumerate(values)
        if value is not None
    }
    config = {
        "task": {"metric": dict(metric)},
        "arms": [a for a in ARMS if a["name"] in finals],
        "seeds": list(range(seeds)),
    }
    return RunData(config, {}, [], ends)


def row_of(verdict: Verdict, family: str) -> Row:
    return next(r for r in verdict.rows if r.family == family)


EXPLAINED = {SMALLER_STEP, WRONG_WEIGHTS, STEP_ALONE, MASK_ALONE, BEATEN, TOO_FEW}
EXPLAINED |= {wording.UNDECIDED}


def explained(verdict: Verdict) -> list[str]:
    """Warnings about what the controls explain."""
    return [w for w in verdict.warnings if w in EXPLAINED or w.startswith("So far")]


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 4.0], [0.1 * i**2 for i in range(10)], [-3.0, 5.0, 1e3]]
)
def test_an_interval_is_student_s(values: list[float]) -> None:
    n = len(values)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=error)
    assert t_interval(values)[:3] == pytest.approx((sum(values) / n, low, high))


def test_an_interval_by_hand() -> None:
    """Three values: t = 4.3027 at two degrees of freedom, standard error 1 / sqrt(3)."""
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval[:3] == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), rel=1e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 99, 1000])
def test_student_s_quantile(df: int) -> None:
    for p in (0.5, 0.8, 0.975, 0.999):
        assert student_quantile(p, df) == pytest.approx(float(stats.t.ppf(p, df)), abs=1e-9)


@pytest.mark.parametrize("values", [[0.7], [0.6, 0.8], [0.8, 0.8], [0.0, 0.0]])
def test_fewer_than_three_values_have_no_interval(values: list[float]) -> None:
    few, none = t_interval(values), t_interval([])
    assert few.mean == pytest.approx(sum(values) / len(values))
    assert few.values == tuple(values)
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert few.few
    assert few.sign == 0
    assert not few.known
    assert all(math.isnan(v) for v in none[:3])
    assert not none.few


def test_seeds_that_agree_exactly_tell_nothing_until_there_are_many() -> None:
    """Six that all go one way: 2 · 0.5⁶ = 3%."""
    assert t_interval([0.1] * 5).sign == 0
    assert t_interval([0.1] * 6).sign == 1
    assert t_interval([-0.1] * 6).sign == -1
    assert t_interval([0.0] * 9).sign == 0
    assert t_interval([0.1, 0.1, 0.100001]).sign == 1
    assert Interval(0.1, 0.1, 0.1).sign == 1


def test_an_interval_is_cut_to_what_can_be() -> None:
    wide = t_interval([0.9, 0.99, 0.8])
    assert wide.high > 1
    assert wide.clipped(0.0, 1.0)[:3] == (wide.mean, wide.low, 1.0)
    assert Interval(1.2, 0.9, 1.5).clipped(0.0, 1.0) == Interval(1.2, 0.9, 1.5)


@pytest.mark.parametrize(
    ("low", "high", "more_is_better", "less_is_better"),
    [
        (0.01, 0.03, "better", "worse"),
        (-0.03, -0.01, "worse", "better"),
        (-0.01, 0.02, "level", "level"),
        (0.0, 0.02, "level", "level"),
        (NAN, NAN, "level", "level"),
    ],
)
def test_a_difference_counts_when_its_interval_excludes_zero(
    low: float, high: float, more_is_better: str, less_is_better: str
) -> None:
    difference = Interval((low + high) / 2, low, high)
    assert compared(difference, POINTS) == more_is_better
    assert compared(difference, MSE) == less_is_better


# --- which AdamW ----------------------------------------------------------------------------------


def test_the_best_adamw_is_the_one_with_the_best_final_mean() -> None:
    data = comparison(
        {"poprisk": [0.9, 0.9], "low": [0.70, 0.80], "mid": [0.76, 0.76], "high": [0.99, 0.40]},
        more={("low", 0): {"best_metric": 0.99}, ("low", 1): {"best_metric": 0.99}},
    )
    verdict = judge(data)
    assert verdict.reference == "label of mid"
    assert row_of(verdict, "poprisk").difference == t_interval([0.9 - 0.76] * 2)


def test_the_best_adamw_of_an_error_is_the_lowest() -> None:
    data = comparison({"poprisk": [1.0], "low": [2.0], "mid": [1.5], "high": [9.0]}, metric=ERROR)
    assert judge(data).reference == "label of mid"


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_a_diverged_arm_is_never_the_best(bad: float, metric: dict[str, Any]) -> None:
    finals: dict[str, Finals] = {"poprisk": [0.5, 0.5], "low": [bad, 0.9], "mid": [0.6, 0.6]}
    verdict = judge(comparison({**finals, "high": [bad, bad]}, metric=metric))
    assert verdict.reference == "label of mid"
    assert "ends at" in verdict.headline
    assert "nan" not in verdict.headline


def test_rows_shown_are_ours_the_best_the_default_and_the_controls() -> None:
    finals = {name: [0.5, 0.6] for name in ("poprisk", "low", "mid", "rms-matched", "shuffled")}
    verdict = judge(comparison({**finals, "high": [0.8, 0.8]}))
    families = [r.family for r in verdict.rows]
    assert families == ["poprisk", "adamw", "adamw", "rms-matched", "shuffled"]
    assert {r.label for r in verdict.rows if r.family == "adamw"} == {
        "label of high",  # the best
        "label of mid",  # torch's default settings
    }
    assert [r.label for r in verdict.other] == ["label of low"]
    best = next(r for r in verdict.rows if r.label == "label of high")
    assert best.difference is None
    assert all(r.difference is not None for r in verdict.rows if r is not best)


def test_a_row_holds_means_over_seeds() -> None:
    memorized = {("poprisk", s): {"final_memorized": v} for s, v in enumerate([0.02, 0.04])}
    best = {("poprisk", s): {"best_metric": v} for s, v in enumerate([0.95, 0.97])}
    more = {key: {**memorized[key], **best[key]} for key in memorized}
    verdict = judge(comparison({"poprisk": [0.9, 0.92], "mid": [0.7, 0.7]}, more=more))
    ours = row_of(verdict, "poprisk")
    assert ours.seeds == 2
    assert ours.final == t_interval([0.9, 0.92])
    assert ours.best == t_interval([0.95, 0.97])
    assert ours.memorized == t_interval([0.02, 0.04])


def test_differences_are_paired_over_common_seeds_only() -> None:
    data = comparison({"poprisk": [0.9, None, 0.7, 0.5], "mid": [0.8, 0.1, None, 0.45]})
    ours = row_of(judge(data), "poprisk")
    assert ours.seeds == 3
    assert ours.difference is not None
    assert ours.difference.values == pytest.approx((0.1, 0.05))
    assert ours.difference.mean == pytest.approx(0.075)


def test_pairing_takes_the_spread_between_seeds_out() -> None:
    finals = {"poprisk": [0.50, 0.70, 0.90], "mid": [0.48, 0.68, 0.88]}
    difference = row_of(judge(comparison(finals)), "poprisk").difference
    assert difference is not None
    assert difference[:3] == pytest.approx((0.02, 0.02, 0.02))


# --- the headline ---------------------------------------------------------------------------------


def test_the_gate_wins() -> None:
    finals = {"poprisk": [0.93, 0.95, 0.94], "mid": [0.70, 0.72, 0.70], "low": [0.6, 0.6, 0.6]}
    assert judge(comparison(finals)).headline == (
        "PopRiskAdamW ends at 94.0% accuracy, 23.3 points better than the best of 2 AdamW settings "
        "(70.7%) [+21.9, +24.8]."
    )


@pytest.mark.parametrize("ours", [0.93, 0.6])
def test_a_difference_without_a_spread_is_no_verdict(ours: float) -> None:
    headline = judge(comparison({"poprisk": [ours] * 3, "mid": [0.8] * 3})).headline
    assert "not told apart" in headline
    assert headline.endswith("the same on all 3 seeds, which says nothing about their spread.")
    more = judge(comparison({"poprisk": [ours] * 6, "mid": [0.8] * 6})).headline
    assert more.startswith("The gate loses here") == (ours < 0.8)
    assert "not told apart" not in more


def test_the_gate_loses_and_is_told_so() -> None:
    verdict = judge(comparison({"poprisk": [0.70, 0.72, 0.71], "mid": [0.75, 0.76, 0.77]}))
    assert verdict.headline.startswith("The gate loses here: PopRiskAdamW ends at 71.0% accuracy, ")
    assert "5.0 points worse than the best of 1 AdamW" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert low < -5 < high < 0


def test_a_tie_is_called_level() -> None:
    verdict = judge(comparison({"poprisk": [0.70, 0.74, 0.72], "mid": [0.73, 0.71, 0.71]}))
    assert "not told apart from the best of 1 AdamW" in verdict.headline
    assert "0.3 points better, which may be chance [" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert low < 0 < high


def test_a_lower_error_is_a_gain() -> None:
    finals = {"poprisk": [1.0, 1.2, 0.8], "mid": [2.0, 2.1, 1.9]}
    verdict = judge(comparison(finals, metric=ERROR))
    assert verdict.headline == (
        "PopRiskAdamW ends at 1 mean squared error, 50.0% better than the best of 1 AdamW settings "
        "(2) [+37.6%, +62.4%]."
    )


def test_a_higher_error_is_a_loss() -> None:
    finals = {"poprisk": [2.0, 2.2, 2.1], "mid": [1.0, 1.1, 0.9]}
    verdict = judge(comparison(finals, metric=ERROR))
    assert verdict.headline.startswith("The gate loses here")
    assert "110.0% worse" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert low < -110 < high < 0


def test_a_score_below_zero_keeps_its_sign() -> None:
    """A log-likelihood: -1 is better than -2, and the gain is +50%."""
    score = {"name": "log-likelihood", "higher_is_better": True, "percent": False}
    finals = {"poprisk": [-1.0, -1.1, -0.9], "mid": [-2.0, -2.2, -1.8]}
    verdict = judge(comparison(finals, metric=score))
    assert "50.0% better than" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert 0 < low < 50 < high


def test_a_reference_of_zero_gives_differences_not_percents() -> None:
    score = {"name": "score", "higher_is_better": True, "percent": False}
    finals = {"poprisk": [0.59, 0.6, 0.61], "mid": [0.0, 0.0, 0.0]}
    verdict = judge(comparison(finals, metric=score))
    assert "0.6 better than" in verdict.headline
    assert verdict.headline.endswith(" [+0.575, +0.625].")


def interval_in(text: str) -> tuple[float, float]:
    """The two numbers of [A, B]."""
    (ends,) = re.findall(r"\[([-+.\d]+)%?, ([-+.\d]+)%?\]", text)
    return float(ends[0]), float(ends[1])


@pytest.mark.parametrize(
    ("metric", "ours", "best", "side"),
    [
        (ACCURACY, 0.9, 0.8, "10.0 points better than"),
        (ACCURACY, 0.7, 0.8, "10.0 points worse than"),
        (ERROR, 1.0, 2.0, "50.0% better than"),
        (ERROR, 3.0, 2.0, "50.0% worse than"),
    ],
)
def test_one_seed_has_no_interval(
    metric: dict[str, Any], ours: float, best: float, side: str
) -> None:
    verdict = judge(comparison({"poprisk": [ours], "mid": [best]}, metric=metric))
    assert side in verdict.headline
    assert "; one seed, so no interval and no verdict" in verdict.headline
    assert verdict.headline.endswith("which take at least 3 (--seeds 3).")
    assert verdict.warnings[-1].startswith("One seed says nothing about chance")


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
@pytest.mark.parametrize("ours", [[0.59, 0.61], [0.9, 0.99], [0.61, 0.61], [0.72, 0.70]])
def test_two_seeds_are_shown_and_are_no_verdict(metric: dict[str, Any], ours: list[float]) -> None:
    finals = {"poprisk": ours, "mid": [0.72, 0.70], "rms-matched": [0.5, 0.6]}
    verdict = judge(comparison(finals, metric=metric))
    text = " ".join([verdict.headline, *verdict.warnings])
    assert "[" not in text
    assert "loses" not in text
    assert "2 seeds (" in verdict.headline
    assert "no interval and no verdict, which take at least 3 (--seeds 3)" in verdict.headline
    assert explained(verdict) == [TOO_FEW]
    assert verdict.warnings[-1].startswith("Only 2 seeds, too few for intervals")


def test_the_seeds_stand_where_an_interval_would() -> None:
    finals = {"poprisk": [0.6, 0.7], "mid": [0.5, 0.55]}
    assert "2 seeds (+10.0 and +15.0)" in judge(comparison(finals)).headline
    low = {"poprisk": [1.0, 1.5], "mid": [2.0, 2.0]}
    assert "2 seeds (+50.0% and +25.0%)" in judge(comparison(low, metric=ERROR)).headline


@pytest.mark.parametrize(
    "finals",
    [
        {"poprisk": [None, None], "mid": [None, None]},
        {"poprisk": [0.9, 0.9], "mid": [None, None]},
        {"poprisk": [None, None], "mid": [0.8, 0.8]},
        {"poprisk": [0.9, None], "mid": [None, 0.8]},
    ],
)
def test_there_is_no_verdict_without_something_to_compare(finals: dict[str, Finals]) -> None:
    verdict = judge(comparison(finals))
    assert verdict.headline == "Not enough runs have finished for a verdict."


@pytest.mark.parametrize(
    ("finals", "named"),
    [
        ({"poprisk": [0.9] * 3}, 'no arm "adamw" here'),
        ({"poprisk": [0.9] * 3, "shuffled": [0.8] * 3}, 'no arm "adamw" here'),
        ({"poprisk": [None] * 3, "rms-matched": [0.8] * 3}, 'no arm "adamw" here'),
        ({"low": [0.9] * 3, "mid": [0.8] * 3}, 'no arm "poprisk" here'),
        ({"shuffled": [0.9] * 3}, 'no arm "poprisk" or "adamw" here'),
    ],
)
def test_an_arm_that_a_verdict_lacks_is_named(finals: dict[str, Finals], named: str) -> None:
    headline = judge(comparison(finals)).headline
    assert named in headline
    assert "finished" not in headline


def test_a_reference_that_diverged_is_no_unfinished_run() -> None:
    finals = {"poprisk": [0.9, 0.9], "mid": [NAN, NAN], "low": [NAN, None]}
    assert judge(comparison(finals)).headline == NO_REFERENCE


def test_an_unfinished_comparison_is_judged_by_what_there_is() -> None:
    finals = {"poprisk": [0.9, None, None], "mid": [0.8, 0.7, None], "shuffled": [None] * 3}
    verdict = judge(comparison(finals))
    assert "10.0 points better than" in verdict.headline
    assert "shuffled" not in {r.family for r in verdict.rows}


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_a_gate_that_diverged_is_said_to_have(metric: dict[str, Any]) -> None:
    finals = {"poprisk": [0.9, NAN, 0.9], "mid": [0.8, 0.8, 0.8]}
    verdict = judge(comparison({**finals, "shuffled": [0.8] * 3}, metric=metric))
    assert verdict.headline.startswith("The gate loses here: PopRiskAdamW diverged")
    assert verdict.warnings == []


# --- early stopping -------------------------------------------------------------------------------


def stopped(held_out: float, test: float, best: float = 0.99) -> dict[str, Any]:
    return {"held_out_best": held_out, "stopped_metric": test, "best_metric": best}


@pytest.mark.parametrize(("metric", "chosen"), [(ACCURACY, [0.81, 0.72]), (ERROR, [0.91, 0.62])])
def test_early_stopping_chooses_by_the_held_out_score(
    metric: dict[str, Any], chosen: list[float]
) -> None:
    """Seed by seed, whatever that choice scores on the test set."""
    more = {
        ("stopped-low", 0): stopped(0.5, 0.91),
        ("stopped-high", 0): stopped(0.6, 0.81),
        ("stopped-low", 1): stopped(0.7, 0.72),
        ("stopped-high", 1): stopped(0.3, 0.62),
    }
    finals = {"poprisk": [0.9, 0.9], "mid": [0.7, 0.7]}
    finals |= {"stopped-low": [0.1, 0.1], "stopped-high": [0.1, 0.1]}
    verdict = judge(comparison(finals, metric=metric, more=more))
    row = row_of(verdict, "early-stopping")
    assert row.final == t_interval(chosen)
    assert row.arms == ("stopped-low", "stopped-high")
    assert row.memorized is None
    assert [r.family for r in verdict.rows].count("early-stopping") == 1


def test_early_stopping_waits_for_all_of_its_grid() -> None:
    more = {
        ("stopped-low", 0): stopped(0.5, 0.8),
        ("stopped-high", 0): stopped(0.6, 0.7),
        ("stopped-low", 1): stopped(0.9, 0.9),
    }
    finals: dict[str, Finals] = {"poprisk": [0.9, 0.9], "mid": [0.7, 0.7]}
    finals |= {"stopped-low": [0.1, 0.1], "stopped-high": [0.1, None]}
    row = row_of(judge(comparison(finals, more=more)), "early-stopping")
    assert (row.seeds, row.final.mean) == (1, 0.7)


def test_early_stopping_never_picks_a_diverged_run() -> None:
    more = {("stopped-low", 0): stopped(NAN, NAN), ("stopped-high", 0): stopped(0.2, 0.3)}
    finals = {"poprisk": [0.9], "mid": [0.7], "stopped-low": [NAN], "stopped-high": [0.1]}
    assert row_of(judge(comparison(finals, more=more)), "early-stopping").final.mean == 0.3


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_leads_are_paired_with_every_rival(metric: dict[str, Any]) -> None:
    more = {("stopped-low", s): stopped(0.5, 0.85) for s in range(3)}
    finals = {"poprisk": [0.9, 0.92, 0.91], "mid": [0.7, 0.71, 0.7], "stopped-low": [0.1] * 3}
    finals |= {"rms-matched": [0.8, 0.8, 0.81], "low": [0.75, 0.74, 0.76]}
    leads = judge(comparison(finals, metric=metric, more=more)).leads
    stop = leads["AdamW, early stopping on a held-out fifth"]
    assert stop == t_interval([0.9 - 0.85, 0.92 - 0.85, 0.91 - 0.85])
    assert leads["label of rms-matched"].mean == pytest.approx(0.91 - 2.41 / 3)
    best = "label of low" if metric is ACCURACY else "label of mid"
    assert next(iter(leads)) == best
    assert "label of mid" in leads  # the default settings


# --- hindsight and memorization -------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "chosen"), [(ACCURACY, "low"), (ERROR, "mid")])
def test_hindsight_may_choose_another_adamw(metric: dict[str, Any], chosen: str) -> None:
    best = {"low": 0.92, "mid": 0.85}
    more = {(name, 0): {"best_metric": value} for name, value in best.items()}
    finals = {"poprisk": [0.9], "low": [0.6], "mid": [0.7]}
    leads = judge(comparison(finals, metric=metric, more=more)).leads
    lead = leads[f"label of {chosen}, best epoch in hindsight"]
    assert lead.mean == pytest.approx(0.9 - best[chosen])


def test_what_is_memorized_is_unknown_where_the_noise_is() -> None:
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7]}))
    assert row_of(verdict, "poprisk").memorized is None


# --- controls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "ours", "best", "matched", "shuffled", "tail"),
    [
        (ACCURACY, 0.90, 0.70, 0.90, 0.80, SMALLER_STEP),
        (ACCURACY, 0.90, 0.70, 0.80, 0.91, WRONG_WEIGHTS),
        (ACCURACY, 0.90, 0.70, 0.85, 0.75, None),
        (ACCURACY, 0.60, 0.70, 0.50, 0.55, None),
        (ACCURACY, 0.60, 0.70, 0.50, 0.65, MASK_ALONE),
        (ACCURACY, 0.60, 0.70, 0.60, 0.55, STEP_ALONE),
        (ACCURACY, 0.60, 0.60, 0.60, 0.55, STEP_ALONE),
        (ERROR, 3.5, 3.0, 3.4, 4.0, STEP_ALONE),
        (ERROR, 1.0, 3.0, 1.0, 2.0, SMALLER_STEP),
        (ERROR, 1.0, 3.0, 2.0, 0.9, WRONG_WEIGHTS),
        (ERROR, 1.0, 4.0, 2.0, 2.5, None),
        (ERROR, 4.0, 3.0, 5.0, 6.0, None),
    ],
)
def test_controls_say_what_the_smaller_step_explains(
    metric: dict[str, Any],
    ours: float,
    best: float,
    matched: float,
    shuffled: float,
    tail: str | None,
) -> None:
    means = {"poprisk": ours, "mid": best, "rms-matched": matched, "shuffled": shuffled}
    finals = {
        name: [mean - 0.001 * i, mean, mean + 0.001 * i]
        for i, (name, mean) in enumerate(means.items(), start=1)
    }
    verdict = judge(comparison(finals, metric=metric))
    assert explained(verdict) == ([tail] if tail else [])


def test_a_gate_behind_both_controls_is_told_so() -> None:
    finals = {
        "poprisk": [0.70, 0.71, 0.69],
        "mid": [0.90, 0.91, 0.89],
        "rms-matched": [0.80, 0.82, 0.79],
        "shuffled": [0.85, 0.86, 0.83],
    }
    assert explained(judge(comparison(finals))) == [BEATEN]


@pytest.mark.parametrize(
    ("grid", "warned"),
    [
        ({1e-3: 0.9, 1e-4: 0.8, 1e-2: 0.7}, False),
        ({1e-3: 0.8, 1e-4: 0.9, 1e-2: 0.7}, True),
        ({1e-3: 0.8, 1e-4: 0.7, 1e-2: 0.9}, True),
        ({1e-3: 0.8}, False),
    ],
)
def test_a_best_adamw_at_the_edge_of_the_grid_is_pointed_out(
    grid: dict[float, float], warned: bool
) -> None:
    data = comparison({"poprisk": [0.9]})
    for rate, final in grid.items():
        name, settings = f"lr {rate}", {"lr": rate, "weight_decay": 0.01}
        arm = {"name": name, "label": name, "family": "adamw", "settings": settings}
        data.config["arms"].append(arm)
        data.ends[name, 0] = end(final)
    said = any("edge of the grid" in s for s in judge(data).warnings)
    assert said == warned


def test_controls_within_the_noise_are_a_tie() -> None:
    """Ahead by 0.1 points, give or take 2: that is no gain from the gate."""
    finals = {
        "poprisk": [0.901, 0.921, 0.881],
        "mid": [0.70, 0.71, 0.69],
        "rms-matched": [0.91, 0.90, 0.89],
        "shuffled": [0.80, 0.81, 0.79],
    }
    verdict = judge(comparison(finals))
    assert explained(verdict) == [wording.UNDECIDED]


def test_controls_that_are_missing_are_passed_over() -> None:
    finals = {"poprisk": [0.9, 0.9, 0.91], "mid": [0.7] * 3, "shuffled": [0.8] * 3}
    verdict = judge(comparison(finals))
    assert explained(verdict) == []
    assert verdict.leads["label of shuffled"].mean == pytest.approx(0.31 / 3)
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7]}))
    assert explained(verdict) == []


@pytest.mark.parametrize(("seeds", "warned"), [(1, True), (4, True), (5, False), (10, False)])
def test_few_seeds_are_pointed_out(seeds: int, warned: bool) -> None:
    verdict = judge(comparison({"poprisk": [0.9] * seeds, "mid": [0.8] * seeds}))
    assert any("--seeds 10" in s for s in verdict.warnings) == warned


# --- a difference too small to show ---------------------------------------------------------------


def test_no_difference_has_no_side() -> None:
    more = {("stopped-low", 0): stopped(0.5, 0.9), ("mid", 0): {"best_metric": 0.9}}
    finals = {"poprisk": [0.9], "mid": [0.9], "stopped-low": [0.1]}
    verdict = judge(comparison(finals, more=more))
    assert not any(f"0.0 points {side}" in verdict.headline for side in ("better", "worse"))
    assert "level with" in verdict.headline


# --- scales ---------------------------------------------------------------------------------------


def test_a_scale_writes_its_metric() -> None:
    assert POINTS.value(0.9345) == "93.5%" or POINTS.value(0.9345) == "93.4%"
    assert (POINTS.gap(-0.021, 0.5), POINTS.gain(0.1)) == ("2.1 points", 0.1)
    assert (MSE.value(12.3456), MSE.gap(-1.0, 4.0), MSE.gain(0.1)) == ("12.35", "25.0%", -0.1)
    assert MSE.gap(-0.25, 0.0) == "0.25"
    assert (POINTS.signed(-0.04, 1.0), POINTS.signed(-0.06, 1.0)) == ("+0.0", "-0.1")
    assert scale_of({"task": {"metric": ERROR}}) == MSE


def test_a_headline_needs_ours_and_a_reference() -> None:
    nothing = "Not enough runs have finished for a verdict."
    nobody = Rivals([], None, {}, "")
    assert headline(None, nobody, POINTS) == nothing


# --- runs that had not converged ------------------------------------------------------------------

EPOCHS = 50


def curve(shape: str, seed: int, *, size: float = 1.0) -> list[float]:
    """A made-up curve of 50 evaluations; ``size`` scales its scatter and slope."""
    random = np.random.default_rng(seed)
    t = np.arange(1, EPOCHS + 1) / EPOCHS
    lines = {
        "rising": 0.5 + 0.3 * t,
        "saturating": 0.8 - 0.3 * np.exp(-2 * t),
        "flat": 0.7 + 0.0 * t,
        "settled": 0.8 - 0.3 * np.exp(-40 * t),
        "falling": 0.9 - 0.2 * t,
        "noisy": 0.7 + 0.02 * random.standard_normal(EPOCHS),
    }
    return (size * (lines[shape] + 2e-4 * random.standard_normal(EPOCHS))).tolist()


def with_curves(data: RunData, arm: str, shape: str, **more: Any) -> RunData:
    """The record with epoch rows of one arm."""
    data.config["task"]["epochs"] = EPOCHS
    sign = 1.0 if data.config["task"]["metric"]["higher_is_better"] else -1.0
    rows = [
        {"arm": arm, "seed": seed, "epoch": i + 1, "test_metric": sign * value, **more}
        for seed in data.config["seeds"]
        for i, value in enumerate(curve(shape, seed))
    ]
    return data._replace(epochs=[*data.epochs, *rows])


LOSING = {"poprisk": [0.70, 0.72, 0.71], "mid": [0.75, 0.76, 0.77], "rms-matched": [0.8, 0.81, 0.8]}


@pytest.mark.parametrize(
    ("shape", "unsettled"),
    [
        ("rising", True),
        ("saturating", True),
        ("flat", False),
        ("settled", False),
        ("falling", False),
        ("noisy", False),
    ],
)
@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_a_loss_of_a_run_that_still_improves_is_not_settled(
    shape: str, unsettled: bool, metric: dict[str, Any]
) -> None:
    sign = 1.0 if metric is ACCURACY else -1.0
    finals = {name: [sign * v for v in values] for name, values in LOSING.items()}
    verdict = judge(with_curves(comparison(finals, metric=metric), "poprisk", shape))
    assert verdict.headline.startswith("Not settled: PopRisk" if unsettled else "The gate loses")
    assert any("still improves at its end" in s for s in verdict.warnings) == unsettled
    if unsettled:
        assert "loses" not in verdict.headline
        assert "--epochs 200" in verdict.warnings[0]
        assert "(lr 0.003)" in verdict.warnings[0]
        assert explained(verdict) == [f"So far: t{BEATEN.removeprefix('T')}"]


@pytest.mark.parametrize(
    ("loss", "unsettled"),
    [("rising", False), ("falling", True), ("flat", False), ("noisy", False)],
)
def test_the_test_loss_tells_where_the_metric_is_too_coarse(loss: str, unsettled: bool) -> None:
    data = with_curves(comparison(LOSING), "poprisk", "noisy")
    for row in data.epochs:
        row["test_loss"] = curve(loss, row["seed"])[row["epoch"] - 1]
    verdict = judge(data)
    assert verdict.headline.startswith("Not settled") == unsettled
    assert any("its test loss falls by" in s for s in verdict.warnings) == unsettled


def test_a_metric_that_falls_is_not_improved_by_its_loss() -> None:
    data = with_curves(comparison(LOSING), "poprisk", "falling")
    for row in data.epochs:
        row["test_loss"] = curve("falling", row["seed"])[row["epoch"] - 1]
    assert judge(data).headline.startswith("The gate loses here")


def test_noisy_curves_are_seldom_called_rising() -> None:
    found = [
        still_improving(
            [
                {"seed": seed, "epoch": e, "test_metric": value}
                for seed in range(3)
                for e, value in enumerate(curve("noisy", 3 * trial + seed))
            ],
            higher_is_better=True,
            percent=True,
        )
        for trial in range(300)
    ]
    assert sum(f is not None for f in found) < 15  # 2.5% expected, one-sided


def test_the_best_adamw_may_not_have_converged_either() -> None:
    winning = {"poprisk": [0.93, 0.95, 0.94], "mid": [0.70, 0.72, 0.70]}
    verdict = judge(with_curves(comparison(winning), "mid", "rising"))
    assert "23.3 points better" in verdict.headline
    assert verdict.warnings[0].startswith("The best AdamW still improves at its end (accuracy")
    both = with_curves(with_curves(comparison(LOSING), "mid", "rising"), "poprisk", "rising")
    losing = judge(both._replace(config={**both.config, "arms": ARMS[:3]}))
    assert "like the best AdamW" in losing.warnings[0]


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_short_runs(evaluations: int) -> None:
    """Two points of several seeds show a rise, one point shows none."""
    data = with_curves(comparison(LOSING), "poprisk", "rising")
    rows = [row for row in data.epochs if row["epoch"] <= evaluations]
    assert judge(data._replace(epochs=rows)).headline.startswith("Not settled") == (evaluations > 1)


def test_curves_that_are_not_finite_do_not_rise() -> None:
    data = with_curves(comparison(LOSING), "poprisk", "rising")
    data.epochs[-1]["test_metric"] = NAN
    assert judge(data).headline.startswith("The gate loses here")


def test_only_a_loss_is_put_off() -> None:
    winning = {"poprisk": [0.93, 0.95, 0.94], "mid": [0.70, 0.72, 0.70]}
    level = {"poprisk": [0.70, 0.74, 0.72], "mid": [0.73, 0.71, 0.71]}
    for finals, said in ((winning, "better than"), (level, "not told apart")):
        verdict = judge(with_curves(comparison(finals), "poprisk", "rising"))
        assert verdict.headline.startswith("PopRiskAdamW")
        assert said in verdict.headline
        assert verdict.warnings[0].startswith("PopRiskAdamW still improves at its end")
