"""What the package needs of the system: nothing at import that only POSIX systems have."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

SRC = Path(__file__).parents[1] / "src"

POSIX_MODULES = (
    "fcntl grp posix pwd pty readline resource syslog termios tty crypt nis spwd _posixsubprocess "
    "multiprocessing.forkserver multiprocessing.popen_fork multiprocessing.popen_forkserver"
).split()
"""Modules that Windows lacks, or that do nothing there."""

POSIX_NAMES = {
    "os": (
        "fork forkpty getuid geteuid getgid getegid getpgid getpgrp setsid killpg mkfifo "
        "sched_getaffinity sched_setaffinity getloadavg nice sysconf uname chown"
    ).split(),
    "signal": "SIGKILL SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGCHLD alarm setitimer pause".split(),
    "time": ["tzset", "clock_gettime"],
    "multiprocessing.context": ["ForkServerProcess", "ForkProcess", "ForkContext"],
}

WITHOUT = f"""
import sys, multiprocessing, os
for name in {["fcntl", "resource", "pwd", "grp", "termios"]!r}:
    sys.modules[name] = None
del os.sched_getaffinity
multiprocessing.get_all_start_methods = lambda: ["spawn"]
sys.modules["multiprocessing.forkserver"] = None
"""
"""Makes an interpreter that lacks what Windows lacks, as far as one can from inside."""


def at_import(tree: ast.AST) -> list[ast.stmt]:
    """The statements that run when a module is imported: all but the bodies of functions."""
    found: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.stmt):
            found.append(node)
        found += at_import(node)
    return found


def posix_only(text: str) -> list[str]:
    """POSIX-only modules imported at import, and POSIX-only names used unasked anywhere."""
    tree = ast.parse(text)
    found: list[str] = []
    for node in at_import(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        found += [n for n in names if n in POSIX_MODULES]
        found += [
            n for n in names if n.rpartition(".")[2] in POSIX_NAMES.get(n.rpartition(".")[0], ())
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            asked = f'hasattr({node.value.id}, "{node.attr}")' in text
            if node.attr in POSIX_NAMES.get(node.value.id, ()) and not asked:
                found.append(name)
    return found


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_a_module_needs_no_posix_system_to_be_imported(file: Path) -> None:
    assert posix_only(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import fcntl", ["fcntl"]),
        ("import os\ntry:\n    import resource\nfinally:\n    pass", ["resource"]),
        ("class A:\n    import pwd", ["pwd"]),
        ("def f():\n    import fcntl", []),
        ("from multiprocessing import forkserver", ["multiprocessing.forkserver"]),
        (
            "from multiprocessing.context import ForkServerProcess",
            ["multiprocessing.context.ForkServerProcess"],
        ),
        ("import os\ndef f():\n    return os.sched_getaffinity(0)", ["os.sched_getaffinity"]),
        ('import os\na = os.getuid() if hasattr(os, "getuid") else 0', []),
        ("import signal\nsignal.SIGKILL", ["signal.SIGKILL"]),
    ],
)
def test_the_checker_sees_what_only_posix_has(text: str, expected: list[str]) -> None:
    assert posix_only(text) == expected


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )


COMPARE = f"""
import poprisk_lab.bench.kernel
from pathlib import Path
from poprisk_lab.arms import default_arms
from poprisk_lab.comparison import run_directory, train
from poprisk_lab.comparison import Comparison
from poprisk_lab.results import read_run
from poprisk_lab.runner import environment
if __name__ == "__main__":
    what = Comparison(task={tiny.source("tiny")!r}, arms=default_arms(full=False)[1:3], seeds=[0])
    run = run_directory(Path("run"))
    run.create(what.config(), environment(1))
    rows = []
    train(what, run, rows.append)
    print(sum(row["event"] == "end" for row in rows), len(read_run(run).ends))
    from poprisk_lab.cli import main
    main()
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_is_trained_and_the_command_starts_where_posix_is_missing(
    tmp_path: Path,
) -> None:
    """By a spawned worker."""
    done = python(COMPARE, "tasks", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    trained, *tasks = done.stdout.splitlines()
    assert trained == "2 2"
    assert any(line.startswith("grokking") for line in tasks)


def test_a_terminal_that_knows_no_greek_ends_no_command(tmp_path: Path) -> None:
    done = python("import poprisk_lab.cli; poprisk_lab.cli.main()", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compare" in done.stdout
