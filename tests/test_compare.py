"""Comparisons in worker processes: killed, resumed, failing, and always the same numbers."""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from poprisk import PopRiskAdamW
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.cli import app
from poprisk_lab.comparison import Comparison, _train, differences, run_directory, train, trials_of
from poprisk_lab.fit import ArmRun, Row
from poprisk_lab.pool import _interrupts_held
from poprisk_lab.results import RunData, read_run
from poprisk_lab.runner import environment
from poprisk_lab.store import RunDirectoryError, Store
from poprisk_lab.work import TrainingError
from processes import Call, at_once, run_code

POPRISK = Path(sys.executable).with_name("poprisk")
ARMS = {arm.name: arm for arm in default_arms(full=False)}
FEW = [ARMS[name] for name in ("poprisk", "stopped-lr0.001-wd0.01", "rms-matched", "shuffled")]
ADAMW = ARMS["adamw-lr0.001-wd0.01"]
HANGS = 900
"""Seconds after which what is waited for will not come; alone it takes a few."""


def comparison(function: str = "tiny", **more: Any) -> Comparison:
    settings: dict[str, Any] = {"arms": FEW, "seeds": [0, 1], "workers": 2, **more}
    return Comparison(task=tiny.source(function), **settings)


def trained(path: Path, what: Comparison) -> RunData:
    """The record of a comparison trained into a directory, created or taken up."""
    directory = run_directory(path)
    directory.create(what.config(), environment(what.workers))
    train(what, directory, lambda row: None)
    return read_run(directory)


def numbers(data: RunData) -> tuple[dict[Any, Row], dict[Any, Row]]:
    """All that was measured, in no particular order, but for the time it took."""

    def timeless(row: Row) -> Row:
        return {k: v for k, v in row.items() if k != "seconds"}

    epochs = {(r["arm"], r["seed"], r["epoch"]): timeless(r) for r in data.epochs}
    assert len(epochs) == len(data.epochs)
    return epochs, {key: timeless(row) for key, row in data.ends.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The comparison that the tests repeat and interrupt; not to be written to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    trained(path, comparison())
    return run_directory(path)


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


# --- the numbers ----------------------------------------------------------------------------------


def test_every_arm_is_trained_on_every_seed(whole: Store) -> None:
    data = read_run(whole)
    assert set(data.ends) == {(arm.name, seed) for arm in FEW for seed in (0, 1)}
    assert {r["epoch"] for r in data.epochs} == {1, 2, 3, 4}
    assert len(data.epochs) == 4 * len(data.ends)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_does_not_matter(tmp_path: Path, whole: Store, workers: int) -> None:
    data = trained(tmp_path / "run", comparison(workers=workers))
    assert numbers(data) == numbers(read_run(whole))
    assert data.environment["workers"] == workers


def test_a_worker_trains_what_a_run_trains(whole: Store) -> None:
    task = tiny.tiny(1)
    ours = ArmRun(task, ARMS["poprisk"], 1, record=True)
    rows = list(ours.rows())
    rows += ArmRun(task, ARMS["rms-matched"], 1, trace=ours.progress.trace).rows()
    epochs, ends = numbers(read_run(whole))
    for row in rows:
        row.pop("seconds")
        key = (row["arm"], row["seed"])
        assert row == (ends[key] if row["event"] == "end" else epochs[*key, row["epoch"]])


def test_seeds_change_data_and_weights(whole: Store) -> None:
    epochs, _ = numbers(read_run(whole))
    assert epochs["poprisk", 0, 1]["train_loss"] != epochs["poprisk", 1, 1]["train_loss"]


def test_an_arm_waits_for_the_one_it_follows(tmp_path: Path) -> None:
    events: list[tuple[str, str, int]] = []
    directory = run_directory(tmp_path / "run")
    what = comparison(workers=3, arms=[ARMS["poprisk"], ARMS["rms-matched"]])
    directory.create(what.config(), environment(3))
    train(what, directory, lambda r: events.append((r["event"], r["arm"], r["seed"])))
    for seed in (0, 1):
        started = events.index(("start", "rms-matched", seed))
        assert events.index(("end", "poprisk", seed)) < started


def test_an_arm_that_follows_none_of_the_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rms-matched"):
        trained(tmp_path / "run", comparison(arms=[ADAMW, ARMS["rms-matched"]]))


def test_every_row_is_shown_after_it_is_written(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison(seeds=[0], arms=[ADAMW], workers=1)
    directory.create(what.config(), environment(1))
    written: list[int] = []

    def count(row: Row) -> None:
        written.append(len(rows_in(directory)))

    train(what, directory, count)
    assert len(written) == 6  # start, four epochs, end
    assert all(lines >= shown for shown, lines in enumerate(written, start=1))


def rows_in(directory: Store, event: str = "") -> list[Row]:
    """All whole rows of a directory, or those of one event."""
    lines = [
        line
        for file in directory.trials.glob("*.jsonl")
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]
    ]
    return [row for row in map(json.loads, lines) if event in ("", row["event"])]


# --- repeated -------------------------------------------------------------------------------------


def copied(whole: Store, to: Path, *, left_out: Callable[[Row], bool]) -> Store:
    """A run directory in which some rows were never written."""
    directory = run_directory(to)
    data = read_run(whole)
    directory.create(data.config, data.environment)
    for key, end in data.ends.items():
        rows = [row for row in data.epochs if (row["arm"], row["seed"]) == key]
        if not left_out(end):
            record, _ = directory.begin("{}-{}".format(*key))
            for row in [*rows, end]:
                record.append(row)
    for file in whole.checkpoints.iterdir():
        (directory.checkpoints / file.name).write_bytes(file.read_bytes())
    return directory


def test_a_finished_comparison_trains_nothing_again(tmp_path: Path, whole: Store) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda row: False)
    before = rows_in(directory)

    def never(row: Row) -> None:
        raise AssertionError(row)

    train(comparison(), directory, never)
    assert rows_in(directory) == before


