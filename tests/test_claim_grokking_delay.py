"""The claim on grokking: the delay law, and the rivals Muon and SOAP."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from poprisk_lab.arms import Arm, build_optimizer, muon_groups
from poprisk_lab.results import Results, TrialResult
from poprisk_lab.studies.claim import Workspace
from poprisk_lab.studies.grokking import delay, runs
from poprisk_lab.studies.grokking.arms import LABELS, OWN, RIVAL_GRID, SEEDS, trials
from test_claim_grokking import SMALL

LAW = [(lr, decay) for lr in (1e-3, 3e-3, 1e-2) for decay in (1.0, 2.0, 3.0)]


def trial(lr: float, decay: float, reached: int | None, **more: Any) -> TrialResult:
    """A run with this learning rate and decay; 100 steps to fit the training set."""
    settings = {"kind": "run", "name": f"grid-{lr}-{decay}", "lr": lr, "weight_decay": decay,
                "seed": 0}  # fmt: skip
    found: dict[str, Any] = {"reached": reached, "memorized": 100, "curve": []}
    return TrialResult({**settings, **more}, found)


def by_law(power_of_lr: float, power_of_decay: float) -> Results:
    """Runs whose delay is 5/(ηᵖ λᵠ), rounded to steps."""
    return Results(
        trial(lr, decay, 100 + round(5000 * (1e-3 / lr) ** power_of_lr / decay**power_of_decay))
        for lr, decay in LAW
    )


def test_a_delay_that_goes_as_the_law_halves() -> None:
    found = delay.settings(by_law(1.0, 1.0))
    assert len(found) == 9
    for interval in (*delay.shortened(found), *delay.shortened(found, apart=True)):
        assert interval.mean == pytest.approx(2.0, rel=1e-2)
        assert interval.low <= 2.0 <= interval.high or interval.high - interval.low < 0.02
    assert delay.off_by(found) == pytest.approx(1.0, abs=1e-2)


def test_the_powers_of_rate_and_decay_are_told_apart() -> None:
    found = delay.settings(by_law(2.0, 0.5))
    rate, decay = delay.shortened(found, apart=True)
    assert rate.mean == pytest.approx(4.0, rel=2e-2)
    assert decay.mean == pytest.approx(math.sqrt(2), rel=2e-2)
    (both,) = delay.shortened(found)
    assert decay.mean < both.mean < rate.mean
    assert both.low < both.mean < both.high
    assert delay.off_by(found) > 1.5


def test_the_interval_is_that_of_least_squares() -> None:
    """Against the formula for one variable: half width t·√(s²/Σ(x-x̄)²)."""
    steps = (9000, 2100, 700, 380, 250)
    done = Results(trial(1e-3 * 2**i, 1.0, 100 + k) for i, k in enumerate(steps))
    (found,) = delay.shortened(delay.settings(done))
    x, y = [math.log(2**i) for i in range(5)], [-math.log(k) for k in steps]
    mx, my = sum(x) / 5, sum(y) / 5
    spread = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True)) / 3
    half = 3.182446 * math.sqrt(rest / spread)  # Student's t, three degrees of freedom
    assert found[:3] == pytest.approx([2**slope, 2 ** (slope - half), 2 ** (slope + half)])


def test_settings_with_a_run_that_did_not_generalize_late_are_left_out() -> None:
    late, never, at_once = trial(1e-3, 1.0, 900), trial(2e-3, 1.0, None), trial(3e-3, 1.0, 200)
    half = [trial(4e-3, 1.0, 900, name="both", seed=s) for s in (0, 1)]
    half[1].metrics["reached"] = None
    (found,) = delay.settings(Results([late, never, at_once, *half]))
    assert (found.lr, found.log_delay) == (1e-3, pytest.approx(math.log(800)))


def test_seeds_of_a_setting_count_once_with_their_mean_logarithm() -> None:
    done = Results(trial(1e-3, 1.0, k, name="a", seed=i) for i, k in enumerate((300, 900)))
    (found,) = delay.settings(done)
    assert found.log_delay == pytest.approx(math.log(math.sqrt(200 * 800)))


@pytest.mark.parametrize("points", [0, 1, 3])
def test_too_few_settings_or_one_rate_have_no_interval(points: int) -> None:
    few = delay.settings(Results(trial(1e-3 * (i + 1), 1.0, 900) for i in range(points)))
    alike = delay.settings(Results(trial(1e-3, 1.0, 900 + i, name=str(i)) for i in range(6)))
    for found in (few, alike):
        for interval in (*delay.shortened(found), *delay.shortened(found, apart=True)):
            assert math.isnan(interval.mean)
    assert math.isnan(delay.off_by(few)) == (points < 2)


def test_the_norm_is_compared_where_either_set_is_right() -> None:
    curve = [[0, 4.0, 0.0, 0.0, 700.0], [50, 0.1, 0.995, 0.1, 400.0], [100, 0.1, 1.0, 0.96, 100.0]]
    told = trial(1e-3, 1.0, 100)
    told.metrics["curve"] = curve
    untold, never = trial(1e-3, 1.0, 100), trial(1e-3, 1.0, 100)
    untold.metrics["curve"] = [row[:4] for row in curve]
    never.metrics["curve"] = curve[:2]
    found = delay.contraction(Results([told, untold, never]))
    assert found.values == pytest.approx([math.log(4.0)])


def test_the_law_is_a_control_judged_by_doubling() -> None:
    criteria = delay.delay_law(by_law(1.0, 1.0))
    outcomes = {c.name: c.outcome for c in criteria}
    held = [name for name in outcomes if "twice" in name and ", AdamW (" in name]
    assert len(held) == 3
    assert {outcomes[n] for n in held} == {"as claimed"}
    flat = {c.name: c.outcome for c in delay.delay_law(by_law(-1.0, -1.0))}
    assert {flat[n] for n in held} == {"does not hold"}


# --- rivals ---------------------------------------------------------------------------------------


def test_muon_takes_the_weights_of_hidden_linear_layers() -> None:
    model = runs.build_model(SMALL)
    given = {"lr": 1e-2, "weight_decay": 0.5, "betas": (0.9, 0.98), "eps": 1e-8}
    muon, adamw = muon_groups(model, **given)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {"query", "key", "value", "mix", "mlp.0.up", "mlp.0.down"}
    assert {names[id(p)] for p in muon["params"]} == {f"{name}.weight" for name in hidden}
    assert {*map(id, muon["params"])}.isdisjoint(map(id, adamw["params"]))
    assert len(muon["params"]) + len(adamw["params"]) == len(names)
    assert (muon["lr"], muon["weight_decay"]) == (adamw["lr"], adamw["weight_decay"]) == (1e-2, 0.5)


def test_a_learning_rate_of_muon_is_that_of_adamw() -> None:
    """Updates of root mean square 0.2 η, whatever the shape, and decay by ηλ a step."""
    torch.manual_seed(0)
    hidden = [nn.Linear(24, 60), nn.Linear(60, 8)]
    model = nn.Sequential(*hidden, nn.Linear(8, 3))
    settings = {"lr": 1e-2, "weight_decay": 0.5, "betas": (0.9, 0.98), "eps": 1e-8}
    optimizer = build_optimizer(
        Arm("muon", "Muon", "peer", "muon", settings), model, batch_size=5, dataset_size=5
    )
    before = [layer.weight.detach().clone() for layer in hidden]
    model(torch.randn(50, 24)).square().sum().backward()
    optimizer.step()
    for layer, start in zip(hidden, before, strict=True):
        moved = layer.weight.detach() - (1 - 1e-2 * 0.5) * start
        rank = min(3, *moved.shape) / min(moved.shape)  # gradients of three outputs have rank three
        assert float(moved.square().mean().sqrt()) == pytest.approx(
            0.2 * 1e-2 * math.sqrt(rank), rel=0.35
        )


def test_the_squared_norm_of_all_weights_is_told() -> None:
    settings = {**SMALL, "limit": 0}
    model = runs.build_model(settings)
    expected = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    found = runs.run({**settings, "limit": 4, "every": 4}, Workspace())
    assert found["curve"][0][4] == pytest.approx(expected, rel=1e-3)


def test_every_rival_has_ten_settings() -> None:
    full = trials(False)
    for name in OWN:
        grid = [t.settings for t in full if t.settings["name"].startswith(f"{name}-grid-")]
        assert len(grid) == 10
        assert {(s["lr"], s["weight_decay"]) for s in grid[:8]} == set(RIVAL_GRID)
        assert len({(s["lr"], s["weight_decay"], str(s["gate"])) for s in grid}) == 10
        assert f"{name}-tuned" in {*SEEDS} & {*LABELS}
