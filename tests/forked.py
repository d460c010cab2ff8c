"""Pytest on a changed copy of the library, in a fork that has torch loaded already."""

import gc
import importlib
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

OPTIONS = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
LOADED = (
    "torch._dynamo",
    "torch._decomp.decompositions_for_jvp",
    "hypothesis.strategies",
    "scipy.stats",
    "scipy.optimize",
    "scipy.sparse.linalg",
)


def prepare() -> None:
    """Load once what each fork needs, and spare its collector from going through it."""
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def copy_packages(root: Path) -> None:
    """Copy the library and the laboratory to ``root``, with their bytecode."""
    for package in ("poprisk", "poprisk_lab"):
        shutil.copytree(SRC / package, root / package)


def exit_code(root: Path, arguments: list[str], *, seconds: int | None = None) -> int | None:
    """Pytest's exit code with the packages under ``root``; None if a signal ended it.

    Args:
        root: Where the packages are; the output goes to ``output.txt`` there.
        arguments: For pytest.
        seconds: Of processor time, after which the fork is ended.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            sink = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            sys.path.insert(0, str(root))
            paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that a test starts
            code = int(pytest.main([*OPTIONS, *arguments]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code < 0 else code
