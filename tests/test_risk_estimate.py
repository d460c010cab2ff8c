"""Estimates from outputs: exact for linear smoothers, flagged where they cannot be believed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from poprisk.risk.estimate import (
    TwinOutputs,
    estimate_risk,
    measure_dof,
    measure_parts,
)
from poprisk.risk.grouped import PAIRED, grouped_error, intraclass
from poprisk.risk.local_losses import local_loss_of
from reference import risk as reference
from samplers import randn

Loss = Callable[[Tensor, Tensor], Tensor]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def smoother(n: int, decay: float = 0.1) -> Tensor:
    return reference.ridge_smoother(randn(n, n // 2), decay)


def signs(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (n, 1), generator=generator).double() - 1


def twin_of(h: Tensor, y: Tensor, z: Tensor, delta: float = 0.3) -> TwinOutputs:
    """The run on labels y + δz; in squared error, whose curvature is 2, a push of 2δz."""
    return TwinOutputs(h @ (y + delta * z), 2 * delta * z)


def test_h_is_the_trace_in_expectation_over_all_signs() -> None:
    n = 8
    h, y = smoother(n), randn(n, 1, seed=1)
    link = local_loss_of(squared, h @ y, y)
    every = [torch.tensor(z).double().unsqueeze(1) for z in itertools.product((-1, 1), repeat=n)]
    found = [measure_dof(link, h @ y, [twin_of(h, y, z)]) for z in every]
    expected = float(h.trace()) / n
    values = torch.tensor([f.dof for f in found], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(expected, rel=1e-9)
    assert sum(f.response for f in found) / len(found) == pytest.approx(expected, rel=1e-9)
    assert float(values.std(correction=0)) == pytest.approx(reference.response_error(h), rel=1e-9)


def test_the_error_of_h_is_its_spread_over_signs() -> None:
    n = 200
    h, y = smoother(n, 0.3), randn(n, 1, seed=1)
    link = local_loss_of(squared, h @ y, y)
    found = [measure_dof(link, h @ y, [twin_of(h, y, signs(n, s))]) for s in range(50)]
    mean_error = sum(f.dof_error for f in found) / len(found)
    symmetric = math.sqrt(2) / PAIRED  # as no trained network's response is quite
    assert mean_error * symmetric == pytest.approx(reference.response_error(h), rel=0.05)


@pytest.mark.parametrize("decay", [3.0, 1.0, 0.3])
def test_the_ridge_path_gives_generalized_cross_validation(decay: float) -> None:
    n = 60
    h, y = smoother(n, decay), randn(n, 1, seed=1)
    z = signs(n, 2)
    exact = float(h.trace()) / n
    along = float((z.T @ h @ z).squeeze()) / n
    scaled = h * (exact / along)  # the probe's noise in the trace, taken out
    twin = TwinOutputs(h @ y + 0.3 * scaled @ z, 0.6 * z)
    found = estimate_risk(squared, h @ y, y, [twin])
    assert found.dof == pytest.approx(exact, rel=1e-9)
    assert found.value == pytest.approx(reference.generalized_cross_validation(h, y), rel=1e-8)


def test_equal_leverages_give_the_exact_left_out_predictions() -> None:
    n = 8
    basis = torch.fft.fft(torch.eye(n, dtype=torch.complex128)).real / math.sqrt(n)
    h = 0.4 * (basis @ basis.T) / torch.linalg.matrix_norm(basis @ basis.T, 2)
    h = sum((h.roll((k, k), (0, 1)) for k in range(n)), torch.zeros(n, n).double()) / n
    y = randn(n, 1)
    every = [torch.tensor(z).double().unsqueeze(1) for z in itertools.product((-1, 1), repeat=n)]
    found = estimate_risk(squared, h @ y, y, [twin_of(h, y, z) for z in every])
    torch.testing.assert_close(found.outputs, reference.exact_leave_one_out(h, y))


def test_probes_average_and_their_error_falls() -> None:
    n = 100
    h, y = smoother(n, 0.3), randn(n, 1, seed=1)
    link = local_loss_of(squared, h @ y, y)
    twins = [twin_of(h, y, signs(n, s)) for s in range(4)]
    single = [measure_dof(link, h @ y, [t]) for t in twins]
    four = measure_dof(link, h @ y, twins)
    assert four.dof == pytest.approx(sum(f.dof for f in single) / 4)
    assert four.dof_error == pytest.approx(math.sqrt(sum(f.dof_error**2 for f in single)) / 4)


def circulant(row: Sequence[float]) -> Tensor:
    return torch.stack([torch.tensor(row).double().roll(k) for k in range(len(row))])


@pytest.mark.parametrize("shared", [0.15, 0.0])
def test_groups_alike_are_left_out_exactly(shared: float) -> None:
    """Any group's own block of the smoother is the same: what it has in common, and apart."""
    size = 2
    apart = torch.kron(circulant([0.2, 0.05, 0.0, 0.05]), torch.eye(size).double())
    h = apart + shared * torch.kron(
        circulant([1.0, 0.2, 0.1, 0.2]), torch.ones(size, size).double()
    )
    n = len(h)
    y, groups = randn(n, 1), torch.arange(n) // size
    every = [torch.tensor(z).double().unsqueeze(1) for z in itertools.product((-1, 1), repeat=n)]
    found = estimate_risk(squared, h @ y, y, [twin_of(h, y, z) for z in every], groups=groups)
    assert found.intraclass == pytest.approx(shared / (0.2 + shared), abs=1e-6)
    r = torch.cat(
        [
            torch.linalg.solve(torch.eye(size).double() - h[g][:, g], (y - h @ y)[g])
            for g in torch.arange(n).split(size)
        ]
    )
    torch.testing.assert_close(found.outputs, y - r, rtol=1e-5, atol=1e-6)


