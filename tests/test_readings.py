"""Readings of the paper that circulate and are wrong: what each gets wrong, measured."""

import pytest
import torch
from torch import Tensor, nn

from poprisk.optim import gate
from poprisk.path import record
from poprisk.path.operators import PathOperators, path_operators
from runs import N, network, recorded
from samplers import randn


def learner(optimizer: str = "SGD", steps: int = 40) -> PathOperators:
    return path_operators(recorded(optimizer, steps=steps, b=None, c=1, n=N))


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_one_minus_the_propagator_is_the_training_transfer_and_not_the_dissipation() -> None:
    """``W = I - Texp(-∫K)``: that is D/n, not symmetric as soon as the kernel moves."""
    ops = path_operators(
        recorded(lambda ps: torch.optim.SGD(ps, lr=0.02), steps=60, b=None, hidden=16)
    )
    reading = torch.eye(len(ops.P)) - ops.P
    assert off(reading, ops.D / N) < 1e-10
    right = N / 2 * (torch.eye(len(ops.P)) - ops.P.T @ ops.P)  # as the step goes to 0
    assert off(ops.W, right) < 0.05
    assert min(off(reading, ops.W), off(N / 2 * reading, ops.W), off(N * reading, ops.W)) > 0.1
    assert off(reading, reading.T) > 1e-6 > off(ops.W, ops.W.T)


def test_the_kernel_at_the_start_is_no_coupling_once_features_move() -> None:
    """``A = K_QS(0) K_SS(0)⁻¹``: exact for a linear model, and off where the kernel drifts."""
    x, query = randn(6, 9, seed=1), randn(4, 9, seed=2)
    net = nn.Linear(9, 1, bias=False).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    y = randn(6, 1, seed=3)
    linear = record(net, "squared_error", sgd, [torch.arange(6)] * 15, query, train=(x, y))
    assert path_operators(linear).coupling().frozen.error < 1e-6
    found = learner().coupling()
    assert found.prediction.error < 1e-5
    assert found.frozen.error > 100 * found.prediction.error


def test_a_frozen_kernel_is_a_spectral_filter() -> None:
    """Theorem H.1 in discrete time: along an eigenvector of K the gradient goes as (1 - ηλ/n)ᵏ."""
    x, query, steps, lr = randn(6, 9, seed=1), randn(4, 9, seed=2), 15, 0.05
    net = nn.Linear(9, 1, bias=False).double()
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    y = randn(6, 1, seed=3)
    ops = path_operators(
        record(net, "squared_error", sgd, [torch.arange(6)] * steps, query, train=(x, y))
    )
    values, vectors = torch.linalg.eigh(x @ x.T)
    expected = vectors @ ((1 - lr * values / 6) ** steps).diag() @ vectors.T
    torch.testing.assert_close(ops.P, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("b", [8, 64])
def test_the_variance_estimate_is_of_the_batch_mean_already(b: int) -> None:
    """Dividing by b - 1 again: pure noise then passes a threshold of one nearly always."""
    noise = randn(20_000, b, seed=4)
    mean = noise.mean(1)
    of_mean = noise.var(1) / b  # Σ_B/(b-1)
    right = gate.hard(mean**2, of_mean, alpha=1.0).mean()
    again = gate.hard(mean**2, of_mean / (b - 1), alpha=1.0).mean()
    assert float(of_mean.mean()) == pytest.approx(float(mean.var()), rel=0.05)
    assert 0.25 < float(right) < 0.4  # P(|t| > 1)
    assert float(again) > {8: 0.65, 64: 0.85}[b]


def test_the_snr_mask_of_the_paper_has_no_threshold() -> None:
    """Equation 243 holds at α = 1; with the α of a finite data set the mask opens much further."""
    m, s, softness = randn(50, seed=5) ** 2, randn(50, seed=6) ** 2 + 0.1, 0.7
    printed = m / (m + softness * s)
    torch.testing.assert_close(gate.snr(m, s, alpha=1.0, softness=softness), printed)
    b, n = 8, 256
    with_alpha = gate.snr(m, s, alpha=b / (n - b), softness=softness)
    assert float((with_alpha - printed).mean()) > 0.3


def test_the_soft_mask_has_the_signal_below_the_line() -> None:
    """``q = (μ² - σ²/(b-1))₊/(σ² + ε)``: no factor below one, but one that grows without bound."""
    m, s = torch.tensor([0.5, 4.0, 100.0]), torch.ones(3)
    reading = (m - s).clamp_min(0) / (s + 1e-8)
    assert float(reading.max()) == pytest.approx(99.0)
    mask = gate.soft(m, s, alpha=1.0, softness=1.0)
    torch.testing.assert_close(mask, torch.tensor([0.0, 3 / 4, 99 / 100]))


def test_a_softness_of_zero_is_the_hard_mask() -> None:
    """λ "is typically unnecessary at scale" (§F.4): without it the soft mask decides as Eq. 241."""
    m, s = randn(500, seed=7) ** 2, randn(500, seed=8) ** 2
    for alpha in (0.3, 1.0):
        soft, hard = gate.soft(m, s, alpha=alpha, softness=0.0), gate.hard(m, s, alpha=alpha)
        torch.testing.assert_close(soft, hard)
        assert 0.1 < float(hard.mean()) < 0.9


def test_the_network_of_these_tests_moves_its_features() -> None:
    """Else the readings above would differ from what is right by nothing."""
    drift = [value for _, value in learner().kernel_drift()]
    assert max(drift) > 0.05
    assert sum(p.numel() for p in network(1).parameters()) > N
