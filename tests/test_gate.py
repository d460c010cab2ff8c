import doctest
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import poprisk.optim.gate
from asserts import assert_bitwise, assert_close
from cases import MASKS, MODES, REDUCTIONS, evaluate
from poprisk import PopRiskAdamW
from poprisk.optim.gate import MASKS_, Gate, finite_ratio, momentum_noise, threshold
from poprisk.optim.variance import Ema, StepCounts
from reference import optimizer as reference
from samplers import moments, noisy_grads, observed_masks, parameter, take_steps

alphas = st.floats(0, 100)
softnesses = st.one_of(st.just(0.0), st.floats(1e-3, 10))
each_mask = pytest.mark.parametrize("mask", MASKS)


def columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """The squared means and the variances of (mean, variance) pairs, float64."""
    m, s = torch.tensor(pairs, dtype=torch.float64).T
    return m * m, s.contiguous()


def away_from_the_tie(pairs: list[tuple[float, float]], alpha: float) -> bool:
    return all(abs(m * m - alpha * s) >= 1e-9 * m * m or s == 0 == m for m, s in pairs)


@each_mask
@given(pairs=moments, alpha=alphas, softness=softnesses, eps=st.sampled_from([0.0, 1e-8]))
def test_masks_equal_the_definition(
    mask: str, pairs: list[tuple[float, float]], alpha: float, softness: float, eps: float
) -> None:
    assume(away_from_the_tie(pairs, alpha))
    q = evaluate(mask, *columns(pairs), alpha=alpha, softness=softness, eps=eps)
    expected = [reference.mask_value(mask, m, s, alpha, softness, eps) for m, s in pairs]
    assert q.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@each_mask
@given(pairs=moments, alpha=alphas, softness=softnesses, scale=st.floats(1e-3, 1e3))
def test_var_scale_multiplies_the_variance(
    mask: str, pairs: list[tuple[float, float]], alpha: float, softness: float, scale: float
) -> None:
    assume(away_from_the_tie(pairs, alpha * scale))
    mean_sq, var = columns(pairs)
    q = evaluate(mask, mean_sq, var, alpha=alpha, softness=softness, var_scale=scale)
    expected = evaluate(mask, mean_sq, scale * var, alpha=alpha, softness=softness)
    torch.testing.assert_close(q, expected, rtol=1e-6, atol=1e-12)


@each_mask
@given(pairs=moments, alpha=alphas, softness=softnesses)
def test_masks_lie_in_the_unit_interval_and_close_with_noise(
    mask: str, pairs: list[tuple[float, float]], alpha: float, softness: float
) -> None:
    mean_sq, var = columns(pairs)
    q = evaluate(mask, mean_sq, var, alpha=alpha, softness=softness)
    noisier = evaluate(mask, mean_sq, 3 * var, alpha=alpha, softness=softness)
    stronger = evaluate(mask, 3 * mean_sq, var, alpha=alpha, softness=softness)
    assert bool(((q >= 0) & (q <= 1)).all())
    assert bool((noisier <= q * (1 + 1e-12)).all())
    assert bool((stronger >= q * (1 - 1e-12)).all())


@each_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softness", [0.0, 0.1])
def test_no_evidence_closes_the_gate(mask: str, dtype: torch.dtype, softness: float) -> None:
    zero = torch.zeros(3, dtype=dtype)
    q = evaluate(mask, zero, zero.clone(), alpha=1.0, softness=softness)
    assert_bitwise(q, zero)


@each_mask
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_float32_masks_do_not_depend_on_the_size_of_gradients(mask: str, size: float) -> None:
    m, s = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.25, 1.0])
    q = evaluate(mask, (size * m) ** 2, size**2 * s, alpha=1.0, softness=0.5)
    pairs = zip(m.tolist(), s.tolist(), strict=True)
    expected = [reference.mask_value(mask, *pair, 1.0, 0.5, 0.0) for pair in pairs]
    torch.testing.assert_close(q, torch.tensor(expected), rtol=1e-5, atol=0)


