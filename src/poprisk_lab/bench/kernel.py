"""Time and memory of tangent kernels and exact second moments, beside other libraries."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from poprisk_lab.bench.models import BenchCase
from poprisk_lab.bench.peers import KERNELS, MOMENTS

WARM_UP = 4
OURS = "poprisk"

KERNEL_CASES: Sequence[tuple[BenchCase, Sequence[str]]] = (
    (BenchCase("mlp", 100, 1024), ("poprisk", "torch.func", "nngeometry")),
    (BenchCase("mlp", 500, 1024), ("poprisk",)),
    (BenchCase("mlp", 10, 64), ("poprisk", "torch.func", "nngeometry", "curvlinops")),
    (BenchCase("cnn", 24, 16), ("poprisk", "torch.func", "nngeometry")),
    (BenchCase("cnn", 50, 32), ("poprisk", "torch.func")),
    (BenchCase("transformer", 24, 64), ("poprisk", "torch.func")),
    (BenchCase("transformer", 50, 128), ("poprisk", "torch.func")),
)
GROWTH_CASES: Sequence[BenchCase] = (
    *(BenchCase("mlp", n, 512) for n in (50, 100, 200, 400)),
    *(BenchCase("mlp", 100, width) for width in (256, 512, 1024, 2048)),
    *(BenchCase("mlp", 100, 512, depth) for depth in (2, 4, 8)),
    *(BenchCase("transformer", 16, 64, 2, length) for length in (16, 32, 64, 128)),
)
MOMENT_CASES: Sequence[BenchCase] = (BenchCase("mlp", 64, 1024), BenchCase("transformer", 64, 128))


class Measurement(NamedTuple):
    """One method on one case.

    Attributes:
        what: ``"kernel"`` or ``"moments"``.
        case: the network and its inputs.
        method: which library.
        seconds: median processor time, all threads together.
        ratio: seconds over those of ours (kernel) or of the plain passes (moments), if measured.
        peak_mib: memory on top of the model and its inputs; None: not measured.
        failure: why there is no figure.
    """

    what: str
    case: str
    method: str
    seconds: float | None
    ratio: float | None
    peak_mib: float | None
    failure: str | None = None


def bench_kernels(*, threads: int, repeats: int, growth: bool) -> list[Measurement]:
    """Measure every case; each method runs in a process of its own, one after the other."""
    cases = [*KERNEL_CASES, *((case, (OURS,)) for case in GROWTH_CASES if growth)]
    results = [m for case, methods in cases for m in _kernel_rows(case, methods, threads, repeats)]
    for case in MOMENT_CASES:
        results += _moment_rows(case, threads, 3 * repeats)
    return results


def kernel_seconds(case: BenchCase, method: str, repeats: int) -> tuple[list[float], float | None]:
    """Processor times in this process, and the peak of its memory on top of the model, in MiB."""
    model, x = case.build()
    KERNELS[method](*case._replace(examples=8, width=16).build())  # loads libraries and kernels
    before = _peak_mib()
    times: list[float] = []
    while len(times) < repeats and sum(times) < 60:
        started = time.process_time()
        KERNELS[method](model, x)
        times.append(time.process_time() - started)
    peak = _peak_mib()
    return times, None if before is None or peak is None else peak - before


def moment_seconds(case: BenchCase, repeats: int) -> dict[str, list[float] | str]:
    """Processor times of every method, taking turns; a text where one does not run."""
    torch.manual_seed(0)
    model, x = case.build()
    y = torch.randint(0, 10, (case.examples,))
    results: dict[str, list[float] | str] = {}
    steps = {}
    for name, make in MOMENTS.items():
        try:
            steps[name] = make(model, x, y)
            for _ in range(WARM_UP):
                steps[name]()
            results[name] = []
        except (ImportError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            results[name] = _reason(error)
            steps.pop(name, None)
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times = results[name]
            assert isinstance(times, list)
            times.append(time.process_time() - started)
    return results


def kernel_table(results: Sequence[Measurement], *, threads: int) -> Table:
    """The results, a line each."""
    table = Table(
        title=f"tangent kernels (all outputs) and second moments on the CPU, threads: {threads}",
        title_justify="left",
        caption="seconds of processor time; ratio: to poprisk (kernel), to forward + backward "
        "(moments); memory on top of the model",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("", "network", "method", "seconds", "ratio", "peak MiB"):
        table.add_column(name, justify="left" if name in ("", "network", "method") else "right")
    for r in results:
        seconds = f"{r.seconds:.3f}" if r.seconds is not None else r.failure
        ratio = f"{r.ratio:.2f}" if r.ratio is not None else ""
        peak = f"{r.peak_mib:.0f}" if r.peak_mib is not None else ""
        table.add_row(r.what, r.case, r.method, seconds, ratio, peak)
    return table


def _kernel_rows(
    case: BenchCase, methods: Sequence[str], threads: int, repeats: int
) -> list[Measurement]:
    rows: list[Measurement] = []
    ours: float | None = None
    for method in methods:
        found = _in_a_process([*map(str, case), method, str(repeats), str(threads)])
        if isinstance(found, str):
            rows.append(Measurement("kernel", case.label(), method, None, None, None, found))
            continue
        seconds = statistics.median(found["seconds"])
        ours = seconds if method == OURS else ours
        ratio = None if ours is None else seconds / ours
        rows.append(Measurement("kernel", case.label(), method, seconds, ratio, found["peak_mib"]))
    return rows


def _in_a_process(arguments: Sequence[str]) -> dict[str, Any] | str:
    done = subprocess.run(
        [sys.executable, "-m", "poprisk_lab.bench.kernel", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": arguments[-1]},
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100] if done.stderr.strip() else "was killed"
    return json.loads(done.stdout.splitlines()[-1])


def _moment_rows(case: BenchCase, threads: int, repeats: int) -> list[Measurement]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the other libraries
            found = moment_seconds(case, repeats)
    finally:
        torch.set_num_threads(before)
    base = found["forward + backward"]
    assert isinstance(base, list)
    rows = []
    for name, times in found.items():
        if isinstance(times, str):
            rows.append(Measurement("moments", case.label(), name, None, None, None, times))
            continue
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        seconds = statistics.median(times)
        rows.append(Measurement("moments", case.label(), name, seconds, ratio, None))
    return rows


def _peak_mib() -> float | None:
    """The most memory this process has held; None on a system that does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    kib = 1024 if sys.platform == "darwin" else 1  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kib / 1024


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error.name} is not installed"
    return str(error).splitlines()[0][:100]


def _main(arguments: Sequence[str]) -> None:
    *case, method, repeats, threads = arguments
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    sizes = [int(value) for value in case[1:]]
    try:
        seconds, peak = kernel_seconds(BenchCase(case[0], *sizes), method, int(repeats))
    except ImportError as error:
        sys.exit(_reason(error))
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    _main(sys.argv[1:])
