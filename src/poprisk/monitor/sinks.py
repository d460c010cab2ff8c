"""Where a monitor writes rows and alerts: files, trackers of experiments, or functions."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, final

from poprisk.monitor.alerts import Alert

Row = dict[str, float]
Sink = Callable[[int, Row], None]
"""Takes the step and the numbers measured at it; one with a method ``alert`` takes alerts, too."""


@final
class Jsonl:
    """Appends one JSON object a row to a file, flushed; a number that is not finite becomes null.

    An alert is a line of its own, with ``step``, ``alert`` (its name), ``places`` and ``text``.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refused = f"sinks: cannot write to {self.path}: "
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{refused}{error.strerror or error}.") from error
        if self.path.is_dir():
            raise OSError(f"{refused}it is a folder; name a file in it.")
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise OSError(f"{refused}no permission.")

    def __repr__(self) -> str:
        return str(self.path)

    def __call__(self, step: int, row: Row) -> None:
        self._append({"step": step, **{k: v if math.isfinite(v) else None for k, v in row.items()}})

    def alert(self, alert: Alert) -> None:
        """Append an alert."""
        said = {"alert": alert.name, "places": alert.places, "text": alert.text}
        self._append({"step": alert.step, **said})

    def _append(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


@final
class TensorBoard:
    """Writes scalars to a ``SummaryWriter``, and alerts as texts."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __repr__(self) -> str:
        return "TensorBoard"

    def __call__(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def alert(self, alert: Alert) -> None:
        """Write an alert as a text, where the writer takes texts."""
        if hasattr(self.writer, "add_text"):
            self.writer.add_text(f"alert/{alert.name}", alert.text, alert.step)


@final
class WeightsAndBiases:
    """Logs to a run of ``wandb`` (or to anything with its ``log``), with alerts if it has them."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __repr__(self) -> str:
        return "wandb"

    def __call__(self, step: int, row: Row) -> None:
        self.run.log(row, step=step)

    def alert(self, alert: Alert) -> None:
        """Send an alert, where the run has them."""
        if hasattr(self.run, "alert"):
            self.run.alert(title=alert.name, text=alert.text, level="WARN")


@final
class Trackio:
    """Logs to a run of ``trackio``, or to the present one (its module), with alerts."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __repr__(self) -> str:
        return "trackio"

    def __call__(self, step: int, row: Row) -> None:
        self.run.log(dict(row), step=step)

    def alert(self, alert: Alert) -> None:
        """Send an alert, under the step of the row before."""
        level = importlib.import_module("trackio").AlertLevel.WARN
        self.run.alert(title=alert.name, text=alert.text, level=level)


@final
class Accelerate:
    """Logs to the trackers of an ``Accelerator``, or to one of them.

    Alerts go to TensorBoard, wandb and trackio among them; others have none.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __repr__(self) -> str:
        return type(self.owner).__name__

    def __call__(self, step: int, row: Row) -> None:
        for tracker in self._trackers():
            tracker.log(dict(row), step=step)

    def alert(self, alert: Alert) -> None:
        """Send an alert to the trackers that have some."""
        for tracker in self._trackers():
            inner = tracker.tracker
            if hasattr(inner, "alert") or hasattr(inner, "add_scalar"):
                as_sink(inner).alert(alert)  # pyrefly: ignore

    def _trackers(self) -> list[Any]:
        """The trackers, which an Accelerator has from ``init_trackers`` on."""
        if not hasattr(self.owner, "trackers"):
            return [self.owner]
        if not self.owner.trackers:
            raise RuntimeError(
                "it has no trackers: Accelerator(log_with=...) and init_trackers(...) make them"
            )
        return self.owner.trackers


def as_sinks(sinks: Any) -> list[Sink]:
    """Make sinks of several things, or of one that is not in a list."""
    several = isinstance(sinks, Iterable) and not isinstance(sinks, (str, Path))
    return [as_sink(sink) for sink in (sinks if several else [sinks])]


def as_sink(sink: Any) -> Sink:
    """Make a sink of a path, a writer, a run, ``"wandb"``, ``"trackio"``, trackers or a function.

    Raises:
        TypeError: if it is none of these.
        OSError: if a file cannot be written.
        ImportError: for ``"wandb"`` and ``"trackio"`` where they are not installed.
    """
    if isinstance(sink, str) and sink in ("wandb", "trackio"):
        sink = _installed(sink)
    if isinstance(sink, (str, Path)):
        return Jsonl(sink)
    if hasattr(sink, "add_scalar"):
        return TensorBoard(sink)
    if hasattr(sink, "log"):
        return _of_run(sink)
    if not callable(sink):
        raise TypeError(
            "sinks must hold paths of JSONL files, TensorBoard writers, runs of wandb or trackio, "
            "'wandb', 'trackio', an Accelerator or functions of step and row, but got "
            f"{sink!r}."
        )
    return sink


def _of_run(run: Any) -> Sink:
    """Make a sink of what logs."""
    if hasattr(run, "init_trackers") or hasattr(run, "store_init_configuration"):
        return Accelerate(run)
    named = getattr(run, "__name__", None) or type(run).__module__
    return Trackio(run) if named.partition(".")[0] == "trackio" else WeightsAndBiases(run)


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"sinks: {package!r} needs the package of that name ({error}); pip install {package}, "
            "or name a file."
        ) from error
