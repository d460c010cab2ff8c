"""A monitor on two processes: pooled, or left out by name, and nobody waits forever."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from monitor_ranks import WORLD, batch, build, main, squared
from poprisk import RiskMonitor
from processes import Call, at_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    for process in at_once(*(Call(main, (rank, folder)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr[-3000:]
    return folder, [json.loads((folder / f"{r}.json").read_text()) for r in range(WORLD)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, dict[str, float]]]:
    """The rows of one process with whole batches."""
    model = build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(model, squared, sgd, every=1)
    for step in range(4):
        x, y = batch(step)
        squared(model(x), y).mean().backward()
        monitor.step(x, y)
        sgd.step()
        sgd.zero_grad()
    return monitor.rows


@pytest.mark.parametrize("case", ["ddp", "told"])
def test_rows_are_those_of_whole_batches(results: Any, expected: Any, case: str) -> None:
    for rank in results[1]:
        assert rank[case]["said"] == []
        assert [step for step, _ in rank[case]["rows"]] == [0, 1, 2, 3]
        for (_, row), (_, whole) in zip(rank[case]["rows"], expected, strict=True):
            for name in ("loss", "signal/steps", "signal/snr", "signal/noise_scale/0"):
                assert row[name] == pytest.approx(whole[name], rel=1e-6)
        # Errors, and by them the share, are those of pairs within parts.
        assert row["signal/share"] == pytest.approx(whole["signal/share"], abs=0.05)
        assert 0.2 < row["signal/share_error"] / whole["signal/share_error"] < 5


def test_one_rank_writes(results: Any) -> None:
    folder, ranks = results
    assert not (folder / "1.jsonl").exists()
    lines = [json.loads(line) for line in (folder / "0.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [row["loss"] for _, row in ranks[0]["ddp"]["rows"]]


@pytest.mark.parametrize(
    ("case", "alone"),
    [("ddp", "alone"), ("told", "alone"), ("fails", "alone"), ("fsdp", "fsdp alone")],
)
def test_training_is_the_same_with_and_without(results: Any, case: str, alone: str) -> None:
    for rank in results[1]:
        assert rank[case]["weights"] == rank[alone]["weights"]


def test_what_fails_on_one_rank_is_nan_on_all(results: Any) -> None:
    first, second = (rank["fails"] for rank in results[1])
    assert first["said"] == []
    assert len(second["said"]) == 1
    assert "bad data" in second["said"][0]
    for rank in (first, second):
        assert len(rank["rows"]) == 4
        assert all(math.isnan(row["loss"]) for _, row in rank["rows"])


def test_sharded_weights_have_a_loss_and_no_signal(results: Any, expected: Any) -> None:
    for rank in results[1]:
        assert len(rank["fsdp"]["said"]) == 1
        assert "cannot measure signal: it needs per-example" in rank["fsdp"]["said"][0]
        for (_, row), (_, whole) in zip(rank["fsdp"]["rows"], expected, strict=True):
            assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            assert math.isnan(row["signal/share"])


def test_a_rank_without_a_batch_lets_nobody_wait(results: Any) -> None:
    first, second = (rank["uneven"]["rows"] for rank in results[1])
    assert [step for step, _ in first] == [0, 1, 2, 3]
    assert first == second


def test_a_monitor_on_one_rank_alone_says_so(results: Any) -> None:
    first, second = (rank["only first"] for rank in results[1])
    assert len(first["rows"]) == 4
    assert len(first["said"]) == 1
    assert "measures rank 0 alone" in first["said"][0]
    assert second["rows"] == []
    assert first["weights"] == second["weights"]
