"""Comparisons from a notebook: one call, of tasks that only this process knows; frames, figures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

import poprisk_lab
import tiny
from poprisk import Task
from poprisk.intervals import t_interval
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.compared import METRICS, Compared, compare
from poprisk_lab.page.draw import painted
from poprisk_lab.page.series import arm_series
from poprisk_lab.plots import Line, Plot
from poprisk_lab.store import RunDirectoryError
from poprisk_lab.tasks import TaskError
from poprisk_lab.work import TrainingError

ADAMW = "adamw-lr0.001-wd0.01"
FEW = ["poprisk", ADAMW, "rms-matched"]


def silent(**more: Any) -> dict[str, Any]:
    return {"arms": FEW, "progress": False, **more}


@pytest.fixture(scope="module")
def found() -> Compared:
    return compare(tiny.tiny, arms=[*FEW, "stopped-lr0.001-wd0.01"], progress=False)


def numbers(found: Compared) -> list[dict[str, Any]]:
    rows = [*found.data.epochs, *found.data.ends.values()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_the_package_offers_it_without_importing_it() -> None:
    assert poprisk_lab.compare is compare
    assert poprisk_lab.Compared is Compared
    with pytest.raises(AttributeError, match="no attribute 'comparing'"):
        _ = poprisk_lab.comparing


# --- training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_this_process_trains_what_workers_train() -> None:
    by_name = compare(tiny.source("tiny"), seeds=1, workers=2, **silent())
    here = compare(tiny.tiny, seeds=1, **silent())
    assert numbers(here) == numbers(by_name)


def test_a_function_of_a_notebook_gets_the_seed_and_its_settings() -> None:
    asked = list[tuple[int, int]]()

    def local(seed: int, width: int = 8) -> Task:
        asked.append((seed, width))
        return tiny.tiny(seed)

    found = compare(local, seeds=[3, 5], settings={"width": 4}, epochs=1, **silent())
    assert {*asked} == {(3, 4), (5, 4)}
    assert found.data.config["task"]["source"].endswith("<locals>.local")
    assert {seed for _, seed in found.data.ends} == {3, 5}


def test_a_task_is_one_for_all_seeds_and_stays_as_it_was() -> None:
    task = tiny.tiny(epochs=3)
    found = compare(task, seeds=2, epochs=1, **silent())
    assert task.epochs == 3
    assert found.data.config["task"]["epochs"] == 1
    assert found.data.config["task"]["source"] == "tiny"
    with pytest.raises(TaskError, match=r"task tiny is made already and takes no settings.* 'a'"):
        compare(task, settings={"a": 1}, **silent())


def test_random_numbers_go_on_as_if_nothing_had_trained() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    compare(tiny.tiny, seeds=1, epochs=1, **silent())
    assert torch.equal(torch.rand(3), expected)


def test_arms_by_name_by_family_and_of_ones_own() -> None:
    fast = Arm("fast", "AdamW, fast", "adamw", "adamw", {"lr": 0.1, "weight_decay": 0.0})
    found = compare(tiny.tiny, seeds=1, epochs=1, arms=["shuffled", "adamw", fast], progress=False)
    grid = [arm.name for arm in default_arms(full=False) if arm.family == "adamw"]
    assert [arm["name"] for arm in found.data.config["arms"]] == [*grid, "shuffled", "fast"]
    assert not found.data.config["full"]


def test_a_directory_goes_on_with_more_seeds_and_starts_over_when_asked(tmp_path: Path) -> None:
    told = list[tuple[int, int]]()

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    common: dict[str, Any] = {"arms": FEW, "directory": tmp_path, "progress": tell}
    first = compare(tiny.tiny, seeds=1, epochs=1, **common)
    more = compare(tiny.tiny, seeds=2, epochs=1, **common)
    assert told == [*((d, 3) for d in range(4)), *((d, 6) for d in range(3, 7))]
    assert first.directory == more.directory == tmp_path
    assert numbers(more)[:3] == numbers(first)[:3]
    with pytest.raises(RunDirectoryError, match=r"differs in task\.epochs.*start over"):
        compare(tiny.tiny, seeds=1, epochs=2, **common)
    told.clear()
    again = compare(tiny.tiny, seeds=1, fresh=True, epochs=2, **common)
    assert told[0] == (0, 3)
    assert {seed for _, seed in again.data.ends} == {0}
    assert again.data.config["task"]["epochs"] == 2


def test_a_run_of_fewer_default_arms_goes_on_as_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an earlier version, which had no PopRiskSOAP; --fresh takes it up."""
    known = [a for a in default_arms(full=False) if a.name in ("poprisk", "adamw-lr0.001-wd0.01")]
    arms = [*known]

    def of_a_version(*, full: bool) -> list[Arm]:
        return [*arms]

    monkeypatch.setattr("poprisk_lab.compared.default_arms", of_a_version)
    settings: dict[str, Any] = {"epochs": 1, "directory": tmp_path, "progress": False}
    compare(tiny.tiny, seeds=1, **settings)
    arms.append(next(a for a in default_arms(full=False) if a.name == "poprisk-soap"))
    found = compare(tiny.tiny, seeds=2, **settings)
    assert [a["name"] for a in found.data.config["arms"]] == [a.name for a in known]
    assert len(found.data.ends) == 4
    fresh = compare(tiny.tiny, seeds=1, fresh=True, **settings)
    assert [a["name"] for a in fresh.data.config["arms"]] == [a.name for a in arms]


