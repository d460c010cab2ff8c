"""The claims on grokking: tables, the network, runs that resume, kernels, and what is judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk.optim.adamw import PopRiskAdamW
from poprisk.optim.replay import last_mask
from poprisk_lab.page.claims import render_claim
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Claim, Results, TrialResult, Workspace
from poprisk_lab.studies.criteria import verdict
from poprisk_lab.studies.grokking import channel, channel_lead, forces, runs
from poprisk_lab.studies.grokking.arms import ARMS, BASE
from poprisk_lab.studies.grokking.decay import GatedDecay
from poprisk_lab.studies.record import judged, load_record
from poprisk_lab.studies.run import ClaimDirectory
from poprisk_lab.tasks.modular import (
    FeedForward,
    ModularTransformer,
    division_table,
    modular_division,
    split_table,
    two_step_table,
)

CLAIM = CLAIMS["grokking"]

SMALL: dict[str, Any] = {
    "kind": "run", "table": "division", "p": 7, "fraction": 0.5, "width": 16, "hidden": 16,
    "batch": 8, "beta2": 0.98, "every": 4, "after": 0, "limit": 20, "lr": 1e-2,
    "weight_decay": 1.0, "arm": "poprisk", "gate": {}, "seed": 3, "name": "ours",
}  # fmt: skip


# --- tables and network ---------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 7, 13])
def test_division_undoes_multiplication(p: int) -> None:
    x, y = division_table(p)
    assert len(x) == p * (p - 1)
    assert len({tuple(row) for row in x.tolist()}) == len(x)
    assert torch.equal(y * x[:, 1] % p, x[:, 0])


def test_two_steps() -> None:
    x, y = two_step_table(5)
    assert len(x) == 125
    assert y[(x == torch.tensor([3, 4, 2])).all(1)].item() == (3 * 4 + 2) % 5


def test_a_split_keeps_every_pair_once() -> None:
    (x, y), (asked, answers) = split_table("division", 7, 0.25, seed=1)
    assert len(y) == round(0.25 * 42)
    assert torch.equal(torch.cat([x, asked]).unique(dim=0), division_table(7)[0])
    assert torch.equal(y * x[:, 1] % 7, x[:, 0])
    assert torch.equal(answers * asked[:, 1] % 7, asked[:, 0])


def test_a_split_without_training_or_test_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="training examples"):
        split_table("division", 3, 0.0, seed=0)
    with pytest.raises(ValueError, match="test examples"):
        split_table("division", 3, 1.0, seed=0)
    with pytest.raises(ValueError, match="division"):
        split_table("addition", 3, 0.5, seed=0)


def naive(model: ModularTransformer, x: Tensor) -> Tensor:
    """An ordinary pre-norm block on all tokens, read at the last place."""
    equals = model.equals.expand(len(x), 1, -1)
    stream = torch.cat([model.numbers[x], equals], 1) + model.places
    normed = model.before_attention(stream)

    def split(t: Tensor) -> Tensor:
        return t.unflatten(2, (model.heads, -1)).transpose(1, 2)

    q, k, v = (split(f(normed)) for f in (model.query, model.key, model.value))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    stream = stream + model.mix(mixed)
    for layer in model.mlp:
        assert isinstance(layer, FeedForward)
        stream = stream + layer.down(F.relu(layer.up(layer.norm(stream))))
    return model.out(model.before_out(stream))[:, -1]


@pytest.mark.parametrize("form", ["forward", "per_example"])
@pytest.mark.parametrize(("operands", "layers"), [(2, 1), (3, 2)])
def test_the_network_is_an_ordinary_transformer_block(
    operands: int, layers: int, form: str
) -> None:
    torch.manual_seed(0)
    model = ModularTransformer(
        7, operands=operands, width=16, heads=4, hidden=24, layers=layers
    ).double()
    x = torch.randint(7, (20, operands))
    fast, slow = getattr(model, form)(x), naive(model, x)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weights = [*model.parameters()]
    ours = torch.autograd.grad(fast.square().sum(), weights)
    theirs = torch.autograd.grad(slow.square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_task_can_be_compared() -> None:
    task = modular_division(0, p=11)
    assert task.model()(task.test[0]).shape == (len(task.test[1]), 11)


# --- runs -----------------------------------------------------------------------------------------


def test_batches_are_whole_passes_and_resume_anywhere() -> None:
    first = [next(b) for b in [runs.batches(SMALL, 21, 0)] for _ in range(5)]
    assert all(len(i) == 8 for i in first)  # pyrefly: ignore
    assert len(set(torch.cat(first[:2]).tolist())) == 16  # pyrefly: ignore
    for start in range(4):
        again = next(runs.batches(SMALL, 21, start))
        assert torch.equal(again, first[start])  # pyrefly: ignore
    assert next(runs.batches({**SMALL, "batch": 0}, 21, 0)) == slice(None)


@pytest.mark.parametrize(
    "arm", ["poprisk", "adamw", "shuffled", "grokfast", "orthograd", "decay-gated"]
)
def test_every_arm_trains(arm: str) -> None:
    found = runs.run({**SMALL, "arm": arm}, Workspace())
    assert found["steps"] == 20
    assert found["curve"][0][1] != found["curve"][-1][1]
    assert found["reached"] is None or found["reached"] <= 20


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no arm 'sgd'"):
        runs.run({**SMALL, "arm": "sgd"}, Workspace())


def test_the_matched_run_moves_as_far_as_the_gated_one() -> None:
    settings = {**SMALL, "batch": 0, "weight_decay": 0.0, "limit": 6}
    trace = runs.record_trace(settings, 21)
    data = runs.load(settings)
    model = runs.build_model(settings)
    optimizer = runs.build({**settings, "arm": "rms-matched"}, model, 21)
    for step in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        runs.gradient(model, optimizer, data, slice(None))
        optimizer.step()
        moved = [(p - q).double().square().mean().sqrt().item()
                 for p, q in zip(model.parameters(), before, strict=True)]  # fmt: skip
        assert moved == pytest.approx(trace.rms[step], rel=1e-4, abs=1e-9)


RESUMED = ["poprisk", "adamw", "rms-matched", "shuffled", "decay-gated", "muon", "soap"]


@pytest.mark.parametrize("arm", RESUMED)
def test_a_run_that_was_stopped_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    settings = {**SMALL, "arm": arm}
    whole = runs.run(settings, Workspace())
    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "run.safetensors"
    workspace, calls = Workspace(path), 0

    def killed(state: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        Workspace.save(workspace, state)

    class Stopping:
        load, save = staticmethod(workspace.load), staticmethod(killed)

    with pytest.raises(KeyboardInterrupt):
        runs.run(settings, Stopping())  # pyrefly: ignore
    assert Workspace(path).load()["state"]["step"] == 10
    assert runs.run(settings, Workspace(path)) == whole


def test_a_run_ends_a_while_after_it_got_there() -> None:
    settings = {**SMALL, "p": 5, "fraction": 0.9, "batch": 0, "lr": 1e-2, "limit": 900,
                "weight_decay": 0.5, "arm": "adamw", "every": 5, "after": 10}  # fmt: skip
    found = runs.run({**settings, "seed": 0}, Workspace())
    assert found["reached"] is not None
    assert found["steps"] == found["reached"] + 10
    assert found["best"] >= 0.95


def test_at_most_sixty_points_of_a_curve_are_kept_the_last_among_them() -> None:
    rows = [[i, 1.0, 0.5, i / 1000] for i in range(0, 1000, 5)]
    state = {"rows": rows, "jumps": 2, "step": 1000}
    found = runs.summarize(state, {**SMALL, "limit": 1000})
    assert len(found["curve"]) <= 61
    assert found["curve"][-1][0] == 995
    assert (found["reached"], found["memorized"]) == (950, None)


def test_a_variance_over_examples_leaves_the_gradient_as_it_is() -> None:
    settings = {**SMALL, "gate": {"variance": "exact"}}
    data, found = runs.load(settings), list[Any]()
    for given in (settings, SMALL):
        model = runs.build_model(given)
        loss = runs.gradient(model, runs.build(given, model, 21), data, slice(0, 8))
        found.append([torch.tensor(loss), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_below_the_floor_the_gradient_turns_round() -> None:
    data, model = runs.load(SMALL), runs.build_model(SMALL)
    optimizer, found = runs.build(SMALL, model, 21), list[Tensor]()
    for floor in (0.0, 1.0, 100.0):
        loss = runs.gradient(model, optimizer, data, slice(None), floor)
        found.append(forces.flat([p.grad for p in model.parameters() if p.grad is not None]))
    assert 1.0 < loss < 100.0
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], -found[0])
    exact = runs.build({**SMALL, "gate": {"variance": "exact"}}, model, 21)
    with pytest.raises(ValueError, match="floor"):
        runs.gradient(model, exact, data, slice(0, 8), 1.0)


def test_decay_behind_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    wrapped, gated, plain = (torch.nn.Parameter(start.clone()) for _ in range(3))
    given: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.0}
    ours = GatedDecay(PopRiskAdamW([wrapped], batch_size=8, **given), weight_decay=0.5)
    others = [PopRiskAdamW([gated], batch_size=8, **given), torch.optim.AdamW([plain], **given)]
    expected, masks = start.clone(), list[Tensor]()
    for _ in range(12):
        before = [gated.detach().clone(), plain.detach().clone()]
        gradient = torch.randn(start.shape, generator=generator) + 0.3
        wrapped.grad, gated.grad, plain.grad = (gradient.clone() for _ in range(3))
        for optimizer in (ours, *others):
            optimizer.step()
        moved = gated.detach() - before[0]
        masks.append(moved / (plain.detach() - before[1]))
        expected = expected - 0.1 * 0.5 * masks[-1] * expected + moved
        torch.testing.assert_close(wrapped.detach(), expected, rtol=1e-4, atol=1e-5)
    assert masks[-1].min() < 0.5 < masks[-1].max()


# --- forces ---------------------------------------------------------------------------------------


def test_growth_and_shrinkage_along_the_weights() -> None:
    window = forces.Window()
    before = torch.tensor([3.0, 4.0])
    window.add(before, 0.9 * before + torch.tensor([0.6, 0.8]), 0.1)
    window.add(before, 0.9 * before - torch.tensor([4.0, -3.0]), 0.1)
    assert window.read() == pytest.approx([0.5, 0.5, 3.0, math.hypot(3.4, 3.8) / 6])
    assert window.read() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("arm", ["adamw", "poprisk"])
def test_the_edge_is_the_largest_curvature_in_the_optimizers_metric(arm: str) -> None:
    settings = {**SMALL, "p": 3, "width": 4, "hidden": 4, "batch": 0, "arm": arm}
    data, model = runs.load(settings), runs.build_model(settings)
    optimizer = runs.build(settings, model, len(data.y))
    weights = [*model.parameters()]
    for _ in range(40):
        before = forces.flat(weights)
        runs.gradient(model, optimizer, data, slice(None))
        optimizer.step()
    found = forces.edge(model, optimizer, data, forces.flat(weights) - before)

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip([n for n, _ in model.named_parameters()], values, strict=True))
        outputs = torch.func.functional_call(model, named, (data.x,))
        return F.cross_entropy(outputs, data.y)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    sizes = [p.numel() for p in weights]
    hessian = torch.cat([
        torch.cat([blocks[i][j].reshape(m, n) for j, n in enumerate(sizes)], 1)
        for i, m in enumerate(sizes)
    ])  # fmt: skip
    adam = [optimizer.state[p]["exp_avg_sq"].div(1 - 0.98**40).sqrt() + 1e-8 for p in weights]
    scale = 1e-2 / forces.flat(adam)
    if arm == "poprisk":
        assert isinstance(optimizer, PopRiskAdamW)
        (group,) = optimizer.param_groups
        scale = scale * forces.flat([last_mask(p, optimizer.state[p], group) for p in weights])
    metric = scale.sqrt().unsqueeze(1) * hessian * scale.sqrt()
    assert found == pytest.approx(float(torch.linalg.eigvalsh(metric)[-1]) / 38, rel=2e-2)


def test_forces_are_told_until_the_goal_or_the_limit() -> None:
    curve = forces.run({**SMALL, "every": 5}, Workspace())["curve"]
    assert [row[0] for row in curve] == [0, 5, 10, 15, 20]
    assert all(len(row) == len(forces.COLUMNS) for row in curve)
    shrink = SMALL["lr"] * SMALL["weight_decay"]
    norms = [row[3] for row in curve]
    for row, norm, after in zip(curve[1:], norms, norms[1:], strict=False):
        assert shrink * min(norm, after) * 0.99 <= row[5] <= shrink * max(norm, after) * 1.01


# --- kernels --------------------------------------------------------------------------------------


def test_the_kernel_is_that_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ModularTransformer(3, width=8, heads=2, hidden=8)
    x = division_table(3)[0]
    rows = []
    for one in x:
        outputs = model(one.unsqueeze(0))[0]
        grads = [torch.autograd.grad(o, [*model.parameters()], retain_graph=True) for o in outputs]
        rows.append([torch.cat([g.flatten() for g in parts]) for parts in grads])
    exact = torch.tensor(
        [[sum(float(a @ b) for a, b in zip(i, j, strict=True)) / 3 for j in rows] for i in rows]
    )
    monkeypatch.setattr(channel, "PROBES", 400)
    found = channel.class_kernel(model, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05 * float(exact.max()))


def test_a_kernel_that_knows_the_classes_has_the_target_in_its_channel() -> None:
    y, answers = torch.arange(12) % 3, torch.arange(6) % 3
    same = (torch.cat([y, answers]).unsqueeze(1) == torch.cat([y, answers])).float()
    good = channel.align(same + 1e-6 * torch.eye(18), 12, y, answers, rank=3)
    assert good.energy == pytest.approx(1.0, abs=1e-4)
    assert good.accuracy == 1.0
    blind = torch.eye(18) + torch.ones(18, 18)
    assert channel.align(blind, 12, y, answers, rank=1).energy == pytest.approx(0.0, abs=1e-6)


# --- judging --------------------------------------------------------------------------------------


def made_up(*, gate: int | None, channel_at: int) -> Results:
    """Results in which the gate needs ``gate`` steps and everything else 1,000."""
    done = list[TrialResult]()
    for trial in CLAIM.trials(False):
        s = trial.settings
        if s["kind"] == "channel":
            curve = [[0, 0.1, 0.1, 0.1, 0.1], [50, 1.0, 0.9, 0.8, 0.9]]
            found = {"network": 300, "kernel": 250, "channel": channel_at, "chance": 0.1}
            done.append(TrialResult(s, {**found, "curve": curve}))
            continue
        if s["kind"] == "forces":
            curve = [[0, 4.0, 0.0, 26.0, 0.0, 0.0, 0.0, 0.0, None],
                     [250, 0.1, 0.5, 30.0, 0.03, 0.04, 0.05, 0.3, 0.125]]  # fmt: skip
            done.append(TrialResult(s, {"curve": curve}))
            continue
        gated = s["name"].startswith(("ours", "letter-"))
        reached = gate if gated else 1000
        reached = reached if reached is None else reached + s["seed"] % 7
        done.append(
            TrialResult(s, {"reached": reached, "memorized": 100, "limit": s["limit"], "best": 1.0,
                     "jumps": 3, "steps": 1000, "curve": [[0, 4.0, 0.0, 0.0], [9, 1.0, 1.0, 1.0]]})
        )  # fmt: skip
    return Results(done)


@pytest.mark.parametrize(
    ("gate", "channel_at", "expected"),
    [
        (190, 200, "reproduced"),
        (500, 200, "partly reproduced"),
        (None, 500, "not reproduced"),
        (1200, 500, "not reproduced"),
        (190, 500, "partly reproduced"),
    ],
)
def test_the_verdict_follows_from_the_numbers(
    gate: int | None, channel_at: int, expected: str
) -> None:
    report = CLAIM.judge(made_up(gate=gate, channel_at=channel_at))
    assert verdict(report.criteria) == expected
    assert all(len(row) == len(report.table.head) for row in report.table.rows)


def test_the_lead_of_the_channel_is_counted_in_measurements() -> None:
    assert channel_lead(made_up(gate=1, channel_at=200)).mean == pytest.approx(100 / 50)


def test_the_table_holds_steps_of_every_setting_that_got_there() -> None:
    done = made_up(gate=190, channel_at=200)
    grid = [d for d in done if d.settings["name"].startswith("grid-")]
    grid[0].metrics["reached"], grid[1].metrics["reached"] = 77, None
    table = CLAIM.judge(done).table
    steps = {row[0]: row[2] for row in table.rows}
    assert steps[grid[0].settings["name"]] == "77"
    assert grid[1].settings["name"] not in steps
    assert "1 settings of which no run got there have no row" in table.about


def test_runs_that_never_got_there_have_no_ratio() -> None:
    done = made_up(gate=None, channel_at=200)
    never = Results(TrialResult(d.settings, {**d.metrics, "reached": None}) for d in done)
    report = CLAIM.judge(never)
    faster = [c for c in report.criteria if "fewer steps" in c.name]
    assert {c.outcome for c in faster} == {"open"}
    assert all(math.isnan(c.estimate.mean) for c in faster)
    assert report.table.rows == []


def multistep_results(gap: float) -> Results:
    done = list[TrialResult]()
    for trial in CLAIMS["grokking-multistep"].trials(False):
        best = 0.9 + 0.001 * trial.settings["seed"]
        best -= gap if trial.settings["name"] != "adamw" else 0.0
        found = {"best": best, "reached": None, "limit": 3000, "curve": [[0, 1.0, 0.0, 0.1]]}
        done.append(TrialResult(trial.settings, found))
    return Results(done)


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, "reproduced"), (0.3, "partly reproduced"), (0.85, "not reproduced")]
)
def test_two_steps_are_judged_by_accuracy(gap: float, expected: str) -> None:
    assert verdict(CLAIMS["grokking-multistep"].judge(multistep_results(gap)).criteria) == expected


# --- the quick forms ------------------------------------------------------------------------------


@pytest.mark.claims
@pytest.mark.parametrize("claim", [CLAIM, CLAIMS["grokking-multistep"]], ids=lambda c: c.name)
def test_the_quick_form_runs_to_a_verdict_and_a_page(tmp_path: Path, claim: Claim) -> None:
    directory = ClaimDirectory(tmp_path / "run", claim)
    directory.create(quick=True, workers=2)
    directory.work(workers=2, on_trial=lambda *_: None)
    found = judged(claim, directory.read())
    assert found.report is not None
    assert found.verdict == "undecided"
    text = render_claim(found)
    assert "quick form" in text
    assert text.count('class="plot"') == len(claim.show(found.progress.done))


def test_full_trials_have_unique_names_and_enough_seeds() -> None:
    for claim in (CLAIM, CLAIMS["grokking-multistep"]):
        names = [t.name for t in claim.trials(False)]
        assert len(names) == len(set(names))
    seeds = [t.settings["seed"] for t in CLAIM.trials(False) if t.settings["name"] == "ours"]
    assert seeds == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tuned", "grid", "keys"),
    [
        ("adamw-tuned", "grid-", ("lr", "weight_decay", "beta2")),
        ("ours-tuned", "gate-grid-", ("lr", "weight_decay", "gate")),
        ("grokfast-tuned", "grokfast-grid-", ("lr", "weight_decay", "gate")),
        ("soap-tuned", "soap-grid-", ("lr", "weight_decay", "gate")),
        ("muon-tuned", "muon-grid-", ("lr", "weight_decay", "gate")),
    ],
)
def test_what_is_tuned_is_the_fastest_of_its_grid_on_record(
    tuned: str, grid: str, keys: tuple[str, ...]
) -> None:
    record = load_record(CLAIM)
    assert record is not None
    tried = [d for d in record.done if d.settings["name"].startswith(grid)]
    steps = {id(d): d.metrics["reached"] or math.inf for d in tried}
    (chosen,) = (
        d for d in tried if all(d.settings[k] == ARMS[tuned].get(k, BASE.get(k)) for k in keys)
    )
    assert steps[id(chosen)] == min(steps.values()) < math.inf
