"""poprisk explain: what it measures, says and shows, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from poprisk.path import NotAnalysable
from poprisk.task import Task
from poprisk_lab import explain as study
from poprisk_lab.cli import app
from poprisk_lab.explain import EXPLANATION, ExplainPlan, explain, words
from poprisk_lab.explain.plan import choose_size, full_steps
from poprisk_lab.page.explanation import render
from poprisk_lab.store import RunDirectoryError, Store
from poprisk_lab.tasks import load_task

TINY = """
import torch, tiny, poprisk
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

def noisy(seed=0):
    task = tiny.tiny(seed, epochs=6)
    return poprisk.Task("noisy", net, task.loss, task.train, task.test, epochs=6, batch_size=8,
                        clean=task.clean, description="two classes <b>")

def unknown(seed=0):
    task = noisy(seed)
    return poprisk.Task("unknown", net, task.loss, task.train, task.test, epochs=6, batch_size=8)

def wide(seed=0):
    task = noisy(seed)
    wide = lambda: nn.Sequential(nn.Linear(4, 3000), nn.Tanh(), nn.Linear(3000, 300),
                                 nn.Linear(300, 2))
    return poprisk.Task("wide", wide, task.loss, task.train, task.test, epochs=1, batch_size=20,
                        clean=task.clean)

def line(seed=0):
    task = tiny.regression(seed)
    return poprisk.Task("line", task.model, task.loss, task.train, task.test, metric="mse",
                        epochs=6, batch_size=8, clean=task.clean)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a file of tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TINY, encoding="utf-8")
    return tmp_path


def silent(*_: object) -> None: ...


def made_up(
    *, channel: int = 5, total: int = 8, arms: bool = True, higher: bool = True
) -> dict[str, Any]:
    """What explain found, made up: two runs in which noise costs 15 points, and a small one."""
    rows = [
        {"step": s, "epoch": s / 8, "metric": m, "without_noise": w, "signal": 2.0, "noise": 0.5}
        | {"affine": 0.1}
        for s, m, w in ((0, 0.1, 0.1), (40, 0.9, 0.92), (80, 0.8, 0.95))
    ]
    names = ("AdamW", "PopRiskAdamW") if arms else ()
    metric = {"name": "accuracy", "percent": True, "higher_is_better": higher}
    cells = {"learned_signal": 2.0, "harmful_noise": 0.5, "trapped_signal": 0.0}
    cells |= {"benign_noise": 0.0, "affine": 0.1}
    closure = {"train": 1e-9, "query": 2e-3, "gradient": 1e-9}
    dense = {
        "n": 24,
        "m": 24,
        "steps": 128,
        "parameters": 963,
        "smaller": {"hidden": 32},
        "closure": closure,
        "notes": ["Exact."],
        "spectrum": {
            "relative": [10.0**-k for k in range(total)],
            "tol": 1e-3,
            "channel": channel,
            "dissipation_dimension": 3.14,
        },
        "residual": [[0, 1.0, 0.5], [128, 0.2, 0.05 if channel < total else 0.0]],
        "coupling": {"realized": [0.0, 1.0], "predicted": [0.0, 1.0], "frozen": [0.1, 0.7]}
        | {"correlation": 1.0, "error": 1e-5, "frozen_correlation": 0.9, "frozen_error": 0.3},
        "kernel_drift": [[0, 0.0], [128, 0.34]],
        "cells": {"closure": 1e-4, "rows": [{"step": s, **cells} for s in (0, 128)]},
        "drift": {"times": [1, 32], "drift": [0.1, 3.0], "diffusion": [0.1, 0.6]}
        | {"drift_exponent": [1.0, 0.9, 1.1], "diffusion_exponent": [0.5, 0.4, 0.6]},
    }
    return {
        "task": {"name": "made up", "description": "", "metric": metric, "train_examples": 1500},
        "plan": {},
        "arms": [{"optimizer": n, "steps": 80, "closure": closure, "rows": rows} for n in names],
        "dense": dense,
        "notices": [],
    }


