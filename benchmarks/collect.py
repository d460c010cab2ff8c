"""Collect run directories into one JSON file: python benchmarks/collect.py OUT RUN [RUN ...]."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from poprisk.intervals import Interval
from poprisk_lab.comparison import run_directory
from poprisk_lab.results import read_run
from poprisk_lab.verdict import Row, judge


def interval(value: Interval | None) -> list[float | None] | None:
    """Mean, low and high; None where there is no number."""
    return None if value is None else [x if math.isfinite(x) else None for x in value[:3]]


def row(value: Row) -> dict[str, Any]:
    """One line of a table as JSON values."""
    intervals = ("final", "best", "memorized", "difference")
    return {
        "label": value.label,
        "arms": list(value.arms),
        "seeds": value.seeds,
        **{key: interval(getattr(value, key)) for key in intervals},
    }


def summary(path: Path) -> dict[str, Any]:
    """A finished run: task, seeds, environment, the table and every final metric."""
    data = read_run(run_directory(path))
    verdict = judge(data)
    finals: dict[str, dict[int, float]] = {}
    for (arm, seed), end in sorted(data.ends.items()):
        finals.setdefault(arm, {})[seed] = end["final_metric"]
    return {
        "task": data.config["task"],
        "seeds": data.config["seeds"],
        "environment": data.environment,
        "verdict": [verdict.headline, *verdict.sentences],
        "reference": verdict.reference,
        "columns": "intervals are [mean, low, high]; difference is to the reference, paired",
        "rows": [row(r) for r in [*verdict.rows, *verdict.other]],
        "finals": finals,
    }


def main(out: Path, runs: list[Path]) -> None:
    """Write the file."""
    content = {path.name: summary(path) for path in runs}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])
