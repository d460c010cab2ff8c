"""Following vectors along a run, without matrices: the operators applied, and the cells."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poprisk.path import follow, integrate, record, trace_cells
from poprisk.path.follow import Applied, follow_all
from poprisk.path.trace import split_gradient
from runs import data, recorded
from samplers import randn


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert float((a - b).norm()) <= tol * float(b.norm()) + 1e-12


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW", "centred RMSprop", "gated SGD"])
def test_following_vectors_is_applying_the_operators(optimizer: str) -> None:
    run = recorded(optimizer, "cross_entropy", steps=7)
    ops, probes = integrate(run), randn(14, 2, 3)
    applied = follow(run, probes).applied
    columns = probes.flatten(0, 1)
    for followed, operator, affine in zip(
        (applied.gradient, applied.momentum, applied.train, applied.query),
        (ops.P, ops.Q, ops.D, ops.G),
        (ops.affine.gradient, ops.affine.momentum, ops.affine.train, ops.affine.query),
        strict=True,
    ):
        close(followed[..., :3].reshape(-1, 3), operator @ columns, 1e-8)
        if float(affine.norm()) > 0:
            close(followed[..., 3].flatten(), affine, 1e-8)


@pytest.mark.parametrize(
    ("every", "points", "steps"),
    [
        (1, 1, [0, 10]),
        (1, 2, [0, 10]),
        (1, 3, [0, 5, 10]),
        (2, 5, [0, 2, 6, 8, 10]),
        (4, 3, [0, 8, 10]),
    ],
)
def test_moments_are_kept_at_the_first_update_from_where_they_are_asked(
    every: int, points: int, steps: list[int]
) -> None:
    """Of 10 steps; all outputs are updated at every multiple of ``every`` and at the end."""
    run, told = recorded("AdamW", steps=10), list[tuple[int, int | None]]()

    def tell(done: int, total: int | None) -> None:
        told.append((done, total))

    found = follow(run, randn(14, 2, 1), every=every, points=points, progress=tell)
    assert [m.step for m in found.moments] == steps
    assert told == [(k + 1, 10) for k in range(10)]
    for m in found.moments:
        close(m.outputs, run.problem.J.outputs(run.weights[m.step], run.problem.query[0]), 1e-12)


def errors(found: Applied, exact: Applied) -> Tensor:
    """Of each of the four, relative."""
    pairs = zip(found, exact, strict=True)
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
@pytest.mark.parametrize("settings", [{"segments": 2}, {"dtype": torch.float32}])
def test_pieces_and_precision_change_little(optimizer: str, settings: dict[str, Any]) -> None:
    run = recorded(optimizer, "cross_entropy", steps=8)
    exact, _ = follow_all(run, randn(14, 2, 2))
    found, closure = follow_all(run, randn(14, 2, 2), **settings)
    assert {a.dtype for a in found} == {settings.get("dtype", torch.float64)}
    assert bool((errors(found, exact) < 1e-4).all())
    assert closure.worst < 1e-4


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
def test_rare_updates_of_all_outputs_are_second_order(optimizer: str) -> None:
    run, probes = recorded(optimizer, "cross_entropy", steps=48, b=None), randn(14, 2, 2)
    exact = follow(run, probes).applied
    every_2, every_8 = (errors(follow(run, probes, every=e).applied, exact) for e in (2, 8))
    assert bool((every_2 < 0.15 * every_8).all())
    assert bool((every_8 < 0.02).all())


def _never(done: int, every: int) -> bool:
    return False


def test_the_start_is_followed_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first steps move most: outputs are all moved after 1, 2, 4, 8 steps, 12, and 24."""
    run, probes = recorded("AdamW", "cross_entropy", steps=24, b=None), randn(14, 2, 2)
    exact, found = (follow(run, probes, every=e).applied for e in (1, 12))
    moments = [m.step for m in follow(run, probes, every=12, points=30).moments]
    assert moments == [0, 12, 24]
    module = importlib.import_module("poprisk.path.follow")
    monkeypatch.setattr(module, "is_early", _never)
    late = follow(run, probes, every=12).applied
    assert bool((errors(found, exact) < 0.7 * errors(late, exact)).all())


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
def test_strided_runs_are_followed_approximately(optimizer: str) -> None:
    probes = randn(14, 2, 2)
    exact, two, four = (
        follow(recorded(optimizer, "cross_entropy", steps=24, b=None, stride=s), probes).applied
        for s in (1, 2, 4)
    )
    assert bool((errors(two, exact) < 0.06).all())
    assert bool((errors(two, exact) < 0.6 * errors(four, exact)).all())


