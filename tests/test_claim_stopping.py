"""The claim on stopping: its rivals' formulas, what a trial finds, its verdict, its quick form."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import claimed
from poprisk.losses import cross_entropy, squared_error
from poprisk_lab import checkpoint
from poprisk_lab.checkpoint import Workspace
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Results
from poprisk_lab.studies.criteria import verdict
from poprisk_lab.studies.risk.problems import NoisyData, TrainingProblem, number_costs, sgd
from poprisk_lab.studies.stopping import (
    COVERED,
    EARLIER,
    LEVEL,
    OFF,
    ON,
    REGRET,
    RIVALS,
    SEEDS,
    WIDTH,
    judge,
    rivals,
    runs,
    show,
    trials,
)
from poprisk_lab.studies.stopping.problems import OLD, PROBLEMS
from poprisk_lab.studies.stopping.rivals import (
    FOLDS,
    FREEZE,
    GRACE,
    RULES,
    SLOPE,
    RivalLook,
    evidence_of_everything,
    evidence_of_minibatches,
    grades,
    gradstop,
    look_at,
    parts_of,
    slope_of_the_loss,
)
from poprisk_lab.studies.stopping.runs import (
    END,
    FIFTH,
    FOLDED,
    REFITTED,
    choices,
    figures,
    held_out,
    look_epochs,
    one,
    with_twin,
)
from poprisk_lab.tasks.nets import mlp

CLAIM = CLAIMS["stopping"]
SMALL = {"problem": "ridges, MLP, AdamW", "seed": 3, "epochs": 3}


# --- what the rules see ---------------------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    model = mlp(3, 7, 2).to(dtype)
    with torch.no_grad():
        model.get_parameter("0.bias")[2] = -100.0  # a unit that is off
    return model, torch.randn(26, 3, dtype=dtype), torch.randint(2, (26,))


def naive(
    model: nn.Module, x: Tensor, y: Tensor
) -> tuple[float, int, dict[str, float], dict[str, Tensor]]:
    """The statistic, its number of parameters, and mean sizes, from one gradient after another."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1])[0], parameters)
        for i in range(len(y))
    ]
    b, statistic, count, sizes, means = len(y), 0.0, 0, dict[str, float](), dict[str, Tensor]()
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        g = torch.stack(column)
        means[name] = g.mean(0)
        sizes[name] = float(means[name].abs().mean())
        for k in range(g[0].numel()):
            values = [float(one.reshape(-1)[k]) for one in g]
            mean = sum(values) / b
            variance = sum((v - mean) ** 2 for v in values) / (b - 1)
            if variance > 0:
                statistic += b * mean**2 / variance
                count += 1
    return statistic, count, sizes, means


