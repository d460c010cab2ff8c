"""The data and networks of the fields: a convected wave, a photograph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from poprisk_lab.tasks import convection as fields
from poprisk_lab.tasks.image import (
    NETWORKS,
    PHOTOGRAPHS,
    FourierMLP,
    Siren,
    image,
    photograph,
    places,
)

# --- convection -----------------------------------------------------------------------------------


def models(count: int) -> list[fields.PeriodicMLP]:
    torch.manual_seed(0)
    nets = [fields.PeriodicMLP(width=8).double() for _ in range(count)]
    for layer in (layer for net in nets for layer in net.linear):
        nn.init.normal_(layer.bias)  # zero at the start, where its place would not be seen
    return nets


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def points(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)


def test_values_are_those_of_each_network_alone() -> None:
    nets, initial = models(3), points(3, 7)
    values, _ = fields.values_and_residuals(nets, initial, points(3, 5))
    for net, own, found in zip(nets, initial, values, strict=True):
        torch.testing.assert_close(found, net(own))


def test_residuals_are_derivatives_by_automatic_differentiation() -> None:
    nets, inside = models(2), points(2, 5)
    _, residuals = fields.values_and_residuals(nets, points(2, 1), inside)
    for net, own, found in zip(nets, inside, residuals, strict=True):
        own = own.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(own).sum(), own)
        torch.testing.assert_close(found, slope[:, 1] + 5.0 * slope[:, 0])


def test_gradients_of_the_residuals_are_those_of_the_naive_way() -> None:
    (net,), inside = models(1), points(1, 5)
    _, residuals = fields.values_and_residuals([net], points(1, 1), inside)
    residuals.square().sum().backward()
    found = gradients(net)
    net.zero_grad()
    inside.requires_grad_()
    (slope,) = torch.autograd.grad(net(inside[0]).sum(), inside, create_graph=True)
    (slope[0, :, 1] + 5.0 * slope[0, :, 0]).square().sum().backward()
    torch.testing.assert_close(found, gradients(net))
    assert max(float(g.abs().max()) for g in found) > 0.1


def test_the_solution_solves_the_equation_and_starts_at_the_sine() -> None:
    at = points(1, 9)[0].requires_grad_()
    (slope,) = torch.autograd.grad(fields.exact(at).sum(), at)
    torch.testing.assert_close(slope[:, 1], -fields.SPEED * slope[:, 0])
    start = torch.tensor([[0.3, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(fields.exact(start), start[:, 0].sin())


def test_a_network_is_periodic() -> None:
    (net,), at = models(1), points(1, 4)[0]
    turned = at + torch.tensor([2 * math.pi, 0.0], dtype=torch.float64)
    torch.testing.assert_close(net(at), net(turned))
    later = at + torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert not torch.allclose(net(at), net(later))


def test_measurements_repeat_and_have_the_noise_asked_for() -> None:
    data = fields.convection(3, noise=0.5, points=4000)
    again = fields.convection(3, noise=0.5, points=4000)
    assert torch.equal(data.x, again.x)
    assert torch.equal(data.y, again.y)
    assert not torch.equal(data.y, fields.convection(4, noise=0.5, points=4000).y)
    error = data.y - data.x.sin()
    assert float(error.std()) == pytest.approx(0.5, rel=0.05)
    assert float(error.mean()) == pytest.approx(0.0, abs=0.03)
    assert 0 <= float(data.x.min()) < 0.1
    assert 6.2 < float(data.x.max()) < 2 * math.pi


def test_the_relative_error_of_a_scaled_solution_is_exact() -> None:
    solution = fields.convection(0, noise=1.0).solution
    assert fields.relative_error(0.6 * solution, solution) == pytest.approx(0.4)
    assert fields.relative_error(torch.zeros_like(solution), solution) == 1.0


# --- image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_come_with_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)  # a download would fail
    picture = photograph(name, 32)
    assert picture.shape == (32, 32)
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert float(picture.std()) > 0.05


def test_a_photograph_is_the_right_way_up() -> None:
    import skimage.data

    quarters = skimage.data.camera().reshape(2, 256, 2, 256).mean((1, 3)) / 255
    np.testing.assert_allclose(photograph("camera", 2).numpy(), quarters, atol=0.05)
    own = photograph("camera", 32).reshape(2, 16, 2, 16).mean((1, 3))
    np.testing.assert_allclose(own.numpy(), quarters, atol=0.01)


def test_places_are_pixel_centres_row_by_row() -> None:
    assert places(2).tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]


def test_the_test_set_is_the_picture_without_its_noise() -> None:
    task = image(5, noise=0.2, size=48)
    assert torch.equal(task.test[1], photograph("camera", 48).reshape(-1, 1))
    noise = task.train[1] - task.test[1]
    assert float(noise.std()) == pytest.approx(0.2, rel=0.05)
    assert torch.equal(task.train[1], image(5, noise=0.2, size=48).train[1])
    assert not torch.equal(task.train[1], image(6, noise=0.2, size=48).train[1])
    assert task.memorized(task.train[1]) == pytest.approx(1.0)
    assert task.memorized(task.test[1]) == 0.0


def test_bad_settings_of_a_photograph_are_refused() -> None:
    with pytest.raises(ValueError, match="network must be one of 'siren', 'fourier'"):
        image(network="cnn")
    with pytest.raises(ValueError, match="name must be one of 'camera'"):
        image(picture="moon")
    with pytest.raises(ValueError, match="size must lie in"):
        image(size=1000)
    with pytest.raises(ValueError, match="noise must lie in"):
        image(noise=-1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_fits_a_picture_without_noise(name: str) -> None:
    torch.manual_seed(0)
    task = image(noise=0.0, size=16, network=name)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(model(task.train[0]), task.train[1]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(task.loss(model(task.train[0]), task.train[1]).mean()) < 1e-3


def test_a_siren_starts_with_phases_of_one_spread() -> None:
    torch.manual_seed(0)
    siren, x = Siren(width=256), places(32)
    spreads = []
    for layer in siren.linear[:-1]:
        phase = (30.0 * layer(x)).detach()
        spreads.append(float(phase.std()))
        x = phase.sin()
    # Weights give every hidden phase a variance of 1, the biases of nn.Linear add theirs.
    expected = math.sqrt(1 + 30**2 / (3 * 256))
    assert spreads[1:] == pytest.approx([expected] * 2, rel=0.1)
    assert spreads[0] == pytest.approx(30 * math.sqrt(2 / 3 / 12 + 1 / 6), rel=0.1)


def test_frequencies_are_not_trained_and_differ_by_seed() -> None:
    net = FourierMLP(width=8, features=4)
    assert "frequencies" in dict(net.named_buffers())
    assert all(p is not net.frequencies for p in net.parameters())
    assert isinstance(net.layers[0], nn.Linear)
    assert net.layers[0].in_features == 8
    assert not torch.equal(net.frequencies, FourierMLP(width=8, features=4).frequencies)
