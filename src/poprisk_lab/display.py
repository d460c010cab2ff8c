"""What the commands show while they run and when they are done."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
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


class ProgressDisplay:
    """Live progress: what runs, its metric so far, time left; plain lines without a terminal."""

    def __init__(self, console: Console, comparison: Comparison, data: RunData) -> None:
        self.console = console
        self.scale = scale_of(data.config)
        self.epochs = data.config["task"]["epochs"]
        self.labels = {arm.name: arm.label for arm in comparison.arms}
        self.started = time.monotonic()
        self.ended = set(data.ends)
        self.running: dict[tuple[str, int], Record] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.total:.0f} runs"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        total = len(comparison.arms) * len(comparison.seeds)
        name = data.config["task"]["name"]
        done = len(data.ends)
        text = f"training on {escape(name)}"
        self.bar = self.progress.add_task(text, total=total, completed=done, done=done)
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.update(self._picture())
            self.live.stop()

    def __call__(self, row: Record) -> None:
        """Take one row of the record."""
        key = (row["arm"], row["seed"])
        before = self._share(key)
        if row["event"] == "end":
            self.running.pop(key, None)
            again = key in self.ended
            self.ended.add(key)
            self.progress.advance(self.bar, -before if again else 1 - before)
            self.progress.update(self.bar, done=len(self.ended))
            if self.live is None:
                self._line(row)
        else:
            self.running[key] = row
            self.progress.advance(self.bar, self._share(key) - before)
        if self.live:
            self.live.update(self._picture())

    def _share(self, key: tuple[str, int]) -> float:
        return self.running[key]["epoch"] / self.epochs if key in self.running else 0.0

    def _line(self, row: Record) -> None:
        done = len(self.ended)
        total = int(self.progress.tasks[0].total or 0)
        value = row["stopped_metric"] if row["stopped_metric"] is not None else row["final_metric"]
        spent = time.monotonic() - self.started
        self.console.print(
            f"[{done:3}/{total}] {spent:4.0f} s  {self.labels[row['arm']]}, seed {row['seed']}: "
            f"{self.scale.name} {self.scale.value(value)}",
            markup=False,
            highlight=False,
            soft_wrap=True,  # one line a run, for logs
        )

    def _picture(self) -> Table:
        grid = Table.grid()
        grid.add_row(self.progress)
        for (arm, seed), row in sorted(self.running.items()):
            metric = row.get("test_metric")
            so_far = "" if metric is None else f"{self.scale.name} {self.scale.value(metric)}"
            where = f"seed {seed}, epoch {row['epoch']}/{self.epochs}"
            grid.add_row(f"  [cyan]{self.labels[arm]}[/], {where}  {escape(so_far)}")
        return grid


class PhaseDisplay:
    """Live progress of one phase after another; one line a phase without a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self.phases: dict[str, TaskID] = {}

    def __enter__(self) -> PhaseDisplay:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Take how much of a phase is done."""
        if phase not in self.phases:
            self.phases[phase] = self.progress.add_task(escape(phase), total=total)
            if not self.console.is_terminal:
                self.console.print(phase, markup=False, highlight=False, soft_wrap=True)
        self.progress.update(self.phases[phase], completed=done)


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
