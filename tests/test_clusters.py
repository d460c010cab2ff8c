"""A comparison in parts: shards, single trainings, and places that go on when one part fails."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import tiny
from poprisk_lab import clusters
from poprisk_lab.arms import Arm, default_arms
from poprisk_lab.cli import app
from poprisk_lab.clusters import chosen, do_share
from poprisk_lab.comparison import Comparison, _train, run_directory, train, trials_of
from poprisk_lab.results import read_run
from poprisk_lab.runner import environment, run_trials
from poprisk_lab.store import Store
from poprisk_lab.study import Run, Share, Trial, chains, shards, with_earlier
from poprisk_lab.work import TrainingError

ARMS = {arm.name: arm for arm in default_arms(full=False)}
FEW = [ARMS[name] for name in ("poprisk", "stopped-lr0.001-wd0.01", "rms-matched")]
TINY = tiny.source("tiny")
COMPARE = ["compare", TINY, "--seeds", "2", "--workers", "1", "--epochs", "1", "--out", "run"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, and few arms; this process computes as a worker for a while."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("poprisk_lab.arms.default_arms", few)
    yield tmp_path
    torch.set_flush_denormal(False)


def few(*, full: bool) -> list[Arm]:
    return FEW


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*COMPARE, *arguments])


def names(trials: Sequence[Trial]) -> list[str]:
    return [trial.name for trial in trials]


def full() -> list[Trial]:
    return trials_of(Comparison(TINY, default_arms(full=True), seeds=[*range(5)]))


# --- who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_shards_share_all_trials_and_none_waits_for_another(count: int) -> None:
    trials, found = full(), shards(full(), count)
    assert len(found) == count
    assert sorted(names([t for share in found for t in share])) == sorted(names(trials))
    for share in found:
        assert {other for trial in share for other in trial.after} <= {*names(share)}
    longest = max(map(len, chains(trials)))
    assert max(map(len, found)) - min(map(len, found)) <= longest


def test_trials_that_come_after_one_another_are_one_chain_however_they_are_listed() -> None:
    a, b = Trial("a", {}), Trial("b", {})
    between = Trial("c", {}, after=("a", "b"))
    assert [names(chain) for chain in chains([a, b, between])] == [["a", "b", "c"]]
    assert [sorted(names(chain)) for chain in chains([between, a, b])] == [["a", "b", "c"]]
    assert [names(chain) for chain in chains([a, b])] == [["a"], ["b"]]


def test_a_trial_is_done_with_all_that_it_comes_after() -> None:
    chain = [Trial("a", {}), Trial("b", {}, after=("a",)), Trial("c", {}, after=("b",))]
    assert names(with_earlier([*chain, Trial("d", {})], ["c"])) == ["a", "b", "c"]
    (rms, _) = (f"{name}-1" for name in ("rms-matched", "poprisk"))
    assert names(chosen(full(), shard=None, only=["rms-matched:1"])) == ["poprisk-1", rms]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", ""])
def test_a_shard_that_is_none_is_refused(here: Path, text: str) -> None:
    result = run("--shard", text)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    told = f"--shard must be I/N with I from 1 to N, as in 2/8, but got {text};"
    assert line.startswith(f"poprisk: {told}")
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "poprisk:2"], "--only must be METHOD:SEED, but got poprisk:2; methods are pop"),
        (["--only", "poprisk-0"], "but got poprisk-0; methods are poprisk, stopped-lr0.001-wd0.01"),
        (["--only", "poprisk:1", "--only", ":0"], "but got :0; methods are"),
        (["--only", "poprisk:0", "--shard", "1/2"], "--shard and --only both choose trainings"),
        (["--fresh", "--shard", "1/2"], "--fresh deletes what other shards have done"),
        (["--fresh", "--only", "poprisk:0"], "--fresh deletes what other shards have done"),
        (["--on", "moon"], "--on must be local, slurm, ray, but got moon."),
        (["--slurm", "slurm_partition=gpu"], "--slurm goes with --on slurm, but --on is local."),
        (["--on", "slurm", "--ray", "num_gpus=1"], "--ray goes with --on ray, but --on is slurm."),
        (["--on", "ray", "--ray", "num_gpus"], "--ray takes name=value, as in --ray cpus_per_task"),
    ],
)
def test_a_part_that_cannot_be_is_refused(here: Path, arguments: list[str], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(("on", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_package_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, on: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run("--on", on)
    assert result.exit_code == 2
    assert result.stderr == f"poprisk: --on {on} needs {package}: pip install 'poprisk[{on}]'\n"
    assert [*here.iterdir()] == []


# --- shards of a comparison -----------------------------------------------------------------------


def numbers(path: str) -> list[Any]:
    data = read_run(run_directory(Path(path)))
    rows = [*data.epochs, *(data.ends[key] for key in sorted(data.ends))]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.slow
def test_the_last_shard_writes_the_page_and_all_is_as_if_done_at_once(here: Path) -> None:
    first = run("--shard", "2/3")
    assert first.exit_code == 0, first.output
    assert "4 trainings left for other processes (arm poprisk, seed 0; arm rms-m" in first.stdout
    assert "`poprisk report run` writes the page" in first.stdout
    assert not (here / "run" / "report.html").exists()
    done = sorted(file.stem for file in (here / "run" / "trials").iterdir())
    assert done == ["stopped-lr0.001-wd0.01-0", "stopped-lr0.001-wd0.01-1"]
    assert run("--only", "rms-matched:1").exit_code == 0
    assert (here / "run" / "trials" / "poprisk-1.jsonl").exists(), "which it follows"
    assert not (here / "run" / "report.html").exists()
    for shard in ("1/3", "3/3"):
        last = run("--shard", shard)
        assert last.exit_code == 0, last.output
    assert "Report: run/report.html" in last.stdout
    assert len([*(here / "run" / "trials").iterdir()]) == 6, "nothing was done twice"
    whole = CliRunner().invoke(app, [*COMPARE[:-1], "whole"])
    assert whole.exit_code == 0, whole.output
    assert numbers("run") == numbers("whole")


# --- a place that goes on -------------------------------------------------------------------------


class Elsewhere:
    """Does shares at once, in the order in which it is given them; the test's own cluster."""

    at_once, patient = 2, True

    def __init__(self, adopted: Mapping[int, Share] | None = None) -> None:
        self.found, self.begun, self.errors = adopted or {}, list[list[str]](), dict[int, Any]()
        self.closed = False

    def adopted(self, store: Store) -> Mapping[int, Share]:
        return self.found

    def shares(self, trials: Sequence[Trial]) -> list[Share]:
        return [(trial,) for trial in trials]

    def submit(self, run: Run, store: Store, shares: Sequence[Share]) -> list[int]:
        handles = [len(self.begun) + k for k in range(len(shares))]
        for handle, share in zip(handles, shares, strict=True):
            self.begun.append(names(share))
            self.errors[handle] = do_share(run, store, share, str(Path.cwd()), environment(1))
        return handles

    def wait(self, handles: Collection[int]) -> set[int]:
        return {*handles}

    def error(self, handle: int) -> Exception | None:
        return self.errors.get(handle)

    def close(self) -> None:
        self.closed = True


