"""The script that makes and judges the rule of `poprisk advise`, and what is on record of it."""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from poprisk import Task
from poprisk.randomness import RandomState
from poprisk_lab.advise.rule import CANDIDATES, KINDS, RIVALS, THRESHOLDS, TRACK
from poprisk_lab.arms import Arm
from poprisk_lab.fit import ArmRun

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORD = BENCHMARKS / "results" / "advise.json"
ARMS = [
    Arm("poprisk", "", "poprisk", "poprisk"),
    Arm("adamw", "", "adamw", "adamw", {"lr": 3e-3, "weight_decay": 1.0}),
]


def modules() -> Iterator[ModuleType]:
    for name in ("advise_tasks", "advise_truth", "advise"):
        yield importlib.import_module(name)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """The tasks, what trains them and what judges; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with RandomState.kept():
        yield list(modules())
    for name in ("advise_tasks", "advise_truth", "advise"):
        del sys.modules[name]


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def plain(seed: int = 0) -> Task:
    task = tiny.tiny(seed, epochs=12)
    object.__setattr__(task, "model", two_layers)
    return task


def line(seed: int = 0) -> Task:
    """A last batch of another size than the others, and no bias."""
    task = tiny.regression(seed, epochs=12)
    object.__setattr__(task, "model", lambda: nn.Linear(4, 1, bias=False))
    object.__setattr__(task, "batch_size", 12)
    return task


def mean_loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """In place of an accuracy, of which many trainings have the same."""
    return float(task.loss(outputs, targets).mean())


@pytest.mark.parametrize("make", [plain, line, tiny.tiny])
def test_seeds_in_one_tensor_end_as_those_of_a_comparison(
    make: Any, scripts: list[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, truth, _ = scripts

    def loaded(_: str, seed: int) -> Task:
        return make(seed)

    monkeypatch.setattr(truth, "load_task", loaded)
    monkeypatch.setattr(truth, "score", mean_loss)
    monkeypatch.setattr("poprisk_lab.fit.score", mean_loss)
    assert truth.is_plain(make().new_model()) == (make is not tiny.tiny)
    found = truth.train("any", {}, (0, 2, 3), ARMS)
    for arm in ARMS:
        single = [[*ArmRun(make(s), arm, s).rows()][-1]["final_metric"] for s in (0, 2, 3)]
        assert found[arm.name] == pytest.approx(single, rel=1e-4)
        assert len({round(value, 3) for value in single}) == 3


def test_levels_have_names_and_records(scripts: list[ModuleType]) -> None:
    tasks, _, script = scripts
    levels = tasks.levels()
    names = [level.name for level in levels]
    assert len({*names}) == len(names)
    assert {*names} >= script.SEEN
    recorded = json.loads((BENCHMARKS / "results" / "comparisons.json").read_text("utf-8"))
    assert {level.recorded for level in levels} <= {"", *recorded}
    assert {level.group for level in levels if level.source.startswith("digits")} == {"digits"}


def test_scaled_and_added_noise(scripts: list[ModuleType]) -> None:
    tasks, *_ = scripts
    one, three = (tasks.scaled(1, factor=f) for f in (1.0, 3.0))
    expected = 3 * (one.train[1] - one.clean)
    assert torch.allclose(three.train[1] - three.clean, expected, atol=1e-5)
    assert torch.equal(one.test[1], three.test[1])
    noisy = tasks.noisier(1, noise=2.0)
    e = noisy.train[1] - noisy.clean
    assert float(e.std()) == pytest.approx(2.0, rel=0.15)
    flipped = tasks.labels(1, data="wine", noise=0.4)
    assert int((flipped.train[1] != flipped.clean).sum()) == 48


def test_an_outcome_is_what_its_interval_says(scripts: list[ModuleType]) -> None:
    *_, script = scripts
    same = [0.5, 0.6, 0.55, 0.5]
    finals = {arm.name: [0.1] * 4 for arm in script.ARMS}
    finals |= {"poprisk": [0.8, 0.9, 0.85, 0.82], script.SAME: same}
    finals["adamw-lr0.003-wd1"] = [0.9, 0.8, 0.82, 0.86]
    found = script.outcome(finals, higher_is_better=True)
    assert found["best"] == "adamw-lr0.003-wd1"
    assert found["outcome"] == {"same": "gains", "best": "even"}
    turned = script.outcome({k: [-x for x in v] for k, v in finals.items()}, higher_is_better=False)
    assert turned["outcome"] == found["outcome"]


def test_a_group_is_left_out_as_a_whole(
    scripts: list[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, script = scripts
    content = json.loads(RECORD.read_text("utf-8"))["levels"]
    seen = list[int]()
    fit = script.fit

    def counted(tasks: Sequence[Any]) -> Any:
        seen.append(len(tasks))
        return fit(tasks)

    monkeypatch.setattr(script, "fit", counted)
    found = script.left_out(content)
    groups = [row["group"] for row in content.values()]
    assert {*found} == {*content}
    assert seen == [len(groups) - groups.count(g) for g in dict.fromkeys(groups)]


def test_the_record_is_what_the_script_makes_of_its_levels(scripts: list[ModuleType]) -> None:
    tasks, _, script = scripts
    content = json.loads(RECORD.read_text("utf-8"))
    rows = content["levels"]
    assert {*rows} <= {level.name for level in tasks.levels()}
    judged = json.loads(json.dumps(script.judged(rows)))
    assert {key: content[key] for key in judged} == judged
    for name, row in rows.items():
        higher = row["higher_is_better"]
        again = json.loads(json.dumps(script.outcome(row["finals"], higher_is_better=higher)))
        assert {key: row[key] for key in again} == again, name


def test_the_shipped_rule_is_the_one_on_record() -> None:
    content = json.loads(RECORD.read_text("utf-8"))
    assert content["thresholds"] == THRESHOLDS._asdict()
    assert all(value in column for value, column in zip(THRESHOLDS, CANDIDATES, strict=True))
    for rival in RIVALS:
        on_record = content["rivals"][rival]
        assert TRACK[rival]["all"] == tuple(on_record["right"][:2])
        assert {k: TRACK[rival][k] for k in KINDS} == {
            k: tuple(v) for k, v in on_record["right_by_kind"].items()
        }


def test_the_page_says_what_is_on_record() -> None:
    """Figures of `docs/explanation/when.md`: both rivals, tasks left out and trained afterwards."""
    content = json.loads(RECORD.read_text("utf-8"))
    page = (BENCHMARKS.parent / "docs" / "explanation" / "when.md").read_text("utf-8")
    text = " ".join(page.split())
    same, best = (content["rivals"][rival] for rival in RIVALS)
    for found in (same, best):
        right, of, share, low, high = found["right"]
        assert f"{right} of {of} ({share:.0%} [{low:.0%}, {high:.0%}])" in text
        for expected, row in found["confusion"].items():
            cells = " | ".join(str(row[o]) for o in ("gains", "even", "loses"))
            assert f"| {expected} | {cells} |" in text
    late = [content["unseen"]["rivals"][rival]["right"] for rival in RIVALS]
    assert f"other {late[0][1]} were trained afterwards: {late[0][0]} and {late[1][0]}" in text
    learned = [found["right_where_learned"] for found in (same, best)]
    assert f"warns, {learned[0][0]} and {learned[1][0]} of {learned[0][1]}." in text
