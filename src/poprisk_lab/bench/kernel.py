"""Time and memory of tangent kernels and exact second moments, beside other libraries."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from poprisk._validate import first_line
from poprisk_lab.bench.models import BenchCase
from poprisk_lab.bench.peers import KERNELS, MOMENTS
from poprisk_lab.plots import Table
from poprisk_lab.work import torch_threads

WARM_UP = 4
OURS, PLAIN = "poprisk", "forward + backward"
FAILURES = (ImportError, TypeError, ValueError, RuntimeError, MemoryError)
"""Of other libraries on networks that they do not take, or whose kernel does not fit."""

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
    *(BenchCase("mlp", 50, 512, outputs=outputs) for outputs in (1, 10, 30, 100)),
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
        except FAILURES as error:
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


def kernel_table(results: Sequence[Measurement]) -> Table:
    """The results, a line each."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return Table(
        ["", "network", "method", "seconds", "ratio", "peak MiB"],
        [
            [r.what, r.case, r.method, r.failure or cell(r.seconds, 3), cell(r.ratio, 2),
             cell(r.peak_mib, 0)]
            for r in results
        ],
        "seconds of processor time; ratio: to poprisk (kernel), to forward + backward (moments); "
        "memory on top of the model",
    )  # fmt: skip


def _kernel_rows(
    case: BenchCase, methods: Sequence[str], threads: int, repeats: int
) -> list[Measurement]:
    rows: list[Measurement] = []
    ours: float | None = None
    for method in methods:
        spawned = get_context("spawn")  # a fresh process, whose memory is all this method's
        with ProcessPoolExecutor(1, spawned, _prepare, (threads,)) as pool:
            try:
                times, peak = pool.submit(kernel_seconds, case, method, repeats).result()
            except FAILURES as error:
                reason = _reason(error)
                rows.append(Measurement("kernel", case.label(), method, None, None, None, reason))
                continue
        seconds = statistics.median(times)
        ours = seconds if method == OURS else ours
        ratio = None if ours is None else seconds / ours
        rows.append(Measurement("kernel", case.label(), method, seconds, ratio, peak))
    return rows


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # of the other libraries


def _moment_rows(case: BenchCase, threads: int, repeats: int) -> list[Measurement]:
    with torch_threads(threads), warnings.catch_warnings():
        _prepare(threads)
        found = moment_seconds(case, repeats)
    base, rows = found[PLAIN], list[Measurement]()
    assert isinstance(base, list)
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
    return first_line(error)[:100]
