"""Every result shows itself in a few lines, however large it is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import poprisk
from poprisk import attribution, linalg, ntk, path, per_sample, risk, spectrum
from poprisk import task as tasks
from poprisk.optim import stats
from poprisk.path import drift
from poprisk.printing import WIDTH, brief, described, short_repr
from poprisk_lab.studies.drift_laws import DriftLaws
from samplers import randn

LINES, CHARACTERS = 5, 600
PACKAGES = (attribution, linalg, ntk, path, per_sample, risk, spectrum, stats, tasks)
N, M = 24, 16


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def recorded() -> tuple[path.Run, Tensor, path.Recorder]:
    x, clean = randn(N + M, 3), randn(N + M, 2, seed=1)
    model, y = net(), clean + 0.3 * randn(N + M, 2, seed=2)
    drawn = list(torch.arange(N).repeat(4).split(6))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = path.record(model, squared, adamw, drawn, (x[N:], y[N:]), train=(x[:N], y[:N]))
    recorder = path.Recorder(model, squared, adamw, train=(x[:N], y[:N]))
    return run, clean[:N], recorder


def replayed() -> poprisk.Replay:
    x, y = randn(N + M, 3), randn(N + M, 2, seed=1)
    model = net()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    drawn, query = list(torch.arange(N).split(6)), (x[N:], y[N:])
    return poprisk.replay(model, squared, adamw, drawn, query, train=(x[:N], y[:N]))


def power(value: float, low: float, high: float) -> drift.Exponent:
    return drift.Exponent(value, low, high, 0.05, True, "", 8.0)


def twins() -> tuple[risk.TwinRisk, risk.RiskEstimate]:
    x, y = randn(N, 3), randn(N, 2, seed=1)
    twin = risk.TwinRisk(net, sgd, squared, dataset_size=N)
    for index in torch.arange(N).repeat(3).split(6):
        for run in twin.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(x[index]), y[index]).mean().backward()
            run.optimizer.step()
    return twin, twin.estimate(x, y)


def monitored() -> poprisk.RiskMonitor:
    model = net()
    optimizer = poprisk.PopRiskAdamW(model, lr=1e-3)
    monitor = poprisk.RiskMonitor(model, squared, optimizer, every=1)
    for _ in range(3):
        monitor.step(randn(8, 3), randn(8, 2))
    return monitor


def results() -> Iterator[Any]:
    """What a user may print, of a realistic size."""
    run, clean, recorder = recorded()
    repeatable = replayed()
    yield from (repeatable, poprisk.attribute(repeatable), repeatable.saved[0])
    yield poprisk.attribute(repeatable, measure=lambda u, y: u[:, 0])
    ops = poprisk.path_operators(run)
    yield from (run, recorder, ops, run.problem, run.weights, run.intervals[0])
    yield run.rule(0, torch.float64)
    yield from (ops.integrals, ops, ops.integrals.affine, ops.integrals.snapshots[0])
    yield from (ops.closure, ops.accounting, ops.spectrum, ops.channel(1e-3), ops.coupling())
    yield from (ops.coupling().prediction, ops.noise_gain(), ops.four_cells(clean))
    yield from (ops.four_cells(clean).cells, ops.four_cells(clean).error)
    yield ops.cells_over_time(clean)[0]
    trace = poprisk.trace_cells(run, clean)
    yield from (trace, trace.parts[-1])
    followed = path.follow(run, run_probe(run))
    yield from (followed, followed.applied, followed.moments[0])
    found = poprisk.loo_risk(run, subset=4)
    yield found
    twin, estimate = twins()
    yield from (twin, estimate, twin.replicas[0])
    model = net()
    yield poprisk.Lockstep(model, sgd(model), squared, dataset_size=N)
    yield poprisk.RiskCurve()
    yield twin.outputs([(randn(N, 3), randn(N, 2), torch.arange(N))])
    stop = poprisk.stopping_point([estimate] * 40)
    yield from (stop, poprisk.select({f"arm {i}": [estimate] * 9 for i in range(40)}))
    bad = dataclasses.replace(estimate, valid=False, comparable=False, reason="a reason " * 90)
    yield from (bad, poprisk.select({f"arm {i}": [bad] for i in range(40)}))
    classes = torch.arange(1000) % 10
    canaries = poprisk.Canaries(classes)
    logits = randn(1000, 10)
    yield from (canaries, canaries.memorization(logits), canaries.error_bound(logits))
    yield poprisk.Canaries(randn(500, 2))
    auditor = poprisk.Auditor(classes)
    auditor.update(torch.arange(1000), logits, auditor.targets)
    result = auditor.result()
    yield from (auditor, result, result.second_round(), result.wrong_share, *result.looks)
    square = poprisk.entk(net(), randn(N, 3))
    yield from (square, poprisk.entk(net(), randn(N, 3), randn(M, 3)), square.eigsh(5))
    yield from (square.trace(), square.spectrum(5, targets=randn(N, 2)))
    yield from (monitored(), poprisk.GateStats(0.5, 0.5, 0.5, False, 9))
    yield from (task(), task().scored_by, power(1.0, 0.9, 1.1))
    yield drift.Movement([1, 2], *[randn(2, 400)] * 3)
    one, half = power(1.0, 0.9, 1.1), power(0.5, 0.4, 0.6)
    yield DriftLaws(one, half, None, None, 8)


def run_probe(run: path.Run) -> Tensor:
    return randn(run.problem.n, run.problem.c, 1)


def task() -> poprisk.Task:
    return poprisk.Task("a task", net, squared, (randn(500, 3), randn(500, 2)),
                        (randn(99, 3), randn(99, 2)), metric="mse")  # fmt: skip


def test_every_result_is_a_few_lines() -> None:
    seen = list(results())
    for value in seen:
        text = repr(value)
        assert text.startswith(type(value).__name__), text
        assert len(text.splitlines()) <= LINES, text
        assert len(text) <= CHARACTERS, text
        assert " at 0x" not in text, text
    kinds = {type(value) for value in seen}
    wanted = {
        value
        for name in poprisk.__all__
        if inspect.isclass(value := getattr(poprisk, name))
        and not issubclass(value, (Optimizer, Exception))  # these show themselves as torch's do
    }
    never = {poprisk.AdaptationGap, poprisk.FreshBatchRisk}  # see the next test
    never |= {poprisk.Estimated, poprisk.ProgressCallback}  # protocols
    assert wanted - kinds - never == set()


def result_classes() -> Iterator[type]:
    """NamedTuples and dataclasses that the library's packages define and may hand out."""
    for package in PACKAGES:
        found = pkgutil.iter_modules(getattr(package, "__path__", []), f"{package.__name__}.")
        for module in (package, *(importlib.import_module(m.name) for m in found)):
            for value in vars(module).values():
                here = inspect.isclass(value) and value.__module__ == module.__name__
                if here and (hasattr(value, "_fields") or dataclasses.is_dataclass(value)):
                    yield value