def test_equal_examples_are_as_one_of_twice_the_weight() -> None:
    n = 4
    h, y = circulant([0.4, 0.1, 0.05, 0.1]), randn(n, 1)
    twice, labels = torch.kron(torch.ones(2, 2).double() / 2, h), y.repeat(2, 1)
    every = [
        torch.tensor(z).double().unsqueeze(1) for z in itertools.product((-1, 1), repeat=2 * n)
    ]
    twins = [twin_of(twice, labels, z) for z in every]
    found = estimate_risk(squared, twice @ labels, labels, twins, groups=torch.arange(n).repeat(2))
    assert found.intraclass == pytest.approx(1.0)
    expected = reference.exact_leave_one_out(h, y).repeat(2, 1)
    torch.testing.assert_close(found.outputs, expected, rtol=1e-5, atol=1e-6)
    alone = estimate_risk(squared, twice @ labels, labels, twins)
    assert alone.value < found.value


def test_the_error_of_the_intraclass_correlation_is_its_spread_over_signs() -> None:
    n, size = 240, 6
    groups = torch.arange(n) // size
    h = smoother(n, 0.3) + 0.1 * torch.kron(torch.eye(n // size), torch.ones(size, size)).double()
    found = [intraclass([(z, h @ z)], groups) for z in (signs(n, s) for s in range(80))]
    spread = float(torch.tensor([f.correlation for f in found]).std())
    stated = sum(f.error for f in found) / len(found) * math.sqrt(2) / PAIRED
    assert 0.7 < spread / stated < 1.3
    assert min(f.correlation for f in found) > 0  # none is cut off


def test_an_untouched_model_has_its_training_loss() -> None:
    u, y = randn(60, 4), torch.arange(60) % 4
    found = estimate_risk(cross_entropy, u, y, [TwinOutputs(u, torch.ones_like(u))])
    assert found.value == found.train_loss == pytest.approx(float(F.cross_entropy(u, y)))
    assert found.dof == found.response == 0
    assert found.accuracy == float((u.argmax(1) == y).double().mean())


def test_accuracy_of_binary_labels() -> None:
    u, y = randn(60, 1), (randn(60, 1, seed=1) > 0).double()
    loss: Loss = lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="none").sum(1)  # noqa: E731
    found = estimate_risk(loss, u, y, [TwinOutputs(u, torch.ones_like(u))])
    assert found.accuracy == float(((u > 0) == (y > 0)).double().mean())


def test_a_loss_that_holds_single_precision_is_taken_as_it_is() -> None:
    weight = torch.ones(4)
    loss: Loss = lambda u, y: F.cross_entropy(u, y, weight=weight, reduction="none")  # noqa: E731
    u, y = randn(60, 4, dtype=torch.float32), torch.arange(60) % 4
    moved = u + 0.05 * randn(60, 4, seed=3, dtype=torch.float32)
    push = randn(60, 4, seed=3)
    found = estimate_risk(loss, u, y, [TwinOutputs(moved, push - push.mean(1, keepdim=True))])
    plain = estimate_risk(cross_entropy, u, y, [TwinOutputs(moved, push - push.mean(1, True))])
    assert found.value == pytest.approx(plain.value, rel=1e-4)


def follower(n: int, share: float, carried: float = 0.0) -> tuple[Tensor, Tensor, TwinOutputs]:
    """Outputs that follow ``share`` of their own label, and are carried away across the push."""
    y, z = randn(n, 1), signs(n, 1)
    h = share * torch.eye(n, dtype=torch.float64)
    outputs, push = twin_of(h, y, z)
    across = z * (1 - 2.0 * (torch.arange(n) % 2)).unsqueeze(1).double()
    return h @ y, y, TwinOutputs(outputs + 0.3 * carried * across, push)


@pytest.mark.parametrize(
    ("share", "carried", "comparable", "reason"),
    [
        (0.0, 0.0, True, ""),
        (0.34, 0.0, True, ""),
        (0.49, 0.0, True, ""),
        (0.52, 0.0, True, "deep interpolation: the estimate is 4.3 times the training loss"),
        (0.57, 0.0, False, "deep interpolation: the estimate is 5.4 times the training loss"),
        (0.65, 0.0, False, "deep interpolation: 65% of the"),
        (0.34, 0.7, True, ""),
        (0.38, 0.7, True, "deep interpolation: the estimate is 2.6 times the training loss"),
        (0.45, 0.7, False, "deep interpolation: the estimate is 3.3 times the training loss"),
        (0.6, 0.7, False, "deep interpolation: 60% of the"),
    ],
)
def test_deep_interpolation_is_flagged(
    share: float, carried: float, comparable: bool, reason: str
) -> None:
    """Sooner where training carries away what the push did not do."""
    u, y, twin = follower(2000, share, carried)
    found = estimate_risk(squared, u, y, [twin])
    assert (found.valid, found.comparable) == (not reason, comparable)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("share", "valid", "below"), [(0.34, True, 7.0), (0.45, False, 7.0), (0.45, False, 0.5)]
)
def test_a_loss_below_zero_is_judged_by_its_spread(share: float, valid: bool, below: float) -> None:
    """Moved by a constant, losses have no zero; half a squared normal's spread stands for it."""

    def moved(u: Tensor, y: Tensor) -> Tensor:
        return squared(u, y) - below

    u, y, twin = follower(2000, share, carried=0.7)
    plain, found = (estimate_risk(loss, u, y, [twin]) for loss in (squared, moved))
    assert found.value == pytest.approx(plain.value - below)
    assert found.standard_error == pytest.approx(plain.standard_error)
    assert found.valid == valid
    if not valid:
        fitted = squared(u, y)
        spread = 1.15 * (fitted - fitted.median()).abs().mean()
        times = (plain.value - plain.train_loss) / float(spread)
        assert found.reason == (
            f"deep interpolation: the estimate lies {times:.1f} times the spread of the training "
            "losses above their mean"
        )