def test_a_function_that_was_changed_is_another_task(tmp_path: Path) -> None:
    def local() -> Task:
        return tiny.tiny()

    def other() -> Task:
        return tiny.tiny(0)

    other.__qualname__ = local.__qualname__
    compare(local, seeds=1, epochs=1, directory=tmp_path, **silent())
    compare(local, seeds=1, epochs=1, directory=tmp_path, **silent())
    with pytest.raises(RunDirectoryError, match=r"task\.data: the data or the task's file"):
        compare(other, seeds=1, epochs=1, directory=tmp_path, **silent())


def test_a_training_that_fails_keeps_those_before_it(tmp_path: Path) -> None:
    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        if done[-1:] == [1]:
            raise ArithmeticError("the loss gave up")
        return tiny.cross_entropy(outputs, targets)

    done, task = list[int](), tiny.tiny()
    object.__setattr__(task, "loss", failing)
    with pytest.raises(TrainingError, match=f"{ADAMW}, seed 0 failed:\n"):
        compare(task, arms=FEW, directory=tmp_path, progress=lambda d, _: done.append(d))
    assert (tmp_path / "trials" / "poprisk-0.jsonl").read_text().count("\n") == 6


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": 0}, "seeds must be"),
    ({"seeds": []}, r"seeds must be a number or different seeds, but got \[\]"),
    ({"seeds": [1, 1]}, r"different seeds, but got \[1, 1\]"),
    ({"epochs": 0}, "epochs must be"),
    ({"workers": 0}, "workers must be"),
    ({"workers": 2}, "workers=2 needs a task that other processes can make: write it to a file"),
    ({"arms": ["adam"]}, "arms must be of poprisk, adamw, .* such as adamw-.*, but got 'adam'"),
    ({"arms": []}, "but got none"),
    ({"arms": ["rms-matched"]}, "arm rms-matched must come after poprisk"),
    ({"device": "nowhere"}, "device 'nowhere' cannot be used here"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny.tiny, directory=tmp_path / "run", **silent(**wrong))
    assert not (tmp_path / "run").exists()


# --- progress -------------------------------------------------------------------------------------


class Kernel:
    """IPython as a notebook's kernel has it: a shell, and outputs that can be replaced."""

    def __init__(self) -> None:
        self.shown = list[str]()
        self.IPython, self.display = ModuleType("IPython"), ModuleType("IPython.display")
        self.IPython.get_ipython = lambda: SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
        self.display.HTML = str  # type: ignore[attr-defined]
        self.display.display = self.handle  # type: ignore[attr-defined]

    def handle(self, first: str, *, display_id: bool) -> Any:
        assert display_id
        return SimpleNamespace(update=self.shown.append)


def test_a_notebook_shows_one_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Kernel()
    monkeypatch.setitem(sys.modules, "IPython", kernel.IPython)
    monkeypatch.setitem(sys.modules, "IPython.display", kernel.display)
    compare(tiny.tiny, seeds=1, epochs=1, arms=FEW)
    assert len(kernel.shown) == 4
    assert kernel.shown[-1] == '<progress value="3" max="3"></progress> 3 of 3 trainings'
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_the_bar_of_the_command_and_a_pipe_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(tiny.tiny, seeds=1, epochs=1, arms=FEW)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    compare(tiny.tiny, seeds=1, epochs=1, arms=FEW)
    assert "3/3 runs" in capsys.readouterr().out


# --- results --------------------------------------------------------------------------------------


