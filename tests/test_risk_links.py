"""The link of a loss equals the written-out matrices, whatever the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poprisk.risk.local_losses import (
    LARGEST_GAIN,
    SMALLEST_GAIN,
    Bend,
    Coupled,
    LocalLoss,
    Separate,
    Softmax,
    ignored_examples,
    is_bent,
    is_shift_invariant,
    local_loss_of,
    on_logits,
)
from reference import risk as reference
from samplers import randn

Loss = Callable[[Tensor, Tensor], Tensor]
N, C = 6, 4


def classes() -> Tensor:
    return torch.arange(N) % C


def soft_labels() -> Tensor:
    return randn(N, C, seed=2).softmax(1)


def numbers() -> Tensor:
    return randn(N, C, seed=3)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


def smoothed(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none", label_smoothing=0.1)


def weighted(u: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=u.dtype)
    return F.cross_entropy(u, y, weight=weight, reduction="none")


def binary(u: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(u, y, reduction="none").sum(1)


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def huber(u: Tensor, y: Tensor) -> Tensor:
    return F.huber_loss(u, y, reduction="none", delta=0.5).sum(1)


def poisson(u: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(u, y.abs(), reduction="none").sum(1)


def absolute(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).abs().sum(1)


def hinge(u: Tensor, y: Tensor) -> Tensor:
    margins = 1 + u - u.gather(1, y.unsqueeze(1))
    return F.softplus(4 * margins).sum(1) / 4


def gaussian(u: Tensor, y: Tensor) -> Tensor:
    """Mean and log-variance of a number: two outputs that belong together, not convex."""
    square = (u[:, :1] - y[:, :1]).square() * (-u[:, 1:2]).exp()
    return (0.5 * (square + u[:, 1:2])).sum(1)


def nothing(u: Tensor, y: Tensor) -> None:
    return None


def mistakes(u: Tensor, y: Tensor) -> Tensor:
    return (u.argmax(1) != y).double()


CASES: dict[str, tuple[Loss, Callable[[], Tensor], type[LocalLoss], int]] = {
    "cross-entropy": (cross_entropy, classes, Softmax, C - 1),
    "soft labels": (cross_entropy, soft_labels, Softmax, C - 1),
    "label smoothing": (smoothed, classes, Softmax, C - 1),
    "class weights": (weighted, classes, Softmax, C - 1),
    "binary cross-entropy": (binary, lambda: (numbers() > 0).double(), Separate, C),
    "squared error": (squared, numbers, Separate, C),
    "Huber": (huber, numbers, Separate, C),
    "Poisson": (poisson, numbers, Separate, C),
    "absolute error": (absolute, numbers, Separate, C),
    "smooth hinge": (hinge, classes, Coupled, C - 1),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Loss, Tensor, LocalLoss, int]:
    loss, targets, _, dimensions = CASES[request.param]
    return loss, targets(), local_loss_of(loss, randn(N, C), targets()), dimensions


@pytest.mark.parametrize("name", CASES)
def test_the_kind_of_a_loss_is_found(name: str) -> None:
    loss, targets, kind, dimensions = CASES[name]
    link = local_loss_of(loss, randn(N, C), targets())
    assert type(link) is kind
    assert link.dimensions == dimensions


def test_curvature_is_the_second_derivative(case: tuple[Loss, Tensor, LocalLoss, int]) -> None:
    loss, y, link, _ = case
    u, v = randn(N, C), randn(N, C, seed=9)
    expected = [reference.hessian(loss, u[i], y[i]) @ v[i] for i in range(N)]
    torch.testing.assert_close(link.curvature(v), torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
def test_freedom_is_the_trace(case: tuple[Loss, Tensor, LocalLoss, int], gain: float) -> None:
    loss, y, link, dimensions = case
    expected = reference.dof(loss, randn(N, C), y, gain, dimensions)
    assert link.dof(gain) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
def test_leave_one_out_inverts_the_freedom(
    case: tuple[Loss, Tensor, LocalLoss, int], gain: float
) -> None:
    loss, y, link, _ = case
    if link.dof(gain) == 0:
        pytest.skip("no curvature: every gain has the same dof")
    found = link.leave_one_out(randn(N, C), link.gain(link.dof(gain)))
    expected = reference.leave_one_out(loss, randn(N, C), y, gain)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gain", [1e-10, 1e-3, 2.5, 1e4])
def test_a_gain_is_found_in_few_looks_at_the_freedom(
    case: tuple[Loss, Tensor, LocalLoss, int], gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs a pass over all examples; halving alone would take a hundred."""
    link, looks = case[2], list[float]()
    dof = link.dof
    if dof(gain) == 0:
        pytest.skip("no curvature: every gain has the same dof")

    def looked_at(gain: float) -> float:
        looks.append(gain)
        return dof(gain)

    monkeypatch.setattr(link, "dof", looked_at)
    assert link.gain(dof(gain)) == pytest.approx(gain, rel=1e-7)
    assert len(looks) < 30


def test_gains_end_where_no_output_follows_or_all_do() -> None:
    link = local_loss_of(squared, randn(N, C), numbers())
    assert link.gain(math.nextafter(0.0, 1.0)) == SMALLEST_GAIN
    assert link.gain(0.5 * link.dof(SMALLEST_GAIN)) == SMALLEST_GAIN
    assert link.gain(1.0) == link.gain(2.0) == LARGEST_GAIN
    assert link.gain(link.dof(0.5 * LARGEST_GAIN)) < LARGEST_GAIN


