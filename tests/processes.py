"""Functions in new processes, forked from a server that has loaded torch already."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HANGS = 1800
"""Seconds after which processes wait for each other for ever; they take some 20 alone."""


class Finished(NamedTuple):
    """How a process ended: its exit code and what it printed."""

    code: int | None
    stdout: str
    stderr: str


class Call(NamedTuple):
    """A function of a module and its arguments."""

    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()


def at_once(*calls: Call) -> list[Finished]:
    """Make each call in a process of its own, all at the same time."""
    # Here, for the mutations' sake: their tests import this module each in a fork of its own.
    from poprisk_lab.pool import warm_up_workers, worker_context

    warm_up_workers()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(len(calls))]
        processes = [
            worker_context().Process(target=_make, args=(call, place))  # pyrefly: ignore
            for call, place in zip(calls, places, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANGS)
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.join()
        return [
            Finished(process.exitcode, *(_text(place, kind) for kind in ("out", "err")))
            for process, place in zip(processes, places, strict=True)
        ]


def _text(place: Path, kind: str) -> str:
    return place.with_suffix(f".{kind}").read_text(encoding="utf-8")


def _make(call: Call, place: Path) -> None:
    """Make the call with what it prints in files."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(place.with_suffix(f".{kind}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    call.function(*call.arguments)
    sys.stdout.flush()


def script(path: Path, text: str) -> Path:
    """Write a program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_code(code: str, folder: Path, warnings_are_errors: bool) -> None:
    """Run a program in a folder, as ``python -c`` does."""
    if warnings_are_errors:
        warnings.simplefilter("error")
    os.chdir(folder)
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_command(arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
    """Run ``poprisk`` in a folder, loaded in this environment."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from poprisk_lab.cli import main

    sys.argv = ["poprisk", *arguments]
    main()
