"""The path operators against the naive reference, and the identities of the theory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk.path import (
    Run,
    integrate,
    phi_functions,
    realized_update,
    record,
)
from reference import path as reference
from runs import LOSSES, OPTIMIZERS, N, batches, data, network, recorded
from samplers import randn

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def reference_steps(run: Run) -> list[reference.Step]:
    """The steps of a recorded run in the form of the reference."""
    found = list[reference.Step]()
    for k, interval in enumerate(run.intervals):
        rule = run.rule(k, torch.float64)
        flat: list[Any] = [t.squeeze(1) if isinstance(t, Tensor) else t for t in rule]
        scale, correction, carry, gain, p, q, coupled, decay, sign, steps = flat
        assert (sign, steps) == (1.0, 1)
        counts = (interval.sampling * 5 / run.problem.n).round().long().tolist()
        pairs = zip(interval.examples.tolist(), counts, strict=True)
        batch = [i for i, count in pairs for _ in range(count)]
        nesterov = p if q else None
        found.append(
            reference.Step(batch, scale, correction, carry, gain, nesterov, coupled, decay)
        )
    return found


def naive(run: Run) -> reference.Operators:
    """The reference's operators of a run."""
    problem = run.problem
    x, y = problem.train

    def total_loss(u: Tensor) -> Tensor:
        return problem.loss(problem.shaped(u.view(len(x), -1)), y).mean()

    return reference.path_operators(
        problem.J.outputs,
        total_loss,
        [run.weights[k] for k in range(len(run) + 1)],
        reference_steps(run),
        x,
        problem.query[0],
        run.momentum_in,
    )


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert float((a - b).norm()) <= tol * float(b.norm()) + 1e-12


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [
        *(("squared_error", name) for name in OPTIMIZERS),
        *(("cross_entropy", name) for name in ("SGD", "momentum", "AdamW", "PopRiskAdamW soft")),
    ],
)
def test_equals_the_reference(optimizer: str, loss: str) -> None:
    """Of every optimizer, and of every kind of rule where the loss is not quadratic."""
    run = recorded(optimizer, loss, steps=4)
    actual, expected = integrate(run), naive(run)
    for name in ("P", "Q", "W", "G", "D"):
        close(getattr(actual, name), getattr(expected, name), 1e-9)
    if bool(expected.h.any()):
        close(actual.affine.gradient, expected.h, 1e-8)
        close(actual.affine.query, expected.affine_G, 1e-8)
        close(actual.affine.train, expected.affine_D, 1e-8)