@pytest.mark.parametrize("shape", [(14, 2), (13, 2, 1), (14, 3, 1)])
def test_probes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"probes must have shape \(n, c, r\) = \(14, 2, r\)"):
        follow(recorded("SGD", steps=1), randn(*shape))


@pytest.mark.parametrize("name", ["every", "segments"])
def test_less_than_one_is_refused(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"^{name} must be"):
        follow(recorded("SGD", steps=1), randn(14, 2, 1), **settings)


@pytest.mark.parametrize("optimizer", ["momentum", "Nesterov", "AdamW", "PopRiskAdamW soft"])
def test_decay_that_acts_on_what_was_moved_adds_up_too(optimizer: str) -> None:
    run = recorded(optimizer, "squared_error", steps=8)
    start = run.problem.J.outputs(run.weights[0], run.problem.train[0])
    probes = run.problem.output_gradient(start).unsqueeze(2) * torch.tensor([0.3, 0.7]).double()
    plain, decaying = (follow(run, probes, decaying=d) for d in (False, True))
    assert decaying.closure().worst < 1e-9
    assert float((plain.applied.train - decaying.applied.train).norm()) > 1e-5
    close(plain.applied.train.sum(-1), decaying.applied.train.sum(-1), 1e-9)


@pytest.mark.parametrize("decaying", [False, True])
def test_a_probe_of_nothing_moves_nothing(decaying: bool) -> None:
    """The weights that decay are those of the affine column alone."""
    run = recorded("AdamW", "squared_error", steps=4)
    found = follow(run, torch.zeros(14, 2, 2).double(), decaying=decaying)
    assert not any(bool(columns[..., :2].any()) for columns in found.applied)
    assert bool(found.applied.train[..., 2].any())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_cells_add_up_to_the_movement(optimizer: str) -> None:
    run, clean = recorded(optimizer, "cross_entropy", steps=8), data("cross_entropy")[2]
    trace = trace_cells(run, clean, every=1, quadrature="gauss3", points=5)
    assert trace.closure.worst < 1e-8
    assert [p.step for p in trace.parts] == [0, 2, 4, 6, 8]
    for p in trace.parts:
        close(trace.start + p.signal + p.noise + p.affine, p.outputs, 1e-8)
    last = trace.parts[-1]
    close(trace.without_noise(), last.outputs - last.noise, 1e-12)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_energy_that_is_left_is_that_of_the_propagator(optimizer: str) -> None:
    run, clean = recorded(optimizer, "cross_entropy", steps=8), data("cross_entropy")[2]
    found = trace_cells(run, clean, every=1, quadrature="gauss3").energy_left
    P, parts = integrate(run).P, split_gradient(run, clean, run.weights[0])
    for left, g in zip(found, (part.flatten() for part in parts), strict=True):
        assert left == pytest.approx(float((P @ g).square().sum() / g.square().sum()), rel=1e-9)
        assert left != pytest.approx(1, abs=1e-3)


def test_cheap_cells_are_close_to_the_exact_ones() -> None:
    run, clean = recorded("AdamW", "cross_entropy", steps=30), data("cross_entropy")[2]
    exact = trace_cells(run, clean, every=1, quadrature="gauss3")
    cheap = trace_cells(run, clean)
    assert cheap.closure.worst < 1e-2
    close(cheap.parts[-1].noise, exact.parts[-1].noise, 0.05)


def test_clean_labels_leave_no_noise() -> None:
    run = recorded("SGD", "cross_entropy")
    trace = trace_cells(run, run.problem.train[1])
    assert float(trace.parts[-1].noise.norm()) == 0.0
    assert math.isnan(trace.energy_left[1])


class Transformer(nn.Module):
    """A decoder of about a million weights."""

    def __init__(self, vocabulary: int = 64, width: int = 128, layers: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).mean(1))


@pytest.mark.slow
@pytest.mark.long
def test_a_transformer_of_a_million_weights() -> None:
    torch.manual_seed(0)
    net = Transformer()
    tokens = torch.randint(64, (24, 8))
    clean = tokens[:, 0] % 4
    noisy = clean.clone()
    noisy[:6] = (noisy[:6] + 1) % 4
    adamw = torch.optim.AdamW(net.parameters(), lr=3e-4)
    run = record(
        net,
        "cross_entropy",
        adamw,
        torch.arange(24).split(8),
        tokens[:4],
        train=(tokens, noisy),
    )
    assert run.problem.size > 1_000_000
    trace = trace_cells(run, clean, every=1, quadrature="gauss2")
    assert trace.closure.worst < 1e-2
    assert float(trace.parts[-1].noise.norm()) > 0