def test_the_error_of_a_sum_is_that_of_its_groups() -> None:
    d = torch.tensor([3.0, 4.0, -12.0])
    assert grouped_error(d, None) == pytest.approx(13 * math.sqrt(3 / 2))
    assert grouped_error(d, torch.tensor([0, 1, 0])) == pytest.approx(math.sqrt(2 * (81 + 16)))
    assert grouped_error(d[:1], None) == 3.0


def test_influence_is_the_share_of_each_answer_in_the_error() -> None:
    """The error of its sum is what the response adds to the standard error."""
    n = 200
    h, y = smoother(n, 1.0), randn(n, 1, seed=1)
    found = estimate_risk(squared, h @ y, y, [twin_of(h, y, signs(n, s)) for s in range(2)])
    assert found.influence.shape == (2, n)
    mine = found.losses - found.value
    sampling = float(mine.square().sum().sqrt()) * math.sqrt(n / (n - 1)) / n
    rest = math.sqrt(found.standard_error**2 - sampling**2)
    assert math.hypot(*(grouped_error(row, None) for row in found.influence)) == pytest.approx(rest)
    assert rest > 0.01 * found.standard_error


@pytest.mark.parametrize("share", [0.0, 0.3, -0.2])
def test_without_curvature_the_gain_is_the_response_of_outputs(share: float) -> None:
    """Absolute error off its kinks: no gradient turns, so that no freedom is used up."""

    def absolute(u: Tensor, y: Tensor) -> Tensor:
        return (u - y).abs().sum(1)

    n, delta = 200, 0.1
    u, z, side = randn(n, 1), signs(n, 1), signs(n, 2)
    y = u + side * (1 + randn(n, 1, seed=3).abs())
    found = estimate_risk(absolute, u, y, [TwinOutputs(u + share * delta * z, delta * z)])
    assert found.dof == 0
    torch.testing.assert_close(found.outputs, u - max(share, 0.0) * side)
    assert found.value == pytest.approx(found.train_loss + max(share, 0.0))