def begun(path: Path, what: Comparison) -> Store:
    directory = run_directory(path)
    directory.create(what.config(), environment(1))
    return directory


def test_the_others_go_on_when_one_fails_but_not_those_after_it(here: Path) -> None:
    what, pool = Comparison(tiny.source("fragile"), FEW, seeds=[0, 1]), Elsewhere()
    directory, told = begun(here / "run", what), list[str]()
    with pytest.raises(TrainingError) as caught:
        train(what, directory, lambda row: told.append(row["event"]), pool=pool)
    text = str(caught.value)
    assert text.count("ArithmeticError: the loss gave up") == 2
    assert "arm poprisk, seed 1 failed" in text
    assert "arm stopped-lr0.001-wd0.01, seed 1 failed" in text
    assert set(read_run(directory).ends) == {(arm.name, 0) for arm in FEW}
    assert ["rms-matched-0"] in pool.begun
    assert ["rms-matched-1"] not in pool.begun
    assert told.count("end") == 3
    assert pool.closed


def test_what_is_under_way_there_is_followed_and_not_begun_again(here: Path) -> None:
    """As after a driver was killed whose jobs live on."""
    what = Comparison(TINY, FEW, seeds=[0], epochs=1)
    directory, trials = begun(here / "run", what), trials_of(what)
    (chain, _) = chains(trials)
    pool = Elsewhere({-1: chain})
    run_, ends = partial_run(what), list[str]()
    assert do_share(run_, directory, chain, str(here), environment(1)) is None
    directory.checkpoints.joinpath("trace-poprisk-0.safetensors").unlink()  # left() lists it again

    def tell(trial: Trial, row: dict[str, Any]) -> None:
        if row["event"] == "end":
            ends.append(trial.name)

    run_trials(trials, run_, directory, workers=pool, on_row=tell)
    assert pool.begun == [["stopped-lr0.001-wd0.01-0"]]
    assert sorted(ends) == ["poprisk-0", "stopped-lr0.001-wd0.01-0"]


def partial_run(what: Comparison) -> Run:
    return lambda settings, workspace: _train(what, settings, workspace)


def test_a_share_goes_on_with_what_does_not_come_after_a_failure(here: Path) -> None:
    what = Comparison(tiny.source("fragile"), FEW, seeds=[0, 1])
    directory, trials = begun(here / "run", what), trials_of(what)
    share = tuple(sorted(trials, key=lambda t: -t.settings["seed"]))  # those that fail come first
    error = do_share(partial_run(what), directory, share, str(here), environment(1))
    assert isinstance(error, TrainingError)
    assert set(read_run(directory).ends) == {(arm.name, 0) for arm in FEW}


@pytest.mark.parametrize("key", ["code", "torch"])
def test_a_machine_with_other_code_is_refused_before_it_trains(here: Path, key: str) -> None:
    what = Comparison(TINY, FEW, seeds=[0])
    directory = begun(here / "run", what)
    made_with = {**environment(4), key: "other", "cores": 4096, "system": "elsewhere"}
    share = tuple(trials_of(what))
    error = do_share(partial_run(what), directory, share, str(here), made_with)
    assert isinstance(error, TrainingError)
    assert f"would compute with other code ({key}: {environment(1)[key]} there, other here)" in str(
        error
    )
    assert [*directory.trials.iterdir()] == []


def test_a_machine_without_the_directory_says_so(here: Path) -> None:
    what = Comparison(TINY, FEW, seeds=[0])
    directory = begun(here / "run", what)
    error = do_share(partial_run(what), directory, (), str(here / "gone"), environment(1))
    assert isinstance(error, FileNotFoundError)


def test_workers_of_another_number_are_no_other_machine() -> None:
    clusters._check_environment(environment(7))