@pytest.mark.parametrize("name", ["cross-entropy", "binary cross-entropy", "squared error"])
def test_an_example_pulled_back_quadratically_is_left_out_exactly(name: str) -> None:
    loss, targets, _, _ = CASES[name]
    y, without, gain = targets(), randn(N, C, seed=5), 2.5
    u = without.clone().requires_grad_()
    descent = torch.optim.LBFGS([u], lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def pulled() -> Tensor:
        descent.zero_grad()
        value = loss(u, y).sum() + (u - without).square().sum() / (2 * gain)
        value.backward()
        return value

    descent.step(pulled)
    link = local_loss_of(loss, u.detach(), y)
    found = link.leave_one_out(u.detach(), link.gain(link.dof(gain)))
    torch.testing.assert_close(found, without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dof", [0.1, 0.5, 0.9])
def test_squared_error_divides_residuals_by_one_minus_h(dof: float) -> None:
    u, y = randn(N, C), numbers()
    link = local_loss_of(squared, u, y)
    found = link.leave_one_out(u, link.gain(dof))
    torch.testing.assert_close(y - found, (y - u) / (1 - dof))


def test_nothing_is_left_out_where_nothing_follows() -> None:
    u = randn(N, C)
    link = local_loss_of(cross_entropy, u, classes())
    assert torch.equal(link.leave_one_out(u, link.gain(0.0)), u)
    assert torch.equal(link.leave_one_out(u, link.gain(-0.3)), u)
    assert torch.equal(link.leave_one_out(u, link.gain(math.nan)), u)


def test_negative_curvature_counts_as_none() -> None:
    u, y = randn(N, 2), randn(N, 2, seed=1)
    link = local_loss_of(gaussian, u, y)
    assert isinstance(link, Coupled)
    assert float(link.values.min()) == 0
    assert 0 < link.dof(1.0) < 1


def test_one_output_without_its_own_dimension() -> None:
    u, y = randn(N), (randn(N, seed=1) > 0).double()
    loss: Loss = lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="none")  # noqa: E731
    link = local_loss_of(loss, u, y)
    expected = binary(u.unsqueeze(1).requires_grad_(), y.unsqueeze(1))
    assert isinstance(link, Separate)
    assert expected.shape == (N,)
    p = u.sigmoid()
    torch.testing.assert_close(link.diagonal[:, 0], p * (1 - p))


def test_many_coupled_outputs_are_refused() -> None:
    loss: Loss = lambda u, y: u.square().sum(1).square()  # noqa: E731
    with pytest.raises(ValueError, match=r"couples all 200 outputs.*each token be an example"):
        local_loss_of(loss, randn(3, 200), torch.zeros(3))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(), r"shape \(6,\) for 6 examples, but gave \(\)"),
        (nothing, "but gave NoneType"),
        (mistakes, "must be differentiable"),
    ],
)
def test_a_loss_that_is_not_one_value_an_example_is_refused(loss: Loss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_loss_of(loss, randn(N, C), classes())


# --- what a loss is like elsewhere ----------------------------------------------------------------


@pytest.mark.parametrize(("opens", "bent"), [((1.0, 2.2), False), ((1.0, 2.6), True)])
def test_bent_is_what_leaves_over_half_of_the_change_open(
    opens: tuple[float, float], bent: bool
) -> None:
    """Parts count together, by their norms: here the change is 5 and its half 2.5."""
    bends = [Bend(change, left) for change, left in zip((3.0, 4.0), opens, strict=True)]
    assert is_bent(bends) == bent


def test_the_log_probabilities_of_one_example_are_logits_too() -> None:
    """Two classes do; of one output the logarithm of a sum says nothing."""

    def loss(u: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(u, y, reduction="none")

    p = randn(1, 2, seed=1).log_softmax(1)
    assert on_logits(loss, p) is not loss
    shifted = on_logits(loss, p)(p + 3.0, torch.tensor([1]))
    torch.testing.assert_close(shifted, -p[:, 1])
    assert on_logits(loss, p.new_zeros(4, 1)) is loss


def test_a_gradient_of_zero_has_no_gauge() -> None:
    assert not is_shift_invariant(torch.zeros(3, 4))
    assert is_shift_invariant(torch.tensor([[1.0, -1.0]]))


def test_ignored_is_only_what_has_no_loss_anywhere() -> None:
    """Not what is beyond its margin, however far, and not what has a loss here alone."""

    def beyond(u: Tensor, y: Tensor) -> Tensor:
        return y * (100 - u).clamp_min(0).sum(1)

    def here(u: Tensor, y: Tensor) -> Tensor:
        return y * (1 - u.abs()).clamp_min(0).sum(1)

    def rewarded(u: Tensor, y: Tensor) -> Tensor:
        return -y * u.abs().sum(1)

    y = torch.tensor([1.0, 0.0, 1.0])
    far = torch.full((3, 1), 1000.0, dtype=torch.float64)
    assert ignored_examples(beyond, far, y).tolist() == [False, True, False]
    for loss in (here, rewarded):
        assert ignored_examples(loss, 0 * far, y).tolist() == [False, True, False]
