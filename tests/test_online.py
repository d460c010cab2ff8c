"""The cells in lockstep with training, against those of a record of the same run."""

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk import NotAnalysable, PopRiskAdamW, Run, trace_cells
from poprisk.path import CellTrace, CellTracer, Recorder, realized_update
from runs import LOSSES, OPTIMIZERS, N, batches, data, network
from samplers import randn
from test_costs import Clock

EXACT: dict[str, Any] = {"every": 1, "quadrature": "gauss3"}
CHEAP: dict[str, Any] = {"every": 3, "quadrature": "midpoint"}


def trained(
    optimizer: str | Callable[..., Optimizer] = "AdamW",
    kind: str = "cross_entropy",
    *,
    steps: int = 8,
    between: Callable[[int, Optimizer], Any] = lambda k, opt: None,
    before: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[CellTracer, Run]:
    """A training that was followed and recorded at once.

    Args:
        optimizer: its name, or what makes it.
        kind: of the targets.
        steps: that are followed.
        between: done before each of them.
        before: steps that nobody looks at.
        dtype: of weights and data.
        settings: of the tracer.
    """
    train, query, clean = data(kind)
    (x, y), points = (train[0].to(dtype), train[1]), query[0].to(dtype)
    y, clean = (t.to(dtype) if t.is_floating_point() else t for t in (y, clean))
    net = network().to(dtype)
    build = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    opt, common = build(net.parameters()), {"train": (x, y), "query": points}
    tracer = CellTracer(net, LOSSES[kind], opt, clean_targets=clean, **common, **settings)
    recorder = Recorder(net, LOSSES[kind], opt, **common)
    mean = recorder.problem.loss

    def take(batch: Tensor) -> None:
        opt.zero_grad()
        mean(net(x[batch]), y[batch]).mean().backward()
        opt.step()

    for batch in batches(before, seed=1):
        take(batch)
    if before:  # both know the weights that they begin with
        tracer = CellTracer(net, LOSSES[kind], opt, clean_targets=clean, **common, **settings)
        recorder = Recorder(net, LOSSES[kind], opt, **common)
    with recorder, tracer:
        for k, batch in enumerate(batches(steps)):
            between(k, opt)
            take(batch)
            tracer.step(batch)
            recorder.step(batch)
    return tracer, recorder.run


def same(found: CellTrace, expected: CellTrace, rtol: float = 1e-9) -> None:
    assert [p.step for p in found.parts] == [p.step for p in expected.parts]
    for a, b in zip(found.parts, expected.parts, strict=True):
        for name in ("signal", "noise", "affine", "outputs"):
            left, right = getattr(a, name), getattr(b, name)
            torch.testing.assert_close(left, right, rtol=rtol, atol=rtol * 1e-3)
    assert torch.equal(found.start, expected.start)
    assert found.output_shape == expected.output_shape
    assert found.energy_left == pytest.approx(expected.energy_left, rel=1e3 * rtol)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
@pytest.mark.parametrize("settings", [EXACT, CHEAP], ids=["exact", "cheap"])
def test_the_cells_are_those_of_a_record(optimizer: str, settings: dict[str, Any]) -> None:
    tracer, run = trained(optimizer, points=9, **settings)
    points = len(run) + 1 if settings is EXACT else 4  # updates after 3, 6 and 8 steps
    expected = trace_cells(run, data("cross_entropy")[2], points=points, **settings)
    same(tracer.trace(), expected)
    assert tracer.trace().closure == pytest.approx(expected.closure, rel=1e-4, abs=1e-11)
    if settings is EXACT:
        assert tracer.trace().closure.worst < 1e-7


@pytest.mark.parametrize("kind", [*LOSSES])
def test_of_every_loss(kind: str) -> None:
    tracer, run = trained("momentum", kind, points=9, **EXACT)
    same(tracer.trace(), trace_cells(run, data(kind)[2], points=9, **EXACT))


def test_in_single_precision() -> None:
    tracer, run = trained("PopRiskAdamW soft", dtype=torch.float32, points=9, **EXACT)
    found = tracer.trace()
    assert found.parts[-1].noise.dtype == torch.float32
    exact = trace_cells(run, data("cross_entropy")[2], points=9, **EXACT, dtype=torch.float64)
    same(found._replace(start=exact.start), _doubled(exact), rtol=1e-3)
    assert found.closure.worst < 1e-4


def _doubled(trace: CellTrace) -> CellTrace:
    parts = [p._replace(**{k: getattr(p, k).float() for k in p._fields[1:]}) for p in trace.parts]
    return trace._replace(parts=parts)


def test_by_default_all_outputs_are_moved_once_a_pass() -> None:
    tracer, run = trained("AdamW")
    expected = trace_cells(run, data("cross_entropy")[2])
    same(tracer.trace(), expected)
    assert [p.step for p in expected.parts] == [0, 3, 6, 8]  # 14 examples, 5 a batch
    tracer, _ = trained("AdamW", parts="noise")
    assert [p.step for p in tracer.trace().parts] == [0, 6, 8]


def test_momentum_from_before_is_affine() -> None:
    """Without decay; a momentum that a record would find, too."""

    def build(params: Any) -> Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)

    tracer, run = trained(build, before=3, points=9, **EXACT)
    found = tracer.trace()
    same(found, trace_cells(run, data("cross_entropy")[2], points=9, **EXACT))
    assert float(found.parts[-1].affine.norm()) > 1e-3
    assert found.closure.worst < 1e-7


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_decay_that_begins_later_and_rates_that_change(name: str) -> None:
    def between(k: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.2 if k >= 4 else 0.0
        optimizer.param_groups[0]["lr"] = 0.02 * 0.9**k

    tracer, run = trained(name, between=between, points=9, **EXACT)
    found = tracer.trace()
    same(found, trace_cells(run, data("cross_entropy")[2], points=9, **EXACT))
    assert [bool(p.affine.any()) for p in found.parts] == [False] * 5 + [True] * 4


def test_parameters_have_settings_of_their_own() -> None:
    def build(params: Any) -> Optimizer:
        first, *others = params
        groups = [{"params": [first], "lr": 0.02, "weight_decay": 0.3}, {"params": others}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)

    tracer, run = trained(build, points=9, **EXACT)
    same(tracer.trace(), trace_cells(run, data("cross_entropy")[2], points=9, **EXACT))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Nesterov", "PopRiskAdamW hard"])
@pytest.mark.parametrize("settings", [EXACT, CHEAP], ids=["exact", "cheap"])
def test_the_noise_alone_is_the_noise(optimizer: str, settings: dict[str, Any]) -> None:
    whole, _ = trained(optimizer, **settings)
    noise, _ = trained(optimizer, parts="noise", **settings)
    for a, b in zip(whole.trace().parts, noise.trace().parts, strict=True):
        torch.testing.assert_close(b.noise, a.noise, rtol=1e-9, atol=1e-12)
        assert torch.equal(b.outputs, a.outputs)
        assert not bool(b.affine.any())
        torch.testing.assert_close(noise.trace().start + b.signal + b.noise, b.outputs)
    torch.testing.assert_close(noise.trace().without_noise(), whole.trace().without_noise())
    (_, left), (nothing, found) = whole.trace().energy_left, noise.trace().energy_left
    assert math.isnan(nothing)
    assert found == pytest.approx(left, rel=1e-9)
    assert left != pytest.approx(1, abs=1e-3)


def test_the_noise_alone_says_how_far_its_chords_are_off() -> None:
    """By the midpoints of the chords between updates, after 1, 2, 3, 6 and 8 steps."""
    tracer, run = trained("SGD", parts="noise", **CHEAP)
    J, ends = run.problem.J, [run.weights[k] for k in (0, 1, 2, 3, 6, 8)]
    errors = list[float]()
    for x in (run.problem.train[0], run.problem.query[0]):
        moved = sum(
            J.jvp((a + b) / 2, x, (b - a).unsqueeze(1)).squeeze(-1) for a, b in pairwise(ends)
        )
        real = J.values(ends[-1], x) - J.values(ends[0], x)
        errors.append(float((moved - real).norm() / real.norm()))
    found = tracer.trace().closure
    assert [found.train, found.query] == pytest.approx(errors, rel=1e-6)
    assert 1e-6 < found.gradient < 1e-2
    both = trained("SGD", **CHEAP)[0].trace().closure
    assert [*found] == pytest.approx([*both], rel=0.5)
    assert trained("SGD", parts="noise", **EXACT)[0].trace().closure.worst < 1e-9


def test_clean_labels_leave_no_noise() -> None:
    train, query, _ = data()
    net = network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    tracer = CellTracer(net, "squared_error", sgd, train=train, clean_targets=train[1], query=query)
    followed(tracer, net, sgd, torch.arange(N))
    assert float(tracer.trace().parts[-1].noise.norm()) == 0.0
    assert float(tracer.trace().parts[-1].signal.norm()) > 0.0


def half_squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().sum(1).mean() / 2


@pytest.mark.parametrize("parts", ["all", "noise"])
@pytest.mark.parametrize("name", ["momentum", "AdamW", "PopRiskAdamW soft"])
def test_the_training_is_what_it_is_without(name: str, parts: str) -> None:
    """Bit for bit: weights, the optimizer's state, gradients and random numbers."""
    train, query, clean = data()
    ends = list[list[Any]]()
    for followed in (False, True):
        torch.manual_seed(3)
        net = network()
        opt = OPTIMIZERS[name](net.parameters())
        settings: dict[str, Any] = {"train": train, "clean_targets": clean, "query": query}
        tracer = CellTracer(net, "squared_error", opt, parts=parts, every=2, **settings)
        for k in range(6):
            if k == 1 and followed:
                tracer.__enter__()
            batch = torch.randint(N, (5,))
            opt.zero_grad()
            half_squared(net(train[0][batch]), train[1][batch]).backward()
            opt.step()
            if k >= 1 and followed:
                tracer.step(batch)
        if followed:
            tracer.__exit__(None, None, None)
        states = [t for p in net.parameters() for t in opt.state[p].values()]
        grads = [p.grad for p in net.parameters()]
        ends.append([*net.parameters(), *grads, *states, torch.rand(3), net(train[0])])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def start(**changes: Any) -> tuple[CellTracer, nn.Module, Optimizer]:
    train, query, clean = data()
    net = changes.pop("net", None) or network()
    build = changes.pop("optimizer", partial(torch.optim.SGD, lr=0.1))
    opt = build(net.parameters())
    settings: dict[str, Any] = {"train": train, "clean_targets": clean, "query": query, **changes}
    return CellTracer(net, "squared_error", opt, **settings), net, opt


def step(net: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    x, y = data()[0]
    optimizer.zero_grad()
    half_squared(net(x[batch]), y[batch]).backward()
    optimizer.step()


def followed(
    tracer: CellTracer, net: nn.Module, opt: Optimizer, *drawn: Tensor, told: Tensor | None = None
) -> None:
    """Train on batches, and tell of them, or of another."""
    with tracer:
        for batch in drawn:
            step(net, opt, batch)
            tracer.step(batch if told is None else told)


def test_a_look_in_between_changes_nothing() -> None:
    traces, ends = list[CellTrace](), list[CellTrace]()
    for looks in (False, True):
        tracer, net, opt = start(every=2, points=2)
        with tracer:
            for batch in batches(7):
                step(net, opt, batch)
                tracer.step(batch)
                if looks:
                    traces.append(tracer.trace())
        ends.append(tracer.trace())
    same(ends[0], ends[1])
    assert [t.parts[-1].step for t in traces] == [1, 2, 2, 4, 4, 6, 6]
    assert traces[0].closure.worst < 1e-3
    assert all(0 < t.closure.worst < 0.05 for t in traces[1:])


@pytest.mark.parametrize(
    ("points", "steps", "expected"),
    [
        (2, 3, [0, 1, 2, 3]),
        (2, 4, [0, 2, 4]),
        (2, 7, [0, 2, 4, 6, 7]),
        (2, 8, [0, 4, 8]),
        (3, 9, [0, 2, 4, 6, 8, 9]),
    ],
)
def test_moments_are_kept_evenly(points: int, steps: int, expected: list[int]) -> None:
    tracer, net, opt = start(every=1, points=points)
    followed(tracer, net, opt, *batches(steps))
    assert [p.step for p in tracer.trace().parts] == expected


def test_memory_does_not_grow_with_the_steps() -> None:
    def held() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), Tensor))

    tracer, net, opt = start(every=2, points=1, optimizer=OPTIMIZERS["AdamW"])
    sizes = list[int]()
    with tracer:
        for k, batch in enumerate(batches(33)):
            step(net, opt, batch)
            tracer.step(batch)
            if k in (8, 32):
                sizes.append(held())
    assert sizes[0] == sizes[1]


