"""The risk estimates on two processes: the numbers of one, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed

from processes import Call, at_once
from risk_ranks import WORLD, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in at_once(*(Call(main, (rank, folder)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_a_twin_under_ddp_is_that_of_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result["ddp"]
        assert found.pop("apart") == 0
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("case", ["fresh DDP", "fresh FSDP", "twin FSDP"])
def test_what_does_not_go_is_refused_by_name(results: list[dict[str, Any]], case: str) -> None:
    for result in results:
        message = result["refused"][case]
        assert message.startswith("ValueError: ")
        assert ("sharded (FSDP, DTensor)" in message) == ("FSDP" in case)
        assert ("all processes' batches" in message) == ("DDP" in case)


@pytest.mark.parametrize("what", ["canaries", "loo"])
def test_every_process_says_the_same(results: list[dict[str, Any]], what: str) -> None:
    first, second = (r["local"][what] for r in results)
    assert first == pytest.approx(second, rel=1e-12)
