"""A twin pushed ever less answers as the tangent of training, found by forward-mode derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from poprisk import Recorder, Run, TwinRisk, loo_risk
from poprisk.forward_mode import prepare_forward_mode
from poprisk.risk.estimate import TwinOutputs, measure_dof
from poprisk.risk.local_losses import local_loss_of
from poprisk.risk.loo import _Path
from reference import risk as reference
from samplers import randn

N, STEPS, HALVED = 40, 24, 8
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (u - y).square().sum(1)


def cross_entropy(u: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(u, y, reduction="none")


TARGETS: dict[Loss, Tensor] = {squared: randn(N, 2, seed=1), cross_entropy: torch.arange(N) % 2}
each_loss = pytest.mark.parametrize("loss", [squared, cross_entropy])


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def trained(loss: Loss, delta: float) -> tuple[Run, TwinRisk]:
    """Gradient descent, its rate halved on the way."""
    x, y = randn(N, 3), TARGETS[loss]
    twin = TwinRisk(
        network,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.4),
        loss,
        dataset_size=N,
        delta=delta,
    )
    schedules = [torch.optim.lr_scheduler.StepLR(r.optimizer, HALVED, 0.5) for r in twin.replicas]
    with Recorder(twin.model, loss, twin.optimizer, train=(x, y)) as recorder:
        for _ in range(STEPS):
            for run in twin.runs(range(N)):
                run.optimizer.zero_grad()
                run.loss(run.model(x), y).mean().backward()
                run.optimizer.step()
                schedules[run.position].step()
            recorder.step(torch.arange(N))
    return recorder.run, twin


def response(twin: TwinRisk, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, signs z, and the twin's displacement per unit of push."""
    u, _, (pushed,) = twin.outputs([(randn(N, 3), y, torch.arange(N))])
    z = twin.probes[0].perturbation(torch.arange(N), u.shape[1:], shift_invariant=y.ndim == 1)
    size = float((pushed.perturbation / z)[z != 0].mean())
    return u, z, (pushed.outputs - u) / size


def naive(loss: Loss, z: Tensor) -> Tensor:
    model, x = network(), randn(N, 3)
    shapes = {k: p.shape for k, p in model.named_parameters()}

    def outputs(w: Tensor) -> Tensor:
        parts = w.split([s.numel() for s in shapes.values()])
        named = {k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    prepare_forward_mode()
    w = parameters_to_vector(model.parameters()).detach()
    lrs = [0.4 * 0.5 ** (k // HALVED) for k in range(STEPS)]
    return reference.tangent(outputs, loss, w, TARGETS[loss], z, lrs)


@each_loss
def test_the_finite_difference_tends_to_the_tangent(loss: Loss) -> None:
    errors, exact = list[float](), torch.empty(0)
    for delta in (0.1, 0.01, 0.001):
        _, z, moved = response(trained(loss, delta)[1], TARGETS[loss])
        exact = naive(loss, z) if not errors else exact  # z is the same for each
        errors.append(float((moved - exact).norm() / exact.norm()))
    assert errors[2] < 1e-3
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(10, rel=0.15)  # first order in the push


@each_loss
def test_degrees_of_freedom_tend_to_those_of_the_tangent(loss: Loss) -> None:
    y = TARGETS[loss]
    _, twin = trained(loss, 1e-4)
    u, z, _ = response(twin, y)
    exact = measure_dof(local_loss_of(loss, u, y), u, [TwinOutputs(u + naive(loss, z), z)])
    found = twin.estimate(randn(N, 3), y)
    assert found.dof == pytest.approx(exact.dof, rel=1e-3)
    assert found.dof_error == pytest.approx(exact.dof_error, rel=1e-3)


@each_loss
def test_the_full_hessian_response_of_a_record_is_the_tangent(loss: Loss) -> None:
    run, twin = trained(loss, 1e-4)
    _, z, _ = response(twin, TARGETS[loss])
    nothing = torch.zeros(1, N, dtype=torch.bool)
    moved = _Path(run, "hessian").moved(nothing, z)[0]
    torch.testing.assert_close(moved, naive(loss, z), rtol=1e-9, atol=1e-12)
    assert loo_risk(run, form="hessian", subset=2).dof > 0