@each_mask
def test_lists_and_tensors_share_the_maths(mask: str) -> None:
    mean_sq = [parameter(4, seed=j).detach().square() for j in range(3)]
    var = [parameter(4, seed=10 + j).detach().square() for j in range(3)]
    many = evaluate(mask, mean_sq, var, alpha=0.5, softness=0.1)
    one_by_one = [
        evaluate(mask, m, s, alpha=0.5, softness=0.1) for m, s in zip(mean_sq, var, strict=True)
    ]
    assert isinstance(many, list)
    assert_bitwise(many, one_by_one)
    assert evaluate(mask, [], [], alpha=0.5, softness=0.1) == []


@each_mask
def test_masks_leave_their_inputs_alone(mask: str) -> None:
    mean, var = parameter(20).detach(), parameter(20, seed=1).detach().square()
    mean_sq = mean.square()
    inputs = [mean.clone(), mean_sq.clone(), var.clone()]
    evaluate(mask, mean_sq, var, alpha=0.5, softness=0.1, eps=1e-3, var_scale=2.0)
    for per_tensor in (False, True):
        Gate(MASKS_[mask], 0.5, q_min=0.3, per_tensor=per_tensor)([mean], [var])
    assert_bitwise([mean, mean_sq, var], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equality_up_to_rounding_is_closed(dtype: torch.dtype) -> None:
    m = parameter(1000, dtype=dtype).detach()
    one_ulp_up = torch.nextafter(m * m, torch.tensor(math.inf, dtype=dtype))
    q = evaluate("hard", one_ulp_up, m * m, alpha=1.0)
    assert not bool(q.any())
    clearly_above = evaluate("hard", m * m * (1 + 1e-5), m * m, alpha=1.0)
    assert bool(clearly_above.all())


@each_mask
def test_the_gate_corrects_its_moments_by_numbers(mask: str) -> None:
    m, s = parameter(50).detach(), parameter(50, seed=1).detach().square()
    gate = Gate(MASKS_[mask], alpha=0.7, softness=0.2, eps=1e-2)
    (q,) = gate([m], [s], mean_scale=3.0, var_scale=5.0)
    expected = evaluate(mask, (3 * m) ** 2, 5 * s, alpha=0.7, softness=0.2, eps=1e-2)
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-14)


@each_mask
@pytest.mark.parametrize("count", [1, 2])
def test_corrections_in_tensors_are_those_in_numbers(mask: str, count: int) -> None:
    """Captured steps keep counters, and so corrections and eps, in float64 tensors."""
    mean = [parameter(5, seed=j, dtype=torch.float32).detach() for j in range(count)]
    var = [m.flip(0).square() for m in mean]
    gate = Gate(MASKS_[mask], alpha=0.7, softness=0.2, eps=1e-2)
    three, five = (torch.tensor(x, dtype=torch.float64) for x in (3.0, 5.0))
    found = gate(mean, var, mean_scale=three, var_scale=five)  # pyrefly: ignore
    assert_close(found, gate(mean, var, mean_scale=3.0, var_scale=5.0), 1e-6)
    assert {q.dtype for q in found} == {torch.float32}


@each_mask
def test_per_tensor_averages_before_the_comparison(mask: str) -> None:
    m, s = parameter(6, 2).detach(), parameter(6, 2, seed=1).detach().square()
    (q,) = Gate(MASKS_[mask], alpha=0.5, softness=0.2, per_tensor=True)([m], [s])
    root_mean_square, mean = m.square().mean().sqrt().item(), s.mean().item()
    expected = reference.mask_value(mask, root_mean_square, mean, 0.5, 0.2, 0.0)
    assert q.shape == ()
    assert q.item() == pytest.approx(expected, rel=1e-12)


