"""Directories that an older version wrote, and what they come to.

The code of commit 0b2e8e6 made them, from before the laboratory was a package of its own::

    python -m poprisk compare task.py:tiny --seeds 3 --workers 1 --out directories/whole
    PROOF_HOLD=count python -m poprisk compare task.py:tiny --seeds 3 --workers 1 \
        --out directories/half
    python -m poprisk reproduce implicit-bias --quick --workers 1 --out directories/claim

in ``tests/proofs/data``; ``judged.json`` is what that code made of the first and the last. None of
it is frozen anew: old records stay old.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from poprisk.intervals import Interval
from poprisk_lab.comparison import COMPARISON
from poprisk_lab.results import read_run
from poprisk_lab.store import Store
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.record import judged
from poprisk_lab.studies.run import ClaimDirectory
from poprisk_lab.verdict import Row, judge
from proofs import records
from proofs.frozen import DATA

CLAIM = "implicit-bias"
LEFT = ("norm-momentum-0", "norm-momentum-1", "norm-another-start-0", "norm-another-start-1")
"""Trials of the claim that take less than a second each."""

TASK = f"{DATA / 'task.py'}:tiny"


def copied(name: str, to: Path) -> Path:
    """A copy of a directory whose task is where it is on this machine."""
    path = shutil.copytree(DATA / "directories" / name, to / name)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "task" in config:
        config["task"]["source"] = TASK
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def half_finished_claim(to: Path) -> Path:
    """A copy of the claim's directory in which some trials were never done."""
    path = copied("claim", to)
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["trial"] not in LEFT]
    (path / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the old record, and of those of single trials that were written since."""
    found = list[dict[str, Any]]()
    for file in (path / "metrics.jsonl", *sorted((path / "trials").glob("*.jsonl"))):
        own = {} if file.parent == path else {"trial": file.stem}
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [{**own, **json.loads(line)} for line in lines]
    return found


def numbers(path: Path) -> dict[str, Any]:
    """The last row of each epoch, run or trial, without the time it took."""
    found = {}
    for row in rows(path):
        row.pop("seconds", None)
        if row.get("event") != "start":
            keys = ("arm", "seed", "event", "epoch") if "arm" in row else ("trial",)
            name = [row.get(key) for key in keys]
            for key in ("trial",) if "arm" in row else ("event",):  # says what the name says
                row.pop(key, None)
            found[", ".join(str(part) for part in name if part is not None)] = row
    return found


def starts(path: Path) -> list[dict[str, Any]]:
    """The rows that say from which epoch a run was begun or resumed."""
    return [row for row in rows(path) if row.get("event") == "start"]


def judged_comparison(path: Path) -> dict[str, Any]:
    """The rows of the verdict: the only place here that knows its classes."""
    found = judge(read_run(Store(path, COMPARISON)))
    return {
        "reference": found.reference,
        "rows": [row_of(row) for row in found.rows],
        "other": [row_of(row) for row in found.other],
    }


def row_of(row: Row) -> dict[str, Any]:
    intervals = {
        "final": row.final,
        "best": row.best,
        "memorized": row.memorized,
        "difference": row.difference,
    }
    return {
        "label": row.label,
        "family": row.family,
        "arms": list(row.arms),
        "seeds": row.seeds,
        **{key: interval(value) for key, value in intervals.items()},
    }


def interval(value: Interval | None) -> list[float] | None:
    return None if value is None else [value.mean, value.low, value.high]


def judged_claim(path: Path) -> dict[str, Any]:
    claim = CLAIMS[CLAIM]
    return records.described(claim, judged(claim, ClaimDirectory(path, claim).read()))
