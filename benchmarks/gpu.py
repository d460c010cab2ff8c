"""What things cost on a GPU, in one run of at most 8 minutes: python benchmarks/gpu.py OUT.json.

An optimizer's step beside AdamW's, the same from a CUDA graph, whether the kernel's weights are
those of foreach, tangent kernels, second moments, a monitor and a twin. A part that fails says why
in its place, and the exit code is 1; one for which no time is left says so. ``--tiny`` measures
next to nothing, on the CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from poprisk import PopRiskAdamW, RiskMonitor, TwinRisk, entk, grad_mean_var
from poprisk._validate import first_line
from poprisk_lab.bench import environment, step, take_turns
from poprisk_lab.bench.models import BenchCase

SECONDS = 420.0
"""After which no further part begins; the longest takes well below a minute."""

OPTIMIZERS = {name: build for name, build in step.OPTIMIZERS.items() if "AdamW" in name}


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
        shapes: of parameters, by the name of their set.
        cases: networks.
        rounds: of each comparison.
        seconds: for the counted rounds of each comparison.
        steps: of training, with a monitor and with a twin.
    """

    shapes: dict[str, Sequence[tuple[int, ...]]]
    cases: Sequence[BenchCase]
    rounds: int
    seconds: float
    steps: int


FULL = Scale(
    {**step.PARAMETER_SETS, "1 × 300M": [(300_000_000,)]},
    (BenchCase("mlp", 100, 1024), BenchCase("cnn", 50, 32), BenchCase("transformer", 50, 128)),
    *(100, 3.0, 400),
)
TINY = Scale({"two": [(8, 8), (3,)]}, (BenchCase("mlp", 6, 8, 1),), 5, 0.0, 12)