def edited(found: dict[str, Any], *, now: float, without: float) -> dict[str, Any]:
    """The same, with another metric at the end."""
    for arm in found["arms"]:
        arm["rows"] = [*arm["rows"][:-1], {**arm["rows"][-1], "metric": now}]
        arm["rows"][-1]["without_noise"] = without
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of :func:`explained` is."""
    path = tmp_path_factory.mktemp("explain")
    (path / "mine.py").write_text(TINY, encoding="utf-8")
    return path


def plan_at(home: Path, **changes: Any) -> ExplainPlan:
    return ExplainPlan(f"{home / 'mine.py'}:noisy", {}, lr=0.01, seconds=3.0)._replace(**changes)


@pytest.fixture(scope="module")
def explained(home: Path) -> dict[str, Any]:
    store = Store(home / "run", EXPLANATION)
    return explain(plan_at(home), store, workers=0, say=silent)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of the trials that are done from here on."""
    found, measure = list[dict[str, Any]](), study.measure

    def noted(plan: ExplainPlan, settings: dict[str, Any], workspace: Any) -> dict[str, Any]:
        found.append(settings)
        return measure(plan, settings, workspace)

    monkeypatch.setattr(study, "measure", noted)
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("poprisk: ")


def test_everything_is_measured(explained: dict[str, Any]) -> None:
    assert [arm["optimizer"] for arm in explained["arms"]] == ["AdamW", "PopRiskAdamW"]
    for arm in explained["arms"]:
        assert arm["rows"][0]["metric"] == arm["rows"][0]["without_noise"]
        assert arm["rows"][-1]["noise"] > 0
        assert arm["closure"]["query"] < 0.1
    dense = explained["dense"]
    assert max(dense["closure"].values()) < 1e-6
    assert len(dense["spectrum"]["relative"]) == dense["n"] * 2
    assert dense["cells"]["rows"][-1]["learned_signal"] > 0
    assert dense["coupling"]["error"] < 1e-3
    low, high = dense["drift"]["drift_exponent"][1:]
    assert low < 1 < high
    json.dumps(explained, allow_nan=False)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(
    explained: dict[str, Any], home: Path, here: Path, measured: list[dict[str, Any]]
) -> None:
    shutil.copytree(home / "run", here / "run")
    torn = here / "run" / "trials" / "gated.jsonl"
    torn.write_bytes(torn.read_bytes()[:-9])  # within the row of its end
    told = set[str]()
    store = Store(here / "run", EXPLANATION)
    again = explain(plan_at(home), store, workers=0, say=lambda phase, *_: told.add(phase))
    assert measured == [{"part": "cells", "gated": True}]
    assert told == {"training with PopRiskAdamW", "splitting what PopRiskAdamW did"}
    assert again == explained
    assert len(list((here / "run" / "trials").glob("gated*.jsonl"))) == 2


@pytest.mark.usefixtures("explained")
def test_another_explanation_is_not_mixed_with_it(
    home: Path, here: Path, measured: list[dict[str, Any]]
) -> None:
    shutil.copytree(home / "run", here / "run")
    store, other = Store(here / "run", EXPLANATION), plan_at(home, epochs=1, seconds=1.0)
    with pytest.raises(
        RunDirectoryError, match=r"it differs in epochs, seconds\).* over \(--fresh\)"
    ):
        explain(other, store, workers=0, say=silent)
    (home / "mine.py").write_text(f"{TINY}\n# edited", encoding="utf-8")
    try:
        with pytest.raises(RunDirectoryError, match=r"it differs in data\)"):
            explain(plan_at(home), store, workers=0, say=silent)
    finally:
        (home / "mine.py").write_text(TINY, encoding="utf-8")
    assert not measured
    fresh = explain(other, store, workers=0, say=silent, fresh=True)
    assert fresh["arms"][0]["steps"] < 10
    assert len(measured) == 3


@pytest.mark.usefixtures("explained")
def test_report_of_an_explanation_says_where_its_page_is(home: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(home / "run")])
    assert found.exit_code == 2
    assert "holds an explanation, whose page is its report.html; repeat its" in found.stderr


def test_the_page_shows_each_plot_with_its_caption(explained: dict[str, Any]) -> None:
    page = render(explained, {"torch": "2"})
    assert page == render(explained, {"torch": "2"})
    assert page.count('class="plot"') == 10
    assert page.count("<figcaption>") == 10
    assert words.headline(explained) in page.replace("&#39;", "'")
    assert "two classes &lt;b&gt;" in page
    assert "closure error" in page
    assert re.search(r"training movement \d\.\de-\d\d", page)
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert all(json.loads(figure)["data"] for figure in figures)


