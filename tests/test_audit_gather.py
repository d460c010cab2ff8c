"""An audit on several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from audit_ranks import WORLD, C, N, feed, given, main, outputs_at
from poprisk import Auditor
from poprisk.audit.gather import merged, part_of
from processes import Call, at_once


def test_parts_put_together_are_the_whole() -> None:
    whole, halves = Auditor(given()), [Auditor(given()), Auditor(given())]
    for epoch in range(4):
        feed(whole, epoch, [range(N)])
        for k, half in enumerate(halves):
            feed(half, epoch, [range(k, N, 2)])
            half.end_look()
        whole.end_look()
    found = merged([part_of(h.predictions, h.looks, k) for k, h in enumerate(halves)], N, C)
    expected = whole.predictions
    torch.testing.assert_close(found.average, expected.average)
    torch.testing.assert_close(found.last, expected.last)
    assert torch.equal(found.weight, expected.weight)
    torch.testing.assert_close(found.history, expected.history[:, :4], equal_nan=True)
    assert found.not_finite == 1
    for one, look in zip(found.looks, whole.looks, strict=True):
        assert one[:2] == look[:2]
        assert one[2:4] == pytest.approx(look[2:4])
        assert one.memorization is not None


def test_an_example_that_both_have_seen_has_the_later_as_its_last() -> None:
    first, second = Auditor(given(), plant=0), Auditor(given(), plant=0)
    feed(first, 0, [[0, 1]])
    first.end_look()
    feed(second, 1, [[5]])
    second.end_look()
    feed(second, 2, [[1]])
    second.end_look()
    found = merged([part_of(a.predictions, a.looks, 0) for a in (first, second)], N, C)
    p = [outputs_at(epoch).softmax(1) for epoch in range(3)]
    torch.testing.assert_close(found.last[[0, 1, 5]], torch.stack([p[0][0], p[2][1], p[1][5]]))
    torch.testing.assert_close(found.average[1], (p[0][1] + 2 * p[2][1]) / 3)
    assert found.weight.nonzero().squeeze(1).tolist() == [0, 1, 5]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_every_process_gets_the_result_of_one(tmp_path: Path) -> None:
    for process in at_once(*(Call(main, (rank, tmp_path)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    found: list[Any] = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(WORLD)]
    assert found[0] == found[1]
    alone = Auditor(given())
    for epoch in range(3):
        feed(alone, epoch, [range(N)])
        alone.end_look()
    expected = alone.result()
    np.testing.assert_allclose(found[0]["margin"], expected.margin, atol=1e-4)
    assert found[0]["suspects"] == expected.suspects().tolist()
    assert expected.recall is not None
    assert found[0]["recall"] == pytest.approx(expected.recall.value)
    assert found[0]["looks"] == 3