@pytest.mark.parametrize("off", [1, -1])
@pytest.mark.parametrize(("wrong", "separable"), [(0, True), (2, True), (3, False), (400, False)])
def test_labels_that_are_all_fitted_are_separable(off: int, wrong: int, separable: bool) -> None:
    """All but half a percent of 400; what is wrong is so in either direction."""
    y = torch.arange(400) % 3
    predicted = torch.where(torch.arange(400) < wrong, (y + off) % 3, y)
    u = 3 * F.one_hot(predicted, 3).double()
    found = estimate_risk(cross_entropy, u, y, [TwinOutputs(u, torch.ones_like(u))])
    assert found.reason.startswith(f"separable: {1 - wrong / 400:.1%} of the") == separable
    assert found.accuracy == 1 - wrong / 400


@pytest.mark.parametrize(("wrong", "separable"), [(0, True), (2, True), (3, False), (400, False)])
def test_binary_labels_that_are_all_fitted_are_separable(wrong: int, separable: bool) -> None:
    loss: Loss = lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="none").sum(1)  # noqa: E731
    y = (torch.arange(400) % 2).double().unsqueeze(1)
    right = torch.where(torch.arange(400) < wrong, -1.0, 1.0).double().unsqueeze(1)
    u = 3 * right * (2 * y - 1)
    found = estimate_risk(loss, u, y, [TwinOutputs(u, torch.ones_like(u))])
    assert found.reason.startswith(f"separable: {1 - wrong / 400:.1%} of the") == separable


def test_squared_error_has_a_best_fit_however_close() -> None:
    u, y, twin = follower(200, 0.34)
    assert "separable" not in estimate_risk(squared, u, y, [twin]).reason


def test_parts_have_their_own_response() -> None:
    n, shares = 200, torch.tensor([0.1, 0.3]).double()
    y, parts = randn(n, 1), torch.arange(n) % 2
    h = torch.diag(shares[parts])
    found = estimate_risk(squared, h @ y, y, [twin_of(h, y, signs(n, 1))], parts=parts)
    assert [p.dof for p in found.parts] == pytest.approx([0.1, 0.3])
    torch.testing.assert_close(found.outputs, reference.exact_leave_one_out(h, y))
    assert found.dof == pytest.approx(0.2)
    one = estimate_risk(squared, h @ y, y, [twin_of(h, y, signs(n, 1))])
    assert not torch.allclose(one.outputs, found.outputs)


def test_parts_that_differ_by_their_noise_share_one_response() -> None:
    n = 200
    h, y, z = smoother(n, 0.3), randn(n, 1, seed=1), signs(n, 2)
    one = estimate_risk(squared, h @ y, y, [twin_of(h, y, z)])
    for parts in (torch.zeros(n).long(), torch.arange(n) % 5):
        found = estimate_risk(squared, h @ y, y, [twin_of(h, y, z)], parts=parts)
        assert {p.dof for p in found.parts} == {one.dof}
        assert found.value == pytest.approx(one.value, rel=1e-12)
        assert found.standard_error == pytest.approx(one.standard_error, rel=1e-9)


def test_parts_are_drawn_together_by_what_is_not_noise() -> None:
    n = 200
    u, y, parts = randn(n, 1), randn(n, 1, seed=1), torch.arange(n) % 2
    link, z = local_loss_of(squared, u, y), signs(n, 3)
    follows = torch.tensor([0.1, 0.3]).double()[parts].unsqueeze(1) * z
    twins = [TwinOutputs(u + 0.3 * (follows + 0.4 * randn(n, 1, seed=4)), 0.6 * z)]
    rows = [(parts == k).nonzero().squeeze(1) for k in range(2)]
    own = [
        measure_dof(
            local_loss_of(squared, u[r], y[r]), u[r], [TwinOutputs(*(t[r] for t in twins[0]))]
        )
        for r in rows
    ]
    whole = measure_dof(link, u, twins)
    found = measure_parts(squared, u, y, twins, parts, whole=whole)
    between = sum((o.dof - whole.dof) ** 2 - o.dof_error**2 for o in own) / 2
    for o, part in zip(own, found, strict=True):
        w = between / (between + o.dof_error**2)
        assert 0 < w < 0.99
        assert part.dof.dof == pytest.approx(whole.dof + w * (o.dof - whole.dof))
        error = math.hypot(w * o.dof_error, (1 - w) * whole.dof_error)
        assert part.dof.dof_error == pytest.approx(error)


