"""The verdict table and the table of single runs, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from poprisk.intervals import Interval
from poprisk_lab.page.draw import OURS
from poprisk_lab.page.formats import MISSING, Format, format_for, plural
from poprisk_lab.plots import Table
from poprisk_lab.results import RunData
from poprisk_lab.verdict import Row, Verdict
from poprisk_lab.wording import scale_of

SHARE = Format(percent=True, decimals=1)


class Cell(NamedTuple):
    """A number and, in small print, how sure it is."""

    main: str
    note: str


class Forest(NamedTuple):
    """A difference and its interval drawn as a dot on a bar: positions in percent of the width."""

    low: float
    dot: float
    high: float


class VerdictTable(NamedTuple):
    """How the page writes the rows of a verdict.

    Attributes:
        key: the rows that matter.
        rest: the rest of the grid.
        format: of the metric.
        sign: 1 if a higher metric is better, else -1.
        seeds: how many a complete row has.
        shares: whether memorization is a share, between 0 and 1.
    """

    key: list[Row]
    rest: list[Row]
    format: Format
    sign: int
    seeds: int
    shares: bool

    @property
    def memorized(self) -> bool:
        """Whether there is a column for memorization."""
        return any(row.memorized for row in (*self.key, *self.rest))

    @property
    def zero(self) -> float:
        """Where to draw no difference, in percent of the width."""
        return _place(0.0, _span(self.key, self.sign))

    def mark(self, row: Row) -> str:
        """``ours``, ``reference`` or empty."""
        is_reference = row.difference is None and row.family == "adamw"
        return "ours" if row.family == OURS else "reference" if is_reference else ""

    def cells(self, row: Row) -> dict[str, Any]:
        """What stands in the columns of a row, by the name of its field; None for nothing."""
        d, noise = row.difference, row.memorized
        return {
            "final": plus_minus(row.final, self.format),
            "best": plus_minus(row.best, self.format),
            "memorized": plus_minus(noise, SHARE, share=self.shares) if noise else None,
            "difference": difference_cell(d, self.format) if d else None,
            "partial": f"{row.seeds} of {plural(self.seeds, 'seed')}" * (row.seeds < self.seeds),
            "outcome": _outcome(d, self.sign) if d else "",
            "forest": _forest(d, self.sign, _span(self.key, self.sign)) if d else None,
        }


def verdict_table(
    verdict: Verdict, metric: dict[str, Any], *, seeds: int, shares: bool = True
) -> VerdictTable:
    """The rows of a verdict, for the page.

    Args:
        verdict: to be written.
        metric: of the task.
        seeds: how many a complete row has.
        shares: whether memorization is a share, between 0 and 1.
    """
    rows = [*verdict.rows, *verdict.other]
    form = format_for((row.final.mean for row in rows), percent=metric["percent"])
    sign = 1 if metric["higher_is_better"] else -1
    return VerdictTable(verdict.rows, verdict.other, form, sign, seeds, shares)


def plus_minus(value: Interval, form: Format, *, share: bool | None = None) -> Cell:
    """Write a mean and how sure it is: half the width of its interval, or what the seeds gave.

    Args:
        value: over seeds.
        form: of the numbers.
        share: whether it lies between 0 and 1; None: if it is written in percent.
    """
    inside = value.clipped(0.0, 1.0) if (form.percent if share is None else share) else value
    if inside != value:
        return Cell(form.number(value.mean), _ends(inside, form.number))
    half = form.number((value.high - value.low) / 2)
    return Cell(form.number(value.mean), _note(value, form.number) or f"±{half}" * value.known)


def difference_cell(value: Interval, form: Format) -> Cell:
    """Write a mean difference with its interval, or with those of the seeds."""
    inside = value.clipped(-1.0, 1.0) if form.percent else value
    note = _note(value, form.signed) or _ends(inside, form.signed) * value.known
    return Cell(form.signed(value.mean), note)


def _note(value: Interval, write: Callable[[float], str]) -> str:
    """What stands in place of an interval that there is not; empty if there is one."""
    if len(value.values) > 1 and value.few:
        return f"({', '.join(map(write, value.values))})"
    return "(all alike)" if value.known and value.alike else ""


def _ends(value: Interval, write: Callable[[float], str]) -> str:
    return f"[{write(value.low)}, {write(value.high)}]"


def _outcome(difference: Interval, sign: int) -> str:
    if not difference.known:
        return ""
    side = sign * difference.sign
    return "unclear" if side == 0 else "better" if side > 0 else "worse"


def _span(rows: Sequence[Row], sign: int) -> tuple[float, float]:
    """Range of the drawn differences, better to the right; zero is inside, outliers are not."""
    found = [
        [sign * v for v in row.difference[:3] if math.isfinite(v)] for row in rows if row.difference
    ]
    reach = [max(map(abs, ends)) for ends in found if ends]
    limit = 5 * median(reach) if reach else 0.0
    all_ends = [0.0, *(v for ends in found for v in ends)]
    low, high = max(min(all_ends), -limit), min(max(all_ends), limit)
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _forest(difference: Interval, sign: int, span: tuple[float, float]) -> Forest | None:
    if not math.isfinite(difference.mean):
        return None
    dot, *ends = (_place(sign * v, span) for v in difference[:3])
    ends = [dot if math.isnan(end) else end for end in ends]
    return Forest(min(ends), dot, max(ends))


def _place(value: float, span: tuple[float, float]) -> float:
    """Position of a value in percent of the width, cut to it."""
    low, high = span
    if high <= low:
        return 50.0
    return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)


def leads_table(verdict: Verdict, config: dict[str, Any]) -> Table:
    """What PopRiskAdamW gains on each of its rivals at the end of training."""
    scale = scale_of(config)
    means = {row.label: row.final.mean for row in [*verdict.rows, *verdict.other]}
    base = means.get(verdict.reference, 0.0)
    unit = "points" if scale.percent else "% of the best AdamW" if base else scale.name
    rows = [[label, scale.written(lead, base)] for label, lead in verdict.leads.items()]
    return Table(
        ["PopRiskAdamW against", f"gain, {unit}"],
        rows,
        "Paired over seeds; each at 95%, not corrected for "
        "their number: the verdict rests on the best AdamW alone.",
    )


def run_table(data: RunData, form: Format) -> Table:
    """One row for each finished run: what was measured, seed by seed."""
    labels = {arm["name"]: arm["label"] for arm in data.config["arms"]}
    order = {name: i for i, name in enumerate(labels)}
    keys = sorted(data.ends, key=lambda key: (order.get(key[0], len(order)), key[1]))
    noise = "Memorized, %" if data.config["task"]["classification"] else "Noise fitted, %"
    head = ["Arm", "Seed", "Final", "Best (epoch)", "Stopped (epoch)", noise, "Skipped steps"]
    rows = [_run(labels.get(arm, arm), seed, data.ends[arm, seed], form) for arm, seed in keys]
    return Table([*head, "Seconds"], rows)


def _run(label: str, seed: int, end: dict[str, Any], form: Format) -> list[str]:
    def at(value: str, epoch: str) -> str:
        return MISSING if end[value] is None else f"{form.number(end[value])} ({end[epoch]})"

    memorized = end["final_memorized"]
    return [
        label,
        str(seed),
        MISSING if end["final_metric"] is None else form.number(end["final_metric"]),
        at("best_metric", "best_epoch"),
        at("stopped_metric", "stopped_epoch"),
        MISSING if memorized is None else SHARE.number(memorized),
        f"{end['skipped_steps']:,}",
        f"{end['seconds']:.1f}",
    ]