def test_the_table_has_a_row_an_arm_with_numbers_in_columns(found: Compared) -> None:
    table = found.table.set_index("arm")
    ours, best = table.loc["PopRiskAdamW"], table.loc["AdamW, lr 0.001, decay 0.01"]
    finals = {
        name: t_interval([found.data.ends[name, seed]["final_metric"] for seed in range(3)])
        for name in ("poprisk", ADAMW)
    }
    assert tuple(ours[["final", "final_low", "final_high"]]) == finals["poprisk"][:3]
    assert tuple(best[["final", "final_low", "final_high"]]) == finals[ADAMW][:3]
    assert ours["difference"] == pytest.approx(finals["poprisk"].mean - finals[ADAMW].mean)
    assert math.isnan(best["difference"])
    assert (table["seeds"] == 3).all()
    assert all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes.drop("family"))


def test_the_curves_are_tidy(found: Compared) -> None:
    curves = found.curves
    assert list(curves.columns) == ["arm", "seed", "epoch", "metric", "value"]
    one = curves.query("arm == 'PopRiskAdamW' and seed == 1 and metric == 'test_loss'")
    rows = [r for r in found.data.epochs if (r["arm"], r["seed"]) == ("poprisk", 1)]
    assert one["epoch"].tolist() == [1, 2, 3, 4]
    assert one["value"].tolist() == [row["test_loss"] for row in rows]
    assert {*curves["metric"]} == {*METRICS}
    assert not curves["value"].isna().any()
    held_out = curves[curves["metric"] == "held_out_metric"]  # of no arm that trains on all
    assert {*held_out["arm"]} == {"AdamW, early stopping, lr 0.001, decay 0.01"}


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_drawn_in_the_colours_of_the_page(found: Compared, metric: str) -> None:
    figure = found.plot(metric)
    assert isinstance(figure, go.Figure)
    series = arm_series(found.data, found.verdict)
    traces = [*cast(Any, figure).data]
    names = {trace.name for trace in traces if trace.showlegend}
    assert names == {s.label for s in series}
    (ours,) = [t for t in traces if t.name == "PopRiskAdamW" and t.mode == "lines"]
    if metric != "held_out_metric":
        assert ours.line.color == "#e8500a"
        curves = found.curves.query("arm == 'PopRiskAdamW' and metric == @metric")
        assert list(ours.y) == pytest.approx(curves.groupby("epoch")["value"].mean(), rel=1e-4)
    bands = [t for t in traces if t.fill]
    assert {t.legendgroup for t in bands} <= {t.legendgroup for t in traces if t.showlegend}


def test_what_the_page_hides_waits_in_the_legend_with_its_band() -> None:
    line = Line("ours", [1, 2], [0.1, 0.2], "poprisk", low=[0.0, 0.1], high=[0.2, 0.3])
    plot = Plot("<b>", "epoch", "", [line, line._replace(name="other", colour="adamw")], "")
    figure = painted(plot, shown=[True, False])
    looks = {(t.legendgroup, bool(t.fill), t.visible) for t in cast(Any, figure).data}
    assert looks == {(s, f, (True, "legendonly")[int(s)]) for s in "01" for f in (True, False)}
    assert cast(Any, figure).layout.title.text == "&lt;b&gt;"


def test_a_metric_that_there_is_not_is_refused(found: Compared) -> None:
    with pytest.raises(ValueError, match="metric must be one of 'test_metric'"):
        found.plot("accuracy")
    without = Compared(found.data._replace(epochs=[]))
    with pytest.raises(ValueError, match="'memorized' was measured in no training"):
        without.plot("memorized")


def test_it_shows_itself_in_brief_and_as_a_table(found: Compared) -> None:
    assert repr(found).startswith("Compared(tiny, PopRiskAdamW ends at ")
    assert len(repr(found)) < 400
    page = found._repr_html_()
    assert page.startswith(f"<p><b>{found.verdict.headline}</b>")
    assert page.count("<tr>") == 1 + len(found.verdict.rows)


def test_markup_in_names_stays_text(found: Compared) -> None:
    arms = [{**arm, "label": f"<i>{arm['label']}"} for arm in found.data.config["arms"]]
    marked = Compared(found.data._replace(config={**found.data.config, "arms": arms}))
    assert "<i>" not in marked._repr_html_()
    assert "&lt;i&gt;PopRiskAdamW" in marked._repr_html_()


def test_it_writes_the_page(found: Compared, tmp_path: Path) -> None:
    found.write_report(tmp_path / "report.html")
    assert "PopRiskAdamW" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_stays_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compare(tiny.tiny, seeds=1, epochs=1, **silent()).directory is None
    assert [*tmp_path.iterdir()] == []
