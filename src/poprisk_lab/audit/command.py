"""What ``poprisk audit`` does, without its options and its screen."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from poprisk.audit import AuditResult
from poprisk_lab.audit.examples import AuditExamples
from poprisk_lab.audit.study import AUDIT, AuditPlan
from poprisk_lab.plots import Table
from poprisk_lab.runner import environment
from poprisk_lab.store import Store

SHOWN = 10
"""Suspects that the terminal shows."""


def start(examples: AuditExamples, plan: AuditPlan, source: str) -> Store:
    """Make the run directory, or check that the one there is of the same audit.

    Raises:
        RunDirectoryError: if it is not.
    """
    store = Store(plan.directory, AUDIT)
    store.create(plan.config(examples, source), environment(1))
    return store


def write_tables(directory: Path, examples: AuditExamples, result: AuditResult) -> None:
    """Write the suspects, the worst first, and all labels in the order of the data.

    Raises:
        OSError: if a file cannot be written.
    """
    write_table(directory / "suspects.csv", examples, result, result.suspects())
    write_table(directory / "labels.csv", examples, result, range(len(result)))


def write_table(
    path: Path, examples: AuditExamples, result: AuditResult, items: Iterable[int]
) -> None:
    """Rows of what was found, as CSV."""
    columns = result.columns(classes=examples.classes or None)
    confidence = columns.get("confidence")
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow("row name given suggested suspect quality rank confidence".split())
        for i in items:
            rows.writerow(
                [
                    i + 1,
                    examples.name(i),
                    _text(columns["given"][i]),
                    _text(columns["suggested"][i]),
                    int(result.suspect[i]),
                    "" if np.isnan(result.quality[i]) else f"{result.quality[i]:.4f}",
                    "" if result.rank[i] < 0 else result.rank[i] + 1,
                    "" if confidence is None else f"{confidence[i]:.4f}",
                ]
            )


def worst_table(examples: AuditExamples, result: AuditResult) -> Table:
    """The surest suspects, for a terminal."""
    columns = result.columns(classes=examples.classes or None)
    return Table(
        ["", "given", "suggested"],
        [
            [examples.name(i), _text(columns["given"][i]), _text(columns["suggested"][i])]
            for i in result.suspects()[:SHOWN].tolist()
        ],
    )


def _text(label: Any) -> str:
    """A label as people write it; empty where there is none."""
    if isinstance(label, float):
        return "" if np.isnan(label) else f"{label:.6g}"
    return "" if label is None else str(label)