@each_optimizer
def test_the_identities_close(optimizer: str) -> None:
    """And the dissipation is positive."""
    ops = integrate(recorded(optimizer, steps=6))
    assert ops.closure.worst < 1e-8
    eigenvalues = torch.linalg.eigvalsh(ops.W)
    assert float(eigenvalues[0]) > -1e-12 * float(eigenvalues[-1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_identities_close_for_every_loss(loss: str) -> None:
    c = 1 if loss == "binary_cross_entropy" else 2
    assert integrate(recorded("AdamW", loss, steps=6, c=c)).closure.worst < 1e-9


@pytest.mark.slow
@pytest.mark.long
def test_squared_error_closes_to_1e_9_over_100_full_batch_steps() -> None:
    assert integrate(recorded("SGD", steps=100, b=None)).closure.worst < 1e-9


@pytest.mark.slow
@pytest.mark.long
def test_cross_entropy_closes_far_from_the_frozen_kernel() -> None:
    ops = integrate(recorded(lambda ps: torch.optim.SGD(ps, lr=0.5), "cross_entropy", steps=300))
    first, *_, last = ops.snapshots
    drift = torch.linalg.matrix_norm(last.kernel - first.kernel, 2)
    assert ops.closure.worst < 1e-5
    assert float(drift / torch.linalg.matrix_norm(first.kernel, 2)) > 2


def test_momentum_that_was_there_before_is_affine() -> None:
    (x, y), query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    (net(x) - y).square().mean().backward()
    sgd.step()
    run = record(net, "squared_error", sgd, batches(8), query, train=(x, y))
    ops = integrate(run)
    assert float(run.momentum_in.norm()) > 0
    assert float(ops.affine.query.norm()) > 1e-3
    assert ops.closure.worst < 1e-9


def test_groups_with_their_own_settings_and_constants() -> None:
    def build(ps: Any) -> torch.optim.Optimizer:
        w1, b1, w2, _ = ps
        return torch.optim.SGD(
            [{"params": [w1, b1], "lr": 0.05}, {"params": [w2], "lr": 0.2, "momentum": 0.5}]
        )

    run = recorded(build, steps=8)
    assert run.problem.size == 3 * 6 + 6 + 6 * 2
    assert integrate(run).closure.worst < 1e-9


def test_a_weight_that_is_never_used_moves_nothing() -> None:
    (x, y), query, _ = data()
    net = network()
    net.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    run = record(net, "squared_error", sgd, batches(6), query, train=(x, y))
    assert integrate(run).closure.worst < 1e-9


def test_maximizing_is_descent_on_the_negative_loss() -> None:
    run = recorded(
        lambda ps: torch.optim.SGD(ps, lr=0.01, maximize=True, weight_decay=0.1), steps=8
    )
    ops = integrate(run)
    assert ops.accounting.measured < 0
    assert ops.closure.worst < 1e-9
    assert float(torch.linalg.eigvalsh(ops.W)[0]) > -1e-12


def test_an_unknown_optimizer_through_its_realized_steps() -> None:
    run = recorded(
        lambda ps: torch.optim.NAdam(ps, lr=0.01), rule=realized_update(momentum=0.9), steps=12
    )
    assert integrate(run).closure.worst < 1e-8
    assert "read off its steps" in run.describe()[0]
    assert recorded(steps=1).describe()[0].endswith("exact.")


# --- identities of THEORY §2-§3 -------------------------------------------------------------------


def test_squared_error_propagates_what_training_transfers() -> None:
    r""":math:`D = n(I - P)` holds for any step size, minibatches included."""
    ops = integrate(recorded("momentum", steps=10))
    close(ops.D, N * (torch.eye(len(ops.P)) - ops.P), 1e-12)


def test_the_gradient_propagates() -> None:
    r""":math:`g_K = P g_0`, and P acts after what was before it."""
    run = recorded("SGD", "cross_entropy", steps=8)
    ops = integrate(run)
    close(ops.P @ ops.g0, ops.snapshots[-1].gradient, 1e-9)
    assert float((ops.P.T @ ops.g0 - ops.snapshots[-1].gradient).norm()) > 1e-3


def test_small_steps_reach_the_continuous_identities() -> None:
    r""":math:`W = \frac n2 (I - P^T P)` and :math:`\Phi_0 - \Phi_T = g^T W g` as η → 0."""
    errors = []
    for lr in (0.04, 0.01):
        ops = integrate(recorded(lambda ps, lr=lr: torch.optim.SGD(ps, lr=lr), steps=10, b=None))
        expected = N / 2 * (torch.eye(len(ops.P)) - ops.P.T @ ops.P)
        drop = ops.accounting
        error = float((ops.W - expected).norm() / expected.norm())
        errors.append((error, abs(drop.quadratic / drop.measured - 1)))
    for large, small in zip(*errors, strict=True):
        assert small < 0.4 * large < 0.02


@each_optimizer
def test_the_loss_drop_is_accounted_for(optimizer: str) -> None:
    accounting = integrate(recorded(optimizer, "cross_entropy", steps=6)).accounting
    assert abs(accounting.measured) > 1e-3
    assert accounting.accounted == pytest.approx(accounting.measured, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["Nesterov", "AdamW", "PopRiskAdamW hard"])
def test_what_the_reservoir_holds_is_invisible(optimizer: str) -> None:
    """Twins share input and batches: their difference is dissipated nowhere and moves nothing."""
    (x, y), query, _ = data()
    x, y = torch.cat([x, x[:3]]), torch.cat([y, y[:3] + 1])
    net = network()
    run = record(
        net,
        "squared_error",
        OPTIMIZERS[optimizer](net.parameters()),
        [torch.arange(len(x))] * 10,
        query,
        train=(x, y),
    )
    ops = integrate(run)
    values, vectors = torch.linalg.eigh(ops.W)
    kernel = vectors[:, values < 1e-12 * values[-1]]
    assert kernel.shape[1] == 6
    assert float(values[0]) > -1e-12 * float(values[-1])
    for transfer in (ops.G, ops.D):
        assert float((transfer @ kernel).norm()) < 1e-6 * float(transfer.norm())


# --- quadrature -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quadrature", "low", "high"),
    [("left", 1e-3, 1), ("midpoint", 1e-7, 1e-2), ("gauss2", 1e-10, 1e-5), ("gauss3", 0, 1e-9)],
)
@pytest.mark.filterwarnings("ignore:the path operators are off")
def test_nodes_buy_accuracy(quadrature: str, low: float, high: float) -> None:
    worst = integrate(recorded("SGD"), quadrature=quadrature).closure.worst
    assert low <= worst <= high


def test_segments_are_a_composite_rule() -> None:
    run = recorded("SGD")
    whole, halves = (integrate(run, quadrature="midpoint", segments=s) for s in (1, 2))
    assert halves.closure.train == pytest.approx(whole.closure.train / 4, rel=0.2)


def test_kinks_are_refined() -> None:
    run = recorded(lambda ps: torch.optim.SGD(ps, lr=0.03), activation=nn.ReLU, steps=12)
    plain, refined = integrate(run), integrate(run, refine=1e-5)
    assert 1e-6 < plain.closure.worst < 1e-2
    assert refined.closure.worst < min(1e-4, plain.closure.worst / 10)


def test_a_large_closure_error_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="the path operators are off by"):
        integrate(recorded("SGD", activation=nn.ReLU, steps=20), quadrature="left")