def looked(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> RivalLook:
    return look_at(
        model, cross_entropy, x, y, batch_size=batch_size, epoch=2, share=0.5, train_loss=0.7
    )


@pytest.mark.parametrize("at_once", [1, 500])
def test_a_look_is_the_naive_statistics_of_a_pass(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "AT_ONCE", at_once)
    model, x, y = problem()
    found = looked(model, x, y, 6)
    assert found[:3] == (2, 0.5, 0.7)
    whole, parameters, _, _ = naive(model, x, y)
    assert parameters == 3 * 6 + 6 + 2 * 6 + 2  # without the unit that is off
    assert found.coordinates == parameters
    assert found.signal == pytest.approx(whole)
    parts = [
        naive(model, x[s], y[s]) for s in (slice(0, 6), slice(6, 13), slice(13, 19), slice(19, 26))
    ]
    expected = sum(1 - statistic / count for statistic, count, *_ in parts) / 4
    assert found.evidence == pytest.approx(expected)
    for name in ("0.weight", "2.weight"):
        assert found.sizes[name] == pytest.approx(sum(sizes[name] for *_, sizes, _ in parts) / 4)
    assert set(found.sizes) == {"0.weight", "2.weight"}


def test_the_statistic_has_no_unit_and_knows_noise_from_signal() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(50, 1), torch.randn(400, 50)
    noise, slope = torch.randn(400, 1), x[:, :1] * 3

    def statistic(y: Tensor, scale: float = 1.0) -> float:
        found = look_at(
            model, lambda u, t: scale * (u - u.detach()).mul(t).squeeze(1), x, y,
            batch_size=400, epoch=1, share=1.0, train_loss=1.0,
        )  # fmt: skip
        assert found.coordinates == 51
        return found.signal / found.coordinates

    assert statistic(noise) == pytest.approx(1.0, abs=0.4)
    assert statistic(slope) > 5
    assert statistic(noise, 1e-3) == pytest.approx(statistic(noise), rel=1e-3)


def test_a_look_leaves_the_run_alone() -> None:
    torch.manual_seed(0)
    model = mlp(3, 8, 2, dropout=0.5)
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    before = torch.get_rng_state()
    first = looked(model, x, y, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert looked(model, x, y, 5) == first
    model.eval()
    assert looked(model, x, y, 5) != first  # dropout is part of the noise


# --- the rules ------------------------------------------------------------------------------------


def look(epoch: int = 1, **changed: Any) -> RivalLook:
    plain = RivalLook(epoch, epoch / 10, 1.0, -1.0, 100.0, 10, {"w": 1.0})
    return plain._replace(**changed)


def test_evidence_stops_where_its_criterion_is_first_above_zero() -> None:
    looks = [look(evidence=e, signal=s) for e, s in ((-1, 30), (0, 10), (0.1, 11), (-1, 9.9))]
    assert evidence_of_minibatches(looks, 0.5) == 2
    assert evidence_of_everything(looks, 0.5) == 3
    assert evidence_of_minibatches(looks[:2], 0.5) is None
    assert evidence_of_everything(looks[:3], 0.5) is None


def test_gradstop_compares_the_credibility_with_its_draw() -> None:
    """Of two parameters χ² has the tail exp(-T/2)."""
    looks = [look(signal=t, coordinates=2) for t in (20.0, 6.0, 2.0, 0.2)]
    for i, t in enumerate((20.0, 6.0, 2.0, 0.2)):
        s = math.exp(-t / 2)
        assert gradstop(looks, s * 0.999) == i
        assert gradstop(looks, s * 1.001) == (i + 1 if i < 3 else None)


def test_gradstop_counts_parameters() -> None:
    few, many = look(signal=100.0, coordinates=10), look(signal=100.0, coordinates=100)
    assert gradstop([few, many], 0.3) == 1


def test_grades_stops_when_every_matrix_has_been_small_once() -> None:
    small, large = 0.99 * FREEZE, 1.01 * FREEZE
    late = math.ceil(10 * GRACE)
    rows = [
        (late - 1, {"a": 1.0, "b": 0.1}),
        (late, {"a": small, "b": 0.1}),  # a is frozen
        (late + 1, {"a": 5.0, "b": 2.0}),  # and stays so
        (late + 2, {"a": 5.0, "b": 2 * large}),
        (late + 3, {"a": 5.0, "b": 2 * small}),  # of the largest so far
    ]
    looks = [look(epoch, sizes=sizes) for epoch, sizes in rows]
    assert grades(looks, 0.5) == 4
    assert grades(looks[:4], 0.5) is None
    early = [look(1, sizes={"a": 1.0}), look(2, sizes={"a": 0.0}), look(8, sizes={"a": 0.95})]
    assert (early[1].share < GRACE, grades(early, 0.5)) == (True, None)
    assert grades([look(9, sizes={})], 0.5) is None


def test_slope_stops_where_the_loss_falls_too_little_an_epoch() -> None:
    def at(*pairs: tuple[int, float]) -> int | None:
        return slope_of_the_loss([look(epoch, loss=loss) for epoch, loss in pairs], 0.5)

    assert at((1, 1.0), (2, 1 - 1.1 * SLOPE), (3, 0.5)) is None
    assert at((1, 1.0), (2, 1 - 0.9 * SLOPE)) == 1
    assert at((1, 1.0), (4, 1 - 2.9 * SLOPE)) == 1  # in three epochs
    assert at((1, 1.0), (4, 1 - 3.1 * SLOPE)) is None
    assert at((1, 100.0), (2, 100 - 90 * SLOPE)) == 1
    assert at((1, 1.0), (2, 1.1)) == 1


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_look_ahead(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        v = torch.rand(12, 5, generator=g).tolist()
        looks = [
            RivalLook(i + 1, (i + 1) / 12, a, b - 0.9, 20 * c, 10, {"u": d, "w": e})
            for i, (a, b, c, d, e) in enumerate(v)
        ]
        at = RULES[name].rule(looks, 0.5)
        for k in range(1, 13):
            early = RULES[name].rule(looks[:k], 0.5)
            assert early == (at if at is not None and at < k else None)


def test_folds_are_equal_and_keep_groups_together() -> None:
    found = parts_of(103, None, generator=torch.Generator().manual_seed(0))
    assert sorted(found.bincount().tolist()) == [20, 20, 21, 21, 21]
    groups = torch.arange(60).repeat_interleave(3).flip(0) * 7
    found = parts_of(180, groups, generator=torch.Generator().manual_seed(0))
    assert found.bincount().tolist() == [36] * FOLDS
    assert torch.equal(found.view(60, 3).amin(1), found.view(60, 3).amax(1))


# --- what a trial finds ---------------------------------------------------------------------------


def made_up_run(**changed: Any) -> Metrics:
    epochs = (2, 4, 6, 8)
    looks = [look(e)._replace(share=e / 8, loss=1 / e)._asdict() for e in epochs]
    plain = {
        "looks": looks,
        "risks": [4.0, 2.0, 3.0, 5.0],
        "estimates": [4.4, 2.1, 1.5, 6.5],
        "errors": [0.1] * 4,
        "valid": [True, True, False, False],
        "comparable": [True] * 4,
        "stop": [2, 0, 2],
        "believed": True,
        "cost": 2.1,
        "draw": 0.5,
    }
    return plain | changed


def made_up_folds() -> list[Metrics]:
    """The first is least at look 2, all together at look 3."""
    plain = {"examples": 20, "all": 100}
    first = {"losses": [30.0, 28.0, 20.0, 40.0], "risks": [9.0, 8.0, 2.5, 6.0], **plain}
    other = {"losses": [30.0, 29.0, 28.0, 20.0], "risks": [0.0] * 4, **plain}
    return [first, other, other, other, other]


def test_choices_take_the_model_that_is_kept_and_count_its_cost() -> None:
    found = choices(made_up_run(), made_up_folds())
    assert list(found) == [END, *RIVALS]
    assert found[END] == (3, 5.0, 1.0)
    assert found[FIFTH] == (2, 2.5, 0.8)
    assert found[REFITTED] == (2, 3.0, pytest.approx(0.8 + 6 / 8))
    assert found[FOLDED] == (3, 5.0, pytest.approx(5.0))
    assert found["GradES"] == (3, 5.0, 1.0)  # it never spoke
    assert found["GradStop"] == (3, 5.0, 1.5)  # four looks in eight epochs


def test_a_rule_that_speaks_stops_there() -> None:
    run = made_up_run()
    run["looks"][1]["signal"] = 1.0
    found = choices(run, made_up_folds())
    for name in ("evidence of all examples", "GradStop"):
        assert found[name] == (1, 2.0, 1.5)


def test_figures_of_a_run() -> None:
    found = figures(made_up_run(), made_up_folds())
    assert found["regret"] == pytest.approx(0.5)
    assert (found["best"], found["covered"], found["width"]) == (1, 1.0, 0.5)
    assert found["level"] == pytest.approx((0.1 + 0.05) / 2)
    assert found["off"] == [2, 2]  # half, and 30% too much
    assert found["on"] == [2, 2]
    assert found["rivals"][FIFTH] == {"at": 2, "regret": 0.25, "cost": 0.8}
    other = figures(made_up_run(stop=[2, 2, 3], valid=[False, True, True, False]), made_up_folds())
    assert (other["covered"], other["width"]) == (0.0, 0.25)
    assert (other["off"], other["on"]) == ([1, 2], [1, 2])
    assert figures(made_up_run(valid=[False] * 4), made_up_folds())["level"] is None


def test_an_estimate_that_is_no_number_must_be_flagged() -> None:
    nan = made_up_run(estimates=[4.0, 2.0, math.nan, math.inf], valid=[True, True, True, False])
    assert figures(nan, made_up_folds())["off"] == [1, 2]


def line(seed: int, n: int = 60, groups: Tensor | None = None) -> NoisyData:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 200, 3, generator=g)
    y = x[:, :1] + torch.randn(n + 200, 1, generator=g)
    return NoisyData(x[:n], y[:n], x[n:], number_costs(x[n:, :1], 1.0), groups)


def tiny(**changed: Any) -> TrainingProblem:
    plain = TrainingProblem(
        line, lambda: mlp(3, 8, 1, dropout=0.3), squared_error, sgd(0.1, 0.9), 6, 16
    )
    return plain._replace(**changed)


def test_looks_and_the_twin_leave_the_run_as_it_would_be_alone() -> None:
    """Its model is that of a fold which holds nothing out: a refit is the run itself."""
    data = line(1)
    run = with_twin(tiny(), data, 1)
    alone = held_out(tiny(), data, torch.zeros(60, dtype=torch.bool), 1)
    assert alone["risks"] == run["risks"]
    assert len(run["looks"]) == len(run["estimates"]) == 6
    assert [look["epoch"] for look in run["looks"]] == look_epochs(6)
    assert run["looks"][-1]["share"] == 1.0
    assert 0 <= run["draw"] < 1
    shorter = with_twin(tiny(epochs=4), data, 1)
    assert shorter["risks"] == run["risks"][:4]


def test_what_is_held_out_is_not_trained_on() -> None:
    data, out = line(1), torch.arange(60) % 5 == 2
    found = held_out(tiny(), data, out, 1)
    changed = data._replace(y=torch.where(out[:, None], 100.0, data.y))
    again = held_out(tiny(), changed, out, 1)
    assert again["risks"] == found["risks"]
    assert min(again["losses"]) > 12 * 4000
    assert (found["examples"], found["all"]) == (12, 60)
    assert 12 * 0.2 < found["losses"][-1] < 12 * 2
    assert found["risks"] != held_out(tiny(), data, ~out, 1)["risks"]


def test_groups_reach_the_estimates_and_the_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.arange(60) // 6
    monkeypatch.setitem(PROBLEMS, "tiny", tiny(data=partial(line, groups=groups)))
    monkeypatch.setitem(PROBLEMS, "apart", tiny())
    outs, honest = list[Tensor](), runs.held_out

    def spied(p: TrainingProblem, data: NoisyData, out: Tensor, seed: int) -> Metrics:
        outs.append(out)
        return honest(p, data, out, seed)

    monkeypatch.setattr(runs, "held_out", spied)
    found = one({"problem": "tiny", "seed": 1}, Workspace())
    assert len(outs) == FOLDS
    assert all(len({*out[groups == k].tolist()}) == 1 for out in outs for k in range(10))
    assert torch.stack(outs).sum(0).tolist() == [1] * 60
    apart = one({"problem": "apart", "seed": 1}, Workspace())
    assert apart["risks"] == found["risks"]
    assert apart["errors"] != found["errors"]


def test_a_trial_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setitem(PROBLEMS, "tiny", tiny())
    settings = {"problem": "tiny", "seed": 2, "epochs": 4}
    whole = one(settings, Workspace())
    done, honest = list[str](), runs.held_out

    def stopped(*given: Any) -> Metrics:
        done.append("fold")
        if len(done) == 3:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(runs, "held_out", stopped)
    workspace = Workspace(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        one(settings, workspace)
    monkeypatch.setattr(runs, "with_twin", None)  # which is not called again
    again = one(settings, workspace)
    assert len(done) == FOLDS + 1
    assert again["cost"] != 0
    assert {**again, "cost": 0} == {**whole, "cost": 0}  # which is measured by time


def test_one_problem() -> None:
    found = one(SMALL, Workspace())
    assert found["epochs"] == [1, 2, 3]
    assert set(found["rivals"]) == {END, *RIVALS}
    assert all(rival["regret"] >= 0 for name, rival in found["rivals"].items() if name != FIFTH)
    assert found["estimates"][0] == pytest.approx(found["risks"][0], rel=0.1)
    assert found["cost"] > 1.2


# --- trials and verdict ---------------------------------------------------------------------------


def test_every_problem_is_run_on_seeds_that_nothing_was_chosen_on() -> None:
    found = trials(False)
    assert len({t.name for t in found}) == len(found) == len(SEEDS) * len({**OLD, **PROBLEMS})
    assert set(SEEDS) == set(range(520, 525))
    assert not OLD.keys() & PROBLEMS.keys()
    assert EARLIER == len(OLD) == 12
    assert len(PROBLEMS) >= 6
    for trial in found:
        assert ("digits" in trial.settings["problem"]) <= ("sklearn" in trial.needs)
    assert any("mnist1d" in t.needs for t in found)
    assert {t.settings["seed"] for t in trials(True)} == {0}


GOOD = {"regret": 0.01, "covered": 1.0, "width": 0.3, "level": 0.04, "off": 100, "on": 98}


def made_up(settings: dict[str, Any], level: dict[str, Any]) -> Metrics:
    """All rivals lose 10%, those of five folds a tenth of it; what ``level`` names, as it says."""
    shift = 1 + 0.01 * ((len(settings["problem"]) + settings["seed"]) % 5)
    others = {name: {"at": 1, "regret": 0.1 * shift, "cost": 1.5} for name in (END, *RIVALS)}
    others[FOLDED] = {"at": 1, "regret": 0.001, "cost": 4.5}
    for name, regret in level.items():
        if name in others:
            others[name] = {**others[name], "regret": regret * shift}
    new = settings["problem"] in PROBLEMS
    return {
        "epochs": [1, 2, 3],
        "risks": [2.0, 1.0, 1.5],
        "estimates": [2.1, 1.0, 1.6],
        "errors": [0.1, 0.1, 0.1],
        "train": [1.9, 0.8, 0.5],
        "valid": [True, True, False],
        "comparable": [True] * 3,
        "best": 1,
        "stop": 1,
        "low": 0,
        "high": 2,
        "believed": True,
        "cost": 2.1,
        "regret": level["regret"] * shift,
        "covered": level["covered"],
        "width": level["width"] * shift,
        "level": None if settings["seed"] == 520 else level["level"] * shift,
        "off": [level["off"] if new else 0, 100],
        "on": [level["on"] if new else 0, 100],
        "rivals": others,
    }


def results(**changed: Any) -> Results:
    return claimed.made_up(CLAIM, lambda s: made_up(s, GOOD | changed))


def outcomes(done: Results) -> dict[str, str]:
    return {c.name: c.outcome for c in judge(done).criteria}


def test_all_bounds_kept_reproduce_it() -> None:
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, GOOD)) == "reproduced"


def test_no_bound_kept_does_not() -> None:
    bad = {"regret": 0.2, "covered": 0.5, "width": 0.7, "level": 0.2, "off": 50, "on": 50}
    assert claimed.verdict_of(CLAIM, lambda s: made_up(s, bad)) == "not reproduced"


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"regret": REGRET * 1.1}, "regret: "),
        ({"covered": COVERED - 0.01}, "runs whose interval holds"),
        ({"width": WIDTH * 1.1}, "width of the interval"),
        ({"level": LEVEL * 1.1}, "distance of believed"),
        ({"off": 100 * OFF - 1}, "flag off"),
        ({"on": 100 * ON - 1}, "flag on"),
        *(({name: 0.009}, f"regret spared beside {name} (") for name in RIVALS if name != FOLDED),
    ],
)
def test_each_criterion_can_fail_and_decides(changed: dict[str, float], part: str) -> None:
    good, bad = judge(results()).criteria, judge(results(**changed)).criteria
    (name,) = [c.name for c in good if c.primary and c.name.startswith(part)]
    assert next(c.outcome for c in good if c.name == name) == "as claimed"
    assert next(c.outcome for c in bad if c.name == name) == "does not hold"
    assert verdict(bad) == "partly reproduced"


