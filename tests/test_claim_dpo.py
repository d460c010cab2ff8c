"""The claim on flipped preferences: losses, pairs, runs, its verdict, its quick form."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import claimed
from poprisk import Auditor
from poprisk.intervals import t_interval
from poprisk_lab import checkpoint
from poprisk_lab.checkpoint import Workspace, load_checkpoint
from poprisk_lab.page.claims import notices
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Metrics, Results, Trial
from poprisk_lab.studies.criteria import Criterion, verdict
from poprisk_lab.studies.dpo import (
    LOSS,
    WITHIN,
    judge,
    losses,
    reference,
    run,
    runs,
    show,
    stopping,
)
from poprisk_lab.studies.dpo.arms import (
    ADAMW,
    BETWEEN,
    FEW_SEEDS,
    FLIPPED,
    GATE,
    MAIN,
    NEEDS,
    PEERS,
    RATES,
    SAME,
    SEEDS,
    SHUFFLED,
    SLOW,
    trials,
)
from poprisk_lab.studies.dpo.losses import RePo, dr_dpo
from poprisk_lab.studies.dpo.measures import (
    Drawn,
    divergence,
    found_by,
    likelihoods,
    load_model,
    margins_given,
    rewards,
)
from poprisk_lab.studies.dpo.methods import FAST, OURS, Place, cells
from poprisk_lab.studies.dpo.stopping import PairMargins, preference_loss
from poprisk_lab.studies.dpo.training import PolicyRun, Way, rows_of
from poprisk_lab.studies.record import Judged
from poprisk_lab.studies.run import ClaimDirectory, ClaimProgress
from poprisk_lab.tasks import preferences
from poprisk_lab.tasks.preferences import ANSWER, PROMPT, REWARDS, flipped
from poprisk_lab.work import TrainingError

CLAIM = CLAIMS["dpo"]


# --- losses ---------------------------------------------------------------------------------------


def dpo(margins: Tensor) -> Tensor:
    return -logsigmoid(margins).mean()


def margins() -> Tensor:
    return 2 * torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sigmoid(d: float) -> float:
    return 1 / (1 + math.exp(-d))


def test_dr_dpo_is_its_formula() -> None:
    for temperature in (1.0, 0.3):
        kept = [sigmoid(d) ** (1 / temperature) for d in margins().tolist()]  # exp(-loss/β')
        expected = -temperature * math.log(sum(kept) / 7)
        assert float(dr_dpo(margins(), temperature=temperature)) == pytest.approx(expected)
    assert float(dr_dpo(margins(), temperature=1e6)) == pytest.approx(float(dpo(margins())))


def test_re_po_is_its_formula_and_moves_its_reliability() -> None:
    loss, eta = RePo(0.8, rate=0.25), 0.8
    for shift in (0.0, -1.0):
        total = mean = 0.0
        for d in (margins() + shift).tolist():
            right, wrong = eta * sigmoid(d), (1 - eta) * sigmoid(-d)
            w = right / (right + wrong)
            total -= (w * math.log(sigmoid(d)) + (1 - w) * math.log(sigmoid(-d))) / 7
            mean += w / 7
        assert float(loss(margins() + shift)) == pytest.approx(total)
        eta = 0.75 * eta + 0.25 * mean
        assert loss.reliability == pytest.approx(eta)


def test_weights_of_re_po_have_no_gradient() -> None:
    d = margins().requires_grad_()
    w = (torch.tensor(0.9).logit() + d.detach()).sigmoid()
    (found,) = torch.autograd.grad(RePo()(d), d)
    torch.testing.assert_close(found, (d.detach().sigmoid() - w) / 7)


# --- pairs ----------------------------------------------------------------------------------------


def test_exactly_the_share_is_flipped_and_larger_shares_hold_smaller_ones() -> None:
    found = [flipped(640, share, seed=3) for share in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert [int(wrong.sum()) for wrong in found] == [0, 64, 128, 192, 256]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(found))
    assert not torch.equal(found[4], flipped(640, 0.4, seed=4))


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        ("prose", "a B\nc", 0.6),
        ("characters", "a B\nc", 5.0),
    ],
)
def test_rewards_are_what_they_say(reward: str, text: str, expected: float) -> None:
    assert REWARDS[reward].of(text) == pytest.approx(expected)
    assert REWARDS[reward].of("") == 0.0


def test_a_ranking_that_is_right_finds_all() -> None:
    wrong = torch.tensor([True, False, True, False])
    assert found_by(wrong.double(), wrong) == {"auroc": 1.0, "ap": 1.0}
    assert found_by(-wrong.double(), wrong)["auroc"] == 0.0
    assert found_by(wrong.double(), wrong & False) == {"auroc": None, "ap": None}


# --- trials ---------------------------------------------------------------------------------------


def test_every_method_has_five_seeds_at_two_shares_that_nothing_was_chosen_on() -> None:
    found = trials(False)
    assert len({t.name for t in found}) == len(found)
    assert min(t.settings["seed"] for t in found if "seed" in t.settings) >= 500
    for rate in FLIPPED:
        here = [t.settings for t in found if t.settings.get("rate") == rate]
        methods = {
            tuple(v for k, v in s.items() if k not in ("seed", "matched"))
            for s in here
            if s["reward"] == MAIN
        }
        assert len(methods) * len(SEEDS) == sum(s["reward"] == MAIN for s in here)
        trained = {(s["arm"], s.get("loss"), s["lr"]) for s in here}
        assert {(a, "dpo", lr) for a in (ADAMW, GATE) for lr in RATES} <= trained
        assert {(ADAMW, loss, SLOW) for loss in (*PEERS, "robust")} <= trained


def test_what_is_shared_is_made_first_and_kept() -> None:
    found = {t.name: t for t in trials(False)}
    assert all(found[name].keeps for t in found.values() for name in t.after)
    for trial in found.values():
        if "rate" in trial.settings:
            first, pairs = (found[name].settings for name in trial.after)
            assert first["kind"] == "pretrained"
            keys = ("reward", "seed", "width", "layers")
            assert all(pairs[key] == trial.settings[key] for key in keys)


# --- the verdict ----------------------------------------------------------------------------------

GOOD = {"ours": 0.85, "fast": 0.75, "recipe": 0.88, "told": 0.885, "audit": 0.95}


def one(accuracy: float, drift: float, auroc: float, shift: float) -> Metrics:
    return {
        "at": [80, 160],
        "accuracies": [accuracy - 0.01, accuracy + shift],
        "drifts": [drift / 2, drift],
        "chosens": [0.1, -0.2],
        "final": accuracy + shift,
        "best": accuracy + shift,
        "drift": drift * (1 + shift),
        "chosen": -0.2,
        "noisy": accuracy,
        "fitted": 0.5,
        "auroc": auroc,
        "ap": auroc - 0.1,
        "kl": 0.1 * drift,
        "reward": 0.8,
    }


def made_up(settings: dict[str, Any], level: dict[str, float]) -> Metrics:
    """The methods named in ``level`` are that good; slow AdamW is 0.8, all others 0.7."""
    kind, shift = settings["kind"], 0.001 * (settings.get("seed", 0) % 3)
    if kind == "pretrained":
        return {"loss": 3.0, "versions": {}}
    if kind == "pairs":
        return {"better": 0.9, "worse": 0.7}
    if kind == "folds":
        return {"auroc": level.get("folds", 0.94), "ap": 0.8}
    if kind == "recipe":
        first, best = one(0.8, 4, 0.9, shift), one(level["recipe"], 2, 0.9, 0.0)
        audit = {"auroc": level["audit"], "ap": 0.9, "share": settings["rate"], "valid": True}
        return {"first": first, "robust": best, "without": best, "audit": audit}
    if kind == "stopping":
        stopped = level.get("stopped", 0.9)
        return {"accuracy": stopped, "end": 0.8 + shift, "best": 0.91}
    arm, lr, loss = settings["arm"], settings["lr"], settings["loss"]
    accuracy, drift, auroc = 0.7, 5.0, 0.9
    if loss == "robust":
        accuracy = level["told"] - 0.01 * (lr != SLOW)
    elif loss == "dpo" and lr == SAME and arm == GATE:
        accuracy, drift = level["ours"], level.get("drift", 4.0)
    elif loss == "dpo" and lr == SAME and arm == ADAMW:
        accuracy, drift, auroc = level["fast"], 16.0, 0.8
    elif loss == "dpo" and lr == SLOW and arm == ADAMW:
        accuracy = level.get("slow", 0.8)
    found = {"run": one(accuracy, drift, auroc, shift * (arm == GATE))}
    if settings["matched"]:
        found["matched"] = one(0.75, 4.0, 0.9, 0.0)
    return found


def results(**changed: float) -> Results:
    return claimed.made_up(CLAIM, lambda s: made_up(s, GOOD | changed))


def outcomes(done: Results) -> dict[str, str]:
    return {c.name: c.outcome for c in judge(done).criteria}


def test_both_published_figures_reproduce_it() -> None:
    found = claimed.verdict_of(CLAIM, lambda s: made_up(s, GOOD))
    assert found == "reproduced"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"ours": 0.78}, "partly reproduced"),  # less gain than published
        ({"ours": 0.7}, "partly reproduced"),  # none, but less drift
        ({"drift": 8.0}, "partly reproduced"),  # twice less
        ({"ours": 0.7, "drift": 20.0}, "not reproduced"),
    ],
)
def test_less_than_published_does_not(changed: dict[str, float], expected: str) -> None:
    assert verdict(judge(results(**changed)).criteria) == expected


@pytest.mark.parametrize(
    ("changed", "part", "count"),
    [
        ({"slow": 0.9}, "accuracy gained on the best AdamW of 4", 3),
        ({"recipe": 0.885 - WITHIN - 0.001}, "recipe: accuracy beside robust", 2),
        ({"slow": 0.89}, "recipe: accuracy gained on the best", 2),
        ({"slow": 0.89}, "recipe without suspects: accuracy gained", 2),
        ({"stopped": 0.79}, "twin: accuracy gained", 2),
        ({"stopped": 0.889}, "AdamW's best moment", 2),
        ({"audit": 0.79}, "gained on AdamW's own margin", 2),
        ({"audit": 0.89}, "that of the best AdamW", 2),
        ({"audit": 0.94 - LOSS - 0.001}, "5-fold cross-fitting", 2),
    ],
)
def test_each_criterion_can_fail_and_is_told(
    changed: dict[str, float], part: str, count: int
) -> None:
    good, bad = outcomes(results()), outcomes(results(**changed))
    names = [name for name in bad if part in name]
    assert len(names) == count
    assert [bad[name] for name in names] == ["does not hold"] * count
    assert all(good[name] == "as claimed" for name in good if part in name)
    told = [note for note in judge(results(**changed)).notes if part in note]
    assert told
    assert all(note.startswith("Not so here: ") for note in told)
    assert not [note for note in judge(results()).notes if part in note]


def test_two_seeds_settle_nothing() -> None:
    few = Results(d for d in results(slow=0.9) if d.settings.get("seed", min(SEEDS)) in SEEDS[:2])
    report = judge(few)
    assert verdict(report.criteria) == "undecided"
    assert report.notes == []


def test_the_headline_is_the_best_adamw_in_hindsight() -> None:
    for slow in (0.8, 0.9):
        report = judge(results(slow=slow))
        main = report.criteria[report.main]
        assert "best AdamW of 4 learning rates, in hindsight, 30% flipped" in main.name
        assert main.estimate.mean == pytest.approx(0.85 - slow + 0.0008, abs=1e-3)
        assert not main.primary


def test_controls_are_not_chosen_and_noisy_pairs_choose() -> None:
    cell = Place(results(), MAIN, 0.4)
    assert not any(m.follows or m.arm == SHUFFLED for m in cell.told_nothing())
    assert {m.loss for m in cell.told_nothing()} == {"dpo", *PEERS}
    assert all(not m.told for m in cell.told_nothing())
    adamw = cell.of((ADAMW,))
    assert cell.best(adamw).lr == SLOW
    noisy = {m: cell.values(m, "noisy") for m in adamw}
    for settings, metrics in cell.runs[FAST]:
        metrics["noisy"] = 1.0 - settings["seed"] % 2  # the fast one is preferred on even seeds
    assert noisy
    picked = cell.picked(adamw)
    assert picked == {seed: 0.8 if seed % 2 else 0.75 for seed in SEEDS}


def test_gains_are_paired_and_drift_is_a_ratio() -> None:
    cell = cells(results())[MAIN, BETWEEN]
    expected = t_interval([0.1 + 0.001 * (s % 3) for s in SEEDS])
    assert cell.gain(OURS, FAST)[:3] == pytest.approx(expected[:3])
    assert cell.times_less(OURS, FAST).mean == pytest.approx(4.0, rel=2e-3)


def test_without_adapters_their_row_is_missing() -> None:
    without = Results(d for d in results() if not d.settings.get("adapters"))
    assert not any("LoRA" in name for name in outcomes(without))
    assert sum("with LoRA" in name for name in outcomes(results())) == len(FLIPPED)
    assert [r for r in judge(without).table.rows if "LoRA" in r[0]] == []


def test_the_table_has_every_method_and_what_is_found_by_folds() -> None:
    table = judge(results()).table
    assert all(len(row) == len(table.head) for row in table.rows)
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert rows["40% flipped: 5-fold cross-fitting"]["AUROC of own margin"] == "0.94"
    assert rows["20% flipped: AdamW, Dr. DPO, lr 0.0001"]["drift"] == "5"
    assert "0% flipped: recipe, robust" in rows
    assert len(FEW_SEEDS) == 3


def test_one_line_says_what_to_install() -> None:
    missing = {"trl": 7, "peft": 9, "datasets": 0}
    progress = ClaimProgress(Results(), trials(True), missing, True, {}, 0.0)
    said = notices(Judged(CLAIM, progress, None, "not run yet"))
    (line,) = [note for note in said if "left out" in note]
    assert line == ("9 trials left out: trl, peft not installed (pip install 'poprisk[lab,hf]').")


def test_all_outcomes_are_asked_by_name() -> None:
    found: list[Criterion] = judge(results()).criteria
    assert len({c.name for c in found}) == len(found)
    assert [c.primary for c in found].count(True) == 2
    assert all(plot.lines for plot in show(results()))  # pyrefly: ignore


# --- running --------------------------------------------------------------------------------------

HAS_TRL = all(importlib.util.find_spec(name) is not None for name in NEEDS)
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="needs TRL: pip install 'poprisk[hf]'")
SIZE = {"width": 32, "layers": 1, "steps": 120}
DRAWN = {"kind": "pairs", "reward": "characters", "seed": 1, "training": 24, "held_out": 8}
CELL = {"reward": "characters", "rate": 0.25, "seed": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reference that has hardly learned, and pairs of its answers."""
    folder = tmp_path_factory.mktemp("dpo")
    given = {name: folder / f"{name}.safetensors" for name in ("pretrained", "pairs")}
    run({"kind": "pretrained", **SIZE}, Workspace(product=given["pretrained"]))
    before = Workspace(product=given["pairs"], given={"pretrained": given["pretrained"]})
    run({**DRAWN, "noisy": 8, **SIZE}, before)
    return given


