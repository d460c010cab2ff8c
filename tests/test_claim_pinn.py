"""The claim of the differential equation: its verdict on results of both kinds, its runs."""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import Any

import pytest
import torch

from poprisk_lab.page.claims import notices, render_claim
from poprisk_lab.plots import Plot
from poprisk_lab.studies import CLAIMS, optimizers
from poprisk_lab.studies.claim import Metrics, Results, TrialResult, Workspace
from poprisk_lab.studies.criteria import verdict
from poprisk_lab.studies.lbfgs import finish
from poprisk_lab.studies.optimizers import error_metrics
from poprisk_lab.studies.pinn import DEEPXDE, GOAL, judge, run, show, trials
from poprisk_lab.studies.record import judged
from poprisk_lab.studies.run import ClaimDirectory
from poprisk_lab.tasks.convection import BATCH, PeriodicMLP, batches, physics_loss

CLAIM = CLAIMS["pinn"]

HAS_DEEPXDE = importlib.util.find_spec("deepxde") is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ClaimDirectory:
    """The quick form, run to the end."""
    directory = ClaimDirectory(tmp_path_factory.mktemp("claims") / "pinn", CLAIM)
    directory.create(quick=True, workers=1)
    directory.work(workers=1, on_trial=lambda *_: None)
    return directory


def one(steps: int | None, final: float) -> Metrics:
    return {
        "steps": steps,
        "limit": 2000,
        "final": final,
        "best": final / 2,
        "at": [1000, 2000],
        "errors": [0.5, final],
    }


def made_up(
    snr: tuple[int | None, float], adamw: tuple[int | None, float], auto: int | None = None
) -> Results:
    """Full-form trials with these steps and errors, a little different for each seed."""
    done = list[TrialResult]()
    for trial in trials(False):
        arm, lr, seeds = (trial.settings[key] for key in ("arm", "lr", "seeds"))
        steps, final = snr if arm in ("snr", DEEPXDE) else adamw
        if arm == "auto":
            steps = auto
        worse = lr != 1e-2
        runs = [
            one(None if steps is None else steps + 100 * worse + s, final + 0.01 * (s + worse))
            for s in seeds
        ]
        found: Metrics = {"runs": runs}
        if trial.settings["matched"]:
            found["matched"] = [one(900, 0.9 + 0.01 * s) for s in seeds]
        done.append(TrialResult(trial.settings, found))
    return Results(done)


# --- the verdict ----------------------------------------------------------------------------------


def test_a_gate_that_is_faster_by_the_paper_s_factor_reproduces_the_claim() -> None:
    found = judge(made_up(snr=(300, 0.1), adamw=(750, 0.3)))
    assert verdict(found.criteria) == "reproduced"
    assert found.criteria[0].estimate.mean == pytest.approx(2.49, abs=0.01)


def test_a_gate_that_is_faster_by_less_reproduces_it_partly() -> None:
    found = judge(made_up(snr=(500, 0.1), adamw=(750, 0.3)))
    assert verdict(found.criteria) == "partly reproduced"
    assert [c.outcome for c in found.criteria if c.primary] == ["smaller than claimed"]


def test_a_gate_that_is_slower_and_ends_worse_does_not() -> None:
    found = judge(made_up(snr=(900, 0.5), adamw=(500, 0.3)))
    # The soft mask, made up like AdamW, is the better form then: a tie is not faster.
    assert [c.outcome for c in found.criteria if c.primary] != ["as claimed"]
    slower = Results(d for d in made_up((900, 0.5), (500, 0.3)) if d.settings["arm"] != "soft")
    found = judge(slower)
    assert verdict(found.criteria) == "not reproduced"
    assert {c.outcome for c in found.criteria if c.primary} == {"does not hold"}


def test_the_end_is_asked_by_us_and_does_not_decide() -> None:
    done = made_up(snr=(300, 0.5), adamw=(750, 0.3))
    found = judge(Results(d for d in done if d.settings["arm"] != "soft"))
    assert verdict(found.criteria) == "reproduced"
    (end,) = [c for c in found.criteria if c.name.startswith("ours:")]
    assert (end.primary, end.outcome) == (False, "does not hold")


