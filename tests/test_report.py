"""The report page: what it says, and that it says it whatever a run looks like."""

from __future__ import annotations

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from poprisk.intervals import Interval, t_interval
from poprisk_lab.display import verdict_table
from poprisk_lab.page import draw, render
from poprisk_lab.page.figures import POINTS, epoch_line
from poprisk_lab.page.formats import Format, format_for, listed, plain, plural, signs
from poprisk_lab.page.page import template
from poprisk_lab.page.series import FAMILIES, SHADES
from poprisk_lab.plots import Line, Plot, Table, thinned
from poprisk_lab.results import RunData
from poprisk_lab.store import replace_text
from poprisk_lab.verdict import Verdict, judge
from poprisk_lab.wording import scale_of

EPOCHS = 50
NAN = float("nan")
MODULES = {"0": 32_768, "2": 262_144, "4": 5_120}


def arm(name: str, label: str, family: str, **more: Any) -> dict[str, Any]:
    base = {"name": name, "label": label, "family": family, "optimizer": family}
    return {**base, "settings": {}, "held_out": False, "follows": None, **more}


def adamw(lr: float, decay: float, *, held_out: bool = False) -> dict[str, Any]:
    return arm(
        f"{'stopped' if held_out else 'adamw'}-lr{lr:g}-wd{decay:g}",
        f"AdamW{', early stopping' if held_out else ''}, lr {lr:g}, decay {decay:g}",
        "early-stopping" if held_out else "adamw",
        optimizer="adamw",
        settings={"lr": lr, "weight_decay": decay},
        held_out=held_out,
    )


def default_arms() -> list[dict[str, Any]]:
    return [
        arm("poprisk", "PopRiskAdamW", "poprisk"),
        *(adamw(lr, wd) for lr in (3e-4, 1e-3, 3e-3) for wd in (0.01, 1.0)),
        *(adamw(lr, 0.01, held_out=True) for lr in (3e-4, 1e-3, 3e-3)),
        arm("rms-matched", "AdamW, RMS-matched", "rms-matched", follows="poprisk"),
        arm("shuffled", "shuffled mask", "shuffled"),
    ]


def full_arms() -> list[dict[str, Any]]:
    grid = [(lr, wd) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2) for wd in (0.0, 0.01, 0.1, 1.0)]
    return [
        *(a for a in default_arms() if a["family"] in ("poprisk", "rms-matched", "shuffled")),
        *(adamw(lr, wd) for lr, wd in grid),
        *(adamw(lr, wd, held_out=True) for lr, wd in grid),
        *(arm(f"paper-{m}", f"Algorithm 1, {m} mask", "paper") for m in ("soft", "hard", "snr")),
        arm("m-svag", "M-SVAG, lr 0.01", "peer"),
        arm("adabelief", "AdaBelief, lr 0.001", "peer"),
        arm("grokfast", "Grokfast, lr 0.001", "peer"),
    ]


def config(arms: list[dict[str, Any]], seeds: int, **task: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "poprisk": "0.1.0",
        "task": {
            "name": "digits",
            "source": "digits",
            "settings": {"noise": 0.4},
            "description": "handwritten digits, MLP, 40% of the training labels wrong",
            "metric": {"name": "accuracy", "higher_is_better": True, "percent": True},
            "classification": True,
            "epochs": 3 * EPOCHS,
            "batch_size": 64,
            "train_examples": 1000,
            "test_examples": 797,
            "parameters": 301_066,
            "noise_known": True,
            **task,
        },
        "arms": arms,
        "seeds": list(range(seeds)),
        "full": False,
        "device": "cpu",
    }


REGRESSION = {
    "name": "sparse-regression",
    "description": "linear regression, 5 of 200 features matter",
    "metric": {"name": "mean squared error", "higher_is_better": False, "percent": False},
    "classification": False,
}


def speed(arm: dict[str, Any]) -> float:
    """How fast an arm memorizes, relative to AdamW at lr 0.001."""
    family = {"poprisk": 0.02, "rms-matched": 0.35, "shuffled": 0.5, "paper": 0.15, "peer": 0.8}
    if arm["family"] in family:
        return family[arm["family"]]
    return (arm["settings"]["lr"] / 1e-3) ** 0.6 * (
        0.8 if arm["settings"]["weight_decay"] == 1 else 1
    )


