"""Averages over a segment of the path: nodes, Hessians and Jacobians."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asserts import assert_bitwise
from poprisk.path import record
from poprisk.path.quadrature import (
    QUADRATURES,
    Nodes,
    PathJacobian,
    average_hessian,
    composite,
    gauss,
)
from runs import data, network, recorded
from samplers import randn


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert float((a - b).norm()) <= tol * float(b.norm()) + 1e-12


def mean_power(nodes: Nodes, power: int) -> float:
    return sum(weight * x**power for x, weight in nodes)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_gauss_is_exact_for_polynomials_of_twice_its_nodes_less_one(count: int) -> None:
    nodes = gauss(count)
    for power in range(2 * count):
        assert mean_power(nodes, power) == pytest.approx(1 / (power + 1), rel=1e-13)
    assert mean_power(nodes, 2 * count) != pytest.approx(1 / (2 * count + 1), rel=1e-13)


@pytest.mark.parametrize(
    ("name", "degree"), [("left", 0), ("midpoint", 1), ("gauss2", 3), ("gauss3", 5), ("gauss5", 9)]
)
def test_a_composite_rule_is_exact_on_each_piece(name: str, degree: int) -> None:
    """Of a function that is a power on the second of three pieces and zero on the others."""
    nodes = composite(name, 3)
    assert len(nodes) == 3 * len(QUADRATURES[name])
    assert nodes == sorted(nodes)
    piece = [(3 * x - 1, weight) for x, weight in nodes if 1 <= 3 * x < 2]
    assert mean_power(piece, degree) == pytest.approx(1 / (3 * (degree + 1)), rel=1e-13)
    missed = degree + 1
    assert mean_power(piece, missed) != pytest.approx(1 / (3 * (missed + 1)), rel=1e-13)
    assert composite(name, 1) == QUADRATURES[name]


@pytest.mark.parametrize(("name", "segments"), [("simpson", 1), ("left", 0), ("left", -1)])
def test_bad_rules_are_refused(name: str, segments: int) -> None:
    with pytest.raises(ValueError, match=r"^(quadrature|segments) must be"):
        composite(name, segments)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_the_average_hessian_turns_a_change_of_outputs_into_one_of_gradients(loss: str) -> None:
    problem = recorded("SGD", loss, steps=1).problem
    u, du = randn(14, 2, seed=1), randn(14, 2, seed=2)
    found = (average_hessian(problem, u, du) @ du.unsqueeze(2)).squeeze(2)
    close(found, problem.output_gradient(u + du) - problem.output_gradient(u), 1e-12)


def test_the_average_hessian_is_exact_for_polynomials_of_degree_19() -> None:
    """Here the curvature is one of degree 18, which nine nodes would miss."""

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return (u - y).pow(20).sum(1)

    (x, y), query, _ = data()
    sgd = torch.optim.SGD((net := network()).parameters(), lr=1e-9)
    problem = record(net, loss, sgd, [torch.arange(14)], query, train=(x, y)).problem
    u, du = y + randn(14, 2, seed=1), randn(14, 2, seed=2)
    found = (average_hessian(problem, u, du) @ du.unsqueeze(2)).squeeze(2)
    close(found, problem.output_gradient(u + du) - problem.output_gradient(u), 1e-12)


class Segment:
    """A long step of a small network: the average Jacobian times it is the change of outputs."""

    def __init__(self, activation: type[nn.Module], length: float = 2.0) -> None:
        self.problem = recorded("SGD", activation=activation, steps=1).problem
        self.w = randn(self.problem.size, seed=4)
        self.step = length * randn(self.problem.size, seed=3)
        self.end, self.x = self.w + self.step, self.problem.train[0]
        self.moved = self.problem.J.values(self.end, self.x) - self.problem.J.values(self.w, self.x)

    def rows(self, nodes: Nodes, **how: Any) -> Tensor:
        """The average Jacobian, (n, c, P)."""
        return PathJacobian(self.problem, nodes, **how)(self.w, self.end, self.x).view(14, 2, -1)

    def errors(self, rows: Tensor) -> Tensor:
        """By how much each example's displacement is missed, relative to it."""
        return (rows @ self.step - self.moved).norm(dim=1) / self.moved.norm(dim=1)


def test_a_smooth_path_needs_no_refinement() -> None:
    segment = Segment(nn.Tanh, 0.1)
    plain = segment.rows(gauss(5))
    assert float(segment.errors(plain).max()) < 1e-8
    assert_bitwise(segment.rows(gauss(5), refine=1e-6), plain)


def test_only_examples_that_are_off_are_refined_and_then_they_are_not() -> None:
    segment = Segment(nn.ReLU)
    plain, refined = segment.rows(gauss(3)), segment.rows(gauss(3), refine=0.02)
    off = segment.errors(plain) > 0.02
    assert 0 < int(off.sum()) < 14
    assert_bitwise(refined[~off], plain[~off])
    assert bool((segment.errors(refined)[off] < segment.errors(plain)[off]).all())
    assert float(segment.errors(refined).max()) < 0.1


def test_halving_stops_where_it_is_enough() -> None:
    """The midpoint rule's error falls eightfold on half a segment."""
    segment = Segment(nn.Tanh, 0.3)
    plain, halves = segment.rows(gauss(1)), segment.rows(composite("midpoint", 2))
    errors = segment.errors(plain)
    refine = 0.5 * float(errors.max())
    refined, off = segment.rows(gauss(1), refine=refine), errors > refine
    assert 0 < int(off.sum()) < 14
    close(refined[off], halves[off], 1e-13)


def test_an_example_that_hardly_moves_is_judged_by_the_others() -> None:
    """Without biases, an input of a millionth has outputs, and errors, of a millionth."""
    x, y = randn(6, 3, seed=1), torch.zeros(6, 2, dtype=torch.float64)
    x[0] = 1e-6 * x[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6, False), nn.ReLU(), nn.Linear(6, 2, False)).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    problem = record(net, "squared_error", sgd, [torch.arange(6)], x, train=(x, y)).problem
    w, end = randn(problem.size, seed=4), randn(problem.size, seed=3)
    plain, refined = (
        PathJacobian(problem, gauss(3), refine=r)(w, end, x).view(6, 2, -1) for r in (None, 1e-4)
    )
    assert not torch.equal(plain[1], refined[1])
    assert_bitwise(plain[0], refined[0])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_segments_are_halved_as_often_as_allowed(depth: int) -> None:
    """No error is small enough here: every example gets the finest pieces."""
    segment = Segment(nn.Tanh)
    refined = segment.rows(gauss(1), refine=1e-12, depth=depth)
    close(refined, segment.rows(composite("midpoint", 2**depth)), 1e-12)


def test_refinement_may_end_early_on_one_half() -> None:
    segment = Segment(nn.ReLU)
    fine = segment.rows(composite("gauss3", 150))
    depths: list[dict[str, int]] = [{"depth": 2}, {"depth": 6}, {}]
    errors = [
        (segment.rows(gauss(3), refine=1e-5, **depth) - fine).norm() / fine.norm()
        for depth in depths
    ]
    assert float(errors[2]) < 1e-3
    assert errors[2] < errors[1] < errors[0]


def test_the_average_is_written_where_it_is_wanted() -> None:
    segment = Segment(nn.ReLU)
    out = torch.full((28, segment.problem.size), torch.nan, dtype=torch.float64)
    average = PathJacobian(segment.problem, gauss(3), refine=1e-3)
    found = average(segment.w, segment.end, segment.x, out=out)
    assert found is out
    assert_bitwise(out, average(segment.w, segment.end, segment.x))
