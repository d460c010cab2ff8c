"""The gate in a Kronecker basis on three processes, against one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from poprisk.dtensor import ShardLayout
from processes import Call, at_once
from soap_ranks import HANDED, TRAINED, WORLD, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
ROUNDING = 1e-10
"""Of weights of about one in float64, a dozen steps and a division by 1e-4 later."""


Ranks = Callable[[str], list[Any]]
"""What each process found in a part."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    @functools.cache
    def found(part: str) -> list[Any]:
        folder = tmp_path_factory.mktemp(part)
        for process in at_once(*(Call(main, (rank, folder, part)) for rank in range(WORLD))):
            assert process.code == 0, process.stderr[-3000:]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]

    return found


@pytest.mark.parametrize("name", TRAINED)
def test_shards_are_trained_as_one_piece(ranks: Ranks, name: str) -> None:
    """With shards of unequal sizes, and processes without rows."""
    for found in (result[name] for result in ranks("trained")):
        assert found["apart"] <= ROUNDING
        split, whole = found["statistics"]
        assert len(split) == len(whole) == (0 if name == "ungated" else 3)
        for a, b in zip(split, whole, strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
        if name == "ema":
            assert 0 < split[0][0] < 1


def test_no_process_keeps_a_whole_matrix(ranks: Ranks) -> None:
    averages = ("exp_avg", "exp_avg_sq", "grad_mean_var")
    squares = ("left_factor", "right_factor", "left_basis", "right_basis")
    results = ranks("trained")
    kept = [result["kept"] for result in results]
    assert [rows[2]["exp_avg"] // 5 for rows in kept] == [2, 2, 0]
    assert all(not any(result["whole"]) for result in results)
    first = {**dict.fromkeys(averages, (10, 10, 5)), **dict.fromkeys(squares, (10, 10, 5))}
    third = dict.fromkeys(averages, (10, 10, 0))
    third |= {k: (8, 8, 0) if k.startswith("left") else (10, 10, 5) for k in squares}
    for i, expected in ((0, first), (2, third)):
        assert {k: tuple(rows[i][k] for rows in kept) for k in kept[0][i]} == expected


def test_sums_go_over_strided_shards_too() -> None:
    """As FSDP2 makes them of what tensor parallelism has split; they deny ``is_shard()``."""
    mesh = mock.Mock(get_group=int)
    places = (_StridedShard(0, split_factor=2), Shard(0), Replicate(), Shard(1))
    layout = ShardLayout(mesh, places)
    assert layout.groups() == [0, 1, 3]
    assert layout.by_rows().placements == (Shard(0), Shard(0), Replicate(), Shard(0))


@pytest.mark.parametrize("name", HANDED)
def test_placements_of_all_kinds_are_one_piece(ranks: Ranks, name: str) -> None:
    assert all(result[name] <= ROUNDING for result in ranks("handed"))


def test_parts_are_of_one_basis_where_processes_find_others(ranks: Ranks) -> None:
    assert all(apart <= ROUNDING for apart in ranks("disagreeing"))


def test_replicas_stay_alike_bit_for_bit(ranks: Ranks) -> None:
    """Under DDP, and as one process with the whole batch."""
    found = ranks("ddp")
    assert all(x["apart"] <= ROUNDING for x in found)
    assert all(x["weights"] == found[0]["weights"] for x in found)


@pytest.mark.parametrize(
    "way", ["shards to one", "shards to shards", "one to shards", "a whole state to shards"]
)
def test_a_checkpoint_goes_on(ranks: Ranks, way: str) -> None:
    assert all(result[way] <= ROUNDING for result in ranks("resumed"))


def test_every_process_skips_what_one_must_skip(ranks: Ranks) -> None:
    for result in ranks("skipped"):
        assert (result["skipped"], result["unchanged"]) == (1, True)
        assert result["apart"] <= ROUNDING


REFUSED = {
    "examples": "factors='examples', variance='exact'; use factors=\"gradient\" with",
    "exact": "factors='gradient', variance='exact'; use factors=\"gradient\" with",
    "a summand": "each process has a summand",
    "offloaded": "a parameter on 'cpu' has one of 'cuda' (offloaded?)",
    "settings of a state": "factors='examples', variance='exact'; use",
    "a whole state": "is whole, but is kept sharded as (Shard(dim=0),)",
    "a whole state for coordinates": "is whole, but is kept sharded as (Shard(dim=0),)",
    "shards of a state": "is sharded as (Shard(dim=0),), but is kept whole",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_moves(ranks: Ranks, name: str) -> None:
    for result in ranks("refused"):
        assert REFUSED[name] in result[name]
        assert result["apart"] <= ROUNDING
