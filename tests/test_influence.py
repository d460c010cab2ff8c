"""poprisk explain --query: its numbers are attribute's, its examples the right ones, its page."""

from __future__ import annotations

import csv
import errno
import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import poprisk_lab.influence as study
from poprisk.attribution import attribute, replay
from poprisk.path import NotAnalysable
from poprisk.path.drift import draw_batches
from poprisk.task import Task
from poprisk_lab.cli import app
from poprisk_lab.explain import EXPLANATION, ExplainPlan
from poprisk_lab.fit import seed_all
from poprisk_lab.influence import answer, influence_table, parse_query, words
from poprisk_lab.influence.examples import MOST_TEXT, shown_by
from poprisk_lab.influence.queries import Query, prediction_of
from poprisk_lab.page.influence import render
from poprisk_lab.store import RunDirectoryError, Store
from poprisk_lab.tasks import load_task

TASKS = """
from dataclasses import replace
import torch, tiny
from torch import nn

MARKUP = "<b>&</b></script>"

def net(outputs=2):
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))

def noisy(seed=0, epochs=6):
    task = tiny.tiny(seed, epochs=epochs)
    train, test = ([f"{MARKUP} {which} {i}" for i in range(n)]
                   for which, n in (("seen", 40), ("asked", 20)))
    return replace(task, name="noisy", model=net(), raw=(train, test), description=MARKUP)

def unknown(seed=0):
    return replace(noisy(seed), name="unknown", clean=None, raw=None)

def line(seed=0):
    return replace(tiny.regression(seed), name="line", epochs=6)

def right(seed=0):
    task = noisy(seed)
    x, y = task.train
    return replace(task, name="right", train=(x, task.clean), test=(x[:9], task.clean[:9]),
                   raw=None, epochs=60)

def one_logit(seed=0):
    def loss(u, y):
        return nn.functional.binary_cross_entropy_with_logits(u[:, 0], y.float(), reduction="none")
    def share(u, y):
        return ((u[:, 0] > 0) == y).double().mean().item()
    import poprisk
    return replace(noisy(seed), name="one logit", model=net(1), loss=loss,
                   metric=poprisk.Metric("share", share))
"""


def silent(*_: object) -> None: ...


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("influence")
    (path / "mine.py").write_text(TASKS, encoding="utf-8")
    return path


def plan_at(home: Path, task: str = "noisy", **changes: Any) -> ExplainPlan:
    return ExplainPlan(f"{home / 'mine.py'}:{task}", {}, lr=0.01)._replace(**changes)


def answered(plan: ExplainPlan, directory: Path, *texts: str, **more: Any) -> dict[str, Any]:
    queries, store = [parse_query(text) for text in texts], Store(directory, EXPLANATION)
    return answer(plan, queries, store, workers=0, say=silent, **more)


ASKED = ("test", "wrong", "3", "class=1")


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    return answered(plan_at(home), home / "run", *ASKED)


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the file of tasks; trials run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("poprisk_lab.runner.cores", lambda: 0)
    shutil.copy(home / "mine.py", tmp_path)
    return tmp_path


