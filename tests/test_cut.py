"""Models that detach what they hand on: trained by one Jacobian, moved by another."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from poprisk import CellTracer, attribute, loo_risk, path_operators, record, trace_cells
from poprisk._validate import NotAnalysable
from poprisk.path import Run, follow, integrate
from poprisk.path.drift import movement
from poprisk.uncut import uncut
from reference import path as reference
from runs import OPTIMIZERS, N, batches, data
from samplers import randn
from test_path import close, reference_steps

C = 2
Cut = Callable[[Tensor], Tensor]


def none(h: Tensor) -> Tensor:
    """No cut."""
    return h


def stored(h: Tensor) -> Tensor:
    return h.data


CUTS: dict[str, Cut] = {"detach": Tensor.detach, "torch.detach": torch.detach, "data": stored}


class Layered(nn.Module):
    """Tanh layers with a head each, (b, 2, L); what a layer hands on goes through ``cut``."""

    def __init__(self, *widths: int, cut: Cut = Tensor.detach, again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.heads = nn.ModuleList(nn.Linear(b, C) for b in widths[1:])
        self.cut, self.again = cut, again

    def after(self, layer: nn.Module, h: Tensor) -> Tensor:
        found: Tensor = layer(self.cut(h))
        return found.tanh()

    def forward(self, x: Tensor) -> Tensor:
        outputs, h = list[Tensor](), x
        for layer, head in zip(self.layers, self.heads, strict=True):
            h = (
                checkpoint(self.after, layer, h, use_reentrant=False)
                if self.again
                else self.after(layer, h)
            )
            outputs.append(head(h))
        return torch.stack(outputs, -1)


def layered(**settings: Any) -> Layered:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layered(3, 5, 4, **settings).double()


def entropy(u: Tensor, y: Tensor) -> Tensor:
    of_layers = y.unsqueeze(1).expand(-1, u.shape[2])
    return nn.functional.cross_entropy(u, of_layers, reduction="none").sum(1)


def squares(u: Tensor, y: Tensor) -> Tensor:
    return (u - y.unsqueeze(2)).square().flatten(1).sum(1) / 2


def recorded(
    optimizer: Any = "SGD",
    kind: str = "cross_entropy",
    *,
    steps: int = 6,
    b: int | None = 5,
    **settings: Any,
) -> Run:
    train, query, _ = data(kind)
    net = settings.pop("net", None) or layered()
    build = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    loss = entropy if kind == "cross_entropy" else squares
    return record(
        net, loss, build(net.parameters()), batches(steps, b=b), query, train=train, **settings
    )


def composed(run: Run) -> reference.Outputs:
    """The outputs as a function of all weights, without a cut anywhere."""
    net, J = layered(cut=none), run.problem.J

    def outputs(w: Tensor, x: Tensor) -> Tensor:
        return functional_call(net, J.named(w), (x,)).flatten(1)

    return outputs


def naive(run: Run) -> reference.Operators:
    problem, (x, y) = run.problem, run.problem.train

    def total_loss(u: Tensor) -> Tensor:
        return problem.loss(problem.shaped(u.view(len(x), -1)), y).mean()

    return reference.path_operators(
        composed(run),
        total_loss,
        [run.weights[k] for k in range(len(run) + 1)],
        reference_steps(run),
        x,
        problem.query[0],
        run.momentum_in,
        trained=problem.J.outputs,
    )


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("SGD", "squared_error"),
        ("momentum", "squared_error"),
        ("AdamW", "cross_entropy"),
        ("PopRiskAdamW soft", "cross_entropy"),
    ],
)
def test_equals_the_reference_with_two_jacobians(optimizer: str, kind: str) -> None:
    run = recorded(optimizer, kind, steps=4)
    actual, expected = integrate(run), naive(run)
    assert run.problem.is_cut
    for name in ("P", "Q", "W", "G", "D"):
        close(getattr(actual, name), getattr(expected, name), 1e-9)
    if bool(expected.h.any()):
        close(actual.affine.query, expected.affine_G, 1e-8)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("optimizer", ["SGD", "Nesterov", "gated AdamW"])
def test_the_identities_close_however_it_is_cut(optimizer: str, cut: str) -> None:
    run = recorded(optimizer, net=layered(cut=CUTS[cut]), steps=8)
    ops = path_operators(run)
    assert ops.closure.worst < 1e-8
    _, _, clean = data("cross_entropy")
    assert ops.four_cells(clean).closure < 1e-8
    assert ops.accounting.accounted == pytest.approx(ops.accounting.measured, rel=1e-8)


class Twice(nn.Module):
    """Hands on what it computes once more without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layered()

    def forward(self, x: Tensor) -> Tensor:
        outputs, h = list[Tensor](), x
        for layer, head in zip(self.inner.layers, self.inner.heads, strict=True):
            outputs.append(head(layer(h).tanh()))
            with torch.no_grad():
                h = layer(h).tanh()
        return torch.stack(outputs, -1)


