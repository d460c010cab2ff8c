import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from asserts import assert_bitwise
from poprisk import PopRiskAdamW, grad_mean_var
from poprisk.optim.variance import ESTIMATORS, Ema, SecondMoment, StepCounts, make_estimator
from samplers import grad_rows, noisy_grads, parameter, take_steps

BETA1, BETA2, RHO = 0.9, 0.99, 0.95
SECOND = {"variance": "second-moment"}


def weighted_mean(values: list[Tensor], decay: float, *, corrected: bool = True) -> Tensor:
    """Exponential average written as an explicit sum of all values."""
    t = len(values)
    total = sum(
        ((1 - decay) * decay ** (t - 1 - k) * x for k, x in enumerate(values)), 0 * values[0]
    )
    return total / (1 - decay**t) if corrected else total


def optimizer_on(grads: list[Tensor], *, beta1: float = BETA1, **settings: object) -> PopRiskAdamW:
    """An optimizer that has stepped on ``grads``."""
    opt = PopRiskAdamW(
        [Parameter(torch.zeros_like(grads[0]))],
        betas=(beta1, BETA2),
        rho=RHO,
        **settings,  # pyrefly: ignore
    )
    take_steps(opt, [[g] for g in grads])
    return opt


def estimate(opt: PopRiskAdamW, variance: str, *, paper: bool = False) -> tuple[Tensor, float]:
    """ŝ of the only parameter, and its inflation."""
    (p,) = opt.param_groups[0]["params"]
    state = opt.state[p]
    t = int(state["step"])
    counts = StepCounts(t, t - state["variance_start"], *opt.param_groups[0]["betas"])
    estimator = make_estimator(variance, rho=RHO, paper=paper)
    raw, scale = estimator.read(
        [state[key] for key in estimator.state_keys],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        counts,
    )
    return scale * raw[0], estimator.inflation(counts)


@pytest.mark.parametrize("mode", ["auto", "paper"])
@pytest.mark.parametrize("beta1", [0.0, BETA1])
@pytest.mark.parametrize("steps", [2, 3, 30])
def test_ema_is_the_weighted_mean_of_squared_deviations(
    mode: str, beta1: float, steps: int
) -> None:
    grads = noisy_grads(steps, 6)
    paper = mode == "paper"
    past = [weighted_mean(grads[:t], beta1, corrected=not paper) for t in range(1, steps)]
    deviations = [(g - m).square() for g, m in zip(grads[1:], past, strict=True)]
    if paper:
        deviations.insert(0, grads[0].square())
    s_hat, _ = estimate(optimizer_on(grads, beta1=beta1, mode=mode), "ema", paper=paper)
    torch.testing.assert_close(s_hat, weighted_mean(deviations, RHO), rtol=1e-12, atol=0)


def test_the_first_step_has_no_deviation() -> None:
    (g,) = noisy_grads(1, 6)
    auto, paper = (optimizer_on([g], mode=mode) for mode in ("auto", "paper"))
    (state,) = auto.state.values()
    assert_bitwise(state["grad_mean_var"], torch.zeros_like(g))
    torch.testing.assert_close(estimate(paper, "ema", paper=True)[0], g.square())


def test_an_estimator_that_starts_late_counts_from_there() -> None:
    """At step 8 with one observation, ŝ is the one squared deviation."""
    m, g = parameter(5).detach(), parameter(5, seed=1).detach()
    s = torch.zeros_like(m)
    counts = StepCounts(t=8, observations=1, beta1=BETA1, beta2=BETA2)
    ema = Ema(RHO)
    ema.observe_([s], [g], [m], counts)
    (raw,), scale = ema.read([s], [m], [m], counts)
    torch.testing.assert_close(scale * raw, (g - m / (1 - BETA1**7)).square())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_change_nothing_but_their_state(name: str) -> None:
    g, m, v = (parameter(5, seed=j).detach().square() for j in range(3))
    before = [x.clone() for x in (g, m, v)]
    estimator = make_estimator(name, rho=RHO, paper=False)
    counts = StepCounts(t=4, observations=3, beta1=BETA1, beta2=BETA2)
    variances = [torch.zeros_like(g) for _ in estimator.state_keys]
    estimator.observe_(variances, [g], [m], counts)
    estimator.read(variances, [m], [v], counts)
    assert_bitwise([g, m, v], before)


