"""The study of linear datamodeling scores: its quick form, its subsets, and its report."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poprisk.attribution import Replay
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies import attribution, influence_rivals
from poprisk_lab.studies.attribution import KEPT, RIVALS, SEEDS, SETTINGS, STUDY


def small(done: Replay, loss: Any) -> Tensor:
    """Minus the training losses: in no relation to the query, but an estimate's shape."""
    x, y = done.problem.train
    u = done.problem.shaped(done.problem.J.values(done.final, x))
    return -loss(u, y).detach().repeat(attribution.QUERIES, 1)


def test_the_quick_form_scores_every_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "EKFAC (kronfluence)"
    monkeypatch.setattr(attribution, "RIVALS", {name: ("kronfluence", small)})
    first, rival = STUDY.trials(True)
    product = tmp_path / "product"
    found: Any = STUDY.run(first.settings, Workspace(product=product))
    again: Any = STUDY.run(rival.settings, Workspace(given={first.name: product}))
    done = [TrialResult(first.settings, found), TrialResult(rival.settings, again)]
    assert all(-1 <= score <= 1 for row in (found, again) for score in row["scores"].values())
    assert found["scores"]["followed"] > 0.5
    assert math.isfinite(found["agreement"])
    measured, predicted = (found["left_out"]["10"][k] for k in ("measured", "predicted"))
    assert measured < 0
    assert predicted == pytest.approx(measured, rel=0.3)
    report = json.loads(json.dumps(STUDY.report(Results(done))))
    (summary,) = report["settings"].values()
    assert set(summary["scores"]) == {*found["scores"], name}
    assert summary["valid"] == [found["valid"]]
    assert 0 < again["distance"] <= 1
    assert summary["distance from followed"] == {name: [again["distance"]]}


def test_other_packages_are_left_out_where_they_are_not_and_score_the_same_trainings() -> None:
    trials = STUDY.trials(False)
    own = {t.name: t for t in trials if "rival" not in t.settings}
    assert len(own) == len(SETTINGS) * len(SEEDS)
    assert len(trials) == len(own) * (1 + len(RIVALS))
    for trial in trials:
        if "rival" not in trial.settings:
            assert trial.keeps
            assert not trial.needs
            continue
        (before,) = trial.after
        assert trial.needs == (RIVALS[trial.settings["rival"]][0],)
        assert own[before].settings.items() <= trial.settings.items()


def test_a_half_of_the_examples_counts_twice() -> None:
    for weights in attribution._subsets(300, 5, 0):
        assert sorted(set(weights.tolist())) == [0.0, 1 / KEPT]
        assert float(weights.mean()) == 1


def test_the_score_is_the_rank_correlation_of_predicted_and_measured() -> None:
    influence = torch.tensor([[1.0, 2.0, -4.0], [0.5, 0.0, 0.0]])
    subsets = [torch.tensor(w).double() for w in ([2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0])]
    values = torch.tensor([[3.0, 9.0], [5.0, 1.0], [1.0, 1.0]])
    assert attribution._score(influence, subsets, values) == pytest.approx(1)
    assert attribution._score(-influence, subsets, values) == pytest.approx(-1)


def test_the_distance_of_two_estimates_knows_no_scale() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert attribution._distance(-7 * a, a) == pytest.approx(0)
    assert attribution._distance(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), a) == pytest.approx(1)
    assert attribution._distance(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), a) == pytest.approx(0.8)


def test_a_setting_without_other_packages_has_no_score_of_theirs() -> None:
    setting = next(iter(SETTINGS))
    row = {
        "scores": {"followed": 0.9}, "agreement": 1.0, "valid": True, "cost": 3.0,
        "valid_of_mean": True, "left_out": {"1": {"measured": 0.1, "predicted": 0.1}},
    }  # fmt: skip
    done = [TrialResult({"setting": setting, "seed": s, "subsets": 4}, row) for s in range(3)]
    with_one = [*done, TrialResult({**done[0].settings, "rival": "x"}, {"scores": {"x": 0.2}})]
    for rows, names in ((done, {"followed"}), (with_one, {"followed", "x"})):
        summary = STUDY.report(Results(rows))["settings"][setting]
        assert set(summary["scores"]) == names
        assert summary["valid"] == [True] * 3
        assert summary["scores"]["followed"]["mean"] == pytest.approx(0.9)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("setting", ["ridges, MLP, SGD", "repeats 25%, transformer, SGD"])
def test_an_estimate_of_another_package_goes_along_with_ours(name: str, setting: str) -> None:
    package, estimate = influence_rivals.RIVALS[name]
    pytest.importorskip(package)
    few = SETTINGS[setting]._replace(epochs=5)
    done = attribution.trained(few, 0)
    torch.manual_seed(0)
    found = estimate(done, few.loss)
    assert found.shape == (attribution.QUERIES, few.n)
    products = attribution._gradient_products(done, partial(attribution._losses, few.loss))
    both = torch.stack([found.flatten(), products.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.1  # positive raises the loss, as in ours
