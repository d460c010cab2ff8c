"""The benchmarks measure what they say, on tiny parameters."""

from __future__ import annotations

import json
import runpy
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from typer.testing import CliRunner

from poprisk import PopRiskAdamW
from poprisk_lab import bench, cli
from poprisk_lab.bench import gated, kernel, peers, step
from poprisk_lab.bench.models import BenchCase
from poprisk_lab.bench.published import PublishedUpdate
from samplers import copies, noisy_grads, parameter, take_steps


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PARAMETER_SETS", {"two": [(8, 8), (8, 8)]})
    monkeypatch.setattr(step, "bench_cold_start", lambda: step.ColdStart(1.0, 0.5))


def test_turns_are_taken_and_ratios_pair_up() -> None:
    calls: list[str] = []
    ratio = bench.take_turns(
        lambda: calls.append("own"), lambda: calls.append("base"), rounds=6, seconds=100
    )
    assert calls == ["own", "base"] * (bench.WARM_UP + 6)
    assert ratio.ratio_low <= ratio.ratio <= ratio.ratio_high


def test_a_failure_without_a_text_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOMENTS", {"none": Mock(side_effect=MemoryError)})
    assert kernel.moment_seconds(BenchCase("mlp", 3, 4), 1) == {"none": "MemoryError"}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("command", [["bench"], ["bench", "step"]])
def test_both_commands_write_the_same_kind_of_result(tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "new" / "step.json"
    result = CliRunner().invoke(cli.app, [*command, "--steps", "5", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["cold_start_seconds"] == {"compiling": 1.0, "from_cache": 0.5}
    assert found["environment"]["threads"] == 1
    state = {row["optimizer"]: row["state"] for row in found["results"]}
    assert state["PopRiskAdamW fused"] == pytest.approx(3.0, abs=0.1)
    assert state["PopRiskAdamW fused, second-moment"] == pytest.approx(2.0, abs=0.1)
    assert ("Muon" in state) is hasattr(torch.optim, "Muon")


def test_gated_steps_are_timed_beside_those_they_wrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated, "GATED_SETS", {"two": [(8, 8), (8,)]})
    out = tmp_path / "gated.json"
    result = CliRunner().invoke(cli.app, ["bench", "gated", "--steps", "5", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    assert [(r["optimizer"], r["fused"]) for r in found] == [
        (name, fused) for name in gated.WRAPPED for fused in (True, False)
    ]
    assert all(r["milliseconds"] > 0 < r["ratio_low"] <= r["ratio"] for r in found)


@pytest.mark.long
def test_kernels_are_measured_each_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot run says why, beside those that can."""
    case = BenchCase("mlp", 3, 4)
    monkeypatch.setattr(kernel, "KERNEL_CASES", [(case, ["poprisk", "torch.func", "curvlinops"])])
    monkeypatch.setattr(kernel, "MOMENT_CASES", [case])
    monkeypatch.setattr(kernel, "MOMENTS", dict([*peers.MOMENTS.items()][:2]))
    out = tmp_path / "kernel.json"
    command = ["bench", "kernel", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    rows = {(r["what"], r["method"]): r for r in json.loads(out.read_text())["results"]}
    assert rows["kernel", "poprisk"]["ratio"] == rows["moments", "forward + backward"]["ratio"] == 1
    assert rows["kernel", "torch.func"]["seconds"] > 0
    assert rows["moments", "poprisk"]["ratio"] > 0
    said = None if find_spec("curvlinops") else "curvlinops is not installed"
    assert rows["kernel", "curvlinops"]["failure"] == said


@pytest.mark.usefixtures("tiny")
def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ("no_such_package", step.PEERS["torchao AdamW, 8-bit state"][1])
    monkeypatch.setattr(step, "PEERS", {"absent": absent})
    assert "absent" not in step.optimizers_for([(8,)])
    results = step.bench_steps(threads=1, steps=2)
    assert step.bench_table(results).about.endswith("not installed: no_such_package")


def test_growth_goes_over_parameters_and_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PARAMETER_SETS", {})
    monkeypatch.setattr(step, "GROWTH_SETS", {"1": [(8,)], "2": [(4,)] * 2})
    assert step.bench_steps(threads=1, steps=2) == []
    found = step.bench_steps(threads=1, steps=2, growth=True)
    assert [(r.parameters, r.optimizer) for r in found] == [
        (name, optimizer) for name in ("1", "2") for optimizer in step.OURS_ON_GROWTH
    ]


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_a_case_has_the_outputs_that_it_says(kind: str) -> None:
    case = BenchCase(kind, 2, 8, 1, 4, outputs=3)
    model, x = case.build()
    assert model(x).shape == (2, 3)
    assert ", 3 outputs, n=2" in case.label()
    assert "outputs" not in case._replace(outputs=10).label()


def test_muon_is_left_out_where_there_are_vectors() -> None:
    assert "Muon" not in step.optimizers_for([(8, 8), (8,)])


def test_the_published_update_is_mode_paper() -> None:
    start, grads = parameter(5), [[g] for g in noisy_grads(30, 5)]
    published = take_steps(PublishedUpdate(copies([start])), grads)[-1]
    paper = PopRiskAdamW(copies([start]), mask="snr", mode="paper", softness=1.0)
    torch.testing.assert_close(published, take_steps(paper, grads)[-1], rtol=1e-12, atol=1e-12)


def test_state_size_counts_bytes() -> None:
    w = Parameter(torch.zeros(10, dtype=torch.float64))
    w.grad = torch.ones_like(w)
    opt = PopRiskAdamW([w])
    opt.step()
    assert step.state_size(opt) == 3 * 10 * 8 + 4


def test_state_is_counted_where_it_lies_deeper() -> None:
    packed = TwoTensor(torch.zeros(5), torch.ones(5))
    listed = [torch.zeros(4), (torch.zeros(2),), []]
    state: Any = {"w": {0: {"m": torch.zeros(3), "done": {0}}, "packed": packed, "L": listed}}
    optimizer: Any = SimpleNamespace(state=state)
    assert step.state_size(optimizer) == 3 * 4 + 2 * 5 * 4 + 6 * 4


gpu: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gpu.py"))
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the whole of it then runs on the GPU")
def test_what_is_measured_on_a_gpu_can_be_measured(tmp_path: Path) -> None:
    """Each part in its smallest form, on the CPU."""
    out = tmp_path / "gpu.json"
    assert gpu.main([str(out), "--tiny"]) == 0
    found = json.loads(out.read_text())
    assert found["environment"]["device"] == "cpu"
    assert found["environment"]["gpu"] == "not measured"
    rows = {row["part"].partition(":")[0]: row for row in found["results"]}
    assert [*rows] == ["agreement", "step", "kernel", "second moments", "monitor", "twin"]
    assert rows["kernel"]["ratio"] > 0
    assert rows["monitor"]["seconds"] > 0
    assert max(rows["agreement"]["largest_differences"].values()) < 0.01
    with pytest.raises(SystemExit):
        gpu.main([str(out)])


def test_a_part_that_fails_says_so_and_one_without_time_too() -> None:
    def fails() -> dict[str, Any]:
        time.sleep(0.001)
        raise RuntimeError("out of memory\nfor good")

    parts = SimpleNamespace(parts=lambda: iter([("first", fails), ("second", fails)]))
    first, second = gpu.measure(parts, 0.0005)
    assert first["failure"] == "RuntimeError: out of memory"
    assert second["failure"].startswith("left out")
