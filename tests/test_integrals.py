"""What the dense operators come with: snapshots, closure, the frozen predictor, memory."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from poprisk.path import Closure, NotAnalysable, Run, integrals, integrate
from poprisk.path.integrals import Integrals, dense_bytes, relative
from runs import M, N, recorded
from samplers import randn


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert float((a - b).norm()) <= tol * float(b.norm()) + 1e-12


def matrices(ops: Integrals) -> list[Tensor]:
    return [ops.P, ops.Q, ops.W, ops.G, ops.D, *ops.affine]


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("optimizer", ["momentum", "Nesterov", "AdamW", "centred RMSprop"])
@pytest.mark.filterwarnings("ignore:the path operators are off")
def test_weights_may_be_gone_through_in_pieces(
    optimizer: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(optimizer, steps=3 * stride, b=None, stride=stride)
    whole = integrate(run)
    for entries in (1, 300):  # one weight at a time; ten of 38
        monkeypatch.setattr(integrals, "BLOCK", entries)
        for a, b in zip(matrices(integrate(run)), matrices(whole), strict=True):
            close(a, b, 1e-9)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize(
    ("snapshots", "intervals"),
    [(0, [0, 8]), (2, [0, 8]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (99, [*range(9)])],
)
@pytest.mark.filterwarnings("ignore:the path operators are off")
def test_snapshots_are_spread_over_the_run(
    snapshots: int, intervals: list[int], stride: int
) -> None:
    run = recorded("AdamW", steps=8 * stride, b=None, stride=stride)
    kept = integrate(run, snapshots=snapshots).snapshots
    assert [s.step for s in kept] == [stride * k for k in intervals]


def test_a_snapshot_is_the_state_of_affairs_at_its_step() -> None:
    run = recorded("AdamW", "cross_entropy", steps=6)
    problem, ops = run.problem, integrate(run, snapshots=3)
    for s in ops.snapshots:
        w = run.weights[s.step]
        u, J = problem.J.values(w, problem.train[0]), problem.J.dense(w, problem.train[0])
        close(s.train_outputs, u.flatten(), 1e-12)
        close(s.query_outputs, problem.J.values(w, problem.query[0]).flatten(), 1e-12)
        close(s.gradient, problem.output_gradient(u).flatten(), 1e-12)
        close(s.kernel, J @ J.T, 1e-12)
        moved = s.query_outputs - ops.snapshots[0].query_outputs
        close(s.G @ torch.cat([ops.g0, torch.ones(1)]), -moved, 1e-8)
    assert not bool(ops.snapshots[0].G.any())
    close(ops.snapshots[-1].G, torch.cat([ops.G, ops.affine.query.unsqueeze(1)], 1), 1e-15)


def test_the_frozen_predictor_is_that_of_the_kernel_at_the_start() -> None:
    run = recorded("SGD", steps=3, hidden=20)
    problem, w = run.problem, run.weights[0]
    J, J_Q = (problem.J.dense(w, x) for x in (problem.train[0], problem.query[0]))
    frozen = integrate(run).frozen
    assert frozen.shape == (2 * M, 2 * N)
    close(frozen @ (J @ J.T), J_Q @ J.T, 1e-7)


def test_closure_is_relative_to_what_happened() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative(a, a) == 0.0
    assert relative(1.5 * a, a) == pytest.approx(0.5)
    assert relative(-a, a) == pytest.approx(2.0)
    assert relative(a, 0 * a) == pytest.approx(5.0)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("error", "told"), [(0.0, 0), (0.009, 0), (0.011, 1), (math.nan, 1)])
def test_a_closure_error_above_one_percent_is_told_to_the_caller(
    place: int, error: float, told: int
) -> None:
    closure = Closure(*(error if i == place else 1e-3 for i in range(3)))
    assert closure.worst == pytest.approx(max(error, 1e-3), nan_ok=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        closure.warn("Think.", stacklevel=1)
    assert len(seen) == told
    for warning in seen:
        assert warning.filename == __file__
        assert str(warning.message).endswith("not what they predict. Think.")


def test_a_run_that_fits_its_budget_exactly_is_not_refused() -> None:
    run = recorded("SGD", steps=2)
    needed = dense_bytes(run)
    integrate(run, max_memory=needed)
    with pytest.raises(NotAnalysable, match=r"28 training outputs and 38 weights"):
        integrate(run, max_memory=0.999 * needed)


def held(run: Run) -> int:
    """Bytes of the matrices that a walk holds at once: of P rows, and of outputs alone."""
    outputs, queries, size = 2 * N, 2 * M, run.problem.size
    batch = 2 * max(len(i.examples) for i in run.intervals)
    of_weights = size * (outputs + queries + outputs + 1 + batch)
    of_outputs = (outputs + queries) * (3 * outputs + 1)
    return 8 * (of_weights + of_outputs)


@pytest.mark.parametrize("hidden", [6, 3000])
def test_the_estimate_of_memory_is_not_below_what_is_held_and_not_far_above(hidden: int) -> None:
    run = recorded("SGD", steps=1, hidden=hidden)
    assert held(run) <= dense_bytes(run) <= 2.5 * held(run) + 8 * 4 * integrals.BLOCK
    strided = recorded("SGD", steps=2, hidden=hidden, stride=2)
    extra = dense_bytes(strided) - dense_bytes(run)
    assert extra >= 8 * run.problem.size * 2 * N


def test_phi_functions_near_zero_are_their_series() -> None:
    Z = 1e-3 * randn(3, 3)
    phi1, phi2 = integrals.phi_functions(Z)
    eye = torch.eye(3, dtype=torch.float64)
    close(phi1, eye + Z / 2 + Z @ Z / 6, 1e-9)
    close(phi2, eye / 2 + Z / 6 + Z @ Z / 24, 1e-9)