def changed(arm: str, final: float, **where: Any) -> dict[str, Any]:
    """The criteria where the ends of an arm are these."""
    done = made_up(snr=(300, 0.1), adamw=(750, 0.3))
    for trial in done.where(arm=arm, **where):
        for s, one_run in enumerate(trial.metrics["runs"]):
            one_run["final"] = final + 0.001 * s
    return {c.name: c for c in judge(done).criteria}


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_no_worse_is_asked_at_the_same_learning_rate_and_noise(noise: float) -> None:
    name = f"noise {noise:g}, defaults, sizes by term, lr {{}}: share of AdamW's error at that rate"
    worse, same = (changed("terms", end, noise=noise, lr=1e-2) for end in (0.4, 0.3))
    assert worse[name.format(0.01)].outcome == "does not hold"
    assert same[name.format(0.01)].holds
    assert worse[name.format(0.003)].holds
    assert sum(c.outcome == "does not hold" for k, c in worse.items() if "at that rate" in k) == 1
    better = changed("adamw", 0.1, noise=noise, lr=1e-2)
    assert better[name.format(0.01)].outcome == "does not hold"
    assert better[name.format(0.003)].holds


def test_the_rate_of_ours_is_that_of_the_pilot_whatever_the_runs_say() -> None:
    name = "defaults, sizes by term: share of the error of SOAP"
    best, worst = (changed("terms", 0.01, lr=lr)[name].estimate.mean for lr in (3e-3, 1e-2))
    assert best < 0.1 < worst


def rows_of(done: Results) -> dict[str, dict[str, str]]:
    table = judge(done).table
    return {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def test_a_gate_that_never_gets_there_is_slower_up_to_the_end_of_the_runs() -> None:
    never = Results(d for d in made_up((None, 0.5), (500, 0.3)) if d.settings["arm"] != "soft")
    faster = judge(never).criteria[0]
    assert faster.estimate.mean == pytest.approx(502 / 2000, rel=1e-3)
    row = rows_of(never)["1: Algorithm 1, snr mask, lr 0.01"]
    assert (row["got there"], row["mean steps (Kaplan-Meier)"]) == ("0 of 5", "")
    assert float(row["log-rank p"]) < 0.01


def test_a_run_cut_off_counts_with_the_steps_it_had_on_both_sides() -> None:
    done = Results(d for d in made_up((400, 0.1), (800, 0.3)) if d.settings["arm"] != "soft")
    for trial in done:
        if trial.settings["arm"] == "snr":
            trial.metrics["runs"][2]["steps"] = None
    ratios = [(800 + s) / (2000 if s == 2 else 400 + s) for s in range(5)]
    faster = judge(done).criteria[0]
    assert faster.estimate.mean == pytest.approx(math.prod(ratios) ** 0.2)
    assert faster.outcome == "open"
    row = rows_of(done)["1: Algorithm 1, snr mask, lr 0.01"]
    assert row["got there"] == "4 of 5"
    assert row["mean steps (Kaplan-Meier)"] == "722 up to 2,000"


def test_the_run_through_deepxde_has_a_row_where_there_is_one() -> None:
    done = made_up((300, 0.1), (750, 0.3))
    row = rows_of(done)["1: through DeepXDE, snr mask"]
    assert (row["mean steps (Kaplan-Meier)"], row["error at the end"]) == ("300", "0.1")
    without = Results(d for d in done if d.settings["arm"] != DEEPXDE)
    assert not any("DeepXDE" in name for name in rows_of(without))
    assert judge(without).criteria == judge(done).criteria


def test_the_control_is_compared_at_one_learning_rate() -> None:
    found = judge(made_up((300, 0.1), (750, 0.3)))
    asked = {c.name: c for c in found.criteria}
    name = "snr mask, lr 0.01: times fewer steps than AdamW at its update sizes"
    assert asked[name].estimate.mean == pytest.approx(900 / 302, rel=0.01)
    assert not asked[name].primary


# --- running --------------------------------------------------------------------------------------


def test_the_quick_form_gives_a_verdict_and_a_page(finished: ClaimDirectory) -> None:
    found = judged(CLAIM, finished.read())
    assert found.report is not None
    text = render_claim(found)
    assert "Error along training, noise 1" in text
    assert "Steps to 0.4 by learning rate" in text
    assert all(isinstance(p, Plot) and p.lines for p in show(found.progress.done))
    left_out = any("pip install 'deepxde'" in n for n in notices(found))
    assert left_out != HAS_DEEPXDE


def settings(**more: Any) -> dict[str, Any]:
    given = {"arm": "snr", "lr": 1e-2, "weight_decay": 0.01, "noise": 1.0, "matched": False}
    return {**given, "seeds": [0, 1], "steps": 30, "every": 10, "keep": 1, **more}


@pytest.mark.parametrize("arm", ["adamw", "snr", "terms", "lbfgs"])
def test_a_seed_trains_beside_others_as_alone(arm: str) -> None:
    both = run(settings(arm=arm), Workspace())["runs"]
    (alone,) = run(settings(arm=arm, seeds=[1]), Workspace())["runs"]
    assert both[1]["errors"] == pytest.approx(alone["errors"], rel=1e-3)
    assert both[0]["errors"] != pytest.approx(both[1]["errors"], rel=1e-3)


def test_the_matched_control_is_another_run() -> None:
    found = run(settings(matched=True), Workspace())
    assert [len(found[key]) for key in ("runs", "matched")] == [2, 2]
    assert found["matched"][0]["errors"] != pytest.approx(found["runs"][0]["errors"], rel=1e-3)


def test_batches_hold_each_measurement_once_an_epoch_and_fresh_points() -> None:
    taken = list(itertools.islice(batches([3, 4], 100), 6))
    epoch = torch.cat([index for index, _ in taken[:3]], 1)
    assert all(len(set(row.tolist())) == 3 * BATCH for row in epoch)
    assert not torch.equal(epoch, torch.cat([index for index, _ in taken[3:]], 1))
    points = torch.cat([points for _, points in taken], 1)
    assert points.shape == (2, 6 * BATCH, 2)
    assert float(points.min()) >= 0
    assert float(points[..., 1].max()) <= 1
    assert 1 < float(points[..., 0].max()) <= 2 * math.pi
    assert len(torch.unique(points)) > 0.99 * points.numel()
    for (index, points), (own, inside) in zip(taken, batches([4], 100), strict=False):
        assert torch.equal(index[1:], own)
        assert torch.equal(points[1:], inside)


def test_the_loss_is_that_of_the_naive_way() -> None:
    torch.manual_seed(0)
    networks = [PeriodicMLP(width=8).double() for _ in range(2)]
    x, y, inside = (torch.rand(2, *s, dtype=torch.float64) for s in ((4,), (4,), (5, 2)))
    expected = torch.zeros((), dtype=torch.float64)
    for net, place, target, own in zip(networks, x, y, inside.requires_grad_(), strict=True):
        start = torch.stack([place, torch.zeros(4, dtype=torch.float64)], 1)
        (slope,) = torch.autograd.grad(net(own).sum(), own)
        residual = slope[:, 1] + 5 * slope[:, 0]
        expected += (net(start) - target).square().sum() / 4 + residual.square().sum() / 5
    found = physics_loss(networks, x, y, inside.detach())
    torch.testing.assert_close(found, expected)


def test_the_optimizer_is_told_which_loss_comes_again() -> None:
    seen = list[torch.optim.Optimizer]()
    before = optimizers.make_optimizer

    def make(*args: Any, **more: Any) -> torch.optim.Optimizer:
        seen.append(before(*args, **more))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "make_optimizer", make)
        run(settings(arm="terms"), Workspace())
    (group,) = seen[0].param_groups
    assert group["batch_size"] == {"measured": 32, "inside": 32}
    assert group["dataset_size"] == {"measured": 100, "inside": None}
    first = seen[0].state[group["params"][0]]
    assert first["term_var"].any()
    assert (first["term_var"] <= 32 / 68 * 4 * first["grad_mean_var"] + 1e-12).float().mean() > 0.9


