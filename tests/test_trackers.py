"""Rows and alerts of a monitor in the trackers themselves, as far as they are installed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate")
from accelerate.tracking import GeneralTracker  # noqa: E402

from poprisk import RiskMonitor  # noqa: E402
from poprisk.monitor import Loss, Measured  # noqa: E402
from test_alerts import Given, Trackio  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def watched(sinks: Any) -> RiskMonitor:
    """Three rows, at steps 0, 2 and 4, the second with an alert."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    quantities = [Loss(), Measured("large", lambda: math.inf)]
    given = Given({}, {"a": True}, {})
    monitor = RiskMonitor(
        model, squared, sgd, every=2, quantities=quantities, sinks=sinks, conditions=[given]
    )
    for _ in range(5):
        monitor.step(torch.randn(4, 3), torch.randn(4, 1))
        sgd.step()
    assert [(alert.step, alert.name) for alert in monitor.alerts] == [(2, "given")]
    return monitor


class Kept(GeneralTracker):
    """A tracker of one's own, around something that takes texts, or alerts, or neither."""

    requires_logging_directory = False

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner
        self.rows: list[Any] = []
        super().__init__()

    @property
    def tracker(self) -> Any:
        return self.inner

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


def kept(name: str) -> tuple[Kept, list[Any]]:
    said: list[Any] = []

    def add_text(*text: Any) -> None:
        said.append(text)

    def alert(**how: Any) -> None:
        said.append(how)

    inner = {
        "plain": object(),
        "texts": SimpleNamespace(add_scalar=None, add_text=add_text),
        "alerts": SimpleNamespace(log=None, alert=alert),
    }[name]
    return Kept(name, inner), said


@pytest.mark.parametrize("alone", [False, True])
def test_every_tracker_of_an_accelerator_gets_rows_and_those_that_can_alerts(alone: bool) -> None:
    trackers = {name: kept(name) for name in ("plain", "texts", "alerts")}
    accelerator = accelerate.Accelerator(log_with=[tracker for tracker, _ in trackers.values()])
    accelerator.init_trackers("run")
    monitor = watched(accelerator.trackers if alone else [accelerator])
    for tracker, _ in trackers.values():
        assert tracker.rows == monitor.rows
    assert trackers["texts"][1] == [("alert/given", "seen in a.", 2)]
    assert trackers["alerts"][1] == [{"title": "given", "text": "seen in a.", "level": "WARN"}]
    accelerator.end_training()


def test_an_accelerator_without_trackers_is_said_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"Accelerator: it has no trackers: .*init_trackers"):
        watched(accelerate.Accelerator())


def test_a_tracker_that_is_made_later_is_found() -> None:
    tracker, _ = kept("plain")
    accelerator = accelerate.Accelerator(log_with=[tracker])
    monitor = watched(accelerator)
    assert tracker.rows == []
    accelerator.init_trackers("run")
    monitor.measure([(torch.randn(4, 3), torch.randn(4, 1))], step=6)
    assert [step for step, _ in tracker.rows] == [6]


def test_tensorboard_has_rows_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = accelerate.Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    monitor = watched(accelerator)
    accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [
        (step, pytest.approx(row["loss"])) for step, row in monitor.rows
    ]
    assert [e.step for e in found.Tensors("alert/given/text_summary")] == [2]


def parameters(function: Any) -> Sequence[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("how", ["name", "module", "run", "accelerate"])
def test_trackio_has_rows_and_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    for name in ("log", "alert"):
        assert parameters(getattr(trackio, name)) == parameters(getattr(Trackio, name))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    project = f"project-{how}"
    if how == "accelerate":
        accelerator = accelerate.Accelerator(log_with="trackio")
        accelerator.init_trackers(project, init_kwargs={"trackio": {"name": "run"}})
        monitor = watched(accelerator)
        accelerator.end_training()
    else:
        run = trackio.init(project=project, name="run", auto_log_cpu=False)
        monitor = watched({"name": "trackio", "module": trackio, "run": run}[how])
        trackio.finish()
    rows = [(row["step"], row["loss"]) for row in storage.get_logs(project, "run")]
    assert rows == [(step, row["loss"]) for step, row in monitor.rows]
    (alert,) = storage.get_alerts(project, "run")
    expected = {"title": "given", "text": "seen in a.", "level": "warn", "step": 2}
    assert {key: alert[key] for key in expected} == expected