def figures(found: dict[str, Any]) -> dict[str, str]:
    return {row[0]: row[1] for row in words.table(found).rows}


def test_the_table_holds_every_figure() -> None:
    found = figures(edited(made_up(), now=0.8, without=0.95))
    assert found["AdamW: test accuracy"] == "80.0%"
    assert found["AdamW: test accuracy without the label noise"] == "95.0%"
    assert found["AdamW: movement by label noise over that by signal (half-way)"] == "25% (25%)"
    assert found["AdamW: closure error"] == "0.002"
    assert found["AdamW: epochs (steps), examples"] == "10 (80), 1,500"
    assert found["small run: training examples"] == "24 of 1,500"
    assert found["small run: steps, weights"] == "128, 963, hidden=32"
    assert found["directions in the channel (above 0.001 of the largest)"] == "5 of 8"
    assert (found["squared residual left"], found["of it in the channel"]) == ("17%", "80%")
    assert found["test movement from the path, error (correlation)"] == "1.0e-05 (1.0000)"
    assert found["power of T in the diffusion (theory: 0.5)"] == "0.50 [0.40, 0.60]"
    assert (found["kernel drift, peak"], found["kernel drift, end"]) == ("0.34", "0.34")
    assert not any("AdamW" in name for name in figures(made_up(arms=False)))
    assert not any("small run" in name for name in figures({**made_up(), "dense": None}))


@pytest.mark.parametrize(
    ("error", "warned"),
    [(2e-3, ""), (0.05, "0.05: take it with care."), (0.5, "0.5: do not trust it.")],
)
def test_large_closure_errors_are_warned_of(error: float, warned: str) -> None:
    found = made_up()
    found["arms"][1]["closure"] = {"query": error}
    expected = [f"Closure error of PopRiskAdamW {warned}"] if warned else []
    assert words.warnings(found) == expected
    assert all(text in render(found, {}) for text in expected)


@pytest.mark.parametrize(
    ("now", "without", "higher", "said"),
    [
        (0.80, 0.95, True, "test accuracy would be 95.0% instead of 80.0%."),
        (0.934, 0.928, True, "does no harm: test accuracy is 93.4%, and would be 92.8% without"),
        (0.934, 0.934, True, "costs nothing: test accuracy is 93.4% with it and without it."),
        (0.9340001, 0.934, True, "costs nothing: test accuracy is 93.4% with it and without it."),
        (0.3, 0.2, False, "test accuracy would be 20.0% instead of 30.0%."),
        (0.2, 0.3, False, "does no harm: test accuracy is 20.0%, and would be 30.0% without it."),
    ],
)
def test_noise_that_cost_nothing_is_no_headline_of_harm(
    now: float, without: float, higher: bool, said: str
) -> None:
    found = edited(made_up(higher=higher), now=now, without=without)
    assert said in words.headline(found)
    assert said in render(found, {}).replace("&#39;", "'")


@pytest.mark.parametrize("worse", [0, 1])
def test_the_headline_tells_of_either_optimizer_in_one_form(worse: int) -> None:
    """Also where the noise costs ours more."""
    found = made_up()
    for i, arm in enumerate(found["arms"]):
        end = {"metric": 0.6 if i == worse else 0.8, "without_noise": 0.9}
        arm["rows"] = [*arm["rows"][:-1], {**arm["rows"][-1], **end}]
    costs = "the label noise that got through costs: test accuracy would be 90.0% instead of"
    first, second = ("60.0%", "80.0%") if worse == 0 else ("80.0%", "60.0%")
    expected = f"With AdamW, {costs} {first}. With PopRiskAdamW, {costs} {second}."
    assert words.headline(found) == expected
    assert expected in render(found, {})


