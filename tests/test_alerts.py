"""An alert is raised once where a condition begins, and can be raised again after its end."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poprisk
from poprisk import RiskMonitor
from poprisk.monitor import Condition, Drift, LabelMemorization, Loss, Measured, Starvation
from poprisk.monitor.alerts import Alert, Alerts

Row = dict[str, float]


def raised(condition: Condition, rows: Sequence[Row]) -> list[Alert]:
    """All alerts of a run that writes these rows one by one."""
    return raised_at(condition, list(enumerate(rows)))


def raised_at(condition: Condition, rows: Sequence[tuple[int, Row]]) -> list[Alert]:
    alerts = Alerts([condition])
    found: list[Alert | None] = []
    for step, row in rows:
        alerts.add(step, row)
        found.append(alerts.look(condition))
    return [alert for alert in found if alert is not None]


def steps_of(condition: Condition, rows: Sequence[Row]) -> list[int]:
    return [alert.step for alert in raised(condition, rows)]


def ratios(*values: float, module: str = "fc") -> list[Row]:
    return [{f"gate/update_ratio/{module}": value} for value in values]


def test_starvation_begins_after_its_rows_and_again_after_its_end() -> None:
    low, between, high = 0.019, 0.03, 0.04
    rows = ratios(0.5, *[low] * 4, *[between] * 4, *[low] * 4, *[high] * 4, *[low] * 4)
    assert steps_of(Starvation(), rows) == [4, 20]
    assert steps_of(Starvation(), ratios(*[low, low, low, 0.02] * 5)) == []


def test_modules_that_starve_together_are_one_alert_and_a_later_one_is_another() -> None:
    rows = [
        {f"gate/update_ratio/{name}": 0.0 if t >= begin else 1.0 for name, begin in begins.items()}
        for begins in [{"a": 0, "b": 0, "c": 3}]
        for t in range(9)
    ]
    first, second = raised(Starvation(), rows)
    assert (first.step, first.places) == (3, ("a", "b"))
    assert (second.step, second.places) == (6, ("c",))
    assert first.text.startswith("a, b: the gate lets through less than 2% of the update, 4 rows")


def test_a_text_names_a_few_of_many_modules() -> None:
    row = {f"gate/update_ratio/{i}": 0.0 for i in range(7)}
    assert "0, 1, 2, 3 and 3 more: " in raised(Starvation(), [row] * 4)[0].text


def canaries(*values: float, error: float = 0.02) -> list[Row]:
    return [{"canaries": value, "canaries/error": error} for value in values]


def test_canaries_are_memorized_above_the_limit_and_above_their_errors() -> None:
    assert steps_of(LabelMemorization(), canaries(0.0, 0.11, 0.11, 0.11, 0.2, 0.3)) == [3]
    assert steps_of(LabelMemorization(), canaries(*[0.11] * 9, error=0.04)) == []
    assert steps_of(LabelMemorization(), canaries(*[0.09] * 9, error=0.001)) == []
    again = [0.2, 0.2, 0.2, 0.07, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2]
    assert steps_of(LabelMemorization(), canaries(*again)) == [2, 12]


def risks(*values: float, fitted: float = -0.1, error: float = 0.1) -> list[Row]:
    return [
        {"risk": v, "risk/error": error, "risk/train_loss": 3 + fitted * t}
        for t, v in enumerate(values)
    ]


def test_a_risk_that_rises_while_the_training_loss_falls_is_memorization() -> None:
    up = [2.0, 1.0, *[1.29] * 5]  # two errors of the difference are 0.283
    assert steps_of(LabelMemorization(), risks(*up)) == [4]
    assert steps_of(LabelMemorization(), risks(*up, fitted=0.1)) == []
    assert steps_of(LabelMemorization(), risks(2.0, 1.0, *[1.28] * 5)) == []
    assert steps_of(LabelMemorization(), risks(*up, error=0.11)) == []
    back = [*up, 1.1, 1.1, 1.1, 1.4, 1.4, 1.4]
    assert steps_of(LabelMemorization(), risks(*back)) == [4, 12]


def test_an_invalid_risk_is_not_compared() -> None:
    rows = risks(2.0, 1.0, math.nan, 1.5, 1.5, math.nan, 1.5, 1.5, 1.5)
    assert steps_of(LabelMemorization(), rows) == [8]
    assert steps_of(LabelMemorization(), risks(*[math.nan] * 9)) == []


def test_a_risk_without_error_is_compared() -> None:
    assert steps_of(LabelMemorization(), risks(2.0, *[1.0] * 4, error=0.0)) == []
    assert steps_of(LabelMemorization(), risks(2.0, 1.0, *[1.1] * 5, error=0.0)) == [4]


def losses(*values: float) -> list[Row]:
    return [{"loss": value} for value in values]


def test_a_loss_above_all_rows_before_is_drift_and_ends_with_them() -> None:
    flat, high = [1.0, 2.0] * 8, [3.0] * 4
    assert steps_of(Drift(), losses(*flat, *high)) == [19]
    assert steps_of(Drift(), losses(*flat[1:], *high)) == []  # 15 rows to compare with
    assert steps_of(Drift(), losses(*flat, 3.0, 3.0, 2.0, 3.0, 3.0)) == []
    again = [*flat, *high, *[3.0] * 16, *[4.0] * 4]
    assert steps_of(Drift(), losses(*again)) == [19, 39]


def test_the_false_alarms_of_drift_are_those_of_chance() -> None:
    # All orders of six different values: the last two above the four before, 1 of C(6, 2) = 15.
    drift = Drift(rows=2, reference=4)
    found = [drift.state(losses(*order))["loss"] is True for order in permutations(range(6))]
    assert sum(found) * 15 == len(found) == 720


def test_what_is_not_a_number_raises_and_ends_nothing() -> None:
    low, nan = 0.01, math.nan
    assert steps_of(Starvation(), ratios(low, low, nan, low, low, low, low)) == [6]
    assert steps_of(Starvation(), ratios(*[low] * 4, *[nan] * 9, *[low] * 4)) == [3]
    assert steps_of(Drift(), losses(*[1.0] * 16, nan, 3.0, 3.0, 3.0)) == []
    assert steps_of(LabelMemorization(), canaries(*[nan] * 5)) == []


def test_rows_of_another_run_do_not_count() -> None:
    flat, high = losses(*[1.0] * 16), losses(*[3.0] * 4)
    assert raised_at(Drift(), [*enumerate(flat), *enumerate(high)]) == []  # steps begin anew
    again = [*enumerate(losses(9.0, 9.0)), *enumerate([*flat, *high])]
    assert [alert.step for alert in raised_at(Drift(), again)] == [19]


def test_a_row_of_which_more_is_seen_later_counts_once() -> None:
    rows = list(enumerate(ratios(*[0.01] * 3)))
    assert raised_at(Starvation(), [*rows, (2, rows[2][1]), (2, rows[2][1])]) == []
    assert len(raised_at(Starvation(), [*rows, (3, ratios(0.5)[0]), (3, rows[2][1])])) == 1


class Given:
    """Holds where a list says so."""

    name = "given"

    def __init__(self, *states: dict[str, bool | None] | Exception) -> None:
        self.states = list(states)

    def state(self, rows: Sequence[Any]) -> dict[str, bool | None]:
        found = self.states[len(rows) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    def text(self, places: Sequence[str], rows: Sequence[Any]) -> str:
        return f"seen in {' and '.join(places)}."


def squared(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square().mean(1)


def watched(condition: Any, rows: int, sinks: Any = (), state: Any = None) -> RiskMonitor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = RiskMonitor(
        model, squared, sgd, every=1, quantities=[Loss()], sinks=sinks, conditions=[condition]
    )
    if state is not None:
        monitor.load_state_dict(state)
    for _ in range(rows):
        monitor.step(torch.randn(4, 3), torch.randn(4, 1))
        sgd.step()
    return monitor


States = dict[str, "bool | None"]
YES: States = {"a": True}
NO: States = {"a": False}
BETWEEN: States = {"a": None}


def test_alerts_are_kept_logged_and_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    rows: list[Any] = []
    texts: list[Any] = []

    def keep(*row: Any) -> None:
        rows.append(row)

    def nothing(*row: Any, **step: Any) -> None:
        pass

    def send(**how: Any) -> None:
        texts.append(how)

    def add_text(*text: Any) -> None:
        texts.append(text)

    writers = (
        SimpleNamespace(add_scalar=nothing, add_text=add_text),
        SimpleNamespace(add_scalar=nothing),
        SimpleNamespace(log=nothing),
        SimpleNamespace(log=nothing, alert=send),
    )
    with caplog.at_level(logging.WARNING, "poprisk.monitor"):
        monitor = watched(Given(NO, YES, BETWEEN, YES, NO, YES), 6, [path, keep, *writers])
    said = [(1, "given", ("a",), "seen in a."), (5, "given", ("a",), "seen in a.")]
    assert [tuple(alert) for alert in monitor.alerts] == said
    assert caplog.messages == ["step 1: given: seen in a.", "step 5: given: seen in a."]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 3, 4, 5, 5]
    assert lines[2] == {"step": 1, "alert": "given", "places": ["a"], "text": "seen in a."}
    assert len(rows) == len(monitor.rows) == 6
    sent = {"title": "given", "text": "seen in a.", "level": "WARN"}
    assert texts == [("alert/given", "seen in a.", 1), sent, ("alert/given", "seen in a.", 5), sent]


def test_a_resumed_run_does_not_say_it_again(caplog: pytest.LogCaptureFixture) -> None:
    first = watched(Given(YES), 1)
    again = watched(Given(BETWEEN, YES, NO, YES), 4, state=first.state_dict())
    assert [alert.step for alert in again.alerts] == [4]
    old = watched(Given(YES), 1, state={"steps": 7})
    assert [alert.step for alert in old.alerts] == [7]
    bad: list[Any] = [{"steps": 1, "holding": 3}, {"holding": {"a": 1}}, {"steps": True}, None]
    for state in bad:
        with pytest.raises(ValueError, match="state_dict must be what"):
            first.load_state_dict(state)


def test_a_condition_or_a_sink_that_fails_is_said_once_and_rows_go_on() -> None:
    class Fails:
        def __call__(self, *row: Any) -> None:
            pass

        def alert(self, alert: Alert) -> None:
            raise OSError("no line")

    broken = Given(KeyError("loss"), KeyError("loss"), YES, NO, YES)
    with pytest.warns(RuntimeWarning) as said:
        monitor = watched(broken, 5, [Fails()])
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert "cannot measure given: 'loss'" in texts[0]
    assert "no line" in texts[1]
    assert (len(monitor.rows), len(monitor.alerts)) == (5, 2)


def test_the_usual_conditions_are_looked_for_unless_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    cases: list[tuple[Any, list[int]]] = [(None, [19]), ((), [])]
    for conditions, expected in cases:
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        monitor = RiskMonitor(
            model, squared, sgd, every=1, quantities=[Loss()], conditions=conditions
        )
        for t in range(22):
            monitor.step(torch.ones(4, 3), torch.full((4, 1), 50.0 if t >= 16 else 9.0))
            sgd.step()
        assert [alert.step for alert in monitor.alerts] == expected


def test_a_gate_that_lets_nothing_through_is_starvation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    gated = poprisk.PopRiskAdamW(model, lr=1e-2, z=100.0)
    monitor = RiskMonitor(model, squared, gated, every=1)
    for _ in range(8):
        x, y = torch.randn(8, 3), torch.randn(8, 1)
        gated.zero_grad()
        squared(model(x), y).mean().backward()
        monitor.step(x, y)
        gated.step()
    assert [(a.name, a.places) for a in monitor.alerts] == [("starvation", ("0", "2"))]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Starvation(below=0.0), ValueError, r"below must lie in \(0, 0.5\], but got 0"),
        (lambda: Starvation(below="2%"), TypeError, "below must be a number"),  # pyrefly: ignore
        (lambda: Starvation(rows=0), ValueError, "rows must be positive"),
        (lambda: LabelMemorization(above=2.0), ValueError, r"above must lie in \(0, 1\]"),
        (lambda: Drift(reference=True), TypeError, "reference must be an integer"),
        (lambda: Alerts([Drift]), TypeError, "conditions must hold objects of poprisk.monitor"),
        (lambda: Alerts([Drift(), Drift()]), ValueError, "two are called 'drift'"),
        (lambda: watched("drift", 0), TypeError, "conditions must hold .* got 'drift'"),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Trackio:
    """The parts of trackio that are used, with its signatures (0.43)."""

    def __init__(self) -> None:
        self.__name__ = "trackio"
        self.AlertLevel = SimpleNamespace(WARN=SimpleNamespace(value="warn"))
        self.said: list[Any] = []

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.said.append((step, metrics))

    def alert(
        self,
        title: str,
        text: str | None = None,
        level: Any = None,
        webhook_url: str | None = None,
    ) -> None:
        self.said.append((title, text, level.value))


@pytest.mark.parametrize("by_name", [False, True])
def test_trackio_gets_rows_and_alerts(monkeypatch: pytest.MonkeyPatch, by_name: bool) -> None:
    trackio = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    watched(Given(NO, YES), 2, ["trackio" if by_name else trackio])
    assert [said[0] for said in trackio.said] == [0, 1, "given"]
    assert trackio.said[2] == ("given", "seen in a.", "warn")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_not_installed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"sinks: '{name}' needs the package .* pip install"):
        watched(Given(), 0, name)


def test_an_alert_does_not_change_a_training() -> None:
    weights = []
    alternating = [Given(*[YES, NO, YES, NO, YES, NO, YES, NO])]
    for conditions in (None, alternating):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        quantities = [Loss(), Measured("norm", lambda: float(torch.rand(())))]
        monitor = RiskMonitor(
            model, squared, sgd, every=1, quantities=quantities, conditions=conditions
        )
        for _ in range(8):
            x, y = torch.randn(4, 3), torch.randn(4, 1)
            sgd.zero_grad()
            squared(model(x), y).mean().backward()
            monitor.step(x, y)
            sgd.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