def test_accumulated_gradients_and_skipped_steps() -> None:
    tracer, net, opt = start(optimizer=partial(PopRiskAdamW, lr=0.01, weight_decay=0.0), **EXACT)
    x, y = data()[0]
    with tracer:
        for k, batch in enumerate(batches(5, b=6)):
            opt.zero_grad()
            for half in batch.split(3):
                (half_squared(net(x[half]), y[half]) / (math.nan if k == 2 else 2)).backward()
            if k == 2:
                with pytest.warns(RuntimeWarning, match="skipped a step"):
                    opt.step()
            else:
                opt.step()
            tracer.step(batch)
    assert [p.step for p in tracer.trace().parts] == [0, 1, 2, 3, 4]
    assert tracer.trace().closure.worst < 1e-9


def test_any_optimizer_with_a_rule() -> None:
    tracer, net, opt = start(
        optimizer=partial(torch.optim.NAdam, lr=0.01), rule=realized_update(momentum=0.9),
        **EXACT,
    )  # fmt: skip
    followed(tracer, net, opt, *batches(4))
    assert tracer.trace().closure.worst < 1e-7


def test_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock takes a second; a training step two, as a recorder finds, too."""
    clock = Clock("path.watch", monkeypatch=monkeypatch)
    tracer, net, opt = start()
    assert math.isnan(tracer.cost)
    with tracer:
        for batch in batches(4):
            clock.now += 2.0
            step(net, opt, batch)
            clock.now += 100.0  # what the loop does in between is neither
            clock.tick = 1.0
            tracer.step(batch)
            clock.tick = 0.0
    assert tracer.cost == pytest.approx(4 * 1 / (4 * 2))


def test_what_a_tracer_says_of_itself() -> None:
    tracer, net, opt = start(parts="noise")
    followed(tracer, net, opt, torch.arange(4))
    assert repr(tracer) == "CellTracer(SGD, 1 steps so far, parts='noise')"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clean_targets": randn(N, 1)}, r"clean targets must be like .* \(14, 2\) of torch.float"),
        ({"clean_targets": torch.zeros(N, 2).long()}, "but got .* of torch.int64"),
        ({"clean_targets": None}, "but got None"),
        ({"parts": "signal"}, "parts must be one of 'all', 'noise'"),
        ({"every": 0}, "every must be"),
        ({"points": 0}, "points must be"),
        ({"quadrature": "simpson"}, "quadrature must be one of"),
        ({"max_memory": 1000}, r'over max_memory .* follow the noise alone \(parts="noise"\)'),
        ({"max_memory": 1000, "parts": "noise"}, "over max_memory .*; pass fewer examples, or"),
        ({"optimizer": torch.optim.NAdam}, "NAdam has no rule .*realized_update"),
        (
            {"net": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()},
            "other outputs when the same inputs are repeated .dropout",
        ),
    ],
)
def test_what_is_refused_before_anything_moves(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        start(**changes)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (data()[0], "1-d tensor of example indices, but got tuple"),
        ([0, 1], "1-d tensor of example indices, but got list"),
        (data()[0][0][:5], r"but got shape \(5, 3\) of torch.float64"),
        (torch.tensor([3, 14]), "names example 14, but the training set has 14"),
    ],
)
def test_batches_are_told_by_index(batch: Any, expected: str) -> None:
    tracer, net, opt = start()
    with tracer:
        step(net, opt, torch.arange(5))
        with pytest.raises(ValueError, match=expected):
            tracer.step(batch)
        tracer.step(torch.arange(5))
    assert tracer.trace().parts[-1].step == 1
    assert not opt._optimizer_step_post_hooks


def test_another_batch_than_was_trained_on() -> None:
    tracer, net, opt = start()
    with pytest.raises(NotAnalysable, match="gradient of step 1 is not that of"):
        followed(tracer, net, opt, torch.arange(5), told=torch.arange(5, 10))
    assert not opt._optimizer_step_post_hooks


def test_a_step_that_was_not_told() -> None:
    tracer, net, opt = start()
    with pytest.raises(ValueError, match=r"call CellTracer\.step\(batch\) once after"), tracer:
        step(net, opt, torch.arange(5))


def test_weights_that_something_else_moves() -> None:
    tracer, net, opt = start()
    with tracer:
        step(net, opt, torch.arange(5))
        tracer.step(torch.arange(5))
        kept = copy.deepcopy(net.state_dict())
        net[0].weight.data.mul_(0.9)  # type: ignore[index]
        with pytest.raises(NotAnalysable, match="weights changed outside of the optimizer"):
            opt.step()
        net.load_state_dict(kept)


def test_data_that_is_written_to() -> None:
    (x, y), _, _ = data()
    tracer, net, opt = start(train=(x, y))
    tracer.__enter__()
    step(net, opt, torch.arange(5))
    tracer.step(torch.arange(5))
    y[9] += 1
    with pytest.raises(NotAnalysable, match=r"data was changed in place since .*; pass a copy"):
        tracer.__exit__(None, None, None)


def test_in_inference_mode() -> None:
    """As a callback may be called."""
    ends = list[CellTrace]()
    for inference in (False, True):
        tracer, net, opt = start(every=2)
        with tracer:
            for batch in batches(4):
                step(net, opt, batch)
                with torch.inference_mode(inference):
                    tracer.step(batch)
        with torch.inference_mode(inference):
            ends.append(tracer.trace())
    same(ends[0], ends[1])


def test_one_training_each() -> None:
    tracer, _, _ = start()
    with pytest.raises(ValueError, match="nothing was followed: train inside of `with tracer:`"):
        tracer.trace()
    with tracer:
        pass
    assert [p.step for p in tracer.trace().parts] == [0]
    with pytest.raises(ValueError, match="a CellTracer follows one training"):
        tracer.__enter__()


def test_a_trace_that_does_not_close_says_so() -> None:
    tracer, net, opt = start(
        every=30, quadrature="left", optimizer=partial(torch.optim.SGD, lr=0.5)
    )
    followed(tracer, net, opt, *batches(30))
    with pytest.warns(RuntimeWarning, match="off by .* Pass every=1"):
        tracer.trace()
