"""The run directory: what it keeps, what it refuses, and that refusing changes nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from poprisk_lab.audit.plan import AUDIT
from poprisk_lab.checkpoint import save_checkpoint
from poprisk_lab.comparison import COMPARISON, run_directory
from poprisk_lab.explain import EXPLANATION
from poprisk_lab.results import RunData, read_run
from poprisk_lab.store import FORMAT, Kind, Record, RunDirectoryError, Store, write_json

CONFIG: dict[str, Any] = {
    "format": FORMAT,
    "poprisk": "0",
    "task": {"name": "tiny", "epochs": 4},
    "arms": [{"name": "a"}, {"name": "b"}],
    "seeds": [0, 1],
}
ENVIRONMENT: dict[str, Any] = {"python": "3", "cores": 2}


def row(event: str, arm: str = "a", seed: int = 0, epoch: int = 0, **more: Any) -> dict[str, Any]:
    return {"event": event, "arm": arm, "seed": seed, "epoch": epoch, **more}


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file below a path with its bytes, and every directory."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


ROWS = (
    row("start"),
    row("epoch", epoch=1, test_metric=0.5),
    row("epoch", epoch=2, test_metric=0.6),
    row("end", epoch=2, final_metric=0.6),
    row("start", "b"),
    row("epoch", "b", epoch=1, test_metric=0.1),
)
"""A finished run and one in the middle."""


def attempt(run: Store, name: str, *rows: dict[str, Any]) -> Record:
    """The record of a new attempt at a trial that writes these rows."""
    record, _ = run.begin(name)
    for r in rows:
        record.append(r)
    return record


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A directory with one finished run and one in the middle."""
    directory = run_directory(tmp_path / "runs" / "tiny")
    directory.create(CONFIG, ENVIRONMENT)
    attempt(directory, "a-0", *ROWS[:4])
    attempt(directory, "b-0", *ROWS[4:])
    (directory.checkpoints / "b-0.safetensors").write_bytes(b"checkpoint")
    return directory


def record_of(run: Store) -> Path:
    """The record of the run in the middle."""
    return run.trials / "b-0.jsonl"


# --- writing and reading --------------------------------------------------------------------------


def test_a_new_directory_holds_everything_and_no_left_overs(tmp_path: Path) -> None:
    directory = run_directory(tmp_path / "new" / "deep")
    directory.create(CONFIG, ENVIRONMENT)
    assert {p.name for p in directory.path.iterdir()} == {
        "config.json",
        "environment.json",
        "trials",
        "checkpoints",
    }
    data = read_run(directory)
    assert (data.config, data.environment, data.epochs, data.ends) == (CONFIG, ENVIRONMENT, [], {})