class Measures:
    """The parts, on one device.

    Args:
        device: of all tensors.
        scale: how much is measured.
    """

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale = device, scale

    def parts(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """What is measured, by name; the quick ones first."""
        yield "agreement", self.agreement
        for name, shapes in self.scale.shapes.items():
            for optimizer, build in OPTIMIZERS.items():
                label = f"step: {optimizer}, {name}"
                yield label, partial(self.compared, build, shapes)
            if self.device.type == "cuda":
                yield f"step in a graph, {name}", partial(self.in_a_graph, shapes)
        for case in self.scale.cases:
            yield f"kernel: {case.label()}", partial(self.kernel, case)
            yield f"second moments: {case.label()}", partial(self.second_moments, case)
            yield f"monitor: {case.label()}", partial(self.monitor, case)
            yield f"twin: {case.label()}", partial(self.twin, case)

    def agreement(self) -> dict[str, Any]:
        """The largest difference of weights after 20 steps, fused and foreach, by dtype."""
        paths = {"fused": {"fused": True}}
        if self.device.type == "cuda":
            paths["captured"] = {"fused": True, "capturable": True}
        found = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for settings in ({}, {"reduction": "per_tensor"}, {"variance": "second-moment"}):
                foreach = self.weights(dtype, {**settings, "foreach": True})
                for name, path in paths.items():
                    apart = (self.weights(dtype, {**settings, **path}) - foreach).abs().max()
                    found[f"{name}, {dtype}, {settings}"] = float(apart)
        return {"largest_differences": found}

    def weights(self, dtype: torch.dtype, settings: dict[str, Any]) -> Tensor:
        """Weights after 20 steps, one of which meets a NaN."""
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(w) for w in self.tensors([(5000,), (7, 5), ()], generator, dtype)]
        optimizer = PopRiskAdamW(params, lr=1e-2, **settings)
        for t in range(20):
            grads = self.tensors([p.shape for p in params], generator, dtype)
            for p, g in zip(params, grads, strict=True):
                p.grad = g + (float("nan") if t == 10 and p is params[-1] else 0.5)
            with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):
                optimizer.step()
        if optimizer.skipped_steps != 1:
            raise RuntimeError(
                f"{optimizer.skipped_steps} steps were skipped, not the one with a NaN"
            )
        return torch.cat([p.detach().flatten().double() for p in params])

    def tensors(
        self, shapes: Sequence[Any], generator: torch.Generator, dtype: torch.dtype
    ) -> list[Tensor]:
        """Random numbers that do not depend on the device."""
        return [torch.randn(s, generator=generator).to(self.device, dtype) for s in shapes]

    def parameters(self, shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
        params = [nn.Parameter(torch.randn(shape, device=self.device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    def compared(self, build: step.Build, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """A step in turns with one of AdamW fused."""
        own = build(self.parameters(shapes))
        adamw = torch.optim.AdamW(self.parameters(shapes), fused=True)
        return self.turns(own.step, adamw.step)

    def in_a_graph(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Replays of a captured step, in turns with those of AdamW's."""
        graphs = []
        for kind in (PopRiskAdamW, torch.optim.AdamW):
            optimizer = kind(self.parameters(shapes), fused=True, capturable=True)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            graphs.append(graph)
        return self.turns(graphs[0].replay, graphs[1].replay)

    def turns(self, function: Callable[[], Any], baseline: Callable[[], Any]) -> dict[str, Any]:
        """Both in turn, each until the device is done."""
        own, base = (_done(f, self.synchronize) for f in (function, baseline))
        rounds, seconds = self.scale.rounds, self.scale.seconds
        return take_turns(own, base, rounds=rounds, seconds=seconds)._asdict()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def built(self, case: BenchCase) -> tuple[nn.Module, Tensor, Tensor]:
        model, x = case.build()
        y = torch.randint(0, 10, (len(x),))
        return model.to(self.device), x.to(self.device), y.to(self.device)

    def kernel(self, case: BenchCase) -> dict[str, Any]:
        """The dense tangent kernel of all outputs, beside a forward and backward pass."""
        model, x, y = self.built(case)
        found = self.turns(lambda: entk(model, x).dense(), lambda: passes(model, x, y))
        return found | self.peak(lambda: entk(model, x).dense())

    def second_moments(self, case: BenchCase) -> dict[str, Any]:
        """The variance of the batch-mean gradient, beside a forward and backward pass."""
        model, x, y = self.built(case)
        found = self.turns(
            lambda: grad_mean_var(model, losses, (x, y)), lambda: passes(model, x, y)
        )
        return found | self.peak(lambda: grad_mean_var(model, losses, (x, y)))

    def peak(self, function: Callable[[], Any]) -> dict[str, Any]:
        """Memory that a call takes beyond what there was."""
        if self.device.type != "cuda":
            return {"peak_mib": None}
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        return {"peak_mib": (torch.cuda.max_memory_allocated(self.device) - before) / 2**20}

    def monitor(self, case: BenchCase) -> dict[str, Any]:
        """Steps of training with a monitor at its defaults, beside steps without."""
        times = []
        for watched in (True, False):
            model, x, y = self.built(case)
            size = {"batch_size": len(x), "dataset_size": 10_000}
            optimizer = PopRiskAdamW(model.parameters(), lr=1e-4, fused=True, **size)
            monitor = RiskMonitor(model, losses, optimizer) if watched else None
            self.train(model, x, y, optimizer, monitor, 3)
            times.append(self.train(model, x, y, optimizer, monitor, self.scale.steps))
        return {"seconds": times[0], "plain_seconds": times[1], "added": times[0] / times[1] - 1}

    def train(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        optimizer: Optimizer,
        monitor: RiskMonitor | None,
        steps: int,
    ) -> float:
        """Seconds of a number of steps."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            passes(model, x, y)
            if monitor is not None:
                monitor.step(x, y)
            optimizer.step()
        self.synchronize()
        return time.perf_counter() - started

    def twin(self, case: BenchCase) -> dict[str, Any]:
        """Training in lockstep with a twin, and its estimate, beside training alone."""
        _, x, y = self.built(case)
        rows = torch.arange(len(x), device=self.device)

        def build(model: nn.Module) -> Optimizer:
            return PopRiskAdamW(model.parameters(), lr=1e-3, fused=True)

        twin = TwinRisk(lambda: self.built(case)[0], build, losses, dataset_size=len(x))
        started = time.perf_counter()
        for _ in range(self.scale.steps):
            for run in twin.runs(rows):
                run.optimizer.zero_grad()
                run.loss(run.model(x), y).mean().backward()
                run.optimizer.step()
        self.synchronize()
        trained = time.perf_counter()
        estimate = twin.estimate(x, y)
        model = self.built(case)[0]
        plain = self.train(model, x, y, build(model), None, self.scale.steps)
        seconds = {"seconds": trained - started, "plain_seconds": plain}
        return {
            **seconds,
            "estimate_seconds": time.perf_counter() - trained,
            "valid": estimate.valid,
        }


def _done(function: Callable[[], Any], synchronize: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        function()
        synchronize()

    return both


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def passes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One forward and backward pass."""
    model.zero_grad()
    losses(model(x), y).mean().backward()


def versions(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    about: dict[str, Any] = {"device": str(device), "triton": installed.get("triton")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        about |= {"gpu": name, "cuda": torch.version.cuda}
    return {**environment(threads=torch.get_num_threads()), **about}


def measure(measures: Measures, seconds: float) -> list[dict[str, Any]]:
    """Every part in its turn, until the time is up."""
    started, rows = time.perf_counter(), []
    for name, part in measures.parts():
        began = time.perf_counter()
        row: dict[str, Any] = {"part": name}
        if began - started > seconds:
            row["failure"] = f"left out: {seconds:.0f} s were over"
        else:
            try:
                row |= part()
            except Exception as error:
                row["failure"] = first_line(error)
        rows.append({**row, "took": time.perf_counter() - began})
        print(f"{name}: {row.get('failure') or row.get('ratio') or 'done'}", flush=True)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measure everything and write one JSON file; 1 if a part has no figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not asked.tiny:
        parser.error("there is no GPU that torch can use; --tiny runs on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(Measures(device, TINY if asked.tiny else FULL), SECONDS)
    about = {**versions(device), "tiny": asked.tiny}
    asked.out.write_text(json.dumps({"environment": about, "results": rows}, indent=1) + "\n")
    return int(any("failure" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