def test_a_chaotic_twin_is_flagged() -> None:
    u, y, twin = follower(200, 0.2)
    wild = twin._replace(outputs=twin.outputs + 2 * randn(200, 1, seed=8))
    found = estimate_risk(squared, u, y, [wild])
    assert not found.valid
    assert "the twin's response is uncertain" in found.reason


def test_few_examples_are_flagged() -> None:
    u, y, twin = follower(10, 0.0)
    assert "too few examples" in estimate_risk(squared, u, y, [twin]).reason


@pytest.mark.parametrize("where", [0, 1])
def test_outputs_that_are_not_finite_are_flagged(where: int) -> None:
    u, y, twin = follower(60, 0.2)
    (u, twin.outputs)[where][3] = math.nan
    found = estimate_risk(squared, u, y, [twin])
    assert not found.valid
    assert found.reason == "outputs are not finite"
    assert math.isnan(found.value)


def test_a_doubt_is_passed_on() -> None:
    u, y, twin = follower(200, 0.2)
    found = estimate_risk(squared, u, y, [twin], doubt="somebody saw a ghost")
    assert (found.valid, found.reason) == (False, "somebody saw a ghost")
    assert repr(found).endswith("valid=False, reason='somebody saw a ghost')")


def test_groups_of_very_different_sizes_are_flagged() -> None:
    """A large group's own offset is fitted, and its small share of it says nothing of others'."""
    g = torch.Generator().manual_seed(0)
    sizes = [max(1, 300 // k) for k in range(1, 100)]
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    n, apart = len(ids), 0.3 * torch.eye(len(sizes), dtype=torch.float64)[ids]
    x = torch.cat([torch.randn(n, 30, generator=g, dtype=torch.float64), apart], 1)
    h = x @ torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T)
    offsets = torch.randn(len(sizes), 1, generator=g, dtype=torch.float64)
    y = offsets[ids] + torch.randn(n, 1, generator=g, dtype=torch.float64)
    for seed in range(4):
        found = estimate_risk(squared, h @ y, y, [twin_of(h, y, signs(n, seed))], groups=ids)
        assert not found.valid


def test_many_sizes_of_groups_are_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.repeat_interleave(torch.arange(40), torch.arange(1, 41))
    n = len(ids)
    h, y = smoother(n, 1.0), randn(n, 1, seed=1)
    h = 0.2 * h + 0.01 * (ids[:, None] == ids)
    twin = twin_of(h, y, signs(n, 0))
    found = estimate_risk(squared, h @ y, y, [twin], groups=ids)
    monkeypatch.setattr("poprisk.risk.estimate.MANY_SIZES", 1000)
    expected = estimate_risk(squared, h @ y, y, [twin], groups=ids)
    assert expected.intraclass > 0.01
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=5e-3, atol=5e-3)


def test_one_group_that_counts_gives_no_valid_estimate() -> None:
    def some(u: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(u, y, reduction="none", ignore_index=-100)

    n = 200
    u, y = randn(n, 3), torch.arange(n) % 3
    y[100:] = -100
    twin = TwinOutputs(u + 0.1 * randn(n, 3, seed=1), 0.1 * randn(n, 3, seed=2))
    found = estimate_risk(some, u, y, [twin], groups=(torch.arange(n) >= 100).long())
    assert (found.valid, found.comparable) == (False, False)
    assert found.reason == "a single example or group leaves no standard error"


@pytest.mark.parametrize("share", [-0.3, 0.2, 0.97])
def test_groups_of_one_are_none(share: float) -> None:
    u, y, twin = follower(60, share)
    alone = estimate_risk(squared, u, y, [twin])
    found = estimate_risk(squared, u, y, [twin], groups=torch.arange(60))
    assert found.value == pytest.approx(alone.value, rel=1e-9)
    assert found.standard_error == pytest.approx(alone.standard_error, rel=1e-6)
    assert found.valid == alone.valid
