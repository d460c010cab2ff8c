"""Drift and diffusion of minibatch gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk.intervals import student_quantile
from poprisk.path import NotAnalysable
from poprisk.path.drift import (
    Exponent,
    Movement,
    draw_batches,
    exponents,
    fitted_noise,
    interval,
    movement,
    slope,
)
from poprisk.path.operators import path_operators
from poprisk_lab.studies.drift_laws import Recipe, sweep
from runs import recorded
from samplers import randn


def test_student_quantiles() -> None:
    for df, expected in ((1, 12.706), (4, 2.776), (30, 2.042)):
        assert student_quantile(0.975, df) == pytest.approx(expected, abs=2e-3)


def test_an_interval_of_replicates() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found[:3] == pytest.approx((2.0, 2 - 2.484, 2 + 2.484), abs=1e-3)
    assert found.standard_error == pytest.approx(3**-0.5)
    assert (found.valid, found.reason, found.cost) == (True, "", 3.0)
    few = interval([1.0, 2.0])
    assert (few.valid, few.reason) == (False, "2 replicates leave no interval")
    assert math.isnan(interval([1.0]).low)
    power = Exponent(1.0, 0.9, 1.1, 0.05, True, "", 8.0)
    assert power.agrees(1.05)
    assert not power.agrees(0.5)
    assert slope([1, 2, 4], [1, 8, 64]) == pytest.approx(3.0)


def test_drift_and_diffusion_are_the_sums_of_the_definition() -> None:
    run = recorded("SGD", steps=6)
    result = movement(run, first=1, points=6)
    assert (result.times[0], result.times[-1]) == (1, 6)
    problem, (x, _) = run.problem, run.problem.train
    drift = diffusion = torch.zeros(28, dtype=torch.float64)
    for k, step in enumerate(run.intervals):
        w = run.weights[k]
        J, g = problem.J.dense(w, x), problem.output_gradient(problem.J.outputs(w, x)).flatten()
        S = torch.zeros(14, dtype=torch.float64)
        S[step.examples] = step.sampling
        drift = drift + 0.1 * J @ J.T @ g
        diffusion = diffusion + 0.1 * J @ J.T @ (S.repeat_interleave(2) * g - g)
    torch.testing.assert_close(result.drift[-1], drift, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.diffusion[-1], diffusion, rtol=1e-9, atol=1e-12)


def test_directions_are_coordinates() -> None:
    run = recorded("AdamW", steps=6)
    basis = path_operators(run).channel(1e-2).basis
    whole = movement(run)
    along = movement(run, directions=basis.view(14, 2, -1))
    torch.testing.assert_close(along.drift, whole.drift @ basis)
    torch.testing.assert_close(along.diffusion, whole.diffusion @ basis)


def walks(power: float, replicates: int = 40) -> list[Movement]:
    """A drift of known power and random walks, of 30 coordinates."""
    times = [4, 8, 16, 32, 64, 128]
    drift = torch.stack([torch.ones(30, dtype=torch.float64) * t**power for t in times])
    found = []
    for seed in range(replicates):
        walk = randn(128, 30, seed=seed).cumsum(0)
        found.append(Movement(times, drift, walk[torch.tensor(times) - 1], walk))
    return found


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_known_powers_are_found(power: float) -> None:
    drift, diffusion = exponents(walks(power))
    assert drift.agrees(power)
    assert diffusion.agrees(0.5)
    assert drift.high - drift.low < 0.2


def small_recipe(**changes: Any) -> Recipe:
    x = randn(96, 4, seed=1)
    recipe = Recipe(
        lambda: nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1)),
        "squared_error",
        (x, x[:, :1].sin() + 0.5 * randn(96, 1, seed=2)),
        randn(20, 4, seed=3),
        lr=5e-4,
        steps=32,
    )
    return recipe._replace(**changes)


@pytest.mark.slow
def test_the_powers_of_time_where_batches_are_independent() -> None:
    laws = sweep(small_recipe(), batch_sizes=(4, 16), seeds=range(6))
    assert laws.drift.agrees(1.0)
    assert laws.diffusion.agrees(0.5)
    assert laws.batch is not None
    assert laws.batch.agrees(-0.5)
    assert laws.replicates == 6


def test_shuffled_passes_undo_their_noise() -> None:
    recipe = small_recipe(replace=False, steps=48)
    laws = sweep(recipe, batch_sizes=(8,), seeds=range(3))
    assert laws.diffusion.value < 0.3
    assert laws.noise is None


def test_label_noise_shrinks_with_the_data() -> None:
    laws = sweep(small_recipe(lr=0.01, steps=6), sizes=(12, 24, 48), seeds=range(4))
    assert laws.noise is not None
    assert laws.noise.agrees(-0.5)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_fitted_noise_is_the_noise_gain(loss: str) -> None:
    run = recorded("AdamW", loss, steps=6)
    estimate = fitted_noise(run, draws=150, seed=0)
    exact = path_operators(run).noise_gain().path ** 0.5
    assert abs(estimate.value - exact) < 3 * estimate.standard_error < 0.25 * exact


def test_batches_are_drawn_as_said() -> None:
    once: Tensor = torch.cat(draw_batches(10, 4, 3, 0, replace=False))
    assert sorted(once.tolist()) == list(range(10))
    again = torch.cat(draw_batches(10, 4, 3, 0, replace=True))
    assert len(set(again.tolist())) < 12


# --- refusals -------------------------------------------------------------------------------------


def test_runs_without_minibatch_noise() -> None:
    with pytest.raises(NotAnalysable, match="a full-batch run has no minibatch noise"):
        movement(recorded("SGD", steps=2, b=None))
    with pytest.raises(NotAnalysable, match="record with stride=1"):
        movement(recorded("SGD", steps=4, stride=2))


def test_sizes_that_are_none() -> None:
    with pytest.raises(ValueError, match="batch_sizes must be positive"):
        sweep(small_recipe(), batch_sizes=(0,))
    with pytest.raises(TypeError, match="sizes must be an integer"):
        sweep(small_recipe(), sizes=("8",))  # type: ignore[arg-type]