@each_mask
def test_the_floor_lifts_only_what_is_below(mask: str) -> None:
    m, s = parameter(50).detach(), parameter(50, seed=1).detach().square()
    gate = Gate(MASKS_[mask], alpha=1.0, softness=0.3)
    (q,), (floored,) = gate([m], [s]), gate._replace(q_min=0.25)([m], [s])
    assert_bitwise(floored, q.clamp_min(0.25))
    assert q.min() < 0.25 < q.max()


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_momentum_noise_is_the_sum_of_squared_weights(beta1: float) -> None:
    for t in (1, 2, 3, 10, 500):
        expected = reference.momentum_noise(t, beta1)
        assert momentum_noise(t, beta1) == pytest.approx(expected, rel=1e-12)
    assert momentum_noise(100_000, beta1) == pytest.approx((1 - beta1) / (1 + beta1), rel=1e-12)


def test_the_threshold_by_name() -> None:
    def resolve(alpha: float | str, z: float = 1.0, n: int | None = 48) -> float:
        sizes = {"batch_size": 16, "dataset_size": n}
        return threshold(alpha, noise_ratio=0.25, inflation=1.25, z=z, **sizes)

    assert resolve("fresh") == 1.0
    assert resolve("finite") == finite_ratio(16, 48) == 0.5
    assert resolve("finite", n=None) == finite_ratio(16, None) == 0.0
    assert resolve("auto", n=None) == pytest.approx(0.2)
    assert resolve("auto") == pytest.approx(0.6)
    assert resolve("auto", z=3.0) == pytest.approx(5.4)
    assert resolve(0.7, z=3.0) == 0.7


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_alpha_auto_in_the_optimizer(beta1: float) -> None:
    """What the hard mask compares with is z²(r_t + b/(n-b))/(1 + r_t), t counting this step."""
    seen: list[float] = []

    def spy(mean_sq: list[Tensor], var: list[Tensor], *, alpha: float, **_: float) -> list[Tensor]:
        seen.append(alpha)
        return [torch.ones_like(m) for m in mean_sq]

    sizes = {"batch_size": 4, "dataset_size": 20}
    opt = PopRiskAdamW([parameter(2)], betas=(beta1, 0.99), mask=spy, z=1.5, **sizes)
    take_steps(opt, [[g] for g in noisy_grads(4, 2)])
    r = [reference.momentum_noise(t, beta1) for t in (2, 3, 4)]
    assert seen == pytest.approx([2.25 * (x + 4 / 16) / (1 + x) for x in r])


def moments_of_noise(
    draw: Callable[[], Tensor], *, steps: int, beta1: float, rho: float
) -> tuple[Tensor, Tensor]:
    """m̂ and ŝ after averaging gradients from ``draw``, in the order of the optimizer."""
    g = draw()
    m, s = (1 - beta1) * g, torch.zeros_like(g)
    ema = Ema(rho)
    for t in range(2, steps + 1):
        g = draw()
        ema.observe_([s], [g], [m], StepCounts(t, t - 1, beta1, 0.999))
        m.lerp_(g, 1 - beta1)
    counts = StepCounts(steps, steps - 1, beta1, 0.999)
    (raw,), scale = ema.read([s], [m], [m], counts)
    return m * counts.mean_scale, raw * scale


def assert_unbiased(
    m_hat: Tensor, s_hat: Tensor, alpha: float, mu: float, *, resolution: float
) -> None:
    """E[m̂² - αŝ] = μ² within four standard errors, and these are small."""
    x = m_hat.square() - alpha * s_hat
    error = x.std().item() / math.sqrt(x.numel())
    assert error < resolution
    assert abs(x.mean().item() - mu**2) < 4 * error