def test_what_is_computed_without_gradients_is_cut_as_well() -> None:
    net = Twice()
    run = recorded("AdamW", net=net)
    assert run.problem.is_cut
    found, expected = integrate(run), integrate(recorded("AdamW"))
    assert found.closure.worst < 1e-8
    close(found.G, expected.G, 1e-9)


def test_a_net_without_cuts_is_followed_by_one_jacobian() -> None:
    run = recorded(net=layered(cut=none))
    assert not run.problem.is_cut
    assert run.problem.J_whole is run.problem.J
    assert integrate(run).closure.worst < 1e-9


def test_cuts_under_a_checkpoint_are_told() -> None:
    """It calls layers again on the way back, out of reach: a warning, and the closure says so."""
    run = recorded(net=layered(again=True))
    with pytest.warns(RuntimeWarning) as told:
        closure = integrate(run).closure
    assert any("what the model detaches cannot be followed" in str(w.message) for w in told)
    assert any("the path operators are off by" in str(w.message) for w in told)
    assert closure.worst > 1e-2


def test_single_precision_is_cut_as_double_is() -> None:
    (x, y), (points, labels), _ = data("cross_entropy")
    net, pairs = layered().float(), ((x.float(), y), (points.float(), labels))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = record(net, entropy, sgd, batches(5), pairs[1], train=pairs[0])
    assert run.problem.is_cut
    assert path_operators(run).closure.worst < 1e-4


def test_following_vectors_is_applying_the_operators() -> None:
    run = recorded("AdamW")
    ops, probes = integrate(run), randn(N, 2 * C, 3, seed=3)
    applied = follow(run, probes).applied
    xi = probes.flatten(0, 1)
    for name, operator in (("gradient", ops.P), ("train", ops.D), ("query", ops.G)):
        close(getattr(applied, name)[..., :3].flatten(0, 1), operator @ xi, 1e-8)
    _, _, clean = data("cross_entropy")
    assert trace_cells(run, clean, every=1, quadrature="gauss3").closure.worst < 1e-7


def test_cells_are_traced_while_it_trains() -> None:
    (x, y), query, clean = data("cross_entropy")
    net = layered()
    opt = OPTIMIZERS["AdamW"](net.parameters())
    tracer = CellTracer(
        net,
        entropy,
        opt,
        train=(x, y),
        clean_targets=clean,
        query=query,
        every=1,
        quadrature="gauss3",
    )
    with tracer:
        for batch in batches(6):
            opt.zero_grad()
            entropy(net(x[batch]), y[batch]).mean().backward()
            opt.step()
            tracer.step(batch)
    found = tracer.trace()
    assert found.closure.worst < 1e-7
    recorded_run = trace_cells(recorded("AdamW"), clean, every=1, quadrature="gauss3")
    close(found.parts[-1].noise, recorded_run.parts[-1].noise, 1e-7)


def test_the_kernel_is_of_both_jacobians() -> None:
    run = recorded(steps=3)
    x, w = run.problem.train[0], run.weights[3]
    local = reference.jacobian(run.problem.J.outputs, w, x)
    whole = reference.jacobian(composed(run), w, x)
    found = integrate(run)
    kernel = found.snapshots[-1].kernel
    close(kernel, whole @ local.T, 1e-10)
    assert float((kernel - kernel.T).norm()) > 1e-2 * float(kernel.norm())
    w, queries = run.weights[0], run.problem.query[0]
    local = reference.jacobian(run.problem.J.outputs, w, x)
    whole, seen = (reference.jacobian(composed(run), w, z) for z in (x, queries))
    close(found.frozen, seen @ local.T @ torch.linalg.pinv(whole @ local.T), 1e-6)


