"""Random calls of the public surface, classified; see :mod:`surface`.

python tests/fuzz_surface.py --cases 2000 --out benchmarks/results/fuzz-surface.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from pathlib import Path

import torch

from surface import paths, pieces, twins
from surface.outcomes import Outcome, judge
from surface.situations import Situation

CALLS = {
    "entk": pieces.entk,
    "grad_mean_var": pieces.grad_mean_var,
    "TwinRisk": twins.twin_risk,
    "record": paths.record,
    "RiskMonitor": pieces.risk_monitor,
    "Canaries": pieces.canaries,
    "gated": pieces.gated,
}


def check(seed: int) -> tuple[Situation, Outcome]:
    """One situation, and what came of it."""
    situation = Situation.of(seed)
    return situation, judge(situation, CALLS[situation.piece])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--piece", choices=CALLS, help="of the situations, only those of one piece")
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, Counter[str]] = {piece: Counter() for piece in CALLS}
    failures: list[str] = []
    for seed in range(options.first, options.first + options.cases):
        if options.piece not in (None, Situation.of(seed).piece):
            continue
        situation, outcome = check(seed)
        kinds[situation.piece][outcome.kind] += 1
        if options.verbose:
            print(f"{outcome.kind}: {outcome.what} | {situation}", flush=True)
        if not outcome.fine:
            failures.append(f"{outcome.kind}: {outcome.what} | {situation}")
            print(failures[-1], flush=True) if not options.verbose else None
    result = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "first": options.first,
        "cases": options.cases,
        "outcomes": {piece: dict(sorted(found.items())) for piece, found in kinds.items()},
        "failures": failures,
    }
    print(json.dumps({**result, "failures": len(failures)}, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