@pytest.mark.parametrize("used", [0, 5, 7, 8])
def test_there_are_no_others_when_all_directions_are_used(used: int) -> None:
    found = made_up(channel=used, arms=False)
    assert ("the others stayed" in words.headline(found)) == (used < 8)
    if used == 8:
        assert words.headline(found).startswith("Training used all 8 directions; none stayed")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare operators of many steps, whose figures ``explained`` holds."""
    monkeypatch.setattr("poprisk_lab.explain.plan.SIZES", ((16, 24),))
    # By its module: the package has a function of that name.
    monkeypatch.setattr(sys.modules["poprisk_lab.explain.measure"], "REPLICATES", 3)
    monkeypatch.setattr("poprisk_lab.runner.cores", lambda: 0)  # in this process


@pytest.mark.slow
@pytest.mark.usefixtures("little")
def test_a_run_from_end_to_end(here: Path) -> None:
    result = run("mine.py:line", "--seed", "1", "--epochs", "3", "--seconds", "3")
    assert result.exit_code == 0, result.output
    assert re.search(r"label noise that got through .* test mean squared error", result.stdout)
    page = here / "runs" / "explain-mine.py-line" / "report.html"
    assert f"Report: {page.relative_to(here)}" in result.stdout
    assert page.exists()
    found = json.loads((page.parent / "explanation.json").read_text())
    assert found["plan"]["seed"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("little")
def test_without_clean_targets_it_says_so(here: Path) -> None:
    result = run("mine.py:unknown", "--seconds", "3")
    assert result.exit_code == 0, result.output
    assert "does not say what its clean targets are" in result.stdout
    assert re.search(r"Training used (all \d+ directions|\d+ of \d+ directions)", result.stdout)
    assert re.search(r"small run: training examples +\d+ of \d+", result.stdout)


def test_too_large_for_operators_it_keeps_the_cells(here: Path) -> None:
    (here / "here").mkdir()
    (here / "here" / "explanation.json").write_text("{}")  # as a version before left it
    result = run("mine.py:wide", "--seconds", "0.5", "--out", "here")
    assert result.exit_code == 0, result.output
    assert "No operators: dense operators of a model with" in result.stdout
    assert "give more time (--seconds)" in result.stdout
    assert "test accuracy without the label noise" in result.stdout
    assert json.loads((here / "here" / "explanation.json").read_text())["dense"] is None


# --- refusals -------------------------------------------------------------------------------------


def test_a_model_with_dropout() -> None:
    tiny = Path(__file__).with_name("tiny.py")
    assert "set dropout to 0" in refused(f"{tiny}:tiny")


def test_data_that_is_read_batch_by_batch(here: Path) -> None:
    text = """
import torch, tiny
from dataclasses import replace
from torch.utils.data import Subset, TensorDataset

def made():
    task = tiny.tiny()
    return replace(task, test=Subset(TensorDataset(*task.test), range(9)))
"""
    (here / "read.py").write_text(text, encoding="utf-8")
    store = Store(here / "run", EXPLANATION)
    with pytest.raises(NotAnalysable, match=r"reads its data batch by batch.* a pair of tensors"):
        explain(ExplainPlan("read.py:made", {}), store, workers=0, say=silent)
    assert not store.path.exists()


def test_an_optimizer_without_a_rule(here: Path) -> None:
    assert refused("mine.py:noisy", "--optimizer", "NAdam").startswith("NAdam has no rule")
    assert refused("mine.py:noisy", "--optimizer", "Sofia", "--out", "x").startswith(
        "there is no optimizer"
    )
    assert not (here / "x").exists()


def test_bad_arguments(here: Path) -> None:
    assert refused("digit").startswith("unknown task 'digit'")
    assert refused("mine.py:noisy", "--epochs", "0") == "--epochs must be at least 1, but got 0."
    assert refused("mine.py:noisy", "--seconds", "0") == "--seconds must be positive, but got 0."
    (here / "file").write_text("")
    assert refused("mine.py:line", "--out", "file/x", "--seconds", "3").startswith(
        "cannot write the run directory file/x"
    )


def test_sizes_fit_the_time() -> None:
    task: Task = load_task("digits", seed=0, hidden=32)
    large, small = (choose_size(task, task.model(), s) for s in (1e4, 50.0))
    assert large.n > small.n
    assert large.m == large.n
    with pytest.raises(NotAnalysable, match="even for 16 examples"):
        choose_size(task, task.model(), 0.1)
    assert full_steps(ExplainPlan("digits", {}), task) == (40, 640)
    assert full_steps(ExplainPlan("digits", {}, epochs=3), task) == (3, 48)