def point(
    arm: dict[str, Any], at: float, noise: random.Random, *, classification: bool
) -> tuple[float, float]:
    """Test metric and memorization at a share of the training."""
    rate = speed(arm)
    memorized = 1 / (1 + math.exp(-7 * (at * 2 * rate - 0.75))) if rate > 0.05 else 0.02 * at
    learned = 1 - 0.35 * math.exp(-at * (60 if rate > 0.05 else 22))
    if classification:
        return 0.955 * learned - 0.27 * memorized + noise.gauss(0, 0.004), memorized
    return 40 * (1 - learned) ** 2 + 3 + 9 * memorized + noise.gauss(0, 0.15), memorized


def gate(at: float, noise: random.Random) -> dict[str, Any]:
    rows = {}
    for i, (name, size) in enumerate(MODULES.items()):
        rate = 0.04 + (0.5 - 0.12 * i) * math.exp(-at * (4 + 3 * i)) + noise.gauss(0, 0.004)
        ratio = 0.9 * rate**0.5
        starved = i == 1 and at > 0.9
        rows[name] = {
            "pass_rate": max(rate, 0.0),
            "mean_gate": 0.9 * rate,
            "update_ratio": 0.012 if starved else ratio,
            "starved": starved,
            "coordinates": size,
        }
    return rows


