"""What the records on file come to: criteria, verdict, table and plots of every claim.

:func:`described` alone knows the classes of the laboratory: where they are renamed or a plot is
drawn by another class, it is what changes, not the data. A frozen record has the keys

* ``verdict``;
* ``criteria``: ``estimate``, ``low``, ``high``, ``values``, ``needed``, ``claimed``, ``at_most``,
  ``primary``, ``outcome``;
* ``table``: the numbers in each row under the header;
* ``plots``: of each line ``x``, ``mean`` and, where there is a band, ``low`` and ``high``;
* ``pictures``: size, mean and root mean square;
* ``names``: of criteria, columns, rows, plots, axes, lines and pictures, so that a new wording
  leaves the numbers' proof green.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from poprisk_lab.pictures import decode
from poprisk_lab.plots import Line, Picture, Plot
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.claim import Claim
from poprisk_lab.studies.criteria import Criterion
from poprisk_lab.studies.record import FOLDER, Judged, on_record

NAMES = sorted(name for name in CLAIMS if (FOLDER / f"{name}.json").exists())
POINTS = 60
"""Points of a line that are kept, at most."""

NUMBER = re.compile(r"[-−]?∞|(?<![\w.])[-−]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|\bn/a\b|\bnever\b")


def judged_record(name: str) -> dict[str, Any]:
    """The record of a claim, judged and drawn."""
    return described(CLAIMS[name], on_record(CLAIMS[name]))


def described(claim: Claim, judged: Judged) -> dict[str, Any]:
    """What a claim comes to, as JSON values."""
    if judged.report is None:
        raise ValueError(f"{claim.name} is not judged, but {judged.verdict}.")
    header, rows, _ = judged.report.table
    shown = claim.show(judged.progress.done)
    plots = [item for item in shown if isinstance(item, Plot)]
    pictures = [item for item in shown if isinstance(item, Picture)]
    return {
        "verdict": judged.verdict,
        "criteria": [criterion(c) for c in judged.report.criteria],
        "table": [[n for cell in row for n in NUMBER.findall(cell)] for row in rows],
        "plots": [[line(c) for c in plot.lines] for plot in plots],
        "pictures": [picture(p) for p in pictures],
        "names": {
            "criteria": [c.name for c in judged.report.criteria],
            "columns": list(header),
            "rows": [row[0] for row in rows],
            "plots": [[p.title, p.x, p.y, *(c.name for c in p.lines)] for p in plots],
            "pictures": [p.title for p in pictures],
        },
    }


def criterion(c: Criterion) -> dict[str, Any]:
    return {
        "estimate": c.estimate.mean,
        "low": c.estimate.low,
        "high": c.estimate.high,
        "values": list(c.estimate.values),
        "needed": c.threshold,
        "claimed": c.claimed,
        "at_most": c.at_most,
        "primary": c.primary,
        "outcome": c.outcome,
    }


def line(c: Line) -> dict[str, Any]:
    columns = {"x": c.x, "mean": c.mean, "low": c.low, "high": c.high}
    return {
        "points": len(c.x),
        **{key: thinned(values) for key, values in columns.items() if len(values)},
    }


def thinned(values: Sequence[float]) -> list[float]:
    """Every k-th value, k the least that leaves at most :data:`POINTS`, and the last."""
    every = -(-len(values) // POINTS)
    return [*values[::every], *values[-1:]]


def picture(p: Picture) -> dict[str, Any]:
    pixels = decode(p.png).double()
    return {
        "size": list(pixels.shape),
        "mean": float(pixels.mean()),
        "rms": float(pixels.square().mean().sqrt()),
    }
