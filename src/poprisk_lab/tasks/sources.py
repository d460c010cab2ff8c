"""Which Python files a task consists of, and where in them an error arose."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import poprisk

INSTALLED = {"site-packages", "dist-packages"}
_LIBRARIES = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")]
_OWN = [Path(__file__).resolve().parents[1], Path(poprisk.__file__).resolve().parent]


def is_users_file(name: str) -> bool:
    """Whether a file is the user's: not Python's, not installed, not poprisk's."""
    path = Path(name).resolve()
    if path.suffix != ".py" or INSTALLED & set(path.parts):
        return False
    return not any(path.is_relative_to(folder) for folder in [*_OWN, *_LIBRARIES])


def task_sources(file: Path) -> dict[str, str]:
    """A hash of each file of the user's that a task's file imports, directly or through others.

    Imports are read from the text, wherever in a file they stand, and looked up among the modules
    that are loaded, so that it makes no difference what else is.

    Args:
        file: the task's; it was loaded before.

    Returns:
        Hashes by module name.
    """
    found: dict[str, str] = {}
    left = [(file, "")]
    while left:
        path, package = left.pop()
        for name in _imports(path, package):
            module = sys.modules.get(name)
            origin = getattr(module, "__file__", None)
            if name in found or not origin or not is_users_file(origin):
                continue
            found[name] = hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:16]
            left.append((Path(origin), getattr(module, "__package__", None) or ""))
    return dict(sorted(found.items()))


def _imports(path: Path, package: str) -> Iterator[str]:
    """Every module that a file may import by name, with the packages that hold it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*filter(None, parts), *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            pieces = name.split(".")
            yield from (".".join(pieces[: i + 1]) for i in range(len(pieces)))


def place_of(error: BaseException) -> str:
    """File, line and function of the user's last frame of an error, of its first cause if there.

    Empty for an error in no file of the user's, and for one that says its place itself.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in reversed(chain):
        frames = [f for f in traceback.extract_tb(one.__traceback__) if is_users_file(f.filename)]
        if isinstance(one, SyntaxError):
            return ""
        if frames:
            last = frames[-1]
            where = "" if last.name == "<module>" else f", in {last.name}"
            return f" ({Path(last.filename).name}, line {last.lineno}{where})"
    return ""