def train(
    arm: dict[str, Any], seed: int, task: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one training."""
    noise = random.Random(f"{arm['name']} {seed}")
    sign = 1 if task["metric"]["higher_is_better"] else -1
    level = 1 + 0.012 * random.Random(seed).gauss(0, 1)
    gated = arm["family"] in ("poprisk", "paper", "shuffled")
    rows: list[dict[str, Any]] = []
    for i in range(1, EPOCHS + 1):
        metric, memorized = point(arm, i / EPOCHS, noise, classification=task["classification"])
        held_out = 0.6 * metric - 0.1 * sign * memorized + noise.gauss(0, 0.01)
        row = {
            "event": "epoch",
            "arm": arm["name"],
            "seed": seed,
            "epoch": 3 * i,
            "step": 48 * i,
            "train_loss": 2 - memorized,
            "train_metric": 0.5,
            "test_loss": 0.4,
            "test_metric": metric * level,
            "memorized": memorized if task["noise_known"] else None,
            "held_out_metric": held_out if arm["held_out"] else None,
            "gate": gate(i / EPOCHS, noise) if gated else None,
            "seconds": 0.13 * i,
        }
        rows.append(row)
        if arm["held_out"] and i - kept(rows, "held_out_metric", sign)["epoch"] // 3 >= 10:
            break
    return rows, end(rows, sign, held_out=arm["held_out"])


def kept(rows: list[dict[str, Any]], key: str, sign: int) -> dict[str, Any]:
    return max(rows, key=lambda row: sign * row[key])


def end(rows: list[dict[str, Any]], sign: int, *, held_out: bool) -> dict[str, Any]:
    best, last = kept(rows, "test_metric", sign), rows[-1]
    stop = kept(rows, "held_out_metric", sign) if held_out else None
    return {
        "event": "end",
        **{key: last[key] for key in ("arm", "seed", "epoch", "step", "seconds")},
        "final_metric": last["test_metric"],
        "final_memorized": last["memorized"],
        "best_metric": best["test_metric"],
        "best_epoch": best["epoch"],
        "held_out_best": stop and stop["held_out_metric"],
        "stopped_metric": stop and stop["test_metric"],
        "stopped_epoch": stop and stop["epoch"],
        "skipped_steps": 0,
    }


def synthetic(
    arms: list[dict[str, Any]] | None = None, *, seeds: int = 3, **task: Any
) -> tuple[RunData, Verdict]:
    """A complete run with curves as they look on digits, and its verdict."""
    settings = config(default_arms() if arms is None else arms, seeds, **task)
    epochs: list[dict[str, Any]] = []
    ends: dict[tuple[str, int], dict[str, Any]] = {}
    for one in settings["arms"]:
        for seed in settings["seeds"]:
            rows, ends[one["name"], seed] = train(one, seed, settings["task"])
            epochs += rows
    environment = {"python": "3.11.7", "torch": "2.13.0", "system": "Linux x86_64", "cores": 2}
    data = RunData(settings, environment, epochs, ends)
    return data, judge(data)


class Page(HTMLParser):
    """A page taken apart: attributes, the cells of its tables, its figures, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.classes: list[list[str]] = []
        self.words: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self._open: list[str] = []
        self._json = False
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.attributes += [(tag, key, value) for key, value in found.items()]
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.classes.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.classes[-1].append(found.get("class", ""))
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._json = tag == "script" and found.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._json = False
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._json:
            self.figures.append(json.loads(data, parse_constant=pytest.fail))
        if {"script", "style"} & {*self._open}:
            return
        self.words.append(data)
        if {"td", "th"} & {*self._open}:
            row = self.tables[-1][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())


def traces(figure: dict[str, Any], kind: str = "lines") -> list[dict[str, Any]]:
    """Lines, bands or markers of a figure."""
    key = {"bands": "fill", "lines": "customdata"}.get(kind)
    return [t for t in figure["data"] if (key in t if key else t.get("mode") == kind)]


def named(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [t for t in figure["data"] if t.get("name") == name and t["mode"] == "lines"]
    return found


@pytest.fixture(scope="module")
def run() -> tuple[RunData, Verdict]:
    return synthetic()


@pytest.fixture(scope="module")
def page(run: tuple[RunData, Verdict]) -> Page:
    return Page(render(*run))


def test_the_table_says_what_the_verdict_says(run: tuple[RunData, Verdict], page: Page) -> None:
    rows = run[1].rows
    assert len(page.tables[0]) == len(rows) + 1

    def half(value: Interval) -> str:
        low, high = max(value.low, 0.0), min(value.high, 1.0)
        if value.alike:
            return f"{100 * value.mean:.1f} (all alike)"
        if (low, high) != (value.low, value.high):
            return f"{100 * value.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{100 * value.mean:.1f} ±{50 * (high - low):.1f}"

    for row, cells in zip(rows, page.tables[0][1:], strict=True):
        assert cells[0].startswith(row.label)
        assert cells[1] == half(row.final)
        assert cells[2] == half(row.best)
        assert cells[3] == (half(row.memorized) if row.memorized else "n/a")
        if row.difference is None:
            assert cells[4] == "reference"
        else:
            mean, low, high = (f"{100 * v:+.1f}" for v in row.difference[:3])
            assert cells[4] == f"{mean} [{low}, {high}]".replace("-", "−")


def test_ours_and_the_reference_are_marked(run: tuple[RunData, Verdict], page: Page) -> None:
    by_class = {c: cells[0] for c, cells in zip(page.classes[0], page.tables[0], strict=True)}
    assert by_class["ours"] == "PopRiskAdamW ours"
    assert by_class["reference"] == f"{run[1].reference} best AdamW"


def test_the_verdict_comes_first_and_in_full(run: tuple[RunData, Verdict], page: Page) -> None:
    verdict = run[1]
    places = [page.text.index(s) for s in (verdict.headline, *verdict.warnings, "The numbers")]
    assert places == sorted(places)
    assert page.text.count("Note.") == len(verdict.warnings)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster"}
    found = [value for _, key, value in page.attributes if key in loading]
    assert all(value.startswith("data:text/csv;") for value in found)
    (policy,) = [v for _, k, v in page.attributes if k == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    css = Path(__file__).parents[1] / "src/poprisk_lab/page/page.css"
    assert not re.search(r"url\(|@import", css.read_text(encoding="utf-8"))


def test_the_lines_are_means_and_the_bands_their_intervals(
    run: tuple[RunData, Verdict], page: Page
) -> None:
    data, verdict = run
    accuracy, memorized = page.figures[:2]
    for label, arm_name in [(r.label, r.arms[0]) for r in verdict.rows if len(r.arms) == 1]:
        rows = [row for row in data.epochs if row["arm"] == arm_name and row["epoch"] == 75]
        for figure, key in [(accuracy, "test_metric"), (memorized, "memorized")]:
            line = named(figure, label)
            at = line["x"].index(75)
            expected = t_interval([row[key] for row in rows])
            assert line["y"][at] == pytest.approx(expected.mean, rel=1e-4)
            assert line["customdata"][at] == pytest.approx(expected[1:3], rel=1e-3, abs=1e-4)
            (band,) = [t for t in traces(figure, "bands") if t["meta"] == line["meta"]]
            edges = [y for x, y in zip(band["x"], band["y"], strict=True) if x == 75]
            cut = [min(expected.high, 1.0), max(expected.low, 0.0)]
            assert edges == pytest.approx(cut, rel=1e-3, abs=1e-4)


def test_bands_of_shares_stay_between_none_and_all(page: Page) -> None:
    for figure in page.figures:
        edges = [y for t in traces(figure, "bands") for y in t["y"] if y is not None]
        assert all(0 <= y <= 1 for y in edges)
    assert any(0 in t["y"] for t in traces(page.figures[1], "bands"))  # some were cut


def test_key_rows_are_drawn_and_the_grid_waits_in_the_legend(
    run: tuple[RunData, Verdict], page: Page
) -> None:
    labels = {t["name"]: t["visible"] for t in traces(page.figures[0])}
    assert labels == {
        **{row.label: True for row in run[1].rows},
        **{row.label: False for row in run[1].other},
    }
    assert page.figures[0]["data"][-1]["name"] == "PopRiskAdamW"


def test_early_stopping_ends_where_the_table_says(run: tuple[RunData, Verdict], page: Page) -> None:
    (row,) = [r for r in run[1].rows if r.family == "early-stopping"]
    line = named(page.figures[0], row.label)
    assert line["x"][-1] == 3 * EPOCHS
    assert line["y"][-1] == pytest.approx(row.final.mean, rel=1e-4)
    marks = traces(page.figures[0], "markers")
    assert [len(t["x"]) for t in marks] == [3]
    assert sum(marks[0]["y"]) / 3 == pytest.approx(row.final.mean, rel=1e-4)


def test_the_gate_is_drawn_by_module_and_the_starved_are_named(page: Page) -> None:
    passed, ratio, *_ = page.figures[2:]
    for figure in (passed, ratio):
        assert [t["name"] for t in traces(figure)] == [
            "0 · 32,768 weights",
            "2 · 262,144 weights",
            "4 · 5,120 weights",
        ]
    assert named(ratio, "2 · 262,144 weights")["y"][-1] == pytest.approx(0.012)
    starved = next(table for table in page.tables if table[0][:1] == ["Module"])
    assert starved[1:] == [["2", "3 of 3", "10%"]]
    assert "Below 2% the module is called starved" in page.text


def test_every_figure_is_valid(page: Page) -> None:
    assert len(page.figures) == 6
    for figure in page.figures:
        go.Figure(figure)


def test_setup_and_environment_are_complete(run: tuple[RunData, Verdict], page: Page) -> None:
    data = run[0]
    for name, value in data.environment.items():
        assert f"{name} {value}" in page.text
    for one in data.config["arms"]:
        assert any(row[0] == one["label"] and row[1] == one["name"] for row in page.tables[-1])
    (runs,) = [table for table in page.tables if table[0][:2] == ["Arm", "Seed"]]
    assert len(runs) == len(data.ends) + 1
    assert json.dumps(data.config["arms"][1]["settings"]["lr"]) in page.text


def test_the_same_input_gives_the_same_page(run: tuple[RunData, Verdict]) -> None:
    assert render(*run) == render(*run)


def test_unknown_noise_is_said_and_not_drawn() -> None:
    page = Page(render(*synthetic(noise_known=False)))
    assert "Memorization is not shown: this task does not say which" in page.text
    assert len(page.figures) == 5
    assert "Some training labels were made wrong" not in page.text
    assert "Memo" not in " ".join(page.tables[0][0])


def test_regression_where_lower_is_better() -> None:
    data, verdict = synthetic(**REGRESSION)
    page = Page(render(data, verdict))
    assert "Test mean squared error, lower is better." in page.text
    assert "Label noise fitted" in page.text
    ours = page.tables[0][1]
    assert ours[1] == f"{verdict.rows[0].final.mean:.2f} ±" + ours[1].rpartition("±")[2]
    assert ours[4].startswith("−")
    outcomes = [v for tag, key, v in page.attributes if key == "class" and v.startswith("diff")]
    assert outcomes[0] == "difference better"
    dots = [v for tag, key, v in page.attributes if tag == "i" and key == "style"]
    zero, bar, dot = (float(re.findall(r"left:([\d.]+)", style)[0]) for style in dots[:3])
    assert zero < bar < dot < 100  # better is to the right
    assert page.figures[0]["layout"]["yaxis"].get("tickformat", "") == ""


def test_one_diverged_arm_does_not_squeeze_the_drawn_differences() -> None:
    data, verdict = synthetic(**REGRESSION)
    far = Interval(1e9, 1e8, 2e9)
    rows = [r._replace(difference=far) if r.family == "shuffled" else r for r in verdict.rows]
    text = render(data, verdict._replace(rows=rows))
    dots = [float(x) for x in re.findall(r'class="dot" style="left:([\d.]+)%', text)]
    assert min(dots) == 0  # the diverged arm, at the edge
    assert max(dots) - min(d for d in dots if d) > 20


def test_two_seeds_are_shown_in_place_of_intervals() -> None:
    data, verdict = synthetic(seeds=2)
    page = Page(render(data, verdict))
    assert "2 are too few for intervals" in page.text
    assert "2 seeds are too few for bands" in page.text
    assert "±" not in " ".join(page.tables[0][1])
    finals = [data.ends["poprisk", seed]["final_metric"] for seed in (0, 1)]
    assert page.tables[0][1][1].endswith("({:.1f}, {:.1f})".format(*(100 * v for v in finals)))
    assert [traces(figure, "bands") for figure in page.figures] == [[]] * 6
    classes = [v for _, key, v in page.attributes if key == "class" and v.startswith("difference")]
    assert not any("better" in v or "worse" in v for v in classes)
    assert "Student" not in page.text


def test_accuracies_stay_between_nothing_and_all() -> None:
    data, _ = synthetic()
    for (arm, seed), end in data.ends.items():
        end["final_metric"] = 0.99 if arm == "poprisk" else [0.02, 0.95, 0.99][seed]
    verdict = judge(data)
    numbers = [
        float(v.replace("−", "-"))
        for row in Page(render(data, verdict)).tables[0][1:]
        for v in re.findall(r"\[([+−\d.]+), ([+−\d.]+)\]", row[1])[0:1]
        for v in v
    ]
    assert numbers
    assert all(0 <= v <= 100 for v in numbers)
    shown = verdict_table(verdict, scale_of(data.config)).rows
    assert "(all alike)" in shown[0][1]
    assert all("± 0.0" not in " ".join(cells) for cells in shown)
    gains = [v for cells in shown for v in re.findall(r"[+-][\d.]+", cells[4])]
    assert gains
    assert all(-100 <= float(v) <= 100 for v in gains)


def test_the_settings_are_those_used() -> None:
    data, verdict = synthetic()
    used = {"class": "poprisk.PopRiskAdamW", "lr": 0.001, "betas": [0.9, 0.999], "z": 1.5}
    data.config["optimizers"] = {"poprisk": {**used, "dataset_size": "—"}}
    page = Page(render(data, verdict))
    cells = {row[0]: row[3] for table in page.tables for row in table if len(row) == 6}
    said = "poprisk.PopRiskAdamW, lr 0.001, betas (0.9, 0.999), z 1.5, dataset_size —"
    assert cells["PopRiskAdamW"] == said
    assert cells["AdamW, lr 0.001, decay 0.01"] == "lr 0.001, weight_decay 0.01"
    del data.config["optimizers"]  # a record of an earlier version
    page = Page(render(data, verdict))
    cells = {row[0]: row[3] for table in page.tables for row in table if len(row) == 6}
    assert cells["PopRiskAdamW"] == "defaults of that version"


@pytest.mark.parametrize("missing", [0, 12_959])
def test_weights_of_the_gate_add_up(missing: int) -> None:
    data, verdict = synthetic()
    data.config["task"]["parameters"] = sum(MODULES.values()) + missing
    data.config["task"]["modules"] = {"0": "Linear(64, 512)", "2": "Linear(512, 512)"}
    text = render(data, verdict)
    assert "0 Linear(64, 512) · 32,768 weights" in text
    assert "2 Linear(512, 512) · 262,144 weights" in text
    assert "4 · 5,120 weights" in text  # nothing is known of it
    said = f"{missing:,} of {sum(MODULES.values()) + missing:,} weights are counted in no module"
    assert (said in text) == (missing > 0)
    assert ("counted in no module" in text) == (missing > 0)


def test_one_seed_has_no_intervals() -> None:
    page = Page(render(*synthetic(seeds=1)))
    assert "One seed, so no intervals." in page.text
    assert "±" not in " ".join(page.tables[0][1])
    assert [traces(figure, "bands") for figure in page.figures] == [[]] * 6
    assert "Student" not in page.text


def test_an_unfinished_run_says_so() -> None:
    data, _ = synthetic()
    ends = {key: e for key, e in data.ends.items() if key[1] == 0 or key[0].startswith("adamw")}
    epochs = [
        row
        for row in data.epochs
        if (row["arm"], row["seed"]) in ends or (row["epoch"] < 60 and row["seed"] == 1)
    ]
    data = data._replace(ends=ends, epochs=epochs)
    page = Page(render(data, judge(data)))
    assert "unfinished: 24 of 36 trainings are complete, 6 stopped part-way, 6 not" in page.text
    assert page.tables[0][1][0] == "PopRiskAdamW ours 1 of 3 seeds"
    assert named(page.figures[0], "PopRiskAdamW")["x"][-1] == 3 * EPOCHS


def test_arms_without_a_finished_run_can_still_be_drawn() -> None:
    data, _ = synthetic()
    data = data._replace(ends={})
    verdict = Verdict("Not enough runs have finished for a verdict.", [], [], [], "")
    page = Page(render(data, verdict))
    assert "No training has finished yet" in page.text
    assert {t["name"] for t in traces(page.figures[0])} == {a["label"] for a in data.config["arms"]}
    assert all(t["visible"] for t in traces(page.figures[0]))


def test_nothing_measured_yet() -> None:
    data, _ = synthetic()
    verdict = Verdict("Not enough runs have finished for a verdict.", [], [], [], "")
    page = Page(render(data._replace(epochs=[], ends={}), verdict))
    assert page.figures == []
    for sentence in ("No epoch has been measured", "Memorization was not measured", "No arm of"):
        assert sentence in page.text


def test_a_comparison_without_a_gate() -> None:
    arms = [a for a in default_arms() if a["family"] == "adamw"]
    page = Page(render(*synthetic(arms)))
    assert "No arm of this comparison recorded a gate." in page.text
    assert "pass rate" not in page.text
    assert len(page.figures) == 2


def test_numbers_that_are_not_finite() -> None:
    data, _ = synthetic(**REGRESSION)
    epochs = [dict(row) for row in data.epochs]
    for row in epochs:
        if row["arm"] == "poprisk" and row["seed"] == 1 and row["epoch"] in (60, 63):
            row["test_metric"] = NAN
        if row["arm"] == "shuffled" and row["epoch"] > 100:
            row["test_metric"] = math.inf
    ends = {key: dict(e) for key, e in data.ends.items()}
    for seed in range(3):
        ends["shuffled", seed] |= {"final_metric": math.inf, "skipped_steps": 7}
        ends["rms-matched", seed] |= {"final_metric": NAN}
    data = data._replace(epochs=epochs, ends=ends)
    page = Page(render(data, judge(data)))
    line = named(page.figures[0], "PopRiskAdamW")
    assert [x for x, y in zip(line["x"], line["y"], strict=True) if y is None] == [60, 63]
    (band,) = [t for t in traces(page.figures[0], "bands") if t["meta"] == line["meta"]]
    assert 57 in band["x"]
    assert 60 not in band["x"]
    assert band["x"].count(None) == 2  # two pieces, each closed
    assert "not finite at some epoch of PopRiskAdamW (1 seed) and shuffled mask (3 s" in page.text
    assert "Skipped for gradients that were not finite: shuffled mask (21 steps)." in page.text
    finals = {row[0]: row[1] for row in page.tables[0]}
    assert finals["shuffled mask"] == "∞"
    assert finals["AdamW, RMS-matched"] == "n/a"


def test_values_over_many_magnitudes_get_a_logarithmic_axis() -> None:
    data, _ = synthetic(**REGRESSION)
    epochs = [dict(row) for row in data.epochs]
    for row in epochs:
        if row["arm"] == "shuffled":
            row["test_metric"] *= 1.1 ** row["epoch"]
    data = data._replace(epochs=epochs)
    figure = Page(render(data, judge(data))).figures[0]
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert all(y is None or y > 0 for t in traces(figure, "bands") for y in t["y"])


def test_fifty_arms() -> None:
    data, verdict = synthetic(full_arms(), seeds=3)
    page = Page(render(data, verdict))
    assert len(data.config["arms"]) == 49
    assert f"The rest of the grid ({len(verdict.other)})" in page.text
    assert len(page.tables[2]) == len(verdict.other) + 1
    assert f"{len(verdict.other)} more to show" in page.text
    assert len(traces(page.figures[0])) == len(verdict.rows) + len(verdict.other)


def test_names_are_escaped_everywhere() -> None:
    evil = "</script><script>alert(1)</script><b>%{y}</b>&amp;"
    arms = default_arms()
    for one in arms:
        one["label"] = f"{evil} {one['name']}"
        one["settings"] = {**one["settings"], evil: evil}
    data, verdict = synthetic(arms, name=evil, description=evil)
    for row in data.epochs:
        if row["gate"]:
            row["gate"] = {f"{evil}{name}": gate for name, gate in row["gate"].items()}
    data.environment[evil] = evil
    data.config["task"]["metric"]["name"] = evil
    text = render(data, verdict._replace(headline=evil, warnings=[evil]))
    assert "alert(1)</script>" not in text
    assert "<b>%" not in text
    assert len(re.findall(r'"application/json">[^<]+</script>', text)) == 6
    page = Page(text)
    assert page.text.count(evil) > 30
    assert len(page.figures) == 6
    ours = [t for t in traces(page.figures[0]) if t["meta"]["colour"] == "poprisk"]
    assert html.unescape(ours[0]["name"]) == f"{evil} poprisk"
    assert "<" not in ours[0]["name"]
    assert "%{y}</b>" not in ours[0]["hovertemplate"]


def test_an_unknown_family_has_a_colour() -> None:
    arms = [*default_arms(), arm("mine", "my own", "peer")]
    data, _ = synthetic(arms)
    data.config["arms"][-1]["family"] = "home-made"
    verdict = judge(data._replace(config={**data.config, "arms": data.config["arms"][:-1]}))
    (line,) = [t for t in traces(Page(render(data, verdict)).figures[0]) if t["name"] == "my own"]
    assert line["meta"]["colour"] == "other"


def test_every_colour_is_defined_for_light_and_for_dark() -> None:
    css = Path(__file__).parents[1] / "src/poprisk_lab/page/page.css"
    defined = re.findall(r"--c-([\w-]+): #[0-9a-f]{6};", css.read_text(encoding="utf-8"))
    names = [*FAMILIES, "other", *(f"module-{i + 1}" for i in range(SHADES))]
    assert sorted(defined) == sorted(2 * names)


def test_a_page_replaces_or_leaves_the_file(
    run: tuple[RunData, Verdict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            replace_text(path, render(*run))
    assert path.read_text(encoding="utf-8") == "old"
    replace_text(path, render(*run))
    assert path.read_text(encoding="utf-8") == render(*run)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_pools_arms_within_a_seed_first() -> None:
    values = [(0, 1.0), (0, 3.0), (1, 5.0), (2, None), (3, 8.0)]
    rows = [{"epoch": 1, "seed": seed, "v": v} for seed, v in values]
    mean, low, high = t_interval([2.0, 5.0, 8.0])[:3]
    expected = Line("a", [1], [mean], "adamw", low=[low], high=[high])
    assert epoch_line("a", rows, "v", "adamw") == expected


def test_a_long_line_is_thinned_and_keeps_both_ends() -> None:
    line = epoch_line("a", [{"epoch": i, "seed": 0, "v": float(i)} for i in range(1000)], "v", "b")
    assert len(line.x) == POINTS
    assert (line.x[0], line.x[-1]) == (0, 999)
    assert line.mean == [float(e) for e in line.x]
    assert thinned(3, 300) == [0, 1, 2]


@pytest.mark.parametrize(
    ("form", "value", "number", "signed"),
    [
        (Format(True, 1), 0.9412, "94.1", "+94.1"),
        (Format(True, 1), -0.0213, "−2.1", "−2.1"),
        (Format(True, 1), -0.0001, "0.0", "0.0"),
        (Format(True, 1), 0.0001, "0.0", "0.0"),
        (Format(False, 3), 0.63149, "0.631", "+0.631"),
        (Format(False, 2), 3e12, "3.0e+12", "+3.0e+12"),
        (Format(False, 2), NAN, "n/a", "n/a"),
        (Format(False, 2), math.inf, "∞", "+∞"),
        (Format(False, 2), -math.inf, "−∞", "−∞"),
    ],
)
def test_numbers_are_written(form: Format, value: float, number: str, signed: str) -> None:
    assert (form.number(value), form.signed(value)) == (number, signed)


@pytest.mark.parametrize(
    ("values", "decimals"),
    [([0.63, 0.79], 3), ([2.9, 12.2, 8.3], 2), ([450.0, NAN], 0), ([], 3), ([1e-9, 5.0, 5.0], 4)],
)
def test_decimals_follow_the_values(values: list[float], decimals: int) -> None:
    assert format_for(values, percent=False) == Format(False, decimals)


def test_words() -> None:
    assert [plural(1, "seed"), plural(1000, "seed")] == ["1 seed", "1,000 seeds"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b", "c"], limit=2) == "a, b and 1 more"
    assert plain({"lr": 1e-3, "decay": None, "on": True, "betas": [0.9, 0.5]}) == (
        "lr 0.001, decay —, on yes, betas 0.9, 0.5"
    )


def test_a_long_title_beside_a_plot_is_broken() -> None:
    plot = Plot("t", "a long title below a plot", "movement of the training outputs", [], "")
    layout = json.loads(draw.figure(plot))["layout"]
    assert layout["yaxis"]["title"]["text"] == "movement of the<br>training outputs"
    assert layout["xaxis"]["title"]["text"] == plot.x


def test_negative_numbers_of_tables_have_a_minus_sign() -> None:
    assert signs("-1.5 [-2%, -.1e-3]") == "−1.5 [−2%, −.1e−3]"
    assert signs("5 ± -1") == "5 ± −1"
    for text in ("grokking-2", "2020-01-02", "a - b", "-", "lr 1-2", "x-e-5"):
        assert signs(text) == text


def test_the_cells_of_a_table_of_two_columns_need_no_names_on_a_phone() -> None:
    def cells(table: Table) -> str:
        parts: Any = template("parts.html.j2").make_module()
        return str(parts.data_table(table, "t"))

    assert "data-label" not in cells(Table(["figure", "value"], [["a", "-1"]]))
    assert '<td class="">−1</td>' in cells(Table(["figure", "value"], [["a", "-1"]]))
    assert cells(Table(["", "b", "c"], [["a", "1", "2"]])).count("data-label") == 2
