"""Two processes against one: DDP, FSDP2, checkpoints that change their number of processes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed

from processes import Call, at_once
from ranks import GATED, SETTINGS, WORLD, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    for process in at_once(*(Call(main, (rank, folder)) for rank in range(WORLD))):
        assert process.code == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_are_one(results: list[dict[str, Any]], wrapper: str, settings: str) -> None:
    assert all(result[wrapper][settings] <= 1e-12 for result in results)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_gate_on_another_optimizer_on_two_processes_is_that_on_one(
    results: list[dict[str, Any]], wrapper: str, name: str
) -> None:
    """With odd shards, an empty one, and a checkpoint on the way."""
    for result in results:
        found = result[f"gated {wrapper}"][name]
        assert found["apart"] <= 1e-12
        assert found["resumed"] <= 1e-13
        shared, whole = found["statistics"]
        assert shared == pytest.approx(whole)


def test_a_process_whose_optimizer_fails_has_its_weights_back(
    results: list[dict[str, Any]],
) -> None:
    assert results[1]["failing"] == {"raised": True, "unchanged": True}
    assert not results[0]["failing"]["raised"]


@pytest.mark.parametrize("reduction", ["None", "per_tensor"])
def test_gate_stats_of_shards_are_those_of_whole_tensors(
    results: list[dict[str, Any]], reduction: str
) -> None:
    for result in results:
        sharded, whole = result["statistics"][reduction]
        assert sharded.keys() == whole.keys()
        for name, values in whole.items():
            assert sharded[name] == pytest.approx(values)


def test_processes_tell_the_variance_of_their_mean(results: list[dict[str, Any]]) -> None:
    """Clipped gradients have a clipped variance; without the hook there is a clear error."""
    for result in results:
        assert result["observed"]["apart"] <= 1e-10
        assert result["observed"]["moved"]
        assert "observe_ranks" in result["observed"]["message"]


@pytest.mark.parametrize("wrapper", ["ddp", "ddp views", "fsdp"])
def test_what_looks_within_a_batch_is_refused_before_weights_move(
    results: list[dict[str, Any]], wrapper: str
) -> None:
    for result in results:
        steps = {k: v for k, v in result["within"][wrapper].items() if isinstance(v, dict)}
        assert len(steps) == 3
        for name, found in steps.items():
            assert found["unchanged"]
            expected = "DTensor" if wrapper == "fsdp" else "DistributedDataParallel"
            assert ("Distributed" if name == "observe_ranks" else expected) in found["message"]


@pytest.mark.parametrize("measure", ["grad_mean_var", "entk"])
def test_measurements_look_through_ddp_and_refuse_shards(
    results: list[dict[str, Any]], measure: str
) -> None:
    for result in results:
        assert result["within"]["ddp"][measure] <= 1e-12
        assert "DTensor (FSDP2" in result["within"]["fsdp"][measure]


def test_every_process_skips_what_one_process_must_skip(results: list[dict[str, Any]]) -> None:
    assert [result["skipped"] for result in results] == [{"skipped": 1, "unchanged": True}] * WORLD


@pytest.mark.parametrize("case", ["resharded to one", "again on two"])
def test_a_distributed_checkpoint_goes_on(results: list[dict[str, Any]], case: str) -> None:
    assert all(result["checkpoint"][case] <= 1e-12 for result in results)


def test_a_record_under_wrappers_is_refused_or_of_the_whole_batch(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        found = result["recorded"]
        assert "wrapped in DistributedDataParallel" in found["ddp"]
        assert "pass the module inside (model.module)" in found["ddp"]
        assert "DTensors (FSDP2?): '0.weight', '0.bias', '2.weight' and 3 more" in found["fsdp"]
        assert not found["ddp moved"]
        assert not found["fsdp moved"]
        assert found["whole"] < 1e-6
        assert "gradient of step 1 is not that of the recorded loss" in found["own"]


gpt: Any = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "gpt.py")))


def gpt_process(mode: str, rank: int, folder: Path) -> None:
    """One process of the GPT, of two blocks: a block more is compiled as these are."""
    store, out = folder / f"{mode}.store", folder / f"{mode}.pt"
    gpt.work(mode, rank, 3, "aot_eager", str(out), str(store), width=32, layers=2)


@pytest.mark.long
def test_a_small_gpt_with_compile_amp_and_accumulation(tmp_path: Path) -> None:
    """Three steps of a part: benchmarks/results/gpt.json has a longer run of the whole."""
    places = [(mode, rank) for mode in gpt.MODES for rank in range(1 if mode == "single" else 2)]
    for process in at_once(*(Call(gpt_process, (*place, tmp_path)) for place in places)):
        assert process.code == 0, process.stderr
    runs = gpt.compared(
        {mode: torch.load(tmp_path / f"{mode}.pt", weights_only=True) for mode in gpt.MODES}
    )
    for mode in ("ddp", "fsdp"):
        assert runs[mode]["largest_relative_loss_difference"] <= 1e-4
        assert runs[mode]["relative_weight_difference"] <= 1e-4


def test_the_committed_run_of_the_gpt_agrees_to_the_order_of_sums() -> None:
    found = json.loads((BENCHMARKS / "results" / "gpt.json").read_text())
    assert (found["backend"], found["steps"] >= 60) == ("inductor", True)
    assert found["parameters"] > 1_000_000
    for mode in ("ddp", "fsdp"):
        run = found["runs"][mode]
        assert run["loss_last"] < 0.7 * run["loss_first"]
        assert run["largest_relative_loss_difference"] <= 0.01