def test_the_loss_falls_by_what_was_dissipated_unless_it_is_cut() -> None:
    """In the limit of small steps; the kernel of local rules is no longer positive either."""

    def slow(ps: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(ps, lr=1e-3)

    for cut, low, high in ((Tensor.detach, 5e-3, 0.5), (none, 0.0, 1e-3)):
        found = integrate(recorded(slow, net=layered(cut=cut), steps=10, b=None)).accounting
        assert low <= abs(found.quadratic / found.measured - 1) <= high


def test_the_reservoir_is_invisible_all_the_same() -> None:
    ops = path_operators(recorded("AdamW", steps=10))
    assert float(ops.spectrum.eigenvalues[-1]) > -1e-12 * float(ops.spectrum.eigenvalues[0])
    hidden = ops.channel(1e-12).reservoir
    assert hidden.shape[1] > 0
    for transfer in (ops.G, ops.D):
        assert float((transfer @ hidden).norm()) < 1e-4 * float(transfer.norm())


def test_a_record_of_every_second_step_is_of_both_jacobians() -> None:
    def slow(ps: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(ps, lr=0.02)

    run = recorded(slow, steps=40, b=None, stride=2)
    assert integrate(run).closure.worst < 1e-2


def test_drift_and_diffusion_are_of_outputs_as_they_move() -> None:
    run = recorded(steps=5)
    problem, x = run.problem, run.problem.train[0]
    total = torch.zeros(N * 2 * C, dtype=torch.float64)
    for k in range(len(run)):
        w = run.weights[k]
        g = problem.output_gradient(problem.J.values(w, x)).flatten()
        local = reference.jacobian(problem.J.outputs, w, x)
        total += 0.1 * reference.jacobian(composed(run), w, x) @ (local.T @ g)
    drift = movement(run, first=5, points=1).drift
    torch.testing.assert_close(drift[-1], total)


def test_what_needs_second_derivatives_refuses() -> None:
    run = recorded()
    with pytest.raises(NotAnalysable, match="the model detaches what its outputs depend on"):
        loo_risk(run)
    with pytest.raises(NotAnalysable, match="derivatives the adjoint takes"):
        attribute(run)


class Rounded(nn.Module):
    """A straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, C).double()

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(x)
        return u + ((64 * u).round() / 64 - u).detach()


def test_a_straight_through_estimator_is_kept() -> None:
    train, query, _ = data()
    net = Rounded()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    run = record(net, "squared_error", sgd, batches(2), query, train=train)
    assert not run.problem.is_cut


class Quantized(nn.Module):
    """Weights or activations rounded, gradients as if they were not."""

    def __init__(self, rounded: Cut, *, outputs: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, C)]).double()
        self.rounded, self.outputs = rounded, outputs

    def straight(self, h: Tensor, *, wanted: bool) -> Tensor:
        return h + (self.rounded(h) - h).detach() if wanted else h

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        assert isinstance(first, nn.Linear)
        h = nn.functional.linear(x, self.straight(first.weight, wanted=not self.outputs))
        found: Tensor = second(self.straight(h.tanh(), wanted=self.outputs))
        return found


COARSE: dict[str, Callable[[], nn.Module]] = {
    "signs": lambda: Quantized(torch.sign),
    "quarters": lambda: Quantized(lambda h: (4 * h).round() / 4),
    "signs of activations": lambda: Quantized(torch.sign, outputs=True),
}


@pytest.mark.parametrize("kind", COARSE)
def test_a_straight_through_estimator_is_kept_however_coarse(kind: str) -> None:
    train, query, _ = data()
    for seed in range(6):
        torch.manual_seed(seed)
        net = COARSE[kind]()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        run = record(net, "squared_error", sgd, batches(1), query, train=train)
        assert not run.problem.is_cut, seed


def assert_uncut(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The record of a few steps, which closes by the model's own gradients; returned."""
    train, query, _ = data()
    run = record(net, "squared_error", optimizer, batches(3), query, train=train)
    assert not run.problem.is_cut
    assert integrate(run).closure.worst < 1e-9
    return run


class Features(nn.Module):
    """A head on features without gradients, whose weights nobody froze."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, 4).double(), nn.Linear(4, C).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.features(x).tanh()
        found: Tensor = self.head(h)
        return found


def test_features_without_gradients_are_no_cut() -> None:
    """Steps are gradients of one loss, of the weights that move."""
    net = Features()
    attribute(assert_uncut(net, torch.optim.AdamW(net.parameters(), lr=0.01)))


class Stabilized(nn.Module):
    """A softmax whose maximum is detached, as it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, C).double()

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(x)
        e = (u - u.detach().amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True)


def test_a_cut_that_changes_no_derivative_is_none() -> None:
    net = Stabilized()
    assert_uncut(net, torch.optim.SGD(net.parameters(), lr=0.1))


class Listening(nn.Module):
    """Reads numbers off what it detaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, C).double()
        self.seen = list[float]()

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(x)
        if not torch._C._functorch.is_functorch_wrapped_tensor(u):
            self.seen = [float(u.detach().mean()), *u.detach().numpy()[0], int(u.detach().sum())]
        return u


def test_numbers_may_be_read_off_what_is_detached() -> None:
    net = Listening()
    assert_uncut(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_derivatives_pass_inside_and_are_cut_after() -> None:
    w = torch.tensor(3.0, requires_grad=True)
    for cut in CUTS.values():
        with uncut():
            y = w * cut(w)
        assert torch.autograd.grad(y, w)[0] == 6.0
        assert torch.autograd.grad(w * cut(w), w)[0] == 3.0


def test_flags_set_on_what_is_detached_stay_there() -> None:
    x = torch.ones(2)
    w = torch.ones(2, requires_grad=True) * 2
    with uncut():
        leaf, inside = x.detach().requires_grad_(), w.detach()
        assert torch.eye(2).to_sparse().detach().is_sparse  # of which there are no views
    assert leaf.requires_grad
    assert not x.requires_grad
    assert inside is not w
    assert inside.data_ptr() == w.data_ptr()
