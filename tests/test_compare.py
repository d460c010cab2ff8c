"""Comparisons in worker processes: killed, resumed, failing, and always the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from poprisk.arms import Arm, default_arms
from poprisk.checkpoint import load_checkpoint
from poprisk.compare import Comparison, TrainingError, compare, environment
from poprisk.rundir import RunData, RunDirectory, RunDirectoryError
from poprisk.training import Row, Run

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
    directory = RunDirectory(path)
    directory.create(what.config(), environment(what.workers))
    compare(what, directory, lambda row: None)
    return directory.read()


def numbers(data: RunData) -> tuple[dict[Any, Row], dict[Any, Row]]:
    """All that was measured, in no particular order, but for the time it took."""

    def timeless(row: Row) -> Row:
        return {k: v for k, v in row.items() if k != "seconds"}

    epochs = {(r["arm"], r["seed"], r["epoch"]): timeless(r) for r in data.epochs}
    assert len(epochs) == len(data.epochs)
    return epochs, {key: timeless(row) for key, row in data.ends.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The comparison that the tests repeat and interrupt; not to be written to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    trained(path, comparison())
    return RunDirectory(path)


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


# --- the numbers ----------------------------------------------------------------------------------


def test_every_arm_is_trained_on_every_seed(whole: RunDirectory) -> None:
    data = whole.read()
    assert set(data.ends) == {(arm.name, seed) for arm in FEW for seed in (0, 1)}
    assert {r["epoch"] for r in data.epochs} == {1, 2, 3, 4}
    assert len(data.epochs) == 4 * len(data.ends)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_does_not_matter(
    tmp_path: Path, whole: RunDirectory, workers: int
) -> None:
    data = trained(tmp_path / "run", comparison(workers=workers))
    assert numbers(data) == numbers(whole.read())
    assert data.environment["workers"] == workers


def test_a_worker_trains_what_a_run_trains(whole: RunDirectory) -> None:
    task = tiny.tiny(1)
    ours = Run(task, ARMS["poprisk"], 1, record=True)
    rows = list(ours.rows())
    rows += Run(task, ARMS["rms-matched"], 1, trace=ours.progress.trace).rows()
    epochs, ends = numbers(whole.read())
    for row in rows:
        row.pop("seconds")
        key = (row["arm"], row["seed"])
        assert row == (ends[key] if row["event"] == "end" else epochs[*key, row["epoch"]])


def test_seeds_change_data_and_weights(whole: RunDirectory) -> None:
    epochs, _ = numbers(whole.read())
    assert epochs["poprisk", 0, 1]["train_loss"] != epochs["poprisk", 1, 1]["train_loss"]


def test_an_arm_waits_for_the_one_it_follows(tmp_path: Path) -> None:
    events: list[tuple[str, str, int]] = []
    directory = RunDirectory(tmp_path / "run")
    what = comparison(workers=3, arms=[ARMS["poprisk"], ARMS["rms-matched"]])
    directory.create(what.config(), environment(3))
    compare(what, directory, lambda r: events.append((r["event"], r["arm"], r["seed"])))
    for seed in (0, 1):
        started = events.index(("start", "rms-matched", seed))
        assert events.index(("end", "poprisk", seed)) < started


def test_an_arm_that_follows_none_of_the_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rms-matched"):
        trained(tmp_path / "run", comparison(arms=[ADAMW, ARMS["rms-matched"]]))


def test_every_row_is_shown_after_it_is_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    what = comparison(seeds=[0], arms=[ADAMW], workers=1)
    directory.create(what.config(), environment(1))
    lines: list[int] = []

    def count(row: Row) -> None:
        lines.append(directory.metrics.read_text(encoding="utf-8").count("\n"))

    compare(what, directory, count)
    assert lines == [1, 2, 3, 4, 5, 6]  # start, four epochs, end


# --- repeated -------------------------------------------------------------------------------------


def copied(whole: RunDirectory, to: Path, *, left_out: Callable[[Row], bool]) -> RunDirectory:
    """A run directory in which some rows were never written."""
    directory = RunDirectory(to)
    data = whole.read()
    directory.create(data.config, data.environment)
    for row in [*data.epochs, *data.ends.values()]:
        if not left_out(row):
            directory.append(row)
    for file in whole.checkpoints.iterdir():
        (directory.checkpoints / file.name).write_bytes(file.read_bytes())
    return directory


def test_a_finished_comparison_trains_nothing_again(tmp_path: Path, whole: RunDirectory) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda row: False)
    before = directory.metrics.read_bytes()

    def never(row: Row) -> None:
        raise AssertionError(row)

    compare(comparison(), directory, never)
    assert directory.metrics.read_bytes() == before


def test_only_what_is_missing_is_trained(tmp_path: Path, whole: RunDirectory) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda r: r["arm"] == "rms-matched")
    started: list[Row] = []
    compare(comparison(), directory, lambda r: started.append(r))
    assert {(r["arm"], r["seed"]) for r in started} == {("rms-matched", 0), ("rms-matched", 1)}
    assert numbers(directory.read()) == numbers(whole.read())


def test_a_run_whose_update_sizes_are_lost_is_trained_again(
    tmp_path: Path, whole: RunDirectory
) -> None:
    directory = copied(whole, tmp_path / "run", left_out=lambda row: False)
    for file in directory.checkpoints.iterdir():
        file.unlink()
    compare(comparison(), directory, lambda row: None)
    assert numbers(directory.read()) == numbers(whole.read())
    names = {file.name for file in directory.checkpoints.iterdir()}
    assert names == {file.name for file in whole.checkpoints.iterdir()}


# --- failing --------------------------------------------------------------------------------------


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    what = comparison("fragile", workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(TrainingError) as caught:
        compare(what, directory, lambda row: None)
    text = str(caught.value)
    assert text.startswith("arm poprisk, seed 1 failed:\n")
    assert text.endswith("ArithmeticError: the loss gave up")
    assert set(directory.read().ends) == {(arm.name, 0) for arm in FEW}


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    what = comparison("lethal", workers=1)
    directory.create(what.config(), environment(1))
    with pytest.raises(TrainingError, match=r"a worker process died \(exit code 7"):
        compare(what, directory, lambda row: None)
    assert set(directory.read().ends) == {(arm.name, 0) for arm in FEW}


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    what = comparison(seeds=[0], arms=[ADAMW], workers=1)
    directory.create(what.config(), environment(1))
    path = directory.checkpoints / f"{ADAMW.name}-0.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises((RunDirectoryError, TrainingError)) as caught:
        compare(what, directory, lambda row: None)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"\xff" * 64


class Stopped(Exception):
    """What a test interrupts a comparison with."""


def test_an_interruption_ends_the_workers_and_keeps_what_was_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    what = comparison()
    directory.create(what.config(), environment(2))

    def stop(row: Row) -> None:
        if row["event"] == "end":
            raise Stopped

    with pytest.raises(Stopped):
        compare(what, directory, stop)
    assert multiprocessing.active_children() == []
    assert len(directory.read().ends) == 1


# --- interrupted ----------------------------------------------------------------------------------


def test_no_row_is_lost_when_the_record_lags_behind(tmp_path: Path) -> None:
    """A terminal that stalls while a worker trains on, and a kill: nothing may be skipped."""
    directory = RunDirectory(tmp_path / "run")
    what = comparison("patient", seeds=[0], arms=[ADAMW], workers=1, settings={"pause": 0.01})
    directory.create(what.config(), environment(1))

    def stall(row: Row) -> None:
        if row["event"] == "epoch":
            wait_until(lambda: checkpointed(directory) >= 8)
            raise Stopped

    with pytest.raises(Stopped):
        compare(what, directory, stall)
    compare(what, directory, lambda row: None)
    assert [r["epoch"] for r in directory.read().epochs] == list(range(1, 21))


def checkpointed(directory: RunDirectory) -> int:
    """Epochs that the only run of a directory has behind it, by its checkpoint."""
    files = [*directory.checkpoints.glob("*.safetensors")]
    return max((load_checkpoint(file)["progress"]["epoch"] for file in files), default=0)


class Started:
    """`poprisk compare` in a process group of its own, checkpointing at every epoch.

    With ``hold`` only the first runs end; all later ones stop half-way.
    """

    epochs = 8

    def __init__(self, out: Path, *, hold: bool = False) -> None:
        self.directory = RunDirectory(out)
        command = [POPRISK, "compare", tiny.source("patient"), "--seeds", "2", "--workers", "2"]
        command += ["--out", out, "--set", f"epochs={self.epochs}"]
        self.log = out.with_suffix(".log")
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "TINY_HOLD": str(out.with_suffix(".runs")) if hold else ""},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_the_middle(self) -> None:
        """Until some runs have ended and others have left a checkpoint."""
        wait_until(lambda: self.ended() >= 3 and self.has_checkpoint())

    def ended(self) -> int:
        if not self.directory.metrics.exists():
            return 0
        return self.directory.metrics.read_text(encoding="utf-8").count('"event": "end"')

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
        """Kill the whole group, at once and without notice."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        """Wait for the end and return what was printed."""
        code = self.process.wait(timeout=HANGS)
        text = self.log.read_text(encoding="utf-8")
        assert code == 0, text
        return text


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_the_middle_and_repeated_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    first = Started(tmp_path / "run", hold=True)
    try:
        first.wait_for_the_middle()
    finally:
        first.kill()
    torn = first.directory.read()
    assert 0 < len(torn.ends) < 24
    with first.directory.metrics.open("ab") as file:
        file.write(b'{"event": "epoch", "arm": "popr')  # killed while writing, too

    text = Started(tmp_path / "run").finish()
    resumed = first.directory.read()
    starts = first.directory.metrics.read_text(encoding="utf-8").count('"event": "start"')
    assert starts > 24
    what = comparison("patient", arms=list(ARMS.values()), settings={"epochs": 8})
    expected = numbers(trained(tmp_path / "whole", what))
    assert len(expected[1]) == 30
    assert numbers(resumed)[1] == expected[1]
    assert numbers(resumed)[0] == expected[0]
    assert set(torn.ends) < set(resumed.ends)
    assert all(resumed.ends[key] == row for key, row in torn.ends.items())
    assert "PopRiskAdamW, default settings, ends at" in text.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    started = Started(tmp_path / "run", hold=True)
    try:
        started.wait_for_the_middle()
        assert len(started.members()) >= 3
        os.kill(started.process.pid, signal.SIGKILL)
        started.process.wait()
        wait_until(lambda: started.members() == [])
    finally:
        for pid in started.members():
            os.kill(pid, signal.SIGKILL)


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
