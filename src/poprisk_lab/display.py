"""What the commands show while they run and when they are done."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from poprisk.intervals import Interval
from poprisk_lab.comparison import Comparison
from poprisk_lab.fit import Row as Record
from poprisk_lab.page.claims import main_figure
from poprisk_lab.page.formats import MINUS, QUICK, Format, format_for, mark
from poprisk_lab.page.table import difference_cell, plus_minus
from poprisk_lab.plots import Table as Data
from poprisk_lab.plots import written
from poprisk_lab.results import RunData
from poprisk_lab.studies.criteria import point
from poprisk_lab.studies.record import Judged
from poprisk_lab.verdict import Verdict
from poprisk_lab.wording import Row, Scale, scale_of

STYLES = {"good": "green", "bad": "red"}


class PhaseDisplay:
    """Live progress of one phase after another; without a terminal one line a phase.

    Args:
        console: where to show it.
        columns: more of them for each phase.
        lines: whether a phase has a line for each tenth of it, too, without a terminal.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, lines: bool = False) -> None:
        self.console, self.lines = console, lines
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *columns,
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.phases: dict[str, TaskID] = {}
        self.tenths: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self.progress.tasks:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Take how much of a phase is done."""
        if not self.progress.live.is_started:  # not before: rich may end with an empty line
            self.progress.start()
        if phase not in self.phases:
            self.phases[phase] = self.progress.add_task(escape(phase), total=total)
            if not self.console.is_terminal:
                self.say(phase)
        self.progress.update(self.phases[phase], completed=done)
        tenth = 10 * done // total if total else 0
        if self.lines and not self.console.is_terminal and tenth > self.tenths.get(phase, 0):
            self.tenths[phase] = tenth
            self.say(f"[{done:3}/{total}] {phase}")

    def say(self, text: str) -> None:
        """Print a line, for logs."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressDisplay:
    """Live progress: what runs, its metric so far, time left; plain lines without a terminal."""

    def __init__(self, console: Console, comparison: Comparison, data: RunData) -> None:
        self.scale = scale_of(data.config)
        self.epochs = data.config["task"]["epochs"]
        self.labels = {arm.name: arm.label for arm in comparison.arms}
        self.total = len(comparison.arms) * len(comparison.seeds)
        self.started = time.monotonic()
        self.ended = set(data.ends)
        self.running: dict[tuple[str, int], tuple[TaskID, float]] = {}
        self.shown = PhaseDisplay(console, TextColumn("{task.fields[so_far]}"))
        text = f"training on {escape(data.config['task']['name'])}"
        self.bar = self.shown.progress.add_task(text, total=self.total, so_far="")
        self._count()

    def __enter__(self) -> ProgressDisplay:
        self.shown.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.shown.__exit__(*error)

    def __call__(self, row: Record) -> None:
        """Take one row of the record."""
        key, bars = (row["arm"], row["seed"]), self.shown.progress
        name = f"{self.labels[row['arm']]}, seed {row['seed']}"
        if row["event"] == "end":
            if key in self.running:
                bars.remove_task(self.running.pop(key)[0])
            self.ended.add(key)
            if not self.shown.console.is_terminal:
                self._line(name, row)
        else:
            if key not in self.running:
                text = f"  [cyan]{escape(name)}[/]"
                self.running[key] = bars.add_task(text, total=self.epochs, so_far=""), 0.0
            task, metric = self.running[key][0], row.get("test_metric")
            so_far = "" if metric is None else f"{self.scale.name} {self.scale.value(metric)}"
            bars.update(task, completed=row["epoch"], so_far=escape(so_far))
            self.running[key] = task, row["epoch"] / self.epochs
        self._count()

    def _count(self) -> None:
        done = len(self.ended)
        completed = done + sum(share for _, share in self.running.values())
        so_far = f"{done}/{self.total} runs"
        self.shown.progress.update(self.bar, completed=completed, so_far=so_far)

    def _line(self, name: str, row: Record) -> None:
        value = row["stopped_metric"] if row["stopped_metric"] is not None else row["final_metric"]
        spent = time.monotonic() - self.started
        self.shown.say(
            f"[{len(self.ended):3}/{self.total}] {spent:4.0f} s  {name}: "
            f"{self.scale.name} {self.scale.value(value)}"
        )


def data_table(
    given: Data, *, title: str = "", texts: int | None = None, bold: Collection[str] = ()
) -> Table:
    """A table for the terminal.

    Args:
        given: its cells; those with the words of an outcome are coloured, as on a page.
        title: above it.
        texts: how many columns hold text, the rest numbers; None: all do.
        bold: first cells of the rows that stand out.
    """
    table = Table(
        title=escape(title) or None,
        title_justify="left",
        title_style="",
        header_style="bold",
        pad_edge=False,
        box=SIMPLE_HEAD,
    )
    for i, name in enumerate(given.head):
        right = texts is not None and i >= texts
        table.add_column(escape(name), overflow="fold", justify="right" if right else "left")
    for row in given.rows:
        table.add_row(*map(_coloured, row), style="bold green" if row[0] in bold else "")
    return table


def _coloured(cell: str) -> str:
    style = STYLES.get(mark(cell), "")
    return f"[{style}]{escape(cell)}[/]" if style else escape(cell)


def summary_table(claims: Sequence[Judged]) -> Table:
    """A line for each claim, with the mean of its main figure."""
    table = Table(header_style="bold", pad_edge=False, box=SIMPLE_HEAD, expand=True)
    for name in ("claim", "verdict", "found"):
        table.add_column(name, no_wrap=True)
    table.add_column("criterion", no_wrap=True, overflow="ellipsis", ratio=1)
    for judged in claims:
        style = STYLES.get(mark(judged.verdict), "yellow")
        verdict = judged.verdict + QUICK * judged.progress.quick
        main, cells = main_figure(judged), ("", "")
        if main is not None:
            cells = (written(point(main.estimate.mean), percent=main.percent), main.name)
        table.add_row(judged.claim.name, f"[{style}]{verdict}[/]", *map(escape, cells))
    return table


def verdict_table(verdict: Verdict, scale: Scale) -> Data:
    """The rows of a verdict that matter, as text."""
    head = ["", "final", "best epoch", "noise fitted", "gain over best AdamW"]
    return Data(head, [_cells(row, scale) for row in verdict.rows])


def _cells(row: Row, scale: Scale) -> list[str]:
    form = format_for([row.final.mean], percent=scale.percent)
    note = plus_minus(row.final, form).note.replace("±", "± ").replace(MINUS, "-")
    return [
        row.label,
        f"{scale.value(row.final.mean)} {note}".strip(),
        scale.value(row.best.mean),
        f"{row.memorized.mean:.1%}" if row.memorized else "-",
        _gain(row.difference, scale, form),
    ]


def _gain(difference: Interval | None, scale: Scale, form: Format) -> str:
    """A difference as gain, better is positive."""
    if difference is None:
        return "(reference)"
    ends = sorted(scale.gain(v) for v in difference[1:3])
    gain = Interval(
        scale.gain(difference.mean), ends[0], ends[1], tuple(map(scale.gain, difference.values))
    )
    return " ".join(difference_cell(gain, form)).strip().replace(MINUS, "-")
