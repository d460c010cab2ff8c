"""The command line: one clear line and exit code 2 for bad input, and a run from end to end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import poprisk_lab.cli
import tiny
from poprisk_lab.checkpoint import CHECKPOINT_SECONDS
from poprisk_lab.cli import app
from poprisk_lab.comparison import run_directory
from poprisk_lab.plots import Table
from poprisk_lab.results import read_run
from poprisk_lab.store import Store
from poprisk_lab.studies import CLAIMS
from poprisk_lab.studies.command import ALL
from poprisk_lab.tasks import BUILT_IN
from processes import Call, at_once, run_command

POPRISK = Path(sys.executable).with_name("poprisk")
TINY = tiny.source("tiny")
QUICK = ["--seeds", "1", "--workers", "1", "--epochs", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the page, which has tests of its own."""

    def blank(*_: object) -> str:
        return ""

    monkeypatch.setattr("poprisk_lab.page.render", blank)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def contents(path: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


def refused(here: Path, *arguments: str | Path, code: int = 2) -> str:
    """The one line on stderr of a command that is refused and writes nothing."""
    before = contents(here)
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert contents(here) == before
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("poprisk: ")
    return line.removeprefix("poprisk: ")


def task_file(here: Path, body: str) -> str:
    """A file in the working directory whose function ``make`` has this body."""
    text = f"import dataclasses, torch, tiny, poprisk\ndef make(seed=0):\n    {body}\n"
    (here / "mine.py").write_text(text, encoding="utf-8")
    return "mine.py:make"


# --- bad input ------------------------------------------------------------------------------------


def test_an_unknown_task(here: Path) -> None:
    line = refused(here, "compare", "digit")
    assert line.startswith("unknown task 'digit'; the built-in ones are digits,")
    assert line.endswith("Your own is written path/to/file.py:function.")


def test_a_missing_file(here: Path) -> None:
    assert refused(here, "compare", "gone.py:make") == "no file gone.py (task gone.py:make)."


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 3", "mine.py:make must return a poprisk.Task, but it returned int."),
        ("pass", "mine.py:make must return a poprisk.Task, but it returned NoneType."),
        ("raise KeyError('label')", "task mine.py:make failed: KeyError: 'label'"),
        (
            "return dataclasses.replace(tiny.tiny(), batch_size=40)",
            "task mine.py:make failed: ValueError: batch_size=40 must be smaller than",
        ),
        (
            "return dataclasses.replace(tiny.tiny(), batch_size=-8)",
            "task mine.py:make failed: ValueError: batch_size must be positive, but got -8.",
        ),
        (
            "return dataclasses.replace(tiny.tiny(), "
            "loss=lambda o, y: torch.nn.functional.cross_entropy(o, y))",
            "task mine.py:make failed: ValueError: loss must give one value per example",
        ),
        (
            "return dataclasses.replace(tiny.tiny(), metric=poprisk.Metric('m', lambda o, y: 1/0))",
            "task mine.py:make failed: ValueError: metric 'm' failed on the train set: "
            "ZeroDivisionError",
        ),
        (
            "return dataclasses.replace(tiny.tiny(), test=(torch.zeros(9, 3), torch.zeros(9)))",
            "task mine.py:make failed: ValueError: model failed on the test inputs, float32 of "
            "shape (9, 3): RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            "return dataclasses.replace(tiny.regression(), clean=None, "
            "**{p: (v[0], v[1][:, 0]) for p, v in vars(tiny.regression()).items() "
            "if p in ('train', 'test')}, loss=lambda o, y: (o[:, 0] - y).square())",
            "task mine.py:make failed: ValueError: metric 'mean squared error' failed on the train "
            "set: ValueError: mse needs outputs and targets of one shape",
        ),
        (
            "t = tiny.tiny(); "
            "return dataclasses.replace(t, train=(torch.randn(40, 4), t.train[1]))",
            "task mine.py:make gives other data each time it is made with the same seed; draw",
        ),
    ],
)
def test_a_file_that_gives_no_usable_task(here: Path, body: str, expected: str) -> None:
    assert refused(here, "compare", task_file(here, body)).startswith(expected)