def tried(shared: dict[str, Path], **settings: Any) -> Metrics:
    plain = {"kind": "run", "arm": ADAMW, "lr": 1e-2, "loss": "dpo", "adapters": False}
    return run({**plain, "matched": False, **CELL, **SIZE, **settings}, Workspace(given=shared))


@needs_trl
def test_pairs_are_ranked_by_their_reward_and_have_one_length(shared: dict[str, Path]) -> None:
    found = load_checkpoint(shared["pairs"])
    rule = REWARDS["characters"]
    gaps = [rule.of(a) - rule.of(b) for a, b in zip(found["better"], found["worse"], strict=True)]
    assert len(gaps) == 40
    assert min(gaps) >= rule.gap
    assert found["ids"].shape == (2, 40, PROMPT + ANSWER + 1)
    assert found["ids"][..., -1].unique().tolist() == [0]


@needs_trl
def test_a_model_that_cannot_write_is_refused(
    shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(SIZE, shared["pretrained"])
    words = preferences.tokenizer_of(model.tokenizer)
    monkeypatch.setattr(preferences, "BLOCKS", 1)
    with pytest.raises(ValueError, match=r"of 9999 pairs after 1,024 prompts; pre-train it longer"):
        preferences.draw_pairs(model.fresh(), words, model.tokens, "prose", 9999, seed=0)


@needs_trl
def test_likelihoods_are_those_of_the_naive_way(shared: dict[str, Path]) -> None:
    model = load_model(SIZE, shared["pretrained"]).fresh().eval()
    ids = load_checkpoint(shared["pairs"])["ids"][0, :3]
    for row, found in zip(ids, likelihoods(model, ids), strict=True):
        p = model(row[None]).logits[0].detach().double().softmax(1)
        naive = sum(math.log(p[t - 1, row[t]]) for t in range(PROMPT, len(row)))
        assert float(found) == pytest.approx(naive, rel=1e-5)
    assert divergence(model, model, ids) == pytest.approx(0.0, abs=1e-6)


@needs_trl
def test_pairs_go_to_trl_the_wrong_way_round_where_flipped(shared: dict[str, Path]) -> None:
    drawn = Drawn(**load_checkpoint(shared["pairs"]))
    wrong = flipped(24, 0.25, seed=1)
    for i, row in enumerate(rows_of(drawn, wrong, torch.arange(24))):
        expected = (
            (drawn.worse[i], drawn.better[i]) if wrong[i] else (drawn.better[i], drawn.worse[i])
        )
        assert (row["prompt"], row["chosen"], row["rejected"]) == (drawn.prompts[i], *expected)
    policy = load_model(SIZE, shared["pretrained"]).fresh()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    better, worse = rewards(policy, drawn, slice(0, 24))
    margins = margins_given(policy, drawn, wrong)
    torch.testing.assert_close(margins[wrong], (worse - better)[wrong])
    torch.testing.assert_close(margins[~wrong], (better - worse)[~wrong])


@needs_trl
def test_a_loss_of_margins_trains_as_trl_s_own(
    shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tried(shared)["run"]
    monkeypatch.setattr(losses, "dr_dpo", dpo)
    assert tried(shared, loss="dr-dpo")["run"]["drifts"] == pytest.approx(own["drifts"], rel=1e-3)
    monkeypatch.undo()
    assert tried(shared, loss="dr-dpo")["run"]["drifts"] != pytest.approx(own["drifts"], rel=1e-3)


@needs_trl
def test_runs_repeat_and_end_where_they_are_looked_at_last(shared: dict[str, Path]) -> None:
    found = tried(shared, matched=True, arm=GATE)
    assert tried(shared, matched=True, arm=GATE) == found
    assert found["run"]["at"] == [2, 3, 5, 6, 8]  # 24 pairs, 4 times, in 16s
    assert found["run"]["accuracies"][-1] == found["run"]["final"]
    assert found["matched"]["drifts"] != found["run"]["drifts"]
    assert 0.2 < found["run"]["drifts"][0] / found["matched"]["drifts"][0] < 5


@needs_trl
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("arm", [ADAMW, GATE])
def test_adapters_alone_are_trained(
    arm: str, shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies, honest = list[Any](), runs.train

    def train(*args: Any, **more: Any) -> PolicyRun:
        run = honest(*args, **more)
        policies.append(run.policy)
        return run

    monkeypatch.setattr(runs, "train", train)
    found = tried(shared, arm=arm, adapters=True)["run"]
    assert found["drift"] > 0
    base = load_checkpoint(shared["pretrained"])["weights"]
    weights = dict(policies[0].named_parameters())
    kept = {k: v for k, v in weights.items() if "lora" not in k}
    assert len(kept) < len(weights)
    for name, value in kept.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(value, base[plain])


@needs_trl
def test_robust_is_told_the_share(shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[str, float]]()

    def train(model: Any, drawn: Any, way: Way, wrong: Any, **more: Any) -> Any:
        told.append((way.loss, way.rate))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", train)
    for loss in ("robust", "hinge"):
        with pytest.raises(KeyboardInterrupt):
            tried(shared, loss=loss)
    assert told == [("robust", 0.25), ("hinge", 0.0)]


@needs_trl
def test_the_recipe_is_told_nothing_and_goes_on_where_it_was_stopped(
    shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    settings = {"kind": "recipe", "arm": GATE, "lr": 1e-2}
    whole = run({**settings, **CELL, **SIZE}, Workspace(given=shared))
    assert {*whole} == {"first", "audit", "robust", "without"}
    ways = list[Way]()
    honest = runs.train

    def train(model: Any, drawn: Any, way: Way, wrong: Any, **more: Any) -> Any:
        ways.append(way)
        if len(ways) == 2:
            raise KeyboardInterrupt
        return honest(model, drawn, way, wrong, **more)

    monkeypatch.setattr(runs, "train", train)
    workspace = Workspace(tmp_path / "state.safetensors", given=shared)
    with pytest.raises(KeyboardInterrupt):
        run({**settings, **CELL, **SIZE}, workspace)
    assert run({**settings, **CELL, **SIZE}, workspace) == whole
    assert [way.loss for way in ways] == ["dpo", "robust", "robust", "dpo"]
    assert whole["audit"]["share"] is None  # with so few pairs
    assert [way.rate for way in ways] == [0.0] * 4


@needs_trl
@pytest.mark.parametrize(("share", "rate"), [(0.2, 0.2), (0.5, 0.45), (None, 0.0)])
def test_the_second_run_is_told_what_the_first_estimated(
    share: float | None, rate: float, shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = list[Way]()

    def train(model: Any, drawn: Any, way: Way, wrong: Any, **more: Any) -> Any:
        ways.append(way)
        return PolicyRun(None, {}, None)

    def audit(found: Any, wrong: Tensor) -> Metrics:
        return {"share": share}

    def ended(*given: Any) -> Metrics:
        return {}

    def result(auditor: Auditor) -> Any:
        return SimpleNamespace(suspect=np.zeros(24, bool))

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "_audited", audit)
    monkeypatch.setattr(runs, "_ended", ended)
    monkeypatch.setattr(Auditor, "result", result)
    settings = {"kind": "recipe", "arm": GATE, "lr": 1e-2}
    run({**settings, **CELL, **SIZE}, Workspace(given=shared))
    assert [(w.arm, w.loss, w.rate) for w in ways] == [
        (GATE, "dpo", 0.0),
        (GATE, "robust", rate),
        (GATE, "dpo", 0.0),
    ]


@needs_trl
def test_cross_fitting_trains_on_the_other_parts(
    shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[Tensor]()
    honest = runs.train

    def train(*args: Any, keep: Tensor, **more: Any) -> Any:
        kept.append(keep)
        return honest(*args, keep=keep, **more)

    monkeypatch.setattr(runs, "train", train)
    settings = {"kind": "folds", "arm": ADAMW, "lr": 1e-2, "folds": 3}
    found = run({**settings, **CELL, **SIZE}, Workspace(given=shared))
    assert [len(k) for k in kept] == [16, 16, 16]
    assert torch.cat(kept).bincount().tolist() == [2] * 24
    assert 0 <= found["auroc"] <= 1


@needs_trl
def test_a_twin_follows_the_margins_of_pairs_as_given(shared: dict[str, Path]) -> None:
    model = load_model(SIZE, shared["pretrained"])
    drawn, wrong = Drawn(**load_checkpoint(shared["pairs"])), flipped(24, 0.25, seed=1)
    policy = model.fresh().eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    found = PairMargins(policy, drawn, wrong)(torch.arange(24))
    torch.testing.assert_close(found.detach()[:, 0], margins_given(policy, drawn, wrong))
    assert torch.equal(preference_loss(found, -torch.ones(24, 1)), -logsigmoid(-found[:, 0]))


@needs_trl
def test_the_twin_s_run_learns_and_its_estimates_are_of_the_noisy_risk(
    shared: dict[str, Path],
) -> None:
    settings = {"kind": "stopping", "arm": ADAMW, "lr": 1e-3}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(stopping, "EVERY", 2)
    found = run({**settings, **CELL, **SIZE}, Workspace(given=shared))
    monkey.undo()
    assert found["at"] == [2, 4, 6, 8]
    assert found["accuracy"] == found["accuracies"][found["stop"]]
    assert found["end"] == found["accuracies"][-1]
    assert found["regret"] == pytest.approx(
        found["risks"][found["stop"]] / min(found["risks"]) - 1, abs=1e-4
    )
    assert len(found["estimates"]) == len(found["errors"]) == 4
    assert found["estimates"][0] == pytest.approx(found["risks"][0], abs=0.1)


@needs_trl
def test_pre_training_goes_on_where_it_was_stopped(
    shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", -1.0)
    taken, honest = list[int](), reference.loss_on

    def stopped(model: Any, tokens: Any, generator: Any) -> Tensor:
        taken.append(1)
        if len(taken) == 90:
            raise KeyboardInterrupt
        return honest(model, tokens, generator)

    monkeypatch.setattr(reference, "loss_on", stopped)
    product = tmp_path / "product.safetensors"
    workspace = Workspace(tmp_path / "state.safetensors", product=product)
    with pytest.raises(KeyboardInterrupt):
        run({"kind": "pretrained", **SIZE}, workspace)
    run({"kind": "pretrained", **SIZE}, workspace)
    assert len(taken) == SIZE["steps"] + 2  # one that was stopped, one that measures
    once, twice = load_checkpoint(shared["pretrained"]), load_checkpoint(product)
    assert once["tokenizer"] == twice["tokenizer"]
    assert all(torch.equal(once["weights"][k], v) for k, v in twice["weights"].items())


def test_what_is_lost_is_made_again_while_others_need_it(tmp_path: Path) -> None:
    def trials(quick: bool) -> list[Trial]:
        kept = Trial("kept", {"seed": 0}, keeps=True)
        return [kept, *(Trial(f"t{i}", {"seed": i}, after=("kept",)) for i in (1, 2))]

    def doing(settings: dict[str, Any], workspace: Workspace) -> Metrics:
        if settings["seed"] == 2 and broken:
            raise ValueError("stopped")
        if settings["seed"] == 0:
            workspace.keep({"value": 7})
            return {"made": 1}
        return {"value": load_checkpoint(workspace.given["kept"])["value"]}

    broken = True
    claim = dataclasses.replace(CLAIM, trials=trials, run=doing)
    directory = ClaimDirectory(tmp_path / "run", claim)
    directory.create(quick=True, workers=0)
    with pytest.raises(TrainingError, match="stopped"):
        directory.work(workers=0, on_trial=lambda *_: None)
    product = directory.store.product("kept")
    assert product is not None
    product.unlink()
    broken = False
    directory.create(quick=True, workers=0)  # it goes on
    assert [t.name for t in directory.read().left] == ["kept", "t2"]
    directory.work(workers=0, on_trial=lambda *_: None)
    assert directory.read().done.all("value") == [7, 7]
    assert directory.read().left == []
    product.unlink(missing_ok=True)
    for file in directory.store.checkpoints.iterdir():
        file.unlink()
    assert directory.read().left == []  # nobody needs it any more


@needs_trl
@pytest.mark.claims
def test_the_quick_form(tmp_path: Path) -> None:
    page = claimed.quick_form(CLAIM, tmp_path / "run")
    for wanted in ("best AdamW of 2 learning rates", "Flipped pairs found", "RE-PO"):
        assert wanted in page
