"""The verdict: its statistics by hand, and its sentences for every outcome of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from scipy import stats

from poprisk.rundir import RunData
from poprisk.verdict import Interval, Row, Verdict, judge, t_interval
from poprisk.wording import Field, Scale, compared, headline, scale_of

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


def sentence_with(verdict: Verdict, words: str) -> str:
    found = [s for s in verdict.sentences if words in s]
    assert len(found) == 1, verdict.sentences
    return found[0]


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[0.9, 0.8], [1.0, 2.0, 4.0], [0.1 * i**2 for i in range(10)], [-3.0, 5.0, 1e3]]
)
def test_an_interval_is_student_s(values: list[float]) -> None:
    n = len(values)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=error)
    assert t_interval(values) == pytest.approx((sum(values) / n, low, high))


def test_an_interval_by_hand() -> None:
    """Two values: t = 12.706 at one degree of freedom, standard error half their distance."""
    interval = t_interval([1.0, 3.0])
    assert interval == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), rel=1e-5)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one, none = t_interval([0.7]), t_interval([])
    assert one.mean == 0.7
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(math.isnan(v) for v in none)


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
    assert row_of(verdict, "poprisk").difference == pytest.approx(t_interval([0.14, 0.14]))


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
    assert ours.final == pytest.approx(t_interval([0.9, 0.92]))
    assert ours.best == pytest.approx(t_interval([0.95, 0.97]))
    assert ours.memorized == pytest.approx(t_interval([0.02, 0.04]))


def test_differences_are_paired_over_common_seeds_only() -> None:
    data = comparison({"poprisk": [0.9, None, 0.7, 0.5], "mid": [0.8, 0.1, None, 0.45]})
    ours = row_of(judge(data), "poprisk")
    assert ours.seeds == 3
    assert ours.difference == pytest.approx(t_interval([0.1, 0.05]))
    assert ours.difference is not None
    assert ours.difference.mean == pytest.approx(0.075)


def test_pairing_takes_the_spread_between_seeds_out() -> None:
    finals = {"poprisk": [0.50, 0.70, 0.90], "mid": [0.48, 0.68, 0.88]}
    difference = row_of(judge(comparison(finals)), "poprisk").difference
    assert difference == pytest.approx((0.02, 0.02, 0.02))


# --- the headline ---------------------------------------------------------------------------------


def test_the_gate_wins() -> None:
    verdict = judge(comparison({"poprisk": [0.93, 0.95], "mid": [0.70, 0.72], "low": [0.6, 0.6]}))
    assert verdict.headline == (
        "PopRiskAdamW, default settings, ends at 94.0% accuracy, 23.0 points better than the best "
        "of 2 AdamW settings, picked by the test set (71.0%); 95% interval of the gain +23.0 to "
        "+23.0."
    )


def test_the_gate_loses_and_is_told_so() -> None:
    verdict = judge(comparison({"poprisk": [0.70, 0.72, 0.71], "mid": [0.75, 0.76, 0.77]}))
    assert verdict.headline.startswith("The gate loses here: PopRiskAdamW, default settings, ")
    assert "5.0 points worse than the best of 1 AdamW" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert low < -5 < high < 0


def test_a_tie_is_called_level() -> None:
    verdict = judge(comparison({"poprisk": [0.70, 0.74, 0.72], "mid": [0.73, 0.71, 0.71]}))
    assert "not told apart from the best of 1 AdamW" in verdict.headline
    assert "0.3 points better, which may be chance" in verdict.headline
    low, high = interval_in(verdict.headline)
    assert low < 0 < high


def test_a_lower_error_is_a_gain() -> None:
    finals = {"poprisk": [1.0, 1.1, 0.9], "mid": [2.0, 2.1, 1.9]}
    verdict = judge(comparison(finals, metric=ERROR))
    assert verdict.headline == (
        "PopRiskAdamW, default settings, ends at 1 mean squared error, 50.0% better than the best "
        "of 1 AdamW settings, picked by the test set (2); 95% interval of the gain +50.0 to +50.0%."
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
    finals = {"poprisk": [0.59, 0.61], "mid": [0.0, 0.0]}
    verdict = judge(comparison(finals, metric=score))
    assert "0.6 better than" in verdict.headline
    assert verdict.headline.endswith("95% interval of the gain +0.473 to +0.727.")


def interval_in(text: str) -> tuple[float, float]:
    """The two numbers of "95% interval of the gain A to B."."""
    numbers = text.rpartition("95% interval of the gain ")[2].rstrip("%.")
    low, high = numbers.split(" to ")
    return float(low), float(high)


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
    assert verdict.headline.endswith("; one seed, so no interval.")
    assert verdict.sentences[-1].startswith("One seed says nothing about chance")


@pytest.mark.parametrize(
    "finals",
    [
        {"poprisk": [None, None]},
        {"poprisk": [0.9, 0.9]},
        {"poprisk": [None, None], "mid": [0.8, 0.8]},
        {"poprisk": [0.9, None], "mid": [None, 0.8]},
        {"poprisk": [0.9, 0.9], "mid": [NAN, NAN]},
    ],
)
def test_there_is_no_verdict_without_something_to_compare(finals: dict[str, Finals]) -> None:
    verdict = judge(comparison(finals))
    assert verdict.headline == "Not enough runs have finished for a verdict."


def test_an_unfinished_comparison_is_judged_by_what_there_is() -> None:
    finals = {"poprisk": [0.9, None, None], "mid": [0.8, 0.7, None], "shuffled": [None] * 3}
    verdict = judge(comparison(finals))
    assert "10.0 points better than" in verdict.headline
    assert "shuffled" not in {r.family for r in verdict.rows}


@pytest.mark.parametrize("metric", [ACCURACY, ERROR])
def test_a_gate_that_diverged_is_said_to_have(metric: dict[str, Any]) -> None:
    finals = {"poprisk": [0.9, NAN, 0.9], "mid": [0.8, 0.8, 0.8]}
    verdict = judge(comparison({**finals, "shuffled": [0.8] * 3}, metric=metric))
    assert verdict.headline.startswith("The gate loses here: PopRiskAdamW, default settings, div")
    assert verdict.sentences == []


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
    assert row.final == pytest.approx(t_interval(chosen))
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


@pytest.mark.parametrize(
    ("metric", "stop", "said"),
    [
        (ACCURACY, 0.85, "85.0%: PopRiskAdamW, which holds nothing out, is 5.0 points better."),
        (ACCURACY, 0.92, "92.0%: PopRiskAdamW, which holds nothing out, is 2.0 points worse."),
        (ACCURACY, 0.90, "90.0%: PopRiskAdamW, which holds nothing out, is as good."),
        (ERROR, 1.2, "reaches 1.2: PopRiskAdamW, which holds nothing out, is 25.0% better."),
        (ERROR, 0.6, "reaches 0.6: PopRiskAdamW, which holds nothing out, is 50.0% worse."),
    ],
)
def test_early_stopping_is_compared_with_ours(
    metric: dict[str, Any], stop: float, said: str
) -> None:
    more = {("stopped-low", 0): stopped(0.5, stop)}
    finals = {"poprisk": [0.9], "mid": [0.7], "stopped-low": [0.1]}
    verdict = judge(comparison(finals, metric=metric, more=more))
    assert sentence_with(verdict, "stopped early").endswith(said)


# --- hindsight and memorization -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "best", "said"),
    [
        (ACCURACY, {"low": 0.92, "mid": 0.85}, "at 92.0% (label of low, best epoch of each seed)"),
        (ERROR, {"low": 0.92, "mid": 0.85}, "at 0.85 (label of mid, best epoch of each seed)"),
    ],
)
def test_hindsight_may_choose_another_adamw(
    metric: dict[str, Any], best: dict[str, float], said: str
) -> None:
    more = {(name, 0): {"best_metric": value} for name, value in best.items()}
    finals = {"poprisk": [0.9], "low": [0.6], "mid": [0.7]}
    verdict = judge(comparison(finals, metric=metric, more=more))
    assert said in sentence_with(verdict, "test set in hand")


@pytest.mark.parametrize(
    ("metric", "ours", "best", "said"),
    [
        (ACCURACY, 0.90, 0.95, "ends 5.0 points below that."),
        (ACCURACY, 0.96, 0.95, "ends 1.0 points above that."),
        (ERROR, 1.1, 1.0, "ends 10.0% above that."),
        (ERROR, 0.9, 1.0, "ends 10.0% below that."),
    ],
)
def test_ours_is_placed_beside_hindsight(
    metric: dict[str, Any], ours: float, best: float, said: str
) -> None:
    more = {("mid", 0): {"best_metric": best}}
    verdict = judge(comparison({"poprisk": [ours], "mid": [0.7]}, metric=metric, more=more))
    assert sentence_with(verdict, "test set in hand").endswith(said)


def test_memorization_of_ours_and_of_the_best_adamw() -> None:
    more = {("poprisk", 0): {"final_memorized": 0.031}, ("mid", 0): {"final_memorized": 0.8}}
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7]}, more=more))
    said = "Of the label noise, PopRiskAdamW reproduces 3.1% at the end, the best AdamW 80.0%."
    assert said in verdict.sentences


def test_nothing_is_said_about_noise_that_is_not_known() -> None:
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7]}))
    assert not any("noise" in s for s in verdict.sentences)
    assert row_of(verdict, "poprisk").memorized is None


# --- controls -------------------------------------------------------------------------------------

SMALLER_STEP = "a smaller step explains the result as well as the gate does."
THE_GATE = "come with smaller steps and {} with which weights pass."
ONLY_WEIGHTS = "which weights pass matters."
WRONG_WEIGHTS = "the mask helps by its size here, not by which weights it picks."
NOT_ENOUGH = "the gate does more than a smaller step, though not enough to win here."


@pytest.mark.parametrize(
    ("metric", "ours", "best", "matched", "shuffled", "tail"),
    [
        (ACCURACY, 0.90, 0.70, 0.90, 0.80, SMALLER_STEP),
        (ACCURACY, 0.90, 0.70, 0.80, 0.91, WRONG_WEIGHTS),
        (ACCURACY, 0.90, 0.70, 0.85, 0.75, THE_GATE.format("5.0 points")),
        (ACCURACY, 0.60, 0.70, 0.50, 0.55, NOT_ENOUGH),
        (ACCURACY, 0.60, 0.70, 0.50, 0.65, WRONG_WEIGHTS),
        (ERROR, 1.0, 3.0, 1.0, 2.0, SMALLER_STEP),
        (ERROR, 1.0, 3.0, 2.0, 0.9, WRONG_WEIGHTS),
        (ERROR, 1.0, 4.0, 2.0, 2.5, THE_GATE.format("25.0%")),
        (ERROR, 4.0, 3.0, 5.0, 6.0, NOT_ENOUGH),
    ],
)
def test_controls_say_what_the_smaller_step_explains(
    metric: dict[str, Any], ours: float, best: float, matched: float, shuffled: float, tail: str
) -> None:
    finals = {"poprisk": [ours], "mid": [best], "rms-matched": [matched], "shuffled": [shuffled]}
    verdict = judge(comparison(finals, metric=metric))
    assert sentence_with(verdict, "Controls reach").endswith(tail)


def test_a_gate_behind_both_controls_is_told_so() -> None:
    finals = {
        "poprisk": [0.70, 0.71, 0.69],
        "mid": [0.90, 0.91, 0.89],
        "rms-matched": [0.80, 0.82, 0.79],
        "shuffled": [0.85, 0.86, 0.83],
    }
    said = sentence_with(judge(comparison(finals)), "Controls reach")
    assert said.endswith("the gate does worse than its controls.")


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
    said = any("edge of the grid" in s for s in judge(data).sentences)
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
    assert sentence_with(verdict, "Controls reach").endswith(
        "the gate is ahead of them, but by no more than chance on these seeds."
    )


def test_controls_that_are_missing_are_passed_over() -> None:
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7], "shuffled": [0.8]}))
    assert sentence_with(verdict, "Controls reach") == (
        f"Controls reach 80.0% with the mask's values shuffled over the weights: {ONLY_WEIGHTS}"
    )
    verdict = judge(comparison({"poprisk": [0.9], "mid": [0.7]}))
    assert not any("Controls" in s for s in verdict.sentences)


@pytest.mark.parametrize(("seeds", "warned"), [(1, True), (4, True), (5, False), (10, False)])
def test_few_seeds_are_pointed_out(seeds: int, warned: bool) -> None:
    verdict = judge(comparison({"poprisk": [0.9] * seeds, "mid": [0.8] * seeds}))
    assert any("--seeds 10" in s for s in verdict.sentences) == warned


# --- a difference too small to show ---------------------------------------------------------------


def test_no_difference_has_no_side() -> None:
    more = {("stopped-low", 0): stopped(0.5, 0.9), ("mid", 0): {"best_metric": 0.9}}
    finals = {"poprisk": [0.9], "mid": [0.9], "stopped-low": [0.1]}
    verdict = judge(comparison(finals, more=more))
    text = " ".join([verdict.headline, *verdict.sentences])
    assert not any(f"0.0 points {side}" in text for side in ("better", "worse", "above", "below"))


# --- scales ---------------------------------------------------------------------------------------


def test_a_scale_writes_its_metric() -> None:
    assert POINTS.value(0.9345) == "93.5%" or POINTS.value(0.9345) == "93.4%"
    assert (POINTS.gap(-0.021, 0.5), POINTS.gain(0.1)) == ("2.1 points", 0.1)
    assert (MSE.value(12.3456), MSE.gap(-1.0, 4.0), MSE.gain(0.1)) == ("12.35", "25.0%", -0.1)
    assert MSE.gap(-0.25, 0.0) == "0.25"
    assert scale_of({"task": {"metric": ERROR}}) == MSE


def test_a_headline_needs_ours_and_a_reference() -> None:
    nothing = "Not enough runs have finished for a verdict."
    nobody = Field([], None, None, None, None, None, None, {}, "")
    assert headline(None, nobody, POINTS) == nothing