def test_a_batch_that_is_too_large_says_what_a_task_can_do(here: Path) -> None:
    """``dataset_size`` and ``alpha`` are the optimizer's, not the task's."""
    body = "return dataclasses.replace(tiny.tiny(), batch_size=64)"
    line = refused(here, "compare", task_file(here, body))
    assert "batch_size=64 must be smaller than the number of training examples, 40" in line
    assert "alpha" not in line
    assert "dataset_size" not in line


def test_an_error_of_several_lines_is_told_in_one(here: Path) -> None:
    body = "raise ValueError('first\\nsecond')"
    assert "first" in refused(here, "compare", task_file(here, body))


FUNCTIONS = """\
from __future__ import annotations
import poprisk
from tiny import tiny
from poprisk import Task
def annotated() -> poprisk.Task: ...
def unannotated(seed, noise=0.1, **more): ...
def _private() -> Task: ...
def loss(outputs, targets): ...
def number(seed=0) -> int: ...
def needs_more(seed, size) -> Task: ...
class Net: ...
"""


def test_a_file_without_a_function_lists_those_that_give_a_task(here: Path) -> None:
    (here / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    for command in ("compare", "explain"):
        assert refused(here, command, "mine.py") == (
            "name the function of mine.py that gives the task: mine.py:annotated, "
            "mine.py:unannotated."
        )
    evaluated = FUNCTIONS.partition("\n")[2]
    (here / "mine.py").write_text(evaluated, encoding="utf-8")
    assert "mine.py:annotated, mine.py:unannotated." in refused(here, "compare", "mine.py")


def test_a_file_without_any_such_function(here: Path) -> None:
    (here / "mine.py").write_text("from tiny import tiny\nx = 3\n", encoding="utf-8")
    assert refused(here, "compare", "mine.py").endswith(": none of its functions gives a Task.")
    assert refused(here, "compare", "gone.py") == "no file gone.py (task gone.py)."


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--workers"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_are_at_least_one(here: Path, option: str, value: str) -> None:
    line = refused(here, "compare", TINY, option, value)
    assert line == f"{option} must be at least 1, but got {value}."


@pytest.mark.parametrize("text", ["noise", "=3", ""])
def test_a_setting_has_a_name_and_a_value(here: Path, text: str) -> None:
    line = refused(here, "compare", "digits", "--set", text)
    assert line == f"--set takes name=value, as in --set noise=0.2, but got {text!r}."


def test_an_unknown_setting(here: Path) -> None:
    line = refused(here, "compare", "digits", "--set", "nois=0.2")
    assert line.startswith("task digits has no setting 'nois'; it takes noise")


@pytest.mark.parametrize("name", ["seed", "name", "self"])
def test_a_setting_with_an_awkward_name(here: Path, name: str) -> None:
    assert name in refused(here, "compare", "digits", "--set", f"{name}=3")


def test_a_setting_out_of_range(here: Path) -> None:
    refused(here, "compare", "digits", "--set", "noise=many")
    assert "noise" in refused(here, "compare", "digits", "--set", "noise=1.5")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there(here: Path, device: str) -> None:
    assert "device" in refused(here, "compare", TINY, *QUICK, "--device", device)


def test_a_run_directory_that_cannot_be_written(here: Path) -> None:
    (here / "file").write_text("mine", encoding="utf-8")
    line = refused(here, "compare", TINY, "--out", "file/run")
    assert line.startswith("cannot write the run directory file/run: ")
    assert line.endswith("choose another with --out.")


def test_a_run_directory_whose_name_is_too_long(here: Path) -> None:
    assert "cannot write" in refused(here, "compare", TINY, "--out", "x" * 300)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_in_a_read_only_one(here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert "cannot write" in refused(here, "compare", TINY, "--out", "locked/run")


def test_a_directory_of_something_else(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "is not a run directory" in refused(here, "compare", TINY, "--out", "out")


@pytest.mark.parametrize("path", ["gone", "file", "empty"])
def test_a_report_of_nothing(here: Path, path: str) -> None:
    (here / "file").write_text("mine", encoding="utf-8")
    (here / "empty").mkdir()
    line = refused(here, "report", path)
    assert line == f"{path} is not a run directory: it has no config.json."


# --- where a task fails ---------------------------------------------------------------------------

HELPER = """\
def load(table):
    names = {"a": 1}
    return names[table]
"""
LOCATED: dict[str, tuple[str, str]] = {
    "in the function": ("def make(seed=0):\n    return {}['x']\n", " (mine.py, line 2, in make)"),
    "in a function it calls": (
        "def load():\n    return {}['x']\ndef make(seed=0):\n    load()\n",
        " (mine.py, line 2, in load)",
    ),
    "in a module beside it": (
        "import helper_of_mine\ndef make(seed=0):\n    helper_of_mine.load('x')\n",
        " (helper_of_mine.py, line 3, in load)",
    ),
    "below a library": (
        "import numpy as np\ndef make(seed=0):\n    np.loadtxt(['a'])\n",
        " (mine.py, line 3, in make)",
    ),
    "on import": ("a = 1\nb = a / 0\ndef make(seed=0): ...\n", " (mine.py, line 2)"),
    "in the loss": (
        "import dataclasses, tiny\ndef loss(u, y):\n    return u.flat\n"
        "def make(seed=0):\n    return dataclasses.replace(tiny.tiny(), loss=loss)\n",
        " (mine.py, line 3, in loss)",
    ),
    "in the model": (
        "import dataclasses, tiny\nfrom torch import nn\nclass Net(nn.Linear):\n"
        "    def forward(self, x):\n        return x @ x\n"
        "def make(seed=0):\n    return dataclasses.replace(tiny.tiny(), model=lambda: Net(4, 2))\n",
        " (mine.py, line 5, in forward)",
    ),
}


@pytest.mark.parametrize("name", LOCATED)
@pytest.mark.parametrize("command", ["compare", "explain"])
def test_an_error_in_a_task_comes_with_its_line(here: Path, name: str, command: str) -> None:
    text, place = LOCATED[name]
    (here / "mine.py").write_text(text, encoding="utf-8")
    (here / "helper_of_mine.py").write_text(HELPER, encoding="utf-8")
    assert refused(here, command, "mine.py:make").endswith(place)


def test_the_syntax_error_names_its_line_once(here: Path) -> None:
    (here / "mine.py").write_text("a = 1\ndef make(:\n", encoding="utf-8")
    assert refused(here, "compare", "mine.py:make").count("line 2") == 1


@pytest.mark.parametrize("command", ["compare", "explain"])
def test_the_traceback_can_be_had(here: Path, command: str) -> None:
    body = "raise KeyError('label')"
    result = run(command, task_file(here, body), "--traceback")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    *_, error, line = result.stderr.splitlines()
    assert error == "KeyError: 'label'"
    assert line == "poprisk: task mine.py:make failed: KeyError: 'label' (mine.py, line 3, in make)"


@pytest.mark.usefixtures("no_report")
def test_the_traceback_of_a_worker_s_error_can_be_had(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that a worker meets alone, such as a file that was there before."""
    body = (
        "import multiprocessing; "
        "assert multiprocessing.parent_process() is None, 'gone'; return tiny.tiny()"
    )
    result = run("compare", task_file(here, body), *QUICK, "--traceback")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.endswith("failed: AssertionError: gone (mine.py, line 3, in make)\n")


UNFORESEEN = [
    (["compare", TINY], "poprisk_lab.comparison.Comparison.config"),
    (["explain", "digits"], "poprisk_lab.explain.explain"),
    (["reproduce", "grokking"], "poprisk_lab.studies.command.run_claim"),
    (["report", "run"], "poprisk_lab.results.read_run"),
    (["bench"], "poprisk_lab.bench.step.bench_steps"),
    (["bench", "step"], "poprisk_lab.bench.step.bench_steps"),
    (["bench", "kernel"], "poprisk_lab.bench.kernel.bench_kernels"),
]


def broken(*_: object, **__: object) -> None:
    raise KeyError("a\nb")


@pytest.mark.parametrize(("command", "part"), UNFORESEEN, ids=[" ".join(c) for c, _ in UNFORESEEN])
def test_an_error_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, command: list[str], part: str
) -> None:
    monkeypatch.setattr(part, broken)
    result = run(*command)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("poprisk: unexpected KeyError: 'a\\nb' (test_cli.py, line ")
    assert line.endswith(", in broken); --traceback prints all of it.")
    result = run(*command, "--traceback")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.endswith(", in broken).\n")
    assert 'raise KeyError("a\\nb")' in result.stderr


# --- a finished run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a small comparison and what the command printed; not to be written to."""
    base = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(base):
        done = run("compare", TINY, *QUICK, "--out", "out")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return base / "out", done.stdout


@pytest.fixture
def out(here: Path, finished: tuple[Path, str]) -> Path:
    """A copy of the finished run directory, ``out`` in the working directory."""
    for name, content in contents(finished[0]).items():
        path = here / "out" / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return here / "out"


def verdict_in(text: str) -> str:
    """From the table on."""
    _, title, rest = text.partition("accuracy on the test set")
    assert title
    return title + rest


def test_a_comparison_writes_everything_and_prints_the_verdict(finished: tuple[Path, str]) -> None:
    path, text = finished
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "environment.json",
        "trials",
        "checkpoints",
        "report.html",
        "evidence.json",
    }
    assert len([*(path / "trials").iterdir()]) == 16
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert (config["task"]["name"], config["task"]["epochs"], config["seeds"]) == ("tiny", 1, [0])
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    assert {"python", "torch", "workers"} <= environment.keys()
    assert len(read_run(run_directory(path)).ends) == 16
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "two classes, 30% of the training labels wrong" in page
    assert text.startswith("two classes, 30% of the training labels wrong\n16 arms, 1 seed")
    assert "[ 16/16]" in text
    assert "PopRiskAdamW ends at" in text
    assert text.endswith("Report: out/report.html\n")


def test_text_for_a_file_has_no_control_characters(finished: tuple[Path, str]) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f]", finished[1])


def test_each_run_that_ends_is_one_line_of_a_file(finished: tuple[Path, str]) -> None:
    lines = [line for line in finished[1].splitlines() if line.startswith("[")]
    assert max(len(line) for line in lines) > 80
    assert all(re.fullmatch(r"\[ *\d+/\d+\] .*, seed \d: accuracy [\d.]+%", line) for line in lines)


@pytest.mark.usefixtures("no_report", "out")
def test_repeated_it_trains_nothing_and_says_the_same(
    monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, str]
) -> None:
    def pool(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("poprisk_lab.runner._work_off", pool)
    before = contents(Path("out/trials"))
    result = run("compare", TINY, *QUICK, "--out", "out")
    assert result.exit_code == 0, result.output
    assert contents(Path("out/trials")) == before
    assert verdict_in(result.stdout) == verdict_in(finished[1])


@pytest.mark.usefixtures("out")
def test_a_report_can_be_written_again(finished: tuple[Path, str]) -> None:
    page = Path("out/report.html").read_bytes()
    Path("out/report.html").unlink()
    result = run("report", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == verdict_in(finished[1])
    assert Path("out/report.html").read_bytes() == page


def test_another_configuration_is_refused(here: Path, out: Path) -> None:
    line = refused(here, "compare", TINY, *QUICK, "--epochs", "2", "--out", "out")
    assert "another configuration (it differs in task.epochs: 1 there, 2 now)" in line
    line = refused(here, "compare", TINY, *QUICK, "--twin", "--out", "out")
    assert "another configuration (it differs in twin: null there, true now)" in line


@pytest.mark.usefixtures("no_report")
def test_more_seeds_extend_a_run_and_fewer_say_so(out: Path) -> None:
    before = contents(out / "trials")
    more = run("compare", TINY, *QUICK, "--seeds", "2", "--out", "out")
    assert more.exit_code == 0, more.output
    assert "16 of 32 trainings are there already; going on with the rest" in more.stdout
    assert "[ 32/32]" in more.stdout
    assert before.items() <= contents(out / "trials").items()
    assert {seed for _, seed in read_run(run_directory(out)).ends} == {0, 1}
    fewer = run("compare", TINY, *QUICK, "--out", "out")
    assert fewer.exit_code == 0, fewer.output
    assert "all 16 trainings are there already\n" in fewer.stdout
    assert "the record holds 1 more seed, which count in the verdict" in fewer.stdout
    assert verdict_in(fewer.stdout) == verdict_in(more.stdout)


@pytest.mark.usefixtures("no_report")
def test_fresh_starts_over_in_a_run_directory_and_in_no_other(here: Path, out: Path) -> None:
    anew = ["compare", TINY, *QUICK, "--epochs", "2", "--out"]
    assert "start over (--fresh)" in refused(here, *anew, "out")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    result = run(*anew, "out", "--fresh")
    assert result.exit_code == 0, result.output
    assert "there already" not in result.stdout
    assert {row["epoch"] for row in read_run(run_directory(out)).epochs} == {1, 2}
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    (here / "photos").mkdir()
    (here / "photos" / "config.json").write_text('{"format": 1}', encoding="utf-8")
    assert "is not of format 1" in refused(here, *anew, "photos", "--fresh")
    (here / "photos" / "config.json").rename(here / "photos" / "a.png")
    assert "photos exists and is not a run directory" in refused(here, *anew, "photos", "--fresh")


def test_fresh_deletes_nothing_before_the_task_is_tried(here: Path, out: Path) -> None:
    broken = task_file(here, "return tiny.tiny() if seed == 0 else 1 / 0")
    line = refused(here, "compare", broken, "--seeds", "2", "--out", out, "--fresh")
    assert "division by zero" in line


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"format": 1}'),
        ("config.json", b'{"format": 99}'),
        ("environment.json", b"\xff"),
        ("metrics.jsonl", b"\x00\xff\n"),  # of versions before, still read
        ("trials/poprisk-0.jsonl", b"\x00\xff\n"),
        ("trials/poprisk-0.jsonl", b'{"event": "end", "arm": "poprisk", "seed": 0}\n'),
        ("trials", None),
        ("environment.json", None),
    ],
)
def test_a_corrupted_run_directory(
    here: Path, out: Path, command: str, name: str, content: bytes | None
) -> None:
    if name == "trials":
        shutil.rmtree(out / name)
    elif content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    arguments = ["report", "out"] if command == "report" else ["compare", TINY, *QUICK]
    line = refused(here, *arguments, *(["--out", "out"] if command == "compare" else []))
    assert f"out/{name}" in line or f"it has no {name}" in line


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_report_that_cannot_be_written(here: Path, out: Path, command: str) -> None:
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    before = contents(here)
    arguments = ["report", "out"] if command == "report" else ["compare", TINY, *QUICK]
    result = run(*arguments, *(["--out", "out"] if command == "compare" else []))
    assert result.exit_code == 2
    assert result.stderr.startswith("poprisk: cannot write out/report.html: ")
    assert contents(here) == before


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.usefixtures("out")
def test_a_full_disk_at_the_page_loses_no_verdict(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("poprisk_lab.page.render", full_disk)
    arguments = ["report", "out"] if command == "report" else ["compare", TINY, *QUICK]
    result = run(*arguments, *(["--out", "out"] if command == "compare" else []))
    assert result.exit_code == 2
    assert verdict_in(result.stdout) == verdict_in(finished[1]).replace(
        "\nReport: out/report.html\n", ""
    )
    assert result.stderr == (
        "poprisk: cannot write out/report.html: No space left on device; `poprisk report out` "
        "writes it once there is room.\n"
    )


def test_a_full_disk_at_the_page_of_an_explanation_loses_no_word_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(*_: object, **__: object) -> dict[str, list[str]]:
        return {"notices": ["a notice"]}

    def headline(_: object) -> str:
        return "a headline"

    def warnings(_: object) -> list[str]:
        return ["a warning"]

    def figures_of(_: object) -> Table:
        return Table(["figure"], [["a figure"]])

    monkeypatch.setattr("poprisk_lab.explain.explain", found)
    monkeypatch.setattr("poprisk_lab.explain.words.headline", headline)
    monkeypatch.setattr("poprisk_lab.explain.words.warnings", warnings)
    monkeypatch.setattr("poprisk_lab.explain.words.table", figures_of)
    monkeypatch.setattr("poprisk_lab.store.write_json", full_disk)
    result = run("explain", "digits")
    assert result.exit_code == 2
    assert result.stdout.startswith("a notice\na warning\n")
    assert "a figure" in result.stdout
    assert result.stdout.endswith("\na headline\n")
    assert result.stderr.startswith("poprisk: cannot write runs/explain-digits: No space left")


@pytest.mark.usefixtures("no_report", "here")
def test_a_run_that_is_not_finished_has_no_verdict_yet(out: Path) -> None:
    for record in (out / "trials").iterdir():
        record.write_bytes(b"")
    result = run("report", "out")
    assert result.exit_code == 0, result.output
    assert "Not enough runs have finished for a verdict." in result.stdout


@pytest.mark.usefixtures("here")
def test_the_page_of_a_run_that_is_not_finished_is_written(out: Path) -> None:
    for record in (out / "trials").iterdir():
        record.write_bytes(b"")
    assert run("report", "out").exit_code == 0
    assert (out / "report.html").stat().st_size > 0


# --- training -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_report")
def test_a_description_may_hold_brackets(here: Path) -> None:
    """They are no markup for the terminal."""
    metric = "poprisk.Metric('score [/a]', lambda o, y: 0.5)"
    body = f"return dataclasses.replace(tiny.tiny(), description='x [/y] [z]', metric={metric})"
    result = run("compare", task_file(here, body), *QUICK, "--out", "a [b]")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("x [/y] [z]\n")
    assert "score [/a]" in result.stdout
    assert "a [b]/report.html" in result.stdout


@pytest.mark.usefixtures("here", "no_report")
def test_a_run_that_fails_is_named_and_repeating_goes_on() -> None:
    command = ["compare", tiny.source("fragile"), "--seeds", "2", "--workers", "1"]
    first, second = run(*command), run(*command)
    for result in (first, second):
        assert result.exit_code == 1
        assert result.stderr.startswith("poprisk: arm poprisk, seed 1 failed:\n")
        assert result.stderr.endswith("ArithmeticError: the loss gave up\n")
    assert "[ 16/32]" in first.stdout
    assert "[ 16/32]" not in second.stdout


@pytest.mark.usefixtures("no_report")
def test_a_task_that_fails_for_a_later_seed_is_told_in_one_line(here: Path) -> None:
    body = "return tiny.tiny(5 / (1 - seed) and seed)"
    line = refused(here, "compare", task_file(here, body), *QUICK, "--seeds", "2")
    assert line.startswith("task mine.py:make failed: ZeroDivisionError: ")


def test_labels_of_a_later_seed_are_tried_before_the_first_trains(here: Path) -> None:
    body = (
        "t = tiny.tiny(seed); x, y = t.train; y = y + 0; y[7] += 5 * (seed == 2); "
        "return dataclasses.replace(t, train=(x, y), clean=None)"
    )
    line = refused(here, "compare", task_file(here, body), *QUICK, "--seeds", "3")
    assert "loss failed on train[7], target " in line


def test_a_metric_that_fails_on_the_held_out_fifth_is_tried_too(here: Path) -> None:
    body = (
        "f = lambda o, y: 1.0 if len(y) != 8 else {}['auc']\n    "
        "return dataclasses.replace(tiny.tiny(seed), metric=poprisk.Metric('f', f))"
    )
    line = refused(here, "compare", task_file(here, body), *QUICK)
    assert line.startswith("task mine.py:make cannot be trained by AdamW, early stopping")
    assert line.endswith("KeyError: 'auc' (mine.py, line 3, in <lambda>)")


def test_the_twin_is_tried_before_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ArithmeticError("no second derivative")

    monkeypatch.setattr("poprisk_lab.fit.TwinRisk.estimate", failing)
    line = refused(here, "compare", TINY, *QUICK, "--twin")
    assert "cannot be trained by PopRiskAdamW (seed 0): ArithmeticError: no second" in line


def test_too_few_examples_to_hold_some_out(here: Path) -> None:
    body = (
        "t = tiny.regression(seed); x, y = t.train; return dataclasses.replace("
        "t, train=(x[:4], y[:4]), clean=None, batch_size=2)"
    )
    line = refused(here, "compare", task_file(here, body), *QUICK)
    assert "has 4 training examples; early stopping holds out a fifth of them" in line


def test_weights_that_differ_from_call_to_call(here: Path) -> None:
    body = (
        "g = torch.Generator(); g.seed()\n    "
        "def model():\n        m = torch.nn.Linear(4, 2)\n        "
        "m.weight.data = torch.randn(2, 4, generator=g)\n        return m\n    "
        "return dataclasses.replace(tiny.tiny(seed), model=model)"
    )
    line = refused(here, "compare", task_file(here, body), *QUICK)
    assert "starts from other weights each time it is made with the same seed (loss " in line


def test_the_usage_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(poprisk_lab.cli.__file__)), "audit", "--nosuch"])
    with pytest.raises(SystemExit) as error:
        poprisk_lab.cli.main()
    assert error.value.code == 2
    assert "Usage: poprisk audit" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_an_interruption_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("poprisk_lab.comparison.train", interrupted)
    result = run("compare", TINY, *QUICK)
    assert result.exit_code == 130
    assert result.stderr.startswith("poprisk: stopped; repeat the command to go on: ")
    assert f"one every {CHECKPOINT_SECONDS:g} seconds.\n" in result.stderr


