"""Memory and processor time of `poprisk audit` by number of rows, into a JSON file.

    python benchmarks/audit_scale.py [--rows 10000 100000 1000000] [--epochs E] [--out FILE]

A table of 30 columns (numbers, gaps, categories, a date) as CSV, or their numbers as an array;
five classes, 10% of the labels wrong. Each audit runs by the command line in a fresh process,
trained by the tool's own rule or, to measure memory, for a few epochs. Memory in MiB: the process's
peak; `imported` is that of the interpreter before it reads anything. Seconds: of the processor.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

CLASSES, CLUSTERS, NUMBERS = 5, 4, 24
WRONG = 0.1
MOST_CSV = 100_000
STAGES = (
    ("reading", "poprisk_lab.audit.command", "read_again"),
    ("training", "poprisk_lab.audit.study", "run_audit"),
    ("writing", "poprisk_lab.cli", "_conclude_audit"),
)


def make(rows: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the data in all forms; the true and the given labels."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, CLASSES, rows)
    centres = rng.normal(0, 1.0, (CLASSES, CLUSTERS, NUMBERS))
    x = centres[true, rng.integers(0, CLUSTERS, rows)] + rng.normal(0, 1.0, (rows, NUMBERS))
    wrong = rng.random(rows) < WRONG
    given = np.where(wrong, (true + rng.integers(1, CLASSES, rows)) % CLASSES, true)
    pd.Series(given).map("class {}".format).to_csv(folder / "y.csv", index=False, header=False)
    if rows <= MOST_CSV:
        _table(x, true, given, rng).to_csv(folder / "x.csv", index=False)
    more = rng.normal(size=(rows, 6))
    np.save(folder / "x.npy", np.hstack([x, more]).astype(np.float32))
    return true, given


def _table(
    x: np.ndarray, true: np.ndarray, given: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    n = len(x)
    frame = pd.DataFrame(x.round(4), columns=[f"x{i}" for i in range(NUMBERS)])
    for gaps in ("x0", "x7"):
        frame.loc[rng.random(n) < 0.1, gaps] = np.nan
    for values in (3, 12, 40):
        some = np.where(rng.random(n) < 0.3, true % values, rng.integers(0, values, n))
        frame[f"of {values}"] = [f"kind {k}" for k in some]
    days = pd.to_timedelta(rng.integers(0, 2000, n), unit="D")
    frame["day"] = (pd.Timestamp("2019-05-02") + days).strftime("%Y-%m-%d")
    frame["amount"] = np.exp(2 * rng.normal(size=n)).round(2)
    frame["flag"] = rng.random(n) < 0.5
    frame["label"] = [f"class {k}" for k in given]
    return frame


def child(arguments: list[str]) -> None:
    """Run the command line, and print what it took."""
    import importlib

    from poprisk_lab.cli import app

    seconds = dict[str, float]()
    for name, module, function in STAGES:
        place = importlib.import_module(module)
        setattr(place, function, _timed(name, getattr(place, function), seconds))
    imported = _peak()
    app(["audit", *arguments], standalone_mode=False)
    print(json.dumps({"imported": imported, "peak": _peak(), "seconds": seconds}))


def _timed(name: str, function: Callable[..., Any], seconds: dict[str, float]) -> Any:
    def timed(*arguments: Any, **settings: Any) -> Any:
        began = time.process_time()
        try:
            return function(*arguments, **settings)
        finally:
            seconds[name] = round(time.process_time() - began, 2)

    return timed


def _peak() -> float:
    """MiB of this program; ru_maxrss would begin with what its parent had."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def measured(
    rows: int, kind: str, folder: Path, wrong: np.ndarray, epochs: int | None
) -> dict[str, Any]:
    """One audit in a process of its own."""
    source = [str(folder / "x.csv"), "--label", "label"]
    if kind == "npy":
        source = [str(folder / "x.npy"), "--labels", str(folder / "y.csv")]
    run = folder / kind
    source += [] if epochs is None else ["--epochs", str(epochs)]
    command = [sys.executable, __file__, "--child", *source, "--out", str(run), "--device", "cpu"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=True)
    with (run / "labels.csv").open(encoding="utf-8") as file:
        ranks = {int(row["index"]): int(row["rank"]) for row in csv.DictReader(file)}
    rank = [ranks[i] for i in range(len(ranks))]
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {
        "rows": rows,
        "kind": kind,
        "inputs": config["data"]["shape"][0],
        "epochs": config["recipe"]["epochs"],
        "batch_size": config["recipe"]["batch_size"],
        **json.loads(done.stdout.splitlines()[-1]),
        "source_mib": round(Path(source[0]).stat().st_size / 2**20, 1),
        "average_precision": round(float(average_precision_score(wrong, -np.array(rank))), 4),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--epochs", type=int, help="by the tool's rule if left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/audit-scale.json"))
    parsed = parser.parse_args()
    from poprisk_lab.bench import environment

    results = []
    for rows in parsed.rows:
        with tempfile.TemporaryDirectory() as folder:
            true, given = make(rows, Path(folder))
            for kind in ("csv", "npy") if rows <= MOST_CSV else ("npy",):
                found = measured(rows, kind, Path(folder), true != given, parsed.epochs)
                results.append(found)
                print(json.dumps(results[-1]), flush=True)
    record = {"environment": environment(threads=1), "results": results}
    parsed.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