@pytest.mark.parametrize(("beta1", "resolution"), [(0.9, 5e-4), (0.5, 3e-3), (0.0, 1e-2)])
def test_z_of_one_is_unbiased_on_a_stream(beta1: float, resolution: float) -> None:
    rng = torch.Generator().manual_seed(3)
    mu, steps = 0.1, 250

    def draw() -> Tensor:
        return mu + torch.randn(40_000, generator=rng)

    m_hat, s_hat = moments_of_noise(draw, steps=steps, beta1=beta1, rho=0.98)
    alpha = threshold(
        "auto",
        noise_ratio=momentum_noise(steps, beta1),
        inflation=Ema(0.98).inflation(StepCounts(steps, steps - 1, beta1, 0.999)),
        z=1.0,
        batch_size=None,
        dataset_size=None,
    )
    assert_unbiased(m_hat, s_hat, alpha, mu, resolution=resolution)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_z_of_one_is_unbiased_on_a_finite_data_set(beta1: float) -> None:
    """The expectation is over data sets, which are samples themselves, and over batches."""
    rng = torch.Generator().manual_seed(4)
    mu, n, b, steps, coordinates = 0.2, 12, 3, 120, 6000
    data = mu + torch.randn(coordinates, n, generator=rng)

    def draw() -> Tensor:
        batch = torch.rand(coordinates, n, generator=rng).topk(b).indices
        return data.gather(1, batch).mean(1)

    m_hat, s_hat = moments_of_noise(draw, steps=steps, beta1=beta1, rho=0.95)
    alpha = threshold(
        "auto",
        noise_ratio=momentum_noise(steps, beta1),
        inflation=Ema(0.95).inflation(StepCounts(steps, steps - 1, beta1, 0.999)),
        z=1.0,
        batch_size=b,
        dataset_size=n,
    )
    assert_unbiased(m_hat, s_hat, alpha, mu, resolution=8e-3)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.0])
def test_two_standard_errors_let_about_five_percent_of_noise_pass(beta1: float) -> None:
    rng = torch.Generator().manual_seed(5)
    opt = PopRiskAdamW([parameter(20_000)], betas=(beta1, 0.999), mask="hard", z=2.0)
    for _ in range(200):
        take_steps(opt, [[torch.randn(20_000, generator=rng, dtype=torch.float64)]])
    (stats,) = opt.gate_stats().values()
    assert stats.pass_rate == pytest.approx(math.erfc(math.sqrt(2)), abs=0.008)


@each_mask
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variance", ["ema", "second-moment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescaled_gradients_leave_every_mask_unchanged(
    mask: str, reduction: str | None, variance: str, dtype: torch.dtype
) -> None:
    grads = noisy_grads(20, 30, dtype=dtype)
    settings = {"mask": mask, "reduction": reduction, "variance": variance, "eps": 0.0, "z": 1.0}
    masks = observed_masks(grads, **settings)
    tol = 1e-3 if dtype == torch.float32 else 1e-10
    for scale in (1e-6, 1e6):
        assert_close(observed_masks([scale * g for g in grads], **settings), masks, tol)
    if reduction is None:
        assert all(0 < q.mean() < 1 for q in masks[5:])


@each_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescaled_gradients_leave_the_statistics_unchanged(mask: str, dtype: torch.dtype) -> None:
    def stats(scale: float) -> list[float]:
        opt = PopRiskAdamW([parameter(30, dtype=dtype)], mask=mask, eps=0.0)
        take_steps(opt, [[scale * g] for g in noisy_grads(20, 30, dtype=dtype)])
        return [float(x) for x in opt.gate_stats()["groups[0]"]]

    for scale in (1e-6, 1e6):
        assert stats(scale) == pytest.approx(stats(1.0), rel=1e-3)


def test_only_the_papers_form_depends_on_the_scale() -> None:
    grads = [1e-6 * g for g in noisy_grads(10, 30)]
    mean_gate = {
        mode: observed_masks(grads, mode=mode, alpha=0.1, eps=1e-8)[-1].mean().item()
        for mode in MODES
    }
    assert mean_gate["paper"] < 1e-3 < 0.1 < mean_gate["auto"]


def test_examples_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(poprisk.optim.gate)
    assert failed == 0 < attempted
