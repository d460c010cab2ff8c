"""A comparison as one call, for notebooks and scripts, and what it found as frames and figures."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import plotly.graph_objects as go
from rich.console import Console

from poprisk._validate import check_choice, check_positive
from poprisk.intervals import Interval
from poprisk.printing import described, html_table
from poprisk.protocols import ProgressCallback
from poprisk.randomness import RandomState
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.comparison import Comparison, as_begun, begin, run_directory, train
from poprisk_lab.display import ProgressDisplay, verdict_table
from poprisk_lab.evidence.gather import Evidence, compare_evidence, write_evidence
from poprisk_lab.page import quantities, render
from poprisk_lab.page.draw import painted
from poprisk_lab.page.figures import PanelQuantity, epoch_plot
from poprisk_lab.page.series import arm_series
from poprisk_lab.pool import warm_up_workers
from poprisk_lab.results import RunData, read_run
from poprisk_lab.store import Row, replace_text
from poprisk_lab.tasks import Source
from poprisk_lab.verdict import Verdict, judge
from poprisk_lab.wording import scale_of

if TYPE_CHECKING:
    import pandas as pd

METRICS = "test_metric test_loss train_metric train_loss memorized held_out_metric".split()
"""What :attr:`Compared.curves` holds."""
NONE: Mapping[str, Any] = {}


@final
@dataclass(frozen=True, repr=False)
class Compared:
    """What a comparison found; frames are of pandas, which must be installed for them.

    Attributes:
        data: the whole record: configuration, environment, a row an evaluation and a training.
        directory: the run directory; None if nothing was kept.
    """

    data: RunData
    directory: Path | None = None

    @cached_property
    def verdict(self) -> Verdict:
        """The headline, warnings and rows that follow from the record by fixed rules."""
        return judge(self.data)

    @property
    def evidence(self) -> Evidence:
        """What was measured, how, and what was not: ``evidence.json`` of the run directory."""
        return compare_evidence(self.data, self.verdict)

    @property
    def table(self) -> pd.DataFrame:
        """One row an arm: means over seeds, with the ends of their 95% intervals.

        ``difference`` is the final metric minus that of the best AdamW, paired over seeds. An end
        is NaN where there are fewer than three seeds, a mean where there is none.
        """
        import pandas as pd

        rows = [
            {
                "arm": row.label,
                "family": row.family,
                "seeds": row.seeds,
                **_ends("final", row.final),
                **_ends("best", row.best),
                **_ends("memorized", row.memorized),
                **_ends("difference", row.difference),
            }
            for row in (*self.verdict.rows, *self.verdict.other)
        ]
        return pd.DataFrame(rows)

    @property
    def curves(self) -> pd.DataFrame:
        """What was measured, one value a row: arm, seed, epoch, metric, value."""
        import pandas as pd

        labels = {arm["name"]: arm["label"] for arm in self.data.config["arms"]}
        rows = [
            (labels[row["arm"]], row["seed"], row["epoch"], metric, row[metric])
            for row in self.data.epochs
            for metric in METRICS
            if row[metric] is not None
        ]
        return pd.DataFrame(rows, columns=["arm", "seed", "epoch", "metric", "value"])

    def plot(self, metric: str = "test_metric") -> go.Figure:
        """A metric of :attr:`curves` over epochs, as the report draws it.

        Raises:
            ValueError: if there is no such metric, or it was not measured.
        """
        check_choice("metric", metric, METRICS)
        task = self.data.config["task"]
        kind = task["metric"]["name"] if metric.endswith("_metric") else "loss"
        title = f"{metric.rpartition('_')[0].replace('_', '-')} {kind}".capitalize()
        percent = metric.endswith("_metric") and task["metric"]["percent"]
        drawn = {q.key: q for q in quantities(task)}
        quantity = drawn.get(metric, PanelQuantity(title, metric, percent=percent, share=percent))
        found = epoch_plot(quantity, arm_series(self.data, self.verdict))
        if found is None:
            raise ValueError(f"metric {metric!r} was measured in no training of this comparison.")
        return painted(found[0], shown=found[1])

    def write_report(self, path: Path | str) -> None:
        """Write the page that ``poprisk compare`` writes, one HTML file."""
        replace_text(Path(path), render(self.data, self.verdict))

    def __repr__(self) -> str:
        return described("Compared", self.data.config["task"]["name"], self.verdict.headline)

    def _repr_html_(self) -> str:
        head, rows, _ = verdict_table(self.verdict, scale_of(self.data.config))
        told = "".join(f"<br>{escape(warning)}" for warning in self.verdict.warnings)
        return f"<p><b>{escape(self.verdict.headline)}</b>{told}</p>{html_table(head, rows)}"


def compare(
    task: Source,
    *,
    seeds: int | Sequence[int] = 3,
    epochs: int | None = None,
    arms: Sequence[Arm | str] | None = None,
    full: bool = False,
    settings: Mapping[str, Any] = NONE,
    directory: Path | str | None = None,
    fresh: bool = False,
    workers: int = 1,
    device: str = "cpu",
    twin: bool = False,
    progress: bool | ProgressCallback = True,
) -> Compared:
    """Train every arm on every seed of a task, and say which generalizes.

    Args:
        task: name of a built-in task, ``path/to/file.py:function``, a function that returns a
            :class:`poprisk.Task` and may take ``seed``, or a task, the same for every seed.
        seeds: how many, or which; of the task's data, the initial weights and the order of
            examples.
        epochs: in place of the task's own.
        arms: which, by name or family, or arms of one's own; None: the telling ones.
        full: whether to train (or choose from) all arms.
        settings: arguments of the task's function.
        directory: run directory, for a comparison that can be stopped and goes on when it is
            called again, with more seeds, too; None: nothing is kept on disk.
        fresh: whether to delete what the run directory holds and start over.
        workers: processes with one thread each; 1: this one, with the threads that it has. More
            need a task by name: what a notebook defines, other processes do not know.
        device: where to train.
        twin: whether to estimate the risk of every arm that can have a twin.
        progress: told how many trainings are done, and of how many; True: a bar, where a notebook
            or a terminal shows one; False: nothing.

    Raises:
        TaskError: if the task or one of its arms fails.
        ValueError: if another argument is wrong.
        RunDirectoryError: if the directory cannot be used; nothing is changed in it.
        TrainingError: if a training fails; the others up to then are kept.
    """
    for name, value in (("epochs", epochs), ("workers", workers)):
        if value is not None:
            check_positive(name, value)
    if workers > 1 and not isinstance(task, str):
        raise ValueError(
            f"workers={workers} needs a task that other processes can make: write it to a file and "
            "give 'file.py:function', or leave workers out."
        )
    comparison = Comparison(
        task=task,
        arms=_chosen(arms, full=full),
        seeds=_seeds(seeds),
        settings=dict(settings),
        epochs=epochs,
        full=full and arms is None,
        device=device,
        workers=0 if workers == 1 else workers,
        twin=twin,
    )
    if comparison.workers:
        warm_up_workers()
    with tempfile.TemporaryDirectory() as temporary, RandomState.kept():
        store = run_directory(Path(temporary) / "run" if directory is None else Path(directory))
        if arms is None:
            comparison = as_begun(comparison, store, fresh=fresh)
        data = begin(comparison, store, fresh=fresh)
        ends = {key: end for key, end in data.ends.items() if key[1] in comparison.seeds}
        with _watched(progress, comparison, data._replace(ends=ends)) as on_row:
            train(comparison, store, on_row)
        found = Compared(read_run(store), None if directory is None else store.path)
        if found.directory is not None:
            write_evidence(found.directory, found.evidence)
        return found


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, int):
        check_positive("seeds", seeds)
        return list(range(seeds))
    found = list(seeds)
    if not found or len({*found}) < len(found):
        raise ValueError(f"seeds must be a number or different seeds, but got {found}.")
    return found


def _chosen(arms: Sequence[Arm | str] | None, *, full: bool) -> list[Arm]:
    """Arms by name, family or as they are, in the order of the default ones."""
    known = default_arms(full=full)
    if arms is None:
        return known
    own = [arm for arm in arms if isinstance(arm, Arm)]
    names = {arm for arm in arms if isinstance(arm, str)}
    found = [arm for arm in known if not names.isdisjoint({arm.name, arm.family})]
    unknown = names - {name for arm in found for name in (arm.name, arm.family)}
    if unknown or not arms:
        families = ", ".join(dict.fromkeys(arm.family for arm in known))
        raise ValueError(
            f"arms must be of {families}, or names such as {known[1].name}, but got "
            f"{', '.join(map(repr, sorted(unknown))) or 'none'}."
        )
    return [*found, *own]


@contextmanager
def _watched(
    progress: bool | ProgressCallback, comparison: Comparison, data: RunData
) -> Iterator[Callable[[Row], None]]:
    """What to tell of each row."""
    console = Console()
    if progress is True and not _in_notebook():
        if not console.is_terminal:
            progress = False
        else:
            with ProgressDisplay(console, comparison, data) as display:
                yield display
            return
    if progress is False:
        yield lambda row: None
        return
    tell = _notebook_bar() if progress is True else progress
    done, total = {*data.ends}, len(comparison.arms) * len(comparison.seeds)
    tell(len(done), total)

    def on_row(row: Row) -> None:
        if row["event"] == "end":
            done.add((row["arm"], row["seed"]))
            tell(len(done), total)

    yield on_row


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this, and not IPython in a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _notebook_bar() -> ProgressCallback:
    shown = importlib.import_module("IPython.display")
    handle = shown.display(shown.HTML(""), display_id=True)

    def tell(done: int, total: int | None) -> None:
        bar = f'<progress value="{done}" max="{total}"></progress>'
        handle.update(shown.HTML(f"{bar} {done} of {total} trainings"))

    return tell


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    mean, low, high = (float("nan"),) * 3 if interval is None else interval[:3]
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