def test_only_what_is_missing_is_trained(tmp_path: Path, whole: Store) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda r: r["arm"] == "rms-matched")
    started: list[Row] = []
    train(comparison(), directory, lambda r: started.append(r))
    assert {(r["arm"], r["seed"]) for r in started} == {("rms-matched", 0), ("rms-matched", 1)}
    assert numbers(read_run(directory)) == numbers(read_run(whole))


def test_a_run_whose_update_sizes_are_lost_is_trained_again(tmp_path: Path, whole: Store) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda row: False)
    for file in directory.checkpoints.iterdir():
        file.unlink()
    train(comparison(), directory, lambda row: None)
    assert numbers(read_run(directory)) == numbers(read_run(whole))
    assert all(directory.product(f"poprisk-{seed}") for seed in (0, 1))


# --- failing --------------------------------------------------------------------------------------


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison("fragile", workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(TrainingError) as caught:
        train(what, directory, lambda row: None)
    text = str(caught.value)
    assert text.startswith("arm poprisk, seed 1 failed:\n")
    assert text.endswith("ArithmeticError: the loss gave up")
    assert set(read_run(directory).ends) == {(arm.name, 0) for arm in FEW}


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison("lethal", workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(TrainingError, match=r"a worker process died \(exit code 7"):
        train(what, directory, lambda row: None)
    assert set(read_run(directory).ends) == {(arm.name, 0) for arm in FEW}


def test_a_full_disk_at_a_checkpoint_is_told_and_keeps_what_was_trained(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison("crowded", seeds=[0], arms=[ADAMW], workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(RunDirectoryError, match="No space left on device; what was trained is"):
        train(what, directory, lambda row: None)
    assert [row["epoch"] for row in read_run(directory).epochs] == [1]
    assert [*directory.checkpoints.iterdir()] == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison(seeds=[0], arms=[ADAMW], workers=1)
    directory.create(what.config(), environment(1))
    path = directory.checkpoints / f"{ADAMW.name}-0.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises((RunDirectoryError, TrainingError)) as caught:
        train(what, directory, lambda row: None)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"\xff" * 64


class Stopped(Exception):
    """What a test interrupts a comparison with."""


def test_an_interruption_ends_the_workers_and_keeps_what_was_written(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "run")
    what = comparison()
    directory.create(what.config(), environment(2))

    def stop(row: Row) -> None:
        if row["event"] == "end":
            raise Stopped

    with pytest.raises(Stopped):
        train(what, directory, stop)
    assert multiprocessing.active_children() == []
    assert read_run(directory).ends


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [False, True])
def test_two_processes_in_one_directory_share_the_work(
    tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch, hold: bool
) -> None:
    """Whoever is last takes up what the other is in the middle of; with ``hold``, all is begun."""
    directory, what = run_directory(tmp_path / "run"), comparison(workers=1)
    directory.create(what.config(), environment(1))
    if hold:
        for trial in trials_of(what):
            directory.begin(trial.name)
    told: dict[str, list[Row]] = {"one": [], "two": []}
    threads = [
        threading.Thread(target=train, args=(what, run_directory(directory.path), rows.append))
        for rows in told.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(read_run(directory)) == numbers(read_run(whole))
    for rows in told.values():
        assert sum(row["event"] == "end" for row in rows) == 8
    started = [(row["arm"], row["seed"]) for row in rows_in(directory, "start")]
    assert len(set(started)) == 8


def test_what_another_process_is_at_work_on_is_taken_last(tmp_path: Path) -> None:
    directory, what = run_directory(tmp_path / "run"), comparison(workers=1, arms=FEW[:2])
    directory.create(what.config(), environment(1))
    directory.begin("poprisk-0")
    failed, _ = directory.begin("stopped-lr0.001-wd0.01-0")
    failed.append({"event": "failed"})
    started: list[str] = []

    def take(row: Row) -> None:
        if row["event"] == "start":
            started.append(f"{row['arm']}-{row['seed']}")

    train(what, directory, take)
    stopped = "stopped-lr0.001-wd0.01"
    assert started == [f"{stopped}-0", "poprisk-1", f"{stopped}-1", "poprisk-0"]


def test_what_another_process_has_done_meanwhile_is_not_done_again(
    tmp_path: Path, whole: Store
) -> None:
    directory, what = run_directory(tmp_path / "run"), comparison(workers=1, arms=FEW[:2])
    directory.create(what.config(), environment(1))
    ended: list[str] = []

    def take(row: Row) -> None:
        if (row["event"], row["arm"], row["seed"]) == ("start", "poprisk", 0):
            # While the first trains, another process does the second.
            record, _ = directory.begin("stopped-lr0.001-wd0.01-0")
            for file in whole.attempts("stopped-lr0.001-wd0.01-0"):
                record.path.write_bytes(file.read_bytes())
        if row["event"] == "end":
            ended.append(f"{row['arm']}-{row['seed']}")

    train(what, directory, take)
    assert sorted(ended) == sorted(t.name for t in trials_of(what))
    assert len(directory.attempts("stopped-lr0.001-wd0.01-0")) == 1


def test_an_interruption_waits_until_a_worker_is_started() -> None:
    """A half started worker could not be ended, and would print a traceback of its own."""
    handler, done = signal.getsignal(signal.SIGINT), list[str]()

    def start() -> None:
        with _interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("started")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["started"]
    assert signal.getsignal(signal.SIGINT) is handler


# --- interrupted ----------------------------------------------------------------------------------


def test_no_row_is_lost_when_a_run_is_killed_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint may be ahead of the record: a kill after any row may skip nothing."""
    monkeypatch.setattr("poprisk_lab.checkpoint.CHECKPOINT_SECONDS", -1.0)
    directory = run_directory(tmp_path / "run")
    what = comparison(seeds=[0], arms=[ADAMW], settings={"epochs": 6})
    directory.create(what.config(), environment(1))
    (trial,) = trials_of(what)
    for _ in range(3):
        record, workspace = directory.begin(trial.name)
        rows = _train(what, trial.settings, workspace)
        for _ in range(3):
            record.append(next(rows))
        del rows  # killed before the checkpoint of the last row
    train(what, directory, lambda row: None)
    assert [r["epoch"] for r in read_run(directory).epochs] == list(range(1, 7))


class Started:
    """`poprisk compare` in a process group of its own, checkpointing at every epoch.

    Only the first runs end; all later ones stop half-way.
    """

    epochs = 8

    def __init__(self, out: Path) -> None:
        self.directory = run_directory(out)
        self.arguments = ["compare", tiny.source("patient"), "--seeds", "2", "--workers", "2"]
        self.arguments += ["--out", str(out), "--set", f"epochs={self.epochs}"]
        self.log, self.runs = out.with_suffix(".log"), out.with_suffix(".runs")
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [POPRISK, *self.arguments],
                env={**os.environ, "TINY_HOLD": str(self.runs)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_the_middle(self) -> None:
        """Until both workers are at a run that stops half-way, and one has left a checkpoint."""
        wait_until(lambda: self.begun() >= tiny.FREE_RUNS + 2 and self.has_checkpoint())

    def begun(self) -> int:
        return self.runs.stat().st_size if self.runs.exists() else 0

    def has_checkpoint(self) -> bool:
        names = [file.name for file in self.directory.checkpoints.iterdir()]
        return any(n.endswith(".safetensors") and not n.startswith("trace") for n in names)

    def members(self) -> list[int]:
        """Living processes of the group: the command, its workers and their servers."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            except OSError:
                continue  # it has just ended
            if int(group) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def kill(self) -> None:
        """Kill the command alone, without notice: all that it started must end, too."""
        assert len(self.members()) >= 3
        self.process.kill()
        self.process.wait()
        wait_until(lambda: self.members() == [])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killed_in_the_middle_its_workers_end_and_repeated_it_ends_with_the_same_numbers(
    tmp_path: Path,
) -> None:
    first = Started(tmp_path / "run")
    try:
        first.wait_for_the_middle()
        first.kill()
    finally:
        for pid in first.members():
            os.kill(pid, signal.SIGKILL)
    torn = read_run(first.directory)
    assert 0 < len(torn.ends) < 24
    for record in first.directory.trials.iterdir():
        with record.open("ab") as file:
            file.write(b'{"event": "epoch", "arm": "popr')  # killed while writing, too

    result = CliRunner().invoke(app, first.arguments)
    assert result.exit_code == 0, result.output
    resumed = read_run(first.directory)
    assert len(rows_in(first.directory, "start")) > 24
    assert any(row["epoch"] > 0 for row in rows_in(first.directory, "start"))
    what = comparison("patient", arms=list(ARMS.values()), settings={"epochs": 8})
    expected = numbers(trained(tmp_path / "whole", what))
    assert len(expected[1]) == 32
    assert numbers(resumed)[1] == expected[1]
    assert numbers(resumed)[0] == expected[0]
    assert set(torn.ends) < set(resumed.ends)
    assert all(resumed.ends[key] == row for key, row in torn.ends.items())
    assert "PopRiskAdamW ends at" in result.stdout.replace("\n", " ")


# --- the configuration ----------------------------------------------------------------------------


def test_the_configuration_says_what_was_trained() -> None:
    what = comparison(epochs=7, settings={"epochs": 3}, full=True)
    config = what.config()
    task = config["task"]
    assert (task["name"], task["source"], task["settings"]) == (
        "tiny",
        tiny.source("tiny"),
        {"epochs": 3},
    )
    assert (task["epochs"], task["batch_size"]) == (7, 8)
    assert (task["train_examples"], task["test_examples"]) == (40, 20)
    assert task["parameters"] == 4 * 8 + 8 + 8 * 2 + 2
    assert (task["classification"], task["noise_known"]) == (True, True)
    assert task["metric"] == {"name": "accuracy", "higher_is_better": True, "percent": True}
    assert "last_batch" not in task
    assert [Arm(**arm) for arm in config["arms"]] == FEW
    assert (config["seeds"], config["full"], config["device"]) == ([0, 1], True, "cpu")


def test_the_configuration_does_not_depend_on_how_it_is_run() -> None:
    assert comparison(workers=1).config() == comparison(workers=9).config()


def test_epochs_take_the_place_of_the_task_s() -> None:
    assert comparison().make_task(0).epochs == 4
    assert comparison(epochs=2).make_task(0).epochs == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("make(seed=0)", "make(seed=1)"),
        ("tiny.tiny(seed)", "tiny.tiny(seed + 1)"),
        ("nn.Tanh()", "nn.ReLU()"),
    ],
)
def test_a_task_that_was_changed_is_another_configuration(
    tmp_path: Path, old: str, new: str
) -> None:
    """Else the runs of two tasks would stand in one record, and be compared."""
    text = (
        "import tiny\nfrom dataclasses import replace\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(4, 2), nn.Tanh())\n"
        "def make(seed=0): return replace(tiny.tiny(seed), model=model)\n"
    )
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8")
    what = replace(comparison(), task=f"{file}:make")
    before = what.config()
    assert what.config() == before
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert what.config() != before


def test_the_configuration_says_every_setting_that_every_arm_trains_with() -> None:
    """Defaults too: when they change in a later version, the record still says what ran."""
    arms = default_arms(full=True)
    settings = replace(comparison(), arms=arms).config()["optimizers"]
    assert list(settings) == [arm.name for arm in arms]
    assert settings["poprisk"] == {
        "class": "poprisk.PopRiskAdamW",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in OURS.items()},
        "batch_size": 8,
        "dataset_size": 40,
    }
    assert settings["shuffled"] == {**settings["poprisk"], "mask": "shuffled soft"}
    assert settings["rms-matched"]["class"] == "poprisk.RmsMatched of torch.AdamW"
    stopped = settings["stopped-lr0.001-wd0.01"]
    assert (stopped["class"], stopped["lr"], stopped["betas"]) == (
        "torch.AdamW",
        0.001,
        [0.9, 0.999],
    )
    assert (settings["paper-snr"]["mode"], settings["paper-snr"]["mask"]) == ("paper", "snr")
    for arm in arms:
        assert arm.settings.items() <= settings[arm.name].items() or arm.name == "grokfast"
    assert json.loads(json.dumps(settings)) == settings


OURS = {
    name: p.default
    for name, p in inspect.signature(PopRiskAdamW).parameters.items()
    if name != "params"
}


@pytest.mark.parametrize(("batch_size", "kept"), [(13, True), (31, True), (8, False)])
def test_the_record_says_where_a_last_batch_joins(
    tmp_path: Path, batch_size: int, kept: bool
) -> None:
    """40 leaves one in batches of 13, and its four fifths in batches of 31."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import tiny\nfrom dataclasses import replace\n"
        f"def make(seed=0): return replace(tiny.tiny(seed), batch_size={batch_size})\n",
        encoding="utf-8",
    )
    task = replace(comparison(), task=f"{file}:make").config()["task"]
    assert ("last_batch" in task) is kept


# --- what a task is made of -----------------------------------------------------------------------

LAYER = "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 2), nn.Tanh())\n"
FILES: dict[str, dict[str, str]] = {
    "a module": {"mine.py": "from m_net import net\n", "m_net.py": LAYER},
    "a module by another": {
        "mine.py": "import m_a\nnet = m_a.net\n",
        "m_a.py": "from m_b import net\n",
        "m_b.py": LAYER,
    },
    "a package": {
        "mine.py": "from m_p.deep.net import net\n",
        "m_p/__init__.py": "",
        "m_p/deep/__init__.py": "",
        "m_p/deep/net.py": LAYER,
    },
    "a relative import": {
        "mine.py": "from m_q import net\n",
        "m_q/__init__.py": "from .inner import net\n",
        "m_q/inner.py": "from ._core import net\n",
        "m_q/_core.py": LAYER,
    },
    "a relative import from above": {
        "mine.py": "from m_r.deep import net\n",
        "m_r/__init__.py": "",
        "m_r/deep/__init__.py": "from ..core import net\n",
        "m_r/core.py": LAYER,
    },
    "a folder without __init__": {"mine.py": "from m_n.net import net\n", "m_n/net.py": LAYER},
    "inside a function": {
        "mine.py": "def net():\n    from m_l import net\n    return net()\n",
        "m_l.py": LAYER,
    },
    "from another folder": {
        "mine.py": "import sys, pathlib\n"
        "sys.path.append(str(pathlib.Path(__file__).parent / 'lib'))\nfrom m_o import net\n",
        "lib/m_o.py": LAYER,
    },
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("old", "new"), [("nn.Tanh()", "nn.ReLU()"), ("def net()", "# a remark\ndef net()")]
)
def test_an_imported_module_that_was_edited_is_another_configuration(
    tmp_path: Path, kind: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run would mix trainings of two networks in one table."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    files = {tmp_path / name: text for name, text in FILES[kind].items()}
    make = "import tiny\nfrom dataclasses import replace\n"
    make += "def make(seed=0): return replace(tiny.tiny(seed), model=net)\n"
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + (make if file.name == "mine.py" else ""), encoding="utf-8")
    what = replace(comparison(), task=f"{tmp_path / 'mine.py'}:make")
    try:
        before = what.config()
        assert what.config() == before
        (edited,) = [file for file, text in files.items() if text == LAYER]
        edited.write_text(LAYER.replace(old, new), encoding="utf-8")
        forget()  # as a new process does
        (found,) = {d for d in differences(before, what.config()) if "source" in d}
        assert found.startswith("the source of module m_")
    finally:
        forget()


def forget() -> None:
    """Let the modules of these tests be imported anew."""
    for name in [name for name in sys.modules if name.startswith("m_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_the_sources_of_a_task_do_not_depend_on_what_else_was_imported(tmp_path: Path) -> None:
    """This process has imported all of pytest and other tests; another has not."""
    code = (
        "from pathlib import Path; from poprisk_lab.tasks import load_task; "
        "from poprisk_lab.tasks.sources import task_sources; "
        f"load_task({tiny.source('tiny')!r}, seed=0); print(task_sources(Path({str(tiny.FILE)!r})))"
    )
    (done,) = at_once(Call(run_code, (code, tmp_path, False)))
    assert (done.code, done.stdout) == (0, "{}\n"), done.stderr
    assert comparison().config()["task"]["sources"] == {}


@pytest.mark.parametrize(("weight", "differs"), [("1.0", False), ("1.00001", False), ("1.5", True)])
def test_what_no_source_says_shows_in_the_first_losses(
    tmp_path: Path, weight: str, differs: bool
) -> None:
    """A file of settings that the task reads, say."""
    (tmp_path / "mine.py").write_text(
        "import tiny, pathlib\nfrom dataclasses import replace\n"
        "weight = float(pathlib.Path(__file__).with_name('weight.txt').read_text())\n"
        "def loss(u, y): return weight * tiny.cross_entropy(u, y)\n"
        "def make(seed=0): return replace(tiny.tiny(seed), loss=loss)\n",
        encoding="utf-8",
    )
    (tmp_path / "weight.txt").write_text("1.0", encoding="utf-8")
    what = replace(comparison(), task=f"{tmp_path / 'mine.py'}:make")
    before = what.config()
    (tmp_path / "weight.txt").write_text(weight, encoding="utf-8")
    found = differences(before, what.config())
    assert [d.partition(":")[0] for d in found] == (
        ["task.start.test_loss", "task.start.train_loss"] if differs else []
    )
