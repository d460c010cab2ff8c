"""The cells in lockstep with training, against those of a record of the same run."""

from typing import Any

import pytest
import torch
from torch import nn

from poprisk import Run
from poprisk.path import CellTrace, CellTracer, Recorder, trace_cells
from runs import LOSSES, OPTIMIZERS, batches, data, network


def trained(
    optimizer: str = "AdamW",
    kind: str = "cross_entropy",
    *,
    steps: int = 8,
    b: int | None = 5,
    **settings: Any,
) -> tuple[CellTracer, Run, nn.Module]:
    """A training that was followed and recorded at once."""
    train, query, clean = data(kind)
    net = network()
    opt = OPTIMIZERS[optimizer](net.parameters())
    loss = LOSSES[kind]
    common: dict[str, Any] = {"train": train, "query": query}
    tracer = CellTracer(net, loss, opt, clean_targets=clean, **common, **settings)
    with Recorder(net, loss, opt, **common) as recorder, tracer:
        per_example = recorder.problem.loss
        for batch in batches(steps, b=b):
            opt.zero_grad()
            per_example(net(train[0][batch]), train[1][batch]).mean().backward()
            opt.step()
            tracer.step(batch)
            recorder.step(batch)
    return tracer, recorder.run, net


def same(found: CellTrace, expected: CellTrace) -> None:
    assert [p.step for p in found.parts] == [p.step for p in expected.parts]
    for a, b in zip(found.parts, expected.parts, strict=True):
        for name in ("signal", "noise", "affine", "outputs"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.start, expected.start, rtol=0, atol=0)
    assert found.output_shape == expected.output_shape


EXACT: dict[str, Any] = {"every": 1, "quadrature": "gauss3"}
CHEAP: dict[str, Any] = {"every": 3, "quadrature": "midpoint"}


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
@pytest.mark.parametrize("settings", [EXACT, CHEAP], ids=["exact", "cheap"])
def test_the_cells_are_those_of_a_record(optimizer: str, settings: dict[str, Any]) -> None:
    tracer, run, _ = trained(optimizer, points=9, **settings)
    points = len(run) + 1 if settings is EXACT else 4  # updates after 3, 6 and 8 steps
    expected = trace_cells(run, data("cross_entropy")[2], points=points, **settings)
    same(tracer.trace(), expected)
    assert tracer.trace().closure == pytest.approx(expected.closure, rel=1e-4, abs=1e-11)
    if settings is EXACT:
        assert tracer.trace().closure.worst < 1e-7