def test_a_directory_that_another_process_makes_at_this_moment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shards do that begin at once: the other has begun a trial when this one has looked."""
    directory, looked, exists = run_directory(tmp_path / "run"), list[bool](), Store.exists

    def then_made(store: Store) -> bool:
        looked.append(found := exists(store))
        if store is directory and looked == [False, False]:
            monkeypatch.setattr(Store, "exists", exists)
            other = run_directory(tmp_path / "run")
            other.create(CONFIG, ENVIRONMENT)
            attempt(other, "a-0", *ROWS[:4])
        return found

    monkeypatch.setattr(Store, "exists", then_made)
    directory.create(CONFIG, ENVIRONMENT)
    assert looked == [False, False]
    assert read_run(directory).ends == {("a", 0): ROWS[3]}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    run_directory(tmp_path).create(CONFIG, ENVIRONMENT)
    assert read_run(run_directory(tmp_path)).config == CONFIG


def test_rows_come_back_by_run(run: Store) -> None:
    data = read_run(run)
    assert [(r["arm"], r["epoch"]) for r in data.epochs] == [("a", 1), ("a", 2), ("b", 1)]
    assert data.ends == {("a", 0): row("end", epoch=2, final_metric=0.6)}


def test_the_same_configuration_goes_on_and_changes_nothing(run: Store) -> None:
    before = contents(run.path)
    run.create(copy.deepcopy(CONFIG), {"python": "4"})
    assert contents(run.path) == before


def test_numbers_that_are_not_finite_come_back(run: Store) -> None:
    attempt(run, "b-0", row("epoch", "b", epoch=2, test_metric=math.nan, train_loss=math.inf))
    last = read_run(run).epochs[-1]
    assert math.isnan(last["test_metric"])
    assert last["train_loss"] == math.inf


def test_a_row_is_on_disk_when_append_returns(run: Store) -> None:
    record = attempt(run, "b-0", row("epoch", "b", epoch=2))
    assert record.path.read_text(encoding="utf-8").endswith('"epoch": 2}\n')


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full disk to write to")
def test_a_full_disk_is_told(run: Store) -> None:
    record = attempt(run, "b-0")
    record.path.unlink()
    record.path.symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError) as caught:
        record.append(row("epoch", "b", epoch=2))
    assert f"cannot write {record.path}: No space left on device" in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_a_record_deleted_while_it_grows_does_not_go_on_half_empty(run: Store, whole: bool) -> None:
    record = attempt(run, "b-0")
    shutil.rmtree(run.path) if whole else record.path.unlink()
    message = r"b-0~1\.jsonl was deleted while .* with --out"
    with pytest.raises(RunDirectoryError, match=message):
        record.append(row("epoch", "b", epoch=2))
    assert not record.path.exists()
    with pytest.raises(RunDirectoryError, match=message):
        record.new_rows()


def test_a_record_is_followed_as_it_grows(run: Store) -> None:
    record = attempt(run, "a-1", row("start", seed=1))
    assert [r["event"] for r in record.new_rows()] == ["start"]
    assert record.new_rows() == []
    with record.path.open("ab") as file:
        file.write(b'{"event": "epo')  # not whole yet
    assert record.new_rows() == []
    with record.path.open("ab") as file:
        file.write(b'ch"}\n{"event": "end"}\n')
    assert [r["event"] for r in record.new_rows()] == ["epoch", "end"]


# --- attempts -------------------------------------------------------------------------------------


def test_every_attempt_has_files_of_its_own(run: Store) -> None:
    """Two processes that take up one trial must not write into one file."""
    (record, workspace), (other, second) = run.begin("b-0"), run.begin("b-0")
    assert [record.path.name, other.path.name] == ["b-0~1.jsonl", "b-0~2.jsonl"]
    assert workspace.path != second.path
    assert workspace.latest == second.latest == run.checkpoints / "b-0.safetensors"
    record.append(row("start", "b", epoch=1))
    other.append(row("start", "b", epoch=1))
    assert [path.read_bytes().count(b"\n") for path in run.attempts("b-0")] == [2, 1, 1]


def test_an_attempt_goes_on_from_the_latest_checkpoint(run: Store) -> None:
    _, first = run.begin("b-0")
    assert first.path is not None
    save_checkpoint(first.path, {"epoch": 3})
    _, second = run.begin("b-0")
    assert second.load() == {"epoch": 3}
    left, alive = (run.checkpoints / f"b-0~1.{process}.tmp" for process in (1, 2))
    for file in (left, alive):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    second.clear()
    assert [*run.checkpoints.iterdir()] == [alive]


def test_a_claim_that_another_process_was_faster_to_make_is_left_to_it(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen_before_the_other_wrote(name: str) -> list[Path]:
        return []

    monkeypatch.setattr(run, "attempts", seen_before_the_other_wrote)
    before = record_of(run).read_bytes()
    record, _ = run.begin("b-0")
    assert record.path.name == "b-0~1.jsonl"
    assert record_of(run).read_bytes() == before


def test_a_trial_is_begun_until_it_has_failed(run: Store) -> None:
    assert run.is_begun("b-0")
    assert not run.is_begun("b-1")
    attempt(run, "b-0", {"event": "failed"})
    assert not run.is_begun("b-0")


def test_rows_that_attempts_repeat_are_counted_once(run: Store) -> None:
    attempt(
        run,
        "b-0",
        row("epoch", "b", epoch=2, test_metric=0.2),
        row("epoch", "b", epoch=3, test_metric=0.3),
        {"event": "failed"},
    )
    attempt(
        run,
        "b-0",
        row("start", "b", epoch=1),
        row("epoch", "b", epoch=2, test_metric=0.25),
        row("epoch", "b", epoch=3, test_metric=0.35),
        row("end", "b", epoch=3),
    )
    attempt(run, "b-0", row("start", "b", epoch=1))  # by a process that knew nothing of the end
    data = read_run(run)
    found = [(r["epoch"], r["test_metric"]) for r in data.epochs if r["arm"] == "b"]
    assert found == [(1, 0.1), (2, 0.25), (3, 0.35)]
    assert set(data.ends) == {("a", 0), ("b", 0)}


def test_seeds_and_arms_do_not_mix(run: Store) -> None:
    attempt(run, "a-1", row("start", "a", seed=1), row("epoch", "a", seed=1, epoch=1))
    data = read_run(run)
    assert [(r["arm"], r["seed"], r["epoch"]) for r in data.epochs] == [
        ("a", 0, 1),
        ("a", 0, 2),
        ("b", 0, 1),
        ("a", 1, 1),
    ]
    assert set(data.ends) == {("a", 0)}


# --- records of versions before -------------------------------------------------------------------


def as_before(run: Store, *rows: dict[str, Any]) -> Path:
    """Turn a directory into one whose rows are all in one file."""
    shutil.rmtree(run.trials)
    file = run.path / "metrics.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


def test_the_one_file_of_versions_before_is_read_and_left_alone(run: Store) -> None:
    whole = read_run(run)
    file = as_before(run, *ROWS)
    with file.open("ab") as old:
        old.write(b'{"event": "ep')  # torn
    before = contents(run.path)
    assert read_run(run) == whole
    assert contents(run.path) == before
    run.create(CONFIG, ENVIRONMENT)
    _, workspace = run.begin("b-0")
    assert workspace.latest == run.checkpoints / "b-0.safetensors"
    attempt(run, "b-0", row("epoch", "b", epoch=2), row("end", "b", epoch=2))
    data = read_run(run)
    assert [r["epoch"] for r in data.epochs] == [1, 2, 1, 2]
    assert set(data.ends) == {("a", 0), ("b", 0)}
    assert file.read_bytes() == before["metrics.jsonl"]


# --- a torn last line -----------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"event": "epo', "{", "\0\0\0", '{"event": "end"}', "\n"])
def test_a_torn_last_line_is_dropped_and_the_record_goes_on(run: Store, torn: str) -> None:
    expected = read_run(run)
    line = json.dumps(row("epoch", "b", epoch=2)).encode()
    with record_of(run).open("ab") as file:
        file.write(line[:30] if torn == "\n" else torn.encode())
    before = contents(run.path)
    assert read_run(run) == expected
    run.create(CONFIG, ENVIRONMENT)
    assert contents(run.path) == before
    attempt(run, "b-0", row("epoch", "b", epoch=2))
    assert len(read_run(run).epochs) == len(expected.epochs) + 1


def test_a_record_torn_in_its_first_line_is_empty(run: Store) -> None:
    record_of(run).write_bytes(b'{"event": "st')
    assert {r["arm"] for r in read_run(run).epochs} == {"a"}


# --- damage ---------------------------------------------------------------------------------------

GOOD = json.dumps(row("start"))


def refused(directory: Store, base: Path, *, creating: bool) -> str:
    """The message with which it is refused; nothing below ``base`` changes."""
    before = contents(base)
    with pytest.raises(RunDirectoryError) as caught:
        directory.create(CONFIG, ENVIRONMENT) if creating else read_run(directory)
    assert contents(base) == before
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("creating", [True, False])
@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"event": "epoch", "arm"',
        "",
        "[]",
        "3",
        "null",
        "{}",
        '{"event": "epoch"}',
        '{"event": "lunch", "arm": "a", "seed": 0, "epoch": 1}',
        '{"event": ["end"], "arm": "a", "seed": 0, "epoch": 1}',
        '{"event": "epoch", "arm": ["a"], "seed": 0, "epoch": 1}',
        '{"event": "start", "arm": "a", "seed": 0, "epoch": "one"}',
        '{"event": "end", "arm": "a", "seed": {}, "epoch": 1}',
        "\0" * 40,
    ],
)
def test_a_damaged_line_in_the_middle_is_named(run: Store, line: str, creating: bool) -> None:
    good = record_of(run).read_text(encoding="utf-8")
    record_of(run).write_text(f"{GOOD}\n{line}\n{good}", encoding="utf-8")
    text = refused(run, run.path, creating=creating)
    assert "b-0.jsonl is damaged: line 2 is not a record" in text
    assert "Nothing was changed" in text


@pytest.mark.parametrize("creating", [True, False])
@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "trials/b-0.jsonl", "metrics.jsonl"]
)
@pytest.mark.parametrize("garbage", [b"\xff\xfe\x00\x80", b"\x80\n\x80\n"])
def test_binary_garbage_is_named(run: Store, name: str, garbage: bytes, creating: bool) -> None:
    (run.path / name).write_bytes(garbage)
    assert f"{run.path / name} is damaged" in refused(run, run.path, creating=creating)


@pytest.mark.parametrize("creating", [True, False])
@pytest.mark.parametrize("name", ["config.json", "environment.json"])
@pytest.mark.parametrize("text", ["", "{", '{"format": 1'])
def test_half_a_json_file_is_named(run: Store, name: str, text: str, creating: bool) -> None:
    (run.path / name).write_text(text, encoding="utf-8")
    assert f"{run.path / name} is damaged" in refused(run, run.path, creating=creating)


@pytest.mark.parametrize("creating", [True, False])
@pytest.mark.parametrize("config", [{**CONFIG, "format": FORMAT + 1}, {}, [], "text", None, 3])
def test_a_configuration_of_another_format_is_refused(
    run: Store, config: Any, creating: bool
) -> None:
    write_json(run.path / "config.json", config)
    text = refused(run, run.path, creating=creating)
    assert f"{run.path / 'config.json'} is not of format {FORMAT}" in text
    assert "another version of poprisk or damaged" in text


@pytest.mark.parametrize("name", ["arms", "task", "seeds"])
def test_a_configuration_without_what_it_must_have_is_refused(run: Store, name: str) -> None:
    """`poprisk report` reads such a file with nothing to compare it with."""
    write_json(run.path / "config.json", {k: v for k, v in CONFIG.items() if k != name})
    assert "config.json" in refused(run, run.path, creating=False)


@pytest.mark.parametrize("creating", [True, False])
@pytest.mark.parametrize("name", ["environment.json", "trials"])
def test_a_missing_file_is_named(run: Store, name: str, creating: bool) -> None:
    shutil.rmtree(run.trials) if name == "trials" else (run.path / name).unlink()
    assert name in refused(run, run.path, creating=creating)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (AUDIT, "report.html suspects.csv labels.csv evidence.json"),
        (COMPARISON, "report.html evidence.json"),
        (EXPLANATION, "report.html explanation.json influence.csv"),
    ],
)
def test_starting_over_leaves_no_results_of_the_trials_before(
    tmp_path: Path, kind: Kind, names: str
) -> None:
    store = Store(tmp_path / "run", kind)
    config: dict[str, Any] = {"format": FORMAT, **dict.fromkeys(kind.keys, "as it was")}
    store.create(config, {})
    for name in [*names.split(), "mine.txt"]:
        (store.path / name).write_text("of the trials before")
    store.create(config, {}, fresh=True)
    kept = {"config.json", "environment.json", "trials", "checkpoints", "mine.txt"}
    assert {path.name for path in store.path.iterdir()} == kept


def test_missing_checkpoints_are_made_room_for(run: Store) -> None:
    """Without them, runs start at the beginning; the directory must be there to write to."""
    (run.checkpoints / "b-0.safetensors").unlink()
    run.checkpoints.rmdir()
    run.create(CONFIG, ENVIRONMENT)
    assert run.checkpoints.is_dir()


# --- what is no run directory ---------------------------------------------------------------------


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear", encoding="utf-8")
    directory = run_directory(tmp_path)
    text = refused(directory, tmp_path, creating=True)
    assert f"{tmp_path} exists and is not a run directory (no config.json)" in text
    assert "--out" in text
    assert "is not a run directory" in refused(directory, tmp_path, creating=False)


def test_a_missing_directory_cannot_be_read(tmp_path: Path) -> None:
    text = refused(run_directory(tmp_path / "gone"), tmp_path, creating=False)
    assert f"{tmp_path / 'gone'} is not a run directory: it has no config.json" in text


def test_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    directory = run_directory(tmp_path / "out")
    assert "exists and is not a run directory" in refused(directory, tmp_path, creating=True)
    assert "is not a run directory" in refused(directory, tmp_path, creating=False)


def test_a_parent_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    below = run_directory(tmp_path / "file" / "run")
    text = refused(below, tmp_path, creating=True)
    assert f"cannot write the run directory {below.path}" in text
    assert "--out" in text


def test_a_name_that_is_too_long_cannot_be_written(tmp_path: Path) -> None:
    below = run_directory(tmp_path / ("x" * 300))
    assert "cannot write the run directory" in refused(below, tmp_path, creating=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        below = run_directory(tmp_path / "run")
        assert "cannot write the run directory" in refused(below, tmp_path, creating=True)
    finally:
        tmp_path.chmod(0o700)


def test_a_creation_that_was_killed_half_way_is_taken_up(tmp_path: Path) -> None:
    """config.json is written last: until then nothing has been trained."""
    whole = run_directory(tmp_path / "whole")
    whole.create(CONFIG, ENVIRONMENT)
    half = run_directory(tmp_path / "half")
    half.checkpoints.mkdir(parents=True)
    write_json(half.path / "environment.json", ENVIRONMENT)
    (half.path / "config.123.tmp").write_text('{"form', encoding="utf-8")
    half.create(CONFIG, ENVIRONMENT)
    assert read_run(half) == read_run(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/epoch-3.pt", "config.yaml"])
def test_a_directory_with_files_of_another_program_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    assert "not a run directory" in refused(run_directory(tmp_path), tmp_path, creating=True)


def test_started_over_it_is_a_run_directory_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_directory(tmp_path)
    whole.create(CONFIG, ENVIRONMENT)
    whole.begin("a-0")[0].append({"event": "start", "arm": "a", "seed": 0, "epoch": 0})
    whole.begin("a-0")
    (whole.checkpoints / "a-0.safetensors").write_bytes(b"state")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    delete, found = Path.unlink, list[RunData]()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        found.append(read_run(whole))
        delete(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    whole.create({**CONFIG, "seeds": [7]}, {"python": "4"}, fresh=True)
    assert len(found) >= 3
    assert read_run(whole) == RunData({**CONFIG, "seeds": [7]}, {"python": "4"}, [], {})
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"config.json", "environment.json", "notes.txt"}


# --- another configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": []}, 'arms.a: {"name": "a"} there, null now, arms.b'),
        ({"arms": [{"name": "a"}, {"name": "b", "lr": 2}]}, "arms.b.lr: null there, 2 now"),
        (
            {"task": {"name": "other", "epochs": 4}, "poprisk": "9"},
            'poprisk: "0" there, "9" now, task.name: "tiny" there, "other" now)',
        ),
        ({"device": "cuda"}, 'device: null there, "cuda" now)'),
        ({"twin": True}, "twin: null there, true now)"),
        ({"task": {"name": "tiny", "epochs": 5}}, "task.epochs: 4 there, 5 now)"),
        (
            {"task": {"name": "tiny", "epochs": 4, "last_batch": "joins"}},
            'task.last_batch: null there, "joins" now)',
        ),
    ],
)
def test_another_configuration_is_refused_by_what_differs(
    run: Store, changes: dict[str, Any], named: str
) -> None:
    before = contents(run.path)
    with pytest.raises(RunDirectoryError) as caught:
        run.create({**CONFIG, **changes}, ENVIRONMENT)
    assert contents(run.path) == before
    text = str(caught.value)
    assert f"{run.path} holds a run with another configuration (it differs in {named}" in text
    assert "--out" in text


FULL: dict[str, Any] = {
    **CONFIG,
    "task": {
        "name": "tiny",
        "data": "0123456789abcdef",
        "model": "0123456789abcdef",
        "sources": {"net": "0123456789abcdef", "loss": "1123456789abcdef"},
        "start": {"train_loss": 0.7, "test_loss": 0.8},
    },
    "optimizers": {
        "a": {"class": "poprisk.PopRiskAdamW", "lr": 0.001, "z": 1.5},
        "b": {"class": "torch.AdamW", "lr": 0.001, "fused": None},
    },
}
"""What records of this version say besides."""


def altered(path: str, value: Any) -> dict[str, Any]:
    """The full configuration with one entry changed, or taken away for ``...``."""
    config = copy.deepcopy(FULL)
    *places, last = path.split("/")
    at: Any = config
    for place in places:
        at = at[place]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("task/data", "f" * 16, "task.data: the data or the task's file"),
        ("task/model", "f" * 16, "task.model: the layers or shapes of the model"),
        ("task/sources/net", "f" * 16, "the source of module net"),
        ("task/sources/net", ..., "the source of module net"),
        ("task/sources/more", "f" * 16, "the source of module more"),
        ("task/start/train_loss", 0.71, "task.start.train_loss: 0.7 there, 0.71 now"),
        ("optimizers/a/z", 2.0, "optimizers.a.z: 1.5 there, 2 now"),
        ("optimizers/b/lr", 0.1, "optimizers.b.lr: 0.001 there, 0.1 now"),
        ("optimizers/a/trust", 1.0, "optimizers.a.trust: null there, 1 now"),
        ("optimizers/a/z", ..., "optimizers.a.z: 1.5 there, null now"),
    ],
)
def test_what_changed_between_versions_of_a_task_or_of_poprisk_is_named(
    tmp_path: Path, path: str, value: Any, named: str
) -> None:
    """A default that changed with the version, and a module that was edited, among others."""
    directory = run_directory(tmp_path / "run")
    directory.create(FULL, ENVIRONMENT)
    with pytest.raises(RunDirectoryError, match=re.escape(f"(it differs in {named})")):
        directory.create(altered(path, value), ENVIRONMENT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task/start/train_loss", 0.70001),  # another processor rounds otherwise
        ("optimizers/b/decoupled", True),  # another torch has more settings
        ("optimizers/b/fused", ...),
    ],
)
def test_what_differs_between_machines_alone_goes_on(tmp_path: Path, path: str, value: Any) -> None:
    directory = run_directory(tmp_path / "run")
    directory.create(FULL, ENVIRONMENT)
    directory.create(altered(path, value), ENVIRONMENT)
    assert read_run(directory).config == FULL


@pytest.mark.parametrize("path", ["optimizers", "task/model", "task/sources", "task/start"])
def test_a_record_of_an_earlier_version_goes_on(tmp_path: Path, path: str) -> None:
    directory = run_directory(tmp_path / "run")
    directory.create(altered(path, ...), ENVIRONMENT)
    directory.create(FULL, ENVIRONMENT)
    assert read_run(directory).config == altered(path, ...)
    whole = run_directory(tmp_path / "whole")
    whole.create(FULL, ENVIRONMENT)
    with pytest.raises(RunDirectoryError, match="it differs in"):
        whole.create(altered(path, ...), ENVIRONMENT)


def test_more_seeds_extend_a_run(run: Store) -> None:
    rows = contents(run.trials)
    run.create({**CONFIG, "seeds": [0, 1, 2, 3]}, ENVIRONMENT)
    assert read_run(run).config == {**CONFIG, "seeds": [0, 1, 2, 3]}
    run.create({**CONFIG, "seeds": [0]}, ENVIRONMENT)
    assert read_run(run).config["seeds"] == [0, 1, 2, 3]
    assert contents(run.trials) == rows
    assert set(read_run(run).ends) == {("a", 0)}


# --- write_json -----------------------------------------------------------------------------------


def test_json_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, None, "é"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None, "é"]}
    assert list(tmp_path.iterdir()) == [path]

    def torn(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"b": 2})
    assert json.loads(path.read_bytes()) == {"a": [1, None, "é"]}