# --- strided --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "AdamW", "centred RMSprop"])
@pytest.mark.filterwarnings("ignore:the path operators are off")
def test_strides_approximate_the_exact_operators(optimizer: str) -> None:
    exact = integrate(recorded(optimizer, steps=24, b=None))
    errors = []
    for stride in (2, 8):
        run = recorded(optimizer, steps=24, b=None, stride=stride)
        assert (len(run), run.steps) == (24 // stride, 24)
        ops = integrate(run)
        errors.append(float((ops.G - exact.G).norm() / exact.G.norm()))
    assert errors[0] < errors[1] < 0.5
    assert errors[0] < 0.1


def test_phi_functions_solve_a_linear_equation() -> None:
    r""":math:`\varphi_1(Z) = Z^{-1}(e^Z - I)`, :math:`\varphi_2(Z) = Z^{-1}(\varphi_1(Z) - I)`."""
    Z = randn(4, 4)
    phi1, phi2 = phi_functions(Z)
    close(Z @ phi1, torch.linalg.matrix_exp(Z) - torch.eye(4), 1e-12)
    close(Z @ phi2, phi1 - torch.eye(4), 1e-12)


# --- rows of Jacobians ---------------------------------------------------------------------------


class Twice(nn.Module):
    """A convolution, a linear layer used twice, and an embedding that is an output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.again = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.embed(tokens).mT).tanh().mT
        h = self.again(self.again(h).tanh()).mean(1)
        return self.head(h) + (h @ self.embed.weight.T)[:, :2]


class Unwilling(nn.Module):
    """Works on its weights as numbers, which no factor describes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, 0.2, -0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x * self.weight, dim=1).logsumexp(1, keepdim=True)


@pytest.mark.parametrize("model", [Twice, Unwilling])
def test_rows_are_those_of_torch_func(model: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = model().double()
        x = torch.randint(5, (6, 3)) if model is Twice else torch.randn(6, 3, dtype=torch.float64)
    c = 2 if model is Twice else 1
    y = torch.zeros(6, c, dtype=torch.float64)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    problem = record(net, "squared_error", sgd, [torch.arange(6)], x, train=(x, y)).problem
    a, b = randn(problem.size, seed=1), randn(problem.size, seed=2)
    J = problem.J
    out = torch.empty(6 * c, problem.size, dtype=torch.float64)
    found = J.write(out, [(a, 0.3), (b, 2.0)], x)
    close(found, 0.3 * problem.J.dense(a, x) + 2.0 * problem.J.dense(b, x), 1e-12)
    one = J.write(torch.empty_like(out[:c]), [(a, 1.0)], x[:1])
    close(one, problem.J.dense(a, x[:1]), 1e-12)
    assert model is not Twice or J.has_factors