def test_the_finish_is_that_of_l_bfgs_on_a_known_bowl() -> None:
    model = torch.nn.Linear(1, 1, bias=False).double()
    calls = [0]

    def loss() -> torch.Tensor:
        calls[0] += 1
        return (model.weight - 3).square().sum() + 0.1 * (model.weight - 3).pow(4).sum()

    found = finish(model, loss, lambda: abs(model.weight.item() - 3), evaluations=40, every=4)
    assert len(found) == 10
    assert found[0] > found[-1]
    assert found[-1] < 1e-9
    assert 40 <= calls[0] <= 80


def test_what_is_kept_is_the_first_step_at_the_goal_and_both_ends() -> None:
    found = error_metrics(settings(keep=2), [0.9, 0.41, 0.4, 0.2, 0.6], goal=GOAL)
    assert (found["steps"], found["final"], found["best"]) == (30, 0.6, 0.2)
    assert (found["at"], found["errors"]) == ([20, 40, 50], [0.41, 0.2, 0.6])
    assert error_metrics(settings(), [0.9, 0.5], goal=GOAL)["steps"] is None


@pytest.mark.skipif(not HAS_DEEPXDE, reason="needs deepxde: pip install 'poprisk[pinn]'")
@pytest.mark.filterwarnings("ignore")
def test_deepxde_trains_with_our_optimizer() -> None:
    given = settings(arm=DEEPXDE, seeds=[0], steps=400, every=200, noise=0.1)
    (found,) = run(given, Workspace())["runs"]
    assert found["at"] == [200, 400]
    assert found["errors"][1] < 0.9 * found["errors"][0] < 1.0