INTERNAL = {  # never returned to a user: parts of how something is computed
    *("Site", "OneHot", "Outer", "Dense", "Outline", "Plan", "Layout", "Use", "Graph"),
    *("Footprint", "Description", "ResponsePart", "Convection"),
    *("Adjoint", "Pulled", "BackwardStep", "TakenStep"),
}


def public_result_classes() -> list[type]:
    found = {c for c in result_classes() if not c.__name__.startswith("_")}
    return sorted({c for c in found if c.__name__ not in INTERNAL}, key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", public_result_classes(), ids=lambda c: c.__name__)
def test_every_result_class_has_a_short_form(kind: type) -> None:
    """Filled with large tensors, long lists and texts."""
    assert "__repr__" in vars(kind), f"{kind} shows itself as Python does"
    if vars(kind)["__repr__"] is not short_repr:
        return  # has words of its own, and is printed above
    large: list[Any] = [torch.zeros(300, 300), [torch.zeros(9)] * 500, "text " * 300, 1 / 3]
    names = getattr(kind, "_fields", None) or [f.name for f in dataclasses.fields(kind)]
    for filling in large:
        value = object.__new__(kind) if dataclasses.is_dataclass(kind) else None
        if value is None:
            value = kind(*[filling] * len(names))
        else:
            value.__dict__.update(dict.fromkeys(names, filling))
        text = repr(value)
        assert len(text) <= CHARACTERS
        assert len(text.splitlines()) == 1


def test_results_show_themselves_as_html_with_every_text_escaped() -> None:
    seen = list(results())
    tables = {type(v): v._repr_html_() for v in seen if hasattr(v, "_repr_html_")}
    found = [v for v in seen if hasattr(v, "valid")]
    assert {path.Run, risk.RiskEstimate, *map(type, found)} <= tables.keys()
    for kind, html in tables.items():
        assert html.startswith(f"<table><thead><tr><th>{kind.__name__}</th>")
        assert len(html) < 4000
    estimate = next(v for v in found if isinstance(v, risk.RiskEstimate))
    marked = dataclasses.replace(estimate, reason="<b>a & b")
    assert "<tr><td>reason</td><td>&#x27;&lt;b&gt;a &amp; b&#x27;</td></tr>" in marked._repr_html_()
    assert f"<td>value</td><td>{brief(estimate.value)}</td>" in marked._repr_html_()


def test_numbers_texts_and_shapes_in_brief() -> None:
    assert brief(0.123456789) == "0.1235"
    assert brief(1.0) == "1.0"
    assert brief(torch.tensor(2.5)) == "2.5"
    assert brief(torch.zeros(3, 4, requires_grad=True)) == "Tensor(3, 4)"
    assert brief([1, 2]) == "[1, 2]"
    assert brief((1,)) == "(1,)"
    assert brief([0.5] * 9) == "[9 × float]"
    assert brief({"a": 1}) == "{'a': 1}"
    assert brief({i: torch.zeros(2) for i in range(9)}) == "{9 × Tensor}"
    assert brief([torch.zeros(2), None]) == "[2 × entries]"
    assert brief(nn.Linear(1, 1)) == "Linear"
    assert brief(squared) == "squared"
    assert brief("x" * 500).endswith("…'")
    assert brief(None) == "None"
    assert brief(object()) == "<object>"
    assert len(described("Name", *["word"] * 999)) == WIDTH
    deep = DriftLaws(power(1.0, 0.5, 1.5), power(1, 1, 1), None, None, 3)
    assert repr(deep).startswith("DriftLaws(drift=Exponent(value=1.0, low=0.5, high=1.5, ")
    assert brief([deep]) == "[1 × DriftLaws]"
