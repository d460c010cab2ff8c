"""Channel and reservoir, the four cells, the coupling and the noise gain."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from poprisk.path import record
from poprisk.path.channel import Spectrum
from poprisk.path.coupling import coupling_matrix, label_response, transfer_error
from poprisk.path.operators import PathOperators, path_operators
from reference import path as reference
from runs import data, network, recorded
from samplers import randn


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert float((a - b).norm()) <= tol * float(b.norm()) + 1e-12


def feature_learner() -> PathOperators:
    """A run in which the kernel changes by more than twice its norm; query points held out."""
    (x, y), query, _ = data(c=1)
    net = network(1, hidden=16)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = record(net, "squared_error", sgd, [torch.arange(14)] * 200, query, train=(x, 3 * y))
    return path_operators(run)


def test_the_channel_is_split_by_the_eigenvalues() -> None:
    W = torch.diag(torch.tensor([4.0, 1e-3, 2.0, 0.0], dtype=torch.float64))
    spectrum = Spectrum.of(W)
    assert spectrum.eigenvalues.tolist() == [4.0, 2.0, 1e-3, 0.0]
    assert spectrum.dimensions((0.9, 0.1, 1e-6)) == {0.9: 1, 0.1: 2, 1e-6: 3}
    g = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    assert spectrum.channel(0.1).share(g) == pytest.approx(1 / 6)
    assert spectrum.dissipation(g).tolist() == pytest.approx([4 / 4.001, 0.0, 1e-3 / 4.001, 0.0])
    assert spectrum.participation() == pytest.approx(6.001**2 / 20.000001)
    assert spectrum.dissipation_dimension(g) == pytest.approx(4.001**2 / 16.000001)


def test_the_projection_is_the_reference_s() -> None:
    ops = path_operators(recorded("AdamW", "cross_entropy", steps=8))
    for tol in (1e-2, 1e-4):
        projection = reference.channel_projection(ops.W, tol)
        channel = ops.channel(tol)
        close(channel.basis @ channel.basis.T, projection, 1e-9)
        g = randn(28)
        close(channel.project(g), projection @ g, 1e-9)
        close(channel.reservoir.T @ channel.basis, torch.zeros(1, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
@pytest.mark.parametrize("optimizer", ["momentum", "AdamW", "PopRiskAdamW soft"])
def test_the_four_cells_add_up(optimizer: str, loss: str) -> None:
    ops = path_operators(recorded(optimizer, loss, steps=6))
    cells = ops.four_cells(data(loss)[2], tol=1e-3)
    first, *_, last = ops.integrals.snapshots
    moved = last.query_outputs - first.query_outputs
    close(cells.cells.total(), moved, 1e-8)
    assert cells.closure < 1e-8
    assert cells.error is not None
    assert cells.error.closure < 1e-7
    assert cells.error.name == ("mean squared error" if loss == "squared_error" else "test loss")
    assert float(cells.cells.harmful_noise.norm()) > 1e-2 * float(moved.norm())


def test_the_cells_are_those_of_the_definition() -> None:
    run, clean = recorded("SGD", steps=12), data()[2]
    ops = path_operators(run)
    cells = ops.four_cells(clean, tol=0.05)
    u0 = ops.integrals.snapshots[0].train_outputs
    signal = (u0 - clean.flatten()) / 14
    noise = (clean - run.problem.train[1]).flatten() / 14
    project = reference.channel_projection(ops.W, 0.05)
    close(cells.cells.learned_signal, -ops.G @ project @ signal, 1e-9)
    close(cells.cells.trapped_signal, -ops.G @ (signal - project @ signal), 1e-9)
    close(cells.cells.harmful_noise, -ops.G @ project @ noise, 1e-9)
    close(cells.cells.benign_noise, -ops.G @ (noise - project @ noise), 1e-9)
    assert cells.noise_share == pytest.approx(float((project @ noise).norm() / noise.norm()) ** 2)
    assert cells.error is not None
    y = run.problem.query[1]
    assert y is not None
    harmful = cells.cells.harmful_noise
    start = ops.integrals.snapshots[0].query_outputs
    bias = start + cells.cells.learned_signal - y.flatten()
    assert cells.error.terms["bias"] == pytest.approx(float(bias.square().mean()))
    assert cells.error.terms["harmful noise"] == pytest.approx(float(harmful.square().mean()))
    assert cells.error.terms["bias × harmful noise"] == pytest.approx(
        2 * float((bias * harmful).mean())
    )


def test_noise_in_the_reservoir_is_benign() -> None:
    """Twin inputs with opposite noise: no step can fit it, no query feels it."""
    (x, _), query, clean = data()
    x, noise = torch.cat([x, x]), randn(14, 2, seed=3)
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = record(
        net,
        "squared_error",
        sgd,
        [torch.arange(28)] * 8,
        query,
        train=(x, torch.cat([clean + noise, clean - noise])),
    )
    cells = path_operators(run).four_cells(torch.cat([clean, clean]))
    assert cells.noise_share < 1e-12
    moved = cells.cells
    for part in (moved.harmful_noise, moved.benign_noise, moved.trapped_signal):
        assert float(part.norm()) < 1e-8 * float(moved.learned_signal.norm())


def test_cells_over_time_end_where_the_run_does() -> None:
    clean = data("cross_entropy")[2]
    ops = path_operators(recorded("AdamW", "cross_entropy", steps=9), snapshots=4)
    moments = ops.cells_over_time(clean)
    assert [m.step for m in moments] == [0, 3, 6, 9]
    assert float(moments[0].cells.total().norm()) == 0.0
    start = moments[0].outputs
    for m in moments[1:]:
        close(m.cells.total(), m.outputs - start, 1e-8)
    close(moments[-1].cells.harmful_noise, ops.four_cells(clean).cells.harmful_noise, 1e-12)


@pytest.mark.slow
@pytest.mark.long
def test_the_coupling_predicts_where_the_frozen_kernel_fails() -> None:
    ops = feature_learner()
    coupling = ops.coupling()
    assert max(d for _, d in ops.kernel_drift()) > 2
    assert coupling.prediction.error < 1e-4
    assert coupling.prediction.correlation > 0.9999
    assert coupling.frozen.error > 0.1


def test_the_coupling_is_that_of_the_definition() -> None:
    ops = path_operators(recorded("SGD", steps=30, b=None, n=6, c=1))
    close(ops.coupling().matrix, reference.coupling(ops.G, ops.W, ops.D), 1e-4)


@pytest.mark.parametrize("optimizer", ["AdamW", "momentum"])
def test_the_coupling_carries_the_affine_part_across(optimizer: str) -> None:
    ops = path_operators(recorded(optimizer, "cross_entropy", steps=8))
    assert float(ops.affine.query.norm()) > 1e-3
    assert ops.coupling().prediction.error < 1e-5


@pytest.mark.parametrize("tol", [1e-12, 0.3])
@pytest.mark.parametrize("predictor", ["coupling", "frozen", "random"])
@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "AdamW"])
def test_the_parts_of_the_transfer_error_add_up(optimizer: str, predictor: str, tol: float) -> None:
    ops = path_operators(recorded(optimizer, "cross_entropy", steps=8))
    integrals, channel = ops.integrals, ops.channel(tol)
    A = {
        "coupling": coupling_matrix(integrals, channel),
        "frozen": integrals.frozen,
        "random": randn(*integrals.frozen.shape, seed=1),
    }[predictor]
    first, last = integrals.snapshots[0], integrals.snapshots[-1]
    train = last.train_outputs - first.train_outputs + ops.affine.train
    query = last.query_outputs - first.query_outputs + ops.affine.query
    found = transfer_error(integrals, channel, A)
    close(found.total(), query - A @ train, 1e-9)
    if tol < 1e-6:
        assert float(found.reservoir.norm()) < 1e-5 * float((A @ train).norm())
    elif predictor == "random":  # what a coarse tolerance leaves out still moves queries
        assert float(found.reservoir.norm()) > 1e-3 * float((A @ train).norm())
    if predictor == "coupling":
        assert float(found.mismatch.norm()) < 1e-9 * float(query.norm())
        assert found.mismatch_norm < 1e-9 * float(integrals.G.norm())


@pytest.mark.parametrize("lost", [0, 2])
def test_the_transfer_error_is_that_of_any_predictor(lost: int) -> None:
    """Theorem E.3 as written; directions that training does not move are unseen by every A."""
    ops = path_operators(recorded("SGD", "squared_error", steps=12, c=1))
    D = ops.D
    if lost:
        directions = randn(len(D), lost, seed=3)
        D = D - D @ directions @ torch.linalg.pinv(directions)
    integrals, tol = replace(ops.integrals, D=D), 1e-3
    A = randn(len(ops.G), len(D), seed=2)
    of_A, least, excess = reference.transfer_errors(ops.G, ops.W, D, A, tol)
    close(least + excess, of_A, 1e-8)
    found = transfer_error(integrals, ops.channel(tol), A)
    assert found.unseen_norm**2 == pytest.approx(float(least.trace()), rel=1e-6, abs=1e-12)
    assert found.mismatch_norm**2 == pytest.approx(float(excess.trace()), rel=1e-6)
    assert (found.unseen_norm > 1e-3 * float(ops.G.norm())) == bool(lost)


def test_noise_gain_is_the_variance_of_noisy_labels() -> None:
    """Monte Carlo over label noise, for operators held fixed."""
    run = recorded("SGD", steps=8, c=1)
    ops = path_operators(run)
    draws = 0.1 * randn(14, 4000, seed=4)
    variance = (ops.G @ (-draws / 14)).square().mean()
    assert ops.noise_gain().path * 0.01 == pytest.approx(float(variance), rel=0.05)
    assert ops.noise_gain().path == pytest.approx(float(ops.G.square().sum()) / (14**2 * 9))


def test_frozen_noise_gain_is_that_of_the_singular_values() -> None:
    r""":math:`\sum_j \|J_Q v_j\|^2/\sigma_j^2` over the singular values of :math:`J_S`."""
    run = recorded("SGD", steps=1, c=1)
    w, problem = run.weights[0], run.problem
    _, s, Vh = torch.linalg.svd(problem.J.dense(w, problem.train[0]), full_matrices=False)
    J_Q = problem.J.dense(w, problem.query[0])
    expected = float(((J_Q @ Vh.T).square().sum(0) / s.square()).sum()) / 9
    assert path_operators(run).noise_gain().frozen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy", "log cosh"])
def test_the_response_to_labels(loss: str) -> None:
    run = recorded("SGD", loss, steps=1)
    problem = run.problem
    u = problem.J.outputs(run.weights[0], problem.train[0]).detach()
    response = label_response(problem, u)
    step = torch.zeros_like(u)
    step[:, 1] = 1e-6
    y = problem.train[1]
    slope = (problem.output_gradient(u, y + step) - problem.output_gradient(u, y - step)) / 2e-6
    torch.testing.assert_close(response[:, :, 1], slope, rtol=1e-5, atol=1e-8)


def test_class_labels_respond_as_one_hot_rows() -> None:
    run = recorded("SGD", "cross_entropy", steps=1)
    u = run.problem.J.outputs(run.weights[0], run.problem.train[0]).detach()
    assert torch.equal(label_response(run.problem, u)[3], -torch.eye(2, dtype=torch.float64) / 14)


def test_residuals_by_channel_and_reservoir() -> None:
    ops = path_operators(recorded("SGD", steps=6), snapshots=3)
    for (step, inside, outside), s in zip(
        ops.residual_shares(tol=0.05), ops.integrals.snapshots, strict=True
    ):
        assert step == s.step
        assert inside + outside == pytest.approx(float(s.gradient.square().sum()))


def test_apply_is_the_operators_without_forming_them() -> None:
    ops, probes = path_operators(recorded("AdamW", "cross_entropy", steps=8)), randn(14, 2, 2)
    applied = ops.apply(probes)
    assert "integrals" not in vars(ops)
    close(applied.query.reshape(-1, 2), ops.G @ probes.flatten(0, 1), 1e-8)
    close(applied.gradient.reshape(-1, 2), ops.P @ probes.flatten(0, 1), 1e-8)


# --- refusals -------------------------------------------------------------------------------------


def test_bad_settings() -> None:
    run = recorded(steps=2)
    with pytest.raises(ValueError, match="quadrature must be one of 'left'"):
        path_operators(run, quadrature="simpson")
    with pytest.raises(ValueError, match="segments must be positive"):
        path_operators(run, segments=0)
    ops = path_operators(run)
    with pytest.raises(ValueError, match=r"tol must lie in \[0.0, 1.0\)"):
        ops.channel(1.0)
    with pytest.raises(ValueError, match="clean targets must be like the training targets"):
        ops.four_cells(torch.zeros(3))
    with pytest.raises(ValueError, match=r"probes must have shape \(n, c, r\) = \(14, 2, r\)"):
        ops.apply(torch.zeros(28))
