"""The claim of the audit: labels made wrong, ways to find them, its verdict, its quick form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import claimed
from poprisk.audit import audit as audited
from poprisk_lab.audit.nets import recipe_for
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.audit import FIVE, OURS, SEEDS, TEN, AuditCells, judge, run
from poprisk_lab.studies.claim import Metrics, Results, TrialResult, Workspace
from poprisk_lab.studies.criteria import mean_over
from poprisk_lab.studies.finding import (
    FOLD_RATES,
    PATIENCE,
    RUNS,
    StoppedEarly,
    accuracy_after,
    by_folds,
    by_own_predictions,
    cleanlab_scores,
    out_of_fold,
    scores,
    trained,
)
from poprisk_lab.tasks.mislabelled import PACKAGES, SOURCES, docstrings, mislabelled

CLAIM = CLAIMS["audit"]

QUICK = {"data": "wine", "noise": "random", "rate": 0.2, "seed": 0, "epochs": 12, "hidden": 32}
METHODS = {
    "gate": (OURS, "gate-plain", "gate-end"),
    "adamw": ("adamw", "adamw-averaged", "adamw-end"),
    "folds-5": ("folds-5", FIVE),
    "folds-10": ("folds-10", TEN),
}
ACCURACY = {
    "gate": ("dropped", "corrected"),
    "adamw": ("nothing", "all wrong ones"),
    "folds-5": (FIVE,),
    "folds-10": (TEN,),
}
GOOD = {OURS: 0.95, FIVE: 0.9, TEN: 0.955, "nothing": 0.7, "dropped": 0.9}


def made_up(
    settings: dict[str, Any], level: dict[str, float], *, share: float = 0.01, cost: float = 1.0
) -> Metrics:
    """Methods named in ``level`` have that average precision and F1; the others 0.6."""
    shift = 0.001 * (settings["seed"] % 3)

    def of(method: str) -> Metrics:
        value = level.get(method, 0.6)
        found = {"ap": value + shift * (method == OURS), "f1": value, "share_error": -share}
        if method in (FIVE, TEN):
            return found | {"f1_argmax": value - 0.1, "trainings": 4.5}
        return found | {"recall_error": 0.05, "valid": True, "trainings": cost}

    way = settings["way"]
    return {
        "methods": {m: of(m) for m in METHODS.get(way, (way,))},
        "accuracy": {a: level.get(a, 0.8) for a in ACCURACY.get(way, ())},
    }


def test_better_than_5_folds_and_as_good_as_10_reproduces_it() -> None:
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, GOOD)) == "reproduced"


def test_worse_in_everything_at_more_cost_does_not() -> None:
    bad = {OURS: 0.5, FIVE: 0.9, TEN: 0.9}
    found = claimed.verdict_of(CLAIM, lambda s: made_up(s, bad, share=0.1, cost=2.0))
    assert found == "not reproduced"


@pytest.mark.parametrize(
    ("changed", "share", "cost", "fails"),
    [
        ({FIVE: 0.96}, 0.01, 1.0, "5 folds, mean"),
        ({TEN: 0.98}, 0.01, 1.0, "10 folds"),
        ({}, 0.04, 1.0, "estimated share"),
        ({}, 0.01, 1.2, "trainings"),
    ],
)
def test_each_primary_criterion_can_fail(
    changed: dict[str, float], share: float, cost: float, fails: str
) -> None:
    done = claimed.made_up(CLAIM, lambda s: made_up(s, GOOD | changed, share=share, cost=cost))
    outcome = {c.name: c.outcome for c in judge(done).criteria if c.primary}
    assert [o for name, o in outcome.items() if fails in name] == ["does not hold"]


def lost_on_wine(settings: dict[str, Any], *, valid: bool) -> Metrics:
    found = made_up(settings, GOOD)
    if settings["data"] == "wine" and OURS in found["methods"]:
        shift = 0.001 * (settings["seed"] % 3)
        found["methods"][OURS] |= {"f1": 0.7 + shift, "ap": 0.8 + shift, "valid": valid}
    return found


def test_data_where_it_loses_count_unless_it_says_that_it_is_unsure() -> None:
    for valid, data, mean in ((True, "wine", -0.2), (False, "digits", 0.05)):
        done = claimed.made_up(CLAIM, lambda s, valid=valid: lost_on_wine(s, valid=valid))
        worst, gain = AuditCells(done).worst()
        assert worst == data
        assert gain.mean == pytest.approx(mean, abs=2e-3)
        (criterion,) = [c for c in judge(done).criteria if f"({data})" in c.name]
        assert criterion.primary
        assert criterion.holds == (not valid)


def test_where_it_loses_is_told() -> None:
    notes = judge(claimed.made_up(CLAIM, lambda s: lost_on_wine(s, valid=False))).notes
    assert len(notes) == 5  # a kind of noise each
    assert all("better on wine" in note and "valid in 0%" in note for note in notes)
    assert judge(claimed.made_up(CLAIM, lambda s: made_up(s, GOOD))).notes == []


def test_cleanlab_has_the_better_of_its_sets_in_each_cell() -> None:
    def found(settings: dict[str, Any]) -> Metrics:
        metrics = made_up(settings, GOOD)
        if settings["noise"] == "weak" and FIVE in metrics["methods"]:
            metrics["methods"][FIVE]["f1_argmax"] = 0.99
        return metrics

    cells = AuditCells(claimed.made_up(CLAIM, found))
    assert cells.gained(OURS, FIVE, "f1", noise="weak").mean == pytest.approx(-0.04)
    assert cells.gained(OURS, FIVE, "f1", noise="pairs").mean == pytest.approx(0.05)


def test_without_cleanlab_there_is_no_verdict() -> None:
    done = claimed.made_up(CLAIM, lambda s: made_up(s, GOOD))
    some = Results(TrialResult(*d) for d in done if "folds" not in d.settings["way"])
    names = {c.name: c.outcome for c in judge(some).criteria if c.primary}
    assert [o for name, o in names.items() if "cleanlab" in name or "10 folds" in name] == [
        "open"
    ] * 3
    assert CLAIM.show(some)


def test_a_mean_over_cells_takes_what_a_seed_has() -> None:
    assert mean_over([{0: 1.0, 1: 4.0}, {0: 3.0}, {}]).values == (2.0, 4.0)


def test_judging_seeds_were_used_for_nothing_else() -> None:
    assert {t.settings["seed"] for t in CLAIM.trials(False)} == set(SEEDS)
    assert not set(SEEDS) & {t.settings["seed"] for t in CLAIM.trials(True)}
    assert min(SEEDS) > max(range(100, 106))  # of memorization, and below it the benchmarks'


@pytest.mark.parametrize("data", sorted({*SOURCES} - {"mnist1d"}))
def test_exactly_the_share_asked_for_is_wrong(data: str) -> None:
    for noise, rate in (("random", 0.4), ("weak", 0.2)):
        found = mislabelled(data, noise, rate, seed=3)
        assert int(found.wrong.sum()) == round(rate * len(found.x))
        assert int(found.given.max()) < found.classes
    assert len(found.x) == SOURCES[data].training
    assert len(found.x_test) == len(found.y_test) > 0


def test_mnist1d_is_drawn_where_it_is_installed() -> None:
    pytest.importorskip("mnist1d")
    found = mislabelled("mnist1d", "random", 0.2, seed=0)
    assert found.x.shape == (2_000, 40)
    assert int(found.wrong.sum()) == 400


def test_pairs_are_the_class_after_and_of_two_classes_one_sided() -> None:
    wine = mislabelled("wine", "pairs", 0.3, seed=1)
    assert torch.equal(wine.given[wine.wrong], (wine.true[wine.wrong] + 1) % 3)
    cancer = mislabelled("cancer", "pairs", 0.3, seed=1)
    assert set(cancer.true[cancer.wrong].tolist()) == {1}
    assert int(cancer.wrong.sum()) == round(0.3 * int((cancer.true == 1).sum()))


def test_a_weak_model_errs_between_classes_that_are_near() -> None:
    """By distances to the means of the classes: of the label it names, and of the runner-up."""

    def distances(noise: str) -> tuple[float, float, float]:
        found = mislabelled("digits", noise, 0.2, seed=2)
        means = torch.stack([found.x[found.true == c].mean(0) for c in range(10)])
        every = torch.cdist(found.x, means).square()
        named = every.gather(1, found.given[:, None])[found.wrong].mean()
        own = every.gather(1, found.true[:, None]).squeeze(1)
        lead = every.scatter(1, found.true[:, None], float("inf")).min(1).values - own
        return float(named), float(lead[found.wrong].mean()), float(lead[~found.wrong].mean())

    (named, wrong, right), (at_random, *leads) = map(distances, ("weak", "random"))
    assert named < 0.9 * at_random
    assert wrong < 0.8 * right
    assert leads[0] > 0.9 * leads[1]


def test_data_repeat_by_seed() -> None:
    a, b, c = (mislabelled("drawn", "weak", 0.2, seed=s) for s in (5, 5, 6))
    assert torch.equal(a.given, b.given)
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, c.x)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("iris", "random", 0.2), "data"),
        (("wine", "odd", 0.2), "noise"),
        (("wine", "weak", 2.0), "rate"),
    ],
)
def test_data_that_there_are_not_are_refused(given: tuple[str, str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must"):
        mislabelled(*given, seed=0)


def test_every_part_of_the_library_has_docstrings_enough() -> None:
    assert all(sum(1 for _ in docstrings(package)) >= 120 for package in PACKAGES)


def test_a_run_is_scored_in_several_ways() -> None:
    for way in ("gate", "adamw"):
        found = run({**QUICK, "way": way}, Workspace())
        assert set(found["methods"]) == set(METHODS[way])
        assert set(found["accuracy"]) == set(ACCURACY[way])
        assert all(m["trainings"] == 1.0 for m in found["methods"].values())
        assert found == run({**QUICK, "way": way}, Workspace())
    assert set(run({**QUICK, "way": "slow"}, Workspace())["methods"]) == {"slow"}


def test_a_model_is_retrained_on_what_was_kept() -> None:
    data, recipe = mislabelled("cancer", "pairs", 0.4, seed=0), recipe_for(400, (30,), 30)
    gate = by_own_predictions(data, recipe, "gate", seed=0)["accuracy"]
    adamw = by_own_predictions(data, recipe, "adamw", seed=0)["accuracy"]
    assert min(*gate.values(), adamw["all wrong ones"]) > adamw["nothing"] + 0.03


def test_scores_are_those_of_perfect_and_of_reversed_predictions() -> None:
    true = torch.arange(90) % 3
    given = true.clone()
    given[:9] = (true[:9] + 1) % 3
    wrong = (given != true).numpy()
    right = scores(audited(9.0 * torch.eye(3)[true], None, given), wrong)
    assert (right["ap"], right["f1"], right["recall_error"]) == (1.0, 1.0, None)
    assert right["share_error"] == pytest.approx(0.0)
    nothing = scores(audited(9.0 * torch.eye(3)[given], None, given), wrong)
    assert nothing["f1"] == 0.0
    assert nothing["share_error"] == pytest.approx(-0.1)


def test_folds_stop_before_what_is_held_out_gets_worse() -> None:
    data = mislabelled("wine", "random", 0.4, seed=0)
    recipe = recipe_for(len(data.x), (13,), 60)
    train = StoppedEarly(data.classes, recipe, seed=0)
    model = train(data.x, data.given)
    most = len(FOLD_RATES) * 60 * 96 + 60 * 120
    assert 0 < train.seen < most
    whole = trained(data.x, data.given, data.classes, RUNS["adamw"], recipe, seed=0)

    def fitted(net: torch.nn.Module) -> float:
        return float((net(data.x).argmax(1) == data.given).double()[data.wrong].mean())

    assert fitted(model) < fitted(whole) - 0.2


def test_the_best_epoch_is_told_and_not_the_last() -> None:
    data = mislabelled("wine", "random", 0.4, seed=0)
    train = StoppedEarly(3, recipe_for(120, (13,), 60), seed=0)
    held, rest = torch.arange(120).split([24, 96])
    _, at = train._least(data.x, data.given, held, rest, 1e-3)
    assert 0 < at < 50
    assert train.seen == 96 * (at + PATIENCE)


def test_out_of_fold_predictions_cost_what_was_passed_through() -> None:
    data = mislabelled("wine", "random", 0.2, seed=0)
    recipe = recipe_for(len(data.x), (13,), 3)
    found, cost = out_of_fold(data, recipe, folds=5, seed=0)
    # Three epochs never stop early: two rates on 77 of 96, and the best epochs on all 96.
    least, most = 5 * 96 / 360, 5 * 3 * 96 / 360
    assert 5 * 2 * 3 * 77 / 360 + least <= cost + 1e-9
    assert cost <= 5 * 2 * 3 * 77 / 360 + most + 1e-9
    assert found.predictions.shape == (120, 3)


def test_cleanlab_scores_the_same_predictions() -> None:
    pytest.importorskip("cleanlab")
    data = mislabelled("wine", "random", 0.2, seed=0)
    recipe = recipe_for(len(data.x), (13,), 20)
    found, _ = out_of_fold(data, recipe, folds=5, seed=0)
    theirs, flagged = cleanlab_scores(found, data.wrong.numpy())
    p, y = found.pred_probs, found.labels
    disagree = p.argmax(1) != y
    wrong = data.wrong.numpy()
    hits = 2 * float((disagree & wrong).sum())
    assert theirs["f1_argmax"] == pytest.approx(hits / (disagree.sum() + wrong.sum()))
    assert theirs["share_error"] == pytest.approx(float(np.mean(flagged) - wrong.mean()))
    whole = by_folds(data, recipe, 5, seed=0)
    assert set(whole["methods"]) == {"folds-5", FIVE}
    kept = accuracy_after(data, recipe, keep=~flagged, labels=data.given, seed=0)
    assert whole["accuracy"] == {FIVE: kept}
    assert kept > accuracy_after(data, recipe, keep=flagged, labels=data.given, seed=0)


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("cleanlab on 5 folds", "Retrained without them", "gated run, averaged"):
        assert wanted in page