def by_hand(plan: ExplainPlan) -> tuple[Task, Any]:
    """The run of a plan, made with the library alone."""
    task = load_task(plan.source, seed=plan.seed)
    seed_all(plan.seed)
    model = task.new_model()
    steps = task.epochs * -(-len(task.train[1]) // task.batch_size)
    batches = draw_batches(len(task.train[1]), task.batch_size, steps, plan.seed, replace=False)
    adamw = torch.optim.AdamW(model.parameters(), lr=plan.lr)
    return task, replay(model, task.loss, adamw, batches, task.test, train=task.train)


def outputs_of(run: Any, w: Tensor) -> Tensor:
    return run.problem.shaped(run.problem.J.values(w, run.problem.query[0])).detach()


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(q for q in found["queries"] if q["name"] == name)


# --- what is measured -----------------------------------------------------------------------------


def test_the_numbers_are_those_of_attribute(found: dict[str, Any], home: Path) -> None:
    task, run = by_hand(plan_at(home))
    whole, query = attribute(run), of(found, "test")
    assert query["influence"] == whole.influence.tolist()
    assert (query["value"], query["valid"]) == (whole.value, whole.valid)
    assert (query["reason"], query["agreement"]) == (whole.reason, whole.agreement)
    assert query["standard_error"] == whole.standard_error
    top = whole.raising(10).tolist()
    assert [e["example"] for e in query["raising"]] == top == query["without"]["examples"]
    assert [e["influence"] for e in query["raising"]] == whole.influence[top].tolist()
    assert [e["example"] for e in query["lowering"]] == whole.lowering(10).tolist()
    mine = task.test[1] == 1
    of_class = attribute(run, (task.test[0][mine], task.test[1][mine]))
    assert of(found, "class-1")["influence"] == of_class.influence.tolist()
    assert of(found, "class-1")["examples"] == int(mine.sum()) < len(mine)


def test_a_prediction_is_its_margin_over_the_label_or_the_next_class(
    found: dict[str, Any], home: Path
) -> None:
    task, run = by_hand(plan_at(home))
    u, y = outputs_of(run, run.final), task.test[1]
    guess = u.argmax(1)
    wrong = (guess != y).nonzero().flatten().tolist()
    asked = [q["which"] for q in found["queries"] if q["kind"] == "prediction"]
    assert asked == [*dict.fromkeys([*wrong[:5], 3])]
    assert found["training"]["wrong"] == len(wrong)
    for i in asked:
        query, p = of(found, f"prediction-{i}"), int(guess[i])
        one = attribute(
            run, task.test[0][i : i + 1], measure=lambda u, _, p=p: u[0, p] - u[0, 1 - p]
        )
        assert query["influence"] == one.influence.tolist()
        assert query["value"] == one.value > 0
        assert query["prediction"] == {"predicted": p, "label": int(y[i]), "rival": 1 - p}


@pytest.mark.parametrize(
    ("outputs", "label", "expected"),
    [
        ([0.0, 3.0, 1.0], 0, (1, 0, 0)),
        ([0.0, 3.0, 1.0], 1, (1, 1, 2)),
        ([0.0, 3.0, 1.0], -100, (1, -1, 2)),
        ([-2.0], 1, (0, 1, 1)),
        ([2.0], 1, (1, 1, 0)),
    ],
)
def test_what_a_prediction_is_up_against(
    outputs: list[float], label: int, expected: tuple[int, int, int]
) -> None:
    assert prediction_of(torch.tensor(outputs), label) == expected


def test_without_them_is_a_training_without_them(found: dict[str, Any], home: Path) -> None:
    task, _ = by_hand(plan_at(home))
    query = of(found, "test")
    kept = torch.ones(40)
    kept[query["without"]["examples"]] = 0
    seed_all(0)
    model = task.new_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = task.train
    for batch in draw_batches(40, task.batch_size, 30, 0, replace=False):
        adamw.zero_grad()
        (kept[batch] * task.loss(model(x[batch]), y[batch])).mean().backward()
        adamw.step()
    loss = float(task.loss(model(task.test[0]), task.test[1]).mean().detach())
    assert query["without"]["measured"] == pytest.approx(loss, rel=1e-5)
    predicted = query["value"] - sum(e["influence"] for e in query["raising"])
    assert query["without"]["predicted"] == pytest.approx(predicted, rel=1e-5)


def test_what_a_prediction_turns_into(found: dict[str, Any]) -> None:
    """A margin below 0 is the other one's."""
    asked = [q for q in found["queries"] if q["kind"] == "prediction"]
    for query in asked:
        prediction, without = query["prediction"], query["without"]
        flipped = without["measured"] < 0
        assert without["says"] == prediction["rival" if flipped else "predicted"]
    assert {q["without"]["measured"] < 0 for q in asked} >= {True}


def test_wrong_labels_are_marked_counted_and_summed(found: dict[str, Any], home: Path) -> None:
    task = load_task(plan_at(home).source, seed=0)
    assert task.clean is not None
    wrong = task.train[1] != task.clean
    assert found["labels"] == {"examples": 40, "wrong": 12}
    query = of(found, "test")
    influence = torch.tensor(query["influence"], dtype=torch.float64)
    for example in [*query["raising"], *query["lowering"]]:
        i = example["example"]
        assert example["wrong"] == bool(wrong[i])
        assert (example["label"], example["right"]) == (int(task.train[1][i]), int(task.clean[i]))
    assert query["depths"] == [[k, int(wrong[influence.topk(k).indices].sum())] for k in (10, 30)]
    assert query["curve"][-1] == [40, 12]
    for row in query["classes"]:
        mine = task.train[1] == row["label"]
        assert row["influence"] == pytest.approx(float(influence[mine].sum()))
        assert row["by_wrong"] == pytest.approx(float(influence[mine & wrong].sum()))
        assert (row["examples"], row["wrong"]) == (int(mine.sum()), int((mine & wrong).sum()))


@pytest.mark.slow
def test_planted_labels_are_the_most_harmful(tmp_path: Path) -> None:
    plan = ExplainPlan("digits", {"hidden": 32, "noise": 0.2}, lr=3e-3)
    query = of(answered(plan, tmp_path / "run", "test"), "test")
    assert query["valid"]
    assert [w for _, w in query["depths"]][:2] >= [9, 27]
    assert not any(e["wrong"] for e in query["lowering"])
    assert query["without"]["measured"] < query["value"]


def test_numbers_have_an_error_and_no_wrong_labels(home: Path, tmp_path: Path) -> None:
    plan = plan_at(home, "line")
    query = of(found := answered(plan, tmp_path / "run", "3"), "prediction-3")
    task, run = by_hand(plan)
    off = outputs_of(run, run.final)[3, 0] - task.test[1][3, 0]
    assert query["value"] == pytest.approx(abs(float(off)))
    sign = float(off.sign())
    one = attribute(run, task.test[0][3:4], measure=lambda u, _: sign * u[0, 0])
    torch.testing.assert_close(torch.tensor(query["influence"]), one.influence)
    assert query["quantity"] == ("output minus target" if sign > 0 else "target minus output")
    assert found["labels"]["wrong"] is None
    assert (query["classes"], query["depths"]) == ([], [])
    assert "wrong labels" not in words.summary(found).head
    assert words.headline(found).startswith("Trained without the 10 training examples that")


def test_a_model_of_one_logit(home: Path, tmp_path: Path) -> None:
    plan = plan_at(home, "one_logit")
    found = answered(plan, tmp_path / "run", "wrong")
    task, run = by_hand(plan)
    u, y = outputs_of(run, run.final)[:, 0], task.test[1]
    assert found["training"]["wrong"] == int(((u > 0).long() != y).sum())
    for query in found["queries"]:
        assert query["value"] == pytest.approx(abs(float(u[query["which"]])))
        assert query["prediction"]["predicted"] == int(u[query["which"]] > 0)


# --- the directory --------------------------------------------------------------------------------


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    queries = [{k: v for k, v in q.items() if k != "trainings"} for q in found["queries"]]
    training = {k: v for k, v in found["training"].items() if k != "seconds"}
    return {**found, "queries": queries, "training": training}


def test_it_goes_on_and_takes_more_queries(
    found: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    torn = tmp_path / "run" / "trials" / "class-1.jsonl"
    torn.write_bytes(torn.read_bytes()[:-9])  # within the row of its end
    done, measure = list[Any](), study.measure

    def noted(plan: ExplainPlan, settings: dict[str, Any], workspace: Any) -> dict[str, Any]:
        done.append((settings["part"], settings.get("kind"), settings.get("which")))
        return measure(plan, settings, workspace)

    monkeypatch.setattr(study, "measure", noted)
    again = answered(plan_at(home), tmp_path / "run", *ASKED)
    assert done == [("query", "class", 1)]
    assert without_times(again) == without_times(found)
    more = answered(plan_at(home), tmp_path / "run", "test", "class=0")
    assert done[1:] == [("query", "class", 0)]
    assert [q["name"] for q in more["queries"]] == ["test", "class-0"]
    with pytest.raises(RunDirectoryError, match="it differs in lr"):
        answered(plan_at(home, lr=0.02), tmp_path / "run", "test")
    fresh = answered(plan_at(home, lr=0.02), tmp_path / "run", "test", fresh=True)
    assert fresh["queries"][0]["value"] != of(found, "test")["value"]


def test_an_explanation_is_another_run(home: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "run", EXPLANATION)
    config = {"format": 1, "explain": plan_at(home)._asdict(), "data": ""}
    store.create(config, {})
    with pytest.raises(RunDirectoryError, match="differs in data, query, seconds"):
        answered(plan_at(home), store.path, "test")


# --- what is said ---------------------------------------------------------------------------------


def edited(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same with changes to every answer."""
    return {**found, "queries": [{**q, **changes} for q in found["queries"]]}


def test_the_headline_counts_the_wrong_labels(found: dict[str, Any]) -> None:
    good = edited(found, valid=True, reason="")
    n = sum(e["wrong"] for e in of(found, "test")["raising"])
    assert words.headline(good) == (
        f"Of the 10 most harmful training examples, {n} have a wrong label; of all, 30% have."
    )
    assert words.warnings(good) == []
    good["queries"] = [of(good, "class-1")]
    assert "training examples for test examples of class 1, " in words.headline(good)
    good["labels"] = {"examples": 40, "wrong": None}
    assert words.headline(good).startswith("Trained without the 10 most harmful examples, the mean")
    good["queries"] = [{**good["queries"][0], "without": None}]
    assert words.headline(good) == "No training example raised the mean test loss of class 1."


@pytest.mark.parametrize(
    ("says", "measured", "told"),
    [
        (0, -0.5, "test example 3 is predicted 0, not 1."),
        (1, 0.2, "is still predicted 1, by a margin of 0.2 instead of 0.9."),
    ],
)
def test_the_headline_of_a_prediction(
    found: dict[str, Any], says: int, measured: float, told: str
) -> None:
    query = of(edited(found, valid=True, reason="", value=0.9), "prediction-3")
    without = {"examples": [*range(10)], "predicted": 0.0, "measured": measured, "says": says}
    query |= {"without": without, "prediction": {"predicted": 1, "label": 0, "rival": 0}}
    assert words.headline({**found, "queries": [query]}).endswith(told)
    query["without"] = None
    expected = "No training example pushed the prediction of test example 3 there."
    assert words.headline({**found, "queries": [query]}) == expected


def test_what_is_not_valid_is_said_first(found: dict[str, Any], home: Path) -> None:
    task = load_task(plan_at(home).source, seed=0)
    bad = edited(found, valid=False, reason="it was not smooth")
    page = html.unescape(render(bad, task, {}))
    headline = page.index("None of these answers can be believed.")
    assert headline < page.index("not to be believed, since it was not smooth.")
    assert page.index("not to be believed, since") < page.index("<table")
    assert page.count("<strong>Not to be believed:</strong> it was not smooth.") == len(
        bad["queries"]
    )
    assert words.ADVICE in page
    bad["queries"][0] = {**bad["queries"][0], "valid": True}
    some = html.unescape(render(bad, task, {}))
    assert "None of these" not in some
    assert some.count("not to be believed, since") == len(bad["queries"]) - 1
    assert words.headline({**bad, "queries": bad["queries"][1:2]}) == (
        "This number is not to be believed."
    )


def test_a_gate_is_held(home: Path, tmp_path: Path) -> None:
    found = answered(plan_at(home, optimizer="PopRiskAdamW"), tmp_path / "run", "test")
    assert not found["queries"][0]["valid"]
    held, advice = words.warnings(found)
    assert "the preconditioner of PopRiskAdamW is held" in held
    assert advice == words.HELD


def test_a_derivative_that_blew_up_shows_no_examples(home: Path, found: dict[str, Any]) -> None:
    task, query = load_task(plan_at(home).source, seed=0), of(found, "test")
    shown = ("raising", "lowering", "classes", "depths", "curve", "name", "kind", "which")
    lost = {k: v for k, v in query.items() if k not in shown}
    lost |= {"influence": None, "without": None, "agreement": None, "valid": False}
    blown = study.described(task, Query("test"), {**lost, "reason": "the adjoint blew up"})
    page = render({**found, "queries": [blown]}, task, {})
    assert page.count("None.</p>") == 2
    assert words.influential(blown).rows == []
    assert words.summary({**found, "queries": [blown]}).rows[0][2:6] == [
        "n/a", "n/a", "0 of 0", "no (n/a)"
    ]  # fmt: skip
    assert influence_table(task, {**found, "queries": [blown]})[0] == ["example", "label", "clean"]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_the_examples_of_each_answer(found: dict[str, Any], home: Path) -> None:
    task = load_task(plan_at(home).source, seed=0)
    page = render(found, task, {"torch": "2"})
    assert page == render(found, task, {"torch": "2"})
    assert page.count('<ol class="influential">') == 2 * len(found["queries"])
    shown = [e for q in found["queries"] for e in (*q["raising"], *q["lowering"])]
    assert page.count('<p class="caption">training example ') == len(shown)
    assert page.count('class="tag wrong"') == sum(e["wrong"] for e in shown) > 0
    for query in found["queries"]:
        assert f'id="query-{query["name"]}"' in page
        assert html.escape(words.title(query)) in page
        for example in query["raising"]:
            assert words.influence(example["influence"]).replace("-", "\N{MINUS SIGN}") in page
            assert f"seen {example['example']}<" in page
    assert "asked 3<" in page
    assert page.count('class="plot"') == 2  # of the two mean losses
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<b>&</b>" not in outside
    assert html.escape("<b>&</b></script>") in outside
    assert not re.search(r"(src|href)=\"(?!data:)", outside)
    assert 'lang="en"' in page
    assert all(re.search('alt="[^"]', tag) for tag in re.findall("<img[^>]*>", outside))


def test_the_page_has_each_side_under_its_name(found: dict[str, Any], home: Path) -> None:
    page = render(found, load_task(plan_at(home).source, seed=0), {})
    parts = re.split('<section aria-labelledby="query-', page)[1:]
    for query, part in zip(found["queries"], parts, strict=True):
        order = [word.capitalize() for word in words.sides(query)]
        lists = part.partition("<h3>")[2].split("<h3>")[:2]
        for side, key, text in zip(order, ("raising", "lowering"), lists, strict=True):
            assert text.startswith(side)
            shown = re.findall("caption.>training example ([0-9]+)<", text)
            assert [int(i) for i in shown] == [e["example"] for e in query[key]]


def test_pictures_are_shown_of_digits() -> None:
    task = load_task("digits", seed=0)
    train, test = shown_by(task)
    from poprisk_lab.pictures import decode

    for show, x in ((train, task.train[0]), (test, task.test[0])):
        found = show(7)
        assert (found.width, found.height) == (8, 8)
        pixels = decode(found.picture.partition("base64,")[2])
        torch.testing.assert_close(pixels.double() / 255, x[7].view(8, 8).double(), atol=1 / 255,
                                   rtol=0)  # fmt: skip


def test_rows_are_shown_of_diabetes() -> None:
    task = load_task("diabetes", seed=0)
    cells = shown_by(task)[0](4).cells
    assert [*cells][:3] == ["age", "sex", "bmi"]
    assert 18 < float(cells["age"]) < 80


def with_raw(train: Any, test: Any = None) -> Task:
    import tiny

    return replace(tiny.tiny(), raw=(train, [""] * 20 if test is None else test))


PIXELS = np.arange(40 * 10).reshape(40, 2, 5)


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (PIXELS.astype(np.uint8), (5, 2)),
        (torch.tensor(PIXELS / 999), (5, 2)),
        (torch.tensor(PIXELS - 50.0)[:, None], (5, 2)),
        (np.zeros((40, 5, 4, 3), np.uint8), (4, 5)),
        (np.zeros((40, 3, 5, 4)), (4, 5)),
        (np.ones((40, 400, 200)), (48, 96)),
    ],
)
def test_raw_pictures(raw: Any, size: tuple[int, int]) -> None:
    shown = shown_by(with_raw(raw))[0](39)
    assert (shown.width, shown.height) == size
    assert shown.picture.startswith("data:image/png;base64,")


def test_raw_tables_and_texts() -> None:
    columns = {"age": [1.23456789] * 40, "place": ["here"] * 40}
    for raw in (columns, pd.DataFrame(columns)):
        assert shown_by(with_raw(raw))[0](39).cells == {"age": "1.23457", "place": "here"}
    assert shown_by(with_raw(["x" * 2000] * 40))[0](0).text == "x" * MOST_TEXT + " …"
    assert shown_by(with_raw(np.array(["ab"] * 40)))[0](0).text == "ab"


def test_without_raw_the_inputs_are_shown_where_they_say_something() -> None:
    import tiny

    task = tiny.tiny()
    assert [*shown_by(task)[0](0).cells] == [f"input {k}" for k in (1, 2, 3, 4)]
    for x, expected in (
        (torch.zeros(40, 1, 6, 5), "picture"),
        (torch.arange(80).view(40, 2), "text"),
        (torch.zeros(40, 500), ""),
    ):
        object.__setattr__(task, "train", (x, task.train[1]))
        shown = shown_by(task)[0](1)
        assert [k for k, v in shown._asdict().items() if v and k in ("picture", "text", "cells")] \
            == [expected] * bool(expected)  # fmt: skip
    object.__setattr__(task, "train", (torch.arange(80).view(40, 2), task.train[1]))
    assert shown_by(task)[0](1).text == "2 3"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (["a"] * 40, "raw must be a pair of what is shown .* but got list"),
        (("a" * 40, ["a"] * 20), "raw of the training examples must be pictures, .* but got str"),
        ((["a"] * 40, 3), "raw of the test examples must be .* but got int"),
        ((["a"] * 39, ["a"] * 20), "there are 40 training examples, but raw has 39"),
        (({"a": [1] * 40}, {"a": [1] * 20, "b": [1]}), "20 test examples, but raw has 1 of them"),
    ],
)
def test_raw_that_does_not_fit(raw: Any, message: str) -> None:
    import tiny

    with pytest.raises((TypeError, ValueError), match=message):
        replace(tiny.tiny(), raw=raw)


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments])


def test_a_run_from_end_to_end(here: Path) -> None:
    asked = ("--query", "test", "--query", "3", "--lr", "0.01")
    result = run("mine.py:noisy", *asked)
    assert result.exit_code == 0, result.output
    folder = here / "runs" / "explain-mine.py-noisy-query"
    assert f"Report: {(folder / 'report.html').relative_to(here)}" in result.stdout
    found = json.loads((folder / "explanation.json").read_text())
    assert [q["name"] for q in found["queries"]] == ["test", "prediction-3"]
    _, by_hand_run = by_hand(plan_at(here))
    influence = attribute(by_hand_run).influence.tolist()
    with (folder / "influence.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["test"]) for row in rows] == influence
    assert {*rows[0]} == {"example", "label", "clean", "test", "prediction-3"}
    first = found["queries"][0]["raising"][0]
    assert f"{first['example']}: {words.label(first)}" in result.stdout
    assert "most harmful" in result.stdout
    assert "pushed it there" in result.stdout
    assert words.headline(found) in result.stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert html.escape(words.headline(found)) in page
    again = run("mine.py:noisy", *asked)
    assert "going back" not in again.stdout
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_a_full_disk_loses_no_word_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_at_the_end(path: Path, value: Any) -> None:
        if path.name == "explanation.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_text(json.dumps(value), encoding="utf-8")

    monkeypatch.setattr("poprisk_lab.store.write_json", full_at_the_end)
    result = run("mine.py:noisy", "--query", "test")
    assert result.exit_code == 2
    assert re.search(r"(most harmful training|answers|number|not to be believed)", result.stdout)
    assert result.stderr == (
        "poprisk: cannot write runs/explain-mine.py-noisy-query: No space left on device; choose "
        "another with --out.\n"
    )


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("poprisk: ")


@pytest.mark.parametrize(
    ("task", "query", "message"),
    [
        ("noisy", "20", "--query 20 is no position in the test set of noisy, whose 20 examples are "
         "0 to 19."),
        ("noisy", "-1", "--query must be a position in the test set (from 0), wrong, test or "
         "class=LABEL, but got '-1'."),
        ("noisy", "worst", "--query must be a position in the test set (from 0), wrong, test or "
         "class=LABEL, but got 'worst'."),
        ("noisy", "class=7", "--query class=7: no test example of noisy has that label; there are "
         "0, 1."),
        ("line", "wrong", "--query wrong needs one class an example as target, which line does not "
         "have; give a position in the test set, or test."),
        ("line", "class=1", "--query class=1 needs one class an example as target, which line does "
         "not have; give a position in the test set, or test."),
    ],
)  # fmt: skip
def test_bad_queries(here: Path, task: str, query: str, message: str) -> None:
    assert refused(f"mine.py:{task}", "--query", query) == message
    assert not (here / "runs").exists()


def test_other_bad_input(here: Path) -> None:
    said = refused("mine.py:noisy", "--query", "test", "--seconds", "9")
    assert said.startswith("--seconds is for the dense operators, which --query has none of")
    tiny = Path(__file__).with_name("tiny.py")
    assert "dropout" in refused(f"{tiny}:tiny", "--query", "test").lower()
    assert refused("mine.py:noisy", "--query", "test", "--optimizer", "Sofia").startswith(
        "there is no optimizer"
    )
    assert refused("mine.py:right", "--query", "wrong", "--lr", "0.05").startswith(
        "no test prediction is wrong; ask for one by its position"
    )
    none = run("mine.py:right", "--query", "wrong", "--query", "2", "--lr", "0.05")
    assert "No test prediction is wrong." in none.stdout
    assert (here / "runs").exists()


def test_data_that_is_read_batch_by_batch(here: Path) -> None:
    text = """
import tiny
from dataclasses import replace
from torch.utils.data import Subset, TensorDataset

def made():
    task = tiny.tiny()
    return replace(task, test=Subset(TensorDataset(*task.test), range(9)))
"""
    (here / "read.py").write_text(text, encoding="utf-8")
    with pytest.raises(NotAnalysable, match=r"reads its data batch by batch.* a pair of tensors"):
        answered(ExplainPlan("read.py:made", {}), here / "run", "test")
    assert not (here / "run").exists()


def test_the_length_of_the_training() -> None:
    from poprisk_lab.influence.measure import length_of

    task = load_task("digits", seed=0, hidden=8)
    assert length_of(ExplainPlan("digits", {}), task) == (10, 160)
    assert length_of(ExplainPlan("digits", {}, epochs=3), task) == (3, 48)
    assert length_of(ExplainPlan("digits", {}), replace(task, epochs=2)) == (2, 32)