def test_second_moment_is_the_weighted_variance() -> None:
    """With equal betas, v̂ - m̂² = Σ w (g - m̂)² exactly."""
    grads = noisy_grads(20, 6)
    opt = PopRiskAdamW([parameter(6)], betas=(0.9, 0.9), variance="second-moment")
    take_steps(opt, [[g] for g in grads])
    m_hat = weighted_mean(grads, 0.9)
    expected = weighted_mean([(g - m_hat).square() for g in grads], 0.9)
    s_hat, _ = estimate(opt, "second-moment")
    torch.testing.assert_close(s_hat, expected, rtol=1e-11, atol=0)


def test_second_moment_is_never_negative_and_keeps_no_state() -> None:
    """A late large gradient weighs more in m̂² than in v̂."""
    opt = optimizer_on([torch.full((3,), g) for g in (0.0, 0.0, 0.0, 1.0)], beta1=0.5, **SECOND)
    s_hat, _ = estimate(opt, "second-moment")
    assert_bitwise(s_hat, torch.zeros(3))
    assert set(*opt.state.values()) == {"step", "exp_avg", "exp_avg_sq", "variance_start"}


@pytest.mark.parametrize(
    ("estimator", "before", "after"),
    [(Ema(RHO), 0.0, 1.5), (Ema(RHO, paper=True), 2.0, 1.5), (SecondMoment(), 0.0, 0.5)],
)
def test_inflation_counts_the_noise_of_the_average(
    estimator: Ema | SecondMoment, before: float, after: float
) -> None:
    """At β₁ = 1/3, the average keeps half of the noise of one batch."""
    first = 1 if estimator.observes(1) else 0
    for captured in (False, True):

        def count(number: int, captured: bool = captured) -> Any:
            return torch.tensor(float(number), dtype=torch.float64) if captured else number

        counts = [StepCounts(count(t), count(k), 1 / 3, BETA2) for t, k in [(1, first), (300, 300)]]
        assert float(estimator.inflation(counts[0])) == before
        assert float(estimator.inflation(counts[1])) == pytest.approx(after)


@pytest.mark.parametrize(
    ("variance", "beta1", "mean"),
    [("ema", 0.9, 1.0), ("ema", 0.5, 1.0), ("second-moment", 0.9, 0.0)],
)
def test_estimates_the_variance_of_the_batch_mean(variance: str, beta1: float, mean: float) -> None:
    """Real backward passes on batches of b examples with gradient variance σ²: σ²/b comes out.

    Neither σ² itself, nor σ²/(b(b-1)), the double division of public ports. (Where |mean| ≫ σ,
    second-moment is biased upwards: v̂ - m̂² then fluctuates far more than σ² and is cut at 0.)
    """
    rng = torch.Generator().manual_seed(0)
    sigma, b, coordinates = 2.0, 8, 3000
    w = parameter(coordinates)
    opt = PopRiskAdamW(
        [w], betas=(beta1, 0.99), rho=RHO, variance=variance, batch_size=b, weight_decay=0.0
    )
    for _ in range(300):
        x = sigma * torch.randn(b, coordinates, generator=rng, dtype=torch.float64) + mean
        opt.zero_grad()
        (x @ w).mean().backward()
        opt.step()
    s_hat, inflation = estimate(opt, variance)
    assert s_hat.mean().item() / inflation == pytest.approx(sigma**2 / b, rel=0.02)


def test_the_state_is_named_for_what_it_estimates() -> None:
    w = parameter(3)
    opt = PopRiskAdamW([w])
    take_steps(opt, grad_rows([w], 2))
    assert Ema.state_keys == ("grad_mean_var",)
    assert "grad_mean_var" in opt.state[w]


def test_the_variance_of_a_batch_leaves_no_trace() -> None:
    """Not in weights that a forward pass writes to, nor in the random numbers of dropout."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(6, 4, max_norm=0.5),
        torch.nn.Flatten(),
        torch.nn.Dropout(),
        torch.nn.Linear(12, 1),
    )
    batch = torch.randint(6, (8, 3)), torch.randn(8, 1)
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode():
        found = grad_mean_var(model, lambda u, y: (u - y).square().sum(1), batch, chunk=4)
    assert float(found["3.weight"].sum()) > 0
    assert_bitwise(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), numbers)