def test_what_costs_more_than_the_twin_is_told_and_not_decided() -> None:
    criteria = judge(results()).criteria
    assert len({c.name for c in criteria}) == len(criteria)
    told = [c for c in criteria if c.name.startswith((f"regret spared beside {FOLDED}",
                                                      f"regret spared beside {END}"))]  # fmt: skip
    assert len(told) == 3
    assert not any(c.primary for c in told)
    assert any(c.outcome == "does not hold" for c in told)
    assert [c.primary for c in criteria].count(True) == 6 + len(RIVALS) - 1
    dearer = results(**{END: 0.0})
    assert verdict(judge(dearer).criteria) == "reproduced"


def test_problems_count_alike_and_new_ones_apart() -> None:
    first = next(iter(PROBLEMS))

    def found(settings: dict[str, Any]) -> Metrics:
        return made_up(settings, GOOD | {"regret": 0.5 * (settings["problem"] == first)})

    done = claimed.made_up(CLAIM, found)
    regrets = [c.estimate for c in judge(done).criteria if c.name.startswith("regret: ")]
    assert [len(i.values) for i in regrets] == [len(OLD) + len(PROBLEMS), len(PROBLEMS)]
    expected = sum(found(t.settings)["regret"] for t in trials(False)) / len(SEEDS)
    assert [i.mean for i in regrets] == pytest.approx([expected / len(i.values) for i in regrets])
    (note,) = judge(done).notes
    assert first in note


def test_the_table_has_every_problem_and_the_plots_every_mark() -> None:
    done = results()
    table = judge(done).table
    assert all(len(row) == len(table.head) for row in table.rows)
    assert [row[0] for row in table.rows] == [*OLD, *(f"{name} (new)" for name in PROBLEMS)]
    assert {f"regret: {name}" for name in RIVALS} <= {*table.head}
    assert all(plot.lines for plot in show(done))  # pyrefly: ignore


def test_one_problem_settles_nothing() -> None:
    few = Results(d for d in results() if d.settings["problem"] == next(iter(PROBLEMS)))
    assert verdict(judge(few).criteria) == "undecided"


@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("GradStop", "Interval of the stopping point", "digits 40%, MLP, AdamW"):
        assert wanted in page