# --- names and lists ------------------------------------------------------------------------------


@pytest.fixture
def directories(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the run directories that commands would use; nothing is trained."""
    found: list[Path] = []

    def created(self: Store, *_: object, **__: object) -> None:
        found.append(self.path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "create", created)
    return found


def test_the_directory_s_name_differs_wherever_the_configuration_does(
    directories: list[Path],
) -> None:
    variants: list[list[str]] = [
        [],
        ["--full"],
        ["--epochs", "2"],
        ["--twin"],
        ["--set", "epochs=2"],
        ["--set", "epochs=3"],
        ["--set", "epochs=2", "--epochs", "2"],
    ]
    for options in variants:
        run("compare", TINY, *options)
    assert len(set(directories)) == len(variants)
    for options in (["--workers", "1"], ["--seeds", "10"], ["--device", "cpu"]):
        run("compare", TINY, *options)
        assert directories[-1] == directories[0]
    run("compare", "digits")
    assert directories[-1] == Path("runs/digits")
    run("compare", "digits", "--out", "elsewhere/x")
    assert directories[-1] == Path("elsewhere/x")


@pytest.mark.parametrize("value", ["data/train.csv", "../../up", "/etc/data", "a b"])
def test_a_directory_s_name_stays_below_runs(
    here: Path, directories: list[Path], value: str
) -> None:
    text = "import tiny\ndef make(path=''):\n    return tiny.tiny()\n"
    (here / "mine.py").write_text(text, encoding="utf-8")
    run("compare", "mine.py:make", "--set", f"path={value}")
    assert directories[0].parent == Path("runs")


def test_tasks_lists_every_built_in_one() -> None:
    result = run("tasks")
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert result.exit_code == 0
    assert [line.split()[0] for line in lines] == list(BUILT_IN)
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [("n=3", 3), ("n=0.25", 0.25), ("n=1e-3", 1e-3), ("n=", ""), ("n=a=b", "a=b"), ("n=x", "x")],
)
def test_settings_are_numbers_where_they_can_be(text: str, value: object) -> None:
    name, found = poprisk_lab.cli._parse_setting(text)
    assert (name, found, type(found)) == ("n", value, type(value))


COMMANDS = ["", "compare", "explain", "reproduce", "report", "tasks", "bench", "bench kernel"]


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "COLUMNS"} | changes


def piped(folder: Path, *arguments: str, **changes: str) -> str:
    """What the command prints to a file, of whose width it knows nothing."""
    call = Call(run_command, (arguments, folder, environment(**changes)))
    (done,) = at_once(call)
    assert (done.code, done.stderr) == (0, "")
    return done.stdout


HELP = """
import sys
from poprisk_lab.cli import main
for line in sys.argv[1:]:
    sys.argv = ["poprisk", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
    print("---")
print(*sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, str], set[str]]:
    """What every command prints as help to a pipe, and the modules that are loaded then."""
    lines = ["--version", *(f"{command} --help" for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *lines],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    *texts, rest = done.stdout.split("---\n")
    assert rest == ""
    return dict(zip(lines, texts, strict=True)), set(done.stderr.split())


def test_help_waits_for_no_torch(helps: tuple[dict[str, str], set[str]]) -> None:
    texts, loaded = helps
    assert texts.pop("--version").startswith("poprisk ")
    assert all("Usage" in text for text in texts.values())
    assert "poprisk_lab.cli" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "sklearn", "plotly", "jinja2", "poprisk"}


def test_the_claims_of_the_help_are_the_claims() -> None:
    assert [*CLAIMS, ALL] == poprisk_lab.cli.CLAIM_NAMES


def test_the_shell_completes_commands_and_claims() -> None:
    def completed(line: str) -> list[str]:
        asked = environment(
            _POPRISK_COMPLETE="complete_bash",
            COMP_WORDS=line,
            COMP_CWORD=str(len(line.split(" ")) - 1),
        )
        done = subprocess.run([POPRISK], capture_output=True, text=True, check=True, env=asked)
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("poprisk re") == ["reproduce", "report"]
    assert completed("poprisk reproduce gro") == ["grokking", "grokking-multistep"]
    assert completed("poprisk explain --opt") == ["--optimizer"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command: str, helps: tuple[dict[str, str], set[str]]) -> None:
    assert max(map(len, helps[0][f"{command} --help"].splitlines())) <= 80


@pytest.mark.parametrize(("columns", "widest"), [({}, 80), ({"COLUMNS": "50"}, 50)])
def test_a_pipe_is_80_columns_wide_or_as_wide_as_columns_says(
    here: Path, columns: dict[str, str], widest: int
) -> None:
    widths = [len(line) for line in piped(here, "tasks", **columns).splitlines()]
    assert widest - 20 < max(widths) <= widest


def test_the_summary_of_all_claims_has_a_line_for_each(here: Path) -> None:
    text = piped(here, "reproduce", "all", "--summary", "--out", str(here))
    head, rule, *rows, _, page = text.strip().splitlines()
    assert head.split() == ["claim", "verdict", "found", "criterion"]
    assert set(rule.strip()) == {"─"}
    assert page.startswith("Page: ")
    assert [row.split()[0] for row in rows] == list(CLAIMS)
    assert all(len(row) <= 80 for row in rows)
    assert re.match(r" *grokking +partly reproduced +5\.21 +times fewer steps", rows[0])


def test_without_a_command_there_is_help() -> None:
    result = run()
    assert all(name in result.output for name in ("compare", "report", "tasks", "bench"))


@pytest.mark.parametrize("options", [["--threads", "0"], ["--steps", "0"]])
def test_bench_counts_are_at_least_one(here: Path, options: list[str]) -> None:
    assert refused(here, "bench", *options) == "--threads and --steps must be at least 1."
